"""Names that changed: the old ones are accepted for one version, with a warning that says the new one."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar


P = ParamSpec("P")
R = TypeVar("R")


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
