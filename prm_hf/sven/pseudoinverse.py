"""The truncated pseudo-inverse of Sven's step, written with coefficients of the samples."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


SVD = Literal["gram", "svd", "randomized"]
_OVERSAMPLING = 5


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
    """
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
    """The step from M itself, `(rows, parameters)`, by a full or a randomized singular value decomposition."""
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
