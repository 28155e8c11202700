"""Other labels for rows: the sides of preferences swapped, and other classes. All other columns stay."""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import pyarrow as pa
from datasets import ClassLabel, Dataset

from ..noise.columns import LABELS, MARKS
from ..noise.preferences import side_pairs, swap_sides
from ..noise.rows import map_rows, same_value
from ..noise.sides import side_changes
from ..runs.text import short


logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["preference", "completion", "label"]
Rows: TypeAlias = Sequence[Mapping[str, Any]] | Dataset
_MISSING = object()  # a row of a list need not have every column


def columns_of(rows: Rows) -> list[str]:
    """The names of all columns that a row has; a TypeError names the first row that is no dict."""
    if isinstance(rows, Dataset):
        return rows.column_names
    wrong = next((i for i, row in enumerate(rows) if not isinstance(row, Mapping)), None)
    if wrong is not None:
        raise TypeError(f"`rows` must be dicts, and row {wrong} is {short(rows[wrong])}.")
    return list(dict.fromkeys(name for row in rows for name in row))


def _table(rows: Rows) -> Dataset:
    """The rows as a Dataset, of lists with the columns of numbers and words alone; the other ones hold nothing."""
    if isinstance(rows, Dataset):
        return rows
    columns = {}
    for name in columns_of(rows):
        values = [row.get(name) for row in rows]
        is_scalar = all(value is None or isinstance(value, str | int | float) for value in values)
        try:
            columns[name] = pa.array(values if is_scalar else [None] * len(values))
        except (pa.ArrowException, ValueError, OverflowError):  # of several types, or larger than 64 bits
            columns[name] = pa.nulls(len(values))
    return Dataset(pa.table(columns))


def _pairs(rows: Rows) -> list[list[str]]:
    # The columns of a list have no types
    features = rows.features if isinstance(rows, Dataset) else dict.fromkeys(columns_of(rows))
    return side_pairs(features)


def check_flip(rows: Rows, kind: Kind, by: str, knows_other: bool = False) -> None:
    """Raises ValueError if rows of this kind have no other label.

    Args:
        by: what asks for a flip, in words.
        knows_other: whether the other class of each row is known, so that there may be more than two.
    """
    if kind == "completion":
        raise ValueError(f"{by}, and a row of `prompt` and `completion` has no other completion: use 'drop'.")
    if kind == "preference":
        _pairs(rows)
    if kind == "label" and not knows_other:
        _other_class(rows, by)


def flip_labels(
    rows: Rows, to_flip: list[bool], kind: Kind, preferred: Sequence[Any] | None
) -> tuple[Rows, list[bool]]:
    """The rows, those of `to_flip` with another label, and which rows have one. [`check_flip`] comes before."""
    if kind == "preference":
        if preferred is not None:
            raise ValueError("`preferred` is for class labels, and `rows` are preferences. Leave it out.")
        return _flip_sides(rows, to_flip)
    return _change_labels(rows, to_flip, preferred)


def _flip_sides(rows: Rows, to_flip: list[bool]) -> tuple[Rows, list[bool]]:
    table = _table(rows)
    features = table.features
    marks = [name for name in MARKS if name in features and getattr(features[name], "dtype", "") == "bool"]
    if marks == [*MARKS] and list(table["flipped"]) != list(table["corrupted"]):
        marks.remove("corrupted")  # it is about something else
    elif marks == ["corrupted"]:
        marks = []
    # `corrupt` keeps what a row was before the noise, and that stays
    originals = {name for name in features if name.startswith("original_") and marks}
    pairs = [pair for pair in _pairs(rows) if not originals & {*pair}]
    others = [name for name in features if name not in originals and not any(name in pair for pair in pairs)]
    changes = side_changes(table, others) | dict.fromkeys(marks, _toggled)
    changes = {name: functools.partial(_if_there, change=change) for name, change in changes.items()}
    sides = zip(to_flip, _values(rows, "chosen"), _values(rows, "rejected"), strict=True)
    flipped = [flip and not same_value(a, b) for flip, a, b in sides]
    swap = functools.partial(swap_sides, pairs=pairs, changes=changes)
    return _changed(rows, flipped, {*itertools.chain(*pairs), *changes}, swap), flipped


