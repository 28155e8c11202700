"""TRL's trainers with PRM as their optimizer."""

from .._extras import require


require("prm_hf.trainers", "transformers", "trl", "accelerate", "datasets", "peft")

from .callbacks import PopulationRiskStopping, PopulationRiskStoppingCallback, PRMCallback
from .config import PRMArguments, PRMDPOConfig, PRMSFTConfig
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
    "PopulationRiskStoppingCallback",
]
