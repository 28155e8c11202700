"""Makes the runs of a comparison, one after another: locks, resume, deadline, and the report at the end.

`experiment.py` says what a task is, and `grid.py` which runs there are. This module makes the runs that are not
finished, each in a folder that `prm-hf compare` reads, and prints the result.
"""

import functools
import time
from pathlib import Path

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import Trainer

from .. import PopulationRiskStoppingCallback
from ..compare import compare_runs, format_comparison, write_report
from ..runs.methods import parse_method
from ..runs.schema import KL, MEAN_Q, METRICS_FILE, measures_of
from ..runs.write import RunSpec, find_run
from . import OUT_OF_TIME
from .controls import MaskRecorder, is_sharded, mean_masks, set_up_optimizer
from .data import load_data
from .experiment import Experiment
from .grid import Grid
from .progress import make_run, show_progress


class OutOfTime(Exception):
    """The minutes that the command was given are over."""


def run_comparisons(experiment: Experiment) -> int:
    """One comparison for each dataset and noise rate; returns the exit code, `OUT_OF_TIME` if runs are left."""
    args, training_args = experiment.script_args, experiment.training_args
    deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
    # What one process of a sweep computes, the others find in the datasets' cache.
    preparing = _lock(Path(training_args.output_dir), "prepare")
    for data in load_data(args, experiment.model_args.model_name_or_path, experiment.built_in_rows):
        with preparing:
            data = experiment.prepare(data)
        for noise_rate in args.noise_rate:
            output_dir = Path(training_args.output_dir)
            if len(args.dataset_name or ()) > 1:
                output_dir /= Path(data.dataset_name).stem
            if len(args.noise_rate) > 1:
                output_dir /= f"noise{noise_rate:g}"
            runner = Runner(Grid(experiment, data, noise_rate, output_dir), deadline)
            try:
                runner.run()
            except OutOfTime:
                runner.report()
                if PartialState().is_main_process:
                    print(f"\nThe {args.max_minutes:g} minutes are over. The same command goes on from here.")
                return OUT_OF_TIME
            runner.report()
    return 0


