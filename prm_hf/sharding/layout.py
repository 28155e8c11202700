"""Where a parameter tensor lives: which slices of it the optimizer's local tensors hold, and who holds the rest.

Data parallelism hands an optimizer whole tensors, FSDP shards, and DeepSpeed ZeRO flat buffers in which the borders
of tensors are lost. They are found once, at the first step, from the parameters that the optimizer was created with
(which the wrappers keep, and annotate) and never from shapes alone; the sizes found are added up over the processes
and compared with the true ones, so that a mistake is an error and not a wrong statistic.
"""

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .fsdp import FLAT_PARAMETERS
from .tensors import has_whole_rows, is_dtensor, is_instance, local_tensor


class ShardingPath(enum.Enum):
    """What holds the parameters. The values are for people."""

    FSDP1 = "FSDP1 (use_orig_params)"
    FSDP2 = "FSDP2"
    ZERO_12 = "DeepSpeed ZeRO-1/2"
    ZERO_3 = "DeepSpeed ZeRO-3"

    @classmethod
    def of_zero(cls, stage: int) -> "ShardingPath | None":
        """The path of a DeepSpeed configuration; None for stage 0, which leaves tensors whole."""
        return {0: None, 1: cls.ZERO_12, 2: cls.ZERO_12, 3: cls.ZERO_3}[stage]

    def check(self, reduction: str, state_dtype: str) -> None:
        """Raises ValueError for what can't be had where this path shards tensors.

        FSDP1 keeps to itself where in a tensor a shard begins, and puts the optimizer's state together for a
        checkpoint as float32 values of the parameter's shape, where codes have a scale beside them.
        """
        if self is not ShardingPath.FSDP1:
            return
        if reduction == "per_row":
            raise ValueError(
                f"Invalid reduction='per_row': it is not supported under {self.value}, which does not say which rows "
                "of a tensor a process holds. Use FSDP2 (`fsdp_version: 2`), or reduction='per_tensor'."
            )
        if state_dtype != "float32":
            raise ValueError(
                f"Invalid state_dtype={state_dtype!r}: it is not supported under {self.value}, which moves the state "
                "into and out of checkpoints as float32. Use FSDP2 (`fsdp_version: 2`), or state_dtype='float32'."
            )


class Segment(NamedTuple):
    """Elements [start, start + length) of a local tensor, flattened: a slice of original tensor number `tensor`.

    It begins at element `offset` of that tensor, flattened; a shard that is no flat buffer, and need not be contiguous
    in the original, in the row that begins there.
    """

    tensor: int
    start: int
    length: int
    offset: int = 0


class UnitRange(NamedTuple):
    """Units [first, first + count) of original tensor number `tensor`, or a part of one unit.

    A unit has one mask value. With `per_row` it is a row of a tensor of two dimensions and more, or the whole of any
    other tensor; with `per_tensor` it is the tensor.
    """

    tensor: int
    first: int
    count: int


