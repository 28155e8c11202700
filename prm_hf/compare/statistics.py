"""The statistics of a comparison, as pure functions of numpy arrays.

An accuracy difference has two sources of chance: which held-out pairs were drawn, and which seed the runs had. All
methods see the same pairs, and the same seeds give the same data order, so both are compared in pairs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtr, stdtrit


Z_95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and examples, and its 95 % interval.

    Attributes:
        mean: the mean.
        low: lower end of the interval; NaN where the data cannot give one.
        high: upper end of the interval, likewise.
        seeds: how many seeds went into it.
        examples: how many examples went into it; 1 if only each run's mean was known.
        p_value: two-sided, of the mean being 0: below 0.05 just where the interval leaves 0 out. NaN without interval.
    """

    mean: float
    low: float
    high: float
    seeds: int
    examples: int
    p_value: float = math.nan

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.low) and np.isfinite(self.high))


def finite(value: float | None) -> bool:
    """Whether `value` was measured and is a finite number."""
    return value is not None and math.isfinite(value)


def mean_and_standard_error(values: np.ndarray) -> tuple[float, float, int]:
    """Mean and standard error of `[n]` values, e.g. one a seed, and n. NaN is a mean of none, an error below two."""
    values = np.asarray(values, dtype=np.float64)
    n = values.size
    mean = float(values.mean()) if n else math.nan
    return mean, float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else math.nan, n


def proportion_standard_error(proportion: float, n: int) -> float:
    """Standard error √(p(1-p)/n) of a share `proportion` of `n` independent examples."""
    return float(np.sqrt(proportion * (1 - proportion) / n))


