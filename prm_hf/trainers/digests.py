"""Hashes of weights: of a reference that rows were made with, and of the weights that training started from."""

from collections.abc import Iterable

import torch
import xxhash
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..metrics import ParameterDrift
from ..metrics.sharded import whole


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A hash of names, types, shapes and all values; a second for some gigabytes."""
    total = xxhash.xxh3_128()
    for name, values in tensors:
        total.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        total.update(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def reference_digest(model: nn.Module, accelerator: Accelerator) -> str | None:
    """The hash of the reference's weights, however they are wrapped and sharded. Collective where they are sharded.

    Of a PEFT model the reference is what is there without adapters, or with a copy named "ref". It is None under
    FSDP1, whose shards have no names.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return None
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    adapters = [name for name in getattr(model, "peft_config", ()) if name != "ref"]

    def weights() -> Iterable[tuple[str, Tensor]]:
        for name, parameter in sorted(model.named_parameters(), key=lambda item: _plain(item[0])):
            if not any(f".{adapter}." in f".{name}." for adapter in adapters):
                with torch.no_grad(), whole(parameter) as (values,):
                    yield _plain(name), values

    return digest(weights())


def start_digest(drift: ParameterDrift) -> str | None:
    """Types and hash of the weights that drift is measured from; None on all processes but the main one."""
    initial = {name: torch.zeros(0) if values is None else values for name, values in drift.initial.items()}
    types = "+".join(sorted({str(values.dtype).removeprefix("torch.") for values in initial.values()}))
    return f"{types}:{digest(initial.items())}" if initial else None


def _plain(name: str) -> str:
    """The name that a weight has in the model without wrappers and adapters."""
    for part in ("_orig_mod.", "_checkpoint_wrapped_module.", "base_model.model.", ".base_layer", ".original_module"):
        name = name.replace(part, "")
    return name
