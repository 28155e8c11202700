"""One run from its start to its end: its files, its progress on a bar, and an early end where it diverges."""

import math
import os
import platform
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.integrations import get_reporting_integration_callbacks

from ..optim.hyperparameters import Hyperparameters
from ..runs.schema import COST, has_diverged
from ..runs.write import RunSpec, finish_run, finished_metrics, history_of, start_run
from ..trainers.callbacks import find_prm, innermost_optimizer
from .grid import Grid


class DivergedError(Exception):
    """The loss of a run was not finite at `step`."""

    def __init__(self, step: int) -> None:
        self.step = step
        super().__init__(f"the loss is not finite at step {step}")


def make_run(
    grid: Grid,
    spec: RunSpec,
    folder: Path,
    resume: bool | str,
    bar: tqdm,
    make_along: Callable[["Trained"], None] = lambda trained: None,
) -> dict[str, Any]:
    """Trains a run, fills its folder and returns its final metrics. Collective.

    Args:
        resume: whether there is a checkpoint to go on from, of which the trainer takes the last complete one; or the
            path of one in the folder of another run.
        bar: of the runs; the steps of this one move it on by one.
        make_along: makes other runs of the trained weights. It is called once this run is measured and before it
            counts as finished, so that after an interruption its checkpoint gives these runs as well.

    Returns:
        `steps`, `wall_seconds` and all that was measured; of a run whose loss was not finite instead of that
        `diverged`, which is True, and `diverged_at_step`.
    """
    clock = time.perf_counter()
    record = _begin(grid, spec, folder)
    trained = Trained(grid, grid.make_trainer(spec, folder))
    show_progress(trained.trainer, spec.name, bar)
    try:
        trained.trainer.train(resume_from_checkpoint=resume or None)
    except DivergedError as error:
        trained.error = error
    # The path is of another run's checkpoint, whose training this one rests on
    before = finished_metrics(Path(resume).parent) if isinstance(resume, str) else None
    metrics, margins = trained.measure(spec, folder, clock, {COST: before["wall_seconds"]} if before else None)
    trained.cost = metrics.get(COST, metrics["wall_seconds"])
    make_along(trained)
    trained.finish(folder, record, margins, metrics)
    return metrics


def _begin(grid: Grid, spec: RunSpec, folder: Path) -> dict[str, Any] | None:
    """Writes `run.json` in the main process, and returns what it says."""
    state = PartialState()
    if not state.is_main_process:
        return None
    return start_run(spec, folder, {**grid.info_of(spec), "hardware": hardware(state)})


class Trained:
    """A trainer whose training has ended, and the runs that are made of its weights.

    Attributes:
        error: with which it ended, if the loss was not finite.
        cost: the seconds that its own run has taken, and those that this one rests on.
    """

    def __init__(self, grid: Grid, trainer: Trainer) -> None:
        self.grid, self.trainer = grid, trainer
        self.error: DivergedError | None = None
        self.cost = 0.0

    def make(self, spec: RunSpec, folder: Path) -> dict[str, Any]:
        """Fills the folder of a run besides the trainer's own, and returns its final metrics. Collective."""
        clock, log = time.perf_counter(), self.trainer.state.log_history
        for tracker in get_reporting_integration_callbacks(self.trainer.args.report_to):
            self.trainer.remove_callback(tracker)  # which would take it for the trainer's own run
        record, logged = _begin(self.grid, spec, folder), len(log)
        try:
            metrics, margins = self.measure(spec, folder, clock, {COST: self.cost})
            self.finish(folder, record, margins, metrics)
        finally:
            del log[logged:]
        return metrics

    def measure(
        self, spec: RunSpec, folder: Path, clock: float, known: dict[str, float] | None = None
    ) -> tuple[dict[str, Any], dict[str, list]]:
        """Final metrics and margins of a run that was begun at `clock`, with what is `known` of it. Collective."""
        trainer = self.trainer
        try:
            if self.error is not None:
                raise self.error
            more, margins = self.grid.outcomes(spec, trainer)
            if trainer.args.save_strategy != "no":  # now that the weights are those that were measured
                trainer.save_model(str(folder))
            metrics = {**final_metrics(trainer), **more}
            if has_diverged(metrics):  # in the last step, or in fp16
                raise DivergedError(_first_not_finite(trainer))
        except DivergedError as error:
            metrics = {"diverged": True, "diverged_at_step": error.step, "steps": trainer.state.global_step}
            margins = {}
        metrics = {**metrics, **(known or {}), "wall_seconds": round(time.perf_counter() - clock, 3)}
        if COST in metrics:  # so far that of the runs before this one that it needs
            metrics[COST] = round(metrics[COST] + metrics["wall_seconds"], 3)
        return metrics, margins

    def finish(
        self, folder: Path, record: dict[str, Any] | None, margins: dict[str, list], metrics: dict[str, Any]
    ) -> None:
        """Writes the files of a run; `record` is what `_begin` returned. Collective."""
        if record is not None:
            trainer = self.trainer
            record["optimizer"] = describe_optimizer(innermost_optimizer(trainer.optimizer), trainer.model)
            finish_run(folder, record, history_of(trainer.state.log_history), margins, metrics)
        PartialState().wait_for_everyone()


