"""TRL's trainers with PRM as their optimizer.

Every name is loaded when it is first used: [`PRMCallback`] works in a Trainer of transformers where TRL is of another
version, or not installed.
"""

import importlib.util
from typing import TYPE_CHECKING

from .._extras import load_late, require


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


def _check(name: str) -> None:
    if _LAZY[name] != "callbacks":
        require(__name__, *_NEEDS)


__getattr__, __dir__ = load_late(__name__, _LAZY, _check)
