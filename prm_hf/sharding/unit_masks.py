"""Masks of sharded tensors: sums over whole units, and the variances of the units of flat buffers.

A unit is what has one mask value: a tensor with `per_tensor`, a row with `per_row`. A process keeps 24 bytes of each
unit that it holds something of. What it holds whole it decides on by itself; an all-reduce of 16 bytes a unit at each
step adds up those that a border between two processes cuts. Which these are follows from sizes that all processes know
(see [`Layout.cut_units`]), so nobody has to say so.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from .layout import Layout, UnitRange
from .locator import Locator


Index = slice | Tensor


class UnitTable:
    """The units of some tensors that this process holds, those of one tensor after the other, and sums over them.

    Args:
        reductions: of each tensor, by its number, `"per_tensor"` or `"per_row"`.
        layout: of the tensors.
        device: of the sums.
        dtype: of the sums.

    Attributes:
        held: the units, by the number of their tensor.
    """

    def __init__(self, reductions: dict[int, str], layout: Layout, device: torch.device, dtype: torch.dtype) -> None:
        # Sorted, so that all processes have them in one order
        self._reductions = {number: reductions[number] for number in sorted(reductions)}
        self._layout, self._device, self.dtype = layout, device, dtype
        self.held = {number: layout.held_units(number, x) for number, x in self._reductions.items()}
        counts = [units.count for units in self.held.values()]
        self._begin = dict(zip(self.held, itertools.accumulate(counts, initial=0), strict=False))
        self._length = sum(counts)
        cut = {number: layout.cut_units(number, x) for number, x in self._reductions.items()}
        self._n_cut = [sum(units.count for units in ranges) for ranges in cut.values()]
        self._cut_here, self._cut_there = self._places(itertools.chain(*cut.values()))

    def __len__(self) -> int:
        return self._length

    def _places(self, ranges: Iterable[UnitRange]) -> tuple[Index, Index]:
        """Of the units of `ranges` that are in the table, where they are in it, and where among those of `ranges`."""
        here, there, before = [], [], 0
        for tensor, first, count in ranges:
            held = self.held[tensor]
            begin, end = max(first, held.first), min(first + count, held.first + held.count)
            here.append((self._begin[tensor] + begin - held.first, max(end - begin, 0)))
            there.append((before + begin - first, max(end - begin, 0)))
            before += count
        return self._index(here), self._index(there)

    def _index(self, spans: list[tuple[int, int]]) -> Index:
        """Spans of rows, each a begin and a count; a slice, which costs no launch, where they are in a row."""
        spans = [(begin, count) for begin, count in spans if count]
        if all(begin + count == other for (begin, count), (other, _) in itertools.pairwise(spans)):
            first = spans[0][0] if spans else 0
            return slice(first, first + sum(count for _, count in spans))
        begins, counts = torch.tensor(spans, dtype=torch.int64).unbind(1)
        index = torch.arange(int(counts.sum())) + (begins - counts.cumsum(0) + counts).repeat_interleave(counts)
        return index.to(self._device)

    def index(self, ranges: list[UnitRange]) -> Index:
        """Where the units of `ranges`, all of which are held, are in the table."""
        return self._index([(self._begin[x.tensor] + x.first - self.held[x.tensor].first, x.count) for x in ranges])

    def of_tensors(self, numbers: list[int]) -> Index:
        """Where the held units of tensors are in the table."""
        return self.index([self.held[number] for number in numbers])

    def owned(self) -> Index:
        """Where the units that this process speaks for are in the table."""
        return self.index(self._owned())

    def _owned(self) -> list[UnitRange]:
        return [self._layout.owned_units(number, reduction) for number, reduction in self._reductions.items()]

    def _among_all(self, ranges: list[UnitRange]) -> Index:
        """Where units are among all units of the table's tensors, which other processes hold as well."""
        counts = (self._layout.units(number, reduction) for number, reduction in self._reductions.items())
        begin = dict(zip(self.held, itertools.accumulate(counts, initial=0), strict=False))
        return self._index([(begin[x.tensor] + x.first, x.count) for x in ranges])

    def gather(self, values: Tensor) -> Tensor:
        """Values of all units of the table's tensors, `(all units,)`, from those of the held ones. Collective."""
        counts = [self._layout.units(number, reduction) for number, reduction in self._reductions.items()]
        table = torch.zeros(sum(counts), 1, dtype=values.dtype, device=values.device)
        table[self._among_all(self._owned()), 0] = values[self.owned()]
        self._layout.all_reduce(table, list(self.held), counts=counts)
        return table[:, 0]

    def take(self, values: Tensor) -> Tensor:
        """The values of the held units, `(units,)`, from those of all units of the table's tensors."""
        return values[self._among_all([*self.held.values()])]

    def per_unit(self, values: dict[int, float]) -> Tensor:
        """A value a tensor, by its number, repeated for each of its units, `(units,)`."""
        of_tensors = torch.tensor([values[number] for number in self.held], dtype=self.dtype)
        counts = torch.tensor([units.count for units in self.held.values()], dtype=torch.int64)
        return of_tensors.repeat_interleave(counts, output_size=len(self)).to(self._device)

    def add_up(self, sums: list[tuple[Index, Tensor]], width: int) -> Tensor:
        """The sums over whole units from those over shards, `(units, width)`.

        Collective where a unit of the tensors is cut, whether or not this process holds a part of it: one all-reduce.

        Args:
            sums: of shards, with where their units are in the table, from [`index`].
        """
        table = torch.zeros(len(self), width, dtype=self.dtype, device=self._device)
        for index, values in sums:
            if isinstance(index, slice):
                table[index] += values
            else:
                table.index_add_(0, index, values)
        if n_cut := sum(self._n_cut):
            cut = torch.zeros(n_cut, width, dtype=self.dtype, device=self._device)
            cut[self._cut_there] = table[self._cut_here]
            self._layout.all_reduce(cut, list(self.held), counts=self._n_cut)
            table[self._cut_here] = cut[self._cut_there]
        return table


