"""Which runs a comparison has: its grids of learning rates, what extends them, and the ceiling on clean labels."""

import dataclasses

import pytest

from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.grid import Made
from prm_hf.experiments.runner import Runner
from prm_hf.experiments.sft import SFTExperiment
from prm_hf.runs.methods import METHODS
from prm_hf.runs.read import load_runs

from .comparisons import ON_CPU
from .fakes import DIVERGED, FakeTrainer, comparison_grid


# ---- Learning rates that are not given ----


@pytest.mark.parametrize(
    ("experiment", "arguments", "rates", "prm_rates"),
    [
        (DPOExperiment, [], [3.2e-5, 1e-4, 3.2e-4, 1e-3], [1e-4, 3.2e-4, 1e-3, 3.2e-3]),
        (SFTExperiment, [], [3e-4, 9.5e-4, 3e-3, 9.5e-3], [9.5e-4, 3e-3, 9.5e-3, 3e-2]),
        (DPOExperiment, ["--learning_rate", "5e-5"], [5e-6, 1.6e-5, 5e-5, 1.6e-4], [1.6e-5, 5e-5, 1.6e-4, 5e-4]),
        (DPOExperiment, ["--learning_rates", "1e-3", "2e-3"], [1e-3, 2e-3], [1e-3, 2e-3]),
        (DPOExperiment, ["--prm_learning_rates", *"1234"], [3.2e-5, 1e-4, 3.2e-4, 1e-3], [1, 2, 3, 4]),
        (DPOExperiment, ["--learning_rates", "1", "2", "--prm_learning_rates", "3", "4"], [1, 2], [3, 4]),
        (
            DPOExperiment,
            ["--model_name_or_path", "m", "--dataset_name", "x", "--learning_rate", "2e-6", *ON_CPU],
            [2e-7, 6.3e-7, 2e-6, 6.3e-6],
            [6.3e-7, 2e-6, 6.3e-6, 2e-5],
        ),
    ],
    ids=["dpo", "sft", "around one", "given", "of PRM alone", "both", "a dataset"],
)
def test_default_learning_rates(experiment, arguments, rates, prm_rates):
    args = experiment.parse(arguments).script_args
    assert (args.learning_rates, args.prm_learning_rates) == (rates, prm_rates)


def test_the_default_comparison(tmp_path):
    args = DPOExperiment.parse([]).script_args
    assert args.methods == ["adamw", "adamw_eps:10", "prm_noisy_labels", "adamw_clean"]
    assert args.seeds == [0, 1, 2] and args.max_extensions == 3 and args.noise_rate == [0.3]
    grid = comparison_grid(tmp_path, *args.methods, seeds=args.seeds, arguments=())
    lower, higher = [3.2e-5, 1e-4, 3.2e-4, 1e-3], [1e-4, 3.2e-4, 1e-3, 3.2e-3]
    assert grid.rates == {"adamw": lower, "adamw_eps:10": lower, "prm_noisy_labels": higher, "adamw_clean": lower}
    assert len(grid.specify_runs()) == len(grid) == 4 * 4 * 3
    assert [spec.seed for spec in grid.specify_runs()] == [*[0] * 16, *[1] * 16, *[2] * 16]


# ---- Grids whose best learning rate is at an end ----


def end(made, specs, metrics_of):
    """Adds to the runs that were made those of `specs`, whose metrics are a function of each."""
    for spec in specs:
        run = Made(spec.folder_name, metrics_of(spec))
        made.setdefault((spec.method, spec.learning_rate), {})[spec.seed] = run


def extended(grid, metrics_of):
    """By method the learning rates that are added, in their order, until there are no more; at each seed."""
    made, specs, added = {}, grid.specify_runs(), {}
    while specs:
        end(made, specs, metrics_of)
        before = len(grid)
        specs = grid.extend(made)
        assert len(grid) == before + len(specs)
        rows = dict.fromkeys((spec.method, spec.learning_rate) for spec in specs)
        assert [(s.seed, s.method, s.learning_rate) for s in specs] == [(n, *row) for n in grid.seeds for row in rows]
        for method, rate in rows:
            added.setdefault(method, []).append(rate)
            assert rate in grid.rates[method] and grid.rates[method] == sorted(grid.rates[method])
    return added


def peak(at):
    """Metrics of runs that are the more accurate the closer their learning rate is to this one."""
    return lambda spec: {"rewards/accuracies": -abs(spec.learning_rate - at)}


def rising_but(rate, seed, metrics):
    """The same of runs that are the more accurate the larger their learning rate; one ended otherwise."""
    return lambda spec: metrics if (spec.learning_rate, spec.seed) == (rate, seed) else peak(1.0)(spec)


THREE = ("--learning_rates", "1e-3", "3e-3", "1e-2")
DOWN, UP = [3.2e-4, 1e-4, 3.2e-5], [3.2e-2, 1e-1, 3.2e-1]
EXTENSIONS = {
    "upper": (THREE, peak(1.0), UP),
    "lower": (THREE, peak(0.0), DOWN),
    "inside": (THREE, peak(3e-3), []),
    "until inside": (THREE, peak(3.2e-2), UP[:2]),  # the best one has a neighbour on both sides
    "once up": (THREE, peak(1e-2), UP[:1]),
    "once down": (THREE, peak(1e-3), DOWN[:1]),
    "diverged at the end": (THREE, rising_but(1e-2, 1, DIVERGED), []),
    "failed at the end": (THREE, rising_but(1e-2, 1, None), []),
    "diverged when added": (THREE, rising_but(3.2e-2, 0, DIVERGED), UP[:1]),
    "diverged of two": (THREE[:3], rising_but(3e-3, 0, DIVERGED), DOWN[:1]),  # the lower is best, and better than it
    "single": (THREE[:2], peak(1.0), []),
    "all diverged": (THREE, lambda spec: DIVERGED, DOWN),  # what diverges needs a smaller step
    "all failed": (THREE, lambda spec: None, []),  # what fails would fail again
    "unsorted": (("--learning_rates", "3e-3", "1e-2", "1e-3"), peak(1.0), UP),
}


