"""Which labels are wrong, and how many: probabilities from margins of models, with numpy and scipy alone.

A reward margin s is antisymmetric: with the two sides swapped it changes its sign. A model that did not train on a row
does not know its label. So if labels are wrong independently of the content, the label that was given has the
probability

    (1 - ε) σ(z) + ε σ(-z)     with z = k (cos θ sign(s) |s|^γ + sin θ v)                                      (1)

where s is in the label's direction, σ(z) the probability that this direction is truly the better one, and ε the share
of wrong labels. v is what the other pairs of the prompt say ([`votes`]); without it θ = 0. k is named by the accuracy
that it stands for: the mean of σ(|z|) over the rows. How often the largest |z| disagree with their labels identifies
ε. If the data fit many ε, the interval is wide.
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, logit, logsumexp
from scipy.stats import chi2, rankdata


SHARES = np.linspace(0.0, 0.5, 51)  # ε: labels are right more often than wrong
ACCURACIES = np.linspace(0.51, 0.99, 25)
EXPONENTS = (0.5, 1.0)  # γ: log-odds grow more slowly than the margins, where larger margins are noisier too
ANGLES = np.linspace(0, np.pi / 2, 9)  # θ: from margins alone to votes alone
NEGLIGIBLE = 1e-9  # weight
EM_STEPS = 50


@dataclass(frozen=True)
class WrongLabels:
    """What [`estimate_wrong_labels`] returns, in the order of the rows.

    Attributes:
        scores: (n,) float64, larger for a label that is more likely wrong; the logit of the probability.
        probabilities: (n,) float64, the probability that a label is wrong.
        share: estimated share of wrong labels.
        share_low: lower end of its 95 % interval; 0 if the margins say nothing about the share.
        share_high: upper end of it; .5 in that case.
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


def votes(groups: Sequence[Hashable], chosen: Sequence[Hashable], rejected: Sequence[Hashable]) -> np.ndarray:
    """What the other pairs of its prompt say about each label.

    A completion has a point for each other pair that it wins, and loses one for each that it loses. The vote is the
    points of the chosen completion less those of the rejected one. It changes its sign with the label, and does not
    know it, so votes are margins, too: `estimate_wrong_labels(votes(...), groups=...)` needs no model.

    Args:
        groups: one a pair, the same for pairs of a prompt.
        chosen: the completions that are preferred, the same for the same text.
        rejected: the others.

    Returns:
        (n,) float64, 0 where no other pair of the prompt has one of the two completions.
    """
    pairs, points = list(zip(groups, chosen, rejected, strict=True)), Counter()
    for group, won, lost in pairs:
        points[group, won] += 1
        points[group, lost] -= 1
    own = [2.0 * (won != lost) for _, won, lost in pairs]
    return np.array([points[group, won] - points[group, lost] for group, won, lost in pairs], np.float64) - own


def estimate_wrong_labels(
    margins: ArrayLike | None = None,
    *,
    votes: ArrayLike | None = None,
    in_sample: ArrayLike | None = None,
    groups: ArrayLike | None = None,
    checked: ArrayLike | None = None,
    antisymmetric: bool = True,
    seed: int = 0,
) -> WrongLabels:
    """Estimate which labels are wrong from the margins by which models prefer them.

    Args:
        margins: (n,) or (evaluations, n), by how much a model that did not train on a row prefers its label as given.
        votes: (n,), what [`votes`] returns: a second witness beside antisymmetric `margins` of models that trained on
            no pair of the row's prompt. How much it says is fitted. Needs `groups`, the prompts. Where no vote is
            against its label, as where labels come from one score a completion, or where the share that they lead
            to contradicts that of the margins, votes have no effect: labels of a prompt are then wrong together, and
            agree for that reason.
        in_sample: the same as `margins` of models that trained on the row, as the other folds' models or one of all
            rows. Beside `margins` it helps to rank the rows, and the share is that of `margins`. Alone it ranks them;
            then the share is hardly known, and the probabilities are no better.
        groups: (n,), rows that share a group (as a prompt) are not independent of each other.
        checked: (n,), what is known of a label: 1 wrong, 0 right, NaN not looked at. Which rows were looked at may
            depend on their margins, as with the first hundred suspects. Needs antisymmetric `margins`.
        antisymmetric: whether `margins` change their sign with the label, as those of preferences and of two classes
            do. Otherwise they are taken as a mixture of two Gaussians, as `in_sample` is.
        seed: has no effect, because nothing here is random.

    Raises:
        ValueError: a margin is not finite, shapes do not fit, there are no rows, no margin differs from another, or
            `votes` or `checked` have other values or margins that they cannot be used with.
    """
    if margins is None and in_sample is None:
        raise ValueError("Pass `margins`, `in_sample` or both: there is nothing to estimate from.")
    if votes is not None and (margins is None or not antisymmetric):
        raise ValueError("`votes` need antisymmetric `margins`: leave them out, or pass them as the `margins`.")
    outer = None if margins is None else _score(margins, "margins", centred=not antisymmetric)
    inner = None if in_sample is None else _score(in_sample, "in_sample", centred=True)
    n = len(inner if outer is None else outer)
    if outer is not None and inner is not None and len(inner) != n:
        raise ValueError(f"`margins` are of {n} rows and `in_sample` of {len(inner)}: pass both of the same rows.")
    codes, known, other = _codes(groups, n), _known(checked, n), _votes(votes, groups, n)
    if outer is not None and antisymmetric:
        log_odds, estimate, shape = _antisymmetric(outer, other, codes, known)
    elif checked is not None:
        raise ValueError("`checked` needs antisymmetric `margins`: leave it out, and keep what was decided by hand.")
    else:
        log_odds, estimate = _mixture(inner if outer is None else outer, codes)
        shape = (1.0, 0.0)
    if outer is not None and inner is not None:
        log_odds = _in_order(log_odds, _evidence(_with_second_witness(outer, inner), other, *shape))
    log_odds = np.where(np.isnan(known), log_odds, _logit(known))
    return WrongLabels(log_odds, expit(log_odds), *estimate)


