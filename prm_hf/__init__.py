"""Population Risk Minimization (PRM) for the Hugging Face fine-tuning stack.

Every name is loaded when it is first used: importing the package costs nothing, not even torch.
"""

from typing import TYPE_CHECKING

from ._extras import load_late


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


__getattr__, __dir__ = load_late(__name__, _LAZY)
