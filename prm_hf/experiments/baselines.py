"""Methods that answer label noise without a mask: other losses of pairs, labels by a vote, a part of the way."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments

from ..noise import wrong_labels
from ..runs.methods import Method
from .rows import text_of


PAIR_LOSSES = ("trimmed", "drdpo")  # they look at the batch of a process


def trimmed_loss(losses: Tensor, share: float) -> Tensor:
    """The mean without the largest `share` of the losses, `(n,)`, rounded to whole pairs."""
    kept = len(losses) - min(round(share * len(losses)), len(losses) - 1)
    return losses.topk(kept, largest=False).values.mean()


def drdpo_loss(losses: Tensor, temperature: float) -> Tensor:
    """Dr. DPO (arXiv 2407.07880): -b log mean exp(-loss / b) over the losses, `(n,)`, with b the `temperature`."""
    return -temperature * ((-losses / temperature).logsumexp(0) - math.log(len(losses)))


def set_pair_loss(trainer: Any, method: Method) -> None:
    """Gives a DPO trainer the loss of `trimmed`, after the warm-up, or of `drdpo`; no other method changes it."""
    if method.key == "drdpo":
        trainer.pair_loss = lambda losses: drdpo_loss(losses, method.value)
    if method.key == "trimmed":

        def loss(losses: Tensor) -> Tensor:
            is_warm = trainer.state.global_step >= trainer.args.get_warmup_steps(trainer.state.max_steps)
            return trimmed_loss(losses, method.value) if is_warm else losses.mean()

        trainer.pair_loss = loss


def check_pair_loss(method: Method, args: TrainingArguments) -> None:
    """Raises ValueError where the batch of a process is too small for the loss of a method to be another one."""
    n = args.per_device_train_batch_size
    if method.key == "trimmed" and not round(method.value * n):
        raise ValueError(f"trims none of the {n} pairs of a batch: raise `per_device_train_batch_size`, or the share.")
    if method.key == "drdpo" and n == 1:
        raise ValueError(
            "weighs the pairs of a batch against each other, and `per_device_train_batch_size` is 1: raise it."
        )


INTERPOLATE = "interpolate"


class Interpolation(TrainerCallback):
    """Moves trained weights w to w₀ + factor·(w - w₀), w₀ those that the trainer was made with.

    The copies of w₀ and, from the first move on, of w are in the host's memory.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.model = trainer.model
        self.start, self.end = self._copy(), {}

    def _trained(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _copy(self) -> dict[str, Tensor]:
        return {name: p.detach().to("cpu", copy=True) for name, p in self._trained()}

    @torch.no_grad()
    def move(self, factor: float) -> None:
        """Moves the weights, in float32 whatever they are kept in. A later move is one of the same w."""
        self.end = self.end or self._copy()
        for name, p in self._trained():
            start, end = (weights[name].to(p.device).float() for weights in (self.start, self.end))
            p.copy_(start + factor * (end - start))


def votes(rows: Dataset, groups: Sequence[int]) -> list[bool]:
    """Whether the pairs of a prompt vote against each label: the others by more than the two points of its own vote.

    Args:
        groups: one a row, equal where rows have a prompt in common.

    Raises:
        ValueError: no completion is in two pairs of a prompt.
    """
    found = pair_votes(rows, groups)
    if not found.any():
        raise ValueError(
            "`vote` needs prompts with several pairs that share completions, and here every completion is in one "
            "pair: leave it out of `methods`."
        )
    return (found < -2).tolist()


def pair_votes(rows: Dataset, groups: Sequence[int]) -> np.ndarray:
    """What the other pairs of its prompt say about each label, `(n,)`; a group may have several prompts."""
    prompts = rows["prompt"][:] if "prompt" in rows.column_names else [""] * len(rows)

    def texts(side: str) -> list[tuple[str, str]]:
        return [(text_of(prompt), text_of(text)) for prompt, text in zip(prompts, rows[side], strict=True)]

    return wrong_labels.votes(groups, texts("chosen"), texts("rejected"))
