"""The settings of a Sven run, as dataclass fields: command-line flags and YAML keys through `trl.TrlParser`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from ..trainers.config import with_help
from .hyperparameters import SvenSettings


@with_help
@dataclass
class SvenArguments:
    """
    Arguments of Sven's step, for use beside those of a trainer.

    Parameters:
        optim (`str`, *optional*, defaults to `"sgd"`):
            The optimizer that takes Sven's step as its gradient. `"sgd"` makes exactly the step, times
            `learning_rate`.
        learning_rate (`float`, *optional*, defaults to `0.1`):
            The part of the step that is made. 1 aims at a loss of 0 for every sample at once.
        kappa (`float`, *optional*, defaults to `2.0`):
            The step brings `loss ** (kappa / 2)` to zero.
        k (`int`, *optional*):
            The largest number of singular values that a step uses. By default half of the rows of the batch.
        rtol (`float`, *optional*, defaults to `1e-3`):
            Singular values below this part of the largest are left out.
        svd (`str`, *optional*, defaults to `"gram"`):
            `"gram"` finds the singular values from the inner products of the per-sample gradients; `"svd"` and
            `"randomized"` from the gradients, of which they store the number of samples times the parameters.
        power_iterations (`int`, *optional*, defaults to `1`):
            Power iterations of `svd="randomized"`.
        microbatch_size (`int`, *optional*, defaults to `1`):
            Samples whose mean loss the step takes as one. `1` takes every sample by itself.
        param_fraction (`float`, *optional*, defaults to `1.0`):
            Share of the trained parameters' elements that a step moves, drawn anew for each step.
        mask_by_block (`bool`, *optional*, defaults to `False`):
            Whether whole tensors are drawn.
        variable_k (`bool`, *optional*, defaults to `False`):
            Whether a step uses only as many singular values as do not raise the mean loss of its batch. Needs
            `optim="sgd"` without weight decay.
        max_norm (`float`, *optional*):
            A longer step, before `learning_rate`, is shortened to this norm. It sets `max_grad_norm`, which is 0
            without it: steps are not clipped by default.
        jacobian (`str`, *optional*, defaults to `"layers"`):
            `"layers"` takes per-sample gradients from the inputs and outputs of layers, `"loop"` with a backward pass
            for each sample, for models that `"layers"` refuses.
    """

    optim: str = "sgd"
    learning_rate: float = 0.1
    max_grad_norm: float = 0.0
    kappa: float = 2.0
    k: int | None = None
    rtol: float = 1e-3
    svd: Literal["gram", "svd", "randomized"] = "gram"
    power_iterations: int = 1
    microbatch_size: int = 1
    param_fraction: float = 1.0
    mask_by_block: bool = False
    variable_k: bool = False
    max_norm: float | None = None
    jacobian: Literal["layers", "loop"] = "layers"

    def __post_init__(self) -> None:
        SvenSettings(**{name: getattr(self, name) for name in _OWN}).check()
        if self.max_norm is not None:
            if self.max_grad_norm not in (0.0, self.max_norm):
                raise ValueError(
                    f"`max_norm={self.max_norm:g}` and `max_grad_norm={self.max_grad_norm:g}` both limit the step: "
                    "set one of them."
                )
            self.max_grad_norm = self.max_norm
        if hasattr(super(), "__post_init__"):  # of the trainer's arguments
            super().__post_init__()


_OWN = {f.name for f in fields(SvenArguments)} & {*SvenSettings.names()}


def settings_of(args: SvenArguments) -> SvenSettings:
    """The settings of the step; the seed of what is drawn is that of the run."""
    return SvenSettings(**{name: getattr(args, name) for name in _OWN}, seed=args.seed)


@with_help
@dataclass
class SvenTrainingArguments(SvenArguments, TrainingArguments):
    """[`SvenArguments`] and [`~transformers.TrainingArguments`], for a [`SvenTrainer`]."""


@with_help
@dataclass
class SvenSFTConfig(SvenArguments, SFTConfig):
    """[`SvenArguments`] and [`~trl.SFTConfig`], for a [`SvenSFTTrainer`]."""


@with_help
@dataclass
class SvenDPOConfig(SvenArguments, DPOConfig):
    """[`SvenArguments`] and [`~trl.DPOConfig`], for a [`SvenDPOTrainer`]."""
