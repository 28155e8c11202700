"""Why fitting noise is no feat: a small network that fits any labels of any n different inputs."""

import numpy as np


def fit_any_labels(inputs: np.ndarray, labels: np.ndarray, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Weights of a two-layer ReLU network that gives each input its label (Zhang et al., 2017, theorem 1).

    The network is `np.maximum(inputs @ a - b, 0) @ w`, with 2n + d weights in all: `a` puts the inputs on
    a line, where the n ReLUs are the kinks of the broken line through the labels.

    Args:
        inputs: shape `(n, d)`, no two rows equal.
        labels: shape `(n,)`, any real numbers.
        seed: of the random direction `a`.

    Returns:
        `a` of shape `(d, 1)`, `b` and `w` of shape `(n,)`, float64.

    Raises:
        ValueError: the shapes do not fit, or two rows of `inputs` are equal.
    """
    x, y = np.asarray(inputs, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"`inputs` and `labels` must have the shapes (n, d) and (n,), got {x.shape} and {y.shape}.")
    if len(np.unique(x, axis=0)) < len(x):
        raise ValueError("`inputs` has two equal rows, which no function can give different labels.")
    a = np.random.default_rng(seed).normal(size=(x.shape[1], 1))
    order = np.argsort(x @ a[:, 0])
    z, y = (x @ a[:, 0])[order], y[order]
    b = np.concatenate([z[:1] - 1, z[:-1]])
    slopes = np.diff(y, prepend=0.0) / (z - b)
    return a, b, np.diff(slopes, prepend=0.0)
