"""The rows of a comparison: the runs of one method at one learning rate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from ..runs.methods import GROUPS, METHODS, Method, find_method
from ..runs.run import Run
from ..runs.schema import COST, KL, Measures
from . import statistics
from .statistics import finite


def format_rate(rate: float | None) -> str:
    """`3e-3`, `2.5e-7`; `?` if unknown."""
    if rate is None:
        return "?"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


@dataclass(eq=False)
class Row:
    """The runs of one method at one learning rate, one a seed.

    Attributes:
        learning_rate: that of the runs; the mean of them for `constant_q`, whose rate follows each run's mean mask.
        runs: the finished ones, sorted by seed; none if all diverged.
        source: for a control such as `constant_q`, the row that it is the control of.
        diverged: the runs that diverged, whose numbers do not count.
    """

    method: str
    learning_rate: float | None
    runs: list[Run]
    source: Row | None = None
    diverged: list[Run] = field(default_factory=list)

    @property
    def kind(self) -> Method:
        return find_method(self.method)

    @property
    def group(self) -> str:
        return self.kind.group

    @property
    def measures(self) -> Measures:
        return (self.runs or self.diverged)[0].measures

    @property
    def name(self) -> str:
        return self.kind.label if self.source is None else f"{self.kind.label} of {self.source.kind.label}"

    @property
    def label(self) -> str:
        rate = self.learning_rate if self.source is None else self.source.learning_rate
        return f"{self.name} at {format_rate(rate)}" if rate is not None else self.name

    @property
    def accuracy(self) -> float:
        return self.mean(self.measures.accuracy)[0]

    def mean(self, name: str) -> tuple[float, float, int]:
        """Mean and standard error over seeds, and number of runs that have it; `"mean_q"` is the mean over the run."""
        values = [run.mean_q if name == "mean_q" else run.metrics.get(name) for run in self.runs]
        if name == COST:
            values = [run.cost for run in self.runs]
        return statistics.mean_and_standard_error([value for value in values if value is not None])

    def accuracy_error(self) -> tuple[float, str]:
        """Standard error of the accuracy, and over what: `"seeds"`, with one seed `"examples"`, or `""` (unknown)."""
        accuracy, error, n = self.mean(self.measures.accuracy)
        if n > 1:
            return error, "seeds"
        run = next((run for run in self.runs if run.heldout is not None), None)
        error = math.nan
        if n and run is not None and finite(accuracy):
            error = statistics.group_error(run.outcomes(), run.heldout_groups)
        return error, "examples" if finite(error) else ""


def best(rows: Iterable[Row], name: str = "") -> Row | None:
    """The row with the highest accuracy, of equal ones that with the smaller KL; None if no accuracy is known.

    Args:
        name: a metric that counts in place of the accuracy.
    """
    heights = [(row.mean(name or row.measures.accuracy)[0], row) for row in rows]
    known = [(height, -row.mean(KL)[0], row) for height, row in heights if finite(height)]
    return max(known, key=lambda entry: entry[:2], default=(None,))[-1]


def row_key(run: Run) -> tuple[str, str]:
    """The method and the learning rate; of a control, whose rate follows its run, that run's name without the seed.

    A folder's name ends in a hash that the seed is in.
    """
    if run.control_of:
        return run.method, re.sub(r"[-_.]?seed[-_=]?\d+(_[0-9a-f]{8}$)?", "", run.control_of)
    return run.method, format_rate(run.learning_rate)


def make_rows(finished: list[Run], diverged: list[Run]) -> list[Row]:
    """The rows of these runs in the order of the table, those of which all runs diverged included."""
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in (*finished, *diverged):
        grouped.setdefault(row_key(run), []).append(run)
    rows = {}
    for key, members in grouped.items():
        rates = [run.learning_rate for run in members]
        rate = rates[0] if len(set(map(format_rate, rates))) == 1 else float(np.mean(rates))
        members.sort(key=lambda run: -1 if run.seed is None else run.seed)
        row = rows[key] = Row(key[0], rate, [run for run in members if run.finished])
        row.diverged = [run for run in members if not run.finished]
    # A control names the folder of its run, in version 0.1 the run.
    names = {name: rows[row_key(run)] for run in finished for name in (run.name, run.path.name)}
    for row in rows.values():
        row.source = next((names[run.control_of] for run in row.runs if run.control_of in names), None)
    order = [*METHODS]

    def place(row: Row) -> tuple:
        number = order.index(row.kind.key) if row.kind.key in METHODS else len(order)
        return GROUPS.index(row.group), number, row.name, row.learning_rate or 0

    return sorted(rows.values(), key=place)
