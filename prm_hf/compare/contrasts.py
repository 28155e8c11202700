"""The contrasts of a comparison: paired differences in accuracy.

At one learning rate a mask q < 1 always drifts less, because it shrinks the step. So a PRM row is also set against
AdamW at its best learning rate, AdamW interpolated at the same KL, and AdamW with PRM's mean step (constant q); and a
method's whole curve against AdamW's, by the area under accuracy over log KL.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ..runs.methods import BASELINE, PRM, REPAIRED, find_method
from ..runs.run import Run
from ..runs.schema import KL
from . import statistics
from .rows import Row, best, format_rate
from .statistics import Interval, finite


if TYPE_CHECKING:
    from .comparison import Comparison


Outcomes = Callable[[Run], np.ndarray | None]  # of a run, one value an example or one in all
RATE_CONTROLS = ("constant_q", "adamw_matched")  # AdamW at another learning rate
SAME_LR = "same learning rate"
BEST_LR = "best learning rates"
EQUAL_KL = "equal KL"
EQUAL_KL_MEAN = "equal KL, mean over learning rates"
FRONTIER = "frontier area"
CONTROLLED = "control"
SOLVED_BEST = "problems solved, best learning rates"
LEAST_RANGE = 2.0  # of the KLs that an area is taken over, the largest by the smallest
MORE, LESS, LEVEL = "more accurate", "less accurate", "within noise"


@dataclass(eq=False)
class Contrast:
    """A paired accuracy difference, left minus right.

    Attributes:
        kind: one of the constants of this module, e.g. `"equal KL"`.
        right: the row it is judged against, or None where that is AdamW's whole curve; of another curve its best row.
        against: what it is judged against, for people.
        interval: the difference with its 95 % interval; None, or without ends, where it cannot be had, for the reason
            `missing`.
        note: what limits it, a clause.
        p_holm: Holm's adjusted p-value among all contrasts of the comparison; NaN without an interval.
    """

    kind: str
    left: Row
    right: Row | None
    against: str
    interval: Interval | None = None
    note: str = ""
    missing: str = ""
    p_holm: float = math.nan

    @property
    def known(self) -> bool:
        return self.interval is not None and self.interval.known

    @property
    def verdict(self) -> str:
        """`MORE`, `LESS`, `LEVEL` (the interval holds 0) or `no interval`; or why the difference is unknown."""
        if not self.known:
            return self.missing or "no interval"
        return MORE if self.interval.low > 0 else LESS if self.interval.high < 0 else LEVEL

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.verdict in (MORE, LESS)

    @property
    def judged(self) -> str:
        """The left side for people: a row, or the method where its whole curve is judged."""
        return self.left.name if self.kind in (EQUAL_KL_MEAN, FRONTIER) else self.left.label

    @property
    def text(self) -> str:
        """`+0.010 [-0.008, +0.028]`, or the difference alone, or `unknown`."""
        ends = f" [{self.interval.low:+.3f}, {self.interval.high:+.3f}]" if self.known else ""
        return f"{self.interval.mean:+.3f}{ends}" if self.interval else "unknown"


def row_contrasts(comparison: Comparison) -> Iterator[Contrast]:
    """The contrasts of single rows."""
    baseline, curve = comparison.baseline, comparison.curve
    rivals = {**comparison.rivals, **comparison.methods(REPAIRED)}
    baseline_best, prm = best(baseline), comparison.methods(PRM)
    # Without PRM among the runs, the other methods are what AdamW is compared with.
    for rows in (prm or rivals).values() if baseline else ():
        lead = best(rows)
        if lead is None:
            continue
        same = [row for row in baseline if format_rate(row.learning_rate) == format_rate(lead.learning_rate)]
        yield from (between(SAME_LR, lead, row) for row in same)
        if baseline_best is not None:
            yield between(BEST_LR, lead, baseline_best)
        at_kl = [
            _at_equal_kl(EQUAL_KL, [row], curve) for row in (lead, *(r for r in rows if r is not lead and r.runs))
        ]
        yield from at_kl
        covered = [contrast.left for contrast in at_kl if contrast.interval]
        if len(covered) > 1:
            yield _at_equal_kl(EQUAL_KL_MEAN, covered, curve)
    yield from (between(CONTROLLED, row.source, row) for row in comparison.rows if row.source is not None)
    lead = best(row for rows in prm.values() for row in rows)
    if lead is None and not baseline:
        lead = best(comparison.rows)
    if lead is not None:
        for method, rows in rivals.items():
            rival = best(rows)
            if rival is not None and method != lead.method:
                yield between(BEST_LR, lead, rival)


def frontier_contrasts(comparison: Comparison) -> list[Contrast]:
    """The area of each method's curve against AdamW's, and of each PRM method's against the best of the rivals'.

    Where that is no AdamW, the AdamW with the best area is a rival too; and the best method with repaired labels is.
    """
    if not comparison.baseline:
        return []
    prm, repaired = comparison.methods(PRM), comparison.methods(REPAIRED)
    rivals = {**comparison.rivals, **repaired}
    contrasts = [_areas(rows, comparison.curve) for rows in (*prm.values(), *rivals.values()) if len(rows) > 1]
    means = {c.left.method: c.interval.mean for c in contrasts if c.interval and not c.missing}
    ranked = sorted(means.keys() & rivals, key=lambda method: (-means[method], method))
    # An AdamW that does worse than AdamW itself is no rival.
    adamw = [method for method in ranked if rivals[method][0].group == BASELINE and means[method] > 0]
    others, mended = ([m for m in ranked if (m in repaired) == is_mended] for is_mended in (False, True))
    for rival in dict.fromkeys([*others[:1], *adamw[:1], *mended[:1]]):
        contrasts += [_areas(rows, rivals[rival], best(rivals[rival])) for rows in prm.values() if len(rows) > 1]
    return contrasts


def adjust(contrasts: Sequence[Contrast]) -> None:
    """Fills `p_holm` in, by Holm's correction for all of these contrasts."""
    adjusted = statistics.holm([c.interval.p_value if c.interval else math.nan for c in contrasts])
    for contrast, p in zip(contrasts, adjusted, strict=True):
        contrast.p_holm = p


