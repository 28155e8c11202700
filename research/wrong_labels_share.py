"""Which number of the share's posterior is nearest to the truth: the simulation in results/built_in/wrong_labels.md.

python research/wrong_labels_share.py    # 5 minutes; `python research/wrong_labels_share.py 4` draws fewer
"""

import sys

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logsumexp
from scipy.stats import norm

from prm_hf.noise.wrong_labels import EXPONENTS, SHARES, _log_likelihood, _log_odds, _score, _share


SIZES, ACCURACIES, TRUTHS = {256: 60, 756: 60, 3000: 25}, (0.65, 0.75, 0.85), (0.1, 0.2, 0.3, 0.4)
SPREAD = np.abs(np.random.default_rng(0).normal(size=20000))


def draw(rng, n, accuracy, exponent):
    """Margins of true labels, (n,): Gaussian, for which γ is 1, or with log-odds k |s|^γ, γ .5."""
    if exponent == 1:
        return rng.normal(norm.ppf(accuracy), 1, n)
    k = brentq(lambda k: expit(k * SPREAD**exponent).mean() - accuracy, 0.01, 50)
    size = np.abs(rng.normal(size=n))
    return np.where(rng.random(n) < expit(k * size**exponent), size, -size)


def main():
    """Prints bias and root mean square error of five numbers, and how often the interval holds the share.

    They are the posterior's mean, median, mode and .6 quantile, and the midpoint of median and mode.
    """
    for exponent in (1.0, 0.5):
        for n, repetitions in SIZES.items():
            for truth in TRUTHS:
                found = []
                for accuracy in ACCURACIES:
                    for i in range(int(sys.argv[1]) if len(sys.argv) > 1 else repetitions):
                        rng = np.random.default_rng([n, int(accuracy * 100), int(truth * 100), i])
                        margins = draw(rng, n, accuracy, exponent)
                        wrong = rng.random(n) < truth
                        s = _score(np.where(wrong, -margins, margins), "margins", centred=False)
                        curves = [_log_likelihood(expit(_log_odds(np.sign(s) * np.abs(s) ** g)), np.full(n, np.nan))
                                  for g in EXPONENTS]  # fmt: skip
                        likelihood = np.concatenate(curves, 1)
                        posterior = np.exp(logsumexp(likelihood, 1) - logsumexp(likelihood))
                        median, low, high = _share(posterior, likelihood.max(1))
                        mode = SHARES[posterior.argmax()]
                        quantile = np.interp(0.6, np.cumsum(posterior) - posterior / 2, SHARES)
                        estimates = np.array([posterior @ SHARES, median, mode, quantile, (median + mode) / 2])
                        found.append([*(estimates - wrong.mean()), low <= truth <= high])
                errors = np.array(found)
                errors, covers = errors[:, :-1], errors[:, -1].mean()
                bias, size = errors.mean(0).round(3), np.sqrt(np.square(errors).mean(0)).round(3)
                print(f"γ {exponent}, n {n}, share {truth}: bias {bias}, error {size}, covers {covers:.2f}")


if __name__ == "__main__":
    main()
