"""The rows of a comparison: what is held out of one file, rows that are trained on, and rows that cannot be read."""

import json
import os
import shutil
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from prm_hf.demo import build_demo, completion_rows
from prm_hf.experiments import runner
from prm_hf.experiments.checks import check_data
from prm_hf.experiments.data import digest, load_data, model_digest, split_by_prompt
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.rows import Columns, groups_of, overlapping, text_of
from prm_hf.experiments.sft import SFTExperiment

from .comparisons import ON_CPU, run_dpo_on_files


PAIRS = Columns("prompt", ("chosen", "rejected"), needs_prompt=False, advice="")
LONG = "word " * 30
TEXTS = Columns("prompt", ("completion",), needs_prompt=True, advice="")


def pairs(prompts, mark=""):
    return [
        {"prompt": f"p{i}", "chosen": f"good {mark}{n}", "rejected": f"bad {mark}{n}"} for n, i in enumerate(prompts)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(*arguments, experiment=DPOExperiment):
    """The data of the first comparison of a command, checked."""
    parsed = experiment.parse(["--model_name_or_path", build_demo().model_path, *ON_CPU, *arguments])
    found = next(load_data(parsed.script_args, parsed.model_args, parsed.built_in_rows, parsed.columns()))
    check_data(parsed, found)
    return found


# ---- One file ----


def test_one_file_is_split_by_prompt(tmp_path, capsys):
    file = write(tmp_path / "pairs.jsonl", pairs([i % 20 for i in range(60)]))
    found = load("--dataset_name", file)
    assert capsys.readouterr().out.count("is split by prompt") == 1
    trained, held = set(found.train["prompt"]), set(found.heldout["prompt"])
    assert len(held) == 4 and len(trained) == 16 and not trained & held
    assert len(found.train) + len(found.heldout) == 60
    again = load("--dataset_name", file)
    assert again.heldout["prompt"][:] == found.heldout["prompt"][:] and again.digests == found.digests
    assert found.source["train_split"] == "by prompt, 20% held out"


def test_one_file_of_completions_is_split_too(tmp_path):
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(10)]
    columns = ["--prompt_column", "question", "--completion_column", "answer"]
    found = load("--dataset_name", write(tmp_path / "rows.jsonl", rows), *columns, experiment=SFTExperiment)
    assert len(found.train) == 8 and len(found.heldout) == 2


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["--dataset_train_split", "foo"], "`dataset_train_split` is 'foo', and .* has one split, 'train'"),
        (
            ["--dataset_test_split", "validation"],
            "`dataset_test_split` is 'validation', and .* has one split",
        ),
        (
            ["--dataset_train_split", "train[:80%]"],
            "`dataset_test_split` is 'test', .* has one split, 'train'. Name",
        ),
        (["--dataset_train_split", "train[:80%]", "--dataset_test_split", "train[50%:]"], "6 of the 10 held-out rows"),
        (["--dataset_test_split", "train"], "20 of the 20 held-out rows"),
    ],
)
def test_other_splits_of_one_file(tmp_path, splits, message):
    file = write(tmp_path / "pairs.jsonl", pairs(range(20)))
    with pytest.raises(ValueError, match=message):
        load("--dataset_name", file, *splits)


def test_slices_that_do_not_overlap(tmp_path):
    splits = ["--dataset_train_split", "train[:80%]", "--dataset_test_split", "train[80%:]"]
    found = load("--dataset_name", write(tmp_path / "pairs.jsonl", pairs(range(20))), *splits)
    assert len(found.train) == 16 and found.heldout["prompt"][:] == [f"p{i}" for i in range(16, 20)]


def test_a_file_of_one_prompt_cannot_be_split():
    with pytest.raises(
        ValueError, match="cannot be split by prompt, for they have 1 prompts, and none of 1 is .*: name held-out rows"
    ):
        split_by_prompt(Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}] * 3), PAIRS)


def test_a_text_under_two_prompts_is_not_held_out():
    rows = [{"prompt": f"p{i}", "completion": f"{LONG} {i}"} for i in range(20)]
    again = [{**row, "prompt": f"again {row['prompt']}"} for row in rows]
    train, heldout = split_by_prompt(Dataset.from_list([*rows, *again[:10]]), TEXTS)
    assert 0 < len(heldout) < 6 and not {*train["completion"]} & {*heldout["completion"]}
    with pytest.raises(ValueError, match="have 10 prompts, and none of 2 is without a text of the others"):
        split_by_prompt(Dataset.from_list([{**row, "completion": LONG} for row in rows[:10]]), TEXTS)


# ---- Rows that are trained on ----


