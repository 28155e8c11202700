"""Runs an experiment on every GPU of this machine, or of a Ray cluster, until all runs are finished or time is up.

`prm-hf sweep`, and recipes/sweep.py, which has the commands.
"""

import argparse
import contextlib
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from . import INTERRUPTED, OUT_OF_TIME, interruptible


COMMANDS = ("dpo", "sft", "suspects", "regression", "grokking", "pinn")
SECONDS_TO_END = 20  # that workers have to end by themselves


def make_parser() -> argparse.ArgumentParser:
    """Of the flags before the name of the experiment, of the name, and of what belongs to the experiment."""
    parser = argparse.ArgumentParser(
        prog="prm-hf sweep",
        usage=f"prm-hf sweep [--ray ADDRESS] {{{','.join(COMMANDS)}}} [--argument VALUE ...]",
        description=__doc__.splitlines()[0],
        epilog="The other arguments are those of the experiment, which `prm-hf dpo --help`, for instance, lists.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--ray", metavar="ADDRESS", help="of a Ray cluster; `auto` is the one that this machine belongs to"
    )
    parser.add_argument(
        "--gpus_per_run", metavar="GPUS", type=float, help="on Ray; default: 1, on a cluster without GPUs 0"
    )
    parser.add_argument("experiment", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


@interruptible
def main(arguments: list[str]) -> int:
    """Returns the first exit code of a worker that is not 0, a failure before being out of time."""
    options = make_parser().parse_args(arguments)
    name, *others = options.experiment or [""]
    if name not in COMMANDS and not Path(name).is_file():
        raise ValueError(
            f"The first argument must be one of {', '.join(COMMANDS)}, or the path of a recipe, as "
            f"recipes/dpo_noisy.py; got {options.experiment[:1]}."
        )
    if options.gpus_per_run is not None and (options.ray is None or not 0 <= options.gpus_per_run < math.inf):
        raise ValueError(
            f"`--gpus_per_run` is {options.gpus_per_run:g}: it must be a number from 0 on, and needs `--ray`. Without "
            "it each GPU has a process."
        )
    if options.ray is None:
        return _sweep_here(options.experiment)
    if name not in COMMANDS:
        raise ValueError(f"`--ray` needs the name of a command, {', '.join(COMMANDS)}; got {name!r}.")
    from .cluster import sweep_on_ray

    return sweep_on_ray(name, others, options.ray, options.gpus_per_run)


def _sweep_here(arguments: list[str]) -> int:
    """A process on each GPU of this machine."""
    command = [sys.executable, *(["-m", "prm_hf"] if arguments[0] in COMMANDS else []), *arguments]
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
