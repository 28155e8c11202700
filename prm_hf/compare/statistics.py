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
    """A mean and its 95 % interval; `low` and `high` are NaN where the data cannot give one.

    Attributes:
        mean: the mean over seeds and examples.
        low: lower end.
        high: upper end.
        seeds: number of seeds that went into it.
        examples: number of examples that went into it; 1 if only each run's mean was known.
        p_value: two-sided, of the mean being 0: below 0.05 just where the interval leaves 0 out. NaN without interval.
    """

    mean: float
    low: float
    high: float
    seeds: int
    examples: int
    p_value: float = float("nan")

    @property
    def known(self) -> bool:
        return bool(np.isfinite(self.low) and np.isfinite(self.high))

    @property
    def verdict(self) -> str:
        """`"higher"`, `"lower"`, `"within noise"` (the interval holds 0) or `"no interval"`."""
        if not self.known:
            return "no interval"
        return "higher" if self.low > 0 else "lower" if self.high < 0 else "within noise"


def finite(value: float | None) -> bool:
    """Whether `value` was measured and is a finite number."""
    return value is not None and math.isfinite(value)


def mean_and_standard_error(values: np.ndarray) -> tuple[float, float, int]:
    """Mean, standard error of the mean and number of the values, e.g. one value a seed.

    Args:
        values: `[n]` float.

    Returns:
        (mean, standard error, n). The standard error is NaN below two values, where no spread can be measured; the
        mean of none is NaN.
    """
    values = np.asarray(values, dtype=np.float64)
    n = values.size
    mean = float(values.mean()) if n else float("nan")
    return mean, float(values.std(ddof=1) / np.sqrt(n)) if n > 1 else float("nan"), n


def proportion_standard_error(proportion: float, n: int) -> float:
    """Standard error √(p(1-p)/n) of a share `proportion` of `n` independent examples."""
    return float(np.sqrt(proportion * (1 - proportion) / n))


