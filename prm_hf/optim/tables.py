"""Masks of tensors and of rows that are held in parts: sums over the whole of them, and their variances.

A unit is what has one q: a tensor with `per_tensor`, a row with `per_row`. A process may hold a part of one, so each
has a table of all of them: 24 bytes a unit on every process, and an all-reduce of 16 bytes a unit at each step. Of the
0.5 M rows of a model of 0.5 B parameters that is 7 MB.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..sharding import Locator, RowSpan
from . import masks
from .parts import Part
from .step import row_masks, tensor_masks
from .validation import check


class Tables:
    """What a step and the statistics need of tensors that several processes hold parts of.

    Attributes:
        variances: by reduction, `grad_var` of the units of all tensors, float64 `(units,)`, where parameters are flat
            buffers; else it is in the state of each parameter.
    """

    def __init__(self, locator: Locator) -> None:
        self._locator = locator
        self.variances: dict[str, Tensor] = {}
        # Such from a checkpoint, by reduction and number of the group, until it is known where the tensors are
        self._loaded: dict[str, dict[int, Tensor]] = {}
        self._indices: dict[tuple, Tensor] = {}

    def check_rows(self, numbers: range) -> None:
        """Raises ValueError where the rows of the tensors `numbers` are not known."""
        layout = self._locator.layout
        for n in numbers:
            known = n >= len(layout.rows) or layout.rows[n] or not layout.numels[n]
            message = f"under {layout.path} it is not known which rows of tensor {n} a process holds; use 'per_tensor'"
            check(known, "reduction", "per_row", message)

    def load(self, reduction: str, group: int, variances: Tensor) -> None:
        """Takes `variances` from a checkpoint, in which every group has all of them, for the units of one group.

        Into the table that is there, if one is: plans step with it.

        Raises:
            ValueError: as [`place`].
        """
        self._loaded.setdefault(reduction, {})[group] = variances
        if reduction in self.variances:
            self.place(reduction)

    def saved(self, reduction: str, group: int) -> Tensor | None:
        """What a checkpoint keeps with a group, for [`load`]."""
        table = self._loaded.get(reduction, {}).get(group, self.variances.get(reduction))
        return None if table is None else table.detach().cpu().clone()

    def is_new(self, reduction: str) -> bool:
        """Whether no variances are there, nor have any been loaded."""
        return reduction not in self.variances and reduction not in self._loaded

    def only(self) -> Tensor | None:
        """`variances` where those of one reduction are there alone."""
        return next(iter(self.variances.values())) if len(self.variances) == 1 else None

    def place(self, reduction: str) -> None:
        """Makes `variances` of flat buffers ready for a step.

        Raises:
            ValueError: what was loaded is of other tensors.
        """
        layout = self._locator.layout
        device, units = layout.locals[0].device, self.units(range(len(layout.numels)), reduction == "per_row")
        units = list(units.values())
        if reduction not in self.variances:
            self.variances[reduction] = torch.zeros(sum(units), dtype=masks.statistics_dtype(device))
        variances = self.variances[reduction] = self.variances[reduction].to(device)
        for group, table in self._loaded.pop(reduction, {}).items():
            if len(table) != len(variances):
                raise ValueError(
                    f"The checkpoint has `grad_var` of {len(table)} {reduction.removeprefix('per_')}s and the "
                    f"optimizer holds {len(variances)}: it belongs to another model or to other trained parameters."
                )
            mine = self._locator.numbers(group)
            begin, end = sum(units[: mine.start]), sum(units[: mine.stop])
            variances[begin:end] = table[begin:end].to(device)

    def in_rows(self, group: dict[str, Any]) -> bool:
        """Whether a group's masks are of rows of tensors that are held in parts."""
        return group["mask"] != "none" and group["reduction"] == "per_row" and self._locator.layout is not None

    def advancing(self, p: Tensor, state: dict[str, Tensor], in_rows: bool) -> dict[int, tuple[int, Tensor, Tensor]]:
        """By number of each original tensor that advances with local tensor `p`: elements, `grad_var`, `step`.

        For `per_tensor`, and for rows, of which `grad_var` has all of a tensor. `state` is that of `p`.
        """
        members, numels = self._locator.members(p), self._locator.layout.numels
        if not self._locator.flat:
            return {n: (numels[n], state["grad_var"], state["step"]) for n in members}
        rows = self._locator.layout.rows
        variances = self.variances["per_row"].split(rows) if in_rows else self.variances["per_tensor"].unbind()
        return {n: (numels[n], variances[n], state["step"]) for n in members}

    def decide(self, parts: list[Part], sums: list[Tensor | None]) -> list[Tensor | None]:
        """From the sums over slices of [`ListStep.moments`], of each part: q of each slice, or of each of its rows.

        None for parts that decide on their masks. Collective, one all-reduce for all of them.
        """
        held = [(part, x) for part, x in zip(parts, sums, strict=True) if part.tensors]
        if not held:
            return [None] * len(parts)
        units = {n: count for part, _ in held for n, count in self.units(part.tensors, part.in_rows).items()}
        units = {number: units[number] for number in sorted(units)}  # as other processes have them
        device = held[0][0].device
        table = self.add_up(units, [(part.spans, x) for part, x in held], 2, device)
        return [self._decide(part, table, units) if part.tensors else None for part in parts]

    def _decide(self, part: Part, table: Tensor, units: dict[int, int]) -> Tensor:
        own = self.units(part.tensors, part.in_rows)
        whole = [RowSpan(number, 0, count) for number, count in own.items()]
        sums = table[self._index(whole, units, table.device)]
        numels, grad_vars, steps = map(list, zip(*part.tensors.values(), strict=True))
        if part.in_rows:
            counts = [(count, n // max(count, 1)) for n, count in zip(numels, own.values(), strict=True)]
            q = row_masks(sums, counts, grad_vars, steps, part.hyper)
        else:
            q = tensor_masks(sums, numels, grad_vars, steps, part.hyper)
        return q[self._index(part.spans, own, table.device)]

    def add_up(
        self,
        units: dict[int, int],
        sums: list[tuple[list[RowSpan], Tensor | None]],
        width: int,
        device: torch.device,
    ) -> Tensor:
        """Sums over units of slices, `(units of the spans, width)`, to those over whole units. Collective.

        Args:
            units: how many units each tensor has, by its number.

        Returns:
            float64, `(all units, width)`: those of one tensor after the other.
        """
        table = torch.zeros(sum(units.values()), width, dtype=masks.statistics_dtype(device), device=device)
        for spans, x in sums:
            if spans:
                table.index_add_(0, self._index(spans, units, device), x)
        self._locator.layout.all_reduce(table, list(units), counts=list(units.values()))
        return table

    def units(self, numbers: Iterable[int], in_rows: bool) -> dict[int, int]:
        """How many units each of the tensors `numbers` has."""
        return {number: self._locator.layout.rows[number] if in_rows else 1 for number in numbers}

    def _index(self, spans: list[RowSpan], units: dict[int, int], device: torch.device) -> Tensor:
        """Where the units of `spans` are among all `units`; kept, as the host would wait for the device."""
        key = (device, tuple(spans), tuple(units.items()))
        if key not in self._indices:
            self._indices[key] = places(spans, begins(units)).to(device)
        return self._indices[key]


def begins(units: dict[int, int]) -> dict[int, int]:
    """Where the units of each tensor begin, of those of one tensor after the other."""
    return dict(zip(units, itertools.accumulate(units.values(), initial=0), strict=False))


def places(spans: list[RowSpan], begin: dict[int, int]) -> Tensor:
    """Where the units of `spans` are, int64, on the CPU, if those of each tensor `begin` there."""
    pieces = [torch.arange(x.count) + begin[x.tensor] + x.first for x in spans]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *pieces])
