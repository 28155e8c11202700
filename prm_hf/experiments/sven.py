"""Runs of the method `sven`: the trainers of comparisons with Sven's steps, and their learning rates."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ..runs.methods import find_method
from ..sven.hyperparameters import SvenSettings
from ..sven.mixin import SvenMixin
from ..sven.trainers import SvenDPOMixin, SvenSFTMixin, SvenTrainer
from ..trainers import PRMDPOTrainer, PRMSFTTrainer
from .problems import Problem, ProblemTrainer


SVEN = "sven"


class SvenComparedDPOTrainer(SvenDPOMixin, PRMDPOTrainer):
    """The trainer of a DPO comparison, with Sven's steps."""


class SvenComparedSFTTrainer(SvenSFTMixin, PRMSFTTrainer):
    """The trainer of an SFT comparison, with Sven's steps."""


class SvenWholeBatchTrainer(SvenTrainer):
    """A trainer of models with batch normalization, in which a row's loss depends on its batch."""

    sven_settings = SvenSettings(jacobian="loop")


class SvenProblemTrainer(SvenMixin, ProblemTrainer):
    """The trainer of a small problem, with Sven's steps; `row_losses` gives the loss of each row."""

    def __init__(self, problem: Problem, args: TrainingArguments, row_losses: Callable[[dict, dict], Tensor]) -> None:
        self.row_losses = row_losses
        super().__init__(problem, args)

    def per_sample_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        return self.row_losses(model(**inputs), inputs)


_TRAINERS = {PRMDPOTrainer: SvenComparedDPOTrainer, PRMSFTTrainer: SvenComparedSFTTrainer, Trainer: SvenTrainer}


def trainer_class(kind: type[Trainer], method: str) -> type[Trainer]:
    """The class of a trainer for the runs of a method: `kind`, or for `sven` the one that makes its steps."""
    return _TRAINERS[kind] if find_method(method).key == SVEN else kind


def rate_factor(trainer: Trainer) -> float:
    """What a learning rate of AdamW is multiplied by, so that a step of Sven is at most as long as AdamW's.

    Steps are clipped to the norm c of `max_grad_norm`, and those of AdamW at a learning rate of 1 have about the norm
    √d, d the number of trained elements.
    """
    numel = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    return numel**0.5 / trainer.args.max_grad_norm
