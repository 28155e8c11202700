"""Sven: the step that lowers every sample's loss at once, as an optimizer and for the Hugging Face trainers.

The optimizer needs torch alone; the trainers are loaded when they are first used.
"""

import importlib
from typing import TYPE_CHECKING

from .._extras import require
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


def __getattr__(name: str):
    if name in _LAZY:
        require(f"prm_hf.sven.{name}", "transformers", "trl", "accelerate", "datasets", "peft")
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
