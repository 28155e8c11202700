"""Which labels are wrong, and how many: probabilities from margins of models, with numpy and scipy alone.

A reward margin is antisymmetric: with the two sides swapped it changes its sign. A model that did not train on a row
does not know its label. So if labels are wrong independently of the content, the probability of the label that was
given is

    P(label | s) = (1 - ε) σ(k s) + ε σ(-k s)                                                                (1)

with s the margin in the label's direction, σ(k s) the probability that this direction is truly the better one, and ε
the share of wrong labels. The data identify ε by how often the largest margins disagree with their labels, and a
likelihood that is flat in ε gives a wide interval.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit, logsumexp
from scipy.stats import chi2, rankdata


SHARES = np.linspace(0.0, 0.5, 51)  # ε: labels must be right more often than wrong
SLOPES = np.geomspace(0.03, 30.0, 40)  # k, of margins whose root mean square is 1
EM_STEPS = 50


@dataclass(frozen=True)
class WrongLabels:
    """What [`estimate_wrong_labels`] returns, in the order of the rows.

    Attributes:
        scores: (n,) float64, larger for a label that is more likely wrong; the logit of the probability.
        probabilities: (n,) float64, the probability that a label is wrong.
        share: estimated share of wrong labels.
        share_low, share_high: its 95 % interval; 0 and .5 if the margins say nothing about the share.
    """

    scores: np.ndarray
    probabilities: np.ndarray
    share: float
    share_low: float
    share_high: float

    @property
    def ranks(self) -> np.ndarray:
        """(n,) int64: 1 is the most suspect row; of equal scores the first row comes first."""
        return rankdata(-self.scores, method="ordinal")


def estimate_wrong_labels(
    margins: ArrayLike | None = None,
    *,
    in_sample: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    antisymmetric: bool = True,
    seed: int = 0,
) -> WrongLabels:
    """Estimate which labels are wrong from the margins by which models prefer them.

    Args:
        margins: (n,) or (evaluations, n), by how much a model that did not train on a row prefers its label as given.
        in_sample: the same of a model that trained on all rows. With `margins` it is a second, weaker witness. Without
            them it is the only one, and the share is hardly known.
        groups: (n,), rows that share a group (as a prompt) are not independent of each other.
        antisymmetric: whether `margins` change their sign with the label, as those of preferences and of two classes
            do. Otherwise they are taken as a mixture of two Gaussians, as `in_sample` is.

    Raises:
        ValueError: a margin is not finite, shapes do not fit, there are no rows, or no margin differs from another.
    """
    if margins is None and in_sample is None:
        raise ValueError("Pass `margins`, `in_sample` or both: there is nothing to estimate from.")
    outer = None if margins is None else _score(margins, "margins", centred=not antisymmetric)
    inner = None if in_sample is None else _score(in_sample, "in_sample", centred=True)
    n = len(inner if outer is None else outer)
    if outer is not None and inner is not None and len(inner) != n:
        raise ValueError(f"`margins` are of {n} rows and `in_sample` of {len(inner)}: pass both of the same rows.")
    codes = _codes(groups, n)
    if outer is not None and antisymmetric:
        log_odds, estimate = _antisymmetric(outer, codes)
    else:
        log_odds, estimate = _mixture(inner if outer is None else outer, codes)
    if outer is not None and inner is not None:
        log_odds = log_odds + _second_witness(outer, inner, expit(log_odds))
    return WrongLabels(log_odds, expit(log_odds), *estimate)


def _score(margins: ArrayLike, name: str, centred: bool) -> np.ndarray:
    """The mean over the evaluations, each in units of its root mean square, (n,)."""
    values = np.atleast_2d(np.asarray(margins, dtype=np.float64))
    if values.ndim != 2 or values.shape[1] == 0 or values.shape[0] == 0:
        raise ValueError(f"`{name}` has shape {np.shape(margins)}: it must be (n,) or (evaluations, n), n at least 1.")
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).all(0))
        raise ValueError(
            f"`{name}` has {len(rows)} rows that are not finite, as row {rows[0]}: leave them out, or train again with "
            "a smaller learning rate."
        )
    if centred:
        values = values - values.mean(1, keepdims=True)
    values = values / np.abs(values).max(1, keepdims=True, initial=np.finfo(float).tiny)
    size = np.sqrt(np.square(values).mean(1, keepdims=True))
    score = np.divide(values, size, out=np.zeros_like(values), where=size > 0).mean(0)
    if not score.any():
        raise ValueError(f"`{name}` are all {'equal' if centred else '0'}: these margins tell no row from another.")
    return score / np.sqrt(np.square(score).mean())


def _codes(groups: ArrayLike | None, n: int) -> np.ndarray:
    """The group of each row as a number from 0, (n,)."""
    if groups is None:
        return np.arange(n)
    groups = np.asarray(groups)
    if groups.shape != (n,):
        raise ValueError(f"`groups` has shape {groups.shape}: it must be ({n},), a group of each row of the margins.")
    return np.unique(groups, return_inverse=True)[1]


def _antisymmetric(s: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """Log-odds of a wrong label, and the share with its interval, by equation (1) with flat priors of ε and log k."""
    ones = np.ones_like(s)
    right = np.stack([expit(k * s) for k in SLOPES])  # (slopes, n)
    likelihood = np.stack([np.log(e + (1 - 2 * e) * right).sum(1) for e in np.clip(SHARES, 1e-12, None)])
    best = np.unravel_index(likelihood.argmax(), likelihood.shape)
    likelihood = likelihood / _design_effect(SHARES[best[0]], right[best[1]], s, codes)
    weights = np.exp(likelihood - logsumexp(likelihood))  # (shares, slopes)
    wrong = np.zeros_like(ones)
    for e, of_slopes in zip(SHARES, weights, strict=True):
        wrong += of_slopes @ (e * (1 - right) / np.maximum(e + (1 - 2 * e) * right, 1e-300))
    share = float(weights.sum(1) @ SHARES)
    return logit(np.clip(wrong, 1e-12, 1 - 1e-12)), (share, *_interval(likelihood.max(1)))


def _design_effect(share: float, right: np.ndarray, s: np.ndarray, codes: np.ndarray) -> float:
    """By what rows of a group that agree with each other widen the variance of the share: 1 without groups."""
    p = share + (1 - 2 * share) * right
    by_share, by_slope = (1 - 2 * right) / p, (1 - 2 * share) * right * (1 - right) * s / p
    efficient = by_share - by_slope * (by_share @ by_slope) / max(by_slope @ by_slope, 1e-300)
    total = efficient @ efficient
    return max(1.0, float(np.square(np.bincount(codes, efficient)).sum() / total)) if total > 0 else 1.0


def _interval(profile: np.ndarray) -> tuple[float, float]:
    """The shares that a likelihood-ratio test at 5 % does not reject."""
    kept = SHARES[profile >= profile.max() - chi2.ppf(0.95, 1) / 2]
    return float(kept.min()), float(kept.max())


def _mixture(s: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """As `_antisymmetric`, of two Gaussians with one variance, that of the wrong labels below the other."""
    fits = [_two_gaussians(s, e) for e in np.clip(SHARES, 1e-6, None)]
    per_group = len(codes) / (codes.max() + 1)
    likelihood = np.array([value for value, _ in fits]) / per_group  # rows of a group count as one: the widest
    weights = np.exp(likelihood - logsumexp(likelihood))
    wrong = np.clip(weights @ np.stack([expit(log_odds) for _, log_odds in fits]), 1e-12, 1 - 1e-12)
    return logit(wrong), (float(weights @ SHARES), *_interval(likelihood))


def _two_gaussians(s: np.ndarray, share: float) -> tuple[float, np.ndarray]:
    """Log-likelihood, and log-odds of the lower component, of the best mixture with these shares."""
    wrong = np.where(s < np.quantile(s, share), 0.9, 0.1)
    for _ in range(EM_STEPS):
        low, high = (wrong @ s) / wrong.sum(), ((1 - wrong) @ s) / (1 - wrong).sum()
        low, high = min(low, high), max(low, high)
        variance = max((wrong @ (s - low) ** 2 + (1 - wrong) @ (s - high) ** 2) / len(s), 1e-6)
        log_odds = logit(share) + ((s - high) ** 2 - (s - low) ** 2) / (2 * variance)
        wrong = np.clip(expit(log_odds), 1e-9, 1 - 1e-9)
    density = np.logaddexp(
        np.log1p(-share) - (s - high) ** 2 / 2 / variance, np.log(share) - (s - low) ** 2 / 2 / variance
    )
    return float((density - np.log(variance) / 2).sum()), log_odds


def _second_witness(outer: np.ndarray, inner: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """What margins in sample add to the log-odds, (n,): Gaussians about a line in `outer`, with two intercepts."""
    wrong = prior
    for _ in range(EM_STEPS):
        design = np.stack([outer, 1 - wrong, wrong])
        gram = design @ design.T
        gram[1, 1], gram[2, 2], gram[1, 2], gram[2, 1] = (1 - wrong).sum(), wrong.sum(), 0.0, 0.0
        slope, high, low = np.linalg.lstsq(gram, design @ inner, rcond=None)[0]
        low = min(low, high)
        rest = inner - slope * outer
        variance = max((wrong @ (rest - low) ** 2 + (1 - wrong) @ (rest - high) ** 2) / len(rest), 1e-6)
        added = ((rest - high) ** 2 - (rest - low) ** 2) / (2 * variance)
        wrong = np.clip(expit(logit(np.clip(prior, 1e-9, 1 - 1e-9)) + added), 1e-9, 1 - 1e-9)
    return added
