"""What a plan is made of: lists of tensors that one implementation can take, their steps, and the masks of units."""

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sharding import FlatVariances, Locator, UnitTable, is_dtensor, is_fake, local_tensors
from . import masks
from .foreach import ForeachStep, TensorLists
from .quantized import read, write
from .reference import reference_step


if TYPE_CHECKING:
    from .plan import Settings

_GRAD, _DTYPE, _IS_SPARSE = map(operator.attrgetter, ("grad", "dtype", "is_sparse"))
_STATE = {
    "exp_avgs": "exp_avg",
    "exp_avg_sqs": "exp_avg_sq",
    "max_exp_avg_sqs": "max_exp_avg_sq",
    "grad_vars": "grad_var",
    "exp_avg_signals": "exp_avg_signal",
}


@dataclass
class Member:
    """A local tensor with a gradient.

    Attributes:
        numel: elements of the tensors that it holds, or holds a part of.
        position: among the members of a plan.
        cohort, place: see [`Clock`], which sets them.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    settings: "Settings"
    numel: int
    position: int
    cohort: int = -1
    place: int = -1


def _share(members: list[Member], name: str) -> Tensor:
    """Makes a state of each member, 0-dim or a vector, a part of one vector, which is returned."""
    tensors = [member.state[name] for member in members]
    shared = torch.cat([x.view(-1) for x in tensors])
    for member, x, part in zip(members, tensors, shared.split([x.numel() for x in tensors]), strict=True):
        member.state[name] = part.view(x.shape)
    return shared


class Clock:
    """Counts the steps of a plan's members.

    Members of one parameter group that have taken equally many steps are a cohort: the scalars of a step are computed
    once for all of them. With `capturable` no value may decide, so a group is a cohort. Tensors of a few elements are
    in cohorts of their own.

    Attributes:
        settings: of each cohort.
    """

    def __init__(self, members: list[Member]) -> None:
        by_device: dict[torch.device, list[Member]] = {}
        for member in members:
            by_device.setdefault(member.state["step"].device, []).append(member)
        shared = {device: _share(own, "step") for device, own in by_device.items()}
        self._host = shared.pop(torch.device("cpu"), torch.zeros(0))
        self._expected = self._host.clone()
        self._on_devices = list(shared.values())
        self.settings: list[Settings] = []
        self._ages: list[float | None] = []
        self._steps: list[list[Tensor]] = []
        self._numels: list[int] = []  # of one member
        found: dict[tuple, int] = {}
        for member in members:
            step, capturable = member.state["step"], member.settings.h.capturable
            age = None if capturable else 0.0 if is_fake(step) else step.item()
            is_open = member.settings.h.is_open(member.numel)
            member.cohort = found.setdefault((id(member.settings), age, is_open), len(found))
            if member.cohort == len(self._ages):
                self._ages.append(age)
                self._steps.append([])
                self._numels.append(member.numel)
                self.settings.append(member.settings)
            member.place = len(self._steps[member.cohort])
            self._steps[member.cohort].append(step)

    def is_unchanged(self) -> bool:
        """Whether nobody else has changed the steps, as far as the host can see without waiting."""
        return is_fake(self._host) or torch.equal(self._host, self._expected)

    def advance(self) -> list[masks.StepScalars]:
        """Counts a step, and returns the scalars of each cohort: numbers, or with `capturable` vectors."""
        self._host += 1
        self._expected += 1
        for steps in self._on_devices:
            steps += 1
        self._ages = [age if age is None else age + 1 for age in self._ages]
        ages = [self._tensor(i) if age is None else age for i, age in enumerate(self._ages)]
        cohorts = zip(ages, self.settings, self._numels, strict=True)
        return [masks.step_scalars(age, settings.h, numel) for age, settings, numel in cohorts]

    def _tensor(self, cohort: int) -> Tensor:
        steps = torch.stack(self._steps[cohort])
        return steps.to(masks.statistics_dtype(steps.device))

    def undo(self, found_inf: Tensor) -> None:
        """Takes a step back where it was skipped, which is where `found_inf` is 1."""
        for steps in self._on_devices:
            steps -= found_inf.to(steps.device)
        if len(self._host):
            skipped = int(found_inf.item())
            self._host -= skipped
            self._expected -= skipped


class UnitMasks:
    """The masks that are decided between the halves of a step, all with one all-reduce.

    Args:
        members: whose masks these are.
        locator: where their tensors live.
        variances: `grad_var` of flat buffers.
        device: of the members.

    Attributes:
        table: the units.
        q: the last masks of the units, float64 `(units,)`; None before the first step.
    """

    def __init__(
        self, members: list[Member], locator: Locator, variances: FlatVariances, device: torch.device
    ) -> None:
        self.q: Tensor | None = None
        layout, dtype = locator.layout, masks.statistics_dtype(device)
        counts, numels, numbers = {}, {}, {}
        for member in members:
            p, reduction = member.param, member.settings.h.reduction
            # A whole tensor goes by its position
            numbers[member.position] = [member.position] if layout is None else locator.members(p)
            for number in numbers[member.position]:
                rows = masks.n_rows(p) if reduction == "per_row" else 1
                counts[number] = rows if layout is None else layout.units(number, reduction)
                numels[number] = p.numel() if layout is None else layout.numels[number]
        self.table = UnitTable(counts, layout, device, dtype)
        in_unit = {number: max(numels[number] // max(count, 1), 1) for number, count in counts.items()}
        self._numels = self.table.per_unit(in_unit).unsqueeze(1)
        self._flat = variances.tables if locator.flat else {}
        self._cohorts = []
        by_cohort: dict[int, list[Member]] = {}
        for member in members:
            by_cohort.setdefault(member.cohort, []).append(member)
        for cohort, own in by_cohort.items():
            h, of_cohort = own[0].settings.h, [number for member in own for number in numbers[member.position]]
            if locator.flat:
                kept = self._flat[h.reduction], variances.unit_table(h.reduction, dtype).whole(of_cohort)
            else:
                kept = _share(own, "grad_var"), slice(None)
            # With capturable, where in the cohort's vectors the scalars of each unit are
            places = [m.place for m in own for n in numbers[m.position] for _ in range(counts[n])]
            places = torch.tensor(places, device=device) if h.capturable else None
            units = self.table.whole(of_cohort)
            # In a flat buffer tensors of a few elements lie beside others
            is_open = {number: h.is_open(n) for number, n in numels.items()} if locator.flat else None
            is_open = None if is_open is None else self.table.per_unit(is_open).bool()[units]
            self._cohorts.append((cohort, own[0].settings, units, places, is_open, *kept))

    def is_unchanged(self) -> bool:
        """Whether the variances of flat buffers are still where they were."""
        tables = {id(table) for table in self._flat.values()}
        return not self._flat or all(id(variances) in tables for *_, variances, _ in self._cohorts)

    def decide(
        self,
        sums: list[tuple[slice | Tensor, Tensor]],
        scalars: list[masks.StepScalars],
        transform: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """The masks from Σ(g - center)² and Σm² of shards, `(units, 2)`; advances the variances. Collective."""
        means = self.table.add_up(sums, 2) / self._numels
        self.q = torch.empty_like(means[:, 0])
        for cohort, settings, units, places, is_open, variances, kept in self._cohorts:
            c = scalars[cohort]
            if places is not None:
                c = masks.StepScalars(*(x[places] for x in c))
            if is_open is not None:
                c = c._replace(open=is_open | c.open)
            self.q[units], variances[kept] = masks.advance_units(means[units], variances[kept], c, settings.h)
        if transform is not None:
            self.q = transform(self.q)
        return self.q


class PlanList:
    """Members that one implementation can take.

    Args:
        members: of one device and dtype.
        locator: where their tensors live.
        unit_masks: if masks are decided between the halves of a step.

    Attributes:
        units: where the units of the slices are in the table of `unit_masks`.
        sums: what the first half has found for these units.
    """

    def __init__(self, members: list[Member], locator: Locator, unit_masks: UnitMasks | None, tables: dict) -> None:
        self.members, self.settings, self.unit_masks = members, members[0].settings, unit_masks
        self.sums: Tensor | None = None
        self._params = [member.param for member in members]
        self._sharded = any(map(is_dtensor, self._params))
        self._grad_dtype = members[0].grad.dtype
        # Those of shards that hold nothing may stay None
        self._empty = {i: m.grad for i, m in enumerate(members) if m.param.grad is None}
        halves, h = unit_masks is not None, self.settings.h
        needed = {
            "max_exp_avg_sqs": h.amsgrad,
            "grad_vars": h.masked and not halves,
            "exp_avg_signals": h.masked and h.signal_beta is not None,
        }
        self._names = [name for name in _STATE if needed.get(name, True)]
        by_rows = halves and h.reduction == "per_row"
        self.slices = [
            (i, piece) for i, p in enumerate(self._params) for piece in locator.slices(p, by_rows, split=halves)
        ]
        if halves and locator.layout is None:
            self.units = unit_masks.table.whole([member.position for member in members])
        elif halves:
            self.units = unit_masks.table.index([piece.units for _, piece in self.slices])
        self._watched = self._params
        if locator.layout is not None:  # a library that shards may exchange storages
            self._watched = [*self._params, *(m.state[_STATE[name]] for name in self._names for m in members)]
        self._addresses = self._find()

    def _find(self) -> list[int]:
        if any(map(is_fake, self._params)):
            return []
        return list(map(Tensor.data_ptr, local_tensors(self._watched) if self._sharded else self._watched))

    def take_gradients(self) -> bool:
        """Takes the present gradients; False if they or the tensors are not as they were."""
        if self._find() != self._addresses:
            return False
        # What is asked of each tensor is asked in C: with LoRA this takes longer than the kernel.
        grads = list(map(_GRAD, self._params))
        for i, empty in self._empty.items():
            grads[i] = empty if grads[i] is None else grads[i]
        if any(map(operator.is_, grads, itertools.repeat(None))):
            return False
        if self._sharded:
            grads = local_tensors(grads)
        if set(map(_DTYPE, grads)) != {self._grad_dtype} or any(map(_IS_SPARSE, grads)):
            return False
        self.set_gradients(grads)
        return True

    def slices_of(self, tensors: list[Tensor]) -> list[Tensor]:
        """The slices of tensors that are shaped as the members."""
        return [piece.of(tensors[i]) for i, piece in self.slices]

    def tensor_lists(self) -> TensorLists:
        """The slices of the members' tensors, without gradients."""
        lists = TensorLists(*([] for _ in TensorLists._fields))._replace(params=self.slices_of(self._params))
        states = {name: [member.state[_STATE[name]] for member in self.members] for name in self._names}
        return lists._replace(**{name: self.slices_of(tensors) for name, tensors in states.items()})