def test_held_out_rows_that_are_trained_on_are_counted_or_left_out(tmp_path, capsys):
    train = write(tmp_path / "train.jsonl", pairs(range(10)))
    test = write(tmp_path / "test.jsonl", pairs(range(7, 15), mark="other "))
    arguments = ["--dataset_name", train, "--eval_dataset_name", test]
    with pytest.raises(ValueError, match=r"3 of the 8 held-out rows .* \(held-out rows 0, 1, 2\).*`--drop_overlap`"):
        load(*arguments)
    found = load(*arguments, "--drop_overlap")
    assert found.heldout["prompt"][:] == [f"p{i}" for i in range(10, 15)]
    assert "3 held-out rows" in capsys.readouterr().out
    with pytest.raises(ValueError, match="All held-out rows"):
        load("--dataset_name", train, "--eval_dataset_name", train, "--drop_overlap")


def test_splits_of_a_folder_are_looked_at_too(tmp_path):
    rows = Dataset.from_list(pairs(range(6)))
    DatasetDict(train=rows, test=rows.select([5])).save_to_disk(tmp_path / "data")
    with pytest.raises(ValueError, match="1 of the 1 held-out rows"):
        load("--dataset_name", str(tmp_path / "data"))


@pytest.mark.parametrize(
    ("train", "held", "same"),
    [
        ({"prompt": "a  b", "chosen": "x", "rejected": "y"}, {"prompt": "a b", "chosen": "1", "rejected": "2"}, True),
        ({"prompt": "a", "chosen": "x", "rejected": "y"}, {"prompt": "b", "chosen": "x", "rejected": "y"}, False),
        ({"prompt": "a", "chosen": "b x", "rejected": "y"}, {"prompt": "a b", "chosen": "x", "rejected": "z"}, True),
        ({"prompt": "a", "chosen": LONG, "rejected": "y"}, {"prompt": "b", "chosen": "y", "rejected": LONG}, True),
        ({"prompt": "a", "chosen": LONG, "rejected": "y"}, {"prompt": "b", "chosen": "z", "rejected": LONG}, False),
        (
            {"prompt": [{"role": "user", "content": "a"}], "chosen": "x", "rejected": "y"},
            {"prompt": "a", "chosen": "x", "rejected": "z"},
            True,
        ),
        ({"chosen": "a b. x", "rejected": "a b. y"}, {"chosen": "a b. 1", "rejected": "a b. 2"}, True),
        ({"chosen": "c x", "rejected": "d y"}, {"chosen": "c x", "rejected": "e z"}, True),
    ],
)
def test_what_is_the_same(train, held, same):
    assert overlapping(Dataset.from_list([train]), Dataset.from_list([held]), PAIRS) == ([0] if same else [])


def test_a_prompt_that_all_rows_have_says_nothing():
    rows = [{"prompt": "Continue:", "completion": text} for text in "abcd"]
    assert overlapping(Dataset.from_list(rows[:3]), Dataset.from_list(rows[2:]), TEXTS) == [0]


def test_the_built_in_rows_are_not_trained_on():
    demo = build_demo()
    assert overlapping(demo.train, demo.test, PAIRS) == []
    assert overlapping(completion_rows(demo.train), completion_rows(demo.test), TEXTS) == []


def test_messages_and_parts_are_texts():
    parts = [{"role": "user", "content": [{"type": "text", "text": "a  b"}]}, {"role": "assistant", "content": "c"}]
    assert text_of(parts) == text_of(" a b\nc ") == "a b c" and text_of(None) == ""


# ---- Rows that cannot be trained on ----


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "a", "chosen": "b"}] * 9, "have no column 'rejected'; they have .*Rename yours"),
        (
            [*pairs(range(8)), {"prompt": "p8", "chosen": None, "rejected": "x"}],
            "'chosen', and 1 of 9 have none: rows 8 ",
        ),
        ([{**row, "chosen": 3} for row in pairs(range(9))], "'chosen', and 9 of 9 have none: rows 0, 1, 2, 3, 4, …"),
        ([{**row, "flipped": False} for row in pairs(range(9))], "cannot be flipped. .*flipped"),
        (
            [{**row, "chosen_score": 1} for row in pairs(range(9))],
            "cannot be flipped. Column 'chosen_score' .* no partner",
        ),
    ],
    ids=["column", "null", "number", "flipped", "partner"],
)
def test_rows_are_checked_before_a_model_is_loaded(tmp_path, monkeypatch, rows, message):
    monkeypatch.setattr(DPOExperiment, "prepare", lambda *args: pytest.fail("a model was loaded"))
    file = write(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        runner.run_comparisons(DPOExperiment, ["--model_name_or_path", "m", "--dataset_name", file, *ON_CPU])


def test_all_datasets_are_checked_before_the_first_is_trained_on(pairs, tmp_path, monkeypatch):
    monkeypatch.setattr(DPOExperiment, "prepare", lambda *args: pytest.fail("a model was loaded"))
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "a", "answer": "b"}])
    both = ["--dataset_name", str(pairs / "train.jsonl"), bad, "--eval_dataset_name", *[str(pairs / "test.jsonl")] * 2]
    with pytest.raises(ValueError, match="bad.jsonl, have no column 'chosen'"):
        run_dpo_on_files(pairs, tmp_path / "runs", "--methods", "adamw", *both)


