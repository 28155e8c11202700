"""What `PRM.get_mask_stats` reports: the mask of the last step, recomputed from the state, summed over tensors.

The table of a group has a row of `COLUMNS` for each tensor; rows of slices that processes hold are added up. Tables
are on the host, where scalars are worked on without launches.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ReduceOp

from ..sharding import FlatVariances, Locator, Slice, UnitRange, UnitTable, local_tensors
from . import foreach, masks
from .functional import buckets
from .hyperparameters import Hyperparameters
from .quantized import is_quantized, moment_of, read, slices_of
from .reductions import row_sums_of_squares, sums_of_squares


# Sums over the scalar parameters of a tensor, then the extremes.
COLUMNS = ("numel", "nonfinite", "q", "active", "signal", "noise", "min_q", "max_q")
N_SUMS, FIRST_MASKED = 6, 2

_States = list[tuple[Tensor, dict[str, Tensor]]]


def group_table(
    group: dict[str, Any],
    params: list[Tensor],
    state: dict[Tensor, dict],
    locator: Locator,
    variances: FlatVariances,
) -> tuple[Tensor, bool]:
    """The table of a parameter group, and whether the group is masked. Collective where tensors are sharded.

    Args:
        params: the local tensors that the group steps; those that were never stepped are left out.
        state: the optimizer's.
        variances: `grad_var` of flat buffers.

    Returns:
        float64 `(tensors, 8)`, on the CPU.
    """
    h = Hyperparameters.of_group(group)
    states = [(p, own) for p in params if (own := state.get(p))]
    if not states:
        return torch.zeros(0, len(COLUMNS), dtype=torch.float64), h.masked
    table, numbers = _table_of_elements(states, h, locator)
    if h.masked and h.reduction != "per_param":
        table[:, FIRST_MASKED:] = _table_of_units(states, numbers, table[:, 0], h, locator, variances)
    return table, h.masked


def _table_of_elements(states: _States, h: Hyperparameters, locator: Locator) -> tuple[Tensor, list[int]]:
    """The table with all that is known of each element, and the number of the tensor of each row."""
    per_param = h.masked and h.reduction == "per_param"
    names = ["exp_avg", "exp_avg_sq"] + ["grad_var"] * per_param
    found = []
    for p, own in states:
        pieces = _slices(p, own, locator)
        if locator.flat:  # a row also for tensors of which this process holds nothing
            pieces += [Slice(UnitRange(number, 0, 1), 0, 0, (0,)) for number in locator.members(p)]
        values = zip(*(slices_of(moment_of(own, name), pieces) for name in names), strict=True)
        found += [
            (piece.units.tensor, dict(zip(names, tensors, strict=True)), own["step"])
            for piece, tensors in zip(pieces, values, strict=True)
        ]
    numbers, slices, steps = map(list, zip(*found, strict=True))
    table = torch.zeros(len(slices), len(COLUMNS), dtype=torch.float64)
    table[:, 0] = torch.tensor([tensors["exp_avg"].numel() for tensors in slices])
    table[:, N_SUMS], table[:, N_SUMS + 1] = torch.inf, -torch.inf
    for index in buckets([tensors["exp_avg"] for tensors in slices]):
        table[index, 1] = _nonfinite([slices[i]["exp_avg_sq"] for i in index])
        filled = [i for i in index if slices[i]["exp_avg"].numel()]
        if per_param and filled:
            own = [slices[i] for i in filled], [steps[i] for i in filled]
            table[filled, FIRST_MASKED:] = _masks_of_elements(*own, h)
    if not h.masked:
        table[:, 2:4] = table[:, :1]
        table[:, N_SUMS:] = 1.0
    table, numbers = _add_rows(table, numbers)
    return _reduce(table, numbers, locator, states[0][0].device), numbers


def _reduce(table: Tensor, numbers: list[int], locator: Locator, device: torch.device) -> Tensor:
    """The table of whole tensors from that of shards, with a row for each of the numbers. Collective on `device`."""
    sums, lowest, highest = (x.contiguous().to(device) for x in _split(table))
    locator.layout.all_reduce(sums, numbers)
    locator.layout.all_reduce(lowest, numbers, ReduceOp.MIN)
    locator.layout.all_reduce(highest, numbers, ReduceOp.MAX)
    return torch.column_stack([sums, lowest, highest]).cpu()


def _table_of_units(
    states: _States, numbers: list[int], numels: Tensor, h: Hyperparameters, locator: Locator, variances: FlatVariances
) -> Tensor:
    """What is known of masks that each stand for a row or a tensor, `(tensors, 6)`: the columns from `q` on."""
    layout, device = locator.layout, states[0][0].device if locator.sharded else torch.device("cpu")
    of_tensor = {number: own for p, own in states for number in locator.members(p)}
    table = UnitTable(dict.fromkeys(numbers, h.reduction), layout, device, masks.statistics_dtype(device))
    squares = _sums_of_squares(states, table, h, locator)
    kept = [variances.tables[id(p)] for p, _ in states] if locator.flat else [own["grad_var"] for _, own in states]
    var = torch.zeros(len(table), dtype=table.dtype, device=device)
    of_states = table.of_tensors([number for p, _ in states for number in locator.members(p)])
    var[of_states] = torch.cat([x.view(-1).to(device) for x in local_tensors(kept)]).to(table.dtype)
    # Each unit counts where one process speaks for it
    owned, counts = table.owned(), [layout.owned_units(number, h.reduction).count for number in numbers]
    owner = torch.arange(len(numbers)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    n_units = torch.tensor([layout.units(number, h.reduction) for number in numbers])
    in_unit = (numels / n_units.clamp(min=1))[owner]
    squares, var = _on_host(squares[owned]), _on_host(var[owned])
    steps = _on_host(_stack([of_tensor[number]["step"] for number in numbers]))[owner]
    c = masks.step_scalars(steps, h, numels[owner])
    q, signal, noise = masks.compute_mask(squares / in_unit.clamp(min=1), var, c, h)
    units = torch.stack([in_unit, torch.zeros_like(q), *(x * in_unit for x in (q, q > 0, signal, noise)), q, q], dim=1)
    of_numbers = _add_rows(units, owner.tolist(), len(numbers))[0]
    return _reduce(of_numbers, numbers, locator, states[0][0].device)[:, FIRST_MASKED:]


def _slices(p: Tensor, own: dict[str, Tensor], locator: Locator, by_rows: bool = False) -> list[Slice]:
    return locator.slices(p, by_rows, in_blocks=is_quantized(own["exp_avg"]))


def _sums_of_squares(states: _States, table: UnitTable, h: Hyperparameters, locator: Locator) -> Tensor:
    """Σa² of each unit of the table; a is the average that the signal is estimated from. Collective."""
    by_rows = h.reduction == "per_row"
    name = "exp_avg" if h.signal_beta is None else "exp_avg_signal"
    pieces = []
    for p, own in states:
        slices = _slices(p, own, locator, by_rows)
        pieces += zip(slices_of(moment_of(own, name), slices), [piece.units for piece in slices], strict=True)
    sums = []
    for index in buckets([average for average, _ in pieces]):
        values = _by_list(row_sums_of_squares if by_rows else sums_of_squares, [pieces[i][0] for i in index])
        values = values if locator.sharded else _on_host(values)
        sums.append((table.index([pieces[i][1] for i in index]), values.unsqueeze(1)))
    return table.add_up(sums, 1).squeeze(1)


def _masks_of_elements(slices: list[dict[str, Tensor]], steps: list[Tensor], h: Hyperparameters) -> Tensor:
    """What is known of masks that each stand for an element, `(slices, 6)`: the columns from `q` on. None is empty.

    One block of slices at a time is copied together, so that their number does not count, nor the memory of a large
    one.
    """
    ages, device = _stack(steps).tolist(), slices[0]["exp_avg"].device
    size = foreach.CPU_BLOCK if device.type == "cpu" else foreach.QUANTIZED_BLOCK
    dtype = masks.statistics_dtype(device)
    owners, blocks = [], []
    for age in sorted(set(ages)):  # one, but for tensors that skipped steps
        members = [i for i, other in enumerate(ages) if other == age]
        lists = [[slices[i][name] for i in members] for name in ("grad_var", "exp_avg")]
        by_rows = any(map(is_quantized, lists[1]))
        for block in foreach.divide(lists, size, by_rows):
            owners += [members[j] for j, _ in block]
            pieces = [[foreach.cut(xs[j], span, by_rows) for j, span in block] for xs in lists]
            lengths = [x.numel() for x in pieces[0]]
            s, m = map(_together, pieces)
            q, signal, noise = masks.compute_mask(m.square_(), s, masks.step_scalars(age, h), h)
            # None is negative, so that a norm of order 1 is a sum
            columns = [part for x in (q, (q > 0).to(q.dtype), signal, noise) for part in x.split(lengths)]
            lowest = torch._foreach_neg(torch._foreach_max(q.neg().split(lengths)))
            extremes = torch.stack([*lowest, *torch._foreach_max(q.split(lengths))]).to(dtype)
            sums = torch.stack(torch._foreach_norm(columns, 1, dtype))
            blocks.append(torch.cat([sums, extremes]).view(N_SUMS, -1))
    columns = _on_host(torch.cat(blocks, dim=1).t())
    rows = torch.column_stack([columns.new_zeros(len(columns), FIRST_MASKED), columns])
    return _add_rows(rows, owners, len(slices))[0][:, FIRST_MASKED:]


def _split(table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return table[:, :N_SUMS], table[:, N_SUMS], table[:, N_SUMS + 1]


def _add_rows(table: Tensor, numbers: list[int], n: int | None = None) -> tuple[Tensor, list[int]]:
    """The rows that have the same number together, in the order of the numbers, and these; or rows 0 to n - 1."""
    unique, index = torch.tensor(numbers, dtype=torch.int64).unique(return_inverse=True)
    if n is not None:
        unique, index = torch.arange(n), unique[index]
    of_sums, of_lowest, of_highest = _split(table)
    sums = table.new_zeros(len(unique), N_SUMS).index_add_(0, index, of_sums)
    lowest = table.new_full((len(unique),), torch.inf).scatter_reduce_(0, index, of_lowest, "amin")
    highest = table.new_full((len(unique),), -torch.inf).scatter_reduce_(0, index, of_highest, "amax")
    return torch.column_stack([sums, lowest, highest]), unique.tolist()


def _nonfinite(tensors: list[Tensor]) -> Tensor:
    """How many elements of each are infinite or NaN; they are only counted if a sum says that there are any."""

    def absolute_sums(xs: list[Tensor]) -> Tensor:
        return torch.stack(torch._foreach_norm(xs, 1, masks.statistics_dtype(xs[0].device)))

    if _on_host(_by_list(absolute_sums, tensors)).isfinite().all():
        return torch.zeros(len(tensors), dtype=torch.float64)
    return _on_host(torch.stack([x.numel() - torch.isfinite(_readable(x)).sum() for x in tensors]))


def _by_list(function: Callable[[list[Tensor]], Tensor], tensors: list[Tensor]) -> Tensor:
    """`function` of the list; of 8-bit tensors one by one, as their values take four times the memory of the codes."""
    if any(map(is_quantized, tensors)):
        return torch.cat([function([_readable(x)]) for x in tensors])
    return function(tensors)


def _readable(x: Tensor) -> Tensor:
    return read(x, torch.promote_types(x.dtype, torch.float32))


def _together(tensors: list[Tensor]) -> Tensor:
    """The elements of tensors of one dtype, one after the other and readable: converted by one launch, but 8 bits."""
    if any(map(is_quantized, tensors)):
        tensors = [_readable(x) for x in tensors]
    return _readable(torch.cat([x.reshape(-1) for x in tensors]))


def _stack(scalars: list[Tensor]) -> Tensor:
    return torch.stack(scalars if len({x.device for x in scalars}) == 1 else [x.cpu() for x in scalars])


def _on_host(x: Tensor) -> Tensor:
    return x.cpu().double()


def mean_masks(table: Tensor) -> list[float]:
    """The mean mask of each tensor of a table."""
    return (table[:, 2] / table[:, 0].clamp(min=1)).tolist()


def mask_summary(tables: list[tuple[Tensor, bool]]) -> dict[str, float]:
    """The statistics of several tables together; the flag of a table says whether it is masked at all.

    Returns:
        `mean_q`, `min_q`, `max_q` over scalar parameters; `active_fraction`, the share of them with q > 0;
        `parameter_count`, the scalar parameters that have been trained; `signal_sq` and `noise_sq`, the means of S and
        N over the masked ones (squared gradient units), and `snr`, their ratio; `nonfinite_count`, the scalar
        parameters that an infinite or NaN gradient has reached. Before the first step, and for S and N where every
        mask is `"none"`, the means are NaN.
    """
    rows = torch.cat([table[table[:, 0] > 0] for table, _ in tables] or [torch.zeros(0, len(COLUMNS), device="cpu")])
    column = dict(zip(COLUMNS, rows.unbind(1), strict=True))
    n, q, active, signal, noise = (column[name].sum() for name in ("numel", "q", "active", "signal", "noise"))
    masked = sum(table[:, 0].sum() * flag for table, flag in tables)
    means = {
        "mean_q": q / n,
        "active_fraction": active / n,
        "min_q": column["min_q"].min() if len(rows) else n / n,
        "max_q": column["max_q"].max() if len(rows) else n / n,
        "noise_sq": noise / masked,
        "signal_sq": signal / masked,
        "snr": signal / noise,
        "noise_scale": noise / masked,  # an earlier name of `noise_sq`, for one version
    }
    counts = {"parameter_count": n, "nonfinite_count": column["nonfinite"].sum()}
    return {key: x.item() for key, x in means.items()} | {key: int(x) for key, x in counts.items()}
