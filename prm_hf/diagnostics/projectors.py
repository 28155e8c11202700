"""Random linear maps from a few numbers to all parameters, each column of length 1 and given by a seed alone."""

import math
from abc import ABC, abstractmethod
from typing import Literal

import numpy as np
import torch
from torch import nn


_CHUNK = 2**24  # entries of a dense map that exist at one time


class Projector(nn.Module, ABC):
    """A map P of `dim` numbers to `n_params`, and its transpose.

    `project(w)` is P w, from `(dim,)` to `(n_params,)`, and `pull_back(g)` is Pᵀ g, both in float32. Called as a
    module it is P w with a gradient.
    """

    def __init__(self, n_params: int, dim: int) -> None:
        super().__init__()
        self.n_params, self.dim = n_params, dim

    @abstractmethod
    def project(self, w: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def pull_back(self, g: torch.Tensor) -> torch.Tensor: ...

    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return _Project.apply(w, self)

    def constant(self, name: str, value: torch.Tensor) -> None:
        self.register_buffer(name, value, persistent=False)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w: torch.Tensor, projector: Projector) -> torch.Tensor:
        ctx.projector = projector
        return projector.project(w)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.projector.pull_back(grad), None


class DenseProjector(Projector):
    """Independent normal entries of variance 1 / `n_params` (Li et al., 2018, arXiv 1804.08838), drawn anew each time.

    The entries are drawn on the CPU, so that they are the same on every device.
    """

    def __init__(self, n_params: int, dim: int, seed: int) -> None:
        super().__init__(n_params, dim)
        self.seed = seed

    def _chunks(self, like: torch.Tensor):
        generator = torch.Generator().manual_seed(self.seed)
        for rows in torch.arange(self.n_params).split(max(_CHUNK // self.dim, 1)):
            entries = torch.randn(len(rows), self.dim, generator=generator) / math.sqrt(self.n_params)
            yield slice(rows[0].item(), rows[-1].item() + 1), entries.to(like.device)

    def project(self, w: torch.Tensor) -> torch.Tensor:
        return torch.cat([entries @ w for _, entries in self._chunks(w)])

    def pull_back(self, g: torch.Tensor) -> torch.Tensor:
        return sum(entries.T @ g[rows] for rows, entries in self._chunks(g))


class SparseProjector(Projector):
    """√`n_params` entries ± `n_params`^(-1/4) in each column, in places that are drawn without replacement."""

    def __init__(self, n_params: int, dim: int, seed: int) -> None:
        super().__init__(n_params, dim)
        rng, k = np.random.default_rng(seed), math.isqrt(n_params)
        rows = np.concatenate([rng.choice(n_params, k, replace=False, shuffle=False) for _ in range(dim)])
        signs = rng.choice(np.array([-1.0, 1.0], dtype=np.float32), k * dim)
        self.constant("rows", torch.from_numpy(rows))
        self.constant("columns", torch.arange(dim).repeat_interleave(k))
        self.constant("entries", torch.from_numpy(signs) / math.sqrt(k))

    def project(self, w: torch.Tensor) -> torch.Tensor:
        theta = torch.zeros(self.n_params, dtype=w.dtype, device=w.device)
        return theta.index_add(0, self.rows, self.entries * w[self.columns])

    def pull_back(self, g: torch.Tensor) -> torch.Tensor:
        return (self.entries * g[self.rows]).view(self.dim, -1).sum(1)


class FastfoodProjector(Projector):
    """Blocks H G Π H B of signs B, a permutation Π, normal entries G and Hadamard matrices H (Le et al., 2013).

    Columns have length 1 on average. H is applied by the fast Walsh-Hadamard transform (arXiv 1408.3060).
    """

    def __init__(self, n_params: int, dim: int, seed: int) -> None:
        super().__init__(n_params, dim)
        generator = torch.Generator().manual_seed(seed)
        self.width = 1 << (dim - 1).bit_length()
        shape = (math.ceil(n_params / self.width), self.width)
        order = torch.stack([torch.randperm(self.width, generator=generator) for _ in range(shape[0])])
        self.constant("signs", torch.randint(0, 2, shape, generator=generator).float() * 2 - 1)
        self.constant("order", order)
        self.constant("inverse", order.argsort(1))
        self.constant("scales", torch.randn(shape, generator=generator) / math.sqrt(n_params / self.width))

    def project(self, w: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros(self.width, dtype=w.dtype, device=w.device)
        padded[: self.dim] = w
        x = hadamard(self.signs * padded).gather(1, self.order)
        return hadamard(self.scales * x).flatten()[: self.n_params]

    def pull_back(self, g: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros(self.signs.numel(), dtype=g.dtype, device=g.device)
        padded[: self.n_params] = g
        x = self.scales * hadamard(padded.view_as(self.signs))
        return (self.signs * hadamard(x.gather(1, self.inverse))).sum(0)[: self.dim]


def hadamard(x: torch.Tensor) -> torch.Tensor:
    """The Walsh-Hadamard transform of the last dimension, a power of two, as an orthogonal map."""
    n, shape = x.shape[-1], x.shape
    half = 1
    while half < n:
        a, b = x.reshape(-1, n // (2 * half), 2, half).unbind(2)
        x = torch.stack([a + b, a - b], dim=2).reshape(shape)
        half *= 2
    return x / math.sqrt(n)


class KroneckerProjector(Projector):
    """The Kronecker product of two small matrices with orthonormal columns, its rows in random places.

    It is pactl's `rdkronqr` where the two sizes are squares. Elsewhere pactl adds a block whose columns have other
    lengths; here the columns are orthonormal for all sizes: the first `dim` columns of the product are taken, and
    fewer than √`n_params` parameters stay where they are.

    Args:
        left, right: the two matrices, float32, `(a, b)` and `(a', b')` with a·a' ≤ `n_params` and b·b' ≥ `dim`.
        places: the row of the product, or of the zeros after it, that each parameter has. Shape `(n_params,)`, int64.
        dim: number of columns.
    """

    def __init__(self, left: torch.Tensor, right: torch.Tensor, places: torch.Tensor, dim: int) -> None:
        super().__init__(len(places), dim)
        self.constant("left", left)
        self.constant("right", right)
        self.constant("places", places)

    @classmethod
    def random(cls, n_params: int, dim: int, seed: int) -> "KroneckerProjector":
        generator = torch.Generator().manual_seed(seed)
        rows, columns = math.isqrt(n_params), math.isqrt(dim)
        shapes = [(rows, columns), (n_params // rows, math.ceil(dim / columns))]
        if shapes[1][0] < shapes[1][1]:
            raise ValueError(
                f"`dim={dim}` is too near to the {n_params} parameters for `projector='kronecker'`: pass at most "
                f"{columns * shapes[1][0]}, or another projector."
            )
        left, right = (torch.linalg.qr(torch.randn(shape, generator=generator))[0] for shape in shapes)
        return cls(left, right, torch.randperm(n_params, generator=generator), dim)

    def project(self, w: torch.Tensor) -> torch.Tensor:
        grid = torch.zeros(self.left.shape[1] * self.right.shape[1], dtype=w.dtype, device=w.device)
        grid[: self.dim] = w
        product = (self.left @ grid.view(self.left.shape[1], -1) @ self.right.T).flatten()
        return torch.cat([product, product.new_zeros(self.n_params - len(product))])[self.places]

    def pull_back(self, g: torch.Tensor) -> torch.Tensor:
        rows = torch.zeros_like(g)
        rows[self.places] = g
        product = rows[: len(self.left) * len(self.right)].view(len(self.left), -1)
        return (self.left.T @ product @ self.right).flatten()[: self.dim]


Kind = Literal["dense", "sparse", "fastfood", "kronecker"]
PROJECTORS = {
    "dense": DenseProjector,
    "sparse": SparseProjector,
    "fastfood": FastfoodProjector,
    "kronecker": KroneckerProjector.random,
}


def make_projector(kind: Kind, n_params: int, dim: int, seed: int = 0) -> Projector:
    """The map of a `kind` that `seed` gives.

    Raises:
        ValueError: there is no such kind, or `dim` is not among 1 to `n_params`.
    """
    if kind not in PROJECTORS:
        raise ValueError(f"`projector={kind!r}` is not among {', '.join(PROJECTORS)}.")
    if not 1 <= dim <= n_params:
        raise ValueError(f"`dim={dim}` must be from 1 to the number of parameters that are trained, {n_params}.")
    return PROJECTORS[kind](n_params, dim, seed)
