"""`benchmarks/sharded.py` under `accelerate launch` on a CPU: `-m tests.distributed.bench <its arguments>`."""

import os
import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from benchmarks import sharded as bench

from .worker import prepare_backends


def main(arguments: list[str]) -> None:
    PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    prepare_backends(os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
    bench.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
