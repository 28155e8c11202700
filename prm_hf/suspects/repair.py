"""Rows whose labels are probably wrong: left out, flipped, or given a soft label. What was decided by hand wins."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from .._files import write_whole
from ..noise.columns import LABELS
from ..runs.text import short
from .decisions import DROP, FLIP, KEEP, check_decisions
from .files import as_line
from .relabel import Kind, Rows, check_flip, columns_of, flip_labels


SOFT = "soft"
HOW = (DROP, FLIP, SOFT)
PROBABILITY = "probability_wrong"  # the column of soft labels


@dataclass(frozen=True)
class RepairSummary:
    """What [`repair`] did.

    Attributes:
        rows: number of rows before.
        kept, dropped, flipped: how many of them stayed as they were, were left out, and have another label now.
        softened: rows that stay with a soft label, a probability above 0.
        unchanged: rows that were to be flipped and have nothing to flip, as two equal sides. They are among `kept`.
        by_hand: number of decisions by hand, by `keep`, `flip` and `drop`.
    """

    how: str
    threshold: float
    rows: int
    kept: int
    dropped: int
    flipped: int
    softened: int
    unchanged: int
    by_hand: dict[str, int]

    def __str__(self) -> str:
        counts = {FLIP: self.flipped, DROP: self.dropped, KEEP: self.kept}
        parts = [
            f"{count} {'is' if count == 1 else 'are'} {_DONE[word]}"
            + (f" ({n} by hand)" if (n := self.by_hand.get(word)) else "")
            for word, count in counts.items()
            if count or word in (self.how, KEEP)
        ]
        text = f"Of {self.rows} rows {', '.join(parts[:-1])}{' and ' if parts[1:] else ''}{parts[-1]}. "
        text += f"A row that nobody decided is {_DONE[self.how]} if its label is wrong with a probability above "
        text += f"{self.threshold:g}."
        if self.how == SOFT:
            text += f" The column `{PROBABILITY}` has the soft labels of {self.softened} rows, and 0 of the others."
        if self.unchanged:
            text += f" {self.unchanged} to be flipped have no other label, as two equal sides, and are kept."
        return text


_DONE = {KEEP: "kept", FLIP: "flipped", DROP: "dropped", SOFT: "given a soft label"}


def repair(
    rows: Rows,
    probabilities: Sequence[float] | np.ndarray,
    how: str = DROP,
    threshold: float | None = None,
    decisions: Mapping[int, str] | None = None,
    preferred: Sequence[Any] | None = None,
    kind: Kind | None = None,
) -> tuple[list[dict[str, Any]] | Dataset, RepairSummary]:
    """Repairs the rows whose label is wrong with a probability above `threshold`.

    Preferences (`chosen`, `rejected`) are flipped as by [`~prm_hf.noise.flip_preferences`], with every column that
    depends on which side is chosen; the column `flipped` of that function still says whether the label is wrong. Class
    labels (`label`) become the other one of two classes, or `preferred`. Rows of completions
    (`prompt`, `completion`) can be dropped alone. All other columns, and the order of the rows, stay.

    Args:
        rows: `n` rows, dicts or a [`~datasets.Dataset`]. They are not changed.
        probabilities: that the label of a row is wrong. Shape `(n,)`, in [0, 1].
        how: `"drop"` leaves rows out, `"flip"` gives them the other label, and `"soft"`, of preferences alone, writes
            the probability into the float column `probability_wrong`, 0 where it is not above the threshold.
            `PRMDPOTrainer` takes it as the label smoothing of the row.
        threshold: in [0, 1]. Default: 0.5, and 0 of `"soft"`, whose rows then each have their probability.
        decisions: `"keep"`, `"flip"` or `"drop"` by the number of the row, from 0, as of `read_decisions`. They win
            over the probability. A row that was decided by hand has a soft label of 0.
        preferred: of class labels, the label that a model prefers, of each of the `n` rows.
        kind: `"preference"`, `"completion"` or `"label"`: which columns hold the label. Default: by their names.

    Returns:
        The repaired rows, a list of dicts or a Dataset as they came, and a summary.

    Raises:
        TypeError, ValueError: an argument is out of its range, or the rows cannot be repaired in this way.
    """
    kind = check_repair(rows, how, kind, preferred is not None)
    threshold = _checked_threshold(how, threshold)
    p = _checked_probabilities(probabilities, len(rows))
    decided = check_decisions(decisions, len(rows))
    by_hand = next((row for row, decision in decided.items() if decision == FLIP), None)
    if by_hand is not None:
        check_flip(rows, kind, f"`decisions` flip row {by_hand}", preferred is not None)
    is_above = p > threshold
    actions = [decided.get(i, how if above else KEEP) for i, above in enumerate(is_above.tolist())]
    to_flip = [action == FLIP for action in actions]
    flipped = [False] * len(rows)
    if any(to_flip):
        rows, flipped = flip_labels(rows, to_flip, kind, preferred)
    result: Any = rows if isinstance(rows, Dataset) else [dict(row) for row in rows]
    softened = 0
    if how == SOFT:
        soft = [x if action == how else 0.0 for x, action in zip(p.tolist(), actions, strict=True)]
        softened = sum(x > 0 for x in soft)
        result = _with_column(result, PROBABILITY, soft)
    stays = [i for i, action in enumerate(actions) if action != DROP]
    if not stays:
        raise ValueError(
            f"`how={how!r}` with `threshold={threshold:g}` and {len(decided)} decisions by hand leaves none of the "
            f"{len(rows)} rows: use a higher threshold."
        )
    result = result.select(stays) if isinstance(result, Dataset) else [result[i] for i in stays]
    n_flipped = sum(flipped)
    return result, RepairSummary(
        how=how,
        threshold=threshold,
        rows=len(rows),
        kept=len(stays) - n_flipped,
        dropped=len(rows) - len(stays),
        flipped=n_flipped,
        softened=softened,
        unchanged=sum(to_flip) - n_flipped,
        by_hand=dict(sorted(Counter(decided.values()).items())),
    )


def write_rows(file: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows as JSON lines, whole or not at all.

    Raises:
        TypeError: a value has no form in JSON, as an image; with its row and column.
    """
    rows = rows.with_format(None) if isinstance(rows, Dataset) else rows
    write_whole(Path(file), (_line(row, number) for number, row in enumerate(rows)))