def _score(margins: ArrayLike, name: str, centred: bool) -> np.ndarray:
    """The mean over the evaluations, each in units of its root mean square, (n,)."""
    values = np.atleast_2d(np.asarray(margins, dtype=np.float64))
    if values.ndim != 2 or values.shape[1] == 0 or values.shape[0] == 0:
        raise ValueError(f"`{name}` has shape {np.shape(margins)}: it must be (n,) or (evaluations, n), n at least 1.")
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~np.isfinite(values).all(0))
        raise ValueError(
            f"`{name}` has {len(rows)} rows that are not finite, as row {rows[0]}: leave them out, or train again "
            "with a smaller learning rate."
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


def _known(checked: ArrayLike | None, n: int) -> np.ndarray:
    """`checked`, or NaN for each row."""
    known = np.full(n, np.nan) if checked is None else np.asarray(checked, dtype=np.float64)
    if known.shape != (n,):
        raise ValueError(f"`checked` has shape {known.shape}: it must be ({n},), a value for each row of the margins.")
    other = known[~(np.isnan(known) | (known == 0) | (known == 1))]
    if len(other):
        raise ValueError(f"`checked` has the value {other[0]}: it must be 1 (wrong), 0 (right) or NaN.")
    return known


def _votes(votes: ArrayLike | None, groups: ArrayLike | None, n: int) -> np.ndarray:
    """`votes` in units of the root mean square of those that are not 0, or 0 for each row if they say nothing."""
    if votes is None:
        return np.zeros(n)
    if groups is None:
        raise ValueError("`votes` are of pairs that share a prompt: pass the prompts as `groups`.")
    values = np.asarray(votes, dtype=np.float64)
    if values.shape != (n,):
        raise ValueError(f"`votes` has shape {values.shape}: it must be ({n},), a vote for each row of the margins.")
    if not np.isfinite(values).all():
        raise ValueError(f"`votes` has {np.flatnonzero(~np.isfinite(values)).size} values that are not finite.")
    if not (values < 0).any():
        return np.zeros(n)
    return values / np.sqrt(np.square(values).sum() / np.count_nonzero(values))


def _antisymmetric(
    s: np.ndarray, v: np.ndarray, codes: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, tuple[float, float, float], tuple[float, float]]:
    """As `_fit`, without votes if the share with them contradicts that of the margins."""
    alone = _fit(s, np.zeros_like(v), codes, known)
    if not v.any():
        return alone
    both = _fit(s, v, codes, known)
    (_, low, high), (_, low_alone, high_alone) = both[1], alone[1]
    return both if low <= high_alone and low_alone <= high else alone


def _fit(
    s: np.ndarray, v: np.ndarray, codes: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, tuple[float, float, float], tuple[float, float]]:
    """Equation (1) with flat priors of ε, the accuracy, γ and θ.

    Returns:
        Log-odds of a wrong label, (n,), the share with its interval, and the likeliest γ and θ.
    """
    shapes = [(exponent, angle) for exponent in EXPONENTS for angle in (ANGLES if v.any() else ANGLES[:1])]
    likelihood = np.stack([_log_likelihood(expit(_log_odds(_evidence(s, v, *shape))), known) for shape in shapes])
    best, share, curve = np.unravel_index(likelihood.argmax(), likelihood.shape)  # of (shapes, shares, accuracies)
    slope = _log_odds(_evidence(s, v, *shapes[best]))[curve]
    nuisance = np.stack([_evidence(s, v, shapes[best][0], 0.0), v])
    likelihood /= _design_effect(SHARES[share], slope, nuisance, codes)
    weights, wrong = np.exp(likelihood - logsumexp(likelihood)), np.zeros(len(s))
    for shape, of_shape in zip(shapes, weights, strict=True):
        if of_shape.sum() > NEGLIGIBLE:
            right = expit(_log_odds(_evidence(s, v, *shape)))
            wrong += sum(w @ (e * (1 - right) / _given(e, right)) for e, w in zip(SHARES, of_shape, strict=True))
    return _logit(wrong), _share(weights.sum((0, 2)), likelihood.max((0, 2))), shapes[best]


def _evidence(s: np.ndarray, v: np.ndarray, exponent: float, angle: float) -> np.ndarray:
    """z of equation (1) for k = 1, (n,)."""
    return np.cos(angle) * np.sign(s) * np.abs(s) ** exponent + np.sin(angle) * v


def _log_odds(z: np.ndarray) -> np.ndarray:
    """k z for each of `ACCURACIES`, (accuracies, n)."""
    slopes = np.geomspace(1e-3, 1e3, 121)
    size = np.quantile(np.abs(z), np.linspace(0, 1, 201))  # in place of all rows, of which there may be many
    accuracy = expit(slopes[:, None] * size).mean(1)
    return np.interp(ACCURACIES, accuracy, slopes)[:, None] * z


def _log_likelihood(right: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Of the labels as given and of what is known about them, for each of `SHARES`, (shares, accuracies)."""
    unknown, wrong, fine = right[:, np.isnan(known)], 1 - right[:, known == 1], right[:, known == 0]
    return np.stack(
        [
            np.log(_given(e, unknown)).sum(1)
            + np.log(np.maximum(e * wrong, 1e-300)).sum(1)
            + np.log((1 - e) * fine).sum(1)
            for e in SHARES
        ]
    )


def _given(share: float, right: np.ndarray) -> np.ndarray:
    """Probability of the labels as given."""
    return np.maximum(share + (1 - 2 * share) * right, np.finfo(float).tiny)


def _design_effect(share: float, log_odds: np.ndarray, nuisance: np.ndarray, codes: np.ndarray) -> float:
    """By what factor rows of a group widen the variance of the share, 1 without groups.

    They do where they err together, and where each is a vote on the others.

    Args:
        nuisance: what the log-odds are a sum of, (2, n), with weights that are fitted, too.
    """
    right = expit(log_odds)
    by_share = (1 - 2 * right) / _given(share, right)
    by_weight = ((1 - 2 * share) * right * (1 - right) / _given(share, right) * nuisance).T
    efficient = by_share - by_weight @ np.linalg.lstsq(by_weight, by_share)[0]
    total = efficient @ efficient
    return max(1.0, float(np.square(np.bincount(codes, efficient)).sum() / total)) if total > 0 else 1.0


def _logit(p: np.ndarray) -> np.ndarray:
    return logit(np.clip(p, 1e-12, 1 - 1e-12))


def _share(posterior: np.ndarray, profile: np.ndarray) -> tuple[float, float, float]:
    """The median of ε, and the shares that a likelihood-ratio test at 5 % does not reject.

    The mean would be drawn further to the middle of the shares, .25, where margins say little.
    """
    excess = profile - profile.max() + chi2.ppf(0.95, 1) / 2
    first, *_, last = np.flatnonzero(excess >= 0).repeat(2)
    low = np.interp(0, excess[first - 1 : first + 1], SHARES[first - 1 : first + 1]) if first else 0.0
    high = np.interp(0, excess[[last + 1, last]], SHARES[[last + 1, last]]) if last + 1 < len(SHARES) else SHARES[-1]
    median = np.interp(0.5, np.cumsum(posterior) - posterior / 2, SHARES)
    return float(np.clip(median, low, high)), float(low), float(high)


def _mixture(s: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, tuple[float, float, float]]:
    """As `_antisymmetric`, of two Gaussians with one variance, that of the wrong labels below the other."""
    fits = [_two_gaussians(s, e) for e in np.clip(SHARES, 1e-6, None)]
    per_group = len(codes) / (codes.max() + 1)
    likelihood = np.array([value for value, _ in fits]) / per_group  # rows of a group count as one: the widest
    weights = np.exp(likelihood - logsumexp(likelihood))
    wrong = weights @ np.stack([expit(log_odds) for _, log_odds in fits])
    return _logit(wrong), _share(weights, likelihood)


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


def _with_second_witness(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """A weighted sum of both margins, (n,), in the units of `outer`.

    A model that trained on a row knows its label, so margins in sample can't be read as probabilities. They rank, with
    half of their correlation with `outer` as the weight: where every label is learnt by heart they say nothing.
    """
    correlation = max(0.0, float(np.corrcoef(outer, inner)[0, 1])) if outer.std() > 0 else 0.0
    both = outer + correlation / 2 * inner
    return both / np.sqrt(np.square(both).mean())


def _in_order(log_odds: np.ndarray, evidence: np.ndarray) -> np.ndarray:
    """The same log-odds, the largest for the least evidence, (n,)."""
    order = np.lexsort((log_odds, -evidence))
    ordered = np.empty_like(log_odds)
    ordered[order] = np.sort(log_odds)
    return ordered
