"""TRL's trainers with PRM as their optimizer.

Every name is loaded when it is first used: [`PRMCallback`] works in a Trainer of transformers where TRL is of another
version, or not installed.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

from .._extras import require


_NEEDS = ("transformers", "trl", "accelerate", "datasets", "peft")
if importlib.util.find_spec("transformers") is None:
    require(__name__, *_NEEDS)

__all__ = [
    "MemorizationCallback",
    "PRMArguments",
    "PRMCallback",
    "PRMDPOConfig",
    "PRMDPOTrainer",
    "PRMSFTConfig",
    "PRMSFTTrainer",
    "PRMTrainerMixin",
    "PopulationRiskStopping",
    "PopulationRiskStoppingCallback",
]

_LAZY = {
    "MemorizationCallback": "memorization",
    "PRMArguments": "config",
    "PRMCallback": "callbacks",
    "PRMDPOConfig": "config",
    "PRMDPOTrainer": "dpo",
    "PRMSFTConfig": "config",
    "PRMSFTTrainer": "sft",
    "PRMTrainerMixin": "mixin",
    "PopulationRiskStopping": "callbacks",
    "PopulationRiskStoppingCallback": "callbacks",
}

if TYPE_CHECKING:
    from .callbacks import PopulationRiskStopping, PopulationRiskStoppingCallback, PRMCallback
    from .config import PRMArguments, PRMDPOConfig, PRMSFTConfig
    from .dpo import PRMDPOTrainer
    from .memorization import MemorizationCallback
    from .mixin import PRMTrainerMixin
    from .sft import PRMSFTTrainer


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _LAZY[name] != "callbacks":
        require(__name__, *_NEEDS)
    return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
