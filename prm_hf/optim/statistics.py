"""What `PRM.get_mask_stats` reports: the mask of the last step, recomputed from the state, summed over tensors.

A group's table has a row of `COLUMNS` for each tensor; rows of slices that processes hold are added up.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..sharding import Locator, RowSpan
from . import masks
from .foreach import multi_row_mean_squares, row_mean_squares, row_sums_of_squares, sums_of_squares
from .parts import hyperparameters
from .quantized import flat_slice, is_quantized, read
from .step import CPU_BLOCK, QUANTIZED_BLOCK, buckets, divide, mask_arguments, scalars_of
from .tables import Tables


# Sums over the scalar parameters of a tensor, then the extremes. For `per_tensor` q is only known of the whole tensor:
# until then a row has Σm² in place of what depends on q.
COLUMNS = ("numel", "q", "active", "signal", "noise", "nonfinite", "sum_sq", "min_q", "max_q")
N_SUMS = 7
_AT = {name: i for i, name in enumerate(COLUMNS)}
_MASKED = ("q", "active", "signal", "noise", "min_q", "max_q")  # what depends on the mask
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


def group_table(
    group: dict[str, Any], params: list[Tensor], state: dict[Tensor, dict], locator: Locator, tables: Tables
) -> tuple[Tensor, bool]:
    """The table of a parameter group, and whether the group is masked. Collective where tensors are held in parts.

    Args:
        params: the local tensors that the group steps; those that were never stepped are left out.
        state: the optimizer's.
    """
    hyper, masked = hyperparameters(group), group["mask"] != "none"
    states = [(p, own) for p in params if (own := state.get(p))]
    if not states:
        return torch.zeros(0, 0), masked
    if locator.layout is not None:
        return _table_of_parts(group, states, locator, tables, hyper), masked
    # This is all there is to a log of a step where tensors are whole, so it is short
    whole = [own for _, own in states]
    steps = [own["step"] for own in whole]
    table = _slice_table(whole, steps, hyper)
    if masked and group["reduction"] == "per_tensor":
        table = _fill_per_tensor(table, [own["grad_var"] for own in whole], steps, hyper)
    return table, masked


def _table_of_parts(
    group: dict[str, Any],
    states: list[tuple[Tensor, dict[str, Tensor]]],
    locator: Locator,
    tables: Tables,
    hyper: dict[str, Any],
) -> Tensor:
    masked, reduction, in_rows = group["mask"] != "none", group["reduction"], tables.in_rows(group)
    names = ["exp_avg", "exp_avg_sq"] + ["grad_var"] * (masked and reduction == "per_param")
    average = "exp_avg" if group["signal_beta"] is None else "exp_avg_signal"
    numbers: list[int] = []
    slices: list[dict[str, Tensor]] = []
    steps: list[Tensor] = []
    rows: list[tuple[list[RowSpan], list[Tensor]]] = []
    advancing: dict[int, tuple[int, Tensor, Tensor]] = {}
    for p, own in states:
        kept = {name: own[name] for name in names}
        owners, lists = locator.slices(p, kept, split=True)
        pieces = [dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
        if locator.flat:  # a row also for tensors of which this process holds nothing
            members = locator.members(p)
            pieces += [{name: tensor.narrow(0, 0, 0) for name, tensor in kept.items()}] * len(members)
            owners += members
        numbers += owners
        slices += pieces
        steps += [own["step"]] * len(pieces)
        if in_rows:
            spans, averages = locator.row_slices(p, {"average": own[average]})
            rows.append((spans, averages["average"]))
        if masked and reduction != "per_param":
            advancing |= tables.advancing(p, own, in_rows)
    # Of rows in parts the masks come last, as of tensors
    of_slices = hyper | {"reduction": "per_tensor"} if in_rows else hyper
    table, numbers = _add_rows(_slice_table(slices, steps, of_slices), numbers)
    sums, lowest, highest = table[:, :N_SUMS].clone(), table[:, N_SUMS].clone(), table[:, N_SUMS + 1].clone()
    locator.all_reduce(sums, numbers)
    locator.all_reduce(lowest, numbers, torch.distributed.ReduceOp.MIN)
    locator.all_reduce(highest, numbers, torch.distributed.ReduceOp.MAX)
    table = torch.column_stack([sums, lowest, highest])
    if not advancing:
        return table
    _, grad_vars, steps = map(list, zip(*(advancing[number] for number in numbers), strict=True))
    if not in_rows:
        return _fill_per_tensor(table, grad_vars, steps, hyper)
    of_rows = [(spans, row_sums_of_squares(xs).unsqueeze(1) if xs else None) for spans, xs in rows]
    squares = tables.add_up(tables.units(numbers, in_rows), of_rows, 1, grad_vars[0].device).squeeze(1)
    return _fill_per_row(table, squares, grad_vars, steps, hyper)


def mean_masks(table: Tensor) -> list[float]:
    """The mean mask of each tensor of a table."""
    return (table[:, _AT["q"]] / table[:, _AT["numel"]].clamp(min=1)).tolist() if len(table) else []


def _slice_table(slices: list[dict[str, Tensor]], steps: list[Tensor], hyper: dict[str, Any]) -> Tensor:
    """The rows of slices of tensors, each with its `exp_avg`, `exp_avg_sq` and what the mask has of the rest.

    The rest is `grad_var`, unless masks are `per_tensor`, and `exp_avg_signal`.

    Returns:
        float64, `(slices, 9)`, on the CPU, where a table of scalars is worked on without launches.
    """
    table = torch.zeros(len(slices), len(COLUMNS), dtype=torch.float64)
    table[:, _AT["numel"]] = torch.tensor([tensors["exp_avg"].numel() for tensors in slices])
    table[:, _AT["min_q"]], table[:, _AT["max_q"]] = torch.inf, -torch.inf
    for index in buckets([tensors["exp_avg"] for tensors in slices]):
        members = [slices[i] for i in index]
        table[index, _AT["nonfinite"]] = _nonfinite([tensors["exp_avg_sq"] for tensors in members])
        if hyper["mask"] == "none":
            whole = table[index, _AT["numel"]]
            table[index, _AT["q"]], table[index, _AT["active"]] = whole, whole
            table[index, N_SUMS:] = 1.0
        elif hyper["reduction"] == "per_tensor":
            table[index, _AT["sum_sq"]] = _on_host(_by_list(sums_of_squares, [x["exp_avg"] for x in members]))
        elif masked := [i for i in index if slices[i]["exp_avg"].numel()]:
            rows = _masked_rows([slices[i] for i in masked], [steps[i] for i in masked], hyper)
            columns = [_AT[name] for name in _MASKED]
            table[torch.tensor(masked).unsqueeze(1), columns] = rows[:, columns]
    return table


def _on_host(x: Tensor) -> Tensor:
    return x.cpu().double()


def _by_list(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> Tensor:
    """`function` of the list; of 8-bit tensors one by one, as their values take four times the memory of the codes."""
    if any(map(is_quantized, tensors)):
        return torch.cat([function([_readable(x)]) for x in tensors])
    return function(tensors)


def _nonfinite(tensors: list[Tensor]) -> Tensor:
    """How many elements of each are infinite or NaN; they are only counted if a sum says that there are any."""

    def absolute_sums(xs: list[Tensor]) -> Tensor:
        return torch.stack(torch._foreach_norm(xs, 1, masks.statistics_dtype(xs[0].device)))

    if _on_host(_by_list(absolute_sums, tensors)).isfinite().all():
        return torch.zeros(len(tensors), dtype=torch.float64)
    return _on_host(torch.stack([x.numel() - torch.isfinite(_readable(x)).sum() for x in tensors]))


def _readable(x: Tensor) -> Tensor:
    return read(x, torch.promote_types(x.dtype, torch.float32))


def _together(tensors: list[Tensor]) -> Tensor:
    """The elements of tensors of one dtype, one after the other and readable: converted by one launch, but 8 bits."""
    if any(map(is_quantized, tensors)):
        tensors = [_readable(x) for x in tensors]
    return _readable(torch.cat([x.reshape(-1) for x in tensors]))


def local_masks(
    exp_avg: Tensor, grad_var: Tensor, exp_avg_signal: Tensor | None, step: Tensor, hyper: dict[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """q, S and N of the last step from the state: for `per_param` one a scalar parameter, for `per_row` one a row."""
    average = _readable(exp_avg if exp_avg_signal is None else exp_avg_signal)
    c = scalars_of(step.to(dtype=masks.statistics_dtype(average.device), device=average.device), hyper)
    squares = average.square() if hyper["reduction"] == "per_param" else row_mean_squares(average)
    return masks.compute_mask(squares, grad_var, c, **mask_arguments(hyper))


def _masked_rows(slices: list[dict[str, Tensor]], steps: list[Tensor], hyper: dict[str, Any]) -> Tensor:
    """Rows of slices for `per_param` and `per_row`, with the columns `_MASKED` alone. None of the slices is empty.

    One block of them at a time is copied together, so that their number does not count, nor the memory of a large one;
    but for `per_row` the means over rows are a launch a tensor.
    """
    ages, device = torch.stack(steps).tolist(), slices[0]["exp_avg"].device
    dtype, size = masks.statistics_dtype(device), CPU_BLOCK if device.type == "cpu" else QUANTIZED_BLOCK
    per_row, variances = hyper["reduction"] == "per_row", [tensors["grad_var"] for tensors in slices]
    averages = [tensors.get("exp_avg_signal", tensors["exp_avg"]) for tensors in slices]
    if per_row:
        averages = multi_row_mean_squares(averages)
    owners, parts = [], []
    for age in sorted(set(ages)):  # one, but for tensors that skipped steps
        members = [i for i, other in enumerate(ages) if other == age]
        lists = [[xs[i] for i in members] for xs in (averages, variances)]
        for block in divide(lists, size):
            owners += [members[j] for j, _ in block]
            pieces = [[xs[j] if span is None else flat_slice(xs[j], span) for j, span in block] for xs in lists]
            lengths = [x.numel() for x in pieces[0]]
            m, s = map(_together, pieces)
            squares = m if per_row else m.square_()
            q, signal, noise = masks.compute_mask(squares, s, scalars_of(age, hyper), **mask_arguments(hyper))
            # None is negative, so that a norm of order 1 is a sum
            columns = [part for x in (q, (q > 0).to(q.dtype), signal, noise) for part in x.split(lengths)]
            lowest = torch._foreach_neg(torch._foreach_max(q.neg().split(lengths)))
            extremes = torch.stack([*lowest, *torch._foreach_max(q.split(lengths))]).to(dtype)
            sums = torch.stack(torch._foreach_norm(columns, 1, dtype))
            parts.append(torch.cat([sums, extremes]).view(len(_MASKED), -1))
    rows = torch.zeros(len(owners), len(COLUMNS), dtype=torch.float64)
    rows[:, [_AT[name] for name in _MASKED]] = _on_host(torch.cat(parts, dim=1).t())
    rows = _add_rows(rows, owners)[0]
    if per_row:  # each stands for all parameters of its row
        lengths = [x["exp_avg"].numel() // x["grad_var"].numel() for x in slices]
        rows[:, :N_SUMS] *= torch.tensor(lengths, dtype=torch.float64).unsqueeze(1)
    return rows


def _add_rows(table: Tensor, numbers: list[int]) -> tuple[Tensor, list[int]]:
    """The rows that have the same number together, in the order of the numbers, and these."""
    unique, index = torch.tensor(numbers).unique(return_inverse=True)
    sums = table.new_zeros(len(unique), N_SUMS).index_add_(0, index, table[:, :N_SUMS])
    lowest = table.new_full((len(unique),), torch.inf).scatter_reduce_(0, index, table[:, N_SUMS], "amin")
    highest = table.new_full((len(unique),), -torch.inf).scatter_reduce_(0, index, table[:, N_SUMS + 1], "amax")
    return torch.column_stack([sums, lowest, highest]), unique.tolist()


def _fill_per_tensor(table: Tensor, grad_vars: list[Tensor], steps: list[Tensor], hyper: dict[str, Any]) -> Tensor:
    """Completes the rows of whole tensors for `reduction="per_tensor"`: the single q stands for all parameters."""

    def vector(scalars: list[Tensor]) -> Tensor:
        if len({x.device for x in scalars}) > 1:
            scalars = [x.cpu() for x in scalars]
        return _on_host(torch.stack(scalars))

    n = table[:, _AT["numel"]]
    mean_sq = table[:, _AT["sum_sq"]] / n.clamp(min=1)
    c = scalars_of(vector(steps), hyper)
    q, signal, noise = masks.compute_mask(mean_sq, vector(grad_vars), c, **mask_arguments(hyper))
    columns = dict(zip(COLUMNS, table.unbind(1), strict=True))
    columns |= {"q": q * n, "active": (q > 0) * n, "signal": signal * n, "noise": noise * n, "min_q": q, "max_q": q}
    return torch.stack([columns[name].to(table.dtype) for name in COLUMNS], dim=1)


def _fill_per_row(
    table: Tensor, squares: Tensor, grad_vars: list[Tensor], steps: list[Tensor], hyper: dict[str, Any]
) -> Tensor:
    """Completes the rows of whole tensors for masks of rows in parts, from Σa² of each row of each tensor.

    `a` is the average that the signal is estimated from; `grad_vars` hold a value a row.
    """
    counts = torch.tensor([len(x) for x in grad_vars])
    in_row = (table[:, _AT["numel"]] / counts.clamp(min=1)).repeat_interleave(counts)
    c = scalars_of(torch.stack([x.cpu() for x in steps]).double().repeat_interleave(counts), hyper)
    means, variances = _on_host(squares) / in_row.clamp(min=1), _on_host(torch.cat(grad_vars))
    q, signal, noise = masks.compute_mask(means, variances, c, **mask_arguments(hyper))
    table = table.clone()
    for row, (n, *parts) in enumerate(
        zip(in_row.split(counts.tolist()), *(x.split(counts.tolist()) for x in (q, signal, noise)), strict=True)
    ):
        of_q, of_signal, of_noise = parts
        if len(n):
            values = (of_q.sum(), (of_q > 0).sum(), of_signal.sum(), of_noise.sum())
            for name, value in zip(("q", "active", "signal", "noise"), values, strict=True):
                table[row, _AT[name]] = value * n[0]
            table[row, _AT["min_q"]], table[row, _AT["max_q"]] = of_q.min(), of_q.max()
    return table


def mask_summary(tables: list[tuple[Tensor, bool]]) -> dict[str, float]:
    """The statistics of several tables together; the flag of a table says whether it is masked at all."""
    tables = [(table, masked) for table, masked in tables if len(table)]
    if not tables or sum(table[:, 0].sum() for table, _ in tables) == 0:
        return {key: 0 if key.endswith("_count") else float("nan") for key in SUMMARY}
    rows = torch.cat([table[table[:, 0] > 0] for table, _ in tables])
    masked = sum(table[:, 0].sum() * flag for table, flag in tables)
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
