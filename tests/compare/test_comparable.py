"""Runs of one experiment are compared, and no others: what they must share, and what is a method's own."""

import json
import re
import shutil

import pytest

from prm_hf import cli
from prm_hf.compare import compare_experiments, compare_runs, format_comparison
from prm_hf.runs.comparable import group_comparable
from prm_hf.runs.read import load_runs
from prm_hf.runs.run import parse_name
from tests.runs.test_recorded import RECORDED

from .compared_runs import write_grid, write_run


NAME = "adamw_lr1e-02_seed0"


def pair(root, ours, theirs, method="prm_per_tensor"):
    """AdamW with some settings, and a method with others."""
    write_run(root, "adamw", 1e-3, 0, 0.7, 0.4, settings=ours)
    write_run(root, method, 1e-2, 0, 0.8, 0.4, settings=theirs)


@pytest.mark.parametrize(
    ("setting", "ours", "theirs"),
    [
        ("num_train_epochs", 1, 10),
        ("max_steps", 100, 1000),
        ("train_rows", 1000, 2000),
        ("train_file", "0123", "4567"),
        ("train_split", "train[:50%]", "train"),
        ("heldout_rows", 512, 256),
        ("heldout_digest", "0123", "4567"),
        ("model_digest", "0123", "4567"),
        ("model_model_revision", "main", "v2"),
        ("model_use_peft", False, True),
        ("effective_batch_size", 16, 64),
        ("beta", 0.1, 0.5),
        ("loss_type", ["sigmoid"], ["hinge"]),
        ("label_smoothing", 0.0, 0.1),
        ("max_length", 64, None),
        ("truncation_mode", "keep_start", "keep_end"),
        ("lr_scheduler_type", "linear", "cosine"),
        ("warmup_steps", 16, 0),
        ("weight_decay", 0.0, 0.1),
        ("max_grad_norm", 1.0, 0.0),
        ("adam_beta2", 0.999, 0.95),
        ("bf16", True, False),
        ("model_dtype", "float32", "bfloat16"),
        ("noise_kind", "flip", "random"),
        ("data_seed", 1, 2),
        ("load_best_model_at_end", True, False),
        ("a_setting_of_tomorrow", 1, 2),
    ],
)
def test_another_setting_is_another_experiment(tmp_path, capsys, setting, ours, theirs):
    pair(tmp_path, {setting: ours}, {setting: theirs})
    expected = (
        f"The runs differ in `{setting}`: {ours!r} in adamw_lr1e-03_seed0, {theirs!r} in prm_per_tensor_lr1e-02_seed0."
        " Give the folders of one experiment at a time, or train the runs with the same settings."
    )
    with pytest.raises(ValueError) as raised:
        compare_runs(tmp_path)
    assert str(raised.value) == expected
    assert cli.main(["compare", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert printed.err == f"prm-hf compare: error: {expected}\n" and printed.out == ""


@pytest.mark.parametrize(
    ("method", "ours", "theirs"),
    [
        (
            "cdpo",
            {"loss_type": ["sigmoid"], "label_smoothing": 0.0},
            {"loss_type": ["robust"], "label_smoothing": -0.75},
        ),
        ("prm_rows_eps:10", {"relative_eps": None}, {"relative_eps": 10.0, "prm_signal_beta": 0.98}),
        ("adamw_eps:10", {"optim": "adamw_torch_fused"}, {"optim": "prm", "relative_eps": 10.0}),
        ("early_stopping", {"eval_steps": 40, "eval_strategy": "no"}, {"eval_steps": 0.1, "eval_strategy": "steps"}),
        ("prm_stopping", {"logging_steps": 10}, {"logging_steps": 1}),
        ("prm_per_tensor", {"gradient_checkpointing": False}, {"gradient_checkpointing": True}),
        ("prm_per_tensor", {"output_dir": "a", "per_device_train_batch_size": 4}, {"output_dir": "b"}),
        ("prm_per_tensor", {}, {"num_train_epochs": 10}),  # not on record of the other
    ],
)
def test_what_is_a_methods_own_or_changes_no_result(tmp_path, method, ours, theirs):
    pair(tmp_path, ours, theirs, method)
    assert len(compare_runs(tmp_path).runs) == 2


def test_what_is_a_methods_own_is_the_same_in_all_its_runs(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    write_run(tmp_path, "prm_debiased", 1e-3, 0, 0.7, 0.4, settings={"prm_variance_beta": 0.9})
    write_run(tmp_path, "prm_rows", 1e-3, 0, 0.7, 0.4, settings={"prm_variance_beta": 0.99})
    assert len(compare_runs(tmp_path).runs) == 3
    write_run(tmp_path, "prm_debiased", 1e-2, 0, 0.7, 0.4, settings={"prm_variance_beta": 0.5})
    with pytest.raises(ValueError, match=r"`prm_variance_beta`: 0\.5 in prm_debiased_lr1e-02_seed0, 0\.9 in prm_deb"):
        compare_runs(tmp_path)


def test_controls_have_the_settings_of_the_runs_that_they_are_bound_to(tmp_path):
    of = write_run(tmp_path, "prm_rows_eps:10", 1e-2, 0, 0.8, 0.4, settings={"relative_eps": 10.0, "optim": "prm"})
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4, settings={"relative_eps": None, "optim": "adamw_torch_fused"})
    settings = {"relative_eps": 10.0, "optim": "prm", "constant_q": {"of": of, "mean_q": 0.1}}
    write_run(tmp_path, "constant_q", 1e-3, 0, 0.7, 0.4, settings=settings)
    assert len(compare_runs(tmp_path).runs) == 3


def test_controls_that_name_the_folder_of_their_run(tmp_path):
    """Its name ends in a hash of all that makes the run what it is, the seed included."""
    for seed, digest in ((0, "0123abcd"), (1, "4567cdef")):
        name = write_run(tmp_path, "prm_debiased", 1e-2, seed, 0.8, 0.4)
        folder = (tmp_path / name).rename(tmp_path / f"{name}_{digest}").name
        write_run(tmp_path, "constant_q", 1e-3, seed, 0.7, 0.4, settings={"constant_q": {"of": folder, "mean_q": 0.1}})
    rows = {row.method: row for row in compare_runs(tmp_path).rows}
    assert len(rows) == 2 and len(rows["constant_q"].runs) == 2
    assert rows["constant_q"].source is rows["prm_debiased"]
    assert parse_name("adamw_lr0.001_seed3_0123abcd") == ("adamw", 0.001, 3)


def test_experiments_of_several_folders_have_a_table_each(tmp_path, capsys):
    for epochs, gain in ((1, 0.0), (10, 0.1)):
        for lr in (1e-3, 1e-2):
            settings = {"num_train_epochs": epochs, "beta": 0.1 * epochs}
            write_run(tmp_path / f"e{epochs}", "adamw", lr, 0, 0.7, 0.4, settings=settings)
            write_run(tmp_path / f"e{epochs}", "prm_per_tensor", lr, 0, 0.7 + gain, 0.4, settings=settings)
    one, ten = compare_experiments(tmp_path)
    assert {run.settings["num_train_epochs"] for run in one.runs} == {1} and len(ten.runs) == 4
    assert cli.main(["compare", str(tmp_path / "e1"), str(tmp_path / "e10")]) == 0
    text = capsys.readouterr().out
    assert text.count("method  ") == 2 and "Experiment 1 of 2: " in text and "Experiment 2 of 2: " in text
    said = " ".join(text.split()).split("differ from those of the first: ")[1]
    expected = rf"`beta`: 0.1 in \S+/e1/{NAME}, 1.0 in \S+/e10/{NAME}; `num_train_epochs`: 1 in \S+, 10 in \S+"
    assert re.match(expected, said)
    assert len(json.loads(format_comparison([one, ten], "json"))["experiments"]) == 2
    assert format_comparison([one, ten], "markdown").count("## Experiment") == 2
    with pytest.raises(ValueError, match="The runs differ in `beta`"):
        compare_runs(tmp_path)


def test_two_experiments_in_one_folder(tmp_path):
    """A changed setting gives new folders beside the old ones: each set is a comparison of its own."""
    for epochs in (1, 10):
        for method in ("adamw", "prm_per_tensor"):
            name, settings = f"{method}_{epochs}", {"num_train_epochs": epochs}
            write_run(tmp_path, method, 1e-3, 0, 0.7, 0.4, settings=settings, name=name)
    assert [len(comparison.runs) for comparison in compare_experiments(tmp_path)] == [2, 2]


def test_a_trainers_run_joins_the_experiment_of_its_folder(tmp_path):
    for folder, epochs in (("a", 1), ("b", 2)):
        pair(tmp_path / folder, {"num_train_epochs": epochs}, {"num_train_epochs": epochs})
    log = [{"step": 8, "eval_loss": 0.6, "eval_rewards/accuracies": 0.7, "eval_drift/kl": 0.1}]
    (tmp_path / "b" / "own_adamw").mkdir()
    (tmp_path / "b" / "own_adamw" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    groups = group_comparable(load_runs(tmp_path))
    assert [[run.name for run in group if run.source == "trainer"] for group in groups] == [[], ["own_adamw"]]


def test_recorded_runs_keep_their_numbers(tmp_path):
    """Differences, intervals and p-values that version 0.2.0 found in runs of version 0.1.0."""
    found = json.loads(format_comparison(compare_runs(RECORDED), "json"))
    numbers = [[c[key] for key in ("difference", "low", "high", "p_holm")] for c in found["contrasts"]]
    expected = json.loads((RECORDED / "expected_contrasts.json").read_text())
    assert [numbers[i] == pytest.approx(row, abs=1e-9) for i, row in enumerate(expected)] == [True] * len(numbers)


@pytest.mark.parametrize("file", ["adamw_lr1e-04_seed0", "prm_per_tensor_lr1e-02_seed0"])
def test_runs_that_are_there_twice(tmp_path, file):
    write_grid(tmp_path / "a")
    shutil.copytree(tmp_path / "a" / file, tmp_path / "b" / file)
    with pytest.raises(ValueError, match=f"{file} and .*{file} are both '.*' at learning rate 1e-. with seed 0"):
        compare_experiments(tmp_path)