def test_an_answer_that_is_not_there(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": f"so #### {i}" if i < 9 else "none"} for i in range(10)]
    splits = [
        "--dataset_train_split",
        "train[:5]",
        "--dataset_test_split",
        "train[5:]",
        "--answer_pattern",
        "#### (.+)",
    ]
    with pytest.raises(ValueError, match=r"no answer is found by .* in 1 of 5 rows: 4 \(from 0\)"):
        load("--dataset_name", write(tmp_path / "rows.jsonl", rows), *splits, experiment=SFTExperiment)


def test_a_step_of_all_rows(tmp_path):
    file = write(tmp_path / "pairs.jsonl", pairs(range(10)))
    with pytest.raises(ValueError, match="`prm_boundary` is 'empirical', and .* has 8 training rows for 8 a step"):
        load("--dataset_name", file, "--prm_boundary", "empirical", "--per_device_train_batch_size", "8")


# ---- What tells data and models apart ----


def test_digests_are_of_contents(tmp_path):
    rows = Dataset.from_list(pairs(range(5)))
    assert digest(rows, PAIRS) == digest(Dataset.from_list([{**row, "more": 1} for row in pairs(range(5))]), PAIRS)
    assert len({digest(x, PAIRS) for x in (rows, rows.select([1, 0, 2, 3, 4]), rows.select(range(4)))}) == 3
    source, copy = Path(build_demo().model_path), tmp_path / "copy"
    shutil.copytree(source, copy)
    for file in copy.iterdir():
        os.utime(file)
    (copy / "README.md").write_text("notes")
    assert model_digest(str(copy)) == model_digest(str(source))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\\0")
    assert model_digest(str(copy)) != model_digest(str(source))
    assert model_digest("nobody/nothing") is None


# ---- Held-out rows that belong together ----


@pytest.mark.parametrize(
    ("rows", "columns", "groups"),
    [
        (pairs("abab"), PAIRS, [0, 1, 0, 1]),
        ([{**row, "group": group} for row, group in zip(pairs("abab"), "xxyy", strict=True)], PAIRS, [0, 0, 1, 1]),
        ([{**row, "group": group} for row, group in zip(pairs("abab"), [5, 5, 5, 5], strict=True)], PAIRS, [0] * 4),
        (pairs("aaa"), PAIRS, [0, 1, 2]),  # a prompt that all rows have says nothing
        ([{"prompt": "p  q", "completion": "1"}, {"prompt": "p q", "completion": "2"}], TEXTS, [0, 1]),
        ([{"prompt": p, "completion": "1"} for p in ("a", " a", "b")], TEXTS, [0, 0, 1]),
        ([{"chosen": f"Q{i}? yes", "rejected": f"Q{i}? no"} for i in (1, 2)], PAIRS, [0, 1]),
        ([{"prompt": [{"role": "user", "content": p}], "completion": "1"} for p in "aba"], TEXTS, [0, 1, 0]),
    ],
)
def test_rows_of_a_group_or_of_one_prompt_belong_together(rows, columns, groups):
    assert groups_of(Dataset.from_list(rows), columns) == groups


def test_the_groups_of_held_out_rows_are_known_before_columns_are_left_out(tmp_path):
    train = write(tmp_path / "train.jsonl", pairs(range(20)))
    test = write(tmp_path / "test.jsonl", pairs([30, 31, 31, 30], mark="t"))
    arguments = ("--dataset_name", train, "--eval_dataset_name", test)
    found = load(*arguments)
    assert found.heldout_groups == [0, 1, 1, 0]
    rows = [{"q": f"p{i}", "a": f"long answer {i} {n}", "group": f"g{n // 3}"} for n, i in enumerate(range(6))]
    names = ("--prompt_column", "q", "--completion_column", "a", "--dataset_train_split", "train[:2]")
    held = ("--dataset_test_split", "train[2:]", "--dataset_name", write(tmp_path / "sft.jsonl", rows))
    found = load(*names, *held, experiment=SFTExperiment)
    experiment = SFTExperiment.parse(["--model_name_or_path", build_demo().model_path, *ON_CPU, *names, *held])
    prepared = experiment.prepare(found)
    assert "group" not in prepared.heldout.column_names and prepared.heldout_groups == [0, 1, 1, 1]
