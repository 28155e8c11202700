"""Masks of sharded tensors: sums over whole units, and the variances of the units of flat buffers.

A unit is what has one mask value: a tensor with `per_tensor`, a row with `per_row`. A process may hold a part of one,
so each process has a table of all of them: 24 bytes a unit on every process, and an all-reduce of 16 bytes a unit at
each step. For the 0.5 M rows of a model of 0.5 B parameters that is 7 MB.
"""

import itertools

import torch
from torch import Tensor

from .layout import Layout, UnitRange
from .locator import Locator


Index = slice | Tensor


class UnitTable:
    """The units of some tensors, those of one tensor after the other, and sums over them.

    Args:
        counts: how many units each tensor has, by its number.
        layout: of the tensors.
        device: of the sums.
        dtype: of the sums.
    """

    def __init__(self, counts: dict[int, int], layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
        # Sorted, so that all processes have them in one order
        self.counts = {number: counts[number] for number in sorted(counts)}
        self._layout, self._device, self.dtype = layout, device, dtype
        starts = itertools.accumulate(self.counts.values(), initial=0)
        self._begin = dict(zip(self.counts, starts, strict=False))

    def __len__(self) -> int:
        return sum(self.counts.values())

    def index(self, ranges: list[UnitRange]) -> Index:
        """Where the units of `ranges` are in the table; a slice, which costs no launch, where they are in a row."""
        spans = [(self._begin[x.tensor] + x.first, x.count) for x in ranges if x.count]
        if all(begin + count == other for (begin, count), (other, _) in itertools.pairwise(spans)):
            first = spans[0][0] if spans else 0
            return slice(first, first + sum(count for _, count in spans))
        begins, counts = torch.tensor(spans, dtype=torch.int64).unbind(1)
        index = torch.arange(int(counts.sum())) + (begins - counts.cumsum(0) + counts).repeat_interleave(counts)
        return index.to(self._device)

    def whole(self, numbers: list[int]) -> Index:
        """Where all units of tensors are in the table."""
        return self.index([UnitRange(number, 0, self.counts[number]) for number in numbers])

    def per_unit(self, values: dict[int, float]) -> Tensor:
        """A value a tensor, by its number, repeated for each of its units, `(units,)`."""
        of_tensors = torch.tensor([values[number] for number in self.counts], dtype=self.dtype)
        counts = torch.tensor(list(self.counts.values()))
        return of_tensors.repeat_interleave(counts, output_size=len(self)).to(self._device)

    def add_up(self, sums: list[tuple[Index, Tensor]], width: int) -> Tensor:
        """The sums over whole units from those over shards, `(units, width)`. Collective, one all-reduce.

        Args:
            sums: of shards, with where their units are in the table, from [`index`].
        """
        table = torch.zeros(len(self), width, dtype=self.dtype, device=self._device)
        for index, values in sums:
            if isinstance(index, slice):
                table[index] += values
            else:
                table.index_add_(0, index, values)
        self._layout.all_reduce(table, list(self.counts), counts=list(self.counts.values()))
        return table


class FlatVariances:
    """`grad_var` of all units, where parameters are flat buffers, which have no place for it in their state.

    Attributes:
        tables: by reduction, float64 `(units,)` of all original tensors.
    """

    def __init__(self, locator: Locator) -> None:
        self._locator = locator
        self.tables: dict[str, Tensor] = {}
        # Tables from a checkpoint, by reduction and number of the group, until it is known where the tensors are
        self._loaded: dict[str, dict[int, Tensor]] = {}

    def load(self, reduction: str, group: int, table: Tensor) -> None:
        """Takes the units of one group over from a checkpoint's table, in which every group has those of all.

        Into the table that is there, if one is: plans step with it.

        Raises:
            ValueError: as [`place`].
        """
        self._loaded.setdefault(reduction, {})[group] = table
        if reduction in self.tables:
            self.place(reduction, self.tables[reduction].dtype)

    def saved(self, reduction: str, group: int) -> Tensor | None:
        """What a checkpoint keeps with a group, for [`load`]."""
        table = self._loaded.get(reduction, {}).get(group, self.tables.get(reduction))
        return None if table is None else table.detach().cpu().clone()

    def is_new(self, reduction: str) -> bool:
        """Whether no variances are there, nor have any been loaded."""
        return reduction not in self.tables and reduction not in self._loaded

    def unit_table(self, reduction: str, dtype: torch.dtype) -> UnitTable:
        """The units that a table has."""
        layout = self._locator.layout
        counts = {n: layout.units(n, reduction) for n in range(len(layout.numels))}
        return UnitTable(counts, layout, layout.locals[0].device, dtype)

    def place(self, reduction: str, dtype: torch.dtype) -> None:
        """Makes a table ready for a step.

        Raises:
            ValueError: what was loaded is of other tensors.
        """
        units, device = self.unit_table(reduction, dtype), self._locator.layout.locals[0].device
        if reduction not in self.tables:
            self.tables[reduction] = torch.zeros(len(units), dtype=dtype)
        table = self.tables[reduction] = self.tables[reduction].to(device)
        for group, loaded in self._loaded.pop(reduction, {}).items():
            if len(loaded) != len(table):
                raise ValueError(
                    f"The checkpoint has `grad_var` of {len(loaded)} {reduction.removeprefix('per_')}s and the "
                    f"optimizer holds {len(table)}: it belongs to another model or to other trained parameters."
                )
            own = units.whole(list(self._locator.numbers(group)))
            table[own] = loaded.to(device)[own]
