"""The state of a parameter: how it begins, and how it comes from a checkpoint.

`step` (0-dim float32), `exp_avg`, `exp_avg_sq` and with `amsgrad` `max_exp_avg_sq` (the parameter's shape; float32 for
bfloat16 and float16 parameters, or the first two as `state_dtype` says, where `"8bit"` adds `exp_avg_scale` and
`exp_avg_sq_scale`); unless `mask="none"`, `grad_var` (the parameter's shape for `per_param`, 0-dim float64 for
`per_tensor`, float64 `(rows,)` for `per_row`, a DTensor where each process holds whole rows); with `signal_beta`
`exp_avg_signal` (as `exp_avg`). `grad_var` estimates the variance of the gradient of the batch *mean*: with per-
example gradients at hand its long-run mean is their population variance over b - 1.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from ..sharding import FlatBuffer, has_whole_rows, is_dtensor, shard, shard_rows
from . import masks
from .hyperparameters import Hyperparameters
from .quantized import (
    MOMENTS,
    is_quantizable,
    is_quantized,
    moment_of,
    n_blocks_of,
    quantized_zeros,
    read,
    requantize,
    scale_key,
)


STATE_KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad_var", "exp_avg_signal")
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_NAMES = {"bf16": "bfloat16", "8bit": "8 bits"}  # of a `state_dtype`, for people


def new_state(p: Tensor, group: dict[str, Any], flat: FlatBuffer | None) -> dict[str, Tensor]:
    """The state before the first step of a local tensor; of a `flat` buffer `grad_var` of units lies elsewhere."""
    state = {"step": torch.zeros((), dtype=torch.float32, device=_step_device(p, group))}
    for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
        state |= _new_moment(p, key, group["state_dtype"], flat)
    if group["mask"] == "none":
        return state
    if group["reduction"] == "per_param":
        state["grad_var"] = torch.zeros_like(p, dtype=_state_dtype(p), memory_format=torch.preserve_format)
    elif flat is None:
        shape = (masks.n_rows(p),) if group["reduction"] == "per_row" else ()
        zeros = torch.zeros(shape, dtype=masks.statistics_dtype(p.device), device=p.device)
        state["grad_var"] = shard_rows(zeros, p) if shape else zeros
    if group["signal_beta"] is not None:
        state |= _new_moment(p, "exp_avg_signal", group["state_dtype"], flat)
    return state


def load_state(
    param_groups: list[dict[str, Any]], state: dict[Tensor, dict], state_dict: dict[str, Any], replaced: list[bool]
) -> None:
    """Takes the values of a state dict again that torch has loaded, in the precision that they were saved in.

    torch casts state to the parameter's dtype: bfloat16 for state that we keep in float32, and float32 for the float64
    `grad_var` and for codes. The values are copied, so that two optimizers never share the tensors that their steps
    change in place. Moments that were kept otherwise than `state_dtype` says are converted, with a warning.

    Args:
        replaced: by group, whether its tensors are flat buffers, of which the first step will know what they hold and
            convert it.

    Raises:
        ValueError: of moments in 8 bits there are codes alone.
    """
    converted: set[tuple[str, str]] = set()
    for group, theirs, is_replaced in zip(param_groups, state_dict["param_groups"], replaced, strict=True):
        for saved_id, p in zip(theirs["params"], group["params"], strict=True):
            if saved_id in state_dict["state"]:
                if is_dtensor(p):
                    _check_codes(p, state_dict["state"][saved_id], theirs.get("state_dtype"), group["state_dtype"])
                of_reading = _load_tensor(p, group, state[p], dict(state_dict["state"][saved_id]))
                changes = set() if is_replaced else convert(p, state[p], group["state_dtype"])
                converted |= of_reading or changes
        kept = [x.get("state_dtype", "float32") for x in (theirs, group)]
        if is_replaced and theirs["params"] and kept[0] != kept[1]:
            converted.add(tuple(_NAMES.get(x, x) for x in kept))
    for theirs, ours in sorted(converted):
        warnings.warn(
            f"Moments that the checkpoint keeps in {theirs} are kept in {ours} by this optimizer, as its "
            "`state_dtype` says. They were converted, so training goes on from nearly the same state, and not bit for "
            "bit as it would have.",
            stacklevel=2,
        )


def _load_tensor(p: Tensor, group: dict[str, Any], state: dict[str, Tensor], saved: dict[str, Any]) -> set:
    """Copies what was saved of a tensor into its state; returns, as [`convert`], what it had to convert to read it."""
    converted = set()
    # torch moves it to the device for any optimizer with `fused`, where ours would have to wait for it.
    state["step"] = state["step"].clone().to(_step_device(p, group))
    for key in (*STATE_KEYS, *map(scale_key, MOMENTS)):
        if key not in saved:
            continue
        value, wanted = saved[key].detach(), _wanted_dtype(p, key, group["state_dtype"])
        if hasattr(value, "codes"):  # of torchao, which earlier versions took for 8 bits
            value = value.dequantize(torch.float32)
            converted.add(("torchao's 8 bits", _dtype_name(wanted)))
        if is_quantized(value) and is_dtensor(p) and not has_whole_rows(p):  # one row, of which a process has a part
            value = shard(read(moment_of(saved, key), torch.float32), p)
            converted.add((_dtype_name(torch.uint8), _dtype_name(wanted)))
            del saved[scale_key(key)], state[scale_key(key)]
        as_saved = key in MOMENTS and value.dtype in (torch.uint8, torch.bfloat16)
        dtype = value.dtype if as_saved else torch.promote_types(value.dtype, _state_dtype(p))
        state[key] = torch.clone(value).to(device=p.device, dtype=dtype)
        of_rows = key == "grad_var" and group["reduction"] == "per_row"
        if of_rows or is_quantized(value) or key not in STATE_KEYS:  # whole in a checkpoint of whole tensors
            state[key] = shard_rows(state[key], p)
    return converted


def _check_codes(p: Tensor, saved: dict[str, Any], theirs: str | None, ours: str) -> None:
    """Raises ValueError if codes of a shard were read without their scales, or as if they were values.

    torch reads a checkpoint of shards into tensors of the keys and dtypes that the optimizer has now.
    """
    if "exp_avg" not in saved or hasattr(saved["exp_avg"], "codes"):
        return
    if is_quantized(saved["exp_avg"]):
        is_right = theirs == "8bit" and scale_key("exp_avg") in saved
    else:
        is_right = theirs != "8bit" or not is_quantizable(p)
    if not is_right:
        raise ValueError(
            f"The checkpoint was written with state_dtype={theirs!r}, and this optimizer has state_dtype={ours!r}, "
            "into which torch cannot read it where parameters are sharded. Resume with "
            f"state_dtype={theirs!r}; or let `CheckpointMixin` of prm_hf.trainers read a `SHARDED_STATE_DICT`, which "
            "it converts."
        )


def convert(
    p: Tensor, state: dict[str, Tensor], state_dtype: str, flat: FlatBuffer | None = None
) -> set[tuple[str, str]]:
    """Keeps the moments of a parameter as `state_dtype` says, rounded to the nearest where they were kept otherwise.

    Returns:
        From which dtypes to which, for people.
    """
    converted = set()
    for key in (key for key in MOMENTS if key in state):
        wanted, old = _wanted_dtype(p, key, state_dtype, flat), moment_of(state, key)
        if old.dtype == wanted or (old.dtype.itemsize >= 4 and wanted.itemsize >= 4):
            continue
        state.pop(scale_key(key), None)
        state |= _new_moment(p, key, state_dtype, flat)
        requantize(old, moment_of(state, key), _state_dtype(p), flat)
        converted.add((_dtype_name(old.dtype), _dtype_name(wanted)))
    return converted


def complete(group: dict[str, Any], state: dict[Tensor, dict], defaults: dict[str, Any]) -> None:
    """Brings a group and its state up to date, which may come from a checkpoint or a pickle of an earlier version.

    The group gets the defaults of what it lacks, and these what was meant before there was such a setting. Steps that
    are numbers become tensors.
    """
    unmasked = {"mask_min_elements": 0}  # a checkpoint keeps the masks that it was trained with
    earliest = vars(Hyperparameters(reduction="per_param", estimator="ema")) | unmasked
    for key, value in (earliest | defaults | unmasked).items():
        group.setdefault(key, value)
    for key, value in earliest.items():
        defaults.setdefault(key, value)
    for p in group["params"]:
        step = state.get(p, {}).get("step")
        if step is not None and not isinstance(step, Tensor):
            state[p]["step"] = torch.tensor(float(step), dtype=torch.float32, device=_step_device(p, group))


def _step_device(p: Tensor, group: dict[str, Any]) -> torch.device | str:
    return p.device if group["capturable"] else "cpu"


def _state_dtype(p: Tensor) -> torch.dtype:
    return torch.float32 if p.dtype in _LOW_PRECISION else p.dtype


def _wanted_dtype(p: Tensor, key: str, state_dtype: str, flat: FlatBuffer | None = None) -> torch.dtype:
    if key not in MOMENTS or state_dtype == "float32" or (state_dtype == "8bit" and not is_quantizable(p, flat)):
        return _state_dtype(p)
    return torch.bfloat16 if state_dtype == "bf16" else torch.uint8


def _dtype_name(dtype: torch.dtype) -> str:
    return _NAMES["8bit"] if dtype == torch.uint8 else str(dtype).removeprefix("torch.")


def _new_moment(p: Tensor, key: str, state_dtype: str, flat: FlatBuffer | None) -> dict[str, Tensor]:
    """Zeros for a state of a parameter's shape, as `state_dtype` says that it is kept."""
    dtype = _wanted_dtype(p, key, state_dtype, flat)
    if dtype == torch.uint8:
        return quantized_zeros(p, key, flat)
    return {key: torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)}


