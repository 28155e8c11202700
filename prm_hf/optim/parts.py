"""What a parameter group hands to a step: its settings, and its tensors in parts that one implementation can take."""

import functools
import importlib.util
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sharding import RowSpan
from . import masks
from .step import HYPERPARAMETERS
from .validation import validate_group


# What of a parameter group decides the step: all of `PRM`'s arguments.
SETTINGS = HYPERPARAMETERS - {"beta1", "beta2"} | {
    "betas",
    "boundary",
    "batch_size",
    "n_dataset",
    "foreach",
    "fused",
    "state_dtype",
}
_LISTS = (
    "params",
    "grads",
    "exp_avgs",
    "exp_avg_sqs",
    "max_exp_avg_sqs",
    "grad_vars",
    "exp_avg_signals",
    "state_steps",
)


@dataclass
class Part:
    """The tensors of a parameter group of one device and state dtype.

    Attributes:
        lists: by name in [`ListStep`], slices that each lie in one original tensor.
        owners: of each slice, the number of its original tensor.
        spans: for tensors and rows in parts, what each slice is of; a tensor counts as one row. Slices of rows are
            matrices.
        tensors: for `per_tensor` and rows in parts, by number of each original tensor that advances: elements,
            `grad_var`, `step`.
        counters: the `step` of each local tensor.
    """

    hyper: dict[str, Any]
    foreach: bool | None
    device: torch.device
    fused: bool = False
    lists: dict[str, list[Tensor]] = field(default_factory=lambda: {name: [] for name in _LISTS})
    owners: list[int] = field(default_factory=list)
    spans: list[RowSpan] = field(default_factory=list)
    tensors: dict[int, tuple[int, Tensor, Tensor]] = field(default_factory=dict)
    counters: list[Tensor] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.owners)

    @property
    def in_rows(self) -> bool:
        """Whether masks are of rows that may lie in several processes."""
        return self.hyper["reduction"] == masks.ROWS_IN_PARTS

    def extend(self, numbers: list[int | None], lists: dict[str, list[Tensor]], step: Tensor) -> None:
        """Adds slices of one local tensor; a whole tensor, whose number is None, gets its place among the slices."""
        self.owners += [len(self.owners)] if numbers == [None] else numbers
        for name, tensors in lists.items():
            self.lists[name] += tensors
        self.lists["state_steps"] += [step] * len(numbers)


def use_fused(group: dict[str, Any], lists: dict[str, list[Tensor]]) -> bool:
    """Whether a part is stepped by the kernel: if asked for, and by default on CUDA where Triton is installed."""
    if group["fused"] is False or group["foreach"] or group["differentiable"]:
        return False
    if group["fused"] is None and (not lists["params"][0].is_cuda or not _triton_is_available()):
        return False
    from .fused import supports

    if not supports(lists):
        if group["fused"]:
            raise ValueError(
                "Invalid fused=True: the kernel takes contiguous float32, bfloat16 and float16 tensors on a CUDA "
                f"device; there are {lists['params'][0].dtype} ones on {lists['params'][0].device}. Leave fused=None."
            )
        return False
    return True


@functools.cache
def _triton_is_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of [`prm`] that a parameter group stands for."""
    validate_group(group)  # schedulers and users change groups while training
    hyper = {key: group[key] for key in HYPERPARAMETERS if key in group}
    hyper["beta1"], hyper["beta2"] = group["betas"]
    hyper["alpha"] = masks.boundary_alpha(group["boundary"], group["alpha"], group["batch_size"], group["n_dataset"])
    hyper["mask_eps"] = masks.SCALE_FREE_EPS if group["mask_eps"] is None else group["mask_eps"]
    return hyper
