"""The randomization tests as a user runs them, and what their report says about runs whose answer is known."""

import base64
import dataclasses
import json
import logging
import re
import sys

import pytest
import torch
from transformers.utils.logging import get_verbosity, set_verbosity

from prm_hf.compare import compare_runs, load_runs
from prm_hf.experiments import randomization, randomization_report


LABELS = ("true_labels", "partial_labels", "random_labels")


@pytest.fixture(scope="module", autouse=True)
def process_as_before():
    """With one worker the runs are made in this process, whose settings are then the worker's."""
    level, verbosity, threads = logging.getLogger("prm_hf").level, get_verbosity(), torch.get_num_threads()
    yield
    logging.getLogger("prm_hf").setLevel(level)
    set_verbosity(verbosity)
    torch.set_num_threads(threads)


def run(output_dir, *arguments):
    randomization.main(["--output_dir", str(output_dir), "--workers", "1", *arguments])


@pytest.fixture
def few_rows(monkeypatch):
    """Reading rows takes longest; these tests need few of them."""
    model = dataclasses.replace(randomization.MODELS["resnet"], rows=160, heldout_rows=64)
    monkeypatch.setitem(randomization.MODELS, "resnet", model)


QUICK = ["--models", "resnet", "--kinds", *LABELS, "--methods", "adamw", "prm_debiased", "--max_steps", "8"]


# ---- The recipe ----


def test_it_writes_what_it_says(tmp_path, few_rows):
    run(tmp_path, *QUICK)
    folders = sorted(path.parent for path in tmp_path.glob("*/*/*/metrics.json"))
    assert len(folders) == 6
    corrupted = {}
    for found in load_runs(folders):
        kind, metrics = found.settings["kind"], found.metrics
        assert found.path.parent.name == kind and found.path.parents[1].name == "resnet"
        assert metrics["steps"] == 8 and metrics["chance"] == 0.1 and "steps_to_fit" not in metrics
        assert found.series("memorization/train_fit")[0].tolist() == [0, 8]
        assert found.series("memorization/heldout_fit")[0].tolist() == [0, 8]
        corrupted[kind] = metrics["corrupted_rows"] / found.settings["rows"]
    assert corrupted["true_labels"] == 0
    assert corrupted["partial_labels"] == pytest.approx(0.27, abs=0.08)
    assert corrupted["random_labels"] == pytest.approx(0.9, abs=0.08)

    summary = json.loads((tmp_path / "randomization.json").read_text())
    assert len(summary["runs"]) == 6 and summary["statements"]
    assert {row["kind"] for row in summary["runs"]} == set(LABELS)
    assert all(len(row["curve"]) == 2 for row in summary["runs"])
    page = (tmp_path / "report.html").read_text()
    assert all(text in page for text in (*LABELS, "AdamW", "PRM debiased", "random/true"))
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    # The runs of one model and kind are a comparison of their own
    assert len(compare_runs(tmp_path / "resnet" / "partial_labels").rows) == 2


def test_finished_runs_are_not_repeated_unless_their_settings_change(tmp_path, capsys, few_rows, no_pictures):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*/metrics.json")}

    arguments = ["--models", "resnet", "--kinds", *LABELS, "--methods", "adamw", "--max_steps", "2"]
    run(tmp_path, *arguments)
    for path in stamps():  # as version 0.2 named them
        path.parent.rename(path.parent.with_name(path.parent.name.rpartition("_")[0]))
    before = stamps()
    run(tmp_path, *arguments)
    assert stamps() == before
    output = capsys.readouterr().out
    assert output.count("(finished before)") == 3 and ">2 " in output
    run(tmp_path, *arguments, "--noise_rate", "0.5")
    now = stamps()
    assert {path: now[path] for path in before} == before
    assert [path.parents[1].name for path in now.keys() - before.keys()] == ["partial_labels"]
    assert "since these settings differ from adamw_lr0.003_seed0: p" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "kind"), [("vit", "shuffled_inputs"), ("sft", "random_labels"), ("dpo", "gaussian_inputs")]
)
def test_other_models(model, kind, tmp_path):
    run(tmp_path, "--models", model, "--kinds", kind, "--methods", "prm_per_param", "--max_steps", "2")
    (found,) = load_runs(tmp_path)
    settings, metrics = found.settings, found.metrics
    assert found.method == "prm_per_param" and metrics["steps"] == 2
    assert 0.9 * settings["rows"] <= metrics["corrupted_rows"] <= settings["rows"]
    assert metrics["memorization/corrupted_loss"] > 0 and 0 <= metrics["memorization/heldout_fit"] <= 1
    # Four of the seven words of a completion and its end are the same in all or in half of the rows
    assert metrics["chance"] == pytest.approx({"vit": 0.1, "sft": 0.5, "dpo": 0.5}[model], abs=0.1)


