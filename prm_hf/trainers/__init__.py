"""TRL's trainers with PRM as their optimizer."""

from .._extras import require


require("prm_hf.trainers", "transformers", "trl", "accelerate", "datasets", "peft")

from .callbacks import (  # noqa: E402
    MemorizationCallback,
    PopulationRiskStopping,
    PopulationRiskStoppingCallback,
    PRMCallback,
)
from .config import PRMArguments, PRMDPOConfig, PRMSFTConfig  # noqa: E402
from .dpo import PRMDPOTrainer  # noqa: E402
from .mixin import PRMTrainerMixin  # noqa: E402
from .sft import PRMSFTTrainer  # noqa: E402


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
