"""The runs of a task with a threshold: methods, learning rates, weight decays and seeds, then the controls."""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from filelock import Timeout
from transformers import Trainer, TrainerCallback, TrainingArguments

from .. import PRM
from ..compare.survival import Survival, build_survival
from ..compare.survival_report import report
from ..runs.methods import CONTROL, METHODS, Method, parse_method
from ..runs.read import load_runs
from ..runs.schema import METRICS_FILE, SECONDS, SECONDS_TO_THRESHOLD, STEPS_TO_THRESHOLD, Threshold
from ..runs.write import RunSpec, find_folder, finish_run, history_of, start_run
from ..trainers.callbacks import find_prm
from ..trainers.config import prm_kwargs, scaled_by_relative_eps
from ..trainers.presets import with_preset
from . import OUT_OF_TIME
from .console import messages_shown, show_notes, silenced
from .controls import WHOLE_TENSORS, set_up_optimizer
from .engine import current_engine
from .ensembles import Setting, Stack, can_stack, final_metrics_of, train_stack
from .grid import Grid, Made, MadeRuns, configure, defaults_of, settings_of
from .progress import hardware
from .runner import OutOfTime, Runner, lock_of, workers_beside
from .thresholds import ThresholdTask


CONTROLS = "controls"  # the folder of the controls' runs


class ThresholdGrid(Grid):
    """Every method of a task at each learning rate, weight decay and seed; a folder for each weight decay."""

    def __init__(self, task: ThresholdTask) -> None:
        self.task, self.output_dir = task, Path(task.training_args.output_dir)
        self.methods = [method for method in task.args.compared if method.group != CONTROL]
        self.controls = [method for method in task.args.compared if method.group == CONTROL]
        self.defaults = {**defaults_of(type(task.training_args)), **defaults_of(task.arguments_class)}

    def __len__(self) -> int:
        args = self.task.args
        settings = len(self.methods) * len(args.learning_rates) * len(args.weight_decays)
        return (settings + len(self.controls)) * len(args.seeds)

    def place(self, spec: RunSpec) -> Path:
        # Runs of one method, rate and seed in one folder would pass for runs whose settings were changed
        is_control = METHODS[parse_method(spec.method).key].group == CONTROL
        return self.output_dir / (CONTROLS if is_control else f"weight_decay{spec.settings['weight_decay']:g}")

    def specify_runs(self) -> list[RunSpec]:
        """Seed by seed, so that what is there when time is up can be compared."""
        specs = []
        for seed in self.task.args.seeds:
            for method in self.methods:
                rates, decays = self.grids(method)
                specs += [self.specify(method.name, rate, decay, seed) for decay in decays for rate in rates]
        return specs

    def grids(self, method: Method) -> tuple[list[float], list[float]]:
        """Learning rates and weight decays of a method, ascending."""
        args = self.task.args
        found = (
            (args.prm_learning_rates, args.prm_weight_decays)
            if method.has_mask
            else (args.learning_rates, args.weight_decays)
        )
        return sorted(found[0]), sorted(found[1])

    def specify(
        self, method: str, rate: float, decay: float, seed: int, configured_as: str | None = None, **extra: Any
    ) -> RunSpec:
        config = configure(self.task.training_args, configured_as or method, 0.0, weight_decay=decay)
        own = {"stop_at_threshold": self.task.args.stop_at_threshold, **self.task.settings(), **extra}
        if self.task.args.stop_at_threshold:  # the value matters to a run that ends there
            own["threshold"] = self.task.args.threshold
        return RunSpec(method, rate, seed, settings_of(config, **own), configured_as, self.defaults)

    def specify_controls(self, made: MadeRuns) -> tuple[list[RunSpec], list[str]]:
        """AdamW at η·q̄, for each seed of the best PRM setting, q̄ the mean mask of its run.

        PRM does not mask weight decay, so the control has λ/q̄: η·λ stays as it is in the run.
        """
        if not self.controls:
            return [], []
        able = {method.name for method in self.methods if method.has_controls}
        row = self.judge([self.folder(spec) for spec in self.specify_runs()]).best_of(able)
        if row is None:
            return [], ["constant_q: no PRM setting has a run that counts"]
        specs, problems = [], []
        for run in row.runs:
            if not run.mean_q:
                problems.append(f"constant_q of {run.name}: it has no mean mask, or one of 0")
                continue
            rate, decay = row.learning_rate * run.mean_q, row.weight_decay / run.mean_q
            detail = {"of": run.name, "mean_q": run.mean_q}
            baseline = parse_method(row.method).baseline
            specs += [self.specify(c.name, rate, decay, run.seed, baseline, **{c.name: detail}) for c in self.controls]
        return specs, problems

    def folder(self, spec: RunSpec) -> Path:
        return find_folder(spec, self.place(spec), lambda line: None)[0]

    def is_finished(self, spec: RunSpec) -> bool:
        return (self.folder(spec) / METRICS_FILE).is_file()

    def judge(self, folders: list[Path]) -> Survival:
        """What finished runs say."""
        runs = load_runs([folder for folder in folders if (folder / METRICS_FILE).is_file()])
        return build_survival(runs, self.task.threshold)

    def info_of(self, spec: RunSpec) -> dict[str, Any]:
        task = self.task
        info = {
            "task": STEPS_TO_THRESHOLD,
            "experiment": task.command,
            "threshold": dataclasses.asdict(task.threshold),
        }
        return {**info, "published": task.published, "command": task.command_line}

    # ---- One run ----

    def configure(self, spec: RunSpec, folder: Path) -> TrainingArguments:
        own = {"learning_rate": spec.learning_rate, "weight_decay": spec.settings["weight_decay"], "seed": spec.seed}
        method = spec.configured_as or spec.method
        return configure(self.task.training_args, method, 0.0, output_dir=str(folder), **own)

    def make_trainer(self, spec: RunSpec, folder: Path) -> Trainer:
        trainer = self.task.make_trainer(self.configure(spec, folder), spec)
        give_optimizer(trainer)
        set_up_optimizer(trainer, parse_method(spec.method), spec.seed)
        trainer.add_callback(ThresholdCallback(self.task.threshold, self.task.args.stop_at_threshold))
        return trainer

    def outcomes(self, spec: RunSpec, trainer: Trainer) -> tuple[dict[str, float], dict[str, list]]:
        found = steps_to(self.task.threshold, history_of(trainer.state.log_history))
        return {**found, **self.task.outcomes(trainer)}, {}

    def describe(self, spec: RunSpec, metrics: dict[str, float]) -> str:
        steps = metrics.get(STEPS_TO_THRESHOLD)
        words = f"{steps:.0f}" if steps is not None else f">{metrics['steps']:.0f}"
        metric = self.task.threshold.metric
        return f"weight decay {spec.settings['weight_decay']:<6.3g}  steps {words:>6}  {metric} {metrics[metric]:.3g}"

    def report(self, made: list[Made]) -> None:
        folders = [run.folder for run in made if run.metrics is not None]
        report(self.judge(folders), self.output_dir, self.task.published, self.task.published_source, self.task.curves)