class Runner:
    """Makes the runs of a grid, each into its folder, and reports on all of them.

    Several processes may share a grid, one on each GPU: each takes the next run that no other process is training.
    After the `deadline`, on the clock of `time.monotonic`, no run is started.
    """

    def __init__(self, grid: Grid, deadline: float | None = None) -> None:
        self.grid, self.deadline = grid, deadline
        self.folders: list[Path] = []
        self.state = PartialState()
        self.bar = tqdm(total=len(grid), desc="runs", unit="run", disable=not self.state.is_main_process)
        if grid.left_out:
            self._tell(f"Without {', '.join(grid.left_out)}, which are not for the noise rate {grid.noise_rate:g}.")

    def run(self) -> None:
        """Makes all runs, then their controls; `OutOfTime` where the deadline leaves one. Collective."""
        metrics, specs = {}, self.grid.specify_runs()
        for spec, found in zip(specs, self._make_all(specs), strict=True):
            metrics.setdefault((spec.method, spec.learning_rate), {})[spec.seed] = found
        controls, problems = self.grid.specify_controls(metrics)
        for problem in problems:
            self.bar.update()
            self._tell(problem)
        self._make_all(controls)

    def _make_all(self, specs: list[RunSpec]) -> list[dict[str, float]]:
        """The final metrics of runs. What another process is training meanwhile comes last, and is waited for."""
        found = [self._make(spec, wait=False) for spec in specs]
        return [self._make(spec, wait=True) if run is None else run for spec, run in zip(specs, found, strict=True)]

    def _make(self, spec: RunSpec, wait: bool) -> dict[str, float] | None:
        """A run's final metrics, now or from its folder; None for one that another process trains, without `wait`."""
        folder = self.grid.output_dir / spec.name
        lock = _lock(self.grid.output_dir, spec.name)
        # One process looks, so that all go the same way.
        decision = [self._decide(spec, folder, lock, wait) if self.state.is_main_process else None]
        broadcast_object_list(decision)
        what, metrics, resume = decision[0]
        try:
            if what == "late":
                raise OutOfTime
            if what == "busy":
                return None
            self.folders.append(folder)
            note = "finished before"
            if metrics is None:
                outcomes = functools.partial(self.grid.experiment.outcomes, data=self.grid.data)
                metrics = make_run(spec, folder, resume, self._train, outcomes, self.grid.info)
                note = f"{metrics['wall_seconds']:.0f} s"
                self._clean_up()
        finally:
            lock.release()  # only the main process has it
        self.bar.update()
        self._tell(self._line(spec, metrics, note))
        return metrics

    def _decide(
        self, spec: RunSpec, folder: Path, lock: FileLock, wait: bool
    ) -> tuple[str, dict[str, float] | None, bool]:
        """`"busy"`, `"late"` or `"mine"`; the metrics of a finished run; whether a run has a checkpoint."""
        left = -1.0 if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            lock.acquire(timeout=left if wait else 0)
        except Timeout:
            return "late" if wait else "busy", None, False
        metrics, resume = find_run(spec, folder, self.bar.write)
        return "late" if metrics is None and left == 0 else "mine", metrics, resume

    def _train(self, spec: RunSpec, folder: Path, resume: bool) -> Trainer:
        method = parse_method(spec.method)
        own = {"output_dir": str(folder), "learning_rate": spec.learning_rate, "seed": spec.seed}
        config = self.grid.configure(spec.configured_as, **own)
        trainer = self.grid.experiment.make_trainer(config, spec, self.grid.data)
        masks_of = spec.settings["fixed_q"]["masks_of"] if method.name == "fixed_q" else None
        set_up_optimizer(trainer, method, spec.seed, masks_of and mean_masks(self.grid.output_dir / masks_of))
        if method.has_controls and method.tensor_masks and not is_sharded(trainer):
            trainer.add_callback(MaskRecorder(trainer, folder))
        if method.name == "prm_stopping":
            trainer.add_callback(PopulationRiskStoppingCallback())
        show_progress(trainer, spec.name)
        trainer.train(resume_from_checkpoint=resume or None)
        if config.save_strategy != "no":
            trainer.save_model(str(folder))
        return trainer

    def _clean_up(self) -> None:
        # A trainer holds references to itself, by way of its callbacks.
        clear_device_cache(garbage_collection=True)
        if self.state.distributed_type != DistributedType.NO:
            # accelerate takes one DeepSpeed configuration in the life of its state, and with a second Accelerator it
            # forgets that there is FSDP.
            AcceleratorState._reset_state()

    def _line(self, spec: RunSpec, metrics: dict[str, float], note: str) -> str:
        measures = measures_of(self.grid.info)
        columns = [("accuracy", measures.accuracy, ".3f"), (measures.noise_label, measures.noise_fit, ".3f")]
        columns += [("KL", KL, ".4f"), ("mean q", MEAN_Q, ".3f")]
        shown = [f"{label} {metrics[key]:{form}}" for label, key, form in columns if key in metrics]
        return f"{spec.name:<36} {'  '.join(shown)}  ({note})"

    def _tell(self, line: str) -> None:
        if self.state.is_main_process:
            self.bar.write(line)

    def report(self) -> None:
        """Prints the table of these runs alone, not of others in the folder, and writes the report."""
        self.bar.close()
        if not self.state.is_main_process or not any((folder / METRICS_FILE).is_file() for folder in self.folders):
            return
        result = compare_runs(self.folders)
        print("\n" + format_comparison(result))
        with _lock(self.grid.output_dir, "report"):
            try:
                write_report(result, self.grid.output_dir)
                print(f"\nReport: {self.grid.output_dir / 'report.html'}")
            except ImportError as error:
                print(f"\nNo report was written: {error}")


def _lock(output_dir: Path, name: str) -> FileLock:
    folder = output_dir / ".locks"
    folder.mkdir(parents=True, exist_ok=True)
    return FileLock(folder / f"{name}.lock")
