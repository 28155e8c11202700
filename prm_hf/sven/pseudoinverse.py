"""What a Sven step solves: the residuals of a batch's losses, and the truncated pseudo-inverse, in coefficients."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


SVD = Literal["gram", "svd", "randomized"]
_OVERSAMPLING = 5


class NotFiniteError(FloatingPointError, ValueError):
    """A loss, or the gradient of one, is infinite or NaN: there is no step to make."""


def check_finite(values: Tensor, what: str) -> None:
    """Raises [`NotFiniteError`] with the first of these values that is infinite or NaN, if there is one."""
    bad = values[~torch.isfinite(values)]
    if len(bad):
        raise NotFiniteError(f"{what} is {bad[0].item()}: lower the learning rate or set `max_norm`.")


@dataclass(frozen=True)
class Residuals:
    """R = ℓ^(κ/2), ℓ the mean losses of groups of m samples, and what turns the gradients of the losses into R's.

    With J the gradients of the samples, those of R are M = D A J: A takes the means of the groups, and D has
    dR/dℓ = (κ/2) ℓ^(κ/2-1) on its diagonal.

    Attributes:
        values: R, `(rows,)`, float64.
        factors: D A, `(rows, samples)`, float64.
    """

    values: Tensor
    factors: Tensor


def residuals_of(losses: Tensor, kappa: float, microbatch_size: int = 1) -> Residuals:
    """The residuals of the losses of a batch, `(B,)`; the last group has what is left over.

    Where a loss is 0 and κ < 2, ℓ^(κ/2) has no gradient: the row is 0, so that the sample asks for nothing.

    Raises:
        NotFiniteError: a loss is infinite or NaN.
        ValueError: a loss is negative.
    """
    losses = losses.detach().double()
    check_finite(losses, "The loss of a sample")
    if bool((losses < 0).any()):
        raise ValueError(
            f"Sven brings losses to zero, and the loss of a sample is {losses.min().item():.4g}: use a loss that is "
            "not negative, as by adding a constant."
        )
    groups = torch.arange(len(losses), device=losses.device) // microbatch_size
    rows = torch.arange(int(groups[-1]) + 1, device=losses.device) if len(losses) else groups
    average = (rows.unsqueeze(1) == groups).double()
    average = average / average.sum(1, keepdim=True)
    mean = average @ losses
    slope = kappa / 2 * mean ** (kappa / 2 - 1)
    return Residuals(mean ** (kappa / 2), slope.nan_to_num(posinf=0.0).unsqueeze(1) * average)


@dataclass(frozen=True)
class Solution:
    """The step of the rows M with the residuals R: Mᵀc, the minimum-norm solution of M x = R.

    Attributes:
        components: `(rows, rank)`, float64. Their sum is c, and each is the part of one singular value, of which the
            largest comes first.
        singular_values: those of M that were found, `(min(k, rows),)`, float64, in descending order.
    """

    components: Tensor
    singular_values: Tensor

    @property
    def rank(self) -> int:
        """How many singular values were kept."""
        return self.components.shape[1]

    @property
    def coefficients(self) -> Tensor:
        """c, `(rows,)`, float64."""
        return self.components.sum(1)


def solve_gram(gram: Tensor, residuals: Tensor, k: int, rtol: float) -> Solution:
    """The step from G = M Mᵀ, `(rows, rows)`: G = U S² Uᵀ, c = U S⁻² Uᵀ R over the k largest S above rtol·S₁.

    An eigendecomposition finds S², so it knows S to the square root of the precision of G only.

    Raises:
        NotFiniteError: an element of G is infinite or NaN.
    """
    check_finite(gram, "An inner product of per-sample gradients")
    noise = _precision(gram) ** 0.5
    if rtol < noise / 3:
        warnings.warn(
            f"`rtol={rtol:g}` keeps singular values that a Gram matrix in {gram.dtype} does not resolve: those below "
            f'{noise:.0e} of the largest are dropped. Use `svd="svd"`, float64, or a larger `rtol`.',
            stacklevel=2,
        )
    values, vectors = torch.linalg.eigh(gram.double())
    s = values.flip(0).clamp(min=0).sqrt()[:k]
    return _truncate(vectors.flip(1)[:, :k], s, residuals, max(rtol, noise if rtol < noise / 3 else 0.0))


def solve_rows(
    rows: Tensor, residuals: Tensor, k: int, rtol: float, svd: SVD = "svd", power_iterations: int = 1, seed: int = 0
) -> Solution:
    """The step from M itself, `(rows, parameters)`, by a full or a randomized singular value decomposition.

    Raises:
        NotFiniteError: an element of M is infinite or NaN.
    """
    check_finite(rows, "An element of a per-sample gradient")
    if svd == "randomized":
        with torch.random.fork_rng(devices=[rows.device] if rows.is_cuda else []):
            torch.manual_seed(seed)
            u, s, _ = torch.svd_lowrank(rows, q=min(k + _OVERSAMPLING, *rows.shape), niter=power_iterations)
    else:
        u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    noise = max(rows.shape) * _precision(rows)
    return _truncate(u[:, :k].double(), s[:k].double(), residuals, max(rtol, noise))


def _precision(x: Tensor) -> float:
    return torch.finfo(x.dtype).eps


def _truncate(u: Tensor, s: Tensor, residuals: Tensor, rtol: float) -> Solution:
    """The components of the singular values above `rtol` times the largest; none where all are 0."""
    rank = int((s > rtol * s[0]).sum()) if len(s) else 0
    u, kept = u[:, :rank], s[:rank]
    return Solution(u * ((u.T @ residuals.double()) / kept.square()), s)
