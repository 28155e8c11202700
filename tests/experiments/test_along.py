"""Runs that are made of another run's weights: one training gives them all, whoever trains and whatever fails."""

import multiprocessing
import time

import pytest
import torch
from filelock import FileLock

from prm_hf.experiments import INTERRUPTED, interruptible, runner
from prm_hf.experiments.runner import Runner
from prm_hf.runs.read import load_runs

from .comparisons import folder_of, read, read_lines, stamps
from .fakes import DIVERGED, FakeTrainer, PartsGrid, comparison_grid


HALF, TWICE = "interpolate0.5_lr0.001_seed0", "interpolate2_lr0.001_seed0"
ADAMW = "adamw_lr0.001_seed0"


def metrics_of(folder, name):
    return read(folder_of(folder, name) / "metrics.json")


def test_one_training_gives_all(tmp_path, capsys):
    grid = PartsGrid(tmp_path, seeds=(0, 1))
    assert Runner(grid).run() == 0 and grid.trained == [0, 1] and len(grid.reported) == 6
    assert grid.measured[:3] == [("adamw", 0), ("interpolate:0.5", 0), ("interpolate:2", 0)]
    out = capsys.readouterr().out
    assert "in another process" not in out and "finished before" not in out and "is trained" not in out
    # Beside those of the training each has the evaluation of its own weights alone
    parts = [
        [x["part"] for x in read_lines(folder_of(tmp_path, name) / "history.jsonl") if "part" in x]
        for name in (ADAMW, HALF, TWICE)
    ]
    assert parts == [[1], [1, 2], [1, 3]]
    assert read(folder_of(tmp_path, HALF) / "run.json")["method"] == "interpolate:0.5"
    again = PartsGrid(tmp_path, seeds=(0, 1))
    assert Runner(again).run() == 0 and again.trained == [] and again.measured == []


def test_the_time_of_a_part_is_without_training_and_its_cost_with_it(tmp_path):
    slow = lambda: FakeTrainer(before_step=lambda step: time.sleep(0.05))  # noqa: E731
    Runner(PartsGrid(tmp_path, seeds=[0], make=slow)).run()
    adamw, half = metrics_of(tmp_path, ADAMW), metrics_of(tmp_path, HALF)
    assert adamw["wall_seconds"] > 0.2 > half["wall_seconds"] and "cost_seconds" not in adamw
    assert half["cost_seconds"] == pytest.approx(adamw["wall_seconds"] + half["wall_seconds"], abs=2e-3)


@pytest.mark.parametrize("methods", [("adamw",), ()], ids=["finished before", "not compared"])
def test_without_its_weights_it_is_trained_once(tmp_path, capsys, methods):
    if methods:
        Runner(PartsGrid(tmp_path, seeds=[0], methods=methods)).run()
    before = stamps(tmp_path)
    grid = PartsGrid(tmp_path, seeds=[0], methods=(*methods, "interpolate:0.5", "interpolate:2"))
    capsys.readouterr()
    assert Runner(grid).run() == 0 and grid.trained == [0]
    assert [method for method, _ in grid.measured] == ["interpolate:0.5", "interpolate:2"]
    said = [line for line in capsys.readouterr().out.splitlines() if "is trained" in line]
    whom = "once for this run and all others that are made of them."
    assert said == [f"{HALF}: the weights of {ADAMW} are not there, so it is trained, {whom}"]
    assert {name: at for name, at in stamps(tmp_path).items() if name in before} == before
    more = PartsGrid(tmp_path, seeds=[0], methods=(*grid.methods, "interpolate:3"))
    assert Runner(more).run() == 0 and more.measured == [("interpolate:3", 0)]  # what is finished stays


def test_a_checkpoint_of_it_has_the_weights(tmp_path, monkeypatch, capsys):
    Runner(PartsGrid(tmp_path, seeds=[0], methods=("adamw",))).run()
    (checkpoint := folder_of(tmp_path, ADAMW) / "checkpoint-4").mkdir()
    monkeypatch.setattr(runner, "last_complete_checkpoint", lambda folder: folder / checkpoint.name)
    trainer = FakeTrainer()
    assert Runner(PartsGrid(tmp_path, seeds=[0], make=lambda: trainer)).run() == 0
    assert trainer.resumed == str(checkpoint) and len(stamps(tmp_path)) == 3
    assert f"{HALF}: made of {checkpoint}." in capsys.readouterr().out
    adamw, half = metrics_of(tmp_path, ADAMW), metrics_of(tmp_path, HALF)
    assert half["cost_seconds"] == pytest.approx(adamw["wall_seconds"] + half["wall_seconds"], abs=2e-3)


def test_an_error_of_a_part_is_its_own(tmp_path):
    class Failing(PartsGrid):
        def outcomes(self, spec, trainer):
            if spec.method == "interpolate:0.5":
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().outcomes(spec, trainer)

    grid = Failing(tmp_path, seeds=[0])
    assert Runner(grid).run() == 1 and grid.trained == [0] and len(stamps(tmp_path)) == 2
    assert read(folder_of(tmp_path, HALF) / "failed.json")["message"] == "CUDA out of memory"
    again = PartsGrid(tmp_path, seeds=[0])
    assert Runner(again).run() == 0 and again.measured == [("interpolate:0.5", 0)]
    assert len(stamps(tmp_path)) == 3 and not list(tmp_path.glob("*/failed.json"))


