"""Names that changed, which are accepted for one version with a warning; what was meant by a wrong name or value."""

import difflib
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar


P = ParamSpec("P")
R = TypeVar("R")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A sentence with the known name that is nearest to `name`, behind a space; empty where none is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.7)
    return f" Did you mean {near[0]!r}?" if near else ""


def number_in_quotes(value: Any) -> str:
    """A sentence for a number that came as text, as `1e-3` does from YAML, behind a space; empty for all else."""
    for kind in (int, float) if isinstance(value, str) else ():
        try:
            return f" It is a string: pass the number {kind(value)!r}."
        except ValueError:
            continue
    return ""


def warn_renamed(old: str, new: str, stacklevel: int = 3) -> None:
    """A DeprecationWarning at the caller's caller, or `stacklevel` calls up."""
    warnings.warn(f"`{old}` is now `{new}`; the old name will be removed.", DeprecationWarning, stacklevel)


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Lets a function take keyword arguments by their old names, the keys of `names`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def with_old_names(*args: Any, **kwargs: Any) -> R:
            for old in names.keys() & kwargs.keys():
                warn_renamed(old, names[old])
                if names[old] in kwargs:
                    raise TypeError(f"`{old}` and `{names[old]}` are one argument: pass the second alone.")
                kwargs[names[old]] = kwargs.pop(old)
            return function(*args, **kwargs)

        return with_old_names

    return decorate