def _if_there(value: Any, change: Callable[[Any], Any]) -> Any:
    return value if value is _MISSING else change(value)


def _toggled(value: bool | None) -> bool | None:
    return None if value is None else not value


def _change_labels(rows: Rows, to_flip: list[bool], preferred: Sequence[Any] | None) -> tuple[Rows, list[bool]]:
    name, labels = _labels(rows)
    if preferred is None:
        other = _other_class(rows, "")
        new = [other.get(label, label) if flip else label for flip, label in zip(to_flip, labels, strict=True)]
    else:
        if len(preferred) != len(labels):
            raise ValueError(
                f"`preferred` must have a label for each of the {len(labels)} rows, got {len(preferred)}."
            )
        known = {*labels}
        unknown = next((i for i, x in enumerate(preferred) if to_flip[i] and x not in known), None)
        if unknown is not None:
            raise ValueError(
                f"`preferred` has {short(preferred[unknown])} for row {unknown}, which is none of the labels of "
                f"`rows`, {short(sorted(known - {None}))}: pass labels as the column {name!r} has them."
            )
        same = {label: label for label in known}  # as the column has them: 1, and not numpy's
        pairs = zip(to_flip, labels, preferred, strict=True)
        new = [same[x] if flip and is_labelled(label) else label for flip, label, x in pairs]
    flipped = [a != b for a, b in zip(labels, new, strict=True)]
    stale = [mark for mark in MARKS if mark in columns_of(rows)]
    if any(flipped) and stale:
        logger.warning(
            "The columns %s do not know of the %d labels that are repaired: remove them before you train on these.",
            ", ".join(map(repr, stale)),
            sum(flipped),
        )
    return _changed(rows, flipped, {name}, lambda columns, _: {name: new}), flipped


def _labels(rows: Rows) -> tuple[str, list[Any]]:
    """The name of the column of labels, and what it has."""
    name = next(name for name in LABELS if name in columns_of(rows))
    return name, _values(rows, name)


def _other_class(rows: Rows, by: str) -> dict[Any, Any]:
    """Of each of two classes the other one."""
    name, labels = _labels(rows)
    feature = rows.features[name] if isinstance(rows, Dataset) else None
    n = feature.num_classes if isinstance(feature, ClassLabel) else None
    classes = list(range(n)) if n is not None else list(dict.fromkeys(filter(is_labelled, labels)))
    if len(classes) != 2:
        raise ValueError(
            f"{by}, and the labels of `rows` have {len(classes)} classes in place of two: use 'drop', or pass the "
            "labels that a model prefers as `preferred`."
        )
    return dict(zip(classes, classes[::-1], strict=True))


def is_labelled(label: Any) -> bool:
    return label is not None and label != -1 and not (isinstance(label, float) and math.isnan(label))


def _values(rows: Rows, name: str) -> list[Any]:
    if isinstance(rows, Dataset):
        return list(rows.with_format(None)[name])
    return [row.get(name) for row in rows]


def _changed(
    rows: Rows, flags: list[bool], names: set[str], change: Callable[[Mapping[str, list], list[bool]], dict[str, list]]
) -> Rows:
    """The rows with what `change` makes of the columns `names`, where `flags` is true."""
    if isinstance(rows, Dataset):
        columns = {name: _values(rows, name) for name in names}
        fill = functools.partial(_fill, columns=change(columns, flags))
        return map_rows(rows, fill, rows.features, None, "Repairing", {})
    columns = change({name: [row.get(name, _MISSING) for row in rows] for name in names}, flags)
    return [
        {
            name: value
            for name in dict.fromkeys([*row, *columns])
            if (value := columns[name][i] if name in columns else row[name]) is not _MISSING
        }
        if flag
        else row
        for i, (flag, row) in enumerate(zip(flags, rows, strict=True))
    ]


def _fill(rows: Mapping[str, list], indices: list[int], columns: Mapping[str, list]) -> dict[str, list]:
    return {name: [values[i] for i in indices] for name, values in columns.items()}
