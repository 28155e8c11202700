"""Losses as two functions: a model's logits become predictions, and predictions and targets one loss a term.

The generalized Gauss-Newton matrix needs the two apart: it has the whole curvature of the second, and of the first its
slope alone.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from .._names import did_you_mean
from .batches import Batch


@dataclass(frozen=True)
class Loss:
    """A loss.

    Attributes:
        predict: predictions `(terms, …)` of the logits of a batch.
        of_terms: one loss a term, `(terms,)`, of predictions and targets.
        draw: targets drawn with the probabilities that the predictions stand for; None where they stand for none.
        choose: the class, token or side that is predicted, `(terms,)`; None where the loss has no such thing.
        is_scalar: whether a term has one prediction.
    """

    predict: Callable[[torch.Tensor, Batch], torch.Tensor]
    of_terms: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    draw: Callable[[torch.Tensor, torch.Generator], torch.Tensor] | None = None
    choose: Callable[[torch.Tensor], torch.Tensor] | None = None
    is_scalar: bool = False


def find_loss(loss: str | Callable, beta: float) -> Loss:
    """The loss of that name, or one of a function of predictions and targets."""
    if callable(loss):
        return Loss(lambda logits, batch: logits, lambda predictions, targets: loss(predictions, targets).reshape(-1))
    known = {
        "causal_lm": Loss(lambda logits, batch: logits[batch.places], _cross_entropy, _draw_classes, _most_probable),
        "classification": Loss(lambda logits, batch: logits, _cross_entropy, _draw_classes, _most_probable),
        "dpo": Loss(_margins_by(beta), _logistic, _draw_sides, lambda margins: margins > 0, is_scalar=True),
    }
    if loss not in known:
        raise ValueError(
            f"`loss` is {loss!r}: it must be one of {', '.join(known)}, or a function of predictions and targets that "
            f"returns one loss a term.{did_you_mean(str(loss), known)}"
        )
    if loss == "dpo" and not (isinstance(beta, int | float) and 0 < beta < math.inf):
        raise ValueError(f"`beta` is {beta!r}: it must be a finite number above 0.")
    return known[loss]


def sequence_differences(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """log p(chosen) − log p(rejected) of each pair, `(pairs,)`."""
    rows, _ = batch.places
    logps = logits[batch.places].log_softmax(-1).gather(-1, batch.tokens[:, None]).squeeze(-1)
    sums = torch.zeros(logits.shape[0], dtype=logps.dtype, device=logps.device).index_add(0, rows, logps)
    chosen, rejected = sums.chunk(2)
    return chosen - rejected


def _margins_by(beta: float) -> Callable[[torch.Tensor, Batch], torch.Tensor]:
    return lambda logits, batch: beta * (sequence_differences(logits, batch) - batch.reference)


def _cross_entropy(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if predictions.dim() != 2 or targets.shape != predictions.shape[:1]:
        raise ValueError(
            f"The model's logits have the shape {tuple(predictions.shape)} and the labels {tuple(targets.shape)}: "
            "a class of each row takes (rows, classes) and (rows,). For other shapes pass a function as `loss`."
        )
    return nn.functional.cross_entropy(predictions, targets, reduction="none")


def _logistic(margins: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return nn.functional.binary_cross_entropy_with_logits(margins, targets.to(margins.dtype), reduction="none")


def _draw_classes(predictions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    probabilities = predictions.detach().double().softmax(-1).cpu()
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1).to(predictions.device)


def _draw_sides(margins: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    probabilities = margins.detach().double().sigmoid().cpu()
    return torch.bernoulli(probabilities, generator=generator).to(margins)


def _most_probable(predictions: torch.Tensor) -> torch.Tensor:
    return predictions.argmax(-1)
