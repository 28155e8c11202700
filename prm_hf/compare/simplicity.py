"""How simple the solutions are: effective dimension and certified accuracy, and their differences from AdamW's.

A method that learns less has a simpler solution, so methods are also compared where they are equally accurate, or fit
their training rows equally well: at the highest level that both reach, each read on the rising part of its learning
rates, straight between neighbouring runs of a seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..runs.methods import BASELINE, CONTROL, PRM
from ..runs.run import Run
from ..runs.schema import BOUND, CERTIFIED, EFFECTIVE_DIMENSION, FITTED_LOSS
from . import statistics
from .contrasts import BEST_LR, Contrast, adjust, between
from .rows import Row, best
from .statistics import Interval, finite


if TYPE_CHECKING:
    from .comparison import Comparison

MEASURES = (EFFECTIVE_DIMENSION, CERTIFIED, BOUND)
EQUAL_ACCURACY, EQUAL_LOSS = "equal accuracy", "equal loss"
UNBOUNDED = (-math.inf, math.inf)


@dataclass(eq=False)
class SimplicityContrast(Contrast):
    """A paired difference in a measure, one of `MEASURES`."""

    measure: str = EFFECTIVE_DIMENSION

    @property
    def text(self) -> str:
        return span(self.interval, "+") if self.interval else self.missing


def span(interval: Interval, sign: str) -> str:
    """`+12.5 [-3, +28]`, of three digits."""
    ends = f" [{interval.low:{sign}.3g}, {interval.high:{sign}.3g}]" if interval.known else ""
    return f"{interval.mean:{sign}.3g}{ends}"


def measures_in(comparison: Comparison) -> list[str]:
    """Those that runs have. The bound of a preference is its certified accuracy."""
    found = [name for name in MEASURES if any(name in run.metrics for run in comparison.runs)]
    return [name for name in found if name != BOUND or CERTIFIED not in found]


def mean_of(row: Row, measure: str) -> Interval | None:
    """The mean over the seeds of a row and Student's interval of it; None where no run has it."""
    values = [run.metrics[measure] for run in row.runs if finite(run.metrics.get(measure))]
    return statistics.bootstrap_interval(np.array(values)[:, None]) if values else None


def simplest_rows(comparison: Comparison, measure: str) -> list[Row]:
    """Of each method the most accurate row, where it has the measure."""
    methods = [rows for rows in comparison.methods().values() if rows[0].group != CONTROL]
    return [top for rows in methods if (top := best(rows)) and mean_of(top, measure)]


def simplicity_contrasts(comparison: Comparison) -> list[SimplicityContrast]:
    """Each method minus AdamW; PRM minus the most accurate AdamW of any ε, too. Holm's correction is over these."""
    found = [c for measure in measures_in(comparison) for c in _of_measure(comparison, measure)]
    adjust(found)
    return found


def _of_measure(comparison: Comparison, measure: str) -> Iterator[SimplicityContrast]:
    rows, methods = simplest_rows(comparison, measure), comparison.methods()
    adamw, strongest = best(comparison.baseline), best(row for row in rows if row.group == BASELINE)
    levels = {EQUAL_ACCURACY: (comparison.measures.accuracy, 1), EQUAL_LOSS: (FITTED_LOSS, -1)}

    def outcomes(run: Run) -> np.ndarray | None:
        return np.array([run.metrics[measure]]) if finite(run.metrics.get(measure)) else None

    for row in rows:
        rivals = [adamw, *([strongest] if row.group == PRM and strongest is not adamw else [])]
        for rival in (rival for rival in rivals if rival in rows and rival is not row):
            c = between(BEST_LR, row, rival, outcomes, UNBOUNDED)
            yield SimplicityContrast(c.kind, row, rival, rival.label, c.interval, c.note, c.missing, measure=measure)
            for kind, (level, sign) in levels.items():
                c = SimplicityContrast(kind, row, rival, rival.name, measure=measure)
                pairs = [methods[row.method], methods[rival.method]]
                c.interval, c.missing = _at_level(pairs, level, sign, measure)
                yield c


def _at_level(pair: list[list[Row]], level: str, sign: int, measure: str) -> tuple[Interval | None, str]:
    """The difference of two methods at the highest level that both reach in a seed, or why there is none."""
    differences = []
    for seed in dict.fromkeys(run.seed for row in pair[0] for run in row.runs):
        rising = [_rising(rows, seed, level, sign, measure) for rows in pair]
        if not all(len(xs) for xs, _ in rising):
            continue
        at = min(xs[-1] for xs, _ in rising)
        if at >= max(xs[0] for xs, _ in rising):
            mine, theirs = (np.interp(at, *points) for points in rising)
            differences.append(mine - theirs)
    if not differences:
        return None, "no level that both reach"
    return statistics.bootstrap_interval(np.array(differences)[:, None]), ""


def _rising(rows: list[Row], seed: int | None, level: str, sign: int, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Levels and measures of the runs of a seed whose level is above that of all smaller learning rates."""
    runs = [run for row in rows for run in row.runs if run.seed == seed and run.learning_rate is not None]
    runs = [run for run in runs if finite(run.metrics.get(level)) and finite(run.metrics.get(measure))]
    points: list[tuple[float, float]] = []
    for run in sorted(runs, key=lambda run: run.learning_rate):
        if not points or sign * run.metrics[level] > points[-1][0]:
            points.append((sign * run.metrics[level], run.metrics[measure]))
    xs, ys = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return xs, ys
