"""What lies in a run's folder, and how it gets there whole."""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback


def metric_name(key: str) -> str | None:
    """The name in a run's files of a key of a trainer's log: evaluations plain, training batches under train/."""
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
    """The last evaluation and the mask of the last step."""
    metrics = evaluation_metrics(trainer.last_eval_metrics)
    logged = [row for row in trainer.state.log_history if any(key.startswith("mask/") for key in row)]
    if logged:
        metrics |= {key: value for key, value in logged[-1].items() if key.startswith("mask/")}
    return {**metrics, "steps": trainer.state.global_step}


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


def show_progress(trainer: Trainer, name: str) -> None:
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunProgress(name))
