"""A command whose runs are made on a Ray cluster, each in a task of its own.

The process of the command goes through the grid as on one machine: it takes the lock of a run, finds it finished or
not, and at the end it reports. To train a run it sends a task. The task gives the same command in an empty folder of
its own, into which it first puts the files of the runs that are finished, so that the command finds what it needs; it
trains the one run that the task is for, and returns the files. No task writes where another one does, or where the
command does. So a task that is lost with its machine can be run again, and what it left counts for nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

from .._extras import require
from ..runs.read import read_json
from ..runs.schema import (
    FAILED_FILE,
    HISTORY_FILE,
    MARGINS_FILE,
    MASKS_FILE,
    METRICS_FILE,
    RUN_FILE,
    SOLVE_BEFORE_FILE,
)
from ..runs.write import RunSpec, fail_run, failure_of, find_folder, finished_metrics, start_run, write_json
from .console import silenced
from .engine import Engine, engine_in_use
from .grid import Made
from .runner import OutOfTime, Runner


Files = dict[str, bytes]  # by their paths below the folder of the command
RECORDS = (RUN_FILE, HISTORY_FILE, MARGINS_FILE, METRICS_FILE, FAILED_FILE, MASKS_FILE)  # that other runs may need
RETRIES = 3  # of a task that is lost with its process or machine
CPUS = 1  # of a run
SECONDS_TO_LOOK = 5.0  # after which it is seen whether runs of other processes have ended, and machines come or gone


class Work(NamedTuple):
    """One run, as a task is told of it.

    Attributes:
        command, arguments: of `prm-hf`.
        folder: of the run, below that of the command.
        working_folder: in which the command was given; names of files are taken from there, if the machine has it.
    """

    command: str
    arguments: list[str]
    folder: str
    working_folder: str


# ---- On the machine of a task ----


class Enough(Exception):
    """The run of a task is made, and the rest of its command is not for it."""


class OneRun(Engine):
    """Makes the run of one folder. What else there is of a grid was made before, or failed.

    Attributes:
        made: the folders of this run, and of those that were made along with it.
    """

    reports = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: set[Path] = set()

    def make_each(self, runner: Runner, specs: list[RunSpec]) -> list[Made]:
        folders = [find_folder(spec, runner.grid.place(spec), runner.tell)[0] for spec in specs]
        if self.folder in folders:
            spec = specs[folders.index(self.folder)]
            runner.try_run(spec, self.folder, runner.resume_from(spec, self.folder))
            self.made = runner.mine
            raise Enough
        return [_ended(folder) for folder in folders]


def make_one(work: Work, *given: Files) -> Files:
    """Trains a run in a temporary folder.

    Args:
        given: files of runs that are finished, and of this one where it was begun.

    Returns:
        All files of the run; where an error ended it, `failed.json` is one of them.

    Raises:
        RuntimeError: the command has no such run on this machine.
    """
    if Path(work.working_folder).is_dir():
        os.chdir(work.working_folder)
    with tempfile.TemporaryDirectory(prefix="prm_hf_") as name:
        root = Path(name).resolve()
        for files in given:
            write_files(files, root)
        main = importlib.import_module(f"{__package__}.{work.command}").main
        engine = OneRun(root / work.folder)
        try:
            with silenced(), engine_in_use(engine):
                main([*without_output(work.arguments), "--output_dir", str(root)])
        except Enough:
            return read_files([*sorted(engine.made), engine.folder.parent / SOLVE_BEFORE_FILE], root)
    raise RuntimeError(
        f"The command has no run {work.folder} on this machine. Every machine needs the same version of prm_hf, and "
        "the same model and data under the same names."
    )


def without_output(arguments: list[str]) -> list[str]:
    """The arguments without `--output_dir` and its value."""
    kept, flags = [], ("--output_dir", "--output")
    for before, word in zip(["", *arguments], arguments, strict=False):
        if word.partition("=")[0] not in flags and before not in flags:
            kept.append(word)
    return kept


def read_files(paths: Iterable[Path], root: Path) -> Files:
    """These files, and all in these folders, as far as there are any."""
    found = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return {str(file.relative_to(root)): file.read_bytes() for file in found if file.is_file()}


def write_files(files: Files, root: Path) -> None:
    """Writes the files, those last by which a run counts as finished, and these whole or not at all."""
    for name in sorted(files, key=lambda name: Path(name).name == METRICS_FILE):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(files[name])
        os.replace(part, path)


def _ended(folder: Path) -> Made:
    metrics, failure = finished_metrics(folder), failure_of(folder)
    return Made(folder, metrics, "" if failure is None else failure[0])


# ---- On the machine of the command ----


class OnRay(Engine):
    """Sends each run to a Ray cluster, to which this process is connected.

    Args:
        work: the command; its `folder` is not read.
        output_dir: of the command.
        gpus: of a run.
    """

    def __init__(self, work: Work, output_dir: Path, gpus: float) -> None:
        import ray

        self.work, self.output_dir, self.gpus = work, output_dir, gpus
        # Workers with GPUs end with their run, and so give back the memory that torch holds there
        reuse = {"max_calls": 1} if gpus else {}
        self.task = ray.remote(make_one).options(
            num_cpus=CPUS, num_gpus=gpus, max_retries=RETRIES, scheduling_strategy="SPREAD", **reuse
        )
        self.finished: dict[Path, None] = {}  # folders of runs that have ended, in their order

    def make_each(self, runner: Runner, specs: list[RunSpec]) -> list[Made]:
        return Flights(self, runner, specs).make_each()

    def room(self) -> int:
        """How many runs the cluster makes at a time."""
        import ray

        has = ray.cluster_resources()
        room = [has.get("CPU", 0) / CPUS, has.get("GPU", 0) / self.gpus if self.gpus else float("inf")]
        return max(1, int(min(room)))

    def records(self) -> Files:
        """What later runs may need of those that have ended."""
        files = [folder / name for folder in self.finished for name in RECORDS]
        shared = {folder.parent / SOLVE_BEFORE_FILE for folder in self.finished}
        return read_files([*files, *sorted(shared)], self.output_dir)


class Flights:
    """Runs of which none needs another one, as many at a time as the cluster has room for."""

    def __init__(self, engine: OnRay, runner: Runner, specs: list[RunSpec]) -> None:
        import ray

        self.ray, self.engine, self.runner, self.specs = ray, engine, runner, specs
        self.left = list(range(len(specs)))
        self.made: dict[int, Made] = {}
        self.flying: dict[Any, tuple[int, Path, contextlib.ExitStack]] = {}  # by the reference to what a task returns
        self.is_late = self.retries = False
        self.given = ray.put(engine.records())

    def make_each(self) -> list[Made]:
        try:
            while self.left or self.flying:
                self._start()
                if self.flying:
                    for ref in self.ray.wait([*self.flying], timeout=SECONDS_TO_LOOK)[0]:
                        self._land(ref)
        finally:  # of an interruption
            for ref, (_, _, held) in self.flying.items():
                self.ray.cancel(ref, force=True)
                held.close()
        if self.is_late:
            raise OutOfTime
        self.engine.finished |= dict.fromkeys(made.folder for made in self.made.values())
        return [self.made[i] for i in range(len(self.specs))]

    def _start(self) -> None:
        """Sends what there is room for. What failed before comes last, and then what other processes are at."""
        has_started = False
        for i in [*self.left]:
            if len(self.flying) >= self.engine.room():
                return
            what = self._take_up(i, wait=False)
            if what == "late":
                self.left, self.is_late = [], True
                return
            has_started |= what != "later"
        if self.left and not has_started:
            if self.retries and not self.flying and self._take_up(self.left[0], wait=True) == "late":
                self.left, self.is_late = [], True
            self.retries = True

    def _take_up(self, i: int, wait: bool) -> str:
        held, spec = contextlib.ExitStack(), self.specs[i]
        with contextlib.ExitStack() as on_error:
            on_error.push(held)
            what, so_far, resume = self.runner.decide(spec, wait, held, self.retries)
            if what in ("make", "made"):
                self.left.remove(i)
            if what == "made":
                self.made[i] = self.runner.take(spec, so_far, is_mine=False)
            if what == "make":
                on_error.pop_all()
                self._send(i, so_far.folder, resume, held)
        return what

    def _send(self, i: int, folder: Path, resume: bool | str, held: contextlib.ExitStack) -> None:
        root = self.engine.output_dir
        begun = read_files([folder] if resume is True else [folder / RUN_FILE], root)
        if isinstance(resume, str):  # in the folder of another run
            begun |= read_files([Path(resume), *map(Path(resume).with_name, (RUN_FILE, METRICS_FILE))], root)
        begun = {name: data for name, data in begun.items() if Path(name).name != FAILED_FILE}
        for along in self.runner.folders_along(self.specs[i]):  # those that are finished are not made again
            begun |= read_files([along / RUN_FILE, along / METRICS_FILE], root)
        work = self.engine.work._replace(folder=str(folder.relative_to(root)))
        self.flying[self.engine.task.remote(work, self.given, begun)] = i, folder, held

    def _land(self, ref: Any) -> None:
        """Writes what a task returned, or why it did not, into the folder of its run."""
        i, folder, held = self.flying[ref]
        with held:
            try:
                self._write(self.ray.get(ref), i, folder)
            except self.ray.exceptions.RayError as error:  # of the task, or of its machines
                self._fail(getattr(error, "cause", None) or error, i, folder)
            made = _ended(folder)
            del self.flying[ref]
            self.made[i] = self.runner.take(self.specs[i], made, is_mine=True)

    def _write(self, files: Files, i: int, folder: Path) -> None:
        root = self.engine.output_dir
        solved = str((folder.parent / SOLVE_BEFORE_FILE).relative_to(root))
        if solved in files:
            _add_solved(folder.parent / SOLVE_BEFORE_FILE, json.loads(files.pop(solved)))
        for name in [name for name in files if Path(name).name == RUN_FILE]:
            # In which the task has named another folder
            record = {**json.loads(files[name]), **self.runner.grid.info_of(self.specs[i])}
            files[name] = json.dumps(record, indent=1).encode()
            (root / name).with_name(FAILED_FILE).unlink(missing_ok=True)
        write_files(files, root)

    def _fail(self, error: BaseException, i: int, folder: Path) -> None:
        start_run(self.specs[i], folder, self.runner.grid.info_of(self.specs[i]))
        fail_run(folder, error)


def _add_solved(file: Path, solved: dict[str, Any]) -> None:
    locks = file.parent / ".locks"
    locks.mkdir(exist_ok=True)
    with FileLock(locks / "solve.lock"):
        write_json(file, {**(read_json(file) or {}), **solved})


# ---- The command ----


def sweep_on_ray(command: str, arguments: list[str], address: str, gpus: float | None) -> int:
    """Runs a command whose runs are made on a Ray cluster; returns the exit code of the command.

    Args:
        address: of the cluster, or `"auto"` for the one that this machine belongs to.
        gpus: of a run. Default: one where the cluster has GPUs and the command does not `use_cpu`, otherwise none.

    Raises:
        ValueError: there is no such cluster, or no machine in it that has so many GPUs.
    """
    require("--ray", "ray", extra="ray")
    import ray

    # What is wrong is said before a cluster is asked for
    training_args = _parse(command, arguments).training_args
    try:
        ray.init(address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"`--ray` {address!r}: {problem} Start a cluster with `ray start --head`, or leave `--ray` out."
        ) from error
    try:
        most = max((node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if gpus is None:
            gpus = float(most > 0 and not training_args.use_cpu)
        if gpus > most:
            raise ValueError(
                f"`--gpus_per_run` is {gpus:g}, and no machine of the cluster has more than {most:g} GPUs."
            )
        work = Work(command, arguments, "", os.getcwd())
        engine = OnRay(work, Path(training_args.output_dir), gpus)
        print(
            f"Ray: {engine.room()} runs at a time, each a process with {CPUS} CPU and {gpus:g} GPUs. (`workers` and "
            "`models_at_once` are for one machine.)",
            flush=True,
        )
        with engine_in_use(engine):
            return importlib.import_module(f"{__package__}.{command}").main(arguments)
    finally:
        ray.shutdown()


def _parse(command: str, arguments: list[str]) -> Any:
    """The arguments of a command, checked by its own parser."""
    module = importlib.import_module(f"{__package__}.{command}")
    tasks = [x for x in vars(module).values() if isinstance(x, type) and getattr(x, "command", None) == command]
    return (tasks[0] if tasks else module).parse(arguments)