def check_variances(number: int, group: dict[str, Any], states: list[dict[str, Tensor] | None]) -> None:
    """Raises ValueError if a checkpoint's states of a group that is masked have no `grad_var`."""
    if group["mask"] != "none" and any(state and "grad_var" not in state for state in states):
        raise ValueError(
            f"The checkpoint's parameter group {number} has no `grad_var`: it was written by another optimizer than "
            "PRM, or with mask='none'. Start from the weights alone with a fresh optimizer, or create this one with "
            "mask='none'."
        )


def check_state(state: dict[str, Tensor], group: dict[str, Any], flat: FlatBuffer | None) -> None:
    """Raises ValueError if a state that is there already lacks what the group's settings need, or is of others."""
    scale = state.get(scale_key("exp_avg"))
    if flat is not None and scale is not None and len(scale) != (n := n_blocks_of(state["exp_avg"], flat)):
        raise ValueError(
            f"The checkpoint has {len(scale)} blocks of 8-bit values in a flat buffer of {n}: it belongs to another "
            "model, to other trained parameters or to another process."
        )
    masked, reduction = group["mask"] != "none", group["reduction"]
    needed = {
        "max_exp_avg_sq": (group["amsgrad"], "", "amsgrad=False"),
        "exp_avg_signal": (masked and group["signal_beta"] is not None, " of signal_beta", "signal_beta=None"),
        "grad_var": (
            masked and (reduction == "per_param" or flat is None),
            f" of reduction={reduction!r}",
            "reduction='per_tensor', whose `grad_var` they keep",
        ),
    }
    for name, (wanted, what, instead) in needed.items():
        if not wanted or name in state:
            continue
        if flat is not None:
            raise ValueError(
                f"The checkpoint has no `{name}`{what}, which DeepSpeed's universal checkpoints do not keep: resume "
                f"the original one on as many processes as wrote it, or train with {instead}."
            )
        raise ValueError(
            f"A setting was changed that needs `{name}`, and the state of its group has none: mask={group['mask']!r}, "
            f"amsgrad={group['amsgrad']!r}, signal_beta={group['signal_beta']!r}. Set it from the first step on; to "
            "start with plain AdamW set `mask_warmup_steps` instead of mask='none'."
        )
