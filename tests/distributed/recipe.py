"""Commands under `accelerate launch` on a CPU, one after the other: `-m tests.distributed.recipe plan.json`.

The plan is a list of `[command, arguments]`, as `["dpo", ["--max_steps", "2"]]`.
"""

import importlib
import json
import os
import sys
from pathlib import Path

from .worker import prepare_backends, prepare_cpu


def on_cpu(kind: type) -> type:
    class CPUTrainer(kind):
        def __init__(self, *args, **kwargs):
            prepare_cpu(kwargs["args"])
            super().__init__(*args, **kwargs)

    return CPUTrainer


def main(plan: str) -> None:
    prepare_backends(os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")  # a model may be loaded before its trainer
    for name, trainer in (("dpo", "PRMDPOTrainer"), ("sft", "PRMSFTTrainer")):
        experiment = importlib.import_module(f"prm_hf.experiments.{name}")
        setattr(experiment, trainer, on_cpu(getattr(experiment, trainer)))
    for name, arguments in json.loads(Path(plan).read_text()):
        code = importlib.import_module(f"prm_hf.experiments.{name}").main(arguments)
        assert not code, f"{name} ended with exit code {code}"


if __name__ == "__main__":
    main(sys.argv[1])
