"""What `PRM.get_mask_stats` reports: the mask of the last step, recomputed from the state, summed over tensors."""

from typing import Any

import torch
from torch import Tensor

from . import masks
from .foreach import row_mean_squares, sum_of_squares
from .quantized import read
from .step import buckets, mask_arguments, scalars_of


# Sums over the scalar parameters of a tensor, then the extremes. For `per_tensor` q is only known of the whole tensor:
# until then a row has Σm² in place of what depends on q.
COLUMNS = ("numel", "q", "active", "signal", "noise", "nonfinite", "sum_sq", "min_q", "max_q")
N_SUMS = 7
SUMMARY = (
    "mean_q",
    "active_fraction",
    "min_q",
    "max_q",
    "parameter_count",
    "noise_scale",
    "signal_sq",
    "snr",
    "nonfinite_count",
)


def slice_rows(slices: list[dict[str, Tensor]], steps: list[Tensor], hyper: dict[str, Any]) -> list[Tensor]:
    """The rows, float64 (9,), of slices of tensors, each with its `exp_avg`, `exp_avg_sq` and what it has of the rest.

    The rest is `grad_var` and `exp_avg_signal`.
    """
    if hyper["mask"] == "none" or hyper["reduction"] != "per_tensor":
        return [_slice_row(**tensors, step=step, hyper=hyper) for tensors, step in zip(slices, steps, strict=True)]
    rows = [None] * len(slices)
    for index in buckets([tensors["exp_avg"] for tensors in slices]):
        for i, row in zip(index, _per_tensor_rows([slices[i] for i in index]).unbind(), strict=True):
            rows[i] = row
    return rows


def _per_tensor_rows(slices: list[dict[str, Tensor]]) -> Tensor:
    """For models of hundreds of tensors: a few launches a tensor, and as many again only if something overflowed."""
    device = slices[0]["exp_avg"].device
    dtype = masks.statistics_dtype(device)
    numels = torch.tensor([tensors["exp_avg"].numel() for tensors in slices], dtype=dtype, device=device)
    zeros = torch.zeros_like(numels)
    columns = dict.fromkeys(COLUMNS, zeros) | {"numel": numels, "min_q": zeros + torch.inf, "max_q": zeros - torch.inf}
    columns["sum_sq"] = torch.stack([sum_of_squares(_readable(tensors["exp_avg"])) for tensors in slices])
    vs = [tensors["exp_avg_sq"] for tensors in slices]
    largest = [torch.linalg.vector_norm(_readable(v), torch.inf).to(dtype) for v in vs if v.numel()]
    if largest and not torch.stack(largest).isfinite().all():
        columns["nonfinite"] = torch.stack([v.numel() - torch.isfinite(_readable(v)).sum() for v in vs])
    return torch.stack([columns[name].to(dtype) for name in COLUMNS], dim=1)


def _readable(x: Tensor) -> Tensor:
    return read(x, torch.promote_types(x.dtype, torch.float32))


def local_masks(
    exp_avg: Tensor, grad_var: Tensor, exp_avg_signal: Tensor | None, step: Tensor, hyper: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, S and N of the last step from the state: for `per_param` one a scalar parameter, for `per_row` one a row."""
    average = _readable(exp_avg if exp_avg_signal is None else exp_avg_signal)
    c = scalars_of(step.to(dtype=masks.statistics_dtype(average.device), device=average.device), hyper)
    squares = average.square() if hyper["reduction"] == "per_param" else row_mean_squares(average)
    return masks.compute_mask(squares, grad_var, c, **mask_arguments(hyper))


def _slice_row(
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    hyper: dict[str, Any],
    grad_var: Tensor | None = None,
    exp_avg_signal: Tensor | None = None,
) -> Tensor:
    v = _readable(exp_avg_sq)
    dtype, n = masks.statistics_dtype(v.device), v.numel()
    zero = torch.zeros((), dtype=dtype, device=v.device)
    row = dict.fromkeys(COLUMNS, zero) | {"numel": zero + n, "min_q": zero + torch.inf, "max_q": zero - torch.inf}
    row["nonfinite"] = n - torch.isfinite(v).sum()
    if hyper["mask"] == "none":
        row |= dict.fromkeys(("q", "active"), zero + n) | dict.fromkeys(("min_q", "max_q"), zero + 1)
    elif n > 0:
        q, signal, noise = local_masks(exp_avg, grad_var, exp_avg_signal, step, hyper)
        size = n // q.numel()  # of a row
        row |= {"q": q.sum(dtype=dtype) * size, "active": (q > 0).sum() * size, "min_q": q.min(), "max_q": q.max()}
        row |= {"signal": signal.sum(dtype=dtype) * size, "noise": noise.sum(dtype=dtype) * size}
    return torch.stack([row[name].to(dtype) for name in COLUMNS])


def add_rows(a: Tensor, b: Tensor) -> Tensor:
    """The row of two slices together."""
    low, high = N_SUMS, N_SUMS + 1
    extremes = torch.stack([torch.minimum(a[low], b[low]), torch.maximum(a[high], b[high])])
    return torch.cat([a[:low] + b[:low], extremes])


def fill_per_tensor(
    table: Tensor, numels: list[int], grad_vars: list[Tensor], steps: list[Tensor], hyper: dict[str, Any]
) -> Tensor:
    """Completes the rows of whole tensors for `reduction="per_tensor"`: the single q stands for all parameters."""
    device, dtype = table.device, table.dtype
    n = torch.tensor(numels, dtype=dtype, device=device)
    c = scalars_of(torch.stack(steps).to(dtype=dtype, device=device), hyper)
    mean_sq = table[:, COLUMNS.index("sum_sq")] / n.clamp(min=1)
    q, signal, noise = masks.compute_mask(mean_sq, torch.stack(grad_vars).to(dtype), c, **mask_arguments(hyper))
    columns = dict(zip(COLUMNS, table.unbind(1), strict=True))
    columns |= {"q": q * n, "active": (q > 0) * n, "signal": signal * n, "noise": noise * n, "min_q": q, "max_q": q}
    return torch.stack([columns[name].to(dtype) for name in COLUMNS], dim=1)


def mask_summary(tables: list[tuple[Tensor, bool]]) -> dict[str, float]:
    """The statistics of several tables together; the flag of a table says whether it is masked at all."""
    tables = [(table, masked) for table, masked in tables if len(table)]
    if not tables or sum(table[:, 0].sum() for table, _ in tables) == 0:
        return {key: 0 if key.endswith("_count") else float("nan") for key in SUMMARY}
    rows = torch.cat([table[table[:, 0] > 0].cpu().double() for table, _ in tables])
    masked = torch.cat([table[table[:, 0] > 0, 0].cpu().double() * flag for table, flag in tables]).sum()
    column = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    n, signal, noise = column["numel"].sum(), column["signal"].sum(), column["noise"].sum()
    values = (
        column["q"].sum() / n,
        column["active"].sum() / n,
        column["min_q"].min(),
        column["max_q"].max(),
        n,
        noise / masked,
        signal / masked,
        signal / noise,
        column["nonfinite"].sum(),
    )
    summary = {key: value.item() for key, value in zip(SUMMARY, values, strict=True)}
    return {key: int(value) if key.endswith("_count") else value for key, value in summary.items()}
