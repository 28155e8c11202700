"""What the runner does with runs that fail, diverge, are interrupted, or are made by two processes at once."""

import json
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from filelock import FileLock

from prm_hf.experiments import INTERRUPTED, interruptible
from prm_hf.experiments.runner import OutOfTime, Runner
from prm_hf.runs.read import load_runs
from prm_hf.runs.write import find_folder

from .comparisons import read
from .fakes import DIVERGED, FakeGrid, FakeTrainer, comparison_grid, make


def raising(error):
    """A function that makes no trainer."""

    def make():
        raise error

    return make


def diverging(**arguments):
    return lambda: FakeTrainer(steps=10, **arguments)


def seeds_of(folders):
    return [int(str(folder).split("seed")[1].split("_")[0]) for folder in folders]


def finished(folder):
    return sorted(seeds_of(path.parent for path in folder.glob("*/metrics.json")))


# ---- Runs that fail ----

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
    MemoryError(),
    ValueError("a row that nobody expected"),
    OSError(28, "No space left on device"),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: f"{type(error).__name__} {error}"[:30])
def test_the_other_runs_finish(tmp_path, capsys, error):
    grid = FakeGrid(tmp_path, trainers={1: raising(error)})
    assert Runner(grid).run() == 1
    assert finished(tmp_path) == [0, 2] and len(grid.reported) == 3
    folder, _ = find_folder(grid.specify_runs()[1], tmp_path)
    failed = read(folder / "failed.json")
    assert (failed["error"], failed["message"]) == (type(error).__name__, str(error))
    out = capsys.readouterr().out
    assert f"Failed: {folder.name}: {type(error).__name__}: {error}" in out and "tries them again" in out

    again = FakeGrid(tmp_path, seeds=(1, 3), trainers={1: raising(error)})
    assert Runner(again).run() == 1 and again.trained == [3, 1]  # what failed before comes last
    third = FakeGrid(tmp_path)
    assert Runner(third).run() == 0 and third.trained == [1]
    assert finished(tmp_path) == [0, 1, 2, 3] and not (folder / "failed.json").exists()


def test_a_run_fails_once_in_all_processes_of_a_command(tmp_path):
    first = Runner(FakeGrid(tmp_path, trainers={1: raising(MemoryError())}))
    beside = FakeGrid(tmp_path)
    second = Runner(beside)
    assert first.run() == 1 and second.run() == 1
    assert beside.trained == []


def test_a_lost_device_ends_the_command(tmp_path):
    grid = FakeGrid(tmp_path, trainers={0: raising(RuntimeError("CUDA error: device-side assert triggered"))})
    with pytest.raises(RuntimeError, match="device-side assert"):
        Runner(grid).run()
    assert grid.trained == [0]


def test_an_error_in_one_of_several_processes_ends_them(tmp_path):
    """The others wait for this one. Given again, the command tries the run after all others."""
    grid = FakeGrid(tmp_path, trainers={0: raising(MemoryError())})
    runner = Runner(grid)
    runner.state = SimpleNamespace(num_processes=2, is_main_process=True, distributed_type=DistributedType.NO)
    with pytest.raises(MemoryError):
        runner.run()
    assert len(list(tmp_path.glob("*/failed.json"))) == 1
    again = FakeGrid(tmp_path)
    Runner(again).run()
    assert again.trained == [1, 2, 0]


def test_a_failure_frees_what_the_run_held(tmp_path):
    freed = []

    class Holding(FakeTrainer):
        def train(self, **arguments):
            raise torch.OutOfMemoryError("CUDA out of memory")

        def __del__(self):
            freed.append(1)

    grid = FakeGrid(tmp_path, seeds=(0, 1), trainers={0: Holding, 1: lambda: freed.append(2) or FakeTrainer()})
    Runner(grid).run()
    assert freed == [1, 2]


# ---- Runs that diverge ----


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, capsys, loss):
    grid = FakeGrid(tmp_path, trainers={1: diverging(losses={3: loss})})
    assert Runner(grid).run() == 0
    folder, _ = find_folder(grid.specify_runs()[1], tmp_path)
    metrics = read(folder / "metrics.json")
    assert metrics.pop("wall_seconds") >= 0
    assert metrics == {"diverged": True, "diverged_at_step": 3, "steps": 3} and read(folder / "margins.json") == {}
    assert "diverged at step 3" in capsys.readouterr().out
    again = FakeGrid(tmp_path)
    assert Runner(again).run() == 0 and again.trained == []
    assert "diverged at step 3  (finished before)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["eval_loss", "eval_drift/kl"])
