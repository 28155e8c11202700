"""Methods by the steps until a metric reaches a threshold, where runs that do not reach it are censored.

Such a run says that it takes more steps than it had, and no more than that. The estimators are SciPy's: Kaplan and
Meier's of the share of runs that are not there yet, and the log-rank test.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Collection
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.stats import CensoredData, ecdf, logrank

from ..runs.methods import BASELINE, find_method
from ..runs.run import DIVERGED, FINISHED, Run
from ..runs.schema import SECONDS, Threshold
from .statistics import holm


RESAMPLES = 4000


@dataclass(frozen=True)
class Median:
    """The median of a time, and its 95 % interval.

    Attributes:
        value: infinite where fewer than half of the runs reach the threshold.
        low, high: ends of the interval; `high` is infinite where the runs set no bound, `low` NaN where none does.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Times:
    """How long each of n runs takes to the threshold, in steps or seconds.

    Attributes:
        values: `(n,)` float64; of a run that does not reach it how long it was observed.
        reached: `(n,)` bool, whether it does. The others are censored.
    """

    values: np.ndarray
    reached: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 1 or self.values.shape != self.reached.shape or not self.values.size:
            raise ValueError(
                f"`values` and `reached` must be `(n,)` and not empty, got {self.values.shape}, {self.reached.shape}."
            )

    @property
    def end(self) -> float:
        """The longest time that a run was observed: a median that is not reached is longer."""
        return float(self.values.max())

    @property
    def censored(self) -> CensoredData:
        return CensoredData(uncensored=self.values[self.reached], right=self.values[~self.reached])

    def take(self, index: np.ndarray) -> Times:
        return Times(self.values[index], self.reached[index])

    def curve(self) -> tuple[np.ndarray, np.ndarray]:
        """Times and Kaplan and Meier's share of runs that are not there after each, two `(m,)` arrays."""
        found = ecdf(self.censored).sf
        return found.quantiles, found.probabilities

    def median(self) -> Median:
        """The time after which half of the runs are there; the interval is Brookmeyer and Crowley's (1982)."""
        found = ecdf(self.censored).sf
        if not self.reached.any():
            return Median(math.inf, math.nan, math.inf)
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # undefined where all or none of the runs are there
            band = found.confidence_interval(method="log-log")

        def first(shares: np.ndarray) -> float:
            below = np.flatnonzero(shares <= 0.5 + 1e-12)
            return float(found.quantiles[below[0]]) if below.size else math.inf

        # Before the first run is there the share is 1, and so is its band. After the last one no bound is known.
        lower = np.where(found.probabilities == 1, 1.0, np.nan_to_num(band.low.probabilities, nan=0.0))
        return Median(first(found.probabilities), first(lower), first(np.nan_to_num(band.high.probabilities, nan=1.0)))


@dataclass(frozen=True)
class Ratio:
    """The median time of a method divided by AdamW's, and its 95 % interval.

    A median that is not reached is known to be longer than the runs were. So the ratio lies between `least` and
    `most`, which are the same where both medians are reached.
    """

    least: float
    most: float
    low: float
    high: float
    seeds: int


def ratio_of_medians(times: Times, others: Times, resamples: int = RESAMPLES, seed: int = 0) -> Ratio:
    """The ratio of two medians and its 95 % percentile interval, of a bootstrap over seeds.

    Args:
        times, others: of the same seeds, in the same order, which are drawn together.
        resamples, seed: how many are drawn, and by which random numbers.
    """
    n = times.values.size
    if others.values.size != n:
        raise ValueError(f"The two methods need the same seeds, and have {n} and {others.values.size}.")

    def range_of(index: np.ndarray) -> tuple[float, float]:
        (low, high), (other_low, other_high) = (_median_range(x, index) for x in (times, others))
        # Steps of 0 on both sides are the same number of steps.
        least = 0.0 if math.isinf(other_high) else _divide(low, other_high)
        return least, math.inf if math.isinf(high) else _divide(high, other_low)

    least, most = range_of(np.arange(n))
    if n < 2:
        return Ratio(least, most, math.nan, math.nan, n)
    drawn = np.sort(np.random.default_rng(seed).integers(n, size=(resamples, n)), axis=1)
    distinct, counts = np.unique(drawn, axis=0, return_counts=True)
    ranges = np.repeat([range_of(index) for index in distinct], counts, axis=0)
    low = np.quantile(ranges[:, 0], 0.025, method="inverted_cdf")
    high = np.quantile(ranges[:, 1], 0.975, method="inverted_cdf")
    return Ratio(least, most, float(low), float(high), n)


