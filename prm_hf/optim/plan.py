"""The engine of a step: a plan is built from the parameter groups, run, and built again when anything changes.

A plan knows the tensors that have gradients, in lists that one implementation can take at a time: the reference, the
multi-tensor implementation or the Triton kernel. What changes from step to step without a new plan are gradients and
the numbers of the settings.
"""

import functools
import importlib.util
import itertools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..sharding import FlatVariances, Locator, local_tensors
from .foreach import uses_foreach
from .hyperparameters import NAMES, Hyperparameters, check_lr
from .lists import Clock, ForeachList, Member, PlanList, ReferenceList, UnitMasks
from .quantized import REDUCED


_OTHERS = operator.itemgetter(*sorted({*NAMES} - {"lr", "betas"}))


class Settings:
    """The hyperparameters of a parameter group, read and checked anew only where they have changed.

    Attributes:
        h: the hyperparameters, of which `lr` may be an older one.
        lr: the learning rate of a step, with `relative_eps` accounted for.
        eps: Adam's epsilon, likewise.
        form: what decides on the implementation and on what is compiled for it: all settings but numbers, and which
            numbers there are.
    """

    def __init__(self, group: dict[str, Any], locator: Locator) -> None:
        self._group, self._params, self._locator = group, tuple(group["params"]), locator
        self._read(group)
        self.form = self._form(group)

    def _read(self, group: dict[str, Any]) -> None:
        self.h = Hyperparameters.of_group(group)
        self.eps = self.h.adam_eps(self._locator.n_parameters)
        self._set_lr(group["lr"])
        # A tuple, because a list can change in place: it is unlike this one, and so is read anew at each step.
        self._betas, self._others = tuple(group["betas"]), _OTHERS(group)

    def _set_lr(self, lr: float | Tensor) -> None:
        self.lr = (lr.reshape(()) if isinstance(lr, Tensor) and lr.dim() else lr) * self.h.step_length

    def _form(self, group: dict[str, Any]) -> tuple:
        flags = (x if isinstance(x, (str, bool)) else None for x in _OTHERS(group))
        set_up = self.h.signal_beta is None, self.h.weight_decay == 0, self.h.mask_min_elements
        return (*flags, *set_up, torch.is_tensor(group["lr"]))

    def follow(self, group: dict[str, Any]) -> bool:
        """Takes over changed numbers. False if `group` has other parameters or needs another plan."""
        params = group["params"]  # DeepSpeed makes a new list of the same ones for each step
        if (
            group is not self._group
            or len(params) != len(self._params)
            or any(map(operator.is_not, params, self._params))
        ):
            return False
        if group["betas"] != self._betas or _OTHERS(group) != self._others:
            self._read(group)
            return self._form(group) == self.form
        check_lr(self.h, group["lr"])  # a schedule's, new at each step
        self._set_lr(group["lr"])
        return torch.is_tensor(group["lr"]) == self.form[-1]