def test_weights_that_are_not_finite_at_the_end_have_diverged(tmp_path, name):
    grid = FakeGrid(tmp_path, seeds=[0], trainers={0: diverging(evaluation={name: float("nan")})})
    assert Runner(grid).run() == 0 and grid.reported is None
    (file,) = tmp_path.glob("*/metrics.json")
    assert read(file)["diverged"] is True and read(file)["diverged_at_step"] == 10


def test_several_batches_a_step_are_all_looked_at(tmp_path):
    class Accumulating(FakeTrainer):
        def train(self, **arguments):
            inner = self.training_step

            def twice():
                self.losses = {2: float("nan")}
                inner()
                self.losses = {}
                return inner()

            self.training_step = twice
            super().train(**arguments)

    Runner(FakeGrid(tmp_path, seeds=[0], make=Accumulating)).run()
    (file,) = tmp_path.glob("*/metrics.json")
    assert read(file)["diverged_at_step"] == 2


# ---- Controls of runs that do not count ----


@pytest.mark.parametrize("end", [None, DIVERGED, {"drift/kl": float("nan")}], ids=["failed", "diverged", "old"])
def test_the_controls_are_bound_to_a_row_that_counts(tmp_path, end):
    grid = comparison_grid(tmp_path, "adamw", "prm_debiased", "constant_q", "fixed_q", seeds=(0, 1))
    best = {("prm_debiased", 3e-2, seed): {"rewards/accuracies": 0.9} for seed in (0, 1)}
    specs, problems = grid.specify_controls(make(grid, best))
    assert problems == [] and {spec.learning_rate for spec in specs} == {0.5 * 3e-2, 3e-2}
    specs, problems = grid.specify_controls(make(grid, {**best, ("prm_debiased", 3e-2, 1): end}))
    assert problems == [] and {spec.learning_rate for spec in specs} == {0.5 * 1e-2, 1e-2}
    assert all(spec.settings[spec.method]["of"].startswith("prm_debiased_lr0.01_seed") for spec in specs)
    none = {("prm_debiased", rate, 1): end for rate in (1e-2, 3e-2)}
    specs, problems = grid.specify_controls(make(grid, none))
    assert [(spec.method, spec.seed) for spec in specs] == [("constant_q", 0)]
    assert len(problems) == 3 and all("seed1_" in text and "has failed or diverged" in text for text in problems)


def test_a_curve_of_adamw_leaves_out_what_does_not_count(tmp_path):
    grid = comparison_grid(tmp_path, "adamw", "prm_debiased", "adamw_matched")
    at_2e3 = {("prm_debiased", rate, 0): {"drift/kl": 2e-3} for rate in (1e-2, 3e-2)}
    specs, problems = grid.specify_controls(make(grid, at_2e3))
    assert problems == [] and 1e-3 < specs[0].learning_rate < 3e-3
    specs, problems = grid.specify_controls(make(grid, {**at_2e3, ("adamw", 3e-3, 0): DIVERGED}))
    assert specs == [] and "no two neighbouring rates of adamw drift less and more than 0.002" in problems[0]


# ---- Interruptions ----


@pytest.mark.parametrize("phase", ["loading", "training", "evaluating", "reporting"])
def test_an_interruption_is_one_line(tmp_path, capsys, phase):
    def interrupt(*args):
        raise KeyboardInterrupt

    grid = FakeGrid(tmp_path)
    if phase == "loading":
        grid.trainers[1] = interrupt
    elif phase == "training":
        grid.trainers[1] = lambda: FakeTrainer(before_step=lambda step: step == 2 and interrupt())
    elif phase == "evaluating":
        grid.outcomes = lambda spec, trainer: interrupt() if grid.trained[-1] == 1 else ({}, {})
    else:
        grid.report = interrupt
    assert interruptible(Runner(grid).run)() == INTERRUPTED == 130
    captured = capsys.readouterr()
    assert captured.out.splitlines()[-1] == "Interrupted. The same command goes on from here."
    assert "Traceback" not in captured.out + captured.err and not list(tmp_path.glob("*/failed.json"))
    again = FakeGrid(tmp_path)
    assert Runner(again).run() == 0 and again.trained == ([] if phase == "reporting" else [1, 2])


