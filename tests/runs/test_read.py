"""Folders of runs as they are found on disk."""

import json
import re

import numpy as np
import pytest

from prm_hf.compare import compare_runs, format_comparison, load_runs
from prm_hf.runs.methods import find_method
from tests.compare.compared_runs import ACCURACY, KL, PAIRS, write_grid, write_run


def test_reads_a_run_folder(tmp_path):
    write_run(tmp_path, "prm_per_tensor", 3e-3, 7, 0.75, 0.4, mean_q=0.05)
    (run,) = load_runs(tmp_path)
    assert (run.method, run.learning_rate, run.seed, run.source) == ("prm_per_tensor", 3e-3, 7, "prm_hf")
    assert run.metrics[ACCURACY] == 0.75 and run.heldout.shape == (PAIRS,) and np.mean(run.heldout > 0) == 0.75
    assert run.series(KL)[0].tolist() == [0, 10, 20, 30, 40] and run.series("not/logged")[0].size == 0
    assert run.mean_q == pytest.approx(0.05) and run.settings["beta"] == 0.1


def test_finds_runs_in_folders_and_globs_once(tmp_path):
    write_grid(tmp_path / "runs" / "dpo")
    assert len(load_runs(tmp_path)) == len(load_runs([tmp_path / "runs", str(tmp_path / "runs/dpo/adamw*")])) == 6
    assert {run.method for run in load_runs(str(tmp_path / "runs/dpo/adamw*"))} == {"adamw"}
    # a shell's * also gives what an earlier report left there
    (tmp_path / "runs/dpo/report.html").write_text("")
    assert len(load_runs((tmp_path / "runs/dpo").iterdir())) == 6


def test_unfinished_runs_are_named(tmp_path):
    write_grid(tmp_path)
    (tmp_path / "adamw_lr1e-05_seed0").mkdir()
    (tmp_path / "adamw_lr1e-05_seed0" / "run.json").write_text("{")  # killed while writing
    comparison = compare_runs(tmp_path)
    assert [run.name for run in comparison.unfinished] == ["adamw_lr1e-05_seed0"]
    assert len(comparison.runs) == 6
    assert "adamw_lr1e-05_seed0" in comparison.findings["unfinished"]
    with pytest.raises(ValueError, match="No finished run.*adamw_lr1e-05_seed0"):
        compare_runs(tmp_path / "adamw_lr1e-05_seed0")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("run.json", "{", "run.json cannot be read as JSON"),
        ("run.json", '{"schema": 2}', "has schema 2; this version of prm_hf reads schema 1"),
        ("run.json", '{"schema": 1, "name": "a", "method": "adamw"}', "lacks learning_rate, seed"),
        ("metrics.json", '{"drift/kl": null}', "'drift/kl' is None"),
        ("history.jsonl", '{"step": 1}\n{"st', "history.jsonl, line 2"),
    ],
)
def test_broken_files_are_named(tmp_path, file, text, message):
    name = write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.1)
    (tmp_path / name / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_runs(tmp_path)


def test_paths_without_runs_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="empty holds no run: expected a run folder .*trainer_state.json"):
        load_runs(tmp_path / "empty")
    with pytest.raises(ValueError, match="notes.txt is a file: expected"):
        load_runs(tmp_path / "notes.txt")
    for missing in (tmp_path / "missing", tmp_path / "miss*"):
        with pytest.raises(FileNotFoundError, match="does not exist: expected"):
            load_runs(missing)
    with pytest.raises(ValueError, match="No folder given"):
        load_runs([])
    (tmp_path / "empty" / "metrics.json").write_text("{}")
    with pytest.raises(ValueError, match="no run.json"):
        load_runs(tmp_path / "empty")


def write_trainer_state(folder, log, step=8, max_steps=8):
    folder.mkdir(parents=True)
    state = {"global_step": step, "max_steps": max_steps, "log_history": log}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def trl_log(split="", accuracy=0.7, step=8):
    """What TRL's DPOTrainer writes: the Trainer's own values with the split, TRL's without."""
    middle = f"{split}_" if split else ""
    own = {f"eval_{middle}loss": 0.6, f"eval_{middle}runtime": 0.1, f"eval_{middle}samples_per_second": 9.0}
    return {"step": step, "epoch": 1.0, **own, "eval_rewards/accuracies": accuracy, "eval_aux_loss": 0.1}


def test_reads_a_trainer_folder(tmp_path):
    log = [
        {"step": 4, "learning_rate": 1e-3, "loss": 0.69, "rewards/accuracies": 0.9, "mask/mean_q": 0.06},
        trl_log(accuracy=0.6, step=4) | {"eval_old": 1.0},
        {"step": 8, "learning_rate": 5e-4, "loss": 0.6, "mask/mean_q": 0.04},
        trl_log(accuracy=0.7) | {"eval_drift/kl": 0.2},
        {"step": 8, "train_runtime": 33.0, "train_loss": 0.65},
    ]
    write_trainer_state(tmp_path / "qwen-prm_seed3", log)
    (run,) = load_runs(tmp_path)
    assert (run.method, run.learning_rate, run.seed, run.source) == ("qwen-prm", 1e-3, 3, "trainer")
    assert find_method(run.method).group == "PRM"
    assert run.metrics[ACCURACY] == 0.7 and run.metrics[KL] == 0.2 and run.metrics["wall_seconds"] == 33.0
    assert "memorization/flipped_fit" not in run.metrics and run.heldout is None and "old" not in run.metrics
    assert run.series(ACCURACY)[1].tolist() == [0.6, 0.7] and run.series("train/rewards/accuracies")[1].tolist() == [
        0.9
    ]
    assert run.mean_q == pytest.approx(0.05) and not run.notes


def test_reads_the_latest_checkpoint(tmp_path):
    for step in (50, 100, 9):
        write_trainer_state(tmp_path / f"adamw/checkpoint-{step}", [trl_log(accuracy=step / 200)], step, 400)
    for path in (tmp_path / "adamw", tmp_path, tmp_path / "adamw/checkpoint-100"):
        (run,) = load_runs(path)
        assert (run.name, run.metrics[ACCURACY], run.learning_rate) == ("adamw", 0.5, None)
        assert run.notes == ["it stopped, or was read, at step 100 of 400"]
    assert "?" in format_comparison(compare_runs(tmp_path))


@pytest.mark.parametrize(
    ("log", "accuracy", "note"),
    [
        ([trl_log("flipped", 0.4), trl_log("clean", 0.8)], 0.8, "split 'clean'"),
        ([trl_log("clean", 0.8), trl_log("flipped", 0.4)], 0.8, "split 'clean'"),
        ([trl_log("mine", 0.6), {"step": 8, "eval_drift/kl": 0.1}], 0.6, "split 'mine'"),
        ([trl_log("a", 0.6), trl_log("b", 0.7)], None, "several splits (a, b)"),
        ([{"step": 1, "loss": 1.0}], None, "no evaluation"),
        ([{"step": 8, "eval_test_rewards/accuracies": 0.9, "eval_test_loss": 0.5}], 0.9, "split 'test'"),
    ],
)
def test_evaluation_splits_of_a_trainer(tmp_path, log, accuracy, note):
    write_trainer_state(tmp_path / "run", log)
    (run,) = load_runs(tmp_path)
    assert run.metrics.get(ACCURACY) == accuracy
    assert len(run.notes) == 1 and note in run.notes[0]
    if accuracy:
        assert run.series(ACCURACY)[1].tolist() == [accuracy]
        assert run.metrics.get(KL) == (0.1 if "mine" in note else None)
