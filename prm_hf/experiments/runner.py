"""Makes the runs of a grid, one after another: locks, resume, deadline, failures, and the report at the end.

`grid.py` says which runs there are and what they are made of. This module makes those that are not finished, each in a
folder that `prm-hf compare` reads, and has the grid report on them.
"""

import contextlib
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from ..runs.read import checkpoints
from ..runs.schema import METRICS_FILE, RUN_FILE
from ..runs.write import RunSpec, fail_run, failure_of, find_folder, finished_metrics, start_run
from ..trainers.completeness import last_complete_checkpoint
from . import OUT_OF_TIME
from .checks import check_data, check_experiment, folder_of_data, folder_of_rate
from .console import messages_shown, show_notes, silenced
from .data import load_data
from .engine import current_engine
from .experiment import Experiment
from .grid import ComparisonGrid, Grid, Made, MadeRuns
from .progress import Trained, end_reports, make_run


BAR = "{percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
FAILED = 1  # the exit code where an error ended a run


class OutOfTime(Exception):
    """The minutes that the command was given are over."""


def run_comparisons(task: type[Experiment], arguments: list[str]) -> int:
    """One comparison for each dataset and noise rate.

    Returns:
        The exit code: `OUT_OF_TIME` if runs are left, otherwise `FAILED` if an error ended one.
    """
    with messages_shown():
        experiment = task.parse(arguments)
        show_notes(experiment.training_args.log_level)
        check_experiment(experiment)
        args = experiment.script_args
        deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
        if args.workers > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
        with workers_beside(args.workers - 1, _compare_beside, task, arguments, deadline, torch.get_num_threads()):
            return _compare(experiment, deadline)


@contextlib.contextmanager
def workers_beside(n: int, work: Callable[..., Any], *arguments: Any) -> Iterator[None]:
    """Has `n` processes call `work(*arguments)`, a function of a module, until this process is through too.

    None where an engine makes the runs.
    """
    n = n if current_engine() is None else 0
    workers = [get_context("spawn").Process(target=work, args=arguments, daemon=True) for _ in range(n)]
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as workers inherit it: this process ends them
    for worker in workers:
        worker.start()
    signal.signal(signal.SIGINT, handler)
    try:
        yield
    except BaseException:  # what they have begun is taken up when the command is given again
        for worker in workers:
            worker.terminate()
        raise
    for worker in workers:
        worker.join()


def _compare_beside(task: type[Experiment], arguments: list[str], deadline: float | None, threads: int) -> None:
    torch.set_num_threads(threads)
    with silenced():
        _compare(task.parse(arguments), deadline, reports=False)


def _compare(experiment: Experiment, deadline: float | None, reports: bool = True) -> int:
    from .suspects_after import check_finders, doubted_rows, find_suspects  # which run by this module

    args, training_args = experiment.script_args, experiment.training_args
    if args.suspects:
        check_finders(experiment)
    datasets = list(load_data(args, experiment.model_args, experiment.built_in_rows, experiment.columns()))
    for data in datasets:
        check_data(experiment, data)
    doubted = [[doubted_rows(experiment, x, rate) for rate in args.noise_rate if args.suspects] for x in datasets]
    # What one process of a sweep computes, the others find in the datasets' cache.
    preparing, code = lock_of(Path(training_args.output_dir), "prepare"), 0
    for data, to_doubt in zip(datasets, doubted, strict=True):
        with preparing:
            data = experiment.prepare(data)
        for i, noise_rate in enumerate(args.noise_rate):
            output_dir = Path(training_args.output_dir)
            if len(datasets) > 1:
                output_dir /= folder_of_data(data.dataset_name)
            if len(args.noise_rate) > 1:
                output_dir /= folder_of_rate(noise_rate)
            grid = ComparisonGrid(experiment, data, noise_rate, output_dir)
            runner = Runner(grid, deadline, args.overwrite_runs, training_args.disable_tqdm, reports)
            if grid.left_out:
                runner.tell(f"Without {', '.join(grid.left_out)}, which are not for the noise rate {noise_rate:g}.")
            try:
                code = max(code, runner.run())
                if args.suspects:
                    code = max(code, find_suspects(grid, runner.rows, to_doubt[i], deadline, reports))
            except OutOfTime:
                runner.tell(f"\nThe {args.max_minutes:g} minutes are over. The same command goes on from here.")
                return OUT_OF_TIME
    return code


