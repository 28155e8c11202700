"""PRM's fused step for as long as nothing changes: what it is made of is looked at, and not collected anew.

Collecting it costs more than the step itself where tensors are many and small, as with LoRA, or held in parts.
"""

import itertools
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..sharding import Layout, Locator, RowSpan, local_tensors
from .fused import FusedList, code_of, scalar_row
from .kernels import STATES
from .masks import statistics_dtype
from .parts import SETTINGS, hyperparameters
from .step import masks_of_means, scalars_of
from .tables import begins, places
from .validation import validate_lr


class FusedPlan:
    """The step of all parameter groups, for as long as nothing changes but gradients and the settings' numbers.

    Args:
        groups: the parameter groups that have parameters; all of these have gradients and have taken equally many
            steps, group by group.
        state: the optimizer's state. Each `step` in it becomes an element of one tensor, and so does each `grad_var`
            of masks for which sums are added up over processes.
        locator: where the parameters live.
        variances: `grad_var` of all tensors or rows, where parameters are flat buffers.

    Attributes:
        masks: of tensors and rows held in parts, or None.
    """

    def __init__(
        self, groups: list[dict[str, Any]], state: dict[Tensor, dict], locator: Locator, variances: Tensor | None
    ) -> None:
        self._groups = [_Settings(group) for group in groups]
        self._variances, self._whole = variances, locator.layout is None
        params = [p for group in groups for p in group["params"]]
        self._steps = _share(state, params, "step").numpy()  # the same memory, counted up in a third of the time
        self._expected_steps = self._steps.copy()
        self._counts = [state[group["params"][0]]["step"].item() for group in groups]
        by_code = {}
        for number, (group, settings) in enumerate(zip(groups, self._groups, strict=True)):
            for p in group["params"]:
                key = (p.device, p.dtype, p.grad.dtype, state[p]["exp_avg"].dtype, *settings.code.values())
                by_code.setdefault(key, []).append((p, number))
        self.masks: _Masks | None = None
        masked = {i: g["params"] for i, g in enumerate(groups) if self._groups[i].decides_on_units}
        if masked and not self._whole:
            members = {i: [number for p in ps for number in locator.members(p)] for i, ps in masked.items()}
            if not locator.flat:
                variances = _share(state, [p for ps in masked.values() for p in ps], "grad_var")
            in_rows = {i for i in masked if self._groups[i].code["PER_ROW"]}
            self.masks = _Masks(members, in_rows, locator.layout, variances, compact=not locator.flat)
        self._lists = []
        for pairs in by_code.values():
            ps, numbers = map(list, zip(*pairs, strict=True))
            self._lists.append(_List(ps, numbers, state, locator, self._groups[numbers[0]], self.masks))
        self._state = state
        self._entries = list(state.values())
        self._states = [state[p] for p in params]
        self._values = self._found_values()

    def step(self, groups: list[dict[str, Any]], state: dict[Tensor, dict], variances: Tensor | None) -> bool:
        """Takes a step, or returns False without one if anything else has changed."""
        groups = [group for group in groups if group["params"]]
        if len(groups) != len(self._groups) or not self._same_state(state):
            return False
        if self.masks is not None and variances is not self._variances:
            return False
        for group, settings in zip(groups, self._groups, strict=True):
            if not settings.follow(group):
                return False
        gradients = [x.gradients() for x in self._lists]
        if None in gradients or (self._steps != self._expected_steps).any():
            return False
        self._steps += 1
        self._expected_steps += 1
        self._counts = [count + 1 for count in self._counts]
        scalars = np.array([scalar_row(t, g.hyper) for t, g in zip(self._counts, self._groups, strict=True)])
        launches = list(zip(self._lists, gradients, strict=True))
        if self.masks is not None:
            halves = [(x, where) for x, where in launches if x.units is not None]
            for x, where in halves:
                x.run(where, scalars, phase=1)
            q = self.masks.decide([x for x, _ in halves], [g.hyper for g in self._groups], self._counts)
            for x, _ in halves:
                x.fused.q.copy_(q[x.units])
        for x, where in launches:
            x.run(where, scalars, phase=0 if x.units is None else 2)
        return True

    def _same_state(self, state: dict[Tensor, dict]) -> bool:
        # By `is`, in C: `==` would compare elements, and looking entries up would ask each tensor for its hash.
        return (
            state is self._state
            and len(state) >= len(self._entries)
            and all(map(operator.is_, state.values(), self._entries))
            and len(values := self._found_values()) == len(self._values)
            and all(map(operator.is_, values, self._values))
        )

    def _found_values(self) -> list[Tensor]:
        # Whoever exchanges the state of whole tensors exchanges all of it; libraries that shard do so one by one.
        if self._whole:
            return [self._states[0]["step"], *map(_EXP_AVG, self._states)]
        return list(itertools.chain.from_iterable(map(dict.values, self._states)))


