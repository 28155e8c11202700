"""The gradients of a batch's losses, sample by sample: the matrix J, and J Jᵀ without J."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .factors import Rows, Use, inner_products, total_rows


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
