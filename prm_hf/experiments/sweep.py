"""Runs an experiment on every GPU of this machine, one process each, until all of its runs are finished or time is up.

`prm-hf sweep`, and recipes/sweep.py, which has the commands.
"""

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import INTERRUPTED, OUT_OF_TIME, interruptible


COMMANDS = ("dpo", "sft", "suspects", "regression", "grokking", "pinn")
SECONDS_TO_END = 20  # that workers have to end by themselves


@interruptible
def main(arguments: list[str]) -> int:
    """Returns the first exit code of a worker that is not 0, a failure before being out of time."""
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(f"usage: prm-hf sweep {{{','.join(COMMANDS)}}} [--argument VALUE ...]\n\n{__doc__.splitlines()[0]}\n")
        print("The arguments are those of the experiment, which `prm-hf dpo --help`, for instance, lists.")
        return 0
    if name not in COMMANDS and not Path(name).is_file():
        raise ValueError(
            f"The first argument must be one of {', '.join(COMMANDS)}, or the path of a recipe, as "
            f"recipes/dpo_noisy.py; got {arguments[:1]}."
        )
    command = [sys.executable, *(["-m", "prm_hf"] if name in COMMANDS else []), *arguments]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    with contextlib.ExitStack() as stack:
        workers = []
        for number, device in enumerate(devices or [""]):
            log = stack.enter_context(open(f"worker{number}.log", "w", encoding="utf-8")) if number else None
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
            worker = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            stack.callback(worker.terminate)  # no effect on one that has ended
            workers.append(worker)
        try:
            codes = [worker.wait() for worker in workers]
        except KeyboardInterrupt:  # which a terminal sends to the workers too
            until = time.monotonic() + SECONDS_TO_END
            for worker in workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.wait(timeout=max(0.0, until - time.monotonic()))
            if workers[0].returncode == INTERRUPTED:  # it has said so
                return INTERRUPTED
            raise
    return min((code for code in codes if code), key=lambda code: code == OUT_OF_TIME, default=0)
