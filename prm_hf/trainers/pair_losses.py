"""What DPO's loss becomes where pairs do not count alike: labels that are wrong with a known probability, and others.

TRL computes the mean loss of a batch. Both are that mean and a change, which is made of the rewards of single pairs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from torch.nn import functional as F
from trl import DPOConfig


PROBABILITY = "probability_wrong"  # the column of the training rows
SWAPPABLE = ("sigmoid", "robust", "hinge", "ipo", "sigmoid_norm")


class Rewards(NamedTuple):
    """β times the log-ratios of the pairs of a batch, with their gradients, and the tokens of each completion."""

    chosen: Tensor
    rejected: Tensor
    tokens: tuple[Tensor, Tensor]


def rewards_of(recorded: list[Tensor], beta: float, completion_mask: Tensor) -> Rewards:
    """The rewards, from the tensors that TRL's loss gathers for its metrics, in their order.

    TRL gathers the log-probabilities with their gradients, and before them the rewards without: those of chosen and of
    rejected completions, accuracies and margins.
    """
    place = next(i for i, values in enumerate(recorded) if values.dim() == 1 and values.requires_grad)
    chosen, rejected = recorded[place - 4 : place - 2]
    logps = recorded[place : place + 2]
    with_gradients = [
        reward + beta * (logp - logp.detach()) for reward, logp in zip((chosen, rejected), logps, strict=True)
    ]
    return Rewards(*with_gradients, tuple(completion_mask.sum(1).clamp(min=1).chunk(2)))


def swap_costs(rewards: Rewards, beta: float, losses: list[str], weights: list[float]) -> Tensor:
    """By how much the loss of each pair is larger with its sides swapped, `(n,)`, summed over TRL's losses."""
    x = rewards.chosen - rewards.rejected
    # IPO and the normalized loss compare the mean log-ratio of a token
    mean = rewards.chosen / rewards.tokens[0] - rewards.rejected / rewards.tokens[1]
    costs = {
        "sigmoid": x,  # -log σ(-x) + log σ(x)
        "robust": x,
        "hinge": F.relu(1 + x) - F.relu(1 - x),
        "ipo": 2 * mean / beta**2,
        "sigmoid_norm": mean,
    }
    return sum(weight * costs[name] for name, weight in zip(losses, weights, strict=True))


def smoothing_change(probabilities: Tensor, rewards: Rewards, trainer: Any) -> Tensor:
    """The mean of (1-p)·L + p·L_swapped over the pairs, minus that of L."""
    costs = swap_costs(rewards, trainer.beta, trainer.loss_types, trainer.loss_weights)
    return (probabilities.to(costs) * costs).mean()


def pair_loss_change(pair_loss: Callable[[Tensor], Tensor], rewards: Rewards) -> Tensor:
    """`pair_loss`, of the losses of the pairs, minus their mean."""
    losses = -F.logsigmoid(rewards.chosen - rewards.rejected)
    return pair_loss(losses) - losses.mean()


def with_probabilities(collate: Callable[[list[Any]], dict[str, Any]], rows: list[Any]) -> dict[str, Any]:
    """The batch that `collate` makes of `rows`, with the probabilities that their labels are wrong.

    They are the bits of float32 numbers in int32, because DeepSpeed rounds what is floating-point to its dtype.
    """
    values = torch.tensor([row[PROBABILITY] for row in rows], dtype=torch.float32)
    return {**collate(rows), PROBABILITY: values.view(torch.int32)}


def check_probabilities(dataset: Dataset | IterableDataset | None, args: DPOConfig) -> bool:
    """Whether the training rows have the column `probability_wrong`.

    Raises:
        ValueError: the column holds what is no probability, or the loss has no swapped labels, or has them already.
    """
    if PROBABILITY not in (getattr(dataset, "column_names", None) or ()):  # what is no dataset is said elsewhere
        return False
    column = f"The column {PROBABILITY!r} of `train_dataset`"
    if not isinstance(dataset, Dataset) or args.accelerator_config.dispatch_batches:
        raise ValueError(
            f"{column} is not for streams, nor for `dispatch_batches`, whose batches accelerate cuts up: load the "
            "rows without streaming, and leave `dispatch_batches` out."
        )
    dtype = str(dataset.features[PROBABILITY].dtype)
    if not dtype.startswith("float"):
        raise ValueError(f"{column} must be of floats, and is {dtype}: cast it.")
    values = np.array(dataset.with_format(None)[PROBABILITY][:], dtype=np.float64)
    wrong = np.flatnonzero(~((values >= 0) & (values <= 1)))
    if len(wrong):
        raise ValueError(
            f"{column} must be in [0, 1], and {len(wrong)} of {len(values)} rows are not: rows "
            f"{', '.join(map(str, wrong[:5]))}{', …' if len(wrong) > 5 else ''} (from 0). The first has "
            f"{values[wrong[0]]:g}. Correct them."
        )
    check_swappable(args, column, "remove the column")
    return True


def check_swappable(args: DPOConfig, what: str, way_out: str) -> None:
    """Raises ValueError where `what`, which looks at the losses of single pairs, does not know these losses."""
    losses = [args.loss_type] if isinstance(args.loss_type, str) else args.loss_type
    unknown = [name for name in losses if name not in SWAPPABLE]
    if unknown:
        raise ValueError(
            f"{what} changes the loss of single pairs, which it knows of {', '.join(SWAPPABLE)}, and `loss_type` has "
            f"{unknown[0]!r}: use one of them, or {way_out}."
        )
    for name, plain in (("label_smoothing", 0.0), ("use_weighting", False), ("f_divergence_type", "reverse_kl")):
        value = getattr(args, name)
        if getattr(value, "value", value) != plain:
            raise ValueError(
                f"{what} and `{name}={value!r}` both change the loss of a pair: leave `{name}` out, or {way_out}."
            )
