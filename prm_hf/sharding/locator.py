"""Keeps track of where an optimizer's tensors live, from its creation to the first step, when it can be known."""

import weakref
from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor

from .layout import Layout, RowSpan, find_layout, local_tensor


class Locator:
    """The parameters an optimizer was created with, and from its first step on the [`Layout`] of what it steps.

    Attributes:
        layout: None before [`Locator.locate`], and for whole tensors.
        replaced: whether whole tensors are stepped that are not the ones registered: float32 clones of DeepSpeed.
    """

    def __init__(self) -> None:
        # Weak, because FSDP2 replaces them and their memory must go.
        self._originals: list[list[weakref.ref]] = []
        self._known: dict[int, Tensor] = {}  # by id, and holding them, so that an id stays theirs
        self.layout: Layout | None = None
        self.replaced = False

    def register(self, params: list[Tensor]) -> int:
        """Takes note of a new parameter group and returns its number."""
        self._originals.append([weakref.ref(p) for p in params])
        return len(self._originals) - 1

    def locate(self, groups: list[tuple[int, list[Tensor]]]) -> None:
        """Finds the layout of the tensors that are in the numbered groups now, unless it is known. Collective then.

        Raises:
            RuntimeError: see [`find_layout`].
        """
        local = [p for _, params in groups for p in params]
        if all(id(p) in self._known for p in local):
            return
        originals = [[p for p in (ref() for ref in refs) if p is not None] for refs in self._originals]
        layout = find_layout(originals, groups)
        if layout is not None and layout.flat and self.layout is not None:
            self.layout.merge(layout)  # ZeRO 1 and 2 show one group a step
        else:
            self.layout = layout
        self._known |= {id(p): p for p in [*local, *(layout.locals if layout is not None else [])]}
        ids = {id(p) for params in originals for p in params}
        self.replaced = layout is None and any(id(p) not in ids for p in local)

    @property
    def flat(self) -> bool:
        """Whether the tensors are flat buffers in which many original tensors lie."""
        return self.layout is not None and self.layout.flat

    def slices(
        self, p: Tensor, tensors: dict[str, Tensor], split: bool
    ) -> tuple[list[int | None], dict[str, list[Tensor]]]:
        """This process' slices of tensors shaped as local tensor `p`: their original tensors' numbers; each by name.

        Without a layout there is one slice, and None for its number; a flat buffer is only taken apart with `split`.
        """
        tensors = {name: local_tensor(tensor) for name, tensor in tensors.items()}
        if split and self.flat:
            pieces = self.layout.pieces[id(p)]
            return [piece.tensor for piece in pieces], {
                name: [tensor.narrow(0, piece.start, piece.length) for piece in pieces]
                for name, tensor in tensors.items()
            }
        number = None if self.layout is None else self.members(p)[0]
        return [number], {name: [tensor] for name, tensor in tensors.items()}

    def row_slices(self, p: Tensor, tensors: dict[str, Tensor]) -> tuple[list[RowSpan], dict[str, list[Tensor]]]:
        """This process' slices of tensors shaped as local tensor `p`, held in parts, each of rows or of a part of one.

        Returns:
            Which rows of which original tensors they are of; and by name the slices, views of `(rows, elements)`.
        """
        spans: list[RowSpan] = []
        slices: dict[str, list[Tensor]] = {name: [] for name in tensors}
        tensors = {name: local_tensor(tensor) for name, tensor in tensors.items()}
        for number, start, length, offset in self.layout.pieces[id(p)]:
            in_row = max(self.layout.numels[number] // max(self.layout.rows[number], 1), 1)
            if self.flat:
                for begin, end, count in _cut_at_rows(offset, length, in_row):
                    spans.append(RowSpan(number, (offset + begin) // in_row, count))
                    for name, tensor in tensors.items():
                        part = tensor.narrow(0, start + begin, end - begin)
                        slices[name].append(part.view(count, (end - begin) // count))
            else:
                count = local_tensor(p).shape[0] if p.dim() > 1 else 1
                spans.append(RowSpan(number, offset // in_row, count))
                for name, tensor in tensors.items():
                    shape = (count, tensor.shape[1:].numel()) if p.dim() > 1 else (1, length)
                    slices[name].append(tensor.view(shape))
        return spans, slices

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

    def all_reduce(self, table: Tensor, numbers: list[int], op: dist.ReduceOp = dist.ReduceOp.SUM) -> None:
        """[`Layout.all_reduce`]; nothing for whole tensors, which every process has."""
        if self.layout is not None:
            self.layout.all_reduce(table, numbers, op)


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
