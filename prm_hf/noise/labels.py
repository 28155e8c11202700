"""Noise in class labels: drawn anew, from all classes, from the other ones, or by a transition matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import ClassLabel

from .rng import row_generator
from .rows import RowNoise


@dataclass(frozen=True)
class RedrawClass(RowNoise):
    """A new class for a row, from a number of the row's own. One that is -1 (unlabelled) stays."""

    seed: int
    stream: str
    n_classes: int
    exclude_true: bool
    cumulative: list[list[float]] | None

    def change_row(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        ((column, label),) = row.items()
        if label is None or label < 0:
            return row
        rng = row_generator(self.seed, index, self.stream)
        if self.cumulative is not None:
            new = int(np.searchsorted(self.cumulative[label], rng.random(), side="right"))
        elif self.exclude_true:
            new = int(label + rng.integers(1, self.n_classes)) % self.n_classes
        else:
            new = int(rng.integers(self.n_classes))
        return {column: new}


def redraw_class(
    feature: ClassLabel,
    seed: int,
    stream: str,
    exclude_true: bool,
    transition: Sequence[Sequence[float]] | np.ndarray | None,
) -> RedrawClass:
    """The noise, once its options have been checked against the classes of the column."""
    n = feature.num_classes
    if n < 2:
        raise ValueError(f"The label column has {n} class: there is no other one to draw.")
    if transition is None:
        return RedrawClass(seed, stream, n, exclude_true, None)
    if exclude_true:
        raise ValueError("`exclude_true` and `transition` contradict: give `transition` a diagonal of zeros instead.")
    try:
        matrix = np.asarray(transition, dtype=np.float64)
    except (TypeError, ValueError):  # no numbers, or rows of several lengths
        matrix = np.empty(0)
    if matrix.shape != (n, n) or not (matrix >= 0).all() or not np.allclose(matrix.sum(axis=-1), 1):
        raise ValueError(
            f"`transition` must be a {n} x {n} matrix of probabilities whose rows sum to 1, got shape {matrix.shape}."
        )
    cumulative = matrix.cumsum(axis=1)
    cumulative[:, -1] = 1.0
    # Classes of probability 0 after the last possible one must not be reached by rounding.
    for row, probabilities in zip(cumulative, matrix, strict=True):
        row[probabilities.nonzero()[0][-1] :] = 1.0
    return RedrawClass(seed, stream, n, False, cumulative.tolist())