@pytest.mark.parametrize(("rates", "metrics_of", "added"), EXTENSIONS.values(), ids=EXTENSIONS)
def test_a_grid_is_extended_at_the_end_that_is_best(tmp_path, rates, metrics_of, added):
    for method in ("adamw", "prm_debiased"):
        grid = comparison_grid(tmp_path, method, seeds=(0, 1), arguments=rates)
        assert extended(grid, metrics_of) == ({method: added} if added else {})


@pytest.mark.parametrize("limit", [0, 1, 2, 5])
def test_there_is_a_limit_to_it(tmp_path, limit):
    grid = comparison_grid(tmp_path, "adamw", arguments=(*THREE, "--max_extensions", str(limit)))
    assert len(extended(grid, peak(1e9)).get("adamw", [])) == limit


def test_the_limit_is_not_negative():
    with pytest.raises(ValueError, match="`max_extensions` must be at least 0, got -1"):
        DPOExperiment.parse(["--max_extensions", "-1"])


def test_all_methods_have_grids_of_one_size(tmp_path):
    """Also those whose runs are of another optimizer or loss, and the ceiling; not controls, which have no grid."""
    known = [method for method in METHODS.values() if method.group != "control" and method.repair is None]
    names = [method.name + (":0.5" if method.value_help else "") for method in known]
    for at, added in ((1.0, UP), (0.0, DOWN)):
        grid = comparison_grid(tmp_path, *names, "constant_q", arguments=THREE)
        assert extended(grid, peak(at)) == dict.fromkeys(names, added)


def test_all_methods_are_extended_where_one_is(tmp_path):
    """Each at the end that is nearer to its best rate."""
    grid = comparison_grid(tmp_path, "adamw", "adamw_eps:10", "prm_debiased", arguments=THREE)
    peaks = {"adamw": 3e-3, "adamw_eps:10": 1.0, "prm_debiased": 1e-3}
    added = extended(grid, lambda spec: peak(peaks[spec.method])(spec))
    assert added == {
        "adamw": [3.2e-2, 3.2e-4, 1e-1],
        "adamw_eps:10": UP,
        "prm_debiased": [3.2e-4, 1e-4, 3.2e-2],
    }


# ---- The ceiling ----


def test_the_ceiling_has_a_grid_and_no_noise(tmp_path):
    grid = comparison_grid(tmp_path, "adamw", "adamw_clean", seeds=(0, 1), arguments=THREE)
    adamw, clean = ([spec for spec in grid.specify_runs() if spec.method == name] for name in grid.rates)
    assert len(adamw) == len(clean) == 6
    for one, other in zip(adamw, clean, strict=True):
        differences = {key for key, value in other.settings.items() if one.settings[key] != value}
        assert differences == {"noise_rate"} and other.settings["noise_rate"] == 0
        assert one.settings["noise_rate"] == grid.info_of(other)["noise_rate"] == 0.3


def test_without_noise_there_is_no_ceiling(tmp_path):
    grid = comparison_grid(tmp_path, "adamw", "adamw_clean", noise_rate=0.0)
    assert grid.left_out == ["adamw_clean"] and {spec.method for spec in grid.specify_runs()} == {"adamw"}


def test_the_runner_makes_what_is_added(tmp_path, monkeypatch, capsys):
    arguments = ("--learning_rates", "1e-3", "1e-2", "--max_extensions", "2")
    trained, reported = [], []

    def comparison():
        grid = comparison_grid(tmp_path, "adamw", seeds=(0, 1), arguments=arguments)

        def make_trainer(spec, folder):
            trained.append((spec.method, spec.learning_rate, spec.seed))
            accuracy = 1 - abs(spec.learning_rate - 3.2e-2)
            return FakeTrainer(steps=1, evaluation={"eval_rewards/accuracies": accuracy})

        monkeypatch.setattr(grid, "make_trainer", make_trainer)
        monkeypatch.setattr(grid.experiment, "outcomes", lambda trainer, data: ({}, {"heldout": [1.0, -1.0]}))
        monkeypatch.setattr(grid, "report", reported.append)
        grid.data = dataclasses.replace(grid.data, heldout_groups=[0, 0])
        return grid

    grid = comparison()
    runner = Runner(grid)
    assert runner.run() == 0
    steps = [[("adamw", 1e-3), ("adamw", 1e-2)], [("adamw", 3.2e-2)], [("adamw", 1e-1)]]
    assert trained == [(*row, seed) for rows in steps for seed in (0, 1) for row in rows]
    assert len(grid) == len(trained) == len(reported[0]) == runner.bar.total == 8
    assert len(capsys.readouterr().out.splitlines()) == 8  # a line for each run, and nothing else

    found = {run.learning_rate: run for run in load_runs(tmp_path)}  # any of the two seeds
    assert [found[rate].info.get("extension") for rate in (1e-3, 1e-2, 3.2e-2, 1e-1)] == [None, None, 1, 2]
    assert all(run.heldout_groups.tolist() == [0, 0] for run in found.values())

    trained.clear()
    assert Runner(comparison()).run() == 0  # the same runs, as it finds them finished
    assert trained == [] and len(reported[1]) == 8