class ReferenceList(PlanList):
    """Whole tensors of a group, which are stepped one after the other."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.set_gradients([member.grad for member in self.members])

    def set_gradients(self, grads: list[Tensor]) -> None:
        self._grads = grads

    def drop_gradients(self) -> None:
        self._grads = []

    def whole_step(self, scalars: list[masks.StepScalars], grad_scale=None, found_inf=None) -> None:
        s = self.settings
        for member, grad in zip(self.members, self._grads, strict=True):
            c = scalars[member.cohort]
            c = c.select(member.place) if s.h.capturable else c
            dtype = member.state["exp_avg_sq"].dtype
            param = read(member.param, dtype)
            reference_step(param, read(grad, dtype), member.state, c, s.h, s.lr, s.eps)
            write(member.param, param)


class ForeachList(PlanList):
    """Slices that the multi-tensor implementation takes, of one group."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        h = self.settings.h
        lists = self.tensor_lists()
        self._step = ForeachStep(lists, h, halves=self.unit_masks is not None, one_by_one=h.foreach is False)
        self.set_gradients(local_tensors([member.grad for member in self.members]))

    def set_gradients(self, grads: list[Tensor]) -> None:
        # Slices are views, which only contiguous gradients have
        grads = [g.contiguous() if p.is_contiguous() else g for p, g in zip(self._params, grads, strict=True)]
        self._step.set_grads(self.slices_of(grads))

    def drop_gradients(self) -> None:
        self._step.set_grads([])

    def _scalars(self, scalars: list[masks.StepScalars]) -> masks.StepScalars:
        """The scalars of each slice, as lists."""
        own = [(self.members[i].cohort, self.members[i].place) for i, _ in self.slices]
        lists = {}
        for cohort in {cohort for cohort, _ in own}:
            size = 1 + max((place for other, place in own if other == cohort), default=0)
            lists[cohort] = [x.unbind() if isinstance(x, Tensor) else [x] * size for x in scalars[cohort]]
        fields = range(len(masks.StepScalars._fields))
        return masks.StepScalars(*([lists[cohort][field][place] for cohort, place in own] for field in fields))

    def first_half(self, scalars: list[masks.StepScalars]) -> None:
        self.sums = self._step.sums(self._scalars(scalars))

    def second_half(self, scalars: list[masks.StepScalars], q: Tensor) -> None:
        self._step.update(self._scalars(scalars), self.settings.lr, self.settings.eps, q)

    def whole_step(self, scalars: list[masks.StepScalars], grad_scale=None, found_inf=None) -> None:
        self._step.update(self._scalars(scalars), self.settings.lr, self.settings.eps)
