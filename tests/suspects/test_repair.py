"""Repaired rows: nothing but the label changes, decisions by hand win, and everything that is done is counted."""

import json
import logging
import math

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value, load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from prm_hf.noise import corrupt, flip_preferences
from prm_hf.suspects.decisions import read_decisions
from prm_hf.suspects.repair import check_repair, repair, write_rows


def message(role, content):
    return [{"role": role, "content": content}]


# Values that tables change on the way, if rows go through one
ODD = {
    "meta": {"a": None, "ü": [1, 2.5, "x"]},
    "huge": 2**70,
    "tiny": 1e-300,
    "text": "\u2028\u202e🏴 \x00",
    "none": None,
}
PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
FORMATS = {
    "standard": PAIR,
    "conversational": {
        "prompt": message("user", "p"),
        "chosen": message("assistant", "c"),
        "rejected": message("assistant", "r"),
    },
    "columns that follow": {
        **PAIR,
        "score_chosen": 2.0,
        "score_rejected": 1.0,
        "margin": 1,
        "preferred": "model_a",
        "flipped": True,
        "source": "web",
    },
    "odd values": {**PAIR, **ODD},
}
SWAPPED = {
    "standard": {**PAIR, "chosen": "r", "rejected": "c"},
    "conversational": {
        **FORMATS["conversational"],
        "chosen": message("assistant", "r"),
        "rejected": message("assistant", "c"),
    },
    "columns that follow": {
        **PAIR,
        "chosen": "r",
        "rejected": "c",
        "score_chosen": 1.0,
        "score_rejected": 2.0,
        "margin": -1,
        "preferred": "model_b",
        "flipped": False,
        "source": "web",
    },
    "odd values": {**PAIR, "chosen": "r", "rejected": "c", **ODD},
}


IN_TABLES = [name for name in FORMATS if name != "odd values"]  # which a table does not hold


@pytest.mark.parametrize(
    "name, as_dataset", [*((name, False) for name in FORMATS), *((name, True) for name in IN_TABLES)]
)
def test_a_flip_swaps_the_sides_and_what_follows(name, as_dataset):
    rows = [FORMATS[name]] * 3
    given_rows = Dataset.from_list(rows) if as_dataset else rows
    repaired, summary = repair(given_rows, [0.2, 0.9, 0.5], "flip")
    assert list(repaired) == [FORMATS[name], SWAPPED[name], FORMATS[name]]
    assert type(repaired) is (Dataset if as_dataset else list)
    assert [list(row) for row in repaired] == [list(row) for row in rows]  # the order of the columns too
    assert (summary.kept, summary.flipped, summary.dropped, summary.rows) == (2, 1, 0, 3)
    assert list(given_rows) == rows


def test_a_flip_is_that_of_flip_preferences():
    clean = Dataset.from_list([{**FORMATS["columns that follow"], "flipped": None}] * 50).remove_columns("flipped")
    noisy = flip_preferences(clean, 0.4)
    repaired, _ = repair(noisy, [float(x) for x in noisy["flipped"]], "flip")
    assert repaired.to_list() == [{**row, "flipped": False} for row in clean]