def _areas(rows: list[Row], curve: list[Row], right: Row | None = None) -> Contrast:
    """Mean accuracy over log KL, of one method minus another, over the range of KL that both curves cover."""
    against = f"{curve[0].kind.label}, frontier area"
    found = frontier_difference(rows, curve)
    if isinstance(found, str):
        return Contrast(FRONTIER, rows[0], right, against, missing=found)
    interval, (low, high) = found
    contrast = Contrast(FRONTIER, rows[0], right, f"{against}, KL {low:.2g}-{high:.2g}", interval)
    if high / low < LEAST_RANGE:
        # Two curves that share hardly more than a point of KL are compared at that point, picked by chance.
        contrast.interval = replace(interval, low=math.nan, high=math.nan, p_value=math.nan)
        contrast.missing = f"KLs up to {high / low:.2f}-fold apart, too few"
    return contrast


def frontier_difference(
    mine: list[Row], theirs: list[Row], outcomes: Outcomes = Run.outcomes
) -> tuple[Interval, tuple[float, float]] | str:
    """Mean over log KL of one curve minus another's, and the range of KL that both cover in every seed they share.

    Args:
        mine, theirs: the rows of each curve.
        outcomes: by default whether each held-out example is right.

    Returns:
        The interval over seeds and examples, and the range, nats a token; or why there is none.
    """
    found = mean_heights([mine, theirs], outcomes)
    if isinstance(found, str):
        return found
    heights, span = found
    return interval_of(heights[0] - heights[1], mine, outcomes), span


def mean_heights(
    curves: list[list[Row]], outcomes: Outcomes = Run.outcomes
) -> tuple[np.ndarray, tuple[float, float]] | str:
    """Means over log KL of several curves, `[curves, seeds, examples]`, and the range that all cover in every seed.

    Args:
        curves: the rows of each.
        outcomes: by default whether each held-out example is right; `[curves, seeds, 1]` where these are not known.

    Returns:
        The means of the seeds in which each curve has two runs, and the range, nats a token; or why there are none.
    """
    seeds = dict.fromkeys(run.seed for row in curves[0] for run in row.runs)
    found = [[_points(rows, seed, outcomes) for rows in curves] for seed in seeds]
    found = [points for points in found if min(map(len, points)) > 1]
    span, all_of_them = statistics.shared_range([_kls(runs) for points in found for runs in points]), len(curves)
    every = "both" if all_of_them == 2 else f"all {all_of_them}"
    if span is None:
        return f"no {KL} range that {every} cover" if found else f"no seed with two runs of {every}"
    heights = []
    for points in found:
        ends = np.cumsum(list(map(len, points)))[:-1]
        values = np.split(stack([outcomes(run) for runs in points for run in runs]), ends)
        areas = [statistics.mean_over_log_kl(_kls(runs), its, *span) for runs, its in zip(points, values, strict=True)]
        heights.append(areas)
    flat = stack([area for areas in heights for area in areas])
    return flat.reshape(len(heights), len(curves), -1).swapaxes(0, 1), span


