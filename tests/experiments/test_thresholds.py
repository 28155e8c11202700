"""Tasks with a threshold: which runs are made, with which optimizer, alone and stacked, and when they are there."""

import json
import math
import multiprocessing
import os
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from prm_hf import PRM
from prm_hf.compare import compare_runs, load_runs
from prm_hf.experiments import OUT_OF_TIME, regression
from prm_hf.experiments.ensembles import GraphedStep, Setting, Stack, train_stack
from prm_hf.experiments.problems import Problem, RowOrder, order_of_rows
from prm_hf.experiments.runner import lock_of
from prm_hf.experiments.thresholds import ThresholdTask, optimizer_methods
from prm_hf.experiments.thresholds_grid import ThresholdGrid, make_stacks, run_thresholds
from prm_hf.runs.schema import Threshold


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(4, 64), nn.Linear(64, 1)

    def forward(self, x, y):
        return {"loss": (self.out(torch.tanh(self.hidden(x))).squeeze(-1) - y).square().mean()}


class Small(ThresholdTask):
    """Twenty rows in batches of eight, so that epochs end with a smaller batch."""

    command = "small"
    description = "a task for tests"
    threshold = Threshold("error", 0.1, larger_is_better=False, label="error")
    published: ClassVar = {"AdamW": 100, "PRM": 20}
    published_source = "Of the tests."
    presets: ClassVar = {
        "cpu": {
            "max_steps": 10,
            "eval_steps": 4,
            "per_device_train_batch_size": 8,
            "learning_rates": [1e-2],
            "seeds": [0, 1],
            "methods": ["adamw", "prm_rows"],
            "lr_scheduler_type": "linear",
            "warmup_steps": 3,
            "use_cpu": True,
        },
        "full": {"max_steps": 1000, "eval_steps": 10},
    }

    def problem(self, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(20, 4, generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Model()
        rows = {"x": x, "y": 3 * x[:, 0]}
        return Problem(model, rows, dict(rows), lambda call, data: {"error": call(**data)["loss"]})


@pytest.fixture(autouse=True)
def few_threads(no_pictures, quiet):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(tmp_path, *arguments):
    return ["--output_dir", str(tmp_path), *map(str, arguments)]


def run(tmp_path, *arguments, task=Small):
    assert run_thresholds(task, command(tmp_path, *arguments)) == 0
    return {found.path.relative_to(tmp_path): found for found in load_runs(tmp_path)}


def curves(runs, name="error"):
    return {(r.method, r.learning_rate, r.settings["weight_decay"], r.seed): r.series(name) for r in runs.values()}


# ---- Runs ----


@pytest.mark.slow
def test_every_method_has_both_grids(tmp_path, capsys):
    arguments = ("--learning_rates", 1e-2, 1e-3, "--weight_decays", 0, 0.1, "--seeds", 3)
    runs = run(tmp_path, *arguments)
    assert len(runs) == 8 == len(ThresholdGrid(Small.parse(command(tmp_path, *arguments))))
    assert {path.parts[0] for path in runs} == {"weight_decay0", "weight_decay0.1"}
    for found in runs.values():
        assert found.series("error")[0].tolist() == [0, 4, 8, 10]
        assert found.series("seconds")[1].tolist() == sorted(found.series("seconds")[1])
        assert ("mask/mean_q" in found.metrics) == (found.method == "prm_rows")
        assert found.info["optimizer"]["class"] == {"adamw": "AdamW", "prm_rows": "PRM"}[found.method]
        assert found.info["threshold"] == vars(Small.threshold) and found.info["experiment"] == "small"
    output = capsys.readouterr().out
    assert "Steps until error is at most 0.1" in output and "PRM, published" in output and "- Of the tests." in output
    assert len(json.loads((tmp_path / "survival.json").read_text())["rows"]) == 8
    run(tmp_path, *arguments)
    assert capsys.readouterr().out.count("(finished before)") == 8
    # Another setting is another folder, and another weight decay none that is in the way
    assert len(run(tmp_path, *arguments, "--max_grad_norm", 0.5)) == 16
    assert len(run(tmp_path, *arguments, "--max_grad_norm", 0.5, "--overwrite_runs")) == 8


def test_the_optimizer_is_that_of_the_method(tmp_path):
    methods = ["adamw", "adamw_eps:10", "prm_per_param", "prm_rows_eps:10"]
    task = Small.parse(command(tmp_path, "--methods", *methods, "--weight_decays", 0.5, "--prm_boundary", "empirical"))
    grid, found = ThresholdGrid(task), {}
    for spec in grid.specify_runs()[:4]:
        trainer = grid.make_trainer(spec, tmp_path / spec.name)
        found[spec.method] = trainer.create_optimizer()
        decays = [group["weight_decay"] for group in found[spec.method].param_groups]
        assert decays == [pytest.approx(0.5 / 11 if spec.method == "adamw_eps:10" else 0.5), 0.0]  # none of biases
    assert isinstance(found["prm_per_param"], PRM) and not isinstance(found["adamw"], PRM)
    group = found["prm_per_param"].param_groups[0]
    assert (group["reduction"], group["estimator"], group["lr"]) == ("per_param", "ema", 1e-2)
    assert (group["batch_size"], group["n_dataset"]) == (8, 20)
    assert found["adamw_eps:10"].param_groups[0]["lr"] == pytest.approx(0.11)
    assert found["prm_rows_eps:10"].param_groups[0]["relative_eps"] == 10


def test_a_run_ends_at_the_threshold(tmp_path):
    arguments = ("--threshold", 1e3, "--methods", "adamw", "--seeds", 0)
    (found,) = run(tmp_path / "ends", *arguments).values()
    assert found.metrics["steps_to_threshold"] == 0 and found.metrics["steps"] <= 1
    (found,) = run(tmp_path / "goes_on", *arguments, "--stop_at_threshold", False).values()
    assert found.metrics["steps_to_threshold"] == 0 and found.metrics["steps"] == 10
    assert found.metrics["seconds_to_threshold"] < 1
    (found,) = run(tmp_path / "never", "--threshold", 1e-9, "--methods", "adamw", "--seeds", 0).values()
    assert "steps_to_threshold" not in found.metrics


def test_published_numbers_belong_to_the_threshold(tmp_path):
    assert Small.parse(command(tmp_path)).published == Small.published
    other = Small.parse(command(tmp_path, "--threshold", 0.2))
    assert other.published == {} and other.threshold.value == 0.2 and Small.threshold.value == 0.1


@pytest.mark.parametrize("models_at_once", [1, 8])
@pytest.mark.slow
def test_the_control_is_adamw_at_the_mean_mask(tmp_path, models_at_once):
    arguments = ("--methods", "adamw", "prm_rows", "constant_q", "--weight_decays", 0.1, "--seeds", 0, 1)
    runs = run(tmp_path, *arguments, "--models_at_once", models_at_once)
    controls = [found for found in runs.values() if found.method == "constant_q"]
    assert len(controls) == 2 and {path.parts[0] for path in runs} == {"controls", "weight_decay0.1"}
    for control in controls:
        (of,) = (found for found in runs.values() if found.name == control.control_of)
        assert of.method == "prm_rows" and of.seed == control.seed and control.control["mean_q"] == of.mean_q
        assert control.learning_rate == pytest.approx(of.learning_rate * of.mean_q)
        # The decay of a step is as large as in the PRM run
        assert control.learning_rate * control.settings["weight_decay"] == pytest.approx(of.learning_rate * 0.1)
        assert ("models_at_once" in control.info) == (models_at_once > 1)


def test_a_run_that_diverges_is_censored(tmp_path, capsys):
    arguments = ("--learning_rates", 1e30, "--seeds", 0, "--max_grad_norm", 0)
    for models_at_once in (1, 8):
        place = tmp_path / str(models_at_once)
        run_thresholds(Small, command(place, *arguments, "--methods", "adamw", "--models_at_once", models_at_once))
        (found,) = load_runs(place)
        assert found.end == "diverged"
    assert capsys.readouterr().out.count("diverged at step") == 2


def test_time_that_is_over(tmp_path):
    assert run_thresholds(Small, command(tmp_path, "--max_minutes", 1e-9)) == OUT_OF_TIME
    assert run_thresholds(Small, command(tmp_path, "--max_minutes", 1e-9, "--models_at_once", 8)) == OUT_OF_TIME


@pytest.mark.slow
def test_workers_share_the_runs(tmp_path):
    arguments = ("--methods", "adamw", "--max_steps", 20, "--model", "linear", "--models_at_once", 1, "--workers", 2)
    arguments += ("--learning_rates", 1e-2, "--weight_decays", 0, "--seeds", 0, 1)
    assert len(run(tmp_path, *arguments, task=regression.Regression)) == 2


def test_comparisons_of_accuracy_are_refused(tmp_path):
    run(tmp_path, "--methods", "adamw", "--seeds", 0)
    with pytest.raises(ValueError, match="judged by its steps to a threshold: the command .* `prm-hf small"):
        compare_runs(tmp_path)


# ---- Stacks ----


METHODS = ["adamw", "adamw_eps:10", "prm_per_tensor", "prm_per_param", "prm_debiased", "prm_rows", "prm_rows_eps:10"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [[], ["--prm_boundary", "empirical", "--prm_mask", "soft"]], ids=["plain", "empirical"]
)
def test_a_stack_trains_as_a_trainer_does(tmp_path, more):
    """Methods, rates, decays, seeds, warm-up, clipping, epochs and schedules: all histories are the same."""
    arguments = ["--methods", *(METHODS if not more else METHODS[2:6]), "--learning_rates", 1e-2, 1e-1]
    arguments += ["--weight_decays", 0, 0.5, *more]
    alone, stacked = run(tmp_path / "alone", *arguments), run(tmp_path / "stack", *arguments, "--models_at_once", 5)
    assert {*alone} == {*stacked}  # it is the same run, by whatever way
    for name in ("error", "mask/mean_q"):
        theirs = curves(stacked, name)
        for key, (steps, values) in curves(alone, name).items():
            if name == "mask/mean_q" and key[0].startswith("adamw"):
                continue
            found = dict(zip(*theirs[key], strict=True))
            assert [found[step] for step in steps] == pytest.approx(values.tolist(), rel=2e-4, abs=1e-5), (name, key)


def test_models_leave_a_stack_one_by_one(tmp_path):
    task = Small.parse(command(tmp_path, "--max_steps", 40))
    own = [Setting(rate, 0.0, seed) for seed in (0, 1) for rate in (1e-4, 3e-2, 1e-1)]
    problems = {seed: task.problem(seed) for seed in (0, 1)}
    grid = ThresholdGrid(task)
    config = grid.configure(grid.specify_runs()[0], tmp_path)
    whole = train_stack(Stack(problems, own, config))
    some = train_stack(Stack(problems, own, config), lambda metrics: metrics["error"] < 2)
    ends = [record.steps for record in some]
    assert {record.steps for record in whole} == {40} and len(set(ends)) > 1 and max(ends) == 40
    for a, b in zip(whole, some, strict=True):
        errors = [[row["error"] for row in record.history if "error" in row] for record in (a, b)]
        assert errors[1] == pytest.approx(errors[0][: len(errors[1])], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_stack_in_cuda_graphs(tmp_path, monkeypatch, method):
    """Batches of two sizes, and models that leave; beside the same steps without graphs."""
    task = Small.parse(command(tmp_path, "--max_steps", 40, "--methods", method, "--use_cpu", "False"))
    own = [Setting(rate, 0.1, seed) for seed in (0, 1) for rate in (1e-4, 3e-2, 1e-1)]
    problems = {seed: task.problem(seed) for seed in (0, 1)}
    grid, replays, replay = ThresholdGrid(task), [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: replays.append(graph) or replay(graph))
    config, found = grid.configure(grid.specify_runs()[0], tmp_path), []
    for warm_up in (GraphedStep.WARM_UP, 10**9):
        monkeypatch.setattr(GraphedStep, "WARM_UP", warm_up)
        found.append(train_stack(Stack(problems, own, config), lambda metrics: metrics["error"] < 2))
        assert len({*replays}) > 1 and len(replays) > 10
    for a, b in zip(*found, strict=True):
        assert a.steps == b.steps
        rows = [[row["error"] for row in record.history if "error" in row] for record in (a, b)]
        assert rows[0] == pytest.approx(rows[1], rel=1e-5)


def test_a_stack_stops_at_the_threshold_too(tmp_path):
    arguments = ("--threshold", 5.0, "--max_steps", 40, "--learning_rates", 1e-1, "--seeds", 0, 1)
    alone, stacked = (run(tmp_path / str(n), *arguments, "--models_at_once", n) for n in (1, 8))
    assert {*alone} == {*stacked}
    for path, found in alone.items():
        assert found.metrics["steps_to_threshold"] == stacked[path].metrics["steps_to_threshold"] < 40
        assert found.metrics["steps"] == stacked[path].metrics["steps"]


def test_runs_of_a_stack_that_fails_are_made_one_by_one(tmp_path, capsys, monkeypatch):
    def fail(stack, is_done):
        raise torch.OutOfMemoryError("too many")

    monkeypatch.setattr("prm_hf.experiments.thresholds_grid.train_stack", fail)
    runs = run(tmp_path, "--methods", "adamw", "--models_at_once", 8)
    assert [found.metrics["steps"] for found in runs.values()] == [10, 10]
    assert "adamw: no stack of 2 models (OutOfMemoryError: too many)" in capsys.readouterr().out


def test_a_stack_leaves_out_what_another_process_trains(tmp_path):
    """A lock on one run does not keep the other runs of its method, nor another method, from being stacked."""
    grid = ThresholdGrid(Small.parse(command(tmp_path, "--models_at_once", 2, "--seeds", 0, 1, 2, 3)))
    specs = grid.specify_runs()
    busy = next(spec for spec in specs if spec.method == "adamw" and spec.seed == 1)
    with lock_of(grid.place(busy), grid.folder(busy).name):
        make_stacks(grid)
    assert [spec for spec in specs if not grid.is_finished(spec)] == [busy]
    sizes = {(run.method, run.seed): run.info["models_at_once"] for run in load_runs(tmp_path)}
    assert [sizes["adamw", seed] for seed in (0, 2, 3)] == [2, 2, 1]
    assert [sizes["prm_rows", seed] for seed in range(4)] == [2] * 4


class Shared(Small):
    """A task whose process waits in its first stack until another process is in one too."""

    def problem(self, seed):
        file = Path(self.training_args.output_dir) / "processes.txt"
        with file.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        until = time.monotonic() + 120
        while len(set(file.read_text().split())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        return super().problem(seed)


def begin(folder):
    run_thresholds(Shared, command(folder, "--models_at_once", 2, "--methods", "adamw", "prm_rows", "constant_q"))


@pytest.mark.slow
def test_two_processes_train_stacks_of_one_folder_at_the_same_time(tmp_path):
    """Each run is in one stack, the controls, which need the runs of the other process, among them."""
    processes = [multiprocessing.get_context("spawn").Process(target=begin, args=(tmp_path,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    assert [process.exitcode for process in processes] == [0, 0]
    begun = (tmp_path / "processes.txt").read_text().split()
    assert len(begun) == 6 and len({*begun}) == 2  # two seeds of each method
    assert sorted((run.method, run.seed, run.info["models_at_once"]) for run in load_runs(tmp_path)) == sorted(
        (method, seed, 2) for method in ("adamw", "prm_rows", "constant_q") for seed in (0, 1)
    )


def test_what_is_no_formula_goes_through_the_trainer(tmp_path):
    pytest.importorskip("pytorch_optimizer")
    runs = run(tmp_path, "--methods", "adamw", "cautious", "--seeds", 0, "--models_at_once", 8)
    assert {r.method: "models_at_once" in r.info for r in runs.values()} == {"adamw": True, "cautious": False}


def test_the_order_of_rows_depends_on_seed_and_epoch_alone():
    sampler = RowOrder(20, seed=1)
    first = list(sampler)
    sampler.set_epoch(1)
    assert sorted(first) == list(range(20)) and list(sampler) == order_of_rows(20, 1, 1).tolist() != first
    assert order_of_rows(20, 1, 0).tolist() == first != order_of_rows(20, 2, 0).tolist()


# ---- Arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "big"], "`preset` must be one of cpu, full, got 'big'"),
        (["--learning_rates", "1", "2", "--prm_learning_rates", "1"], "`learning_rates` has 2 values and `prm_learn"),
        (["--weight_decays", "0", "--prm_weight_decays", "0", "1"], "`weight_decays` has 1 values and `prm_weight"),
        (["--weight_decays", "-1"], "`weight_decays` must be at least 0, got -1.0"),
        (["--learning_rates", "0"], "`learning_rates` must be positive numbers, got 0.0"),
        (["--learning_rate", "0.1"], "`learning_rate` is 0.1, which `prm-hf small` does not use"),
        (["--weight_decay", "0.1"], "`weight_decay` is 0.1, which"),
        (["--seed", "1"], "`seed` is 1, which .*`seeds` has several"),
        (["--methods", "ipo"], "`methods`: ipo unknown"),
        (["--methods", "adamw", "constant_q"], "add a PRM method, got"),
        (["--methods", "msvag", "--weight_decays", "0.1"], "`msvag` has no weight decay"),
        (["--max_steps", "-1"], "set `max_steps` above 0, got -1"),
        (["--eval_steps", "0.1"], "`eval_steps` must be a whole number of steps, at least 1, got 0.1"),
        (["--eval_strategy", "epoch"], "leave `eval_strategy` at 'steps', got 'epoch'"),
        (["--prm_estimator", "ema"], "`prm_estimator` is 'ema', and no method in `methods` has it: leave it out"),
        (["--prm_mask", "soft", "--methods", "adamw"], "`prm_mask` is 'soft', and no method in `methods` has it"),
        (["--prm_softness", "-1"], "Invalid prm_softness=-1.0"),
        (["--models_at_once", "0"], "`models_at_once` must be at least 1"),
        (["--models_at_once", "2", "--gradient_accumulation_steps", "2"], "a stack computes neither"),
        (["--drift_metrics"], "`drift_metrics` are those of language models"),
        (["--optim", "sgd"], "`methods` choose the optimizers, and `optim` is 'sgd'"),
        (["--threshold", "inf"], "`threshold` must be a finite number"),
        (["--thresold", "1"], "`--thresold` is no argument of `prm-hf small`. Did you mean"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        run_thresholds(Small, command(tmp_path, *arguments))
    assert not list(tmp_path.iterdir())


def test_presets_are_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("preset: full\nseeds: [5]\n")
    assert Small.parse([]).training_args.max_steps == 10
    found = Small.parse(["--preset", "full", "--max_steps", "7"])
    assert (found.training_args.max_steps, found.training_args.eval_steps) == (7, 10)
    found = Small.parse(["--config", str(file)])
    assert found.training_args.max_steps == 1000 and found.args.seeds == [5]


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ([], 4),
        (["--eval_steps", "5"], 5),
        (["--eval_steps", "5", "--logging_steps", "2"], 2),
        (["--preset", "full"], 10),
    ],
)
def test_the_loss_is_logged_as_often_as_the_metric(arguments, steps):
    assert Small.parse(arguments).training_args.logging_steps == steps


def test_a_grid_for_all_methods_is_for_all():
    """The preset of the regression has another grid for PRM."""
    args = regression.Regression.parse(["--learning_rates", "1"]).args
    assert args.prm_learning_rates == [1] and args.prm_weight_decays == args.weight_decays
    args = regression.Regression.parse(["--learning_rates", "1", "--prm_learning_rates", "2"]).args
    assert args.prm_learning_rates == [2]
    args = regression.Regression.parse([]).args
    assert args.prm_learning_rates != args.learning_rates


def test_methods_are_optimizers():
    known = optimizer_methods()
    assert {"adamw", "adamw_eps", "prm_rows", "casmo", "constant_q"} <= {*known}
    assert not {"ipo", "filter", "adamw_clean", "interpolate", "prm_stopping", "fixed_q"} & {*known}


def test_a_task_without_a_trainer_says_so(tmp_path):
    class Empty(Small):
        def problem(self, seed):
            return None

    with pytest.raises(TypeError, match="Empty needs a method `make_trainer` or `problem`"):
        grid = ThresholdGrid(Empty.parse(command(tmp_path)))
        grid.make_trainer(grid.specify_runs()[0], tmp_path)


# ---- Regression ----


def test_rows_of_the_regression(tmp_path):
    task = regression.Regression.parse(command(tmp_path, "--rows", 400, "--noise_rate", 0.25))
    one, other = task.problem(0), task.problem(1)
    corrupted = one.data["corrupted"].bool()
    assert corrupted.sum() == 100 and one.n_rows == 400 and len(one.data["y"]) == 1024
    assert one.rows["y"][corrupted].std() == pytest.approx(3, rel=0.3)
    assert one.rows["y"][~corrupted].std() == pytest.approx(1, rel=0.2)
    assert not torch.equal(one.rows["x"], other.rows["x"])
    again = task.problem(0)
    assert torch.equal(one.rows["y"], again.rows["y"])
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), again.model.parameters(), strict=True))


def test_measures_of_the_regression(tmp_path):
    """Of a model that knows the true labels by heart, and of one that knows those it was given."""
    problem = regression.Regression.parse(command(tmp_path, "--model", "linear")).problem(0)
    given, corrupted = problem.rows["y"], problem.data["corrupted"].bool()

    def knows(labels):
        def call(x, y):
            right = y if len(x) == 1024 and x.data_ptr() == problem.data["x"].data_ptr() else labels
            return {"loss": (right - y).square().mean(), "predictions": right}

        found = regression.measure(call, problem.data)
        return {name: value.item() for name, value in found.items()}

    found = knows(given)
    assert found == pytest.approx(
        {"heldout_error": 0, "memorization/clean_fit": 1, "memorization/corrupted_fit": 1}, abs=1e-6
    )
    mean = torch.where(corrupted, given[corrupted].mean(), given)
    found = knows(mean)
    assert found["memorization/clean_fit"] == 1 and found["memorization/corrupted_fit"] == pytest.approx(0, abs=1e-6)
    without = regression.measure(
        lambda x, y: {"loss": y.sum(), "predictions": y}, {**problem.data, "corrupted": 0 * given}
    )
    assert without["memorization/corrupted_fit"] == 0 and not math.isnan(without["memorization/clean_fit"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--noise_rate", "1"], r"`noise_rate` must be in \[0, 1\), got 1.0"),
        (["--features", "0"], "`features` must be at least 1"),
        (["--rows", "32", "--prm_boundary", "empirical"], "needs more `rows` than a batch has, got 32 and 32"),
    ],
)
def test_wrong_arguments_of_the_regression(arguments, message):
    with pytest.raises(ValueError, match=message):
        regression.main(arguments)


@pytest.mark.slow
def test_the_regression_shows_its_effect(tmp_path):
    """With as low an error on true labels, PRM has learnt fewer wrong labels by heart, and does not lose it later."""
    arguments = [
        "--methods",
        "adamw",
        "prm_per_param",
        "--learning_rates",
        1e-2,
        "--weight_decays",
        0,
        "--seeds",
        0,
        1,
    ]
    runs = run(tmp_path, *arguments, task=regression.Regression)
    ends = {}
    for found in runs.values():
        metrics = found.metrics
        ends.setdefault(found.method, []).append([metrics["heldout_error"], metrics["memorization/corrupted_fit"]])
    adamw, prm = (torch.tensor(ends[method]).mean(0) for method in ("adamw", "prm_per_param"))
    assert prm[0] < 0.6 and adamw[0] > 1.2  # the held-out error
    assert prm[1] < 0.4 and adamw[1] > 0.6  # the fit of wrong labels
