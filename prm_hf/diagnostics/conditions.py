"""What must hold for a bound: independent units, a prior that saw none of them, and payment for all that was tried."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from ..runs.write import write_json
from .risk import Task


TRIED_FILE = "tried.json"  # in `output_dir`: what was tried so far, one entry a configuration


def units_of(dataset: Dataset, task: Task, unit: str | None) -> tuple[np.ndarray, str]:
    """Which rows belong to one independent unit.

    Args:
        dataset: `n` rows.
        task: for `"preference"` rows of one prompt are one unit, by default.
        unit: a column whose value is the unit's, `"row"` for rows that are independent, or None for the default.

    Returns:
        The number of each row's unit, from 0 on, int64 of shape `(n,)`; and the unit's name.

    Raises:
        ValueError: there is no such column, or rows without a unit are copies of each other.
    """
    columns = dataset.column_names
    if unit is None and task == "preference":
        unit = next((name for name in ("prompt", "prompt_ids") if name in columns), None)
        if unit is None:
            raise ValueError(
                "`unit` is needed: pairs of one prompt are not independent, and `dataset` has no column 'prompt' or "
                f"'prompt_ids'. Name the column that says which pairs belong together, among {columns}."
            )
    if unit not in (None, "row"):
        if unit not in columns:
            raise ValueError(f"`unit={unit!r}` is neither 'row' nor a column of `dataset`: {columns}.")
        keys: Sequence[Hashable] = [_digest(value) for value in dataset.with_format(None)[unit]]
        return np.unique(keys, return_inverse=True)[1].astype(np.int64), unit
    if unit is None:
        copies = len(dataset) - len(set(row_digests(dataset)))
        if copies:
            raise ValueError(
                f"{copies} rows of `dataset` are copies of others, so rows may not be independent. Drop the copies, "
                "name the column that says which rows belong together as `unit`, or pass `unit='row'` if each row was "
                "drawn independently nevertheless."
            )
    return np.arange(len(dataset)), "row"


def row_digests(dataset: Dataset) -> list[str]:
    """A hash of each row's content."""
    return [_digest(row) for row in dataset.with_format(None)]


def check_prior_data(dataset: Dataset, prior_data: Dataset, unit: str) -> None:
    """Raises a ValueError if a unit of `dataset` is among the rows that the prior was trained on."""
    if unit == "row":
        shared = set(dataset.column_names) & set(prior_data.column_names)
        if not shared:
            raise ValueError(
                f"`prior_data` has the columns {prior_data.column_names}, none of which `dataset` has: they can't be "
                "compared."
            )
        seen, mine = (row_digests(rows.select_columns(sorted(shared))) for rows in (prior_data, dataset))
    else:
        if unit not in prior_data.column_names:
            raise ValueError(f"`prior_data` has no column {unit!r}, the independent unit: {prior_data.column_names}.")
        seen, mine = ([_digest(value) for value in rows.with_format(None)[unit]] for rows in (prior_data, dataset))
    both = sum(Counter(mine)[key] for key in set(seen) & set(mine))
    if both:
        raise ValueError(
            f"{both} rows of `dataset` are of a {unit} that `prior_data` has too: the prior saw them, so the bound "
            "would not hold. Leave them out, with all rows of that unit."
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=_as_text).encode()).hexdigest()


def _as_text(value: Any) -> str:
    """What JSON has no form for: images and arrays by their bytes, dates by their text."""
    return value.tobytes().hex() if hasattr(value, "tobytes") else str(value)


class Tried:
    """The configurations that were tried, each of which makes all bounds a little larger.

    A configuration is what the reader of the file must know beside it, as the smoothing or the random subspace. In one
    call the prior gives all of them the same weight. Over calls with one `output_dir`, the k-th has the weight
    1 / (k (k + 1)), so that the best of all may be taken whenever one stops.
    """

    def __init__(self, output_dir: str | Path | None, by_hand: int) -> None:
        self.folder, self.by_hand = None if output_dir is None else Path(output_dir), by_hand

    def count(self, description: dict[str, Any], choices: int) -> float:
        """The number of configurations that a call with so many `choices` pays for, at least 1."""
        if self.folder is None:
            return self.by_hand * choices
        file = self.folder / TRIED_FILE
        self.folder.mkdir(parents=True, exist_ok=True)
        entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        if description not in entries:
            entries.append(description)
            write_json(file, entries)
        k = entries.index(description) + 1
        return self.by_hand * choices * k * (k + 1)


def misc_bits(configurations: float) -> float:
    """log2 of the number of configurations."""
    return math.log2(configurations)
