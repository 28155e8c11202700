"""What `PRM.get_mask_stats` reports: the mask of the last step, recomputed from the state, summed over tensors."""

from typing import Any

import torch
from torch import Tensor

from . import masks
from .foreach import sum_of_squares
from .quantized import read
from .step import mask_arguments, scalars_of


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


def slice_row(m: Tensor, v: Tensor, s: Tensor | None, step: Tensor, hyper: dict[str, Any]) -> Tensor:
    """The row, float64 (9,), of a slice of one tensor."""
    dtype, n = masks.statistics_dtype(m.device), m.numel()
    m, v = (read(x, torch.promote_types(x.dtype, torch.float32)) for x in (m, v))
    zero = torch.zeros((), dtype=dtype, device=m.device)
    row = dict.fromkeys(COLUMNS, zero) | {"numel": zero + n, "min_q": zero + torch.inf, "max_q": zero - torch.inf}
    row["nonfinite"] = n - torch.isfinite(v).sum()
    if hyper["mask"] == "none":
        row |= dict.fromkeys(("q", "active"), zero + n) | dict.fromkeys(("min_q", "max_q"), zero + 1)
    elif hyper["reduction"] == "per_tensor":
        row["sum_sq"] = sum_of_squares(m)
    elif n > 0:
        c = scalars_of(step.to(dtype=dtype, device=m.device), hyper)
        q, signal, noise = masks.compute_mask(m.square(), s, c, **mask_arguments(hyper))
        row |= {"q": q.sum(dtype=dtype), "active": (q > 0).sum(), "min_q": q.min(), "max_q": q.max()}
        row |= {"signal": signal.sum(dtype=dtype), "noise": noise.sum(dtype=dtype)}
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