def test_one_process_of_several_says_so(monkeypatch, capsys):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setenv("RANK", "1")
    assert interruptible(interrupt)() == 130 and capsys.readouterr().out == ""


# ---- Folders ----


def test_nothing_is_removed_unless_asked(tmp_path, capsys):
    Runner(FakeGrid(tmp_path)).run()
    before = {path: path.read_bytes() for path in tmp_path.glob("*/*")}
    other = FakeGrid(tmp_path, settings={"beta": 0.2})
    Runner(other).run()
    assert other.trained == [0, 1, 2] and {path: path.read_bytes() for path in before} == before
    assert len(load_runs(tmp_path)) == 6 and len(other.reported) == 3
    assert "since these settings differ from adamw_lr0.001_seed0_" in capsys.readouterr().out

    (tmp_path / "thesis").mkdir()
    third = FakeGrid(tmp_path, seeds=(0, 1), settings={"beta": 0.3})
    Runner(third, overwrite=True).run()
    assert sorted(run.settings["beta"] for run in load_runs(tmp_path)) == [0.1, 0.2, 0.3, 0.3]
    assert (tmp_path / "thesis").is_dir()


def test_a_run_that_is_being_trained_is_not_removed(tmp_path):
    Runner(FakeGrid(tmp_path, seeds=[0])).run()
    (run,) = load_runs(tmp_path)
    with FileLock(tmp_path / ".locks" / f"{run.path.name}.lock"):
        Runner(FakeGrid(tmp_path, seeds=[0], settings={"beta": 0.2}), overwrite=True).run()
    assert len(load_runs(tmp_path)) == 2


def test_what_is_in_the_way_is_said_before_a_step_is_trained(tmp_path):
    grid = FakeGrid(tmp_path)
    folder = tmp_path / grid.specify_runs()[2].folder_name
    folder.mkdir()
    (folder / "thesis.tex").write_text("much work")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=rf"{folder.name} is not the folder of a run .* move it away"):
            Runner(grid, overwrite=overwrite).run()
    assert grid.trained == [] and (folder / "thesis.tex").read_text() == "much work"


def test_an_interrupted_run_goes_on_from_its_checkpoint(tmp_path):
    grid, trainers = FakeGrid(tmp_path, seeds=[0]), []
    grid.make = lambda: trainers.append(FakeTrainer()) or trainers[-1]
    Runner(grid).run()
    (run,) = load_runs(tmp_path)
    (run.path / "metrics.json").unlink()
    (run.path / "checkpoint-2").mkdir()
    Runner(grid).run()
    assert [trainer.resumed for trainer in trainers] == [None, True]


def test_time_that_is_over_leaves_the_rest(tmp_path):
    grid = FakeGrid(tmp_path)
    runner = Runner(grid, deadline=time.monotonic() + 3600)
    grid.make = lambda: setattr(runner, "deadline", 0.0) or FakeTrainer()
    with pytest.raises(OutOfTime):
        runner.run()
    assert grid.trained == [0] and len(grid.reported) == 1


# ---- Two processes ----


def _compare(folder, beta, results):
    torch.set_num_threads(1)
    slow = lambda: FakeTrainer(before_step=lambda step: time.sleep(0.02))  # noqa: E731
    grid = FakeGrid(folder, seeds=range(6), settings={"beta": beta}, make=slow)
    code = Runner(grid, quiet=True).run()
    results.put((os.getpid(), code, beta, grid.trained, sorted(grid.reported)))


@pytest.mark.parametrize("betas", [(0.1, 0.1), (0.1, 0.2)], ids=["one comparison", "two comparisons"])
def test_two_processes_in_one_folder(tmp_path, betas):
    """They share the runs of one comparison, and of two neither touches those of the other, nor shows them."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_compare, args=(tmp_path, beta, results)) for beta in betas]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    runs = load_runs(tmp_path)
    assert all(run.finished for run in runs) and len(runs) == 6 * len(set(betas))
    trained = [seed for _, _, _, seeds, _ in found for seed in seeds]
    assert sorted(trained) == sorted([*range(6)] * len(set(betas)))  # none twice
    for _, code, beta, _, reported in found:
        assert code == 0 and reported == sorted(run.name for run in runs if run.settings["beta"] == beta)
    for run in runs:
        assert json.loads((run.path / "run.json").read_text())["finished"]
