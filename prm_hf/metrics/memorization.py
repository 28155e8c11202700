"""How far a policy has learnt the labels of its training pairs by heart, flipped ones and others apart."""

import torch

from .evaluation import PairEvaluation
from .rewards import reward_accuracy


def memorization_rows(n: int, max_rows: int | None) -> list[int]:
    """The training rows on which memorisation is measured: all `n`, or `max_rows` spread evenly over them.

    A function of its arguments alone, so that every process, run and evaluation measures on the same rows.
    """
    if max_rows is None or n <= max_rows:
        return list(range(n))
    return [i * n // max_rows for i in range(max_rows)]


def memorization_metrics(pairs: PairEvaluation, flipped: torch.Tensor, beta: float) -> dict[str, float]:
    """Accuracy against the labels trained on, for flipped and clean pairs apart.

    Args:
        pairs: The evaluation of `n` training pairs, chosen and rejected as they were trained on.
        flipped: Whether the label of a pair was flipped before training. Shape `(n,)`, bool.
        beta: DPO's β.

    Returns:
        `memorization/flipped_fit` (1: the noise is learnt by heart) and `memorization/clean_fit`; each only if there
        is a pair of its kind.

    Raises:
        ValueError: if `flipped` does not have one entry a pair.
    """
    flipped = torch.as_tensor(flipped, dtype=torch.bool)
    if flipped.shape != (len(pairs),):
        raise ValueError(
            f"`flipped` must have one entry for each of the {len(pairs)} pairs, got shape {tuple(flipped.shape)}: "
            "pass the `flipped` column of the rows that were evaluated."
        )
    metrics = {}
    for name, mask in (("memorization/flipped_fit", flipped), ("memorization/clean_fit", ~flipped)):
        if mask.any():
            metrics[name] = reward_accuracy(pairs.select(mask), beta)
    return metrics
