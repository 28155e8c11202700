"""Folds of rows, in which the rows of a prompt stay together."""

from collections.abc import Hashable, Sequence

import numpy as np


def fold_of_rows(groups: Sequence[Hashable], folds: int, seed: int = 0) -> np.ndarray:
    """The fold of each row.

    Args:
        groups: one entry a row; rows with the same one, as those of a prompt, come into the same fold.
        folds: number of folds, at least 2.
        seed: of the order in which groups are dealt out, each to the smallest fold so far.

    Returns:
        Shape `(n,)`, int64, in [0, folds).

    Raises:
        ValueError: there are fewer groups than folds, or fewer than two folds.
    """
    if isinstance(folds, bool) or not isinstance(folds, int) or folds < 2:
        raise ValueError(f"`folds` must be an integer of at least 2, got {folds!r}.")
    distinct = list(dict.fromkeys(groups))
    if len(distinct) < folds:
        raise ValueError(
            f"`folds` is {folds}, and the {len(groups)} rows have {len(distinct)} different prompts or groups: lower "
            "`folds`, or name more rows."
        )
    places = {group: place for place, group in enumerate(distinct)}
    of_row = np.array([places[group] for group in groups])
    sizes = np.bincount(of_row)
    order = np.random.default_rng(seed).permutation(len(distinct))
    # Large groups first, so that the folds come out about as large; a stable sort keeps the order among equals
    order = order[np.argsort(-sizes[order], kind="stable")]
    fold_of_group, filled = np.empty(len(distinct), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for group in order:
        fold_of_group[group] = filled.argmin()
        filled[fold_of_group[group]] += sizes[group]
    return fold_of_group[of_row]