class Runner:
    """Makes the runs of a grid, each into its folder, and reports on all of them.

    Several processes may share a grid, one on each GPU: each takes the next run that no other process is training.
    After the `deadline`, on the clock of `time.monotonic`, no run is started. With `overwrite` folders of runs that
    differ from those of the grid in their settings alone are removed; without it nothing ever is.
    """

    def __init__(
        self,
        grid: Grid,
        deadline: float | None = None,
        overwrite: bool = False,
        quiet: bool = False,
        reports: bool = True,
    ) -> None:
        self.grid, self.deadline, self.overwrite = grid, deadline, overwrite
        self.engine = current_engine()
        self.reports = reports and (self.engine is None or self.engine.reports)
        self.started = time.time()
        self.made: dict[Path, Made] = {}
        self.mine: set[Path] = set()  # the folders of those that this process has tried
        self.rows: MadeRuns = {}  # the same, but for the controls
        self.state = PartialState()
        is_hidden = quiet or not self.reports or not self.state.is_main_process
        # In a file there is no bar.
        self.bar = tqdm(total=len(grid), disable=True if is_hidden else None, bar_format=BAR, smoothing=0)

    def run(self) -> int:
        """Makes all runs and reports on them; returns 0, or `FAILED` if an error ended one. Collective.

        Raises:
            OutOfTime: the deadline has left a run. What there is has been reported.
        """
        try:
            self.make_all()
        except OutOfTime:
            self._report()
            raise
        finally:
            self.bar.close()
        self._report()
        return FAILED if any(run.metrics is None for run in self.made.values()) else 0

    def make_all(self) -> None:
        """Makes all runs, then their controls; `OutOfTime` where the deadline leaves one. Collective."""
        made = self.rows
        specs = self.grid.specify_runs()
        if self.state.is_main_process:
            for spec in specs:  # what is in the way of one is said before another is trained
                with lock_of(self.grid.place(spec), "folders"):
                    find_folder(spec, self.grid.place(spec), self.tell)
        while specs:
            for spec, run in zip(specs, self._make_each(specs), strict=True):
                made.setdefault((spec.method, spec.learning_rate), {})[spec.seed] = run
            specs = self.grid.extend(made)
            self.bar.total = len(self.grid)
        controls, problems = self.grid.specify_controls(made)
        for problem in problems:
            self.tell(problem)
        self._make_each(controls)

    def _make_each(self, specs: list[RunSpec]) -> list[Made]:
        """Runs that were made. What another process is training, and what failed before, comes last."""
        if self.engine is not None:
            return self.engine.make_each(self, specs)
        made: dict[int, Made] = {}
        left = list(range(len(specs)))
        while left:
            ready = ((i, run) for i in left if (run := self._make(specs[i], wait=False)) is not None)
            i, run = next(ready, None) or (left[0], self._make(specs[left[0]], wait=True))
            made[i] = run
            left.remove(i)
        return [made[i] for i in range(len(specs))]

    def _make(self, spec: RunSpec, wait: bool) -> Made | None:
        """A run, made now or before; without `wait` None for one that comes last."""
        with contextlib.ExitStack() as held:
            # One process looks, so that all go the same way. It alone holds the lock.
            decision = [self.decide(spec, wait, held) if self.state.is_main_process else None]
            broadcast_object_list(decision)
            what, made, resume = decision[0]
            if what == "late":
                raise OutOfTime
            if what == "later":
                return None
            if what == "make":
                made = self.try_run(spec, made.folder, resume)
        return self.take(spec, made, made.folder in self.mine)

    def take(self, spec: RunSpec, made: Made, is_mine: bool) -> Made:
        """Counts a run that has ended, and says so in a line. `is_mine` is whether this process has just made it."""
        self.made[made.folder] = made
        self.bar.n = len(self.made)
        self.bar.refresh()
        if self.state.is_main_process:
            self.tell(self._line(spec, made, self._when(made, is_mine)))
        return made

    def _when(self, made: Made, is_mine: bool) -> str:
        """How long a run took if it was made since this process began, here or in another process."""
        file = made.folder / METRICS_FILE
        if made.metrics is None:
            return "now"
        if not is_mine and file.stat().st_mtime < self.started:
            return "finished before"
        return f"{made.metrics['wall_seconds']:.0f} s{'' if is_mine else ', in another process'}"

    def decide(
        self, spec: RunSpec, wait: bool, held: contextlib.ExitStack, retry: bool = False
    ) -> tuple[str, Made, bool | str]:
        """`"make"`, `"made"`, `"later"` or `"late"`; the run so far; and from which checkpoint it goes on.

        `held` takes the lock of a run that is to be made, and of one that is not. What failed before comes later,
        unless there is nothing left but to `wait` or to `retry`.
        """
        place = self.grid.place(spec)
        folder, others = self._find(spec)
        so_far = Made(folder, None)
        left = -1.0 if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            for name in self._locks(spec, folder):
                held.enter_context(lock_of(place, name).acquire(timeout=left if wait else 0))
        except Timeout:
            return "late" if wait else "later", so_far, False
        metrics, failure = finished_metrics(folder, self.tell), failure_of(folder)
        if metrics is not None:
            return "made", Made(folder, metrics), False
        if failure is not None:
            problem, failed_at = failure
            if failed_at >= self.started:  # in another process
                return "made", Made(folder, None, problem), False
            if not (wait or retry):
                return "later", so_far, False
        if left == 0:
            return "late", so_far, False
        self._tell_others(spec, folder, others)
        training, resume = self.grid.training_of(spec), self.resume_from(spec, folder)
        if isinstance(resume, str):
            self.tell(f"{spec.name}: made of {resume}.")
        elif training is not spec:
            whom = "this run and all others that are made of them" if self.grid.along(spec) else "this run"
            self.tell(f"{spec.name}: the weights of {training.name} are not there, so it is trained, once for {whom}.")
        return "make", so_far, resume

    def resume_from(self, spec: RunSpec, folder: Path) -> bool | str:
        """Whether a run goes on from its own last checkpoint; without one that of the run whose weights it needs."""
        training = self.grid.training_of(spec)
        if checkpoints(folder) or training is spec:
            return bool(checkpoints(folder))
        last = last_complete_checkpoint(self._folder(training))
        return False if last is None else str(last)

    def _find(self, spec: RunSpec) -> tuple[Path, dict[Path, str]]:
        """The folder of a run, and those of other settings that stay."""
        place = self.grid.place(spec)
        with lock_of(place, "folders"):
            folder, others = find_folder(spec, place, self.tell)
            return folder, self._remove(others) if self.overwrite else others

    def _locks(self, spec: RunSpec, folder: Path) -> list[str]:
        """The locks of a run: that of its training, which all runs have that are made along with it, then their own.

        Their own say that their folders are in use, whichever of them is trained.
        """
        training = self.grid.training_of(spec)
        first = [] if training is spec else [self._folder(training)]
        return list(dict.fromkeys(x.name for x in (*first, folder, *self.folders_along(spec))))

    def folders_along(self, spec: RunSpec) -> list[Path]:
        """The folders of the runs that are made of the weights of this one."""
        return [self._folder(other) for other in self.grid.along(spec)]

    def _folder(self, spec: RunSpec) -> Path:
        return find_folder(spec, self.grid.place(spec), lambda line: None)[0]

    def _tell_others(self, spec: RunSpec, folder: Path, others: dict[Path, str]) -> None:
        for other, changed in others.items():
            self.tell(f"{spec.name}: made in {folder.name}, since these settings differ from {other.name}: {changed}")

    def _remove(self, folders: dict[Path, str]) -> dict[Path, str]:
        """Removes folders of other settings; returns those that stay because a process is training there."""
        busy = {}
        for folder, changed in folders.items():
            try:
                with lock_of(folder.parent, folder.name).acquire(timeout=0):
                    shutil.rmtree(folder)
                self.tell(f"{folder.name}: removed by `overwrite_runs`, since these settings differ: {changed}")
            except Timeout:
                busy[folder] = changed
        return busy

    def try_run(self, spec: RunSpec, folder: Path, resume: bool | str) -> Made:
        """A run that is made now. An error goes into its folder, and the runs after it are made all the same.

        An error is raised where these have no chance: other processes of this run wait for this one, or the device is
        lost.
        """
        along = self._find_along(spec)
        made = self._attempt(
            [(spec, folder), *along],
            lambda: make_run(self.grid, spec, folder, resume, self.bar, lambda trained: self._make_of(trained, along)),
        )
        self._clean_up()  # now that no error holds the trainer
        return made

    def _find_along(self, spec: RunSpec) -> list[tuple[RunSpec, Path]]:
        """The runs that are made of the weights of this one and are not finished, with their folders. Collective."""
        along = self.grid.along(spec)
        found: list[list[tuple[RunSpec, Path]]] = [[]]
        if along and self.state.is_main_process:
            for other in along:
                folder, others = self._find(other)
                if finished_metrics(folder, self.tell) is None:
                    self._tell_others(other, folder, others)
                    found[0].append((other, folder))
        if along:
            broadcast_object_list(found)  # one process looks, so that all go the same way
        return found[0]

    def _make_of(self, trained: Trained, runs: list[tuple[RunSpec, Path]]) -> None:
        """Makes runs of trained weights; an error of one leaves the others as they are."""
        for spec, folder in runs:
            self._attempt([(spec, folder)], lambda spec=spec, folder=folder: trained.make(spec, folder))

    def _attempt(self, runs: list[tuple[RunSpec, Path]], make: Callable[[], dict[str, Any]]) -> Made:
        """The first of these runs, made by a function. An error of it goes into the folders of all that need it."""
        folder, metrics, problem = runs[0][1], None, ""
        self.mine.add(folder)
        try:
            metrics = make()
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                for spec, own in runs:
                    if (own / METRICS_FILE).is_file():
                        continue
                    if self.state.is_main_process and not (own / RUN_FILE).is_file():
                        start_run(spec, own, self.grid.info_of(spec))
                    self.mine.add(own)
                    fail_run(own, error)
            lost = "CUDA error" in problem and "out of memory" not in problem
            if self.state.num_processes > 1 or lost:
                raise
        return Made(folder, metrics, problem)

    def _clean_up(self) -> None:
        end_reports()
        # A trainer holds references to itself, by way of its callbacks.
        clear_device_cache(garbage_collection=True)
        if self.state.distributed_type != DistributedType.NO:
            # accelerate takes one DeepSpeed configuration in the life of its state, and with a second Accelerator it
            # forgets that there is FSDP.
            AcceleratorState._reset_state()

    def _line(self, spec: RunSpec, made: Made, note: str) -> str:
        if made.metrics is None:
            return f"{spec.name:<36} failed: {made.problem}"
        if made.counts:
            return f"{spec.name:<36} {self.grid.describe(spec, made.metrics)}  ({note})"
        step = made.metrics.get("diverged_at_step", "?")
        return f"{spec.name:<36} diverged at step {step}  ({note})"

    def tell(self, line: str) -> None:
        """Prints a line, above the bars."""
        if self.state.is_main_process:
            self.bar.write(line)

    def _report(self) -> None:
        """Reports on these runs alone, not on others in the folder."""
        self.bar.close()
        if not self.reports or not self.state.is_main_process:
            return
        if any(run.counts for run in self.made.values()):
            with lock_of(self.grid.output_dir, "report"):
                self.grid.report(list(self.made.values()))
        failed = [run for run in self.made.values() if run.metrics is None]
        for run in failed:
            print(f"\nFailed: {run.folder.name}: {run.problem}")
        if failed:
            print("The same command tries them again.")


def lock_of(folder: Path, name: str) -> FileLock:
    """The lock of a run, or of something else, in a folder that several processes may share."""
    locks = folder / ".locks"
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{name}.lock")
