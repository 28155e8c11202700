"""TRL's trainers with PRM as their optimizer."""

from .arguments import PRMArguments, PRMDPOConfig, PRMSFTConfig
from .callbacks import PopulationRiskStopping, PRMCallback
from .dpo import PRMDPOTrainer
from .memorization import MemorizationCallback
from .mixin import PRMTrainerMixin
from .sft import PRMSFTTrainer


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
]
