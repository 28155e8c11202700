"""Keeps track of where an optimizer's tensors live, from its creation to the first step, when it can be known."""

import weakref

import torch.distributed as dist
from torch import Tensor

from .layout import Layout, find_layout, local_tensor


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
