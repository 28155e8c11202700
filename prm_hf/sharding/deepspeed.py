"""DeepSpeed: which configurations leave the optimizer alone, and what else it does to an optimizer.

(How its flat buffers are read is in `layout.py`.)
"""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .locator import Locator
from .unit_masks import FlatVariances


def check_config(config: dict[str, Any]) -> None:
    """Raises if under a DeepSpeed configuration the optimizer would not be PRM, or its masks not exact.

    Args:
        config: as in DeepSpeed's JSON file. `"auto"` stands for itself.

    Raises:
        ValueError: naming the setting to change.
    """
    zero = config.get("zero_optimization") or {}
    offloads = {name: zero.get(name) or {} for name in ("offload_optimizer", "offload_param")}
    devices = {name: str(offload.get("device") or "none") for name, offload in offloads.items()}
    offloaded, ratio = devices["offload_optimizer"] != "none", offloads["offload_optimizer"].get("ratio", 1.0)
    tensor_parallel = (config.get("tensor_parallel") or {}).get("autotp_size", 0)

    def refuse(is_there: Any, what: str) -> None:
        if is_there:
            raise ValueError(f"The DeepSpeed configuration {what}")

    refuse(
        "optimizer" in config,
        "has a section `optimizer`, which would silently take PRM's place. Remove the section.",
    )
    for name, device in devices.items():
        where = f"`zero_optimization.{name}.device: nvme`"
        what = "with which the parts of a tensor are not in memory when PRM has to measure it"
        refuse(device == "nvme", f"has {where}, {what}. Set it to `cpu` or `none`.")
    refuse(
        (offloaded or zero.get("cpu_offload")) and config.get("zero_force_ds_cpu_optimizer", True) is not False,
        "offloads the optimizer, and accelerate would silently replace PRM by DeepSpeed's CPU Adam. Add "
        "`zero_force_ds_cpu_optimizer: false` to the configuration.",
    )
    refuse(
        offloaded and ratio != "auto" and ratio < 1,
        f"has `zero_optimization.offload_optimizer.ratio: {ratio}`, with which DeepSpeed steps the rest of the "
        "parameters with its own Adam. Set it to 1.",
    )
    refuse(
        offloads["offload_optimizer"].get("super_offload"),
        "has `zero_optimization.offload_optimizer.super_offload: true`, which steps with DeepSpeed's CPU Adam in a "
        "process of its own. Remove it.",
    )
    refuse(
        zero.get("zenflow"),
        "has a section `zero_optimization.zenflow`, which splits each tensor between two optimizers. Remove it.",
    )
    refuse(
        zero.get("elastic_checkpoint"),
        "has `zero_optimization.elastic_checkpoint: true`, which loses what PRM keeps with its parameter groups. "
        "Remove it; universal checkpoints change the number of processes "
        "(`python -m deepspeed.checkpoint.ds_to_universal`).",
    )
    refuse(
        tensor_parallel != "auto" and tensor_parallel > 1,
        f"has `tensor_parallel.autotp_size: {tensor_parallel}`: PRM would take the slice of a tensor that a process "
        "computes with for the tensor. Remove the section.",
    )


