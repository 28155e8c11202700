"""Checks of arguments that several functions of this room take."""

import math
from collections.abc import Sequence
from typing import Any

from .._names import did_you_mean, number_in_quotes


def check_choice(name: str, value: Any, known: Sequence[str]) -> None:
    """Raises ValueError unless the argument is one of the known names."""
    if value not in known:
        raise ValueError(f"`{name}` is {value!r}: it must be one of {', '.join(known)}.{did_you_mean(value, known)}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless the argument is None or an integer above 0."""
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"`{name}` is {value!r}: it must be a whole number above 0.{number_in_quotes(value)}")


def check_positive(name: str, value: Any) -> None:
    """Raises ValueError unless the argument is a finite number above 0."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"`{name}` is {value!r}: it must be a finite number above 0.{number_in_quotes(value)}")
