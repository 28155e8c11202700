"""Sums of squares over tensors and over their rows, as precise as the debiased estimator needs them.

Not in float32: that estimator subtracts two such sums that are nearly equal where there is only noise, and a sum must
not depend on how a tensor is split over processes. On a CPU, where float64 takes four times as long, the sums of 256
squares are float32, which leaves an error of about 1e-8 in the sum over a matrix.
"""

import math

import torch
from torch import Tensor

from . import masks
from .hyperparameters import is_batched


def sums_of_squares(xs: list[Tensor]) -> Tensor:
    """Σx² of each of the tensors of one device, float64 (float32 on Apple's GPUs), shape `(n,)`.

    On a device the number of launches does not depend on n, but on the number of elements.
    """
    dtype = masks.statistics_dtype(xs[0].device)
    if xs[0].device.type == "cpu":
        xs = [torch.linalg.vector_norm(x.reshape(-1, 256), dim=1) if _has_rows_of_256(x) else x for x in xs]
    if any(map(is_batched, xs)):  # vmap has no rule for lists
        return torch.stack([torch.linalg.vector_norm(x, dtype=dtype) for x in xs]).square()
    return torch.stack(torch._foreach_norm(xs, 2, dtype)).square()


def inner_products(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Σx², Σxy and Σy² of each pair of contiguous tensors on a CPU, float64 `(n, 3)`, without large temporaries."""
    parts = [_parts(x.view(-1), y.view(-1)) for x, y in zip(xs, ys, strict=True)]
    sums = torch.cat(parts, dim=1).to(torch.float64).split([x.shape[1] for x in parts], dim=1)
    return torch.stack([x.sum(1) for x in sums])


def _parts(x: Tensor, y: Tensor) -> Tensor:
    """What Σx², Σxy and Σy² are the sums of, `(3, parts)`: rows of 256 elements in turn, and what remains."""
    n, parts = x.numel(), []
    whole = n // 256 * 256 if n >= 2**12 else 0  # a float32 sum over a million products would be wrong by 1e-5
    if whole:  # all rows at a time, as what runs in parallel takes long to start
        (a, b), norm = (z[:whole].view(1, -1, 256) for z in (x, y)), torch.linalg.vector_norm
        parts.append(torch.cat([norm(a, dim=2).square_(), _row_products(a, b), norm(b, dim=2).square_()]))
    if whole < n or n == 0:
        x, y = x[whole:], y[whole:]
        parts.append(torch.stack([torch.dot(x, x), torch.dot(x, y), torch.dot(y, y)]).unsqueeze(1))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _row_products(x: Tensor, y: Tensor) -> Tensor:
    """Σxy of each row of tensors of (1, rows, elements), `(1, rows)` in the dtype of `x`.

    It is the gradient of a batch norm's weight, whose channels the rows are: torch sums it up in float64, in one pass
    that makes no temporary, and the rows in parallel.
    """
    zeros, ones = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
    backward, wanted = torch.ops.aten.native_batch_norm_backward.default, [False, True, False]
    return backward(x, y, ones, zeros, ones, None, None, False, 0.0, wanted)[1].unsqueeze(0)


def row_sums_of_squares(xs: list[Tensor]) -> Tensor:
    """Σx² of each row of each of the tensors, `(all rows,)`, rows as in [`masks.as_rows`]."""
    return torch.cat([_row_norms(masks.as_rows(x)) for x in xs]).square()


def row_mean_squares(xs: list[Tensor]) -> list[Tensor]:
    """The means of x² over each row, `(rows,)` of each of the tensors, with one launch a tensor."""
    rows = [masks.as_rows(x) for x in xs]
    squares = [_row_norms(x) for x in rows]
    torch._foreach_mul_(squares, squares)
    torch._foreach_div_(squares, [max(x.shape[1], 1) for x in rows])
    return squares


def _has_rows_of_256(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous() and x.numel() > 0 and x.numel() % 256 == 0


def _row_norms(rows: Tensor) -> Tensor:
    # On a CPU the sums that are float32 are of 256 squares, or of 128 or 64 where these divide a shorter row.
    dtype, norm = masks.statistics_dtype(rows.device), torch.linalg.vector_norm
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.is_contiguous() and rows.numel():
        n = rows.shape[1]
        part = math.gcd(n, 256)
        if part >= 64:
            rows = norm(rows.unflatten(1, (-1, part)), dim=-1)
        elif n > 256:
            whole = n // 256 * 256
            rest = norm(rows[:, whole:], dim=1, keepdim=True, dtype=dtype).to(rows.dtype)
            rows = torch.cat([norm(rows[:, :whole].unflatten(1, (-1, 256)), dim=-1), rest], dim=1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