class LifeCycle:
    """What DeepSpeed does to an optimizer outside its steps, and what it needs from it: seen, mended and kept.

    Args:
        locator: of the optimizer's parameters.

    Attributes:
        variances: `grad_var` of flat buffers.
    """

    # Keys of ours in parameter groups, which wrappers and checkpoints carry along: the number that the group was
    # created with, and in checkpoints of flat partitions `grad_var` (DeepSpeed drops or trims it in the state): of all
    # tensors or of all of their rows in that of the first process, in others of what they hold of the group.
    NUMBER = "prm_group"
    VARIANCES: ClassVar = {"per_tensor": "prm_grad_var", "per_row": "prm_row_grad_var"}
    HELD: ClassVar = {"per_tensor": "prm_held_grad_var", "per_row": "prm_held_row_grad_var"}
    CODES = "prm_codes"  # in checkpoints, where moments of flat buffers are codes of 8 bits with their scales

    def __init__(self, locator: Locator) -> None:
        self._locator = locator
        self.variances = FlatVariances(locator)
        self._created: list[dict[str, Any]] = []
        self._started = False

    def register(self, group: dict[str, Any]) -> None:
        """Takes note of a new parameter group and its settings, and gives it its number."""
        group[self.NUMBER] = self._locator.register(group["params"])
        self._created.append({key: value for key, value in group.items() if key != "params"})

    def notice(self, groups: list[dict[str, Any]], state: dict[Tensor, dict]) -> None:
        """Takes note of what was put into the groups by hand, as a copied group, which has the number of another one.

        Raises:
            RuntimeError: all tensors of a group were replaced, and there is a state of those that were there before.
        """
        numbers = [group[self.NUMBER] for group in groups]
        for group, number in zip(groups, numbers, strict=True):
            if not self._locator.has_replaced(number, group["params"]):
                self._locator.notice(number, group["params"])
            elif numbers.count(number) > 1:
                self.register(group)
            elif lost := [p for p in self._locator.originals(number) if state.get(p)]:
                raise RuntimeError(
                    f"The parameters of group {number} were replaced, as `prepare` does for FSDP and DeepSpeed, and "
                    f"the optimizer has a state of {len(lost)} of those before, which would be lost. Call "
                    "`load_state_dict` after `prepare`; or call `optimizer.state.clear()` to start with a fresh state."
                )

    def settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """The settings that a group was created with."""
        return self._created[group[self.NUMBER]]

    def absorb(self, groups: list[dict[str, Any]]) -> None:
        """Takes over what a checkpoint put into the parameter groups, however DeepSpeed put it there.

        Raises:
            ValueError: DeepSpeed left the scales of 8-bit values out.
        """
        if any(self.CODES in group for group in groups):
            raise ValueError(
                "The checkpoint is a universal one of a run with state_dtype='8bit', of whose state DeepSpeed keeps "
                "the codes without their scales. Resume the original one on as many processes as wrote it; with "
                "state_dtype='float32' there, what is saved next can be converted."
            )
        self._restore(groups)
        for group in groups:
            for keys, is_whole in ((self.VARIANCES, True), (self.HELD, False)):
                for reduction, key in keys.items():
                    if key in group:
                        self.variances.load(reduction, group[self.NUMBER], group.pop(key), is_whole)

    def _restore(self, groups: list[dict[str, Any]]) -> None:
        """Gives each group its own settings again, where all have those of the first.

        DeepSpeed's stage-3 universal load copies them, with the number of the group. The learning rate is a
        schedule's: its progress is kept.
        """
        numbers = [group[self.NUMBER] for group in groups]
        if len(groups) != len(self._created) or len(set(numbers)) == len(numbers):
            return
        if not any(hasattr(p, "ds_id") for number in numbers for p in self._locator.originals(number)):
            return  # a group that was copied by hand
        first, created_lr = groups[0], self._created[0]["lr"]
        progress = {key: first[key] / created_lr for key in ("lr", "initial_lr") if key in first and created_lr}
        for group, created in zip(groups, self._created, strict=True):
            group.update(created)
            group.update({key: created["lr"] * value for key, value in progress.items()})

    def add_variances(self, groups: list[dict[str, Any]]) -> None:
        """Puts the variances of flat buffers into the groups of a state dict. Collective, if there are any.

        The first process has those of all units of all groups, in each group: DeepSpeed's universal checkpoints keep
        the groups of one process, and for stage 3 one group. Each other process has what it holds of the group.
        """
        for reduction in self.VARIANCES:
            whole = self.variances.whole(reduction)
            for group in groups:
                table, is_whole = self.variances.saved(reduction, group[self.NUMBER], whole)
                if table is not None:
                    group[(self.VARIANCES if is_whole else self.HELD)[reduction]] = table

    def mark_codes(self, groups: list[dict[str, Any]], states: Iterable[dict[str, Tensor]]) -> None:
        """Says in the groups of a state dict if the state of flat buffers, whose scales are vectors, is in 8 bits."""
        if any(key.endswith("_scale") and x.dim() == 1 for state in states for key, x in state.items()):
            for group in groups:
                group[self.CODES] = True

    def has_variances(self, group: dict[str, Any]) -> bool:
        """Whether a checkpoint's group carries variances of flat buffers."""
        return any(key in group for key in (*self.VARIANCES.values(), *self.HELD.values()))

    def prepare(self, groups: list[dict[str, Any]], state: dict[Tensor, dict], dtype: torch.dtype) -> None:
        """Makes the state of flat buffers ready for a step.

        Raises:
            ValueError: a checkpoint gave groups a state and no variances.
        """
        _unshare_steps(state)
        for group in groups:
            reduction, number = group["reduction"], group[self.NUMBER]
            if group["mask"] == "none" or reduction not in self.VARIANCES:
                continue
            states = filter(None, map(state.get, self._locator.local_tensors(number, group["params"])))
            if self.variances.are_new(reduction, number) and any(own["step"] > 0 for own in states):
                raise ValueError(
                    f"The checkpoint has no `grad_var` of reduction={reduction!r} for DeepSpeed ZeRO: it was not "
                    "written by PRM, or with another reduction. Start from the weights alone with a fresh optimizer."
                )
            self.variances.place(reduction, number, dtype)

    def is_initialization(self, groups: list[dict[str, Any]]) -> bool:
        """Whether a step on clones of the parameters is one by which stage 0 in half precision allocates the state.

        It has zero gradients, and comes before the first real step.
        """
        if not self._locator.replaced or self._started:
            return False
        self._started = any(p.grad is not None and bool(p.grad.any()) for group in groups for p in group["params"])
        return not self._started


def _unshare_steps(state: dict[Tensor, dict[str, Tensor]]) -> None:
    """DeepSpeed's stage-3 universal load gives all sub-groups the same `step`, which each would then advance."""
    seen = set()
    for entry in filter(None, state.values()):
        if id(entry["step"]) in seen:
            entry["step"] = entry["step"].clone()
        seen.add(id(entry["step"]))