class FlatVariances:
    """`grad_var` of the units that flat buffers hold, which have no place for it in their state.

    Attributes:
        tables: by id of a flat buffer, float64 `(units,)`: those that this process holds something of.
    """

    def __init__(self, locator: Locator) -> None:
        self._locator = locator
        self.tables: dict[int, Tensor] = {}
        self._reductions: dict[int, str] = {}  # of the tables
        # From a checkpoint, by reduction and number of the group, until it is known where they are, with whether they
        # are of all units
        self._loaded: dict[str, dict[int, tuple[Tensor, bool]]] = {}

    def load(self, reduction: str, group: int, table: Tensor, is_whole: bool) -> None:
        """Takes the units of one group over from a checkpoint: of all groups, or what this process held of the group.

        Into the tables that are there, if there are: plans step with them.

        Raises:
            ValueError: as [`place`].
        """
        self._loaded.setdefault(reduction, {})[group] = table, is_whole
        there = [self.tables[id(flat)] for flat in self._flats(group) if id(flat) in self.tables]
        if there:
            self.place(reduction, group, there[0].dtype)

    def whole(self, reduction: str) -> Tensor | None:
        """`grad_var` of all units of all tensors; None where there is none. Collective."""
        flats = [flat for flat in self._locator.layout.locals if self._reductions.get(id(flat)) == reduction]
        if not flats:
            return None
        units = self._units(reduction, flats[0].device, self.tables[id(flats[0])].dtype)
        values = torch.zeros(len(units), dtype=units.dtype, device=flats[0].device)
        for flat in flats:
            values[units.of_tensors(self._locator.members(flat))] = self.tables[id(flat)]
        return units.gather(values).cpu()

    def saved(self, reduction: str, group: int, whole: Tensor | None) -> tuple[Tensor | None, bool]:
        """What a checkpoint keeps with a group, for [`load`], and whether it is of all units."""
        if group in self._loaded.get(reduction, {}):
            table, is_whole = self._loaded[reduction][group]
            return table.detach().cpu().clone(), is_whole
        if whole is None or self._locator.layout.is_first():
            return whole, True
        flats = [flat for flat in self._flats(group) if self._reductions.get(id(flat)) == reduction]
        held = [self.tables[id(flat)] for flat in flats]
        return (torch.cat(held).cpu() if held else None), False

    def are_new(self, reduction: str, group: int) -> bool:
        """Whether no variances of a group are there, nor have any been loaded."""
        is_there = any(id(flat) in self.tables for flat in self._flats(group))
        return not is_there and group not in self._loaded.get(reduction, {})

    def place(self, reduction: str, group: int, dtype: torch.dtype) -> None:
        """Makes the tables of a group's flat buffers ready for a step.

        Raises:
            ValueError: what was loaded is of other tensors.
        """
        flats = self._flats(group)
        if not flats:  # a group without trained tensors
            return
        loaded, is_whole = self._loaded.get(reduction, {}).pop(group, (None, False))
        for flat in flats:
            if id(flat) in self.tables:  # it may have been offloaded in between
                self.tables[id(flat)] = self.tables[id(flat)].to(flat.device)
        if loaded is None and all(id(flat) in self.tables for flat in flats):
            return
        layout, members = self._locator.layout, [self._locator.members(flat) for flat in flats]
        counts = [sum(layout.held_units(number, reduction).count for number in own) for own in members]
        n_units = sum(counts)
        if is_whole:
            n_units = sum(layout.units(number, reduction) for number in range(len(layout.numels)))
        if loaded is not None and len(loaded) != n_units:
            raise ValueError(
                f"The checkpoint has `grad_var` of {len(loaded)} {reduction.removeprefix('per_')}s and the optimizer "
                f"holds {n_units}: it belongs to another model, to other trained parameters or to another process."
            )
        if is_whole:
            units = self._units(reduction, flats[0].device, dtype)
            held = units.take(loaded.to(flats[0].device))
            parts = [held[units.of_tensors(own)] for own in members]
        else:
            parts = (torch.zeros(n_units, dtype=dtype) if loaded is None else loaded).split(counts)
        for flat, part in zip(flats, parts, strict=True):
            self._reductions[id(flat)] = reduction
            if loaded is not None or id(flat) not in self.tables:
                # In place, where plans step with it
                table = self.tables.setdefault(id(flat), torch.empty_like(part, dtype=dtype, device=flat.device))
                table.copy_(part)

    def _units(self, reduction: str, device: torch.device, dtype: torch.dtype) -> UnitTable:
        """The units of all tensors."""
        numbers = range(len(self._locator.layout.numels))
        return UnitTable(dict.fromkeys(numbers, reduction), self._locator.layout, device, dtype)

    def _flats(self, group: int) -> list[Tensor]:
        return self._locator.local_tensors(group, [])