def bootstrap_interval(
    values: np.ndarray, resamples: int = 4000, seed: int = 0, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """95 % interval of the mean of `values` by a bootstrap over seeds and examples.

    Pass paired differences, e.g. `correct_a - correct_b`, each `[seeds, examples]`, to get the interval of an accuracy
    difference. Each resample draws seeds, then examples. All seeds share the examples drawn, as the held-out pairs are
    the same in every run: drawing them for each seed apart would take one set of pairs for many.

    The spread of such a bootstrap is wrong in two known ways: a resample of k seeds has (k-1)/k of their variance, and
    the interaction of seed and example counts three times (Owen 2007, "The pigeonhole bootstrap", Ann. Appl. Stat.
    1(2)). So its deviations are rescaled to the unbiased variance of a two-way layout, and widened from the normal's
    quantile to Student's t with Satterthwaite's degrees of freedom. Simulated coverage is 93 to 97 %; where the seed
    is nearly all that matters it is about 80 % with two seeds and 90 % with three.

    Args:
        values: `[seeds, examples]` float. With one seed only the examples are resampled, and the interval holds for
            that seed. With one example column (each run's mean) it is the paired t interval over seeds.
        seed: of the resampling, so that a report is reproducible.
        bounds: what the mean can be: the interval ends there. A difference of accuracies is in [-1, 1].

    Returns:
        The interval. Its ends are NaN for a single number, and where nothing varies but the mean is not 0.

    Raises:
        ValueError: `values` is not 2-dimensional, is empty or holds a non-finite number.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"`values` must have the shape [seeds, examples] and hold something, got {values.shape}.")
    if not np.isfinite(values).all():
        raise ValueError("`values` must be finite.")
    seeds, examples = values.shape
    mean = float(values.mean())
    variance, df = _two_way_variance(values)
    if not variance > 0:
        end, p_value = (0.0, 1.0) if mean == 0 and values.size > 1 else (math.nan, math.nan)
        return Interval(mean, end, end, seeds, examples, p_value)
    quantile = float(stdtrit(df, 0.975))  # of Student's t
    half = quantile * np.sqrt(variance)
    low, high = -half, half
    if examples > 1:
        deviations = _resampled_means(values, resamples, np.random.default_rng(seed)) - mean
        low, high = np.quantile(deviations, [0.025, 0.975]) * half / deviations.std() / Z_95
    # The side of the interval that is towards 0 says how far away 0 is.
    towards_zero = abs(low if mean > 0 else high) or half
    p_value = 2 * float(stdtr(df, -abs(mean) / towards_zero * quantile))
    low, high = np.clip((mean + low, mean + high), *bounds)
    return Interval(mean, float(low), float(high), seeds, examples, p_value)


def _resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """`[resamples]`: means of `[seeds, examples]` values, of which each resample draws seeds and examples."""

    def weights(count: int, n: int) -> np.ndarray:
        """`[count, n]`: the share that each of n things has in a resample of n draws."""
        drawn = rng.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        return np.bincount(drawn.ravel(), minlength=count * n).reshape(count, n) / n

    seeds, examples = values.shape
    chunk = max(1, 4_000_000 // examples)  # at most 32 MB of weights at a time
    counts = [min(chunk, resamples - start) for start in range(0, resamples, chunk)]
    means = [((weights(count, seeds) @ values) * weights(count, examples)).sum(axis=1) for count in counts]
    return np.concatenate(means)


def _two_way_variance(values: np.ndarray) -> tuple[float, float]:
    """Variance of the mean of `[seeds, examples]` crossed values, and Satterthwaite's degrees of freedom of it."""
    seeds, examples = values.shape
    rows, columns = values.mean(axis=1), values.mean(axis=0)
    if seeds == 1 or examples == 1:
        means = columns if seeds == 1 else rows
        if means.size == 1:
            return 0.0, 0.0
        return float(means.var(ddof=1) / means.size), means.size - 1
    # The variances of the seeds' and of the examples' means each contain the interaction once; their sum, twice.
    residual = values - rows[:, None] - columns + values.mean()
    interaction = (residual**2).sum() / ((seeds - 1) * (examples - 1)) / values.size
    over_seeds = max(rows.var(ddof=1) / seeds - interaction, 0.0)
    over_examples = max(columns.var(ddof=1) / examples - interaction, 0.0)
    variance = over_seeds + over_examples + interaction
    uncertainty = over_seeds**2 / (seeds - 1) + (over_examples + interaction) ** 2 / (examples - 1)
    return float(variance), float(variance**2 / uncertainty) if uncertainty > 0 else float("inf")


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values (1979, Scand. J. Stat. 6): those below 0.05 are differences that 5 % of such families
    would show by chance, whatever their dependence. NaN, a comparison that was not made, stays and does not count.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p_values)[: np.isfinite(p_values).sum()]  # NaN comes last
    adjusted = np.full(len(p_values), np.nan)
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.maximum.accumulate(np.minimum(1, factors * p_values[order]))
    return adjusted.tolist()