@dataclass
class Layout:
    """The tensors of an optimizer. Numbers count its original tensors, group by group.

    Attributes:
        path: what holds the parameters; None for whole tensors.
        numels: elements of each original tensor, over all processes.
        rows: rows of each original tensor; 0 where it is not known which of them a process holds.
        process_groups: of each original tensor, the groups over which its parts have to be added up.
        borders: of flat buffers, the elements of each original tensor at which the part of another process begins, in
            their order, on every process the same.
        whole_rows: original tensors, not in flat buffers, of which each process holds whole rows.
        segments: by id of a local tensor, the slices in it.
        members: by id of a local tensor, the original tensors that advance when it is stepped. More than those in
            `segments`, where a process holds nothing of a tensor.
        flat: whether local tensors are flat buffers of many original tensors.
        locals: the local tensors; holding them keeps their ids unique.
    """

    path: ShardingPath | None
    flat: bool
    numels: list[int]
    process_groups: list[tuple[dist.ProcessGroup, ...]]
    rows: list[int] = field(default_factory=list)
    borders: list[Sequence[int]] = field(default_factory=list)
    whole_rows: set[int] = field(default_factory=set)
    segments: dict[int, list[Segment]] = field(default_factory=dict)
    members: dict[int, list[int]] = field(default_factory=dict)
    locals: list[Tensor] = field(default_factory=list)
    # By device of a table and tensors of its rows, the rows of each different set of groups; None for all rows
    _rows: dict[tuple, dict[tuple, Tensor | None]] = field(default_factory=dict, init=False, repr=False)
    # Of the original tensors of which this process holds something, from which of its elements to which
    _spans: dict[int, tuple[int, int]] = field(default_factory=dict, init=False, repr=False)
    # Those that stand for a buffer of padding alone
    _padding: set[int] = field(default_factory=set, init=False, repr=False)

    def merge(self, other: "Layout") -> None:
        """Takes over the local tensors of another layout of the same original tensors."""
        for local in other.locals:
            self.add(local, other.segments[id(local)], other.members[id(local)])
            for number in other.members[id(local)] if other.borders else ():
                self.borders[number] = other.borders[number]

    def units(self, tensor: int, reduction: str) -> int:
        """How many mask values an original tensor has with `reduction` `"per_tensor"` or `"per_row"`."""
        return self.rows[tensor] if reduction == "per_row" else 1

    def in_unit(self, tensor: int, reduction: str) -> int:
        """How many elements of an original tensor share a mask value."""
        return max(self.numels[tensor] // max(self.units(tensor, reduction), 1), 1)

    def held_units(self, tensor: int, reduction: str) -> UnitRange:
        """The units of which this process keeps `grad_var`: those that it holds, or holds a part of.

        Of a tensor whose units are not held apart that is all of them, on every process, whatever it holds. A buffer
        of padding alone has a unit of its first tensor.
        """
        if not self._held_apart(tensor, reduction):
            return UnitRange(tensor, 0, self.units(tensor, reduction))
        if tensor not in self._spans:
            return UnitRange(tensor, 0, int(tensor in self._padding))
        (begin, end), in_unit = self._spans[tensor], self.in_unit(tensor, reduction)
        first = begin // in_unit
        return UnitRange(tensor, first, -(-end // in_unit) - first)

    def owned_units(self, tensor: int, reduction: str) -> UnitRange:
        """The held units that this process speaks for: each unit has one such process, that of its first element."""
        number, first, count = self.held_units(tensor, reduction)
        if not self._held_apart(tensor, reduction):
            is_owner = all(dist.get_rank(group=group) == 0 for group in self.process_groups[tensor])
            return UnitRange(number, first, count * is_owner)
        if tensor not in self._spans:
            return UnitRange(number, 0, 0)
        begins_elsewhere = bool(self._spans[tensor][0] % self.in_unit(tensor, reduction))
        return UnitRange(number, first + begins_elsewhere, count - begins_elsewhere)

    def is_first(self) -> bool:
        """Whether this process is the first of each group that shares a tensor."""
        return all(dist.get_rank(group=group) == 0 for groups in {*self.process_groups} for group in groups)

    def cut_units(self, tensor: int, reduction: str) -> list[UnitRange]:
        """The units whose sums have to be added up over processes, in their order, on every process the same.

        In flat buffers those that a border cuts, which the sizes tell without communication. Elsewhere all of a
        tensor whose units are not held apart.
        """
        if not self.flat:
            everywhere = bool(self.process_groups[tensor]) and not self._held_apart(tensor, reduction)
            return [self.held_units(tensor, reduction)] if everywhere else []
        borders, in_unit = self.borders[tensor] if self.borders else (), self.in_unit(tensor, reduction)
        cut = sorted({border // in_unit for border in borders if border % in_unit})
        return [UnitRange(tensor, unit, 1) for unit in cut]

    def _held_apart(self, tensor: int, reduction: str) -> bool:
        """Whether each process keeps the units alone that it holds something of."""
        return self.flat or (reduction == "per_row" and tensor in self.whole_rows)

    def check_rows(self, tensors: Iterable[int]) -> None:
        """Raises ValueError where it is not known which rows of a tensor a process holds."""
        for number in tensors:
            if number < len(self.rows) and not self.rows[number] and self.numels[number]:
                raise ValueError(
                    f"Invalid reduction='per_row': under {self.path.value} it is not known which rows of tensor "
                    f"{number} a process holds; use 'per_tensor'."
                )

    def add(self, local: Tensor, segments: list[Segment], members: list[int]) -> None:
        self.segments[id(local)] = segments
        self.members[id(local)] = members
        self.locals.append(local)
        for number, _, length, offset in segments:
            if length:
                begin, end = self._spans.get(number, (offset, offset + length))
                self._spans[number] = min(begin, offset), max(end, offset + length)
        if not segments:
            self._padding.add(members[0])

    def all_reduce(
        self,
        table: Tensor,
        tensors: list[int],
        op: dist.ReduceOp = dist.ReduceOp.SUM,
        counts: list[int] | None = None,
    ) -> None:
        """Reduces the rows of `table`, one for each of `tensors`, in place over the processes that share the tensor.

        With `counts` so many for each of them. Collective over the process groups of these tensors. One all-reduce for
        each different set of groups; none for whole tensors, which every process has, nor of no rows.
        """
        if self.path is None:
            return
        key = (table.device, tuple(tensors), None if counts is None else tuple(counts))
        if key not in self._rows:
            by_groups, row = {}, 0
            for tensor, count in zip(tensors, [1] * len(tensors) if counts is None else counts, strict=True):
                by_groups.setdefault(self.process_groups[tensor], []).extend(range(row, row + count))
                row += count
            by_groups = {groups: rows for groups, rows in by_groups.items() if rows}
            self._rows[key] = {
                groups: torch.tensor(rows, device=table.device) if len(by_groups) > 1 else None
                for groups, rows in by_groups.items()
            }
        for groups, rows in self._rows[key].items():
            part = table if rows is None else table[rows]
            for group in groups:
                _all_reduce(part, group, op)
            if rows is not None:
                table[rows] = part

    def verify(self) -> None:
        """Adds up over the processes how many elements of each tensor were found; raises if any is missing."""
        counts = torch.zeros(len(self.numels), 1, dtype=torch.float64)
        for segments in self.segments.values():
            for segment in segments:
                counts[segment.tensor] += segment.length
        numbers = sorted({tensor for members in self.members.values() for tensor in members})
        found = counts[numbers]
        self.all_reduce(found, numbers)
        wrong = [
            f"tensor {number}: found {int(count)} of {self.numels[number]} elements"
            for number, count in zip(numbers, found[:, 0].tolist(), strict=True)
            if count != self.numels[number]
        ]
        if wrong:
            raise RuntimeError(
                f"PRM could not find the borders of the parameter tensors under {self.path.value} "
                f"({'; '.join(wrong[:3])}{'; …' if len(wrong) > 3 else ''}), so reduction='per_tensor' would be "
                "wrong. Use reduction='per_param', and please report the versions of torch and deepspeed."
            )
        self._verify_borders()

    def _verify_borders(self) -> None:
        """Raises if a part that this process holds begins or ends elsewhere than all processes take for granted."""
        for number, span in self._spans.items() if self.borders else ():
            edges = {0, self.numels[number], *self.borders[number]}
            if not edges.issuperset(span):
                raise RuntimeError(
                    f"PRM expects borders under {self.path.value} at the elements {sorted(edges)[:5]} of tensor "
                    f"{number}, and the part of process {dist.get_rank()} is {span}. Use reduction='per_param', and "
                    "please report the version of deepspeed."
                )


def find_layout(originals: list[list[Tensor]], groups: list[tuple[int, list[Tensor]]]) -> Layout:
    """The layout of an optimizer's parameters. Collective, if they are sharded.

    Args:
        originals: the parameters that the optimizer was created with, group by group.
        groups: the number of a parameter group in `originals`, and the tensors that are in it now.

    Raises:
        RuntimeError: the parameters are held in a way that a tensor's borders can't be recovered from.
    """
    local = [p for _, params in groups for p in params]
    if any(is_instance(p, "torch.distributed.fsdp", "FlatParameter") for p in local):
        raise RuntimeError(FLAT_PARAMETERS)
    if any(is_dtensor(p) for p in local):
        return _dtensor_layout(groups)
    if any(getattr(p, "_fsdp_flattened", False) for p in local):
        return _fsdp1_layout(groups)
    known = {id(p) for group in originals for p in group}
    if all(id(p) in known for p in local):
        return _whole_layout(local)
    parameters = [p for group in originals for p in group]
    if any(hasattr(p, "_z3_optimizer") for p in parameters):
        return _zero3_layout(originals)
    if any(hasattr(p, "_dp_group") for p in parameters):
        return _zero12_layout(originals, groups)
    for number, params in groups:
        # DeepSpeed's stage 0 in half precision steps on float32 clones, tensor by tensor.
        if [p.shape for p in params] != [p.shape for p in originals[number]]:
            raise RuntimeError(
                "The parameters of the optimizer were replaced after it was created, by something that PRM does not "
                f"know: group {number} had {len(originals[number])} tensors and has {len(params)} of shapes "
                f"{[tuple(p.shape) for p in params[:3]]}. Use reduction='per_param', DDP, FSDP2 or DeepSpeed ZeRO."
            )
    return _whole_layout(local)


def _whole_layout(params: list[Tensor]) -> Layout:
    numels, rows = [p.numel() for p in params], [_n_rows(p.shape) for p in params]
    layout = Layout(None, flat=False, numels=numels, rows=rows, process_groups=[()] * len(params))
    for number, p in enumerate(params):
        layout.add(p, [Segment(number, 0, p.numel())], [number])
    return layout


def _dtensor_layout(groups: list[tuple[int, list[Tensor]]]) -> Layout:
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    layout = Layout(path=ShardingPath.FSDP2, flat=False, numels=[], process_groups=[])
    for number, p in enumerate(p for _, params in groups for p in params):
        process_groups, rows, offset = (), _n_rows(p.shape), 0
        if is_dtensor(p):
            if any(isinstance(placement, Partial) for placement in p.placements):
                raise RuntimeError(f"PRM cannot step a parameter with partial placements: {p.placements}.")
            shards = (i for i, x in enumerate(p.placements) if not x.is_replicate() and p.device_mesh.size(i) > 1)
            process_groups = tuple(p.device_mesh.get_group(i) for i in shards)
            if not all(type(placement) in (Shard, Replicate) for placement in p.placements):
                rows = 0  # those of strided shards are not next to each other
            elif p.dim() > 1:
                _, start = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
                offset = start[0] * math.prod(p.shape[1:])
        layout.numels.append(p.numel())
        layout.process_groups.append(process_groups)
        layout.rows.append(rows)
        if has_whole_rows(p):
            layout.whole_rows.add(number)
        layout.add(p, [Segment(number, 0, local_tensor(p).numel(), offset)], [number])
    layout.verify()
    return layout


def _fsdp1_layout(groups: list[tuple[int, list[Tensor]]]) -> Layout:
    """`use_orig_params=True`: parameters are 1-D views of this process' shard, empty where it holds nothing of one.

    The true sizes are not to be had from the views, so they are what the processes' views add up to. With hybrid
    sharding that counts each replica, in the sums over a tensor as well, which leaves the means right.
    """
    local = [p for _, params in groups for p in params]
    layout = Layout(ShardingPath.FSDP1, flat=False, numels=[], process_groups=[(dist.group.WORLD,)] * len(local))
    for number, p in enumerate(local):
        layout.add(p, [Segment(number, 0, p.numel())], [number])
    counts = torch.tensor([[p.numel()] for p in local], dtype=torch.float64)
    layout.all_reduce(counts, list(range(len(counts))))
    layout.numels, layout.rows = [int(count) for count in counts[:, 0].tolist()], [0] * len(local)
    return layout


def _n_rows(shape: torch.Size) -> int:
    return shape[0] if len(shape) > 1 else 1


def _zero12_layout(originals: list[list[Tensor]], groups: list[tuple[int, list[Tensor]]]) -> Layout:
    """DeepSpeed ZeRO 1 and 2 and `BF16_Optimizer`: one flat slice a parameter group.

    The low-precision parameters of a group are views into one buffer, of which each process owns an equal slice, in
    float32. Their storage offsets say where they lie, also with `round_robin_gradients`, where DeepSpeed's own
    `_hp_mapping` is wrong.
    """
    parameters = [p for group in originals for p in group]
    numels, rows = [p.numel() for p in parameters], [_n_rows(p.shape) for p in parameters]
    process_groups = [(p._dp_group,) if hasattr(p, "_dp_group") else () for p in parameters]
    borders: list[Sequence[int]] = [()] * len(numels)
    layout = Layout(ShardingPath.ZERO_12, True, numels, process_groups, rows, borders)
    for group, local in groups:
        first = sum(map(len, originals[:group]))
        members = [(i, p) for i, p in enumerate(originals[group], first) if hasattr(p, "_dp_group")]  # not the frozen
        if not members:
            continue
        (flat,) = local
        if len({p.untyped_storage().data_ptr() for _, p in members}) != 1:
            raise RuntimeError(
                f"PRM expects the parameters of group {group} in one flat buffer of DeepSpeed ZeRO, and they are not. "
                "Use reduction='per_param', and please report the version of deepspeed."
            )
        begin = dist.get_rank(group=members[0][1]._dp_group) * flat.numel()
        segments = []
        for number, p in members:
            start = max(p.storage_offset(), begin)
            stop = min(p.storage_offset() + p.numel(), begin + flat.numel())
            if stop > start:
                segments.append(Segment(number, start - begin, stop - start, start - p.storage_offset()))
            # The slices of all processes are of one length
            borders[number] = range(flat.numel() - p.storage_offset() % flat.numel(), p.numel(), flat.numel())
        layout.add(flat, segments, [number for number, _ in members])
    layout.verify()
    return layout


def _zero3_layout(originals: list[list[Tensor]]) -> Layout:
    """DeepSpeed ZeRO 3: flat float32 sub-groups, in which this process holds its share of every tensor, padded."""
    numels, rows, process_groups, borders, by_sub_group = [], [], [], [], {}
    for number, p in enumerate(p for group in originals for p in group):
        numels.append(getattr(p, "ds_numel", p.numel()))
        rows.append(_n_rows(getattr(p, "ds_shape", p.shape)))
        borders.append(())
        zero = getattr(p, "_z3_optimizer", None)
        if zero is None or zero.get_param_id(p) not in zero.grad_position:
            process_groups.append(())
            continue
        process_group = getattr(p, "ds_process_group", None) or zero.dp_process_group
        process_groups.append((process_group,))
        sub_group, start, share = zero.grad_position[zero.get_param_id(p)]
        borders[-1] = range(share, p.ds_numel, share)
        offset = dist.get_rank(group=process_group) * share
        length = min(max(p.ds_numel - offset, 0), share)
        flat = zero.fp32_partitioned_groups_flat[sub_group]
        by_sub_group.setdefault(sub_group, (flat, []))[1].append(Segment(number, start, length, offset))
    layout = Layout(ShardingPath.ZERO_3, True, numels, process_groups, rows, borders)
    for _, (flat, segments) in sorted(by_sub_group.items()):
        layout.add(flat, [segment for segment in segments if segment.length], [segment.tensor for segment in segments])
    layout.verify()
    return layout


def _all_reduce(table: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp) -> None:
    """In place, also for a table on the CPU (offloaded state) in a process group of accelerators."""
    backend = dist.get_backend(group)
    if table.device.type == "cpu" and not any(name in backend for name in ("gloo", "mpi", "undefined")):
        device = torch.device(torch.accelerator.current_accelerator().type, torch.accelerator.current_device_index())
        moved = table.to(device)
        dist.all_reduce(moved, op=op, group=group)
        table.copy_(moved)
    else:
        dist.all_reduce(table, op=op, group=group)
