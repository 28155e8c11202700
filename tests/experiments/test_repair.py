"""Methods in two stages: their names, the runs of their first stage, and what these leave for the second."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset

from prm_hf.demo import build_demo
from prm_hf.experiments import dpo
from prm_hf.experiments.data import Data
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.grid import ComparisonGrid, Made
from prm_hf.experiments.repair import wrong_left
from prm_hf.runs.methods import find_method, parse_method

from .comparisons import ONE_RATE, SHORT, infos, read


METHODS = ["adamw", "filter:adamw_eps:10+prm_rows", "relabel:adamw", "soft:adamw"]
ARGUMENTS = ["--learning_rates", "1e-3", "1e-2", "--prm_learning_rates", "3e-3", "3e-2", "--max_extensions", "0"]


def grid_of(folder, *methods, folds=2, seeds=(0, 1), groups=range(6), rows=None):
    arguments = ["--methods", *methods, *ARGUMENTS, "--repair_folds", str(folds), "--seeds", *map(str, seeds)]
    experiment = DPOExperiment.parse(arguments)
    rows = build_demo().train.select(range(6)) if rows is None else rows
    return ComparisonGrid(experiment, Data("m", "m", "d", rows, rows, {}, train_groups=list(groups)), 0.3, folder)


def end(made, specs, metrics_of):
    for spec in specs:
        run = Made(Path(spec.folder_name), metrics_of(spec))
        made.setdefault((spec.method, spec.learning_rate), {})[spec.seed] = run
    return made


# ---- Names ----


def test_a_name_says_both_stages():
    method = parse_method("filter:adamw_eps:1e+1+prm_rows_eps:10")
    assert (method.repair, method.source, method.trained) == ("drop", "adamw_eps:1e+1", "prm_rows_eps:10")
    assert (method.key, method.label) == ("filter", "filter (AdamW eps 1e+1, then PRM per_row eps 10)")
    alone, trained = parse_method("relabel:prm_rows_eps:10"), parse_method("prm_rows_eps:10")
    assert alone.source == alone.trained == "prm_rows_eps:10" and alone.label == "relabel (PRM per_row eps 10)"
    assert alone.changes() == trained.changes() and alone.own_settings == trained.own_settings
    assert alone.has_mask and not alone.has_controls and alone.baseline == "adamw_eps:10"
    assert parse_method("soft:adamw").baseline == "adamw" and find_method("relabel:prm_rows_eps:10") == alone
    assert find_method("relabel:of_another_version").group == alone.group


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "relabel",
            "'relabel' needs one or two methods behind a colon: .* as in `relabel:adamw.prm_rows`; got 'relabel'",
        ),
        ("soft:", "'soft' needs one or two methods"),
        ("soft:adamw+adamw+adamw", "'soft' needs one or two methods"),
        ("filter:adam", "adam unknown. Known are .* Did you mean 'adamw'"),
        ("filter:adamw_eps", "'adamw_eps' needs a positive number behind a colon"),
        ("filter:cdpo", "'filter' trains AdamW, AdamW with an eps, or PRM, and 'cdpo' in 'filter:cdpo' is none"),
        ("filter:adamw+adamw_clean", "and 'adamw_clean' in 'filter:adamw.adamw_clean' is none"),
        ("filter:relabel:adamw", "and 'relabel:adamw' in"),
        ("filter:prm_stopping", "and 'prm_stopping' in"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ValueError, match=message):
        parse_method(name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--repair_folds", "1"], "`repair_folds` must be at least 2, or 0 for margins in sample, got 1"),
        (["--repair_folds", "0"], "`relabel:prm_rows` with `repair_folds` 0 .*: add `prm_rows` to `methods`"),
    ],
)
def test_wrong_folds(arguments, message):
    with pytest.raises(ValueError, match=message):
        DPOExperiment.parse(["--methods", "adamw", "relabel:prm_rows", *arguments])


def test_more_folds_than_prompts(tmp_path):
    with pytest.raises(ValueError, match="`folds` is 5, and the 6 rows have 3 different prompts or groups"):
        grid_of(tmp_path, "relabel:adamw", folds=5, groups=[0, 0, 1, 1, 2, 2])


# ---- Which runs there are ----


def test_methods_of_one_source_share_its_folds(tmp_path):
    grid = grid_of(tmp_path, *METHODS)
    first = grid.specify_runs()
    folds = [spec for spec in first if "fold" in spec.settings]
    assert {spec.method for spec in folds} == {f"{m}-fold{k}of2" for m in ("adamw", "adamw_eps:10") for k in (1, 2)}
    assert len(folds) == 2 * 2 * 2 * 2 and len({spec.folder_name for spec in folds}) == len(folds)
    assert {spec.method for spec in first if spec not in folds} == {"adamw"}
    assert all(grid.place(spec) == tmp_path / ".folds" for spec in folds) and grid.place(first[0]) == tmp_path
    assert all(grid.training_of(spec) == spec and not grid.along(spec) for spec in folds)  # of no other run's weights
    assert grid.info_of(folds[0])["task"] == "suspects" and grid.info_of(first[0])["task"] == "preferences"
    repaired = grid.extend(end({}, first, lambda spec: {"agreement": 0.6, "rewards/accuracies": 0.5}))
    assert len(repaired) == 3 * 2 * 2 and len(first) + len(repaired) == len(grid)
    assert [spec.seed for spec in repaired] == [0] * 6 + [1] * 6


def agreement(spec):
    """The larger rate agrees more, but with seed 1 one of its folds has diverged."""
    if spec.method == "adamw-fold2of2" and (spec.learning_rate, spec.seed) == (1e-2, 1):
        return {"diverged": True, "wall_seconds": 7.0}
    return {"agreement": 0.5 + spec.learning_rate, "wall_seconds": 1.0, "rewards/accuracies": 1 - spec.learning_rate}


def test_the_rate_is_the_one_that_agrees_most_with_the_labels_as_given(tmp_path):
    grid = grid_of(tmp_path, "adamw", "relabel:adamw")
    first = grid.specify_runs()
    repaired = grid.extend(end({}, first, agreement))
    for spec in repaired:
        detail = spec.settings["relabel:adamw"]
        rate = {0: 1e-2, 1: 1e-3}[spec.seed]
        wanted = [
            s.folder_name for s in first if "fold" in s.settings and (s.learning_rate, s.seed) == (rate, spec.seed)
        ]
        assert detail == {"folds": 2, "source_learning_rate": rate, "margins_of": wanted} and len(wanted) == 2
    assert grid.repairs._cost("adamw", 1, {}) == 3.0 + 7.0


def test_without_finished_folds_the_run_says_so(tmp_path):
    grid = grid_of(tmp_path, "relabel:adamw", seeds=(0,))
    (spec, _) = grid.extend(end({}, grid.specify_runs(), lambda spec: None))
    assert spec.settings["relabel:adamw"]["margins_of"] == []
    with pytest.raises(
        ValueError, match="needs runs of `adamw` on all 2 folds with the seed 0, and at no learning rate"
    ):
        grid.repairs.repair(spec, grid.data.train)


def test_pairs_of_a_prompt_vote_on_each_others_labels(tmp_path):
    """Out of fold, where margins alone say nothing; here `a` of each prompt is better than all others."""
    n, rng = 80, np.random.default_rng(0)
    wrong = rng.random(n) < 0.2
    sides = [("a", f"b{i % 4}") for i in range(n)]
    rows = Dataset.from_list(
        [
            {
                "prompt": f"p{i // 4}",
                "chosen": pair[is_wrong],
                "rejected": pair[not is_wrong],
                "flipped": is_wrong,
            }
            for i, (pair, is_wrong) in enumerate(zip(sides, wrong.tolist(), strict=True))
        ]
    )
    grid = grid_of(tmp_path, "relabel:adamw", seeds=(0,), groups=[i // 4 for i in range(n)], rows=rows)
    (spec, _) = grid.extend(end({}, grid.specify_runs(), agreement))
    for fold, name in enumerate(spec.settings["relabel:adamw"]["margins_of"]):
        held = np.flatnonzero(grid.repairs.folds_of(0) == fold)
        folder = tmp_path / ".folds" / name
        folder.mkdir(parents=True)
        margins = {"rows": held.tolist(), "label_margins": rng.normal(size=(2, len(held))).tolist()}
        (folder / "margins.json").write_text(json.dumps(margins))
    grid.repairs.repair(spec, rows)
    metrics = grid.repairs.metrics[spec.folder_name]
    assert metrics["suspects/auc"] > 0.9 and metrics["suspects/wrong_left"] < 0.8 * wrong.mean()


def test_grids_of_methods_that_repair_labels_are_extended_too(tmp_path):
    grid = grid_of(tmp_path, "adamw", "relabel:adamw", seeds=(0,))
    grid.experiment.script_args.max_extensions = 2
    made = end({}, grid.specify_runs(), agreement)
    end(made, grid.extend(made), agreement)
    end(made, added := grid.extend(made), agreement)
    assert [(spec.method, spec.learning_rate) for spec in added] == [("adamw", 3.2e-4), ("relabel:adamw", 3.2e-4)]
    assert added[1].settings["relabel:adamw"]["source_learning_rate"] == 1e-2
    assert len(grid) == 2 * 2 + 2 * 3  # the folds keep their rates


def test_in_sample_the_nearest_run_says_which_labels_are_wrong(tmp_path):
    grid = grid_of(tmp_path, "prm_rows", "relabel:prm_rows+adamw", folds=0, seeds=(0,))
    first = grid.specify_runs()
    assert {spec.method for spec in first} == {"prm_rows"}
    repaired = grid.extend(end({}, first, lambda spec: {"rewards/accuracies": 0.5}))
    chosen = {spec.learning_rate: spec.settings[spec.method]["source_learning_rate"] for spec in repaired}
    assert chosen == {1e-3: 3e-3, 1e-2: 3e-2}


def test_what_is_left_of_the_wrong_labels():
    wrong, p = np.array([True, True, False, False]), np.array([0.9, 0.2, 0.6, 0.1])
    assert wrong_left(wrong, p, "drop") == 0.5  # the second and the last stay
    assert wrong_left(wrong, p, "flip") == 0.5  # the first is right now, the third is wrong
    assert wrong_left(wrong, p, "soft") == pytest.approx((0.1 + 0.8 + 0.6 + 0.1) / 4)
    assert np.isnan(wrong_left(wrong, np.ones(4), "drop"))


# ---- A whole comparison ----


@pytest.mark.slow
def test_two_stages_from_the_command_line(tmp_path, no_pictures):
    arguments = ["--methods", *METHODS, *ONE_RATE, "--repair_folds", "2", *SHORT, "--max_steps", "12"]
    command = ["--output_dir", str(tmp_path), *arguments]
    assert dpo.main(command) == 0
    folds, runs = infos(tmp_path / ".folds"), infos(tmp_path)
    assert len(folds) == 2 * 2 and {info["task"] for info in folds.values()} == {"suspects"}
    assert {info["method"] for info in runs.values()} == {*METHODS} and len(runs) == len(METHODS)
    for name, info in runs.items():
        metrics = read(tmp_path / name / "metrics.json")
        if info["method"] == "adamw":
            assert "cost_seconds" not in metrics and 0 <= metrics["suspects/auc"] <= 1
            continue
        detail = info["settings"][info["method"]]
        parts = [read(tmp_path / ".folds" / fold / "margins.json") for fold in detail["margins_of"]]
        assert sorted(row for part in parts for row in part["rows"]) == list(range(256))
        assert metrics["cost_seconds"] > metrics["wall_seconds"]
        assert 0 <= metrics["suspects/wrong_left"] <= 1 and 0 <= metrics["suspects/share"] <= 0.5
        assert (
            metrics["suspects/share_error"] <= 0.5 and {"suspects/auc", "suspects/average_precision"} <= metrics.keys()
        )
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/metrics.json")}
    assert dpo.main(command) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in tmp_path.glob("**/metrics.json")}
