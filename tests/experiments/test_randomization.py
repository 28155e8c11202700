"""recipes/randomization.py as a user runs it, and what its report says about runs whose answer is known."""

import base64
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


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("randomization")
    run(folder, *QUICK)
    return folder


QUICK = ["--models", "resnet", "--kinds", *LABELS, "--methods", "adamw", "prm_debiased", "--max_steps", "8"]


# ---- The recipe ----


def test_it_writes_what_it_says(finished):
    folders = sorted(path.parent for path in finished.glob("*/*/*/metrics.json"))
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

    summary = json.loads((finished / "randomization.json").read_text())
    assert len(summary["runs"]) == 6 and summary["statements"]
    assert {row["kind"] for row in summary["runs"]} == set(LABELS)
    assert all(len(row["curve"]) == 2 for row in summary["runs"])
    page = (finished / "report.html").read_text()
    assert all(text in page for text in (*LABELS, "AdamW", "PRM debiased", "random/true"))
    (picture,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    # The runs of one model and kind are a comparison of their own
    assert len(compare_runs(finished / "resnet" / "partial_labels").rows) == 2


def test_finished_runs_are_not_repeated_unless_their_settings_change(finished, capsys):
    def stamps():
        return {path: path.stat().st_mtime_ns for path in finished.glob("*/*/*/metrics.json")}

    before = stamps()
    run(finished, *QUICK)
    assert stamps() == before
    output = capsys.readouterr().out
    assert output.count("(finished before)") == 6 and ">8 " in output
    run(finished, *QUICK, "--noise_rate", "0.5")
    changed = {path.parents[1].name for path, stamp in stamps().items() if stamp != before[path]}
    assert changed == {"partial_labels"}
    assert "trained again, since these settings changed: p" in capsys.readouterr().out


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
    (spec,) = randomization.specify(args)
    trainer = randomization.make_trainer(spec, tmp_path)
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


# ---- What the report says ----


def write_run(folder, kind, method, points, model="vit", seed=0, max_steps=100):
    """A run folder of points (step, train fit, clean fit, corrupted fit, held-out fit)."""
    folder = folder / model / kind / f"{method}_lr1e-3_seed{seed}"
    folder.mkdir(parents=True)
    settings = {"model": model, "kind": kind, "p": 0.3, "heldout_rows": 100, "eval_steps": 2}
    info = {"schema": 1, "name": folder.name, "method": method, "learning_rate": 1e-3, "seed": seed}
    (folder / "run.json").write_text(json.dumps({**info, "task": "randomization", "settings": settings}))
    names = ("train_fit", "clean_fit", "corrupted_fit", "heldout_fit")
    rows = [{"step": s, **{f"memorization/{n}": v for n, v in zip(names, fits, strict=True)}} for s, *fits in points]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {**rows[-1], "steps": rows[-1].pop("step"), "chance": 0.1, "corrupted_rows": 100}
    fitted = [point[0] for point in points if point[1] >= 0.99]
    (folder / "metrics.json").write_text(json.dumps(metrics | ({"steps_to_fit": fitted[0]} if fitted else {})))


def write_method(folder, method, steps, corrupted, heldout_random=0.1, **run):
    """Runs that fit true, partly random and random labels in `steps`, None for never, and that have fitted a share
    `corrupted` of the corrupted rows when 90 % of the clean ones are fitted."""
    for kind, step in zip(LABELS, steps, strict=True):
        heldout = heldout_random if kind == "random_labels" else 0.8
        # The clean fit reaches .9 halfway between two measurements
        points = [(0, 0.1, 0.1, 0.1, 0.1), (2, 0.5, 0.8, corrupted - 0.1, 0.6), (4, 0.6, 1.0, corrupted + 0.1, 0.7)]
        last = (step, 1.0, 1.0, 1.0, heldout) if step else (100, 0.7, 1.0, 0.7, heldout)
        write_run(folder, kind, method, [*points, last], **run)


def say(folder):
    return randomization_report.statements(randomization_report.grouped(load_runs(folder)))


def test_statements_of_the_known_results(tmp_path):
    write_method(tmp_path, "adamw", (10, 20, 40), 0.5)
    write_method(tmp_path, "prm_per_tensor", (10, 8, 40), 0.5)
    write_method(tmp_path, "prm_debiased", (10, 20, None), 0.5, heldout_random=0.12)
    text = "\n".join(say(tmp_path))
    assert "vit: random labels are learnt by heart; steps of AdamW (40), PRM per_tensor (40)." in text
    assert "not learnt by heart within the steps given by PRM debiased (0.70 after 100)" in text
    assert "the held-out fit is 0.10 to 0.12, which is chance (0.10 ± 0.03)" in text
    assert "longer they take; steps for true, partly random and random labels of AdamW (10, 20, 40), PRM deb" in text
    assert "PRM debiased (10, 20, >100)" in text
    assert "do not rise throughout with PRM per_tensor (10, 8, 40)." in text


def test_statements_where_prm_differs(tmp_path):
    write_method(tmp_path, "adamw", (10, 20, 40), 0.5)
    write_method(tmp_path, "prm_per_tensor", (10, 20, 40), 0.35)  # 2.2 standard errors below
    write_method(tmp_path, "prm_per_param", (10, 20, 40), 0.4)
    write_method(tmp_path, "prm_debiased", (10, 20, 40), 0.7)
    (text,) = [text for text in say(tmp_path) if "corrupted ones" in text]
    assert text == (
        "vit: when 90% of the clean rows of partial_labels are fitted, AdamW fits 0.50 ± 0.05 of the corrupted ones; "
        "fewer: PRM per_tensor (0.35); more: PRM debiased (0.70); no difference beyond two standard errors: PRM "
        "per_param (0.40)."
    )
    heads, body = randomization_report.memory_table(randomization_report.grouped(load_runs(tmp_path)))
    row = dict(zip(heads, body[0], strict=True))
    assert row["random/true"] == "4.0 [3.8, 5.0]" and row["corrupted fit"] == "0.50 ± 0.05"
    assert row["held-out fit"] == "0.65" and row["best held-out"] == "0.80"


def test_statements_where_prm_slows_noise_down(tmp_path):
    write_method(tmp_path, "adamw", (10, 20, 40), 0.5)  # 38/10 to 40/8
    write_method(tmp_path, "prm_per_tensor", (10, 20, 50), 0.5)  # from 4.8
    write_method(tmp_path, "prm_per_param", (10, 20, 54), 0.5)  # from 5.2
    write_method(tmp_path, "prm_debiased", (10, 20, 30), 0.5)  # to 3.75
    write_method(tmp_path, "prm_debiased_per_param", (10, 20, None), 0.5)
    texts = say(tmp_path)
    (text,) = [text for text in texts if "relative to true labels" in text]
    assert text == (
        "vit: relative to true labels, random ones take AdamW 4.0 [3.8, 5.0] times the steps; longer: PRM "
        "debiased per_param >10.0, PRM per_param 5.4 [5.2, 6.8]; shorter: PRM debiased 3.0 [2.8, 3.8]; no difference "
        "that is sure: PRM per_tensor 5.0 [4.8, 6.2]."
    )
    assert texts[-1].startswith("One seed")


def test_what_was_not_reached_or_not_run_is_said(tmp_path):
    write_method(tmp_path, "adamw", (10, 20, 40), 0.5, heldout_random=0.4)
    write_run(tmp_path, "partial_labels", "prm_debiased", [(0, 0.1, 0.1, 0.1, 0.1), (9, 0.2, 0.2, 0.1, 0.2)])
    text = "\n".join(say(tmp_path))
    assert "and not all of it is chance" in text
    assert "not there within the steps given: PRM debiased" in text
    heads, body = randomization_report.fit_table(randomization_report.grouped(load_runs(tmp_path)))
    assert heads == ["model", "kind", "AdamW", "PRM debiased"]
    assert {row[1]: row[2:] for row in body} == {
        "partial_labels": ["  20 1.00 0.80", "  >9 0.20 0.20"],
        "random_labels": ["  40 1.00 0.40", ""],
        "true_labels": ["  10 1.00 0.80", ""],
    }


def test_seeds_are_averaged_and_one_that_never_fits_counts(tmp_path):
    for seed, step in enumerate((10, 30)):
        write_method(tmp_path, "adamw", (step, step, step), 0.5, seed=seed)
    write_method(tmp_path, "prm_debiased", (10, 10, 10), 0.5)
    write_method(tmp_path, "prm_debiased", (None, None, None), 0.5, seed=1)
    assert "One seed" not in "".join(say(tmp_path))
    groups = randomization_report.grouped(load_runs(tmp_path))
    ratio = randomization_report.relative_steps(
        groups["vit", "true_labels", "adamw"], groups["vit", "random_labels", "adamw"]
    )
    assert ratio == (1, pytest.approx(0.8), pytest.approx(1.25))
    assert randomization_report.steps_to_fit(groups["vit", "true_labels", "adamw"]) == 20
    assert randomization_report.fit_table(groups)[1][0][2:] == ["  20 1.00 0.80", ">100 0.85 0.80"]
