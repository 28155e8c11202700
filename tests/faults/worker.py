"""DPO runs that are killed where a plan says, and runs that go on from what is left of them.

    accelerate launch … -m tests.faults.worker plan.json

The plan is `{"world_size": …, "folder": …, "chains": {name: [attempt, …], …}}`. All attempts of a chain train in one
folder, each from the last complete checkpoint, and the one without `kill` at the end of the chain writes its weights.
Importing takes longer than a run, so each launched process forks a process for each attempt.
"""

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers import TrainerCallback, TrainerState

from prm_hf.trainers import PRMDPOConfig, PRMDPOTrainer

from ..distributed.launch import free_port
from ..distributed.worker import prepare_backends
from ..tiny import make_model, make_tokenizer, preference_dataset


SECONDS = 90  # for one attempt
RANK = int(os.environ.get("RANK", "0"))


class Killer(TrainerCallback):
    """Kills this process at an event, counted over the attempt.

    `step` is the end of a step; `write` is a file of a checkpoint, of which the share `written` then is there;
    `remove` is the removal of a file of an old checkpoint.
    """

    def __init__(self, kill: dict):
        self.kill, self.counts = kill, Counter()

    def happened(self, event: str, file: str | None = None) -> None:
        self.counts[event] += 1
        if event == self.kill["event"] and self.counts[event] == self.kill["count"]:
            if file is not None:
                os.truncate(file, int(os.path.getsize(file) * self.kill.get("written", 1)))
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs):
        self.happened("step")

    def watch(self) -> None:
        """Tells of each file that a trainer or DeepSpeed writes for a checkpoint, and of each that it removes."""

        def after(function, event, find_file):
            def told(*args, **kwargs):
                result = function(*args, **kwargs)
                self.happened(event, find_file(*args, **kwargs))
                return result

            return told

        torch.save = after(torch.save, "write", lambda _, file, *args, **kwargs: file)
        modeling = transformers.modeling_utils
        modeling.safe_save_file = after(modeling.safe_save_file, "write", lambda _, file, *args, **kwargs: file)
        TrainerState.save_to_json = after(TrainerState.save_to_json, "write", lambda _, file: file)
        rotate = transformers.trainer.rotate_checkpoints

        def rotate_watched(*args, **kwargs):
            unlink = os.unlink
            os.unlink = after(unlink, "remove", lambda *args, **kwargs: None)
            try:
                rotate(*args, **kwargs)
            finally:
                os.unlink = unlink

        transformers.trainer.rotate_checkpoints = rotate_watched


class NoteStart(TrainerCallback):
    def __init__(self, starts: Path):
        self.starts = starts

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            with self.starts.open("a") as file:
                file.write(f"{state.global_step}\n")


def train(folder: Path, kill: dict | None, world_size: int) -> None:
    args = PRMDPOConfig(
        output_dir=str(folder / "run"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        disable_tqdm=True,
        max_steps=20,
        save_steps=2,
        save_total_limit=2,
        per_device_train_batch_size=4 // world_size,
        learning_rate=1e-2,
        weight_decay=0.1,
        lr_scheduler_type="linear",
        max_grad_norm=0.5,
    )
    assert args.world_size == world_size, f"expected {world_size} processes, got {args.world_size}"
    prepare_backends(args.deepspeed_plugin is not None)
    callbacks = [NoteStart(folder / "starts")]
    if kill is not None and kill.get("rank", 0) == RANK:
        killer = Killer(kill)
        killer.watch()
        callbacks.append(killer)
    rows = preference_dataset(14)
    arguments = {"train_dataset": rows, "processing_class": make_tokenizer(), "callbacks": callbacks}
    trainer = PRMDPOTrainer(make_model(), make_model(), args, **arguments)
    trainer.train(resume_from_checkpoint=any(Path(args.output_dir).glob("checkpoint-*")))
    torch.save(trainer.accelerator.get_state_dict(trainer.model), folder / f"weights{RANK}.pt")


def fork(folder: Path, kill: dict | None, world_size: int, port: str) -> int:
    """Starts an attempt in a process of its own and returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ.update(MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="False")
        train(folder, kill, world_size)
        code = 0
    except BaseException:  # noqa: BLE001 - it must not go on as the process that it was forked from
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def attempt(folder: Path, number: int, kill: dict | None, world_size: int) -> None:
    """One attempt in all processes: when one of them is killed, so are the others, as a launcher does it."""
    port, ended = folder / f"port{number}", folder / f"ended{number}"
    if RANK == 0:
        port.with_suffix(".part").write_text(str(free_port()))
        port.with_suffix(".part").rename(port)
    wait_for(port.exists)
    child, status = fork(folder, kill, world_size, port.read_text()), []

    def is_over() -> bool:
        status[:] = os.waitpid(child, os.WNOHANG)
        return status[0] == child or any(folder.glob(f"{ended.name}.killed*"))

    wait_for(is_over)
    if status[0] != child:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status[1])
    if status[0] == child and code == -signal.SIGKILL:
        ended.with_suffix(f".killed{RANK}").touch()
    elif status[0] == child and code != 0 and kill is None:
        raise RuntimeError(f"attempt {number} in {folder} ended with {code}")
    ended.with_suffix(f".rank{RANK}").touch()
    wait_for(lambda: len([*folder.glob(f"{ended.name}.rank*")]) == world_size)


def wait_for(condition) -> None:
    end = time.monotonic() + SECONDS
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"process {RANK} waited for {SECONDS} s")
        time.sleep(0.01)


def main(plan: dict) -> None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed  # noqa: F401 - once, for all attempts
    for name, attempts in plan["chains"].items():
        folder = Path(plan["folder"], name)
        folder.mkdir(parents=True, exist_ok=True)
        for number, kill in enumerate(attempts):
            print(f"==== {name}, attempt {number}: {kill}", flush=True)
            attempt(folder, number, kill, plan["world_size"])


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file))
