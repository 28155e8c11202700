"""How well scores tell rows whose label is wrong from the others."""

import math

import numpy as np


def suspect_metrics(scores: "np.ndarray", noisy: "np.ndarray") -> dict[str, float]:
    """How well the noisy rows are found by their scores.

    Args:
        scores: the larger, the more suspect, as the loss of a row. Anything that numpy takes, shape `(n,)`.
        noisy: whether the label of each row is wrong. Shape `(n,)`, bool.

    Returns:
        `suspects/auc`, the probability that a noisy row has a larger score than another one, a tie counting ½; and
        `suspects/average_precision`, the precision averaged over the noisy rows from the largest score on. NaN where a
        score is, and nothing where all rows are noisy or none is.
    """
    from scipy.stats import mannwhitneyu  # a second, which not every import of the metrics has to wait

    scores, noisy = np.asarray(scores, dtype=np.float64), np.asarray(noisy, dtype=bool)
    if scores.shape != noisy.shape or scores.ndim != 1:
        raise ValueError(f"`scores` and `noisy` must have one entry a row, got shapes {scores.shape}, {noisy.shape}.")
    n_noisy = int(noisy.sum())
    if n_noisy in (0, len(noisy)):
        return {}
    if np.isnan(scores).any():
        return {"suspects/auc": math.nan, "suspects/average_precision": math.nan}
    larger = mannwhitneyu(scores[noisy], scores[~noisy], method="asymptotic").statistic
    # Rows of one score are taken together: by their order the precision would depend on that of the dataset
    _, place, counts = np.unique(-scores, return_inverse=True, return_counts=True)
    found = np.bincount(place, weights=noisy)
    precision = found.cumsum() / counts.cumsum()
    return {
        "suspects/auc": float(larger / (n_noisy * (len(noisy) - n_noisy))),
        "suspects/average_precision": float((found * precision).sum() / n_noisy),
    }
