"""DeepSpeed: which configurations leave the optimizer alone, and what else it does to an optimizer.

(How its flat buffers are read is in `layout.py`.)
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor


def check_config(config: dict[str, Any]) -> None:
    """Raises if under a DeepSpeed configuration the optimizer would not be PRM, or its masks not exact.

    Args:
        config: as in DeepSpeed's JSON file. `"auto"` stands for itself.

    Raises:
        ValueError: naming the setting to change.
    """
    zero = config.get("zero_optimization") or {}
    optimizer_offload = zero.get("offload_optimizer") or {}
    param_offload = zero.get("offload_param") or {}
    device = _device(optimizer_offload)

    if "optimizer" in config:
        raise ValueError(
            "The DeepSpeed configuration has a section `optimizer`, which would silently take PRM's place. Remove the "
            "section."
        )
    for name, offload in (("offload_optimizer", optimizer_offload), ("offload_param", param_offload)):
        if _device(offload) == "nvme":
            raise ValueError(
                f"The DeepSpeed configuration has `zero_optimization.{name}.device: nvme`, with which the parts of a "
                "tensor are not in memory when PRM has to measure it. Set it to `cpu` or `none`."
            )
    if (device != "none" or zero.get("cpu_offload")) and config.get("zero_force_ds_cpu_optimizer", True) is not False:
        raise ValueError(
            "The DeepSpeed configuration offloads the optimizer, and accelerate would silently replace PRM by "
            "DeepSpeed's CPU Adam. Add `zero_force_ds_cpu_optimizer: false` to the configuration."
        )
    ratio = optimizer_offload.get("ratio", 1.0)
    if device != "none" and ratio != "auto" and ratio < 1:
        raise ValueError(
            f"The DeepSpeed configuration has `zero_optimization.offload_optimizer.ratio: {ratio}`, with which "
            "DeepSpeed steps the rest of the parameters with its own Adam. Set it to 1."
        )
    if optimizer_offload.get("super_offload"):
        raise ValueError(
            "The DeepSpeed configuration has `zero_optimization.offload_optimizer.super_offload: true`, which steps "
            "with DeepSpeed's CPU Adam in a process of its own. Remove it."
        )
    if zero.get("zenflow"):
        raise ValueError(
            "The DeepSpeed configuration has a section `zero_optimization.zenflow`, which splits each tensor between "
            "two optimizers. Remove it."
        )
    if zero.get("elastic_checkpoint"):
        raise ValueError(
            "The DeepSpeed configuration has `zero_optimization.elastic_checkpoint: true`, which loses what PRM keeps "
            "with its parameter groups. Remove it; universal checkpoints change the number of processes "
            "(`python -m deepspeed.checkpoint.ds_to_universal`)."
        )
    tensor_parallel = (config.get("tensor_parallel") or {}).get("autotp_size", 0)
    if tensor_parallel != "auto" and tensor_parallel > 1:
        raise ValueError(
            f"The DeepSpeed configuration has `tensor_parallel.autotp_size: {tensor_parallel}`: PRM would take the "
            "slice of a tensor that a process computes with for the tensor. Remove the section."
        )


def _device(offload: dict[str, Any]) -> str:
    return str(offload.get("device") or "none")


class LifeCycle:
    """What DeepSpeed does to an optimizer outside its steps, seen and mended.

    Args:
        number_key: the key of a parameter group under which the optimizer keeps the group's number.
    """

    def __init__(self, number_key: str) -> None:
        self._number_key = number_key
        self._created: list[dict[str, Any]] = []
        self._started = False

    def created(self, group: dict[str, Any]) -> None:
        """Takes note of the settings that a group was created with."""
        self._created.append({key: value for key, value in group.items() if key != "params"})

    def settings(self, group: dict[str, Any]) -> dict[str, Any]:
        """The settings that a group was created with."""
        return self._created[group[self._number_key]]

    def restore_groups(self, groups: list[dict[str, Any]]) -> None:
        """Gives each group its own settings again, where all have those of the first.

        DeepSpeed's stage-3 universal load copies them, with the number of the group. The learning rate is a
        schedule's: its progress is kept.
        """
        numbers = [group[self._number_key] for group in groups]
        if len(groups) != len(self._created) or len(set(numbers)) == len(numbers):
            return
        first, created_lr = groups[0], self._created[0]["lr"]
        progress = {key: first[key] / created_lr for key in ("lr", "initial_lr") if key in first and created_lr}
        for group, created in zip(groups, self._created, strict=True):
            group.update(created)
            group.update({key: created["lr"] * value for key, value in progress.items()})

    def is_initialization(self, gradients: Iterable[Tensor]) -> bool:
        """Whether a step on clones of the parameters is one by which stage 0 in half precision allocates the state.

        It has zero gradients, and comes before the first real step.
        """
        self._started = self._started or any(bool(grad.any()) for grad in gradients)
        return not self._started


def unshare_steps(state: dict[Tensor, dict[str, Tensor]]) -> None:
    """DeepSpeed's stage-3 universal load gives all sub-groups the same `step`, which each would then advance."""
    seen = set()
    for entry in filter(None, state.values()):
        if id(entry["step"]) in seen:
            entry["step"] = entry["step"].clone()
        seen.add(id(entry["step"]))
