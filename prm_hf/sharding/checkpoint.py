"""Checkpoints of `Trainer` that were written under another way of sharding: of one process or DDP, and of FSDP2.

(DeepSpeed converts its own: `python -m deepspeed.checkpoint.ds_to_universal`.)
"""

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from .tensors import shard, shard_rows


# Where accelerate puts what FSDP saves as SHARDED_STATE_DICT
SHARDED_MODEL, SHARDED_OPTIMIZER = "pytorch_model_fsdp_0", "optimizer_0"


def is_sharded(folder: str | Path) -> bool:
    """Whether a checkpoint was written under FSDP as `SHARDED_STATE_DICT`."""
    return Path(folder, SHARDED_OPTIMIZER).is_dir()


def load_model(model: nn.Module, folder: str | Path) -> None:
    """Loads the weights of either kind of checkpoint into a model of either kind. Collective.

    Raises:
        ValueError: the model has adapters, or the checkpoint lacks weights of the model or has others.
    """
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"The checkpoint {str(folder)!r} has adapters and was written under another way of sharding, which cannot "
            "be resumed from. Launch as it was launched; or load the adapters alone and start a fresh optimizer."
        )
    if is_sharded(folder):
        state = {"model": get_model_state_dict(model)}
        dcp.load(state, checkpoint_id=Path(folder, SHARDED_MODEL))
        set_model_state_dict(model, state["model"])
        return
    from safetensors.torch import load_file

    state = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        state |= load_file(file)
    keys = set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    absent = [name for name in keys.missing_keys if not _is_tied(model, name)]
    if absent or keys.unexpected_keys:
        raise ValueError(
            f"The checkpoint {str(folder)!r} is of another model: it lacks {absent[:3]} and has "
            f"{keys.unexpected_keys[:3]}."
        )


def load_optimizer(model: nn.Module, optimizer: Optimizer, folder: str | Path) -> None:
    """Loads the optimizer state of either kind of checkpoint into an optimizer of either kind. Collective.

    The parameters must be in the same groups, in the same order, as `Trainer` puts them.
    """
    if is_sharded(folder):
        state = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        # A checkpoint of an earlier version has other settings, and torch reads none but those that it is asked for.
        for number, group in enumerate(state["optimizer"]["param_groups"]):
            saved = saved_settings(folder, number)
            state["optimizer"]["param_groups"][number] = {key: group.get(key) for key in saved}
        for name, own in state["optimizer"]["state"].items():
            _follow_saved(own, f"optimizer.state.{name}.", _metadata(folder))
        dcp.load(state, checkpoint_id=Path(folder, SHARDED_OPTIMIZER))
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        return
    state_dict = torch.load(Path(folder, "optimizer.pt"), map_location="cpu", weights_only=True)
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    for i, (p, group) in zip(ids, params, strict=True):
        if isinstance(p, DTensor) and i in state_dict["state"]:
            state_dict["state"][i] = {
                # Each process has read the whole, and keeps its part
                key: shard(value, p)
                # (`load_state_dict` does so for `grad_var` of rows, and for codes, which have scales)
                if value.shape == p.shape
                and not (key == "grad_var" and group["reduction"] == "per_row")
                and value.dtype != torch.uint8
                else value
                for key, value in state_dict["state"][i].items()
            }
    optimizer.load_state_dict(state_dict)


def _follow_saved(own: dict[str, torch.Tensor], prefix: str, saved: dict[str, Any]) -> None:
    """Makes what torch reads the state of a parameter into as it was saved: moments as codes with scales, or not."""
    for key in [key for key in own if f"{key}_scale" in own and f"{prefix}{key}_scale" not in saved]:
        del own[f"{key}_scale"]
    for key, value in list(own.items()):
        entry, scale = saved.get(f"{prefix}{key}"), saved.get(f"{prefix}{key}_scale")
        if entry is not None and torch.uint8 in (value.dtype, entry.properties.dtype):
            own[key] = torch.empty_like(value, dtype=entry.properties.dtype)
        if scale is not None:
            empty = torch.empty(scale.size, dtype=scale.properties.dtype, device=value.device)
            own[f"{key}_scale"] = shard_rows(empty, value)


def saved_settings(folder: str | Path, group: int) -> list[str]:
    """The names of what a sharded checkpoint keeps with a parameter group, its parameters included."""
    prefix = f"optimizer.param_groups.{group}."
    return [name.removeprefix(prefix) for name in _metadata(folder) if name.startswith(prefix)]


def saved_variance_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """By name of each parameter in a sharded checkpoint, the shape of the `grad_var` that was saved for it."""
    prefix, suffix = "optimizer.state.", ".grad_var"
    return {
        name.removeprefix(prefix).removesuffix(suffix): tuple(entry.size)
        for name, entry in _metadata(folder).items()
        if name.startswith(prefix) and name.endswith(suffix)
    }


def _metadata(folder: str | Path) -> dict[str, Any]:
    return dcp.FileSystemReader(Path(folder, SHARDED_OPTIMIZER)).read_metadata().state_dict_metadata


def _is_tied(model: nn.Module, name: str) -> bool:
    """Whether a parameter is another one of the model under a second name; `safetensors` keeps one of the two."""
    return name not in dict(model.named_parameters())