def test_marks_of_noise_follow_and_what_was_before_the_noise_stays():
    clean = Dataset.from_list([{"prompt": f"p{i}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(30)])
    noisy = corrupt(clean, "partial_labels", 0.5, keep_original=True)
    repaired, _ = repair(noisy.to_list(), [float(x) for x in noisy["flipped"]], "flip")
    assert not any(row["flipped"] or row["corrupted"] for row in repaired)
    assert all(row["chosen"] == row["original_chosen"] == f"c{i}" for i, row in enumerate(repaired))
    other = [{**PAIR, "flipped": True, "corrupted": False}, {**PAIR, "flipped": True, "corrupted": True}]
    assert [row["corrupted"] for row in repair(other, [1, 1], "flip")[0]] == [False, True]  # it is about inputs


def test_a_row_of_a_list_may_lack_columns():
    rows = [{**PAIR, "score_chosen": 1}, {**PAIR, "score_rejected": 2, "margin": 3}]
    once, _ = repair(rows, [1, 1], "flip")
    assert once[0] == {**SWAPPED["standard"], "score_rejected": 1}
    assert once[1] == {**SWAPPED["standard"], "score_chosen": 2, "margin": -3}
    assert repair(once, [1, 1], "flip")[0] == rows


def test_a_pair_of_equal_sides_has_nothing_to_flip():
    rows = [{**PAIR, "rejected": "c"}, PAIR]
    repaired, summary = repair(rows, [0.9, 0.9], "flip")
    assert repaired == [rows[0], SWAPPED["standard"]]
    assert (summary.flipped, summary.unchanged, summary.kept) == (1, 1, 1)
    assert "1 to be flipped have no other label" in str(summary)


@pytest.mark.parametrize("as_dataset", [False, True])
def test_soft_labels(as_dataset):
    rows = Dataset.from_list([PAIR] * 4) if as_dataset else [PAIR] * 4
    p = [0.1, 0.6, 0.9, 0.0]
    repaired, summary = repair(rows, np.array(p, dtype=np.float32), "soft")
    assert [row["probability_wrong"] for row in repaired] == pytest.approx(p) and summary.softened == 3
    assert all(type(row["probability_wrong"]) is float for row in repaired)
    repaired, summary = repair(rows, p, "soft", threshold=0.5, decisions={0: "flip", 1: "keep", 3: "drop"})
    assert list(repaired) == [
        {**SWAPPED["standard"], "probability_wrong": 0.0},
        {**PAIR, "probability_wrong": 0.0},
        {**PAIR, "probability_wrong": 0.9},
    ]
    assert summary.by_hand == {"drop": 1, "flip": 1, "keep": 1} and summary.softened == 1


@pytest.mark.parametrize("how", ["drop", "flip"])
def test_decisions_win(how):
    rows = [{**PAIR, "i": i} for i in range(6)]
    p = [0.9, 0.9, 0.9, 0.1, 0.1, 0.1]
    decisions = {0: "keep", 1: "flip", 2: "drop", 3: "keep", 4: "flip", 5: "drop"}
    repaired, summary = repair(rows, p, how, decisions=decisions)
    assert [(row["i"], row["chosen"]) for row in repaired] == [(0, "c"), (1, "r"), (3, "c"), (4, "r")]
    assert (summary.kept, summary.flipped, summary.dropped) == (2, 2, 2)
    assert "2 are flipped (2 by hand), 2 are dropped (2 by hand) and 2 are kept (2 by hand)" in str(summary)


def test_the_summary_in_words():
    _, summary = repair([PAIR] * 5, [0.9, 0.1, 0.1, 0.1, 0.8], decisions={4: "keep"})
    assert str(summary) == (
        "Of 5 rows 1 is dropped and 4 are kept (1 by hand). A row that nobody decided is dropped if its label is "
        "wrong with a probability above 0.5."
    )


def test_completions_are_dropped():
    rows = [{"prompt": "p", "completion": str(i)} for i in range(3)]
    assert repair(rows, [0.9, 0.5, 0.51])[0] == [rows[1]]
    for how in ("flip", "soft"):
        with pytest.raises(ValueError, match="use 'drop'"):
            check_repair(rows, how)
    with pytest.raises(ValueError, match="`decisions` flip row 1, .* no other completion: use 'drop'"):
        repair(rows, [0, 0, 0], decisions={1: "flip"})


def labelled(labels, names=None):
    feature = {"label": ClassLabel(names=names)} if names else {"label": Value("int64")}
    table = {"text": [str(i) for i in range(len(labels))], "label": labels}
    return Dataset.from_dict(table, Features({"text": Value("string"), **feature}))


def test_classes_of_which_there_are_two_are_flipped():
    repaired, summary = repair(labelled([0, 0, -1, 0], ["a", "b"]), [0.9, 0.1, 0.9, 0.9], "flip")
    assert repaired["label"][:] == [1, 0, -1, 1] and summary.flipped == 2 and summary.unchanged == 1
    assert repaired.features["label"].names == ["a", "b"]
    rows = [{"text": "t", "label": label} for label in ("ham", "spam", None)]
    assert [row["label"] for row in repair(rows, [1, 1, 1], "flip")[0]] == ["spam", "ham", None]


def test_classes_of_which_there_are_more_become_what_the_model_prefers():
    rows = labelled([0, 1, 2, 0], ["a", "b", "c"])
    with pytest.raises(ValueError, match="3 classes in place of two: use 'drop', or pass .* `preferred`"):
        check_repair(rows, "flip")
    with pytest.raises(ValueError, match="`decisions` flip row 2, .* 3 classes"):
        repair(rows, [0, 0, 0, 0], decisions={2: "flip"})
    repaired, summary = repair(rows, [0.9, 0.9, 0.1, 0.9], "flip", preferred=np.array([2, 1, 0, 1]))
    assert repaired["label"][:] == [2, 1, 2, 1] and (summary.flipped, summary.unchanged) == (2, 1)
    listed, _ = repair(rows.to_list(), [0.9, 0.9, 0.1, 0.9], "flip", preferred=np.array([2, 1, 0, 1]))
    assert listed == repaired.to_list() and all(type(row["label"]) is int for row in listed)
    with pytest.raises(ValueError, match="'d' for row 0, which is none of the labels"):
        repair([{"text": "t", "label": x} for x in "ab"], [1, 0], "flip", preferred=["d", "a"])


def test_marks_that_no_longer_hold_are_named(caplog):
    rows = [{"text": "t", "label": x, "corrupted": True} for x in "ab"]
    with caplog.at_level(logging.WARNING):
        repair(rows, [1, 0], "flip")
    assert "'corrupted' do not know of the 1 labels that are repaired" in caplog.text


@pytest.mark.parametrize(
    "arguments, error",
    [
        ({"how": "remove"}, "`how` must be one of 'drop', 'flip', 'soft', got 'remove'"),
        ({"threshold": 1.5}, r"`threshold` must be a number in \[0, 1\], got 1.5"),
        ({"threshold": math.nan}, "`threshold`"),
        ({"probabilities": [0.1]}, r"one entry for each of the 2 rows, got shape \(1,\)"),
        ({"probabilities": [0.1, math.nan]}, "the first is nan of row 1"),
        ({"probabilities": [0.1, 1.2]}, "the first is 1.2 of row 1"),
        ({"probabilities": ["a", "b"]}, "must be numbers"),
        ({"decisions": {2: "keep"}}, "row 2 is none of the 2 rows, which are 0 to 1"),
        ({"decisions": {0: "swap"}}, "`decision` of row 0 is 'swap': it must be 'keep', 'flip' or 'drop'"),
        ({"decisions": {True: "keep"}}, "`row` is True"),
        ({"decisions": [(0, "keep")]}, "must be a dict"),
        ({"probabilities": [1, 1]}, "leaves none of the 2 rows: use a higher threshold"),
        ({"rows": []}, "`rows` has no rows"),
        ({"rows": "ab"}, "must be a list of dicts or a datasets.Dataset, got str"),
        ({"rows": [PAIR, 3]}, "row 1 is 3"),
        ({"rows": [{"text": "t"}] * 2}, r"their columns are \['text'\]"),
        ({"rows": [{**PAIR, "probability_wrong": 0.1}] * 2, "how": "soft"}, "'probability_wrong' already"),
        ({"rows": [{**PAIR, "chosen_model": "x"}] * 2, "how": "flip"}, "'chosen_model' .*no partner"),
        ({"rows": [{"text": "t", "label": "x"}] * 2, "how": "soft"}, "use 'drop' or 'flip'"),
    ],
)
def test_what_is_wrong_is_said(arguments, error):
    arguments = {"rows": [PAIR] * 2, "probabilities": [0.1, 0.9], **arguments}
    with pytest.raises((TypeError, ValueError), match=error):
        repair(**arguments)


# --- files ---


def test_rows_are_written_as_they_were_read(tmp_path):
    rows = [{**PAIR, **ODD, "lone": "\ud800"}, {**PAIR, "other": -0.0, "nan": math.inf}]
    write_rows(tmp_path / "repaired.jsonl", rows)
    text = (tmp_path / "repaired.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line) for line in text.split("\n")[:-1]] == rows and "🏴" in text
    pairs = Dataset.from_list([FORMATS["conversational"]] * 2)
    write_rows(tmp_path / "pairs.jsonl", pairs)
    read = load_dataset("json", data_files=str(tmp_path / "pairs.jsonl"), split="train", cache_dir=tmp_path / "cache")
    assert read.to_list() == pairs.to_list()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "repaired.jsonl"
    file.write_text("before")
    with pytest.raises(TypeError, match="Column 'image' of row 1 cannot be written as JSON"):
        write_rows(file, [PAIR, {**PAIR, "image": b"bytes"}])
    assert file.read_text() == "before" and list(tmp_path.iterdir()) == [file]


def test_decisions_are_read(tmp_path):
    file = tmp_path / "decisions.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"row": 3, "decision": "flip"}\r\n\n{"row":0,"decision":"keep"}\n')
    assert read_decisions(file, 4) == {3: "flip", 0: "keep"}
    file.write_text('{"row": 1, "decision": "drop"}\n' * 2)
    assert read_decisions(file, 4) == {1: "drop"}
    file.write_text("")
    assert read_decisions(file, 4) == {}


@pytest.mark.parametrize(
    "line, error",
    [
        ('{"row": 4, "decision": "keep"}', "row 4 is none of the 4 rows"),
        ('{"row": -1, "decision": "keep"}', "row -1 is none"),
        ('{"row": 1.0, "decision": "keep"}', "`row` is 1.0"),
        ('{"row": true, "decision": "keep"}', "`row` is True"),
        ('{"row": 1, "decision": "maybe"}', "`decision` of row 1 is 'maybe': it must be 'keep', 'flip' or 'drop'"),
        ('{"row": 1, "decision": ["keep"]}', "`decision` of row 1"),
        (
            '{"row": 0, "decision": "drop"}',
            "row 0 is to be decided with 'drop', and with 'keep' in line 1: remove one",
        ),
        ('{"row": 1}', "a decision is an object"),
        ("[1]", "a decision is an object"),
        ("null", "a decision is an object"),
        ('{"row": 1, "deci', "is not JSON .* is the file cut off"),
        ("[" * 100_000, "is not JSON"),
        ("\xff", "is not UTF-8"),
    ],
)
def test_wrong_decisions_name_their_line(tmp_path, line, error):
    file = tmp_path / "decisions.jsonl"
    file.write_text(f'{{"row": 0, "decision": "keep"}}\n{line}\n', encoding="latin-1")
    with pytest.raises((TypeError, ValueError), match=f"decisions.jsonl, line 2.*{error}"):
        read_decisions(file, 4)


# --- what holds for all rows ---

texts = st.text(max_size=5)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": texts}), min_size=1
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
pairs = st.sampled_from([texts, messages]).flatmap(
    lambda side: st.fixed_dictionaries(
        {"prompt": side, "chosen": side, "rejected": side, "meta": values},
        optional={
            "score_chosen": values,
            "score_rejected": values,
            "margin": st.floats(-5, 5),
            "flipped": st.booleans(),
        },
    )
)
# A column without its partner in any row is refused
WHOLE = {"prompt": "", "chosen": "", "rejected": "", "meta": 0, "score_chosen": 0, "score_rejected": 0}
cases = st.lists(st.tuples(pairs, st.floats(0, 1), st.sampled_from([None, "keep", "flip", "drop"]))).map(
    lambda case: [(WHOLE, 0.0, None), *case]
)


def held(function):
    return settings(derandomize=True, database=None, deadline=None, max_examples=60)(function)


@held
@given(cases, st.sampled_from(["drop", "flip", "soft"]), st.floats(0, 1))
def test_all_rows_are_accounted_for(case, how, threshold):
    rows, p, words = map(list, zip(*case, strict=True))
    decisions = {i: word for i, word in enumerate(words) if word}
    try:
        repaired, summary = repair(rows, p, how, threshold, decisions)
    except ValueError as error:
        assert "leaves none" in str(error)
        return
    assert len(repaired) + summary.dropped == summary.rows == len(rows)
    assert summary.kept + summary.flipped == len(repaired)
    kept = [
        i for i, word in enumerate(words) if (word or ("drop" if how == "drop" and p[i] > threshold else "")) != "drop"
    ]
    assert len(kept) == len(repaired)
    for i, row in zip(kept, repaired, strict=True):
        assert row["meta"] == rows[i]["meta"] and {*row} - {"probability_wrong"} == {
            {"score_chosen": "score_rejected", "score_rejected": "score_chosen"}.get(name, name)
            if is_flipped
            else name
            for is_flipped in [row["chosen"] != rows[i]["chosen"]]
            for name in rows[i]
        }


@held
@given(cases)
def test_a_flip_of_a_flip_is_what_was_before(case):
    rows, p, _ = map(list, zip(*case, strict=True))
    once, summary = repair(rows, p, "flip")
    twice, again = repair(once, p, "flip")
    assert twice == rows and summary == again