def bootstrap_interval(values: np.ndarray, resamples: int = 4000, seed: int = 0) -> Interval:
    """95 % interval of the mean of `values` by a bootstrap over seeds and examples.

    Pass paired differences, e.g. `correct_a - correct_b`, each `[seeds, examples]`, to get the interval of an accuracy
    difference. Each resample draws seeds, then examples. All seeds share the examples drawn, as the held-out pairs are
    the same in every run: drawing them for each seed apart would take one set of pairs for many.

    The spread of such a bootstrap is wrong in two known ways: a resample of k seeds has (k-1)/k of their variance, and
    the interaction of seed and example counts three times (Owen 2007, "The pigeonhole bootstrap", Ann. Appl. Stat.
    1(2)). So its deviations are rescaled to the unbiased variance of a two-way layout, and widened from the normal's
    quantile to Student's t with Satterthwaite's degrees of freedom: near seeds - 1 where the seeds differ more than
    their examples explain. Simulated coverage is 93 to 97 %; where the seed is nearly all that matters it is about
    80 % with two seeds and 90 % with three.

    Args:
        values: `[seeds, examples]` float. With one seed only the examples are resampled, and the interval holds for
            that seed. With one example column (each run's mean) it is the paired t interval over seeds.
        resamples: number of bootstrap resamples.
        seed: of the resampling, so that a report is reproducible.

    Returns:
        The interval. Its ends are NaN for a single number, and where nothing varies but the mean is not 0: no spread
        can be measured there.

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
        known = mean == 0 and values.size > 1
        end, p_value = (0.0, 1.0) if known else (float("nan"),) * 2
        return Interval(mean, end, end, seeds, examples, p_value)
    quantile = float(stdtrit(df, 0.975))  # of Student's t
    half = quantile * np.sqrt(variance)
    low, high = -half, half
    if examples > 1:
        rng = np.random.default_rng(seed)
        chunk = max(1, 4_000_000 // examples)  # at most 32 MB of weights at a time
        deviations = np.concatenate(
            [
                np.sum(
                    (_bootstrap_weights(rng, count, seeds) @ values) * _bootstrap_weights(rng, count, examples), axis=1
                )
                for count in (min(chunk, resamples - start) for start in range(0, resamples, chunk))
            ]
        )
        deviations -= mean
        low, high = np.quantile(deviations, [0.025, 0.975]) * half / deviations.std() / Z_95
    # The side of the interval that is towards 0 says how far away 0 is.
    towards_zero = abs(low if mean > 0 else high) or half
    p_value = 2 * float(stdtr(df, -abs(mean) / towards_zero * quantile))
    return Interval(mean, float(mean + low), float(mean + high), seeds, examples, p_value)


def _bootstrap_weights(rng: np.random.Generator, resamples: int, n: int) -> np.ndarray:
    """`[resamples, n]`: the share that each of n things has in a resample of n draws."""
    drawn = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n) / n


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
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [float("nan")] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = largest
    return adjusted


def _curve(kl: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of a curve whose KL is positive and finite, by ascending KL; points of one KL are averaged."""
    kl, values = np.asarray(kl, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if kl.ndim != 1 or values.ndim != 2 or len(kl) != len(values):
        raise ValueError(f"`kl` and `values` must be [points] and [points, examples], got {kl.shape}, {values.shape}.")
    known = np.unique(kl[np.isfinite(kl) & (kl > 0)])
    return known, np.array([values[kl == at].mean(axis=0) for at in known])


def interpolate_at_kl(kl: np.ndarray, values: np.ndarray, at: float) -> np.ndarray | None:
    """Values of a method's curve at a given KL, linear in log KL between its two neighbouring runs.

    Args:
        kl: `[points]` float > 0, nats a token: the drift of each run of the method, in any order. Points whose KL is
            not a positive finite number are left out.
        values: `[points, examples]` float: e.g. whether each held-out pair is right. Interpolating each example and
            averaging equals interpolating the accuracies, and keeps the pairing.
        at: the KL to read the curve at.

    Returns:
        `[examples]` float64, or None where `at` lies outside the range that the runs cover: nothing is extrapolated.
    """
    kl, values = _curve(kl, values)
    if not (kl.size and kl[0] <= at <= kl[-1]):
        return None
    right = int(np.searchsorted(kl, at))  # kl[right - 1] < at <= kl[right]
    if kl[right] == at:
        return values[right]
    weight = np.log(at / kl[right - 1]) / np.log(kl[right] / kl[right - 1])
    return (1 - weight) * values[right - 1] + weight * values[right]


def bracket_ratio(kl: np.ndarray, at: float) -> float:
    """Ratio of the two neighbouring KLs in `kl` (`[points]`) that `interpolate_at_kl` uses; 1 at a point itself."""
    kl = np.asarray(kl, dtype=np.float64)
    return float(kl[kl >= at].min() / kl[(kl > 0) & (kl <= at)].max())


def mean_over_log_kl(kl: np.ndarray, values: np.ndarray, low: float, high: float) -> np.ndarray | None:
    """Area under a method's curve over log KL between `low` and `high`, divided by the width log(high/low).

    That is the mean height of the curve of `interpolate_at_kl`, in the units of `values`: of two methods, the one with
    the larger area is the more accurate at equal drift, over all drifts and with no learning rate picked.

    Args:
        kl, values: as in `interpolate_at_kl`. The result is linear in `values`, so areas can be paired by example.
        low, high: the range, nats a token.

    Returns:
        `[examples]` float64, or None where the runs do not cover the range: nothing is extrapolated.
    """
    points = [low, *(at for at in _curve(kl, values)[0] if low < at < high), high]
    heights = [interpolate_at_kl(kl, values, at) for at in points]
    if not low < high or any(height is None for height in heights):
        return None
    widths, heights = np.diff(np.log(points)), np.stack(heights)
    return widths @ (heights[1:] + heights[:-1]) / 2 / widths.sum()


def shared_range(curves: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """The range of KL that all curves cover, each a `[points]` array of KLs; None if there is none."""
    usable = [[x for x in kl if 0 < x < math.inf] for kl in curves]
    if not usable or not all(usable):
        return None
    low, high = max(map(min, usable)), min(map(max, usable))
    return (float(low), float(high)) if low < high else None


def rate_at_kl(learning_rates: np.ndarray, kl: np.ndarray, at: float) -> float | None:
    """The learning rate at which a method drifts to `at`, linear in the logarithms between neighbouring rates.

    Args:
        learning_rates: `[points]` float > 0, in any order.
        kl: `[points]` float: the drift at each of them. Points without a positive finite KL are left out.
        at: the KL to be reached.

    Returns:
        The smallest such rate, or None where no neighbouring rates have `at` between them: nothing is extrapolated.
    """
    points = sorted((rate, x) for rate, x in zip(learning_rates, kl, strict=True) if 0 < x < float("inf"))
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
