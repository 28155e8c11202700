"""Sven: the step that lowers every sample's loss at once, as an optimizer and for the Hugging Face trainers.

The optimizer needs torch alone; the trainers are loaded when they are first used.
"""

from typing import TYPE_CHECKING

from .._extras import load_late, require
from .diagnostics import SampleGram, per_sample_gram
from .polyak import PolyakSGD
from .step import SvenStep
from .sven import Sven


__all__ = [
    "PolyakSGD",
    "SampleGram",
    "Sven",
    "SvenArguments",
    "SvenDPOConfig",
    "SvenDPOTrainer",
    "SvenMixin",
    "SvenSFTConfig",
    "SvenSFTTrainer",
    "SvenStep",
    "SvenTrainer",
    "SvenTrainingArguments",
    "per_sample_gram",
]

_LAZY = {
    "SvenArguments": "arguments",
    "SvenDPOConfig": "arguments",
    "SvenDPOTrainer": "trainers",
    "SvenMixin": "mixin",
    "SvenSFTConfig": "arguments",
    "SvenSFTTrainer": "trainers",
    "SvenTrainer": "trainers",
    "SvenTrainingArguments": "arguments",
}

if TYPE_CHECKING:
    from .arguments import SvenArguments, SvenDPOConfig, SvenSFTConfig, SvenTrainingArguments
    from .mixin import SvenMixin
    from .trainers import SvenDPOTrainer, SvenSFTTrainer, SvenTrainer


def _check(name: str) -> None:
    require(f"prm_hf.sven.{name}", "transformers", "trl", "accelerate", "datasets", "peft")


__getattr__, __dir__ = load_late(__name__, _LAZY, _check)
