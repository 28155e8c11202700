"""What a plan is made of: lists of tensors that one implementation can take, their steps, and the masks of units."""

import itertools
import operator
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..sharding import FlatVariances, Locator, UnitRange, UnitTable, is_dtensor, is_fake, local_tensors, with_local
from . import masks
from .foreach import ForeachStep, TensorLists
from .quantized import Quantized, is_quantized, moment_of, read, slices_of, write
from .reference import reference_step
from .state import STATE_KEYS


if TYPE_CHECKING:
    from .plan import Settings

_GRAD, _DTYPE, _IS_SPARSE = map(operator.attrgetter, ("grad", "dtype", "is_sparse"))


@dataclass
class Member:
    """A local tensor with a gradient.

    Attributes:
        numel: elements of the tensors that it holds, or holds a part of.
        cohort, place: see [`Clock`], which sets them.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    settings: "Settings"
    numel: int
    cohort: int = -1
    place: int = -1


def _share(places: list[tuple[dict, Any]]) -> Tensor:
    """Makes tensors of up to one dimension, each a value of a dict by its key, parts of one vector; returns that."""
    tensors = local_tensors([own[key] for own, key in places])
    shared = torch.cat([x.view(-1) for x in tensors])
    for (own, key), x, part in zip(places, tensors, shared.split([x.numel() for x in tensors]), strict=True):
        own[key] = with_local(own[key], part.view(x.shape))
    return shared


class Clock:
    """Counts the steps of a plan's members.

    Members of one parameter group that have taken equally many steps are a cohort: the scalars of a step are computed
    once for all of them. With `capturable` no value may decide, so a group is a cohort. Tensors of a few elements are
    in cohorts of their own.
    """

    def __init__(self, members: list[Member]) -> None:
        by_device: dict[torch.device, list[Member]] = {}
        for member in members:
            by_device.setdefault(member.state["step"].device, []).append(member)
        shared = {device: _share([(x.state, "step") for x in own]) for device, own in by_device.items()}
        self._host = shared.pop(torch.device("cpu"), torch.zeros(0))
        self._expected = self._host.clone()
        self._on_devices = list(shared.values())
        cohorts: dict[tuple, list[Member]] = {}
        for member in members:
            step, h = member.state["step"], member.settings.h
            age = None if h.capturable else 0.0 if is_fake(step) else step.item()
            cohorts.setdefault((id(member.settings), age, h.is_open(member.numel)), []).append(member)
        self._ages, self._cohorts = [age for _, age, _ in cohorts], list(cohorts.values())
        for number, cohort in enumerate(self._cohorts):
            for place, member in enumerate(cohort):
                member.cohort, member.place = number, place

    def is_unchanged(self) -> bool:
        """Whether nobody else has changed the steps, as far as the host can see without waiting."""
        return is_fake(self._host) or torch.equal(self._host, self._expected)

    def advance(self) -> list[masks.StepScalars]:
        """Counts a step, and returns the scalars of each cohort: numbers, or with `capturable` vectors."""
        self._host += 1
        self._expected += 1
        for steps in self._on_devices:
            steps += 1
        self._ages = [None if age is None else age + 1 for age in self._ages]
        scalars = []
        for age, cohort in zip(self._ages, self._cohorts, strict=True):
            if age is None:
                steps = torch.stack([member.state["step"] for member in cohort])
                age = steps.to(masks.statistics_dtype(steps.device))
            scalars.append(masks.step_scalars(age, cohort[0].settings.h, cohort[0].numel))
        return scalars

    def undo(self, found_inf: Tensor) -> None:
        """Takes a step back where it was skipped, which is where `found_inf` is 1."""
        for steps in self._on_devices:
            steps -= found_inf.to(steps.device)
        if len(self._host):
            skipped = int(found_inf.item())
            self._host -= skipped
            self._expected -= skipped


class UnitMasks:
    """The masks that are decided between the halves of a step: of the units that this process holds something of.

    What is held whole is decided on here alone; all others take one all-reduce.

    Args:
        members: of `device`, whose masks these are.
        locator: where their tensors live.
        variances: `grad_var` of flat buffers.

    Attributes:
        table: the units.
        q: the last masks of the units, float64 `(units,)`; None before the first step.
    """

    def __init__(
        self, members: list[Member], locator: Locator, variances: FlatVariances, device: torch.device
    ) -> None:
        self.q: Tensor | None = None
        layout, dtype = locator.layout, masks.statistics_dtype(device)
        numbers = [(member, number) for member in members for number in locator.members(member.param)]
        reductions = {number: member.settings.h.reduction for member, number in numbers}
        self.table = UnitTable(reductions, layout, device, dtype)
        in_unit = {number: layout.in_unit(number, reduction) for number, reduction in reductions.items()}
        self._numels = self.table.per_unit(in_unit).unsqueeze(1)
        places = {id(x): (variances.tables, id(x.param)) if locator.flat else (x.state, "grad_var") for x in members}
        self._cohorts = []
        for cohort in dict.fromkeys(member.cohort for member in members):
            own = [member for member in members if member.cohort == cohort]
            of_cohort = [(member.place, number) for member, number in numbers if member.cohort == cohort]
            settings, units = own[0].settings, self.table.of_tensors([number for _, number in of_cohort])
            # With capturable, where in the cohort's vectors the scalars of each unit are
            of_units = [place for place, number in of_cohort for _ in range(self.table.held[number].count)]
            of_units = torch.tensor(of_units, device=device) if settings.h.capturable else None
            # In a flat buffer tensors of a few elements lie beside others
            is_open = None
            if locator.flat:
                is_open = {number: settings.h.is_open(layout.numels[number]) for number in reductions}
                is_open = self.table.per_unit(is_open).bool()[units]
            kept = _share([places[id(member)] for member in own])
            self._cohorts.append((cohort, settings, units, of_units, is_open, kept))
        self._variances = variances.tables
        self._known = {id(x.param): self._variances[id(x.param)] for x in members} if locator.flat else {}

    def is_unchanged(self) -> bool:
        """Whether the variances of flat buffers are still where they were."""
        return all(self._variances.get(key) is x for key, x in self._known.items())

    def decide(
        self,
        sums: list[tuple[slice | Tensor, Tensor]],
        scalars: list[masks.StepScalars],
        transform: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        """The masks from Σ(g - center)² and Σm² of shards, `(units, 2)`; advances the variances.

        Collective where a unit is cut, or with `transform`, which is given the masks of all units.
        """
        means = self.table.add_up(sums, 2) / self._numels
        self.q = torch.empty_like(means[:, 0])
        for cohort, settings, units, places, is_open, variances in self._cohorts:
            c = scalars[cohort]
            if places is not None:
                c = c.select(places)
            if is_open is not None:
                c = c._replace(open=is_open | c.open)
            self.q[units], variances[:] = masks.advance_units(means[units], variances, c, settings.h)
        if transform is not None:
            self.q = self.table.take(transform(self.table.gather(self.q)))
        return self.q


class PlanList:
    """Members of one device and dtype, which one implementation can take.

    Args:
        members: the list.
        locator: where their tensors live.
        unit_masks: if masks are decided between the halves of a step.
        tables: the Triton kernel's, which may outlive the list.

    Attributes:
        units: where the units of the slices are in the table of `unit_masks`.
    """

    def __init__(self, members: list[Member], locator: Locator, unit_masks: UnitMasks | None, tables: dict) -> None:
        self.members, self.settings, self.unit_masks = members, members[0].settings, unit_masks
        self._params = [member.param for member in members]
        self._sharded = any(map(is_dtensor, self._params))
        self._grad_dtype = members[0].grad.dtype
        # Those of shards that hold nothing may stay None
        self._empty = {i: m.grad for i, m in enumerate(members) if m.param.grad is None}
        halves, h = unit_masks is not None, self.settings.h
        needed = {
            "max_exp_avg_sq": h.amsgrad,
            "grad_var": h.masked and not halves,
            "exp_avg_signal": h.masked and h.signal_beta is not None,
        }
        self._states = {
            key: [moment_of(member.state, key) for member in members] if needed.get(key, True) else []
            for key in STATE_KEYS
        }
        by_rows, in_blocks = halves and h.reduction == "per_row", is_quantized(self._states["exp_avg"][0])
        self._pieces = [locator.slices(p, by_rows, halves, in_blocks) for p in self._params]
        self.slices = [(i, piece) for i, pieces in enumerate(self._pieces) for piece in pieces]
        if halves:
            units, index = [piece.units for _, piece in self.slices], unit_masks.table.index
            self.units, rounds = index(units), _rounds(units)
            begins = [0, *itertools.accumulate(x.count for x in units)]
            self._rounds = []
            for x in rounds if len(rounds) > 1 else []:
                which = torch.cat([torch.arange(begins[i], begins[i + 1]) for i in x])
                self._rounds.append((which.to(self._params[0].device), index([units[i] for i in x])))
        self._watched, self._fake = self._params, any(map(is_fake, self._params))
        if locator.sharded:  # a library that shards may exchange storages
            kept = [(x.codes, x.scale) if is_quantized(x) else (x,) for xs in self._states.values() for x in xs]
            self._watched = [*self._params, *itertools.chain(*kept)]
        self._addresses = self._find()

    def _find(self) -> list[int]:
        if self._fake:
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

    def set_gradients(self, grads: list[Tensor]) -> None:
        """Holds the gradients, local tensors in the order of the members, until the step is done."""
        self._grads = grads

    def drop_gradients(self) -> None:
        self._grads = []

    def slices_of(self, tensors: list[Tensor | Quantized]) -> list[Tensor | Quantized]:
        """The slices of tensors that are shaped as the members; of none, none."""
        pairs = zip(tensors, self._pieces, strict=True) if tensors else ()
        return [part for tensor, pieces in pairs for part in slices_of(tensor, pieces)]

    def sums(self, scalars: list[masks.StepScalars]) -> list[tuple[slice | Tensor, Tensor]]:
        """The first half of a step: the sums of shards, for [`UnitMasks.decide`].

        In lists of which none has two of one unit, which a device would add up in any order.
        """
        sums = self.first_half(scalars)
        if not self._rounds:
            return [(self.units, sums)]
        return [(units, sums[which]) for which, units in self._rounds]

    def tensor_lists(self) -> TensorLists:
        """The slices of the members' tensors, without gradients."""
        return TensorLists(self.slices_of(self._params), [], *map(self.slices_of, self._states.values()))


