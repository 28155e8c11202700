"""Whole parameters out of sharded ones, for reading."""

import contextlib
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor


@contextlib.contextmanager
def whole(*params: torch.Tensor | None) -> Iterator[list[torch.Tensor | None]]:
    """Yields each parameter as one whole tensor, valid for the time of the context.

    Gathers DTensors (FSDP2, tensor parallelism) and DeepSpeed ZeRO-3 partitions, which is collective; hands anything
    else, None included, back as it is.
    """
    with contextlib.ExitStack() as stack:
        partitioned = [p for p in params if hasattr(p, "ds_status")]
        if partitioned:
            import deepspeed
            from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

            # A parameter that is whole already (a tied embedding) must not be partitioned again on leaving, and
            # DeepSpeed mishandles a parameter that is named twice.
            missing = {id(p): p for p in partitioned if p.ds_status != ZeroParamStatus.AVAILABLE}
            stack.enter_context(deepspeed.zero.GatheredParameters(list(missing.values())))
        yield [p.full_tensor() if isinstance(p, DTensor) else p for p in params]
