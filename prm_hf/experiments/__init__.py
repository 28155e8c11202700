"""How runs are made: arguments, data, the grid of runs, the runner, and one module for each task."""

import functools
import os
from collections.abc import Callable

from .._extras import require


require("prm_hf.experiments", "transformers", "trl", "accelerate", "datasets", "peft", "scipy", "filelock", "yaml")

OUT_OF_TIME = 75  # the exit code by which programs say "not now, try again"
INTERRUPTED = 130  # and after an interruption by the keyboard


def interruptible(main: Callable[..., int]) -> Callable[..., int]:
    """A command that an interruption ends in one line; what is finished by then stays finished."""

    @functools.wraps(main)
    def command(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs)
        except KeyboardInterrupt:
            if os.environ.get("RANK", "0") == "0":
                print("\nInterrupted. The same command goes on from here.", flush=True)
            return INTERRUPTED

    return command