def steps_to(threshold: Threshold, history: list[dict[str, Any]]) -> dict[str, float]:
    """The first step, and the seconds of training, at which a history reaches a threshold; empty if it does not."""
    for row in history:
        if threshold.metric in row and threshold.is_reached(row[threshold.metric]):
            return {STEPS_TO_THRESHOLD: row["step"], SECONDS_TO_THRESHOLD: row[SECONDS]}
    return {}


def give_optimizer(trainer: Trainer) -> None:
    """Gives a plain transformers Trainer the optimizer that its arguments stand for, PRM included.

    The trainer's split into parameters with and without weight decay stays.
    """
    args = with_preset(trainer.args, is_peft=False)
    if args.optim == "prm":
        kind, settings = PRM, prm_kwargs(args)
        if args.prm_boundary == "empirical" and args.prm_alpha is None:
            sizes = trainer.get_total_train_batch_size(args), len(trainer.train_dataset)
            settings |= dict(zip(("batch_size", "n_dataset"), sizes, strict=True))
    else:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, trainer.model)
        numel = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        settings = scaled_by_relative_eps(args, settings, numel)
    trainer.optimizer_cls_and_kwargs = kind, settings
    for group in trainer.create_optimizer().param_groups:
        if kind is not PRM and args.relative_eps is not None:  # lr·weight_decay stays as it was
            group["weight_decay"] /= 1 + args.relative_eps


class ThresholdCallback(TrainerCallback):
    """Notes of each evaluation the seconds of training so far, of each log the mask, and ends a run that is there.

    The seconds leave evaluations out. A resumed run goes on from those of its last evaluation.
    """

    def __init__(self, threshold: Threshold, stops: bool) -> None:
        self.threshold, self.stops = threshold, stops
        self.started = self.evaluating = 0.0
        self.prm: PRM | None = None

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        before = max((row.get(f"eval_{SECONDS}", 0.0) for row in state.log_history), default=0.0)
        self.started, self.evaluating, self.prm = time.perf_counter() - before, 0.0, find_prm(optimizer)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluating += metrics["eval_runtime"]
        seconds = time.perf_counter() - self.started - self.evaluating
        state.log_history[-1][f"eval_{SECONDS}"] = round(max(seconds, 0.0), 4)
        if self.stops and self.threshold.is_reached(metrics[f"eval_{self.threshold.metric}"]):
            control.should_training_stop = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in (logs or {}) and self.prm is not None:
            state.log_history[-1] |= {f"mask/{name}": value for name, value in self.prm.get_mask_stats().items()}


# ---- Stacks ----


def make_stacks(grid: ThresholdGrid, deadline: float | None = None) -> None:
    """Makes the runs that can be stacked, `models_at_once` of one method together; the runner finds them finished.

    Several processes may share a grid: a stack has runs that no other process is training. None where an engine makes
    the runs, one by one.
    """
    if grid.task.args.models_at_once == 1 or current_engine() is not None:
        return
    runs = grid.specify_runs()
    for method in grid.methods:
        _make_stacks_of(grid, method, [spec for spec in runs if spec.method == method.name], deadline)
    able = {method.name for method in grid.methods if method.has_controls}
    if grid.controls and _are_made(grid, [spec for spec in runs if spec.method in able], deadline):
        specs, _ = grid.specify_controls({})
        for method in grid.controls:
            _make_stacks_of(grid, method, [spec for spec in specs if spec.method == method.name], deadline)