def _read_curve(kl: np.ndarray, values: np.ndarray, at: np.ndarray) -> np.ndarray:
    """`[n, examples]`: a curve through `[points]` KLs and `[points, examples]` values at `[n]` KLs, linear in log KL.

    Points of one KL are averaged, those without a positive finite KL left out. NaN outside the range of the points.
    """
    kl, values = np.asarray(kl, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if kl.ndim != 1 or values.ndim != 2 or len(kl) != len(values):
        raise ValueError(f"`kl` and `values` must be [points] and [points, examples], got {kl.shape}, {values.shape}.")
    known = np.unique(kl[np.isfinite(kl) & (kl > 0)])
    if not known.size:
        return np.full((len(at), values.shape[1]), np.nan)
    means = np.array([values[kl == x].mean(axis=0) for x in known])
    outside = {"left": np.nan, "right": np.nan}
    weights = [np.interp(np.log(at), np.log(known), unit, **outside) for unit in np.eye(len(known))]
    return np.transpose(weights) @ means


def interpolate_at_kl(kl: np.ndarray, values: np.ndarray, at: float) -> np.ndarray | None:
    """Values of a method's curve at a given KL, linear in log KL between its two neighbouring runs.

    Args:
        kl: `[points]` float, nats a token: the drift of each run. Points without a positive finite KL are left out.
        values: `[points, examples]` float: e.g. whether each held-out pair is right. Interpolating each example and
            averaging equals interpolating the accuracies, and keeps the pairing.

    Returns:
        `[examples]` float64, or None where `at` lies outside the range that the runs cover: nothing is extrapolated.
    """
    (found,) = _read_curve(kl, values, np.array([at if at > 0 else np.nan]))
    return None if np.isnan(found).any() else found


def bracket_ratio(kl: np.ndarray, at: float) -> float:
    """Ratio of the two neighbouring KLs in `kl` (`[points]`) that `interpolate_at_kl` uses; 1 at a point itself."""
    kl = np.asarray(kl, dtype=np.float64)
    return float(kl[kl >= at].min() / kl[(kl > 0) & (kl <= at)].max())


def mean_over_log_kl(kl: np.ndarray, values: np.ndarray, low: float, high: float) -> np.ndarray | None:
    """Area under the curve of `interpolate_at_kl` over log KL, divided by the width log(high/low): its mean height.

    Of two methods, the one with the larger area is the more accurate at equal drift, over all drifts and with no
    learning rate picked. The result is linear in `values`, so areas can be paired by example.

    Returns:
        `[examples]` float64, or None where the runs do not cover the range: nothing is extrapolated.
    """
    inside = sorted({float(at) for at in kl if low < at < high})
    points = np.array([low, *inside, high])
    heights = _read_curve(kl, values, points)
    if not low < high or np.isnan(heights).any():
        return None
    widths = np.diff(np.log(points))
    return widths @ (heights[1:] + heights[:-1]) / 2 / widths.sum()


def shared_range(curves: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """The range of KL that all curves cover, each a `[points]` array of KLs; None if there is none."""
    usable = [[x for x in kl if 0 < x < math.inf] for kl in curves]
    if not usable or not all(usable):
        return None
    low, high = max(map(min, usable)), min(map(max, usable))
    return (float(low), float(high)) if low < high else None


def rate_at_kl(learning_rates: np.ndarray, kl: np.ndarray, at: float) -> float | None:
    """The smallest learning rate that drifts to `at`, linear in the logarithms between neighbouring rates.

    Args:
        learning_rates: of the points, in any order. Shape `(points,)`.
        kl: of the points. Shape `(points,)`. Points without a positive finite KL are left out.
        at: the KL that is looked for.

    Returns:
        The rate, or None where no neighbouring rates have `at` between them: nothing is extrapolated.
    """
    points = sorted((rate, x) for rate, x in zip(learning_rates, kl, strict=True) if 0 < x < math.inf)
    for (rate, x), (next_rate, next_x) in itertools.pairwise(points):
        if min(x, next_x) <= at <= max(x, next_x):
            weight = math.log(at / x) / math.log(next_x / x) if next_x != x else 0.0
            return float(rate * (next_rate / rate) ** weight)
    return None


def noise_floor(beta1: float = 0.9, softness: float = 1.0, alpha: float = 1.0) -> float:
    """Where the `snr` mask of the `"ema"` estimator settles, per_tensor, if the gradient is nothing but noise.

    For independent gradients of mean 0 and variance σ², m̂² has the mean rσ² with r = (1-β1)/(1+β1), and ŝ, centred on
    the previous m, has (1+r)σ². So S/N = r/(1+r), which is 1/20 at β1 = 0.9, and q = S/(S + λαN) = r/(r + λα(1+r)),
    which is 1/21 ≈ 0.048. A mean over parameters is what makes S and N sit at these means; per_param masks scatter.
    """
    r = (1 - beta1) / (1 + beta1)
    return r / (r + softness * alpha * (1 + r))
