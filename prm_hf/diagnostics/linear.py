"""Linear regression, where the effective dimension is known exactly: double descent, and posteriors that contract."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DoubleDescent:
    """What [`random_features`] returns: arrays of float64 `(widths,)`, means over seeds.

    Attributes:
        widths: features of the models, int64.
        test_error: ‖ŷ − y‖ / ‖y‖ on as many new rows.
        train_error: the same on the training rows.
        dimension: Σ λ/(λ+α) of XᵀX, the trace of the hat matrix of ridge regression.
        undetermined: min(n, d) − dimension, how many of the directions that the training rows span have a curvature
            below α. It peaks where the test error does.
    """

    widths: np.ndarray
    test_error: np.ndarray
    train_error: np.ndarray
    dimension: np.ndarray
    undetermined: np.ndarray


@dataclass(frozen=True)
class Contraction:
    """What [`posterior_contraction`] returns: arrays of float64 `(sizes,)`.

    Attributes:
        sizes: rows of data, int64.
        contraction: tr(prior covariance) − tr(posterior covariance).
        dimension: the effective dimension of XᵀX/σ² at the prior's precision. The contraction is the dimension divided
            by the precision.
    """

    sizes: np.ndarray
    contraction: np.ndarray
    dimension: np.ndarray


def random_features(widths: Sequence[int], n: int = 200, alpha: float = 0.2, n_seeds: int = 10) -> DoubleDescent:
    """Double descent of least squares: the test error peaks where the features are as many as the rows.

    Every feature is the label plus noise, y ~ N(0, 1) and x_j = y + N(0, 1), so that more features say more. Of all
    solutions the one of least norm is taken. The setup is that of Maddox, Benton, Wilson, 2020, section 4.

    Args:
        widths: numbers of features, d.
        n: training rows.
        alpha: α of the effective dimension.
        n_seeds: draws of the data, with the seeds 0, 1, …
    """
    found = np.array([[_fit(d, n, alpha, seed) for seed in range(n_seeds)] for d in widths]).mean(axis=1)
    return DoubleDescent(np.array(widths), *found.T)


def posterior_contraction(
    sizes: Sequence[int], n_features: int = 50, precision: float = 1.0, noise: float = 1.0, seed: int = 0
) -> Contraction:
    """How far the posterior of Bayesian linear regression contracts as data are added.

    With a prior N(0, 1/precision) of each weight and Gaussian noise, tr(prior) − tr(posterior) is N(XᵀX/σ², precision)
    / precision (Maddox, Benton, Wilson, 2020, theorem 4.1).

    Args:
        sizes: numbers of rows.
        n_features: weights, with independent standard normal features.
        precision: of the prior.
        noise: standard deviation σ of the labels' noise.
        seed: of the features. A larger data set holds the smaller ones.
    """
    features = np.random.default_rng(seed).standard_normal((max(sizes), n_features)) / noise
    contraction, dimension = [], []
    for size in sizes:
        curvature = features[:size].T @ features[:size]
        posterior = np.linalg.inv(curvature + precision * np.eye(n_features))
        contraction.append(n_features / precision - np.trace(posterior))
        eigenvalues = np.linalg.eigvalsh(curvature)
        dimension.append((eigenvalues / (eigenvalues + precision)).sum())
    return Contraction(np.array(sizes), np.array(contraction), np.array(dimension))


def _fit(d: int, n: int, alpha: float, seed: int) -> tuple[float, float, float, float]:
    """Test error, training error, dimension and undetermined directions of one draw."""
    rng = np.random.RandomState(seed)  # numpy's old generator, of which the recorded values are

    def draw() -> tuple[np.ndarray, np.ndarray]:
        labels = rng.randn(n)
        return rng.randn(n, d) + labels[:, None], labels

    (x, y), (new_x, new_y) = draw(), draw()
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    squares = np.linalg.svd(x, compute_uv=False) ** 2
    dimension = (squares / (squares + alpha)).sum()
    errors = [np.linalg.norm(a @ weights - b) / np.linalg.norm(b) for a, b in ((new_x, new_y), (x, y))]
    return *errors, dimension, min(n, d) - dimension