def _rounds(units: list[UnitRange]) -> list[list[int]]:
    """The positions of units in lists without a repetition: of a tensor that a flat buffer cuts up there are three."""
    seen, rounds = Counter(), []
    for i, unit in enumerate(units):
        if seen[unit] == len(rounds):
            rounds.append([])
        rounds[seen[unit]].append(i)
        seen[unit] += 1
    return rounds


class ReferenceList(PlanList):
    """Whole tensors of a group, which are stepped one after the other."""

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
        h, halves = self.settings.h, self.unit_masks is not None
        self._step = ForeachStep(self.tensor_lists(), h, halves, one_by_one=h.foreach is False)

    def set_gradients(self, grads: list[Tensor]) -> None:
        # Slices are views, which only contiguous gradients have
        grads = [g.contiguous() if p.is_contiguous() else g for p, g in zip(self._params, grads, strict=True)]
        self._step.set_grads(self.slices_of(grads))

    def drop_gradients(self) -> None:
        self._step.set_grads([])

    def _scalars(self, scalars: list[masks.StepScalars]) -> masks.StepScalars:
        """The scalars of each slice, as lists."""
        own = [self.members[i] for i, _ in self.slices]
        if self.settings.h.capturable:
            cohorts = {m.cohort for m in own}
            places = {i: list(zip(*(x.unbind() for x in scalars[i]), strict=True)) for i in cohorts}
            entries = [places[m.cohort][m.place] for m in own]
        else:
            entries = [scalars[m.cohort] for m in own]
        return masks.StepScalars(*map(list, zip(*entries, strict=True)))

    def first_half(self, scalars: list[masks.StepScalars]) -> Tensor:
        return self._step.sums(self._scalars(scalars))

    def second_half(self, scalars: list[masks.StepScalars], q: Tensor) -> None:
        self._step.update(self._scalars(scalars), self.settings.lr, self.settings.eps, q)

    def whole_step(self, scalars: list[masks.StepScalars], grad_scale=None, found_inf=None) -> None:
        self._step.update(self._scalars(scalars), self.settings.lr, self.settings.eps)
