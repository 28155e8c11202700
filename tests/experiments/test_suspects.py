"""`prm-hf suspects` as a user runs it: on files, again, with decisions, and on the built-in task."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset

from prm_hf.demo import build_demo, completion_rows
from prm_hf.experiments import OUT_OF_TIME, suspects
from prm_hf.experiments.runner import FAILED
from prm_hf.noise import flip_preferences
from prm_hf.suspects import Suspects

from .comparisons import ON_CPU, ROOT, read, read_lines


SHORT = ["--max_length", "64", "--num_train_epochs", "2", "--per_device_train_batch_size", "8", "--folds", "2"]
SHORT += ["--gradient_checkpointing", "False", "--learning_rates", "1e-3", *ON_CPU]


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """A file of 32 pairs of the built-in task, of which some are flipped, with a column of another kind."""
    rows = flip_preferences(build_demo().train.select(range(32)), 0.3)
    rows = rows.add_column("source", [f"s{i}" for i in range(32)])
    file = tmp_path_factory.mktemp("flipped") / "pairs.jsonl"
    rows.to_json(file)
    return file


def run(file, folder, *arguments):
    model = build_demo().model_path
    return suspects.main([str(file), "--model", model, "--output", str(folder), *SHORT, *arguments])


def stamps(folder):
    return {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/metrics.json")}


def test_suspects_of_a_file(flipped, tmp_path, capsys):
    assert run(flipped, tmp_path) == 0
    rows, lines = read_lines(flipped), read_lines(tmp_path / "suspects.jsonl")
    assert sorted(line["row"] for line in lines) == list(range(32))
    assert [line["rank"] for line in lines] == list(range(1, 33))
    assert all(line["data"] == rows[line["row"]] for line in lines)
    assert all(len(line["margins"]) == 2 == len(line["in_sample_margins"]) for line in lines)
    assert {line["fold"] for line in lines} == {0, 1}
    summary = read(tmp_path / "suspects_summary.json")
    assert summary["rows"] == 32 and summary["kind"] == "preference" and summary["how"] == "out of fold"
    assert summary["settings"]["learning_rate"] == 1e-3 and summary["settings"]["method"] == "prm_noisy_labels"
    assert (tmp_path / "suspects.html").is_file()
    repaired = read_lines(tmp_path / "repaired.jsonl")
    dropped = {line["row"] for line in lines if line["probability_wrong"] > 0.5}
    assert repaired == [row for i, row in enumerate(rows) if i not in dropped]
    out = capsys.readouterr().out
    assert "32 rows, of whose labels" in out and "AUC of the suspects" in out and "prm-hf dpo" in out

    # The margins of a row are those of the runs, out of fold of one that was not trained on it.
    by_row = {line["row"]: line for line in lines}
    found = sorted(tmp_path.glob("runs/*/*/margins.json"))
    assert [path.parent.parent.name for path in found] == ["fold0of2", "fold1of2"]
    for path in found:
        margins = read(path)
        for part, name in (("train", "in_sample_margins"), ("heldout", "margins")):
            for place, row in enumerate(margins[f"{part}_rows"]):
                assert by_row[row][name] == [epoch[place] for epoch in margins[f"{part}_epochs"]]
        assert {*margins["heldout_rows"]} & {*margins["train_rows"]} == set()
        assert len(margins["heldout_rows"]) + len(margins["train_rows"]) == 32

    before = stamps(tmp_path)
    assert len(before) == 2
    assert run(flipped, tmp_path, "--repair", "flip", "--threshold", "0.4") == 0
    assert stamps(tmp_path) == before and "finished before" in capsys.readouterr().out
    again = read_lines(tmp_path / "repaired.jsonl")
    assert len(again) == 32
    turned = {i for i, (row, new) in enumerate(zip(rows, again, strict=True)) if row["chosen"] != new["chosen"]}
    assert turned == {line["row"] for line in lines if line["probability_wrong"] > 0.4}
    assert all(new["source"] == row["source"] for row, new in zip(rows, again, strict=True))


def test_decisions_are_applied_without_training(flipped, tmp_path, capsys, monkeypatch):
    assert run(flipped, tmp_path) == 0
    capsys.readouterr()
    rows, before = read_lines(flipped), Suspects.load(tmp_path)
    first, second, third = sorted(range(32), key=before.ranks.__getitem__)[:3]
    decisions = tmp_path / "decisions.jsonl"
    decided = {first: "keep", second: "flip", third: "drop"}
    lines = [json.dumps({"row": row, "decision": decision}) + "\n" for row, decision in decided.items()]
    decisions.write_text("".join(lines), encoding="utf-8")
    with monkeypatch.context() as patched:
        patched.setattr(suspects, "find", None)
        assert suspects.main(["--output", str(tmp_path), "--decisions", str(decisions), "--threshold", "1"]) == 0
    repaired = read_lines(tmp_path / "repaired.jsonl")
    sides = {"chosen": "rejected", "utility_chosen": "utility_rejected"}
    other = sides | {rejected: chosen for chosen, rejected in sides.items()}
    swapped = {name: rows[second][other.get(name, name)] for name in rows[second]}
    swapped["flipped"] = not swapped["flipped"]
    assert repaired == [swapped if i == second else row for i, row in enumerate(rows) if i != third]
    out = capsys.readouterr().out
    assert "3 decided by hand" in out and "repaired.jsonl" in out
    page = (tmp_path / "suspects.html").read_text(encoding="utf-8")
    assert [page.count(f'data-decided="{word}"') for word in ("keep", "flip", "drop")] == [1, 1, 1]
    after = Suspects.load(tmp_path)
    assert after == before.decided(decided)
    assert (after.probabilities[first], after.probabilities[second], after.ranks[second]) == (0.0, 1.0, 1)
    assert 0 < after.probabilities[third] < 1

    # The command that found them forgets nothing; another file of decisions takes the place of the first.
    assert run(flipped, tmp_path) == 0
    assert Suspects.load(tmp_path).decisions == after.decisions
    decisions.write_text("", encoding="utf-8")
    assert suspects.main(["--output", str(tmp_path), "--decisions", str(decisions)]) == 0
    assert Suspects.load(tmp_path).probabilities == before.probabilities


@pytest.mark.slow
def test_the_best_of_several_rates_is_taken_by_the_labels_as_given(flipped, tmp_path, monkeypatch):
    run(flipped, tmp_path, "--learning_rates", "1e-6", "3e-3", "--how", "both", "--seeds", "0", "1")
    names = [path.parent.parent.name for path in stamps(tmp_path)]
    assert names.count("fold0of2") == names.count("fold1of2") == 4 == len(names) / 2
    agreement = {}
    for path in tmp_path.glob("runs/fold*/*/metrics.json"):
        info = read(path.with_name("run.json"))
        agreement.setdefault(info["learning_rate"], []).append(info["seed"])
    chosen = read(tmp_path / "suspects_summary.json")["settings"]["learning_rate"]
    mean = {}
    for rate in agreement:
        total = np.zeros(32)
        for path in tmp_path.glob("runs/fold*/*/margins.json"):
            if read(path.with_name("run.json"))["learning_rate"] == rate:
                margins = read(path)
                total[margins["heldout_rows"]] += margins["heldout_epochs"][-1]
        mean[rate] = (np.sign(total).mean() + 1) / 2
    assert mean[chosen] == max(mean.values())


def test_prompts_stay_together_and_a_column_group_wins(tmp_path):
    rows = build_demo().train.select(range(8)).to_list()
    rows = [{**row, "group": "x" if i < 5 else f"{i}"} for i, row in enumerate(rows)]
    Dataset.from_list(rows).to_json(tmp_path / "pairs.jsonl")
    arguments = [str(tmp_path / "pairs.jsonl"), "--model", build_demo().model_path, *SHORT]
    data = suspects.load_data(suspects.parse(arguments))
    assert len({*data.folds[0][:5].tolist()}) == 1 and data.truth is None


def test_completions_and_in_sample_alone(tmp_path, capsys):
    completion_rows(build_demo().train.select(range(16))).to_json(tmp_path / "rows.jsonl")
    assert run(tmp_path / "rows.jsonl", tmp_path / "out", "--how", "in_sample", "--seeds", "1") == 0
    summary = read(tmp_path / "out" / "suspects_summary.json")
    assert summary["kind"] == "completion" and summary["how"] == "in sample"
    lines = read_lines(tmp_path / "out" / "suspects.jsonl")
    assert all(line["fold"] is None and line["margins"] == [] for line in lines)
    assert [path.parent.parent.name for path in stamps(tmp_path / "out")] == ["all_rows"]
    out = capsys.readouterr().out
    assert "prm-hf sft" in out and "deserve less trust" in out


@pytest.mark.parametrize("columns", [("text",), ("age", "city")])
def test_classes_of_texts_and_of_tables(columns, tmp_path):
    rows = [{**{name: f"{name} {i % 5}" for name in columns}, "n": i, "label": "ab"[i % 2]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    own = ["--how", "out_of_fold", "--repair", "flip", "--method", "adamw_eps:10"]
    assert run(tmp_path / "rows.jsonl", tmp_path / "out", *own) == 0
    summary = read(tmp_path / "out" / "suspects_summary.json")
    assert summary["kind"] == "label" and summary["rows"] == 16
    repaired = read_lines(tmp_path / "out" / "repaired.jsonl")
    assert len(repaired) == 16 and all(row["n"] == i and row["label"] in "ab" for i, row in enumerate(repaired))


def test_a_run_that_diverges_leaves_no_suspects(flipped, tmp_path, capsys):
    assert run(flipped, tmp_path, "--learning_rates", "1e30", "--how", "out_of_fold") == FAILED
    out = capsys.readouterr().out
    assert "diverged at step" in out and "No suspects are written" in out
    assert not (tmp_path / "suspects.jsonl").exists()


def test_time_that_is_over(flipped, tmp_path, capsys):
    assert run(flipped, tmp_path, "--max_minutes", "1e-9") == OUT_OF_TIME
    assert "The same command goes on from here." in capsys.readouterr().out
    assert not (tmp_path / "suspects.jsonl").exists()


@pytest.mark.slow
def test_the_built_in_task_in_one_command(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "prm_hf", "suspects", "--output", str(tmp_path / "out")]
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, timeout=1200)
    lines = read_lines(tmp_path / "out" / "suspects.jsonl")
    assert len(lines) == 256
    wrong = [line["data"]["flipped"] for line in lines]
    assert np.mean(wrong[:40]) > 0.7 and np.mean(wrong[-100:]) < 0.2
    summary = read(tmp_path / "out" / "suspects_summary.json")
    assert summary["share_low"] <= np.mean(wrong) <= summary["share_high"]
    assert abs(summary["share_wrong"] - np.mean(wrong)) < 0.1
