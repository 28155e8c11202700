"""Which labels are wrong, for any trainer of pairs, completions or classes, by models of folds of its rows."""

import gc
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from transformers import Trainer

from .files import Suspects, judge_rows
from .margins import ROW, MarginRecorder, join_margins, with_other_prompts


HOW = ("out_of_fold", "in_sample", "both")


def find_wrong_labels(
    make_trainer: Callable[[Dataset, Dataset], Trainer],
    dataset: Dataset,
    *,
    how: Literal["out_of_fold", "in_sample", "both"] = "both",
    folds: int = 5,
    groups: str | Sequence[Hashable] | None = None,
    seed: int = 0,
) -> Suspects:
    """Trains models that have not seen a row, and judges by them whether its label is wrong.

    For the trainers of pairs (DPO), completions (SFT) and classes of a model with `logits`, with any optimizer, TRL's
    own and transformers' included. Collective over processes.

    Args:
        make_trainer: makes a new trainer, with a new model, of the rows to train on and of rows that must become its
            `eval_dataset`: all rows, with a column of their numbers, which are measured after every epoch; of
            completions also a copy of each with another prompt. It is called once for each fold, and of `"in_sample"`
            once, with all rows as those to train on.
        dataset: `n` rows with the labels that are doubted.
        how: `"both"` trains on all folds but one, for each fold in turn; margins of the fold that is left out give
            the probabilities, and those of the folds that are trained on help to rank the rows. `"out_of_fold"` has no
            such help. `"in_sample"` trains one model, on all rows, whose probabilities deserve less trust.
        folds: number of folds.
        groups: a column, or one entry a row: rows with the same one are held out together. Default: the column
            `group` or else `prompt`, if there is one, otherwise each row is by itself.
        seed: of the folds.

    Returns:
        The [`Suspects`]: probability, rank and margins of each row, and the estimated share of wrong labels.

    Raises:
        TypeError, ValueError: an argument is not what it must be; a trainer has no `eval_dataset`; a model diverged.

    Example:

    ```python
    >>> def make_trainer(train, rows):
    ...     return DPOTrainer(model_name, args=args, train_dataset=train, eval_dataset=rows)
    >>> suspects = find_wrong_labels(make_trainer, dataset)
    >>> suspects.share, suspects.probabilities
    ```
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"`dataset` must be a `datasets.Dataset`, got {type(dataset).__name__}.")
    if how not in HOW:
        raise ValueError(f"`how` must be one of {', '.join(HOW)}, got {how!r}.")
    if ROW in dataset.column_names:
        raise ValueError(f"`dataset` has a column {ROW!r}, which is to hold the numbers of rows: rename it.")
    kinds = {"preference": "chosen", "completion": "completion"}
    kind = next((kind for kind, column in kinds.items() if column in dataset.column_names), "label")
    groups, measured = _groups_of(dataset, groups), dataset.add_column(ROW, list(range(len(dataset))))
    if kind == "completion" and "prompt" in dataset.column_names:
        measured = with_other_prompts(measured)
    fold, margins, in_sample = None, None, None
    if how == "in_sample":
        in_sample = _train(make_trainer, dataset, measured, len(dataset))
    else:
        fold = fold_of_rows(groups, folds, seed)
        parts = (dataset.select(np.flatnonzero(fold != k)) for k in range(folds))
        runs = [_train(make_trainer, part, measured, len(dataset)) for part in parts]
        held = [np.flatnonzero(fold == k) for k in range(folds)]
        margins = join_margins([(rows, run[:, rows]) for rows, run in zip(held, runs, strict=True)], len(dataset))
        if how == "both":  # a row is trained on in all runs but one
            trained = [np.flatnonzero(fold != k) for k in range(folds)]
            parts = [(rows, run[:, rows]) for rows, run in zip(trained, runs, strict=True)]
            in_sample = join_margins(parts, len(dataset))
    rows = dataset.with_format(None).to_list()
    return judge_rows(rows, kind, margins, in_sample, groups, fold)


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


def _groups_of(dataset: Dataset, groups: str | Sequence[Hashable] | None) -> list[str]:
    if groups is None:
        groups = next((name for name in ("group", "prompt") if name in dataset.column_names), range(len(dataset)))
    if isinstance(groups, str):
        if groups not in dataset.column_names:
            raise ValueError(f"`groups` is {groups!r}, and the columns of `dataset` are {dataset.column_names}.")
        groups = dataset.with_format(None)[groups]
    if len(groups) != len(dataset):
        raise ValueError(f"`groups` has {len(groups)} entries, and `dataset` {len(dataset)} rows: give one each.")
    return [str(group) for group in groups]


def _train(
    make_trainer: Callable[[Dataset, Dataset], Trainer], train: Dataset, rows: Dataset, n_rows: int
) -> np.ndarray:
    """Margins of a new model after every epoch, `(epochs, n)` float64, NaN for rows that the trainer left out."""
    trainer: Any = make_trainer(train, rows)
    recorder = MarginRecorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    margins = join_margins([(recorder.rows, recorder.epochs)], n_rows)
    del trainer, recorder
    gc.collect()  # a trainer holds references to itself, by way of its callbacks
    return margins