class _List:
    """The tensors that one launch can take.

    Args:
        params: of one device and dtype, with gradients of one dtype, stepped by the same code.
        groups: by parameter, the position of its group.
        settings: of any of these groups.
        masks: of tensors and rows held in parts, or None.

    Attributes:
        fused: the tables of the tensors' slices.
        units: of each slice, or of each of its rows, the place in [`_Masks`], where the launch has two halves; else
            None.
    """

    def __init__(
        self,
        params: list[Tensor],
        groups: list[int],
        state: dict[Tensor, dict],
        locator: Locator,
        settings: "_Settings",
        masks: "_Masks | None",
    ) -> None:
        self._params, self._sharded = params, any(isinstance(p, DTensor) for p in params)
        self._grad_dtype = params[0].grad.dtype
        halves, masked = settings.decides_on_units and masks is not None, settings.hyper["mask"] != "none"
        names = ["exp_avg", "exp_avg_sq"]
        names += ["max_exp_avg_sq"] * settings.hyper["amsgrad"] + ["grad_var"] * (masked and not halves)
        names += ["exp_avg_signal"] * (masked and settings.hyper["signal_beta"] is not None)
        slices: dict[str, list[Tensor]] = {name: [] for name in ("param", *names)}
        spans, rows, cuts = [], [], []
        for i, (p, group) in enumerate(zip(params, groups, strict=True)):
            tensors = {"param": p} | {name: state[p][name] for name in names}
            if halves and settings.code["PER_ROW"]:
                own, lists = locator.row_slices(p, tensors)
            else:
                numbers, lists = locator.slices(p, tensors, split=halves)
                own = [RowSpan(number, 0, 1) for number in numbers]
            for name, pieces in lists.items():
                slices[name] += pieces
            spans += own
            rows += [group] * len(own)
            if halves and locator.flat:
                starts = (x.storage_offset() - p.storage_offset() for x in lists["param"])
                cuts += [(i, start * p.grad.element_size()) for start in starts]
        # Of a flat buffer's slices, which buffer and from which byte of its gradient on
        self._cut = np.array(cuts, dtype=np.int64).T if cuts else None
        self._scalar_rows = np.array(rows, dtype=np.int32)
        self.fused = FusedList(*(slices.get(name, []) for name in STATES), settings.code)
        self.units = masks.units_of(spans) if halves else None
        # Whole tensors are told by identity, which is quicker; a library that shards may exchange storages.
        kept = names if locator.layout is not None else []
        self._tensors = params + [state[p][name] for name in kept for p in params]
        self._addresses = self._find()

    def _find(self) -> list[int]:
        return list(map(Tensor.data_ptr, local_tensors(self._tensors) if self._sharded else self._tensors))

    def gradients(self) -> list[int] | None:
        """Where the gradients are, or None if they or the tensors are not as they were."""
        if self._find() != self._addresses:
            return None
        # What is asked of each tensor is asked in C: with LoRA this takes longer than the kernel.
        grads = list(map(_GRAD, self._params))
        if self._sharded:
            grads = local_tensors(grads)
        if set(map(type, grads)) != {Tensor} or set(map(_DTYPE, grads)) != {self._grad_dtype}:
            return None
        if not all(map(Tensor.is_contiguous, grads)):
            return None
        addresses = list(map(Tensor.data_ptr, grads))
        if self._cut is None:
            return addresses
        which, offsets = self._cut
        return (np.array(addresses)[which] + offsets).tolist()

    def run(self, gradients: list[int], scalars: np.ndarray, phase: int) -> None:
        self.fused.run(gradients, self._grad_dtype, scalars, self._scalar_rows, phase=phase)


