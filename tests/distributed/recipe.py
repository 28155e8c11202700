"""A recipe under `accelerate launch` on a CPU: `-m tests.distributed.recipe dpo <its arguments>`."""

import importlib
import os
import sys

from .worker import prepare_backends, prepare_cpu


def main(name: str, arguments: list[str]) -> None:
    prepare_backends(os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true")  # a model may be loaded before its trainer
    recipe = importlib.import_module(f"prm_hf.experiments.{name}")
    trainer_name = next(key for key in ("PRMDPOTrainer", "PRMSFTTrainer") if hasattr(recipe, key))

    class CPUTrainer(getattr(recipe, trainer_name)):
        def __init__(self, *args, **kwargs):
            prepare_cpu(kwargs["args"])
            super().__init__(*args, **kwargs)

    setattr(recipe, trainer_name, CPUTrainer)
    recipe.main(arguments)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
