"""What happens to a model along directions of its parameters: changed predictions, and the loss on a plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .checks import check_count, check_positive
from .curvature import Curvature


@dataclass(frozen=True)
class Perturbation:
    """What [`perturb`] returns; each array is float64 `(scales, trials)`.

    Attributes:
        scales: Euclidean lengths of the steps, float64 `(scales,)`.
        changed_along: share of the terms whose prediction changes, along random directions in the span of the
            eigenvectors.
        changed_orthogonal: the same along random directions orthogonal to all of them.
        loss_along: the loss there.
        loss_orthogonal: the loss along the others.
        loss: that of the model itself.
    """

    scales: np.ndarray
    changed_along: np.ndarray
    changed_orthogonal: np.ndarray
    loss_along: np.ndarray
    loss_orthogonal: np.ndarray
    loss: float


@dataclass(frozen=True)
class LossSurface:
    """What [`loss_surface`] returns.

    Attributes:
        steps: of both axes, float64 `(points,)`.
        losses: `losses[i, j]` is `steps[i]` along the first direction and `steps[j]` along the second, float64.
    """

    steps: np.ndarray
    losses: np.ndarray


def perturb(
    curvature: Curvature, eigenvectors: torch.Tensor, scales: Sequence[float], trials: int = 5, seed: int = 0
) -> Perturbation:
    """Moves the parameters by random steps in the span of eigenvectors, and by as long ones orthogonal to it.

    If a few eigenvectors hold all that the data determine, the steps orthogonal to them change hardly a prediction
    (Maddox, Benton, Wilson, 2020, section 5).

    Args:
        curvature: the model, its data, loss and parameters.
        eigenvectors: `(n_params, k)`, as `EffectiveDimension.eigenvectors`, fewer than there are parameters.
        scales: lengths of the steps.
        trials: random steps of each length and kind.
        seed: of the steps.

    Raises:
        ValueError: an argument is none of those above, or the loss has no choices whose changes could be counted.
    """
    vectors = _check_vectors(curvature, eigenvectors)
    check_count("trials", trials)
    for scale in scales:
        check_positive("scales", scale)
    if vectors.shape[1] >= curvature.n_params:
        raise ValueError("`eigenvectors` span all parameters: nothing is orthogonal to them; pass the first few.")
    generator = torch.Generator().manual_seed(seed)
    before, found = curvature.choices_at(), np.empty((4, len(scales), trials))
    for trial in range(trials):
        noise = torch.randn(curvature.n_params, generator=generator, dtype=torch.float64)
        within = vectors @ torch.randn(vectors.shape[1], generator=generator, dtype=torch.float64)
        beside = noise
        for _ in range(2):
            beside = beside - vectors @ (vectors.T @ beside)
        for i, scale in enumerate(scales):
            for j, step in enumerate((within, beside)):
                offset = step * (scale / step.norm())
                found[j, i, trial] = (curvature.choices_at(offset) != before).double().mean()
                found[2 + j, i, trial] = curvature.loss_at(offset)
    return Perturbation(np.array(scales, dtype=float), *found, loss=curvature.loss)


def loss_surface(curvature: Curvature, directions: torch.Tensor, radius: float = 1.0, points: int = 25) -> LossSurface:
    """The loss on a square of the plane that two directions span, the model in its middle.

    Args:
        curvature: the model, its data, loss and parameters.
        directions: `(n_params, 2)`, as two columns of `EffectiveDimension.eigenvectors`; they are made orthonormal,
            the first keeps its direction.
        radius: half an edge of the square.
        points: an odd number of points along an edge.

    Raises:
        ValueError: an argument is none of those above.
    """
    vectors = _check_vectors(curvature, directions)
    check_positive("radius", radius)
    check_count("points", points)
    if vectors.shape[1] != 2:
        raise ValueError(f"`directions` has {vectors.shape[1]} columns: a plane has two.")
    if points % 2 == 0:
        raise ValueError(f"`points` is {points}: it must be odd, so that the model itself is one of them.")
    steps = torch.linspace(-radius, radius, points, dtype=torch.float64)
    losses = [[curvature.loss_at(vectors @ torch.stack([a, b])) for b in steps] for a in steps]
    return LossSurface(steps.numpy(), np.array(losses))


def _check_vectors(curvature: Curvature, vectors: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns with the span of the given ones."""
    if vectors.dim() != 2 or len(vectors) != curvature.n_params:
        raise ValueError(
            f"The directions have the shape {tuple(vectors.shape)}: it must be ({curvature.n_params}, k), a column a "
            "direction of the curvature's parameters."
        )
    basis, upper = torch.linalg.qr(vectors.double().cpu())
    if upper.diagonal().abs().min() <= 1e-8 * upper.diagonal().abs().max():
        raise ValueError("The directions are not linearly independent.")
    return basis * torch.where(upper.diagonal() < 0, -1.0, 1.0)