def test_the_settings_are_those_of_the_training(tmp_path):
    args = randomization.Arguments(models=["resnet"], kinds=["true_labels"], methods=["prm_debiased"], max_steps=3)
    grid = randomization.RandomizationGrid(args)
    (spec,) = grid.specify_runs()
    trainer = grid.make_trainer(spec, tmp_path)
    assert trainer.args.max_steps == 3 and trainer.args.warmup_steps == spec.settings["warmup_steps"]
    assert len(trainer.train_dataset) == spec.settings["rows"]
    assert len(trainer.eval_dataset) == spec.settings["heldout_rows"]
    group = trainer.create_optimizer().param_groups[0]
    assert (group["estimator"], group["reduction"], group["lr"]) == ("debiased", "per_tensor", spec.learning_rate)
    pixels = {tuple(row["pixel_values"].flatten().tolist()) for row in trainer.train_dataset}
    assert not any(tuple(row["pixel_values"].flatten().tolist()) in pixels for row in trainer.eval_dataset)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "bert"], "`models` must name at least one of vit, resnet, sft, dpo, and none twice, got"),
        (["--kinds", "noise"], "`kinds` must name at least one of true_labels"),
        (["--methods", "adamw", "adamw"], "`methods` must name .* none twice"),
        (["--seeds", "1", "1"], "`seeds` must name at least one, and none twice"),
        (["--noise_rate", "0"], r"`noise_rate` must be in \(0, 1\], got 0.0"),
        (["--max_steps", "0"], "`max_steps` must be at least 1, got 0"),
        (["--workers", "0"], "`workers` must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        randomization.main(arguments)


def test_the_extra_is_named_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r'pip install "prm-hf\[vision\]"'):
        run(tmp_path, *QUICK)
    assert not list(tmp_path.iterdir())
    randomization.Arguments(models=["sft"])  # needs no digits


def test_several_processes_are_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="start one with `python`, and set `--workers`"):
        run(tmp_path, *QUICK)


@pytest.mark.slow
def test_random_labels_are_learnt_by_heart(tmp_path):
    """The known results, of a small classifier with two workers: 100 % of random labels, held-out rows at chance."""
    methods = ["adamw", "prm_debiased_per_param"]
    arguments = ["--models", "vit", "--kinds", *LABELS, "--methods", *methods, "--seeds", "0", "2", "3"]
    run(tmp_path, *arguments, "--workers", "2")
    runs = load_runs(tmp_path)
    assert len(runs) == 18
    groups = randomization_report.grouped(runs)
    for method in methods:
        true, partial, random = (groups["vit", kind, method] for kind in LABELS)
        assert all(found.metrics["memorization/train_fit"] == 1 for found in true + random)
        for found in random:  # within three standard errors
            assert found.metrics["memorization/heldout_fit"] == pytest.approx(0.1, abs=3 * (0.09 / 256) ** 0.5)
        for found in true:
            assert found.metrics["memorization/heldout_fit"] > 0.7
        steps = [randomization_report.steps_to_fit(each) for each in (true, partial, random)]
        assert steps[0] < steps[1] < steps[2] < 200
