"""Keeps track of where an optimizer's tensors live, from its creation to the first step, when it can be known."""

import weakref
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from .layout import Layout, Segment, ShardingPath, UnitRange, find_layout
from .tensors import local_tensor


class Slice(NamedTuple):
    """A slice of a local tensor that lies in one original tensor.

    Attributes:
        units: which units of which tensor it holds.
        start, length: its elements in the flattened local tensor.
        shape: how a step sees it; None for the local tensor as it is.
    """

    units: UnitRange
    start: int
    length: int
    shape: tuple[int, ...] | None

    def of(self, tensor: Tensor) -> Tensor:
        """The slice of a tensor that is shaped as the local one; shares its memory."""
        tensor = local_tensor(tensor)
        if self.shape is None:
            return tensor
        if self.length == tensor.numel():
            return tensor.view(self.shape)
        return tensor.narrow(0, self.start, self.length).view(self.shape)


class FlatBuffer(NamedTuple):
    """What a flat buffer holds.

    Attributes:
        slices: as what is kept in blocks of 8 bits has them.
        shapes: rows, and elements a row, of the original tensors that it holds, or holds a part of.
    """

    slices: list[Slice]
    shapes: list[tuple[int, int]]


class Locator:
    """The parameters an optimizer was created with, and from its first step on the [`Layout`] of what it steps.

    Attributes:
        layout: of no tensors before [`Locator.locate`].
        replaced: whether whole tensors are stepped that are not the ones registered: float32 clones of DeepSpeed.
    """

    def __init__(self) -> None:
        # Weak, because FSDP2 replaces them and their memory must go.
        self._originals: list[list[weakref.ref]] = []
        self._numels: list[int] = []
        self._known: dict[int, Tensor] = {}  # by id, and holding them, so that an id stays theirs
        self.layout = Layout(path=None, flat=False, numels=[], process_groups=[])
        self.replaced = False

    def register(self, params: list[Tensor]) -> int:
        """Takes note of a new parameter group and returns its number."""
        self._originals.append([weakref.ref(p) for p in params])
        self._numels += [getattr(p, "ds_numel", p.numel()) for p in params]  # under ZeRO-3 a parameter may be empty
        return len(self._originals) - 1

    def notice(self, group: int, params: list[Tensor]) -> None:
        """Takes note of tensors that were put into a group beside those that it was registered with."""
        if not self.has_replaced(group, params):
            known = {id(ref()) for ref in self._originals[group]}
            new = [p for p in params if id(p) not in known]
            self._originals[group] += [weakref.ref(p) for p in new]
            self._numels += [p.numel() for p in new]

    def has_replaced(self, group: int, params: list[Tensor]) -> bool:
        """Whether these tensors of a group are others than those it was registered with, all of them."""
        known = {id(ref()) for ref in self._originals[group]}
        return bool(params and known) and not any(id(p) in known for p in params)

    def originals(self, group: int) -> list[Tensor]:
        """The tensors that a group was registered with, as far as they are still there."""
        return [p for p in (ref() for ref in self._originals[group]) if p is not None]

    def locate(self, groups: list[tuple[int, list[Tensor]]]) -> None:
        """Finds the layout of the tensors that are in the numbered groups now, unless it is known. Collective then.

        Whole tensors are numbered in their present order.

        Raises:
            RuntimeError: see [`find_layout`].
        """
        local = [p for _, params in groups for p in params]
        ids = [id(p) for p in local]
        if self._known.keys() >= {*ids} if self.sharded else ids == [*self._known]:
            return
        originals = [self.originals(group) for group in range(len(self._originals))]
        layout = find_layout(originals, groups)
        if layout.flat and self.flat:
            self.layout.merge(layout)  # ZeRO 1 and 2 show one group a step
        else:
            self.layout, self._known = layout, {}
        self._known |= {id(p): p for p in [*local, *layout.locals]}
        self.replaced = not self.sharded and not {*ids} <= {id(p) for params in originals for p in params}

    @property
    def sharded(self) -> bool:
        """Whether the tensors are held by FSDP or DeepSpeed ZeRO; else they are whole."""
        return self.layout.path is not None

    @property
    def flat(self) -> bool:
        """Whether the tensors are flat buffers in which many original tensors lie."""
        return self.layout.flat

    @property
    def n_parameters(self) -> int:
        """The scalar parameters of all original tensors, over all processes."""
        # Under FSDP1 an optimizer may have been given shards alone
        return sum(self.layout.numels if self.layout.path is ShardingPath.FSDP1 else self._numels)

    def slices(self, p: Tensor, by_rows: bool = False, split: bool = True, in_blocks: bool = False) -> list[Slice]:
        """This process' slices of local tensor `p`, each in one original tensor.

        Args:
            by_rows: slices are matrices of whole rows, or of a part of one row.
            split: whether a flat buffer is taken apart; else it is one slice.
            in_blocks: those of a flat buffer are such matrices whatever their units are: what is kept in blocks of 8
                bits can be cut at rows alone.
        """
        if self.flat and not split and not in_blocks:
            return [Slice(UnitRange(self.members(p)[0], 0, 1), 0, p.numel(), None)]
        segments = self.layout.segments[id(p)] or [Segment(self.members(p)[0], 0, 0)]  # a buffer of padding alone
        return [piece for segment in segments for piece in self._slices_of(p, segment, by_rows, in_blocks)]

    def _slices_of(self, p: Tensor, segment: Segment, by_rows: bool, in_blocks: bool) -> Iterator[Slice]:
        number, start, length, offset = segment
        cuts_rows = (by_rows and self.sharded) or (in_blocks and self.flat)
        if not cuts_rows or (self.flat and not length):
            units = UnitRange(number, 0, self.layout.rows[number] if by_rows and not self.sharded else 1)
            yield Slice(units, start, length, (length,) if self.flat else None)
            return
        in_row = max(self.layout.numels[number] // max(self.layout.rows[number], 1), 1)
        if not self.flat:
            local = local_tensor(p)
            count, columns = (local.shape[0], local.shape[1:].numel()) if p.dim() > 1 else (1, length)
            yield Slice(UnitRange(number, offset // in_row, count), 0, length, (count, columns))
            return
        for begin, end, count in _cut_at_rows(offset, length, in_row):
            units = UnitRange(number, (offset + begin) // in_row, count) if by_rows else UnitRange(number, 0, 1)
            yield Slice(units, start + begin, end - begin, (count, (end - begin) // count))

    def describe(self, n_whole: int) -> tuple[int, str]:
        """How many tensors are stepped, of which `n_whole` if they are whole, and how they are held, for people."""
        if not self.sharded:
            return n_whole, "as whole tensors"
        return len(set().union(*self.layout.members.values())), f"under {self.layout.path.value}"

    def numel(self, p: Tensor) -> int:
        """The elements of the original tensors that local tensor `p` holds, or holds a part of."""
        return sum(self.layout.numels[number] for number in self.members(p))

    def buffer(self, p: Tensor) -> FlatBuffer | None:
        """What local tensor `p` holds if it is a flat buffer."""
        if not self.flat:
            return None
        rows, numels = ([values[i] for i in self.members(p)] for values in (self.layout.rows, self.layout.numels))
        shapes = [(n, numel // max(n, 1)) for n, numel in zip(rows, numels, strict=True)]
        return FlatBuffer(self.slices(p, in_blocks=True), shapes)

    def members(self, p: Tensor) -> list[int]:
        """The numbers of the original tensors that advance when local tensor `p` is stepped, also from elsewhere."""
        return self.layout.members[id(p)]

    def local_tensors(self, group: int, params: list[Tensor]) -> list[Tensor]:
        """The tensors that a group steps; DeepSpeed ZeRO-3 puts them into it for the time of a step only."""
        if not self.flat:
            return params
        return [p for p in self.layout.locals if self.members(p)[0] in self.numbers(group)]

    def numbers(self, group: int) -> range:
        """The numbers of the original tensors of a group."""
        begin = sum(len(refs) for refs in self._originals[:group])
        return range(begin, begin + len(self._originals[group]))


def _cut_at_rows(offset: int, length: int, in_row: int) -> Iterator[tuple[int, int, int]]:
    """Begin, end and number of rows of what a slice of a flattened matrix is made of: a part of a row, rows, a part.

    The slice begins at element `offset` of the matrix, begin and end count from there.
    """
    begin = min(-offset % in_row, length)
    whole = (length - begin) // in_row
    end = begin + whole * in_row
    if begin:
        yield 0, begin, 1
    if whole:
        yield begin, end, whole
    if end < length:
        yield end, length, 1