class StepPlan:
    """One step of some parameter groups, for as long as nothing changes but gradients and the settings' numbers.

    Args:
        groups: the parameter groups that have parameters.
        state: the optimizer's state. Each `step` in it becomes an element of one tensor, and so does each `grad_var`
            of masks that are decided between the halves of a step.
        init_state: fills the state of a local tensor of a group, and returns it.
        locator: where the parameters live.
        variances: `grad_var` of flat buffers.
        tables: the Triton kernel's tables, which may outlive a plan.
        transform: changes the masks that are decided between the halves of a step; None for no change.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        state: dict[Tensor, dict],
        init_state: Callable[[Tensor, dict[str, Any]], dict[str, Tensor]],
        locator: Locator,
        variances: FlatVariances,
        tables: dict,
        transform: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self._locator, self._transform = locator, transform
        self._groups = [Settings(group, locator) for group in groups]
        self._idle: list[Tensor] = []
        members = self._collect(groups, init_state)
        self._clock = Clock(members)
        by_kind: dict[tuple, list[Member]] = {}
        deferred: dict[torch.device | None, list[Member]] = {}  # of whole tensors by device, of shards together
        for member in members:
            kind = self._kind(member)
            by_kind.setdefault(kind, []).append(member)
            if self._is_deferred(kind[0], member.settings.h):
                deferred.setdefault(self._device(member), []).append(member)
        self._masks = {x: UnitMasks(own, locator, variances, own[0].param.device) for x, own in deferred.items()}
        self._lists: list[PlanList] = []
        for (implementation, *_), own in by_kind.items():
            unit_masks = None
            if self._is_deferred(implementation, own[0].settings.h):
                unit_masks = self._masks[self._device(own[0])]
            self._lists.append(_list_class(implementation)(own, locator, unit_masks, tables))
            self._lists[-1].take_gradients()
        self._state, self._entries = state, list(state.values())
        self._member_states = [member.state for member in members]
        self._values = self._found_values()

    def _collect(self, groups: list[dict[str, Any]], init_state: Callable) -> list[Member]:
        members = []
        for group, settings in zip(groups, self._groups, strict=True):
            for p in group["params"]:
                grad = p.grad
                if grad is None and self._locator.sharded and p.numel() == 0:
                    # FSDP1 gives no gradient to a process that holds nothing of a tensor, but its sums must add up.
                    grad = torch.zeros_like(p)
                if grad is None:
                    self._idle.append(p)
                    continue
                if grad.is_sparse:
                    raise RuntimeError(  # as torch's AdamW does
                        f"PRM does not support sparse gradients, and a parameter of shape {tuple(p.shape)} has one: "
                        "create its embedding with `sparse=False`."
                    )
                members.append(Member(p, grad, init_state(p, group), settings, self._locator.numel(p)))
        return members

    def _kind(self, member: Member) -> tuple:
        """What must be equal for two tensors to be in one list; the first is the implementation."""
        p, grad, state, settings = member.param, member.grad, member.state, member.settings
        h, m, v = settings.h, state["exp_avg"], state["exp_avg_sq"]
        tensors = (p.device, p.dtype, grad.dtype, m.dtype, v.dtype)
        if self._transform is None and _use_fused(member):
            return ("fused", *tensors, *settings.form)
        foreach = uses_foreach([p], h, settings.lr)
        whole = not self._locator.sharded and self._transform is None
        if whole and not foreach and m.dtype == v.dtype and v.dtype not in REDUCED:
            return ("reference", *tensors, id(settings))
        return ("foreach", *tensors, id(settings))

    def _is_deferred(self, implementation: str, h: Hyperparameters) -> bool:
        """Whether masks are decided between the halves of a step."""
        if not h.masked or h.reduction == "per_param":
            return False
        if self._locator.sharded or self._transform is not None:
            return True
        # Of whole tensors the reference and the kernel sum up by themselves; rows never need more than a block
        return implementation == "foreach" and h.reduction == "per_tensor"

    def _device(self, member: Member) -> torch.device | None:
        return None if self._locator.sharded else member.param.device

    def holds(self, groups: list[dict[str, Any]], state: dict[Tensor, dict]) -> bool:
        """Whether the next step can be taken by this plan. Takes over gradients and the settings' numbers.

        Raises:
            ValueError: a setting was changed to something invalid.
        """
        return (
            len(groups) == len(self._groups)
            and self._same_state(state)
            and all(settings.follow(group) for group, settings in zip(groups, self._groups, strict=True))
            and all(p.grad is None for p in self._idle)
            and self._clock.is_unchanged()
            and all(unit_masks.is_unchanged() for unit_masks in self._masks.values())
            and all(x.take_gradients() for x in self._lists)
        )

    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        """Takes a step with the gradients that [`holds`] has seen, or those that the plan was built with.

        Args:
            grad_scale: the factor, on the device, that GradScaler has left in the gradients.
            found_inf: GradScaler's: 1 where gradients have overflowed and the step is to do nothing.
        """
        scalars = self._clock.advance()
        for unit_masks in self._masks.values():
            own = [x for x in self._lists if x.unit_masks is unit_masks]
            sums = [pair for x in own for pair in x.sums(scalars)]
            q = unit_masks.decide(sums, scalars, self._transform)
            for x in own:
                x.second_half(scalars, q[x.units])
        for x in self._lists:
            if x.unit_masks is None:
                x.whole_step(scalars, grad_scale, found_inf)
        if found_inf is not None:
            self._clock.undo(found_inf)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Holds no gradient between steps, whose memory would be missed elsewhere."""
        for x in self._lists:
            x.drop_gradients()

    def _same_state(self, state: dict[Tensor, dict]) -> bool:
        # By `is`, in C: `==` would compare elements, and looking entries up would ask each tensor for its hash
        return (
            state is self._state
            and len(state) >= len(self._entries)
            and all(map(operator.is_, state.values(), self._entries))
            and len(values := self._found_values()) == len(self._values)
            and all(map(operator.is_, values, self._values))
        )

    def _found_values(self) -> list[Tensor]:
        # Whoever exchanges the state of whole tensors exchanges all of it; libraries that shard do so one by one.
        if not self._locator.sharded and self._member_states:
            return [self._member_states[0]["step"], *map(operator.itemgetter("exp_avg"), self._member_states)]
        return list(itertools.chain.from_iterable(map(dict.values, self._member_states)))


def _use_fused(member: Member) -> bool:
    """Whether a tensor is stepped by the kernel: if asked for, and by default on CUDA where Triton is installed."""
    h = member.settings.h
    if h.fused is False or h.foreach or h.differentiable:
        return False
    if h.fused is None and not (member.param.is_cuda and _triton_is_available()):
        return False
    from .triton.launch import supports

    if supports(*local_tensors([member.param, member.grad])):
        return True
    if h.fused:
        raise ValueError(
            "Invalid fused=True: the kernel takes contiguous float32, bfloat16 and float16 tensors on a CUDA device; "
            f"there are {member.param.dtype} ones on {member.param.device}. Leave fused=None."
        )
    return False


@functools.cache
def _triton_is_available() -> bool:
    """Whether the kernels can be launched, whose tables are NumPy's."""
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "numpy"))


def _list_class(implementation: str) -> type[PlanList]:
    if implementation == "fused":
        from .triton.launch import TritonList

        return TritonList
    return {"reference": ReferenceList, "foreach": ForeachList}[implementation]
