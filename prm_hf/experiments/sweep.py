"""Runs a recipe on every GPU of this machine, one process each, until all of its runs are finished or time is up.

    python recipes/sweep.py recipes/dpo_noisy.py --config recipes/qwen2.5-0.5b/gsm8k_pairs.yaml \
        --dataset_name gsm8k_pairs.train.jsonl --eval_dataset_name gsm8k_pairs.test.jsonl --max_minutes 25

All arguments are the recipe's. The processes share its folder: each takes the next run that no other is at, and a run
is never spread over GPUs. Interrupted, or out of time (exit code 75), the same command goes on where it stopped, also
on another machine that has the folder, and on another number of GPUs. The output of all but the first process goes to
`worker<i>.log` in the working folder. Without a GPU there is one process.
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import torch


def main(arguments: list[str]) -> int:
    """Returns the first exit code of a worker that is not 0, a failure before being out of time."""
    if not arguments or not Path(arguments[0]).is_file():
        raise ValueError(f"The first argument must be a recipe, as recipes/dpo_noisy.py, got {arguments[:1]}.")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    with contextlib.ExitStack() as stack:
        workers = []
        for number, device in enumerate(devices or [""]):
            log = stack.enter_context(open(f"worker{number}.log", "w", encoding="utf-8")) if number else None
            environment = {**os.environ, "CUDA_VISIBLE_DEVICES": device}
            worker = subprocess.Popen([sys.executable, *arguments], env=environment, stdout=log, stderr=log)
            stack.callback(worker.terminate)  # no effect on one that has ended
            workers.append(worker)
        codes = [worker.wait() for worker in workers]
    return min((code for code in codes if code), key=lambda code: code == 75, default=0)
