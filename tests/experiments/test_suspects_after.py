"""`--suspects` of `prm-hf dpo` and `prm-hf sft`: after a comparison, of its training rows as they are given."""

import math

import pytest

from prm_hf.demo import build_demo, completion_rows
from prm_hf.experiments import OUT_OF_TIME, sft, suspects_after
from prm_hf.experiments.data import load_split
from prm_hf.noise import flip_preferences
from prm_hf.runs.read import load_runs
from prm_hf.suspects import Suspects

from .comparisons import ONE_RATE, SHORT, on_files, read, run_dpo_on_files, stamps


@pytest.mark.slow
def test_after_a_comparison_with_noise(pairs, tmp_path, capsys, no_pictures):
    methods = ["--methods", "adamw", "prm_debiased", "robust", "--learning_rates", "1e-3", "1e-5"]
    arguments = [*methods, "--prm_learning_rates", "1e-3", "1e-5", "--seeds", "1", "--suspects"]
    assert run_dpo_on_files(pairs, tmp_path, *arguments) == 0
    found = Suspects.load(tmp_path / "suspects")
    given = flip_preferences(load_split(str(pairs / "train.jsonl"), None, "train"), 0.3, seed=1)
    assert found.rows == given.to_list() and found.kind == "preference" and found.how == "out of fold"
    runs = [run for run in load_runs(tmp_path) if run.method != "robust"]  # a loss is no method that finds
    accuracy = {(run.method, run.learning_rate): run.metrics["rewards/accuracies"] for run in runs}
    settings = found.settings
    assert accuracy[settings["method"], settings["learning_rate"]] == max(accuracy.values())
    assert (settings["folds"], settings["seeds"]) == (5, [1])
    runs = list(tmp_path.glob("suspects/runs/*/*/metrics.json"))
    assert len(runs) == 5 and all(read(run.with_name("run.json"))["seed"] == 1 for run in runs)
    out = capsys.readouterr().out
    assert "Now the suspects of the training labels with the noise of seed 1" in out and "AUC of the suspects" in out
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    assert run_dpo_on_files(pairs, tmp_path, *arguments) == 0
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    assert len(stamps(tmp_path)) == 6


@pytest.mark.slow
def test_labels_as_they_are_of_completions(tmp_path, capsys, no_pictures):
    demo = build_demo()
    for name, n in (("train", 16), ("test", 8)):
        completion_rows(getattr(demo, name).select(range(n))).to_json(tmp_path / f"{name}.jsonl")
    own = [*on_files(tmp_path), *SHORT, *ONE_RATE, "--eval_strategy", "no", "--max_length", "64", "--suspects"]
    own += ["--methods", "adamw", "prm_noisy_labels", "--noise_rate", "0", "--max_steps", "2"]
    assert sft.main([*own, "--output_dir", str(tmp_path / "out")]) == 0
    found = Suspects.load(tmp_path / "out" / "suspects")
    rows = load_split(str(tmp_path / "train.jsonl"), None, "train")
    assert found.rows == rows.select_columns(["prompt", "completion"]).to_list() and found.kind == "completion"
    out = capsys.readouterr().out
    assert "of the training labels as they are given, by" in out and "AUC" not in out


def test_time_that_is_over_between_the_two(pairs, tmp_path, monkeypatch, capsys, no_pictures):
    make = suspects_after.make_suspects
    monkeypatch.setattr(
        suspects_after, "make_suspects", lambda grid, deadline, reports: make(grid, -math.inf, reports)
    )
    arguments = ["--methods", "adamw", "--max_minutes", "9", "--suspects"]
    assert run_dpo_on_files(pairs, tmp_path, *arguments) == OUT_OF_TIME
    assert len(stamps(tmp_path)) == 1 and not (tmp_path / "suspects" / "suspects.jsonl").exists()
    assert "The same command goes on from here." in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "robust"], "`suspects` goes on with the most accurate method .* are \\['robust'\\]: add one"),
        (["--methods", "adamw", "--dataset_train_split", "train[:3]"], "`folds` is 5, and the 3 rows have"),
    ],
)
def test_what_cannot_be_is_said_before_a_run(arguments, message, pairs, tmp_path):
    with pytest.raises(ValueError, match=message):
        run_dpo_on_files(pairs, tmp_path / "out", *arguments, "--suspects")
    assert not stamps(tmp_path / "out")