def _median_range(times: Times, index: np.ndarray) -> tuple[float, float]:
    """What the median of some of the runs can be."""
    chosen = times.take(index)
    quantiles, shares = chosen.curve()
    below = np.flatnonzero(shares <= 0.5 + 1e-12)
    return (float(quantiles[below[0]]),) * 2 if below.size else (chosen.end, math.inf)


def _divide(x: float, y: float) -> float:
    if y == 0:
        return 1.0 if x == 0 else math.inf
    return x / y


def log_rank(times: Times, others: Times) -> tuple[float, float]:
    """Mantel's log-rank test; two NaN where no run of either reaches the threshold.

    Returns:
        The statistic, which is positive where `times` are the shorter ones, and the two-sided p-value.
    """
    if not times.reached.any() and not others.reached.any():
        return math.nan, math.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        found = logrank(times.censored, others.censored)
    return float(found.statistic), float(found.pvalue)


# ---- Runs ----


def time_of(run: Run, threshold: Threshold) -> tuple[float, float, bool]:
    """Steps and seconds of training until a run reaches a threshold, and whether it does.

    A run that does not is censored at the end of its steps. So is one that diverged: it would not have come back.
    """
    last = 0.0, 0.0
    for row in run.history:
        if threshold.metric not in row or "step" not in row:
            continue
        last = row["step"], row.get(SECONDS, math.nan)
        if threshold.is_reached(row[threshold.metric]):
            return *last, True
    steps = max(last[0], run.settings.get("max_steps", 0))
    return steps, last[1] * steps / last[0] if last[0] else math.nan, False


@dataclass(eq=False)
class Row:
    """The runs of one method, learning rate and weight decay, a seed each in ascending order."""

    method: str
    learning_rate: float
    weight_decay: float
    runs: list[Run]
    steps: Times
    seconds: Times | None  # None where a run did not record them
    final: float  # the mean of the metric at the end, smaller is better; infinite where a run has diverged
    median: Median = field(init=False)

    def __post_init__(self) -> None:
        self.median = self.steps.median()

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def worth(self) -> tuple[float, ...]:
        """Smaller is better: missing seeds, the median, runs that do not reach it, all steps, the metric at last."""
        times = self.median.value, -int(self.steps.reached.sum()), float(self.steps.values.sum())
        return -len(self.runs), *times, self.final


@dataclass(frozen=True, eq=False)
class Contrast:
    """The best setting of a method beside AdamW's best one, on the seeds that both have.

    Attributes:
        is_faster: whether the log-rank test has the method ahead of AdamW.
        p_value, p_holm: of that test, and adjusted for the number of methods.
    """

    row: Row
    baseline: Row
    ratio: Ratio
    seconds: Ratio | None
    is_faster: bool
    p_value: float
    p_holm: float = math.nan