def _first_not_finite(trainer: Trainer) -> int:
    """The first logged step at which something is not finite, or the last step."""
    for entry in trainer.state.log_history:
        if not all(math.isfinite(entry.get(name, 0.0)) for name in ("loss", "grad_norm", "eval_loss")):
            return entry["step"]
    return trainer.state.global_step


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


def end_reports() -> None:
    """Ends what trackers have open: W&B would take the next run of this process for the same one."""
    wandb, trackio = sys.modules.get("wandb"), sys.modules.get("trackio")
    if wandb is not None and wandb.run is not None:
        wandb.finish()
    if trackio is not None and trackio.context_vars.current_run.get() is not None:
        trackio.finish()


class RunProgress(TrainerCallback):
    """The steps of one run on the bar of all runs, in place of the trainer's bar and its printed logs."""

    def __init__(self, name: str, bar: tqdm) -> None:
        self.name, self.bar, self.done = name, bar, bar.n

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(self.done + state.global_step / state.max_steps - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}):
            self.bar.set_postfix_str(f"{self.name}, loss {float(logs['loss']):.3f}", refresh=False)


class StopWhereNotFinite(TrainerCallback):
    """Raises [`DivergedError`] on all processes once the loss of one is not finite: weights can't come back from it.

    On an accelerator a step later, so that the step after it need not wait for the loss. Not in fp16, where steps that
    overflow are left out.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.step_of_batch = trainer, trainer.training_step
        self.is_wrong: torch.Tensor | None = None  # whether a batch of this step had such a loss: 0 or 1
        self.unread: deque[tuple[int, torch.Tensor]] = deque()  # by step
        trainer.training_step = self.training_step

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        try:
            loss = self.step_of_batch(*args, **kwargs)
        except FloatingPointError as error:  # as Sven's, which has no step to make then
            raise DivergedError(self.trainer.state.global_step + 1) from error
        wrong = 1.0 - torch.isfinite(loss.detach()).all().float()
        self.is_wrong = wrong if self.is_wrong is None else torch.maximum(self.is_wrong, wrong)
        return loss

    def on_step_end(self, args, state, control, **kwargs):
        wrong, self.is_wrong = self.is_wrong, None
        if args.fp16 or wrong is None:
            return
        self.unread.append((state.global_step, self.trainer.accelerator.reduce(wrong, "sum")))
        if len(self.unread) > (wrong.device.type != "cpu"):
            step, wrong = self.unread.popleft()
            if wrong > 0:
                raise DivergedError(step)


def show_progress(trainer: Trainer, name: str, bar: tqdm) -> None:
    """Gives the trainer these callbacks in place of its own bar and prints."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunProgress(name, bar))
    trainer.add_callback(StopWhereNotFinite(trainer))
