"""The gradients of a batch's losses, sample by sample: the matrix J, and J Jᵀ without J.

The gradients of one parameter are kept as rows, or as sums of outer products, whose inner products need no rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


# A block of outer products has at most so many elements
_BLOCK = 1 << 24


@dataclass
class Rows:
    """The gradients themselves: `values` `(n, *shape)`, float32 or float64."""

    values: Tensor

    def rows(self) -> Tensor:
        return self.values


@dataclass
class Outer:
    """Gradients of the form Σ_t left[t] ⊗ right[t], as Linear layers and embeddings have them.

    Attributes:
        left: `(n, T, L)`; or of an embedding the token ids `(n, T)`, int64, which stand for one-hot vectors.
        right: `(n, T, R)`.
        size: L.

    Factors keep the dtype that autocast gave them, and are multiplied in float32 or float64.
    """

    left: Tensor
    right: Tensor
    size: int

    @property
    def is_one_hot(self) -> bool:
        return self.left.dim() == 2

    @property
    def is_smaller_as_rows(self) -> bool:
        """Whether the gradients need no more memory than their factors."""
        width = self.right.shape[2] + (1 if self.is_one_hot else self.size)
        return self.size * self.right.shape[2] <= self.right.shape[1] * width

    def full(self) -> Outer:
        """With factors of one dtype, float32 or float64."""
        dtype = torch.promote_types(self.right.dtype, torch.float32)
        if self.is_one_hot:
            return Outer(self.left, self.right.to(dtype), self.size)
        dtype = torch.promote_types(self.left.dtype, dtype)
        return Outer(self.left.to(dtype), self.right.to(dtype), self.size)

    def rows(self) -> Tensor:
        """The gradients, `(n, L, R)`."""
        n, t, r = self.right.shape
        full = self.full()
        if not self.is_one_hot:
            return full.left.transpose(1, 2) @ full.right
        found = full.right.new_zeros(n, self.size, r)
        return found.scatter_add_(1, self.left.unsqueeze(2).expand(n, t, r), full.right)


Use = Rows | Outer


def total_rows(uses: list[Use]) -> Tensor:
    """The gradients of a parameter that is used several times, `(n, *shape)`."""
    total = uses[0].rows()
    for use in uses[1:]:
        total = total + use.rows()
    return total


def inner_products(a: list[Use], b: list[Use], weight: Tensor | None = None) -> Tensor:
    """⟨gradient i of a, gradient j of b⟩, `(n_a, n_b)`, of one parameter, each factor an element of `weight` or 1.

    Outer products are multiplied out only where that costs less time and at most some times their memory.
    """
    factored = weight is None and all(isinstance(use, Outer) for use in (*a, *b))
    if factored and not any(_is_cheaper_as_rows(x, y) for x in a for y in b):
        full_a = [x.full() for x in a]
        full_b = full_a if b is a else [y.full() for y in b]
        return sum(_outer_products(x, y) for x in full_a for y in full_b)
    rows_a = total_rows(a).flatten(1)
    rows_b = rows_a if b is a else total_rows(b).flatten(1)
    return (rows_a if weight is None else rows_a * weight.flatten()) @ rows_b.T


def _is_cheaper_as_rows(a: Outer, b: Outer) -> bool:
    """By the number of multiplications, if the gradients have at most four times the elements of their factors."""
    (n, t, r), (m, s, _) = a.right.shape, b.right.shape
    inner = r + (1 if a.is_one_hot or b.is_one_hot else a.size)
    numel = a.size * r
    factored, multiplied = n * m * t * s * inner, (n * t + m * s + n * m) * numel
    return multiplied < factored and numel <= 4 * max(t, s) * inner


def _outer_products(a: Outer, b: Outer) -> Tensor:
    """Σ_{t,s} ⟨left_a[i,t], left_b[j,s]⟩ ⟨right_a[i,t], right_b[j,s]⟩, a few rows i at a time."""
    (n, t, _), (m, s, _) = a.right.shape, b.right.shape
    step = max(1, _BLOCK // (t * m * s))
    blocks = []
    for i in range(0, n, step):
        right = a.right[i : i + step].flatten(0, 1) @ b.right.flatten(0, 1).T
        left = _left_products(a.left[i : i + step].flatten(0, 1), b.left.flatten(0, 1))
        blocks.append((left * right).view(-1, t, m, s).sum((1, 3)))
    return torch.cat(blocks)


def _left_products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products of vectors `(n, L)`, or of one-hot vectors `(n,)`, with others."""
    if a.dim() == b.dim() == 1:
        return a.unsqueeze(1) == b
    if a.dim() == 1:
        return b[:, a].T
    return a[:, b] if b.dim() == 1 else a @ b.T


@dataclass
class Jacobian:
    """Per-sample gradients of n losses.

    Attributes:
        params: the trained parameters, in the order of J's columns.
        uses: by parameter its gradients, as layers used it; a parameter without any influence is left out.
        n: the number of samples.
    """

    params: list[nn.Parameter]
    uses: dict[nn.Parameter, list[Use]]
    n: int

    def gram(self, other: Jacobian | None = None, weights: Mapping[nn.Parameter, Tensor] | None = None) -> Tensor:
        """J H J'ᵀ, `(n, n')`, parameter by parameter; in float32, or float64 where J is.

        Args:
            other: J', by default J.
            weights: by parameter the diagonal of H in the parameter's shape, by default 1.
        """
        other = other or self
        device = self.params[0].device
        dtype = torch.promote_types(torch.float32, max((p.dtype for p in self.params), key=lambda d: d.itemsize))
        total = torch.zeros(self.n, other.n, dtype=dtype, device=device)
        for p in self.params:
            if p in self.uses and p in other.uses:
                weight = None if weights is None else weights[p]
                total += inner_products(self.uses[p], other.uses[p], weight).to(total)
        return total

    def rows(self, weights: Mapping[nn.Parameter, Tensor] | None = None) -> Tensor:
        """J H^(1/2), `(n, parameters)`: all gradients at once."""
        found = []
        for p in self.params:
            rows = total_rows(self.uses[p]).flatten(1) if p in self.uses else p.new_zeros(self.n, p.numel())
            found.append(rows if weights is None else rows * weights[p].flatten().sqrt())
        return torch.cat(found, 1)

    def compact(self) -> Jacobian:
        """The same gradients in the form that needs less memory, for those that are kept over several batches."""
        uses = {}
        for p, of_p in self.uses.items():
            is_smaller = any(isinstance(use, Rows) or use.is_smaller_as_rows for use in of_p)
            uses[p] = [Rows(total_rows(of_p))] if is_smaller else of_p
        return Jacobian(self.params, uses, self.n)