@dataclass(eq=False)
class Survival:
    """What the runs of one task say.

    Attributes:
        rows: all settings, in the order of the runs.
        contrasts: of each method but AdamW.
        diverged: runs whose loss was not finite.
        every: steps between two evaluations: times are known to within that.
    """

    threshold: Threshold
    rows: list[Row]
    contrasts: list[Contrast] = field(default_factory=list)
    diverged: list[Run] = field(default_factory=list)
    every: float = math.nan

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(row.method for row in self.rows))

    @property
    def baseline(self) -> Row | None:
        """AdamW's best setting; without the method `adamw` that of all that are AdamW."""
        plain = {m for m in self.methods if find_method(m).group == BASELINE}
        return self.best_of({"adamw"} & plain or plain)

    def best_of(self, methods: Collection[str]) -> Row | None:
        """The setting of these methods that has the fewest median steps."""
        return min((row for row in self.rows if row.method in methods), key=lambda row: row.worth, default=None)

    def at_end(self, row: Row) -> list[str]:
        """In which of its grids the row's setting is the smallest or the largest, of two values or more.

        A weight decay of 0 is no such end: no smaller one is possible.
        """
        own, found = [other for other in self.rows if other.method == row.method], []
        for name in ("learning_rate", "weight_decay"):
            values = sorted({getattr(other, name) for other in own})
            at = {values[0]: "smallest", values[-1]: "largest"}.get(getattr(row, name))
            if len(values) > 1 and at and getattr(row, name) != 0:
                found.append(f"{at} {name.replace('_', ' ')}")
        return found


def build_survival(runs: list[Run], threshold: Threshold) -> Survival:
    """Rows and contrasts of the runs of one task, those that diverged included.

    Raises:
        ValueError: no run is finished.
    """
    runs = [run for run in runs if run.end in (FINISHED, DIVERGED)]
    if not runs:
        raise ValueError("No finished run (one with metrics.json).")
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        # A control has the settings of its seed's run, so each seed others: they are one row.
        setting = () if run.control else (run.learning_rate, run.settings.get("weight_decay", 0.0))
        groups.setdefault((run.method, *setting), []).append(run)
    rows = [_make_row(sorted(group, key=lambda run: run.seed), threshold) for group in groups.values()]
    steps = sorted({row["step"] for run in runs for row in run.history if threshold.metric in row})
    every = min((b - a for a, b in itertools.pairwise(steps)), default=math.nan)
    found = Survival(threshold, rows, [], [run for run in runs if run.end == DIVERGED], every)
    if found.baseline is not None:
        others = [found.best_of({m}) for m in found.methods if m != found.baseline.method]
        contrasts = [c for c in (_contrast(row, found.baseline) for row in others) if c is not None]
        adjusted = holm([c.p_value for c in contrasts])
        found.contrasts = [replace(c, p_holm=p) for c, p in zip(contrasts, adjusted, strict=True)]
    return found


def _make_row(runs: list[Run], threshold: Threshold) -> Row:
    steps, seconds, reached = map(np.array, zip(*(time_of(run, threshold) for run in runs), strict=True))
    decays = [run.settings.get("weight_decay", 0.0) for run in runs]
    return Row(
        runs[0].method,
        _mean([run.learning_rate for run in runs]),
        _mean(decays),
        runs,
        Times(steps.astype(float), reached),
        Times(seconds, reached) if np.isfinite(seconds).all() else None,
        float(np.mean([_final(run, threshold) for run in runs])),
    )


def _mean(values: list[float]) -> float:
    """The mean; of equal values that value and not what rounding makes of it."""
    return values[0] if len({*values}) == 1 else float(np.mean(values))


def _final(run: Run, threshold: Threshold) -> float:
    values = run.series(threshold.metric)[1]
    if run.end == DIVERGED or not values.size or not math.isfinite(values[-1]):
        return math.inf
    return -float(values[-1]) if threshold.larger_is_better else float(values[-1])


def _contrast(row: Row, baseline: Row) -> Contrast | None:
    shared = sorted({*row.seeds} & {*baseline.seeds})
    if not shared:
        return None

    def of_shared(times: Times | None, of: Row) -> Times | None:
        return times and times.take(np.array([of.seeds.index(seed) for seed in shared]))

    steps, others = of_shared(row.steps, row), of_shared(baseline.steps, baseline)
    seconds = of_shared(row.seconds, row), of_shared(baseline.seconds, baseline)
    in_seconds = None if None in seconds else ratio_of_medians(*seconds)
    statistic, p_value = log_rank(steps, others)
    return Contrast(row, baseline, ratio_of_medians(steps, others), in_seconds, statistic > 0, p_value)
