"""What lies in a run's folder, and how it gets there whole."""

import importlib.metadata
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from ..trainers.callbacks import find_prm, innermost_optimizer
from ..trainers.config import renamed_settings


# Where a run is written and how it is shown do not make it another run.
NOT_SETTINGS = {
    "output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "disable_tqdm",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "log_level",
    "log_level_replica",
    "local_rank",
    "use_cpu",
    "per_device_train_batch_size",  # the batch of a step counts, however it is spread: see `effective_batch_size`
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "accelerator_config",
    "dataloader_pin_memory",
    "logging_nan_inf_filter",
    "ddp_backend",
    "dataset_num_proc",
    "dataloader_num_workers",
    "learning_rate",  # named beside the settings
    "seed",
}


@dataclass
class RunSpec:
    """One run of a comparison: what makes it this run and no other.

    Attributes:
        configured_as: of a control, the method whose configuration it has.
    """

    method: str
    learning_rate: float
    seed: int
    settings: dict[str, Any]
    configured_as: str | None = None

    @property
    def name(self) -> str:
        rate = f"{self.learning_rate:.3g}".replace("e-0", "e-")
        return f"{self.method.replace(':', '')}_lr{rate}_seed{self.seed}"

    def changes_from(self, info: dict[str, Any]) -> list[str]:
        """What makes this another run than that of a `run.json`, by name. A setting that is None may be missing."""

        def counted(settings: dict[str, Any]) -> dict[str, Any]:
            return {key: value for key, value in settings.items() if key not in NOT_SETTINGS}

        theirs = counted(renamed_settings(info.get("settings", {}))) | {
            key: info.get(key) for key in ("method", "learning_rate", "seed")
        }
        ours = counted(json.loads(json.dumps(self.settings, default=str)))  # as the file has them
        ours |= {"method": self.method, "learning_rate": self.learning_rate, "seed": self.seed}
        return sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))


def find_run(spec: RunSpec, folder: Path, tell: Callable[[str], None]) -> tuple[dict[str, float] | None, bool]:
    """The metrics of a finished run of just this specification, and whether there is a checkpoint to go on from.

    A folder of other settings is emptied; `tell` is given a line that says why.
    """
    info = read_json(folder / "run.json")
    changed = [] if info is None else spec.changes_from(info)
    if info is not None and not changed:
        return read_json(folder / "metrics.json"), get_last_checkpoint(folder) is not None
    if folder.exists():
        tell(f"{spec.name}: trained again, since these settings changed: {', '.join(changed) or 'all'}")
        shutil.rmtree(folder)
    return None, False


def make_run(
    spec: RunSpec,
    folder: Path,
    resume: bool,
    train_run: Callable[[RunSpec, Path, bool], Trainer],
    outcomes: Callable[[Trainer], tuple[dict[str, float], dict[str, list]]],
    info: dict[str, Any],
) -> dict[str, float]:
    """Trains a run, fills its folder and returns its final metrics. Collective.

    Args:
        train_run: trains it. It is given `spec`, `folder` and `resume`; it returns the trainer.
        outcomes: what a trained run gives besides its last evaluation: more metrics, and `margins.json`. Collective.
        info: what `run.json` says besides: `task`, `noise_rate`, `model`, `dataset`.
    """
    state = PartialState()
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    info = {
        "schema": 1,
        "name": spec.name,
        "method": spec.method,
        "learning_rate": spec.learning_rate,
        "seed": spec.seed,
        **info,
        "settings": spec.settings,
        "versions": versions(),
        "hardware": hardware(state),
        "started": started.isoformat(timespec="seconds"),
    }
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "run.json", info)
    trainer = train_run(spec, folder, resume)
    more, margins = outcomes(trainer)
    metrics = final_metrics(trainer) | more
    metrics["wall_seconds"] = round(time.perf_counter() - clock, 3)
    if state.is_main_process:
        info["optimizer"] = describe_optimizer(innermost_optimizer(trainer.optimizer))
        info["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(folder / "run.json", info)
        lines = (json.dumps(row) for row in history(trainer))
        (folder / "history.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        write_json(folder / "margins.json", margins)
        write_json(folder / "metrics.json", metrics)  # last: a folder with it is finished
    state.wait_for_everyone()
    return metrics


def metric_name(key: str) -> str | None:
    """The name in design.md's sense of a key of a trainer's log: evaluations plain, training batches under train/."""
    if key.endswith(("_runtime", "_per_second", "_preparation_time")):
        return None
    if key in ("step", "epoch") or key.startswith("mask/"):
        return key
    return key.removeprefix("eval_") if key.startswith("eval_") else f"train/{key}"


def history(trainer: Trainer) -> list[dict[str, float]]:
    rows = []
    for entry in trainer.state.log_history:
        if "train_runtime" in entry:
            continue
        rows.append({name: value for key, value in entry.items() if (name := metric_name(key)) is not None})
    return rows


def evaluation_metrics(evaluation: dict[str, float]) -> dict[str, float]:
    """What an evaluation of a trainer returned, by the names in a run's files."""
    named = {metric_name(key): value for key, value in evaluation.items()}
    return {key: value for key, value in named.items() if key not in (None, "epoch", "train/epoch")}


def final_metrics(trainer: Trainer) -> dict[str, float]:
    """The last evaluation and the mask of the last step. Collective."""
    metrics = {}
    for row in history(trainer):
        metrics |= {key: value for key, value in row.items() if not key.startswith("train/")}
    metrics = {key: value for key, value in metrics.items() if key not in ("step", "epoch")}
    prm = find_prm(trainer.optimizer)
    if prm is not None:  # a run of fewer steps than `logging_steps` has logged no mask
        metrics |= {f"mask/{name}": value for name, value in prm.get_mask_stats().items()}
    return {**metrics, "steps": trainer.state.global_step}


def describe_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class, largest and smallest learning rate that a schedule starts from, and eps, of the optimizer in effect."""
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    found = {"class": type(optimizer).__name__, "learning_rate": max(map(float, rates))}
    if min(rates) != max(rates):
        found["smallest_learning_rate"] = min(map(float, rates))
    if "eps" in optimizer.param_groups[0]:
        found["eps"] = optimizer.param_groups[0]["eps"]
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("prm-hf", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed"):
        try:
            found[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(state: PartialState) -> dict[str, Any]:
    cuda = state.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(state.device) if cuda else f"{state.device.type} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "world_size": state.num_processes,
        "distributed_type": str(state.distributed_type),
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: an interruption must not leave half a file that looks like a finished run."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, path)


class RunProgress(TrainerCallback):
    """The steps of one run on a bar of their own, in place of the trainer's bar and its printed logs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step", leave=False, position=1)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class StopWhereNotFinite(TrainerCallback):
    """Ends a run whose gradients have become infinite or NaN, and says so: its weights can't come back from there.

    Not in fp16, where steps that overflow are left out.
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        norm = float((logs or {}).get("grad_norm", 0.0))
        if not args.fp16 and not math.isfinite(norm):
            control.should_training_stop = True
            if state.is_world_process_zero:
                tqdm.write(f"{args.output_dir} ends at step {state.global_step}: its gradient's norm is {norm}.")


def show_progress(trainer: Trainer, name: str) -> None:
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunProgress(name))
    trainer.add_callback(StopWhereNotFinite())