def groups_of(rows: list[Row], examples: int, outcomes: Outcomes = Run.outcomes) -> np.ndarray | None:
    """`[examples]`: which examples of these rows' runs belong together; None where that is not known.

    They are held-out examples, or the problems where the outcomes are `Run.solutions`.
    """
    name = "solved_groups" if outcomes is Run.solutions else "heldout_groups"
    found = (getattr(run, name) for row in rows for run in row.runs)
    return next((groups for groups in found if groups is not None and len(groups) == examples), None)


def interval_of(
    values: np.ndarray,
    rows: list[Row],
    outcomes: Outcomes = Run.outcomes,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Interval:
    """The interval of the mean of `[seeds, examples]` of the runs of these rows, by default a difference of shares."""
    return statistics.bootstrap_interval(values, groups_of(rows, values.shape[1], outcomes), bounds=bounds)


def _kls(runs: list[Run]) -> np.ndarray:
    return np.array([run.metrics[KL] for run in runs])


def _points(rows: list[Row], seed: int | None, outcomes: Outcomes = Run.outcomes) -> list[Run]:
    """The runs of a seed that are points of the rows' curve: those with a KL and with outcomes."""
    runs = [run for row in rows for run in row.runs if run.seed == seed]
    return [run for run in runs if finite(run.metrics.get(KL)) and outcomes(run) is not None]


def stack(outcomes: list[np.ndarray]) -> np.ndarray:
    """`[runs, examples]`, or `[runs, 1]` (the accuracies) if the examples of any run are not known."""
    if len({values.size for values in outcomes}) > 1:
        outcomes = [np.array([values.mean()]) for values in outcomes]
    return np.stack(outcomes)


def between(
    kind: str,
    left: Row,
    right: Row,
    outcomes: Outcomes = Run.outcomes,
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Contrast:
    """Left minus right over the seeds that both have."""
    of_right = {run.seed: outcomes(run) for run in right.runs}
    pairs = [(outcomes(run), of_right.get(run.seed)) for run in left.runs]
    differences = [np.subtract(*stack(pair)) for pair in pairs if not any(values is None for values in pair)]
    against = right.label
    if right.method in RATE_CONTROLS:
        adamw = find_method(left.kind.baseline).label
        against = f"{right.kind.label} ({adamw} at {format_rate(right.learning_rate)})"
    else:
        words = {SAME_LR: "same rate: a larger step", BEST_LR: "its best", SOLVED_BEST: "its best"}
        against += f" ({words[kind]})" if kind in words else ""
    if not differences:
        return Contrast(kind, left, right, against, missing="no shared seed")
    partly = len(differences) < max(len(left.runs), len(right.runs))
    note = f"over the {len(differences)} seed(s) that both have" if partly else ""
    return Contrast(kind, left, right, against, interval_of(stack(differences), [left], outcomes, bounds), note)


def _at_equal_kl(kind: str, rows: list[Row], baseline: list[Row]) -> Contrast:
    """Runs minus the baseline's curve of the same seed, read at each run's KL; several rows are averaged in a seed."""
    name = baseline[0].kind.label
    several = f", mean over {len(rows)} rates" if kind == EQUAL_KL_MEAN else ""
    contrast = Contrast(kind, rows[0], None, f"{name} at the same KL{several}")
    by_seed: dict[int | None, list[np.ndarray]] = defaultdict(list)
    lacking, ratios, notes = [], [], []
    for run in (run for row in rows for run in row.runs):
        curve = _points(baseline, run.seed)
        if not curve or run not in _points(rows, run.seed):
            continue
        kl, kls = run.metrics[KL], _kls(curve)
        outcomes, *points = stack([other.outcomes() for other in (run, *curve)])
        matched = statistics.interpolate_at_kl(kls, np.stack(points), kl)
        if matched is None:
            lacking.append("larger" if kl > kls.max() else "smaller")
        else:
            ratios.append(statistics.bracket_ratio(kls, kl))
            by_seed[run.seed].append(outcomes - matched)
    if lacking:
        notes.append(
            f"the KL of {len(lacking)} of {len(lacking) + len(ratios)} runs lies outside that of all {name} runs, "
            f"where nothing is extrapolated: {name} lacks {' and '.join(sorted(set(lacking)))} rates"
        )
    if ratios:
        differences = stack([stack(values).mean(axis=0) for values in by_seed.values()])
        contrast.interval = interval_of(differences, rows)
        notes += [f"interpolated between KLs up to {max(ratios):.0f}-fold apart"] if max(ratios) > 4 else []
    else:
        extent = "much" if set(lacking) == {"larger"} else "little"
        contrast.missing = f"no {name} drifts so {extent}" if lacking else "no KL"
    contrast.note = "; ".join(notes)
    return contrast
