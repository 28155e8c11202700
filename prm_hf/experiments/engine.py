"""Which engine makes the runs of a command: by default the process itself, one run after another."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..runs.write import RunSpec


if TYPE_CHECKING:
    from .grid import Made
    from .runner import Runner


class Engine(ABC):
    """Makes runs in place of the process that a command was started in.

    Attributes:
        reports: whether the command reports on the runs.
    """

    reports = True

    @abstractmethod
    def make_each(self, runner: Runner, specs: list[RunSpec]) -> list[Made]:
        """These runs of a runner, made now or before. None of them needs another one of them."""


_IN_USE: list[Engine] = []


@contextlib.contextmanager
def engine_in_use(engine: Engine) -> Iterator[None]:
    """Has the commands of this process make their runs with an engine."""
    _IN_USE.append(engine)
    try:
        yield
    finally:
        _IN_USE.pop()


def current_engine() -> Engine | None:
    """The engine in use; None where the process makes its runs itself."""
    return _IN_USE[-1] if _IN_USE else None