def test_an_error_of_the_training_ends_all_that_need_it(tmp_path, capsys):
    def fail():
        raise MemoryError("of the training")

    grid = PartsGrid(tmp_path, trainers={0: fail}, seeds=(0, 1))
    assert Runner(grid).run() == 1 and grid.trained == [0, 1]  # not once for each
    assert len(list(tmp_path.glob("*seed0*/failed.json"))) == 3 and len(stamps(tmp_path)) == 3
    assert capsys.readouterr().out.count("failed: MemoryError: of the training") == 3
    again = PartsGrid(tmp_path, seeds=(0, 1))
    assert Runner(again).run() == 0 and again.trained == [0] and len(stamps(tmp_path)) == 6


def test_a_training_that_diverges_has_no_parts(tmp_path):
    grid = PartsGrid(tmp_path, seeds=[0], make=lambda: FakeTrainer(losses={3: float("nan")}))
    assert Runner(grid).run() == 0 and grid.measured == []
    for name in (ADAMW, HALF, TWICE):
        found = metrics_of(tmp_path, name)
        assert found | DIVERGED == found


def test_an_interruption_between_the_parts_leaves_the_training_unfinished(tmp_path):
    """So that its checkpoint, and not another training, gives the rest."""

    class Interrupted(PartsGrid):
        def outcomes(self, spec, trainer):
            if spec.method == "interpolate:2":
                raise KeyboardInterrupt
            return super().outcomes(spec, trainer)

    assert interruptible(Runner(Interrupted(tmp_path, seeds=[0])).run)() == INTERRUPTED
    assert {name.split("_lr")[0] for name in stamps(tmp_path)} == {"interpolate0.5"}
    (folder_of(tmp_path, ADAMW) / "checkpoint-4").mkdir()
    trainer = FakeTrainer()
    again = PartsGrid(tmp_path, seeds=[0], make=lambda: trainer)
    assert Runner(again).run() == 0 and trainer.resumed is True
    assert again.measured == [("adamw", 0), ("interpolate:2", 0)]


def test_overwriting_removes_the_parts_of_other_settings(tmp_path, capsys):
    Runner(PartsGrid(tmp_path, seeds=[0])).run()
    Runner(PartsGrid(tmp_path, seeds=[0], settings={"beta": 0.2})).run()
    out = capsys.readouterr().out
    assert len(load_runs(tmp_path)) == 6 and out.count("since these settings differ from") == 3
    (busy,) = (run.path for run in load_runs(tmp_path) if run.name.startswith(HALF) and run.settings["beta"] == 0.1)
    with FileLock(tmp_path / ".locks" / f"{busy.name}.lock"):
        Runner(PartsGrid(tmp_path, seeds=[0], settings={"beta": 0.3}), overwrite=True).run()
    assert sorted(run.settings["beta"] for run in load_runs(tmp_path)) == [0.1, 0.3, 0.3, 0.3]


def _make(folder, methods, results):
    torch.set_num_threads(1)
    slow = lambda: FakeTrainer(before_step=lambda step: time.sleep(0.05))  # noqa: E731
    grid = PartsGrid(folder, seeds=range(3), methods=methods, make=slow)
    results.put((Runner(grid, quiet=True).run(), grid.trained))


def test_two_processes_train_it_once(tmp_path):
    context = multiprocessing.get_context("fork")
    results, methods = context.Queue(), ("adamw", "interpolate:0.5", "interpolate:2")
    processes = [context.Process(target=_make, args=(tmp_path, methods, results)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert [code for code, _ in found] == [0, 0] and len(stamps(tmp_path)) == 9
    assert sorted(seed for _, trained in found for seed in trained) == [0, 1, 2]


# ---- Which runs of a comparison are made of which ----


def test_the_parts_of_a_comparison_are_those_of_adamw(tmp_path):
    grid = comparison_grid(tmp_path, "interpolate:2", "prm_rows", "adamw", "adamw_eps:10", "interpolate:0.5")
    runs = grid.specify_runs()
    order = list(dict.fromkeys(spec.method for spec in runs))
    assert order == ["prm_rows", "adamw", "adamw_eps:10", "interpolate:2", "interpolate:0.5"]
    of = {(spec.method, spec.learning_rate): spec for spec in runs}
    adamw, half = of["adamw", 1e-3], of["interpolate:0.5", 1e-3]
    twice = of["interpolate:2", 1e-3]
    assert grid.along(adamw) == [twice, half] and grid.along(half) == [twice]
    assert grid.training_of(half) == adamw and grid.training_of(adamw) is adamw
    assert grid.along(of["adamw_eps:10", 1e-3]) == grid.along(of["prm_rows", 1e-2]) == []
    grid.rates["interpolate:2"].remove(1e-3)
    assert grid.along(adamw) == [half]
