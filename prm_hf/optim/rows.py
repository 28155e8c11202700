"""Masks of rows of tensors that are held in parts: sums over whole rows, and their variances.

A process may hold a part of a row, so each has a table of all rows. That is 24 bytes a row on every process, and an
all-reduce of 16 bytes a row at each step: of the 0.5 M rows of a model of 0.5 B parameters, 7 MB.
"""

import itertools

import torch
from torch import Tensor

from ..sharding import Layout, Locator, RowSpan
from . import masks
from .parts import Part
from .step import row_masks
from .validation import check


class RowTables:
    """What a step and the statistics need of rows that several processes hold parts of.

    Attributes:
        variances: `grad_var` of all rows, float64 `(rows,)`, where parameters are flat buffers; else it is in the
            state of each parameter.
    """

    def __init__(self, locator: Locator) -> None:
        self._locator = locator
        self.variances: Tensor | None = None
        # Such from a checkpoint, by number of the group that it came with, until it is known which rows are whose
        self._loaded: dict[int, Tensor] = {}
        self._indices: dict[tuple, Tensor] = {}

    def check(self, numbers: range, fused: bool | None) -> None:
        """Raises ValueError where the rows of the tensors `numbers` are not known, or a kernel is asked for."""
        layout = self._locator.layout
        check(not fused, "fused", fused, f"reduction='per_row' has no kernel under {layout.path}; leave fused=None")
        for n in numbers:
            known = n >= len(layout.rows) or layout.rows[n] or not layout.numels[n]
            message = f"under {layout.path} it is not known which rows of tensor {n} a process holds; use 'per_tensor'"
            check(known, "reduction", "per_row", message)

    def load(self, group: int, variances: Tensor) -> None:
        """Takes `variances` from a checkpoint, in which every group has all of them, for the rows of one group."""
        self._loaded[group] = variances

    @property
    def is_new(self) -> bool:
        """Whether no variances are there, nor have any been loaded."""
        return self.variances is None and not self._loaded

    def place(self, layout: Layout) -> None:
        """Makes `variances` of flat buffers ready for a step.

        Raises:
            ValueError: what was loaded is of other tensors.
        """
        device, rows = layout.locals[0].device, sum(layout.rows)
        if self.variances is None:
            self.variances = torch.zeros(rows, dtype=masks.statistics_dtype(device))
        self.variances = self.variances.to(device)
        for group, table in self._loaded.items():
            if len(table) != rows:
                raise ValueError(
                    f"The checkpoint has `grad_var` of {len(table)} rows and the optimizer's tensors have {rows}: it "
                    "belongs to another model or to other trained parameters."
                )
            mine = self._locator.numbers(group)
            begin, end = sum(layout.rows[: mine.start]), sum(layout.rows[: mine.stop])
            self.variances[begin:end] = table[begin:end].to(device)
        self._loaded.clear()

    def decide(self, parts: list[Part], sums: list[Tensor | None]) -> dict[int, Tensor]:
        """From the sums over slices of [`ListStep.moments`], by position of each part of rows in parts: q of each row
        of its slices. Collective, one all-reduce for all of them."""
        in_rows = {i: part for i, part in enumerate(parts) if part.in_rows}
        if not in_rows:
            return {}
        layout = self._locator.layout
        numbers = sorted({number for part in in_rows.values() for number in part.tensors})
        device = next(iter(in_rows.values())).device
        table = self.add_up(numbers, [(part.spans, sums[i]) for i, part in in_rows.items()], 2, device)
        qs = {}
        for i, part in in_rows.items():
            whole = [RowSpan(number, 0, layout.rows[number]) for number in part.tensors]
            counts = [(layout.rows[n], layout.numels[n] // max(layout.rows[n], 1)) for n in part.tensors]
            grad_vars, steps = ([values[j] for values in part.tensors.values()] for j in (1, 2))
            q = row_masks(table[self._index(whole, numbers, device)], counts, grad_vars, steps, part.hyper)
            qs[i] = q[self._index(part.spans, list(part.tensors), device)]
        return qs

    def add_up(
        self, numbers: list[int], sums: list[tuple[list[RowSpan], Tensor | None]], width: int, device: torch.device
    ) -> Tensor:
        """Sums over rows of slices, `(rows of the spans, width)`, to those over the rows of tensors. Collective.

        Returns:
            float64, `(all rows, width)`: the rows of the tensors `numbers`, one tensor after the other.
        """
        counts = [self._locator.layout.rows[number] for number in numbers]
        table = torch.zeros(sum(counts), width, dtype=masks.statistics_dtype(device), device=device)
        for spans, x in sums:
            if spans:
                table.index_add_(0, self._index(spans, numbers, device), x)
        self._locator.layout.all_reduce(table, numbers, counts=counts)
        return table

    def _index(self, spans: list[RowSpan], numbers: list[int], device: torch.device) -> Tensor:
        """Where the rows of `spans` are among all rows of the tensors `numbers`; kept, as they are at each step."""
        key = (device, tuple(spans), tuple(numbers))
        if key not in self._indices:
            begins = itertools.accumulate((self._locator.layout.rows[number] for number in numbers), initial=0)
            begin = dict(zip(numbers, begins, strict=False))
            pieces = [torch.arange(x.count) + begin[x.tensor] + x.first for x in spans]
            self._indices[key] = torch.cat([torch.zeros(0, dtype=torch.int64), *pieces]).to(device)
        return self._indices[key]