class _Masks:
    """The masks of tensors and rows held in parts, of all groups with one all-reduce.

    Args:
        members: by position of a group, the numbers of its tensors that advance.
        in_rows: the groups whose masks are of rows.
        layout: of the tensors.
        variances: `grad_var` of the units, each a tensor or a row, which advance with the masks.
        compact: whether `variances` has the units of these tensors alone, in the order of `members`; else those of
            all tensors, all of them of the kind of these.

    Attributes:
        numbers: of the tensors.
        counts: of the units of each.
        q: the last masks of their units, one tensor after the other, float64 `(units,)`; None before the first.
    """

    def __init__(
        self, members: dict[int, list[int]], in_rows: set[int], layout: Layout, variances: Tensor, compact: bool
    ) -> None:
        self._layout, self._variances = layout, variances
        device, dtype = variances.device, statistics_dtype(variances.device)
        units = {n: layout.rows[n] if i in in_rows else 1 for i, numbers in members.items() for n in numbers}
        kept = units if compact else dict(enumerate(layout.rows if in_rows else [1] * len(layout.numels)))
        self.numbers = sorted(units)  # as other processes have them, also where they have no plan
        self.counts = [units[n] for n in self.numbers]
        self._begin = begins(dict(zip(self.numbers, self.counts, strict=True)))
        whole = {n: RowSpan(n, 0, count) for n, count in units.items()}
        self._groups = {i: self._at([whole[n] for n in numbers], self._begin) for i, numbers in members.items()}
        self._kept = self._at([whole[n] for n in self.numbers], begins(kept))
        numels = torch.tensor([layout.numels[n] // max(units[n], 1) for n in self.numbers], dtype=dtype)
        numels = numels.repeat_interleave(torch.tensor(self.counts)).clamp(min=1)
        self._numels = numels.unsqueeze(1).to(device)
        self._table = torch.zeros(len(numels), 2, dtype=dtype, device=device)
        self.q: Tensor | None = None

    def _at(self, spans: list[RowSpan], begin: dict[int, int]) -> slice | Tensor:
        """An index, without a launch where the units follow each other, as they do unless someone moves them."""
        index = places(spans, begin)
        first = int(index[0]) if len(index) else 0
        if torch.equal(index, torch.arange(len(index)) + first):
            return slice(first, first + len(index))
        return index.to(self._variances.device)

    def units_of(self, spans: list[RowSpan]) -> Tensor:
        """The place of each row of `spans` among all units; a tensor with one mask counts as one row."""
        return places(spans, self._begin).to(self._variances.device)

    def decide(self, lists: list[_List], hypers: list[dict[str, Any]], counts: list[float]) -> Tensor:
        """The masks from the sums that the lists have computed of the parts; advances the variances. Collective."""
        table = self._table.zero_()
        for x in lists:
            table.index_add_(0, x.units, x.fused.sums)
        self._layout.all_reduce(table, self.numbers, counts=self.counts)
        means, var = table / self._numels, self._variances[self._kept]
        self.q = torch.empty_like(means[:, 0])
        for i, units in self._groups.items():
            c = scalars_of(counts[i], hypers[i])
            self.q[units], var[units] = masks_of_means(means[units], var[units], c, hypers[i])
        self._variances[self._kept] = var
        return self.q


class _Settings:
    """The settings of a parameter group as a plan knows them, read and validated anew only where they have changed.

    Attributes:
        decides_on_units: whether there is one q a tensor or a row.
    """

    def __init__(self, group: dict[str, Any]) -> None:
        self._group, self._params = group, tuple(group["params"])
        self._read(group)
        self.code, self._path = code_of(self.hyper), _PATH(group)
        self.decides_on_units = self.code["PER_TENSOR"] or self.code["PER_ROW"]

    def _read(self, group: dict[str, Any]) -> None:
        self.hyper = hyperparameters(group)
        # A tuple, because a list can change in place: it is unlike this one, and so is read anew at each step.
        self._betas, self._others = tuple(group["betas"]), _OTHERS(group)

    def follow(self, group: dict[str, Any]) -> bool:
        """Takes over changed numbers. False if `group` has other parameters or needs other code."""
        params = group["params"]  # DeepSpeed makes a new list of the same ones for each step
        if group is not self._group or len(params) != len(self._params):
            return False
        if not all(map(operator.is_, params, self._params)):
            return False
        if group["betas"] != self._betas or _OTHERS(group) != self._others:
            self._read(group)
            return code_of(self.hyper) == self.code and _PATH(group) == self._path
        validate_lr(group)  # a schedule's, new at each step
        self.hyper["lr"] = group["lr"]
        return True


def _share(state: dict[Tensor, dict], params: list[Tensor], name: str) -> Tensor:
    """Makes a state of each parameter, 0-dim or a vector, a part of one vector, which is returned."""
    tensors = [state[p][name] for p in params]
    shared = torch.cat([x.view(-1) for x in tensors])
    for p, x, part in zip(params, tensors, shared.split([x.numel() for x in tensors]), strict=True):
        state[p][name] = part.view(x.shape)
    return shared


_OTHERS = operator.itemgetter(*sorted(SETTINGS - {"lr", "betas"}))
_PATH = operator.itemgetter("foreach", "fused", "capturable", "differentiable", "state_dtype", "reduction")
_GRAD, _DTYPE, _EXP_AVG = operator.attrgetter("grad"), operator.attrgetter("dtype"), operator.itemgetter("exp_avg")
