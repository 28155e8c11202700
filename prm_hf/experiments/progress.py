"""One run from its start to its end: its files, its progress on a bar, and an early end where it fails."""

import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..optim.hyperparameters import Hyperparameters
from ..runs.write import RunSpec, finish_run, history_of, start_run
from ..trainers.callbacks import find_prm, innermost_optimizer


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
        train_run: given `spec`, `folder` and `resume`, it trains the run and returns the trainer.
        outcomes: what a trained run gives besides its last evaluation: more metrics, and `margins.json`. Collective.
        info: what `run.json` says besides: `task`, `noise_rate`, `model`, `dataset`.
    """
    state, clock = PartialState(), time.perf_counter()
    if state.is_main_process:
        record = start_run(spec, folder, {**info, "hardware": hardware(state)})
    trainer = train_run(spec, folder, resume)
    more, margins = outcomes(trainer)
    metrics = {**final_metrics(trainer), **more, "wall_seconds": round(time.perf_counter() - clock, 3)}
    if state.is_main_process:
        record["optimizer"] = describe_optimizer(innermost_optimizer(trainer.optimizer), trainer.model)
        finish_run(folder, record, history_of(trainer.state.log_history), margins, metrics)
    state.wait_for_everyone()
    return metrics


def final_metrics(trainer: Trainer) -> dict[str, float]:
    """The last evaluation and the mask of the last step. Collective."""
    metrics = {key: value for row in history_of(trainer.state.log_history) for key, value in row.items()}
    metrics = {key: x for key, x in metrics.items() if key not in ("step", "epoch") and not key.startswith("train/")}
    prm = find_prm(trainer.optimizer)
    if prm is not None:  # a run of fewer steps than `logging_steps` has logged no mask
        metrics |= {f"mask/{name}": value for name, value in prm.get_mask_stats().items()}
    return {**metrics, "steps": trainer.state.global_step}


def describe_optimizer(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> dict[str, Any]:
    """Class, largest and smallest learning rate that a schedule starts from, and eps, of the optimizer in effect."""
    first = optimizer.param_groups[0]
    relative_eps = first.get("relative_eps") or 0.0
    rates = [float(group.get("initial_lr", group["lr"])) * (1 + relative_eps) for group in optimizer.param_groups]
    found = {"class": type(optimizer).__name__, "learning_rate": max(rates)}
    found |= {"smallest_learning_rate": min(rates)} if min(rates) != max(rates) else {}
    if relative_eps:
        n_parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
        found["eps"] = Hyperparameters.of_group(first).adam_eps(n_parameters)
    elif "eps" in first:
        found["eps"] = first["eps"]
    return found


def hardware(state: PartialState) -> dict[str, Any]:
    """The device and the number of processes of this run."""
    cuda = state.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(state.device) if cuda else f"{state.device.type} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "world_size": state.num_processes,
        "distributed_type": str(state.distributed_type),
    }


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
    """Gives the trainer these callbacks in place of its own bar and prints."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunProgress(name))
    trainer.add_callback(StopWhereNotFinite())
