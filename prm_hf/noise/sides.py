"""Columns beside `chosen` and `rejected` that say which completion is better, and what a flip makes of them."""

import functools
import logging
import re
from collections.abc import Callable, Iterable
from typing import Any

from datasets import ClassLabel, Dataset, Features, IterableDataset


logger = logging.getLogger(__name__)

_MARGINS = {"margin", "margins"}
_CHOICES = {"winner", "preference", "preferred", "label", "choice", "better", "best"}
# Words in the names of columns that often depend on the order of the sides, but nobody knows how
_DOUBTFUL = {*_MARGINS, *_CHOICES, "score", "scores", "reward", "rewards", "rating", "ratings", "rank", "ranks"}
_DOUBTFUL |= {"win", "loser", "worse", "worst", "delta", "diff", "difference", "gap", "strength", "annotations"}
_DOUBTFUL |= {"messages", "completions", "responses"}
_NAMES = [("chosen", "rejected"), ("a", "b"), ("left", "right"), ("first", "second")]


def side_changes(dataset: Dataset | IterableDataset, columns: Iterable[str]) -> dict[str, Callable[[Any], Any]]:
    """What a flip makes of a value, for each of `columns` that says by how much or which completion is better.

    A number whose name ends in `margin` is negated. The two values of `winner`, `preference`, `label` and the like are
    exchanged: `a` and `b`, `model_a` and `model_b`, 0 and 1, 1 and 2, -1 and 1, two classes, p and 1 - p. A tie and a
    missing value stay. A warning names the columns that look as if they depended on the order, but are not known.
    """
    features = dataset.features or Features()
    changes, doubtful = {}, []
    for name in columns:
        words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)] or [""]
        change = None
        if words[-1] in _MARGINS and _is_number(features[name]):
            change = _negated
        elif words[-1] in _CHOICES:
            change = _exchange(dataset, name)
        if change is not None:
            changes[name] = change
        elif {*words} & _DOUBTFUL:
            doubtful.append(name)
    if doubtful:
        _warn(tuple(doubtful))
    return changes


@functools.cache  # a comparison flips the same columns at each noise rate and seed
def _warn(names: tuple[str, ...]) -> None:
    logger.warning(
        "A flip leaves the columns %s as they are. Where they depend on which completion is `chosen`, they are wrong "
        "in flipped rows: remove them, or rename them in pairs, as `score_chosen` and `score_rejected`.",
        ", ".join(map(repr, names)),
    )


def _is_number(feature: Any) -> bool:
    return not isinstance(feature, ClassLabel) and ("int" in (dtype := _dtype(feature)) or "float" in dtype)


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))


def _exchange(dataset: Dataset | IterableDataset, name: str) -> Callable[[Any], Any] | None:
    """The function that exchanges the two sides in a column of choices; None where its values are not known."""
    feature = dataset.features[name]
    if _dtype(feature) == "bool" or (isinstance(feature, ClassLabel) and feature.num_classes == 2):
        return functools.partial(_mirrored, total=1)
    is_text = "string" in _dtype(feature)
    if isinstance(dataset, IterableDataset) or not (is_text or _is_number(feature)):
        return None  # the values of a stream are not known before it is read
    values = {value for value in dataset.with_format(None).unique(name) if value is not None}
    if is_text:
        digits = [("0", "1")] if any(value.endswith("0") for value in values) else [("1", "2")]
        change = functools.partial(_other_side, opposites=[*_NAMES, *digits])
        return change if any(change(value) != value for value in values) else None
    if values in ({-1, 1}, {-1, 0, 1}):
        return _negated
    if values and values <= {1, 2} and 2 in values:
        return functools.partial(_mirrored, total=3)
    # A column of nothing but 1 may count sides from 1
    return functools.partial(_mirrored, total=1) if values - {1} and all(0 <= x <= 1 for x in values) else None


def _negated(value: float | None) -> float | None:
    return None if value is None else -value


def _mirrored(value: Any, total: int) -> Any:
    is_unlabelled = value is None or value == -1
    return value if is_unlabelled else type(value)(total - value)


def _other_side(value: str | None, opposites: list[tuple[str, str]]) -> str | None:
    """`model_b` for `model_a`, and so on. A value that names no side, as `tie`, stays."""
    known = {one: other for pair in opposites for one, other in (pair, pair[::-1])}
    found = re.fullmatch(r"(?s)(.*?)(?<![A-Za-z0-9])([A-Za-z]+|\d)", value or "")
    if found is None or (other := known.get(found[2].lower())) is None:
        return value
    as_written = other.upper() if found[2].isupper() else other.capitalize() if found[2].istitle() else other
    return found[1] + as_written