def _line(row: Mapping[str, Any], number: int) -> str:
    try:
        return as_line(row)
    except (TypeError, ValueError) as error:
        name = next((name for name, value in row.items() if not _is_json(value)), None)
        raise TypeError(
            f"Column {name!r} of row {number} cannot be written as JSON ({error}): remove the column, or write the "
            "rows with `Dataset.save_to_disk`."
        ) from error


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


# --- checks ---


def kind_of(columns: Iterable[str]) -> Kind:
    """What the label of a row with these columns is: a preference, a completion or a class."""
    columns = list(columns)
    if {"chosen", "rejected"} <= {*columns}:
        return "preference"
    if "completion" in columns:
        return "completion"
    if {*LABELS} & {*columns}:
        return "label"
    raise ValueError(
        f"`rows` have no label that is known by its name (`chosen` and `rejected`, `completion`, `label`); their "
        f"columns are {columns}. Rename yours."
    )


def check_repair(rows: Rows, how: str, kind: Kind | None = None, knows_other: bool = False) -> Kind:
    """Says, before any probability is known, whether rows can be repaired in this way.

    Args:
        rows, how, kind: as of [`repair`].
        knows_other: whether `repair` will be given `preferred`.

    Returns:
        The kind of the label of the rows.

    Raises:
        TypeError, ValueError: they cannot; with the way out.
    """
    if not isinstance(rows, Dataset | Sequence) or isinstance(rows, str):
        raise TypeError(f"`rows` must be a list of dicts or a datasets.Dataset, got {type(rows).__name__}.")
    if not len(rows):
        raise ValueError("`rows` has no rows: pass at least one.")
    columns = columns_of(rows)
    kind = kind_of(columns) if kind is None else kind
    if how not in HOW:
        raise ValueError(f"`how` must be one of {', '.join(map(repr, HOW))}, got {how!r}.")
    if how == SOFT and kind != "preference":
        others = "'drop' or 'flip'" if kind == "label" else "'drop'"
        raise ValueError(
            f"`how='soft'` is for preferences, whose loss knows the other label, and the label of `rows` is a {kind}: "
            f"use {others}."
        )
    if how == SOFT and PROBABILITY in columns:
        raise ValueError(f"`rows` have a column {PROBABILITY!r} already: remove or rename it.")
    if how == FLIP:
        check_flip(rows, kind, "`how='flip'` flips labels", knows_other)
    return kind


def _checked_threshold(how: str, threshold: float | None) -> float:
    if threshold is None:
        return 0.0 if how == SOFT else 0.5
    is_number = isinstance(threshold, int | float | np.floating) and not isinstance(threshold, bool)
    if not is_number or not 0 <= threshold <= 1:
        raise ValueError(f"`threshold` must be a number in [0, 1], got {short(threshold)}.")
    return float(threshold)


def _checked_probabilities(probabilities: Any, n: int) -> np.ndarray:
    try:
        p = np.asarray(probabilities, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`probabilities` must be numbers, got {short(probabilities)}.") from error
    if p.shape != (n,):
        raise ValueError(f"`probabilities` must have one entry for each of the {n} rows, got shape {p.shape}.")
    wrong = np.flatnonzero(~((p >= 0) & (p <= 1)))
    if len(wrong):
        raise ValueError(
            f"`probabilities` must lie in [0, 1], and {len(wrong)} of {n} do not; the first is {p[wrong[0]]} of row "
            f"{wrong[0]}."
        )
    return p


def _with_column(rows: Any, name: str, values: list[Any]) -> Any:
    if isinstance(rows, Dataset):
        return rows.add_column(name, values)
    return [{**row, name: value} for row, value in zip(rows, values, strict=True)]
