"""What a parameter group may contain. Every error names the argument, its value and what is allowed."""

import importlib.util
import math
from typing import Any

from torch import Tensor

from . import masks


STATE_DTYPES = ("float32", "bf16", "8bit")


def validate_group(group: dict[str, Any]) -> None:
    """Raises ValueError for a group's first invalid setting, naming argument, value and what is allowed."""
    validate_lr(group)
    betas = group["betas"]
    check(isinstance(betas, (tuple, list)) and len(betas) == 2, "betas", betas, "it must be a pair of numbers")
    for i, beta in enumerate(betas):
        check(number(beta) and 0 <= beta < 1, f"betas[{i}]", beta, "it must be in [0, 1)")
    check(number(group["rho"]) and 0 <= group["rho"] < 1, "rho", group["rho"], "it must be in [0, 1)")
    for name in ("eps", "weight_decay", "softness"):
        check(number(group[name]) and group[name] >= 0, name, group[name], "it must be a finite number of at least 0")
    for name in ("alpha", "mask_eps"):
        value = group[name]
        check(
            value is None or (number(value) and value >= 0),
            name,
            value,
            "it must be None or a finite number of at least 0",
        )
    for name, allowed in (
        ("mask", masks.MASKS),
        ("reduction", masks.REDUCTIONS),
        ("estimator", masks.ESTIMATORS),
        ("boundary", masks.BOUNDARIES),
        ("state_dtype", STATE_DTYPES),
    ):
        check(group[name] in allowed, name, group[name], "it must be one of " + ", ".join(map(repr, allowed)))
    signal_beta = group["signal_beta"]
    if signal_beta is not None:
        check(number(signal_beta) and 0 <= signal_beta < 1, "signal_beta", signal_beta, "it must be None or in [0, 1)")
        check(
            group["reduction"] == "per_row" and group["estimator"] == "debiased",
            "signal_beta",
            signal_beta,
            "it needs reduction='per_row' and estimator='debiased', and there are reduction="
            f"{group['reduction']!r} and estimator={group['estimator']!r}; set these, or leave signal_beta=None",
        )
    if group["reduction"] == "per_row":
        message = "blocks of 8-bit values do not end where rows do; use 'bf16' or 'float32', or reduction='per_tensor'"
        check(group["state_dtype"] != "8bit", "state_dtype", "8bit", message)
    steps = group["warmup_steps"]
    check(number(steps) and steps >= 0 and steps == int(steps), "warmup_steps", steps, "it must be an integer ≥ 0")
    for name in ("batch_size", "n_dataset"):
        value = group[name]
        check(
            value is None or (number(value) and value >= 1 and value == int(value)),
            name,
            value,
            "it must be None or a positive integer",
        )
        if group["boundary"] == "empirical" and group["alpha"] is None:
            check(value is not None, name, value, "boundary='empirical' needs it for alpha = b/(n-b); or give `alpha`")
    if group["batch_size"] is not None and group["n_dataset"] is not None:
        check(
            group["n_dataset"] > group["batch_size"],
            "n_dataset",
            group["n_dataset"],
            f"it must be larger than batch_size={group['batch_size']}",
        )
    if group["state_dtype"] != "float32":
        message = "autograd cannot run through what it rounds; use state_dtype='float32'"
        check(not group["differentiable"], "state_dtype", group["state_dtype"], message)
    if group["state_dtype"] == "8bit":
        check(not group["fused"], "state_dtype", "8bit", "the fused kernel does not read it; leave fused=None")
        check(
            importlib.util.find_spec("torchao") is not None,
            "state_dtype",
            "8bit",
            "it needs torchao; install it with `pip install \"prm-hf[torchao]\"`, or use 'bf16'",
        )
    if group["fused"]:
        check(not group["foreach"], "fused", True, "`fused` and `foreach` cannot both be True")
        check(not group["differentiable"], "fused", True, "autograd cannot run through it; use fused=False")
        check(
            importlib.util.find_spec("triton") is not None,
            "fused",
            True,
            'it needs Triton; install it with `pip install "prm-hf[triton]"`, or leave fused=None',
        )
    if group["foreach"]:
        check(not group["differentiable"], "foreach", True, "autograd cannot run through it; use foreach=False")


def validate_lr(group: dict[str, Any]) -> None:
    """[`validate_group`] for the learning rate alone, which a schedule changes at each step."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        check(lr.numel() == 1, "lr", lr, "a tensor learning rate must have one element")
        check(
            not group["foreach"] or group["capturable"],
            "lr",
            lr,
            "a tensor learning rate with foreach=True needs capturable=True",
        )
        # On an accelerator looking at the value would stop the step for it.
        check(lr.device.type != "cpu" or lr.item() >= 0, "lr", lr, "the learning rate must be at least 0")
    else:
        check(number(lr) and lr >= 0, "lr", lr, "the learning rate must be a finite number of at least 0")


def check(valid: bool, name: str, value: Any, allowed: str) -> None:
    if not valid:
        raise ValueError(f"Invalid {name}={value!r}: {allowed}.")


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_reduction(number: int, ours: str, theirs: str) -> None:
    """Raises ValueError if a parameter group and the checkpoint for it are not of one `reduction`."""
    if theirs != ours:
        raise ValueError(
            f"The checkpoint's parameter group {number} was trained with reduction={theirs!r}, this optimizer was "
            f"created with reduction={ours!r}: their `grad_var` cannot be converted. Create the optimizer with "
            f"reduction={theirs!r}, or start from the weights alone with a fresh optimizer."
        )


def check_signal_beta(number: int, ours: float | None, theirs: float | None) -> None:
    """Raises ValueError if a parameter group has `exp_avg_signal` and the checkpoint for it has not, or vice versa."""
    if (theirs is None) != (ours is None):
        raise ValueError(
            f"The checkpoint's parameter group {number} was trained with signal_beta={theirs!r}, this optimizer was "
            f"created with signal_beta={ours!r}: only one of them has `exp_avg_signal`. Create the optimizer with "
            f"signal_beta={theirs!r}, or start from the weights alone with a fresh optimizer."
        )


def check_held_in_parts(reduction: str, state_dtype: str, path: str) -> None:
    """Raises ValueError for what can't be had where `path` says that tensors are held in parts.

    FSDP1 keeps to itself where in a tensor a shard begins. DeepSpeed's flat buffers and FSDP1's optimizer state are
    converted and moved by these libraries as float32, and blocks of 8-bit values do not end where the shards of a
    tensor do.
    """
    if reduction == "per_row" and path.startswith("FSDP1"):
        raise ValueError(
            f"Invalid reduction='per_row': it is not supported under {path}, which does not say which rows of a "
            "tensor a process holds. Use FSDP2 (`fsdp_version: 2`), or reduction='per_tensor'."
        )
    if state_dtype == "8bit" or (state_dtype == "bf16" and path != "FSDP2"):
        raise ValueError(
            f"Invalid state_dtype={state_dtype!r}: it is not supported under {path}. Use state_dtype='float32'; or "
            "FSDP2, where 'bf16' works; or one process or DDP, where every state_dtype does."
        )
