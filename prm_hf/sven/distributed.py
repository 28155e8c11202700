"""The per-sample gradients of several batches and of several processes as those of one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .jacobian import Jacobian, Outer, Rows, Use, total_rows


def concatenate(parts: list[Jacobian]) -> Jacobian:
    """The gradients of the samples of all parts, in their order; the parts are of the same parameters."""
    if len(parts) == 1:
        return parts[0]
    params, uses = parts[0].params, {}
    for p in params:
        of_p = [part.uses.get(p) for part in parts]
        if len({_forms(part) for part in of_p}) == 1:
            if of_p[0] is not None:
                uses[p] = [_joined(same) for same in zip(*of_p, strict=True)]
        else:
            uses[p] = [Rows(torch.cat([_rows_of(p, part) for part in parts]))]
    return Jacobian(params, uses, sum(part.n for part in parts))


def gather_jacobians(local: Jacobian) -> list[Jacobian]:
    """The gradients of each process, in the order of their ranks. Collective."""
    specs: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(specs, (local.n, [_forms(local.uses.get(p)) for p in local.params]))
    sizes = [n for n, _ in specs]
    gathered: list[dict[nn.Parameter, list[Use]]] = [{} for _ in specs]
    for i, p in enumerate(local.params):
        forms = {of_params[i] for _, of_params in specs}
        if forms == {None}:
            continue
        own = local.uses[p] if len(forms) == 1 else [Rows(_rows_of(p, local))]
        for use in own:
            for uses, part in zip(gathered, _gather_use(use, sizes), strict=True):
                uses.setdefault(p, []).append(part)
    return [Jacobian(local.params, uses, n) for uses, n in zip(gathered, sizes, strict=True)]


def gather_rows(values: Tensor, sizes: list[int] | None = None) -> list[Tensor]:
    """The tensors of all processes, which may differ in their first dimension, in the order of ranks. Collective."""
    if sizes is None:
        found = [torch.zeros(1, dtype=torch.int64, device=values.device) for _ in range(dist.get_world_size())]
        dist.all_gather(found, torch.tensor([len(values)], device=values.device))
        sizes = [int(n) for n in found]
    padded = values.new_zeros(max(sizes), *values.shape[1:])
    padded[: len(values)] = values
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return [part[:n] for part, n in zip(parts, sizes, strict=True)]


def _forms(uses: list[Use] | None) -> tuple[str, ...] | None:
    if uses is None:
        return None
    return tuple("rows" if isinstance(use, Rows) else "one-hot" if use.is_one_hot else "outer" for use in uses)


def _rows_of(p: nn.Parameter, part: Jacobian) -> Tensor:
    dtype = torch.promote_types(p.dtype, torch.float32)
    return total_rows(part.uses[p]) if p in part.uses else p.new_zeros(part.n, *p.shape, dtype=dtype)


def _joined(parts: tuple[Use, ...]) -> Use:
    if isinstance(parts[0], Rows):
        return Rows(torch.cat([part.values for part in parts]))
    length = max(part.right.shape[1] for part in parts)
    left, right = (torch.cat([_padded(getattr(use, side), length) for use in parts]) for side in ("left", "right"))
    return Outer(left, right, parts[0].size)


def _padded(x: Tensor, length: int) -> Tensor:
    """With zeros up to `length` in the second dimension, which add nothing to a sum of outer products."""
    if x.shape[1] == length:
        return x
    return torch.cat([x, x.new_zeros(x.shape[0], length - x.shape[1], *x.shape[2:])], 1)


def _gather_use(use: Use, sizes: list[int]) -> list[Use]:
    if isinstance(use, Rows):
        return [Rows(values) for values in gather_rows(use.values, sizes)]
    length = torch.tensor([use.right.shape[1]], device=use.right.device)
    dist.all_reduce(length, dist.ReduceOp.MAX)
    left, right = (gather_rows(_padded(x, int(length)), sizes) for x in (use.left, use.right))
    return [Outer(*pair, use.size) for pair in zip(left, right, strict=True)]
