"""`recipes/bench_sharded.py` under `accelerate launch` on a CPU: `-m tests.distributed.bench <its arguments>`."""

import importlib.util
import os
import sys
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import DistributedType

from .worker import prepare_backends


def main(arguments: list[str]) -> None:
    path = Path(__file__).parents[2] / "recipes" / "bench_sharded.py"
    specification = importlib.util.spec_from_file_location("bench_sharded", path)
    bench = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(bench)
    PartialState(cpu=True)
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    prepare_backends(os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")
    bench.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