def _make_stacks_of(grid: ThresholdGrid, method: Method, specs: list[RunSpec], deadline: float | None) -> None:
    if not specs or method.key in WHOLE_TENSORS:
        return
    config = configure(grid.task.training_args, specs[0].configured_as or method.name, 0.0)
    device = hardware(PartialState())
    while can_stack(config) and specs and (deadline is None or time.monotonic() < deadline):
        with contextlib.ExitStack() as held:
            part, specs = _take(grid, specs, held)
            try:
                if not part or not make_stack(grid, part, config, device):
                    return
            except RuntimeError as error:  # as where memory is short; the runner makes these runs
                problem = f"{type(error).__name__}: {error}"
                print(f"{method.name}: no stack of {len(part)} models ({problem}); they are trained one by one.")


def _take(
    grid: ThresholdGrid, specs: list[RunSpec], held: contextlib.ExitStack
) -> tuple[list[RunSpec], list[RunSpec]]:
    """The first `models_at_once` runs that are neither finished nor in another process, whose locks `held` gets, and
    the runs behind them."""
    taken = []
    with lock_of(grid.output_dir, "stacks"):  # or two processes that begin together take every other run
        for i, spec in enumerate(specs):
            if len(taken) == grid.task.args.models_at_once:
                return taken, specs[i:]
            folder = grid.folder(spec)
            try:
                held.enter_context(lock_of(folder.parent, folder.name).acquire(timeout=0))
            except Timeout:
                continue
            if not grid.is_finished(spec):
                taken.append(spec)
    return taken, []


def _are_made(grid: ThresholdGrid, specs: list[RunSpec], deadline: float | None) -> bool:
    """Whether runs are finished, once no other process is training one of them or time is up."""
    for spec in specs:
        folder = grid.folder(spec)
        left = -1.0 if deadline is None else max(0.0, deadline - time.monotonic())
        try:
            with lock_of(folder.parent, folder.name).acquire(timeout=left):
                if not grid.is_finished(spec):
                    return False
        except Timeout:
            return False
    return True


def make_stack(grid: ThresholdGrid, specs: list[RunSpec], config: TrainingArguments, device: dict[str, Any]) -> bool:
    """Trains these runs of one method together and writes their folders; False where the task has no `problem`."""
    problems = {seed: grid.task.problem(seed) for seed in sorted({spec.seed for spec in specs})}
    if None in problems.values():
        return False
    started = time.perf_counter()
    about = {"hardware": device, "models_at_once": len(specs)}
    records = {spec.folder_name: start_run(spec, grid.folder(spec), {**grid.info_of(spec), **about}) for spec in specs}
    own = [Setting(spec.learning_rate, spec.settings["weight_decay"], spec.seed) for spec in specs]
    task, threshold = grid.task, grid.task.threshold

    def is_done(metrics: dict[str, float]) -> bool:
        return task.args.stop_at_threshold and threshold.is_reached(metrics[threshold.metric])

    found = train_stack(Stack(problems, own, config), is_done)
    seconds = (time.perf_counter() - started) / len(specs)
    for spec, one, metrics in zip(specs, found, final_metrics_of(found), strict=True):
        metrics = {**metrics, **steps_to(threshold, one.history), "wall_seconds": round(seconds, 3)}
        finish_run(grid.folder(spec), records[spec.folder_name], one.history, {}, metrics)
    print(f"{specs[0].method}: {len(specs)} models at once, {time.perf_counter() - started:.0f} s", flush=True)
    return True


# ---- The command ----


def run_thresholds(task: type[ThresholdTask], arguments: list[str]) -> int:
    """Makes all runs of a command line and reports on them; returns the exit code, as [`Runner.run`]."""
    with messages_shown():
        parsed = task.parse(arguments)
        show_notes(parsed.training_args.log_level)
        args = parsed.args
        deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
        if args.workers > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
        make_stacks(ThresholdGrid(parsed), deadline)
        with workers_beside(args.workers - 1, _work, task, arguments, deadline, torch.get_num_threads()):
            try:
                return _runner(parsed, deadline).run()
            except OutOfTime:
                print(f"\nThe {args.max_minutes:g} minutes are over. The same command goes on from here.")
                return OUT_OF_TIME


def _work(task: type[ThresholdTask], arguments: list[str], deadline: float | None, threads: int) -> None:
    """Makes runs beside the process that reports."""
    torch.set_num_threads(threads)
    with silenced():
        try:
            _runner(task.parse(arguments), deadline, reports=False).make_all()
        except OutOfTime:
            return


def _runner(task: ThresholdTask, deadline: float | None, reports: bool = True) -> Runner:
    return Runner(ThresholdGrid(task), deadline, task.args.overwrite_runs, task.training_args.disable_tqdm, reports)
