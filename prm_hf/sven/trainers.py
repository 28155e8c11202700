"""Trainers whose optimizer takes Sven's step: for any model, for supervised fine-tuning, and for DPO."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import Tensor, nn
from transformers import Trainer
from trl import DPOTrainer, SFTTrainer

from .checks import check_pair_arguments, check_row_arguments
from .losses import MeansRecorder, Recorder, losses_by_type, plain_head
from .mixin import SvenMixin


class SvenTrainer(SvenMixin, Trainer):
    """
    transformers' [`~transformers.Trainer`] with Sven's steps, for language models, classifiers and regression.

    The arguments are those of [`~transformers.Trainer`], with [`SvenTrainingArguments`] as `args`, and
    `per_sample_loss_func`, from the model's outputs and the batch's labels to the loss of each row, `(B,)`. By default
    it is the model's own loss, row by row: for language models the mean over the tokens of a row.

    Example:

    ```python
    >>> args = SvenTrainingArguments("out", learning_rate=0.1, per_device_train_batch_size=16)
    >>> SvenTrainer(model, args, train_dataset=train, data_collator=collator).train()
    ```
    """

    def __init__(
        self,
        *args: Any,
        per_sample_loss_func: Callable[[Any, Any], Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        self.per_sample_loss_func = per_sample_loss_func
        super().__init__(*args, **kwargs)

    def per_sample_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of each row of a batch, `(B,)`."""
        names = [name for name in self.label_names if name in inputs]
        if not names:
            raise ValueError(
                f"The batch has no labels: it has {', '.join(inputs)}, and `label_names` {self.label_names}."
            )
        labels = [inputs.pop(name) for name in names]
        outputs = model(**inputs)
        labels = labels[0] if len(labels) == 1 else tuple(labels)
        if self.per_sample_loss_func is not None:
            return self.per_sample_loss_func(outputs, labels)
        return losses_by_type(outputs, labels, model.get_base_model() if is_peft_model(model) else model)


class SvenSFTMixin(SvenMixin):
    """[`SvenMixin`] for TRL's SFT trainers: the loss of a row is the mean over its tokens that have a label."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_row_arguments(self.args)
        _prepare_language_model(self)

    def per_sample_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of each row of a batch, `(B,)`."""
        recorder = Recorder(model)
        self.compute_loss(recorder, inputs)  # also collects TRL's metrics
        outputs = recorder.outputs[0]
        return -outputs.log_probs.sum(1) / outputs.label_mask.sum(1).clamp(min=1)


class SvenDPOMixin(SvenMixin):
    """[`SvenMixin`] for TRL's DPO trainers: a sample is a pair, with TRL's losses of pairs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_pair_arguments(self.args)
        if getattr(self, "_packing_is_due", False):  # of a PRMDPOTrainer, which takes it out of its arguments
            raise ValueError("Sven needs one sequence a row: set `padding_free=False`.")
        _prepare_language_model(self)

    def per_sample_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of each pair of a batch, `(B,)`."""
        with MeansRecorder() as means:
            loss = self.compute_loss(model, inputs)
        vectors = means.vectors[: len(self.loss_types)]
        losses = sum(weight * vector for vector, weight in zip(vectors, self.loss_weights, strict=True))
        if not torch.allclose(losses.mean().float(), loss.float(), rtol=1e-3, atol=1e-6, equal_nan=True):
            raise ValueError(
                f"The loss of the batch is {loss.item():.6g}, and the mean over its pairs {losses.mean().item():.6g}: "
                "Sven needs a loss that is the mean of TRL's losses of pairs."
            )
        return losses


class SvenSFTTrainer(SvenSFTMixin, SFTTrainer):
    """
    TRL's [`~trl.SFTTrainer`] with Sven's steps. A sample is a row, and its loss the mean over its tokens.

    The arguments are those of [`~trl.SFTTrainer`], with a [`SvenSFTConfig`] as `args`.
    """


class SvenDPOTrainer(SvenDPOMixin, DPOTrainer):
    """
    TRL's [`~trl.DPOTrainer`] with Sven's steps. A sample is a pair.

    The arguments are those of [`~trl.DPOTrainer`], with a [`SvenDPOConfig`] as `args`. DPO's sigmoid loss never is 0,
    so that whole steps are too long: set `learning_rate` to 0.1 or less, or `max_norm`.
    """


def _prepare_language_model(trainer: Any) -> None:
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError("The load-balancing loss of experts is that of a batch: set `router_aux_loss_coef` to 0.")
    plain_head(trainer.model.get_base_model() if is_peft_model(trainer.model) else trainer.model)
