"""Recovery: of the accuracy that wrong labels cost AdamW, the share that a method gives back.

It is (method - AdamW) / (AdamW on clean labels - AdamW) in held-out accuracy, and in problems solved where runs have
them, with each at its best learning rate, and at equal KL. 1 is what clean labels would give; below 0 a method does
worse than AdamW.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..runs.methods import CEILING, CONTROL
from ..runs.run import Run
from ..runs.schema import SOLVED
from .contrasts import BEST_LR, FRONTIER, LEAST_RANGE, Outcomes, groups_of, interval_of, mean_heights, stack
from .rows import Row, best
from .statistics import Interval, ratio_interval


if TYPE_CHECKING:
    from .comparison import Comparison


@dataclass(eq=False)
class Recovery:
    """The recovery of one method.

    Attributes:
        kind: `contrasts.BEST_LR` or `contrasts.FRONTIER`, which is at equal KL.
        row: the method's row: the best one, or of its curve the first.
        gain, cost: numerator and denominator, differences of accuracies with their intervals; None where they are not
            known.
        ratio: the recovery with its interval; None where it cannot be had, for the reason `missing`.
        span: the range of KL, nats a token; None at the best learning rates.
        outcomes: `Run.outcomes`, or `Run.solutions` where it is in problems solved.
    """

    kind: str
    row: Row
    gain: Interval | None = None
    cost: Interval | None = None
    ratio: Interval | None = None
    missing: str = ""
    span: tuple[float, float] | None = None
    outcomes: Outcomes = Run.outcomes

    @property
    def in_solved(self) -> bool:
        return self.outcomes is Run.solutions

    @property
    def text(self) -> str:
        """`0.45 [0.21, 0.70]`, or why it is not known."""
        if self.ratio is None:
            return f"unknown: {self.missing}"
        ends = f" [{self.ratio.low:.2f}, {self.ratio.high:.2f}]" if self.ratio.known else ""
        return f"{self.ratio.mean:.2f}{ends}"


def find_recoveries(comparison: Comparison) -> list[Recovery]:
    """Of every method at its best rate and at equal KL; none where AdamW, or AdamW on clean labels, was not run."""
    clean = [row for rows in comparison.methods(CEILING).values() for row in rows]
    if not clean or not comparison.baseline:
        return []
    found, baseline, curve = [], comparison.baseline, comparison.curve
    has_problems = any(run.solutions() is not None for run in comparison.runs)
    for outcomes in (Run.outcomes, Run.solutions) if has_problems else (Run.outcomes,):
        for rows in comparison.methods().values():
            if rows[0].group not in (CONTROL, CEILING) and rows != baseline:
                found += [at_best(rows, baseline, clean, outcomes), at_equal_kl(rows, curve, clean, outcomes)]
    return found


def at_best(rows: list[Row], baseline: list[Row], clean: list[Row], outcomes: Outcomes = Run.outcomes) -> Recovery:
    """Each at the learning rate that is best in these outcomes, over the seeds that all three have."""
    name = SOLVED if outcomes is Run.solutions else rows[0].measures.accuracy
    tops = [best(those, name) for those in (rows, baseline, clean)]
    found = Recovery(BEST_LR, tops[0] or rows[0], outcomes=outcomes)
    if None in tops:
        found.missing = f"no run has {name}"
        return found
    by_seed = [{run.seed: outcomes(run) for run in top.runs} for top in tops]
    shared = [seed for seed in by_seed[0] if all(of.get(seed) is not None for of in by_seed)]
    if not shared:
        found.missing = "no shared seed"
        return found
    values = stack([of[seed] for of in by_seed for seed in shared])
    return _filled(found, values.reshape(3, len(shared), -1))


def at_equal_kl(rows: list[Row], curve: list[Row], clean: list[Row], outcomes: Outcomes = Run.outcomes) -> Recovery:
    """Means over log KL, in the range that the curves of all three cover in every seed that they share."""
    found = Recovery(FRONTIER, rows[0], outcomes=outcomes)
    heights = mean_heights([rows, curve, clean], outcomes)
    if isinstance(heights, str):
        found.missing = heights
        return found
    values, found.span = heights
    low, high = found.span
    if high / low < LEAST_RANGE:
        found.missing = f"KLs up to {high / low:.2f}-fold apart, too few"
        return found
    return _filled(found, values)


def _filled(found: Recovery, accuracies: np.ndarray) -> Recovery:
    """Puts in the numbers, from `[3, seeds, examples]`: of the method, of AdamW, and of AdamW on clean labels."""
    method, adamw, clean = accuracies
    found.gain, found.cost = (interval_of(values - adamw, [found.row], found.outcomes) for values in (method, clean))
    if not found.cost.known:
        found.missing = "no interval of what wrong labels cost AdamW"
    elif found.cost.low <= 0:
        ends = f"{found.cost.mean:+.3f} [{found.cost.low:+.3f}, {found.cost.high:+.3f}]"
        found.missing = f"wrong labels are not known to cost AdamW anything: {ends}"
    else:
        groups = groups_of([found.row], accuracies.shape[2], found.outcomes)
        found.ratio = ratio_interval(method - adamw, clean - adamw, groups)
    return found
