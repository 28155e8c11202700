"""Population Risk Minimization (PRM) for the Hugging Face fine-tuning stack.

The optimizer is loaded with the package; everything that needs transformers, TRL or datasets when it is first used.
"""

import importlib
from typing import TYPE_CHECKING

from .optim import PRM


__version__ = "0.1.0"

__all__ = [
    "PRM",
    "PRMDPOConfig",
    "PRMDPOTrainer",
    "PRMSFTConfig",
    "PRMSFTTrainer",
    "flip_preferences",
]

_LAZY = {
    "PRMDPOConfig": "trainers",
    "PRMDPOTrainer": "trainers",
    "PRMSFTConfig": "trainers",
    "PRMSFTTrainer": "trainers",
    "flip_preferences": "noise",
}

if TYPE_CHECKING:
    from .noise import flip_preferences
    from .trainers import PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
