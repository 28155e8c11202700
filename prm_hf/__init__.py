"""Population Risk Minimization (PRM) for the Hugging Face fine-tuning stack.

Every name is loaded when it is first used: importing the package costs nothing, not even torch.
"""

import importlib
from typing import TYPE_CHECKING


__version__ = "0.2.0"

__all__ = [
    "PRM",
    "PRMDPOConfig",
    "PRMDPOTrainer",
    "PRMSFTConfig",
    "PRMSFTTrainer",
    "PopulationRiskStopping",
    "PopulationRiskStoppingCallback",
    "flip_preferences",
]

_LAZY = {
    "PRM": "optim",
    "PRMDPOConfig": "trainers",
    "PRMDPOTrainer": "trainers",
    "PRMSFTConfig": "trainers",
    "PRMSFTTrainer": "trainers",
    "PopulationRiskStopping": "trainers",
    "PopulationRiskStoppingCallback": "trainers",
    "flip_preferences": "noise",
}

if TYPE_CHECKING:
    from .noise import flip_preferences
    from .optim import PRM
    from .trainers import (
        PopulationRiskStopping,
        PopulationRiskStoppingCallback,
        PRMDPOConfig,
        PRMDPOTrainer,
        PRMSFTConfig,
        PRMSFTTrainer,
    )


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
