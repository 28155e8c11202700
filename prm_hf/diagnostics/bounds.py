"""Upper bounds on the risk of a hypothesis, from its empirical risk, its code length and the number of units.

The loss of a unit lies in [0, 1], and `n` units are drawn independently. `kl` is the divergence of posterior and prior
in nats; for a hypothesis with a message of K bits it is K·ln 2. Each bound holds with probability 1 - `delta` over the
draw, for all hypotheses at once.
"""

import math

from scipy import optimize


# The γ of Catoni's bound are the powers of 1 + GRID_STEP, over which the bound holds at once.
GRID_STEP = 1e-4


def kl_inverse(risk: float, c: float) -> float:
    """The largest p with kl(risk ‖ p) ≤ c, where kl is the divergence of two Bernoulli variables.

    Args:
        risk: in [0, 1].
        c: in nats.
    """

    def divergence(p: float) -> float:
        return risk * math.log(risk / p) + (1 - risk) * (math.log1p(-risk) - math.log1p(-p))

    highest = 1 - 1e-16
    if risk < 1e-300:
        return max(risk, -math.expm1(-c))
    if risk >= highest or divergence(highest) <= c:
        return 1.0
    if divergence(risk) >= c:
        return risk
    return max(risk, optimize.brentq(lambda p: divergence(p) - c, risk, highest, xtol=1e-15))


def kl_bound(risk: float, kl: float, n: int, delta: float = 0.05) -> float:
    """The KL-inverse bound kl⁻¹(risk, (kl + ln(2√n / delta)) / n) (Maurer, 2004, arXiv cs/0411099, theorem 5)."""
    return kl_inverse(risk, (kl + math.log(2 * math.sqrt(n) / delta)) / n)


def sample_bound(risk: float, n: int, delta: float = 0.05) -> float:
    """kl⁻¹(risk, ln(1 / delta) / n): Chernoff's bound on the mean of one hypothesis that was fixed before the draw."""
    return kl_inverse(risk, -math.log(delta) / n)


def catoni_at(gamma: float, risk: float, nats: float, n: int) -> float:
    """Catoni's bound at one γ that was chosen before the data were seen; not cut off at 1.

    `nats` is kl + ln(1 / delta) (Catoni, 2007, arXiv 0712.0248, theorem 1.2.6).
    """
    return math.expm1(-gamma / n * (risk + nats / gamma)) / math.expm1(-gamma / n)


def catoni_bound(risk: float, kl: float, n: int, delta: float = 0.05) -> float:
    """Catoni's bound at the best γ, with the union bound over the grid of γ (Lotfi et al., 2022, arXiv 2211.13609).

    It is pactl's `pac_bayes_bound_opt`, which stops at 1 for many inputs that have a minimum below 1, since it
    searches from one place. Here a coarse grid finds the valley first.
    """

    def at(log_gamma: float) -> float:
        union = 2 * math.log(2 + log_gamma / math.log1p(GRID_STEP))
        return catoni_at(math.exp(log_gamma), risk, (1 + GRID_STEP) * (kl - math.log(delta) + union), n)

    step = (math.log(n) + 8) / 400
    best = min((i * step for i in range(401)), key=at)
    around = (max(best - step, 0.0), best + step)
    found = optimize.minimize_scalar(at, bounds=around, method="bounded", options={"xatol": 1e-10})
    return min(found.fun, at(best), 1.0)


def mcallester_bound(risk: float, kl: float, n: int, delta: float = 0.05) -> float:
    """risk + √((kl + ln(n / delta)) / (2n - 1)) (McAllester, 1999); may exceed 1."""
    return risk + math.sqrt((kl + math.log(n / delta)) / (2 * n - 1))


def convexity_bound(risk: float, kl: float, n: int, delta: float = 0.05) -> float:
    """Thiemann et al.'s bound (2017, arXiv 1608.05610, theorem 3) at its optimal λ; may exceed 1."""
    nats = kl + math.log(2 * math.sqrt(n) / delta)
    lam = 2 / (math.sqrt(2 * n * risk / nats + 1) + 1)
    return risk / (1 - lam / 2) + nats / (n * lam * (1 - lam / 2))


def subsampling_bound(
    risk: float, kl: float, n: int, n_evaluated: int, delta: float = 0.05, scale: float = 1.0, tried: int = 1
) -> float:
    """The bound of SubLoRA for an empirical risk that is measured on some of the units (arXiv 2312.17173, theorem 2).

    Args:
        risk: mean loss of `n_evaluated` units, drawn at random from the `n`.
        kl: in nats.
        n: number of units that the hypothesis may have been fitted to.
        n_evaluated: number of those that were evaluated.
        delta: probability that the bound fails.
        scale: length of the interval of the loss.
        tried: number of hypotheses among which the drawn units chose. SubLoRA has 1, whatever was tried.

    Returns:
        A number in the units of the loss; it may exceed the largest loss.
    """
    share = n_evaluated / (n + n_evaluated)
    fit = math.sqrt((kl - math.log(share * delta)) / (2 * n))
    return risk + scale * (fit + math.sqrt((math.log(tried) - math.log((1 - share) * delta)) / (2 * n_evaluated)))


BOUNDS = {"kl": kl_bound, "catoni": catoni_bound}


def bound_of_units(
    kind: str, risk: float, kl: float, n: int, n_evaluated: int, delta: float, scale: float, tried: int
) -> float:
    """The bound of one `kind`, for a `risk` in units of `scale` that some or all units were evaluated for.

    Where only some were, half of `delta` is for the risk on all `n`, by [`sample_bound`]; `"subsampling"` splits it as
    SubLoRA does.
    """
    if kind == "subsampling":
        return min(subsampling_bound(risk * scale, kl, n, n_evaluated, delta, scale, tried), scale)
    if n_evaluated < n:
        delta /= 2
        risk = sample_bound(risk, n_evaluated, delta / tried)
    return BOUNDS[kind](risk, kl, n, delta) * scale
