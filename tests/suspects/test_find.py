"""Folds, margins and the files of suspects, with tiny models and any trainer."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from prm_hf import noise
from prm_hf.metrics import ClassEvaluation, PairEvaluation, SequenceEvaluation, evaluate_classes
from prm_hf.suspects import MarginRecorder, Suspects, find_wrong_labels, fold_of_rows, judge_rows, row_margins
from prm_hf.suspects.margins import ROW, with_other_prompts

from ..tiny import make_model, make_tokenizer, preference_dataset


ON_CPU = {"use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}


def test_rows_of_a_group_share_a_fold_and_folds_are_about_as_large():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 40, 300).tolist()
    fold = fold_of_rows(groups, 5, seed=1)
    assert len(fold) == 300 and set(fold.tolist()) == set(range(5))
    assert all(len({f for f, g in zip(fold, groups, strict=True) if g == group}) == 1 for group in set(groups))
    sizes = np.bincount(fold)
    assert sizes.max() - sizes.min() <= max(np.bincount(groups))
    assert (fold == fold_of_rows(groups, 5, seed=1)).all() and (fold != fold_of_rows(groups, 5, seed=2)).any()


@pytest.mark.parametrize(
    "folds, message",
    [
        (1, "`folds` must be an integer of at least 2, got 1."),
        (True, "`folds` must be an integer of at least 2, got True."),
        (4, "`folds` is 4, and the 6 rows have 3 different prompts or groups"),
    ],
)
def test_folds_that_cannot_be(folds, message):
    with pytest.raises(ValueError, match=message):
        fold_of_rows(["a", "b", "c"] * 2, folds)


def test_margins_by_hand():
    tokens = torch.tensor([2, 4])
    chosen = SequenceEvaluation(torch.tensor([-2.0, -4.0]).double(), torch.tensor([3.0, 1.0]).double(), tokens, None)
    rejected = SequenceEvaluation(torch.tensor([-1.0, -1.0]).double(), torch.tensor([1.0, 2.0]).double(), tokens, None)
    assert row_margins(PairEvaluation(chosen, rejected), beta=0.5).tolist() == [1.0, -0.5]
    assert row_margins(chosen).tolist() == [-1.0, -1.0]
    classes = ClassEvaluation(torch.tensor([True]), torch.tensor([0.1]), torch.tensor([2.0]))
    assert row_margins(classes).tolist() == [2.0]


def test_a_completion_is_compared_with_that_of_another_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = completions(6)
    rows = rows.add_column(ROW, list(range(6)))
    both = with_other_prompts(rows)
    assert both.select(range(6)).to_list() == rows.to_list() and len(both) == 12
    for copy in both.select(range(6, 12)):
        row = rows[-1 - copy[ROW]]
        assert copy["completion"] == row["completion"] and copy["prompt"] != row["prompt"]
        assert copy["prompt"] in rows["prompt"][:]
    same = Dataset.from_list([{**row, "prompt": "w1"} for row in rows])
    assert with_other_prompts(same).to_list() == same.to_list()

    trainer = sft_trainer(rows.remove_columns(ROW), both.select([11, 3, 8, 5, 2, 1]))  # the copies of rows 5 and 2
    recorder = MarginRecorder(trainer)
    trainer.add_callback(recorder)
    trainer.train()
    assert recorder.rows == [5, 2]
    alone = MarginRecorder(sft_trainer(rows, both.select([5, 2]).remove_columns(ROW)))
    other = MarginRecorder(sft_trainer(rows, both.select([11, 8]).remove_columns(ROW)))
    for one in (alone, other):
        one.trainer = trainer
        one.on_epoch_end(trainer.args, trainer.state, None)
    expected = np.subtract(alone.epochs[0], other.epochs[0])
    assert recorder.epochs[0] == pytest.approx(expected.tolist(), abs=5e-5)  # each is rounded to six digits


class Logits(torch.nn.Module):
    """Returns its input as logits."""

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return type("Output", (), {"logits": x + self.p})()


def test_the_margin_of_a_class_is_against_the_best_other():
    from accelerate import Accelerator

    x = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [0.0, -1.0, 5.0]])
    rows = [{"x": x[i], "labels": label} for i, label in enumerate([1, 0, 2])]

    def collate(rows):
        return {
            "x": torch.stack([row["x"] for row in rows]),
            "labels": torch.tensor([row["labels"] for row in rows]),
        }

    table = evaluate_classes(Logits(), rows, collate, Accelerator(cpu=True), batch_size=2)
    assert table.margin.tolist() == [1.0, -2.0, 5.0] and table.correct.tolist() == [True, False, True]


def suspects_of(margins, **more):
    rows = [{"chosen": f"{i}", "rejected": "x"} for i in range(margins.shape[1])]
    return judge_rows(rows, "preference", margins, None, **more)


def test_what_is_written_is_what_is_read(tmp_path):
    rng = np.random.default_rng(0)
    margins = rng.normal(0.5, 1.0, (3, 40))
    margins[:, 7] = np.nan
    found = suspects_of(margins, groups=["a", "b"] * 20, folds=np.arange(40) % 5, settings={"folds": 5})
    assert found.ranks[7] == 40 and found.scores[7] is None and found.margins[7] == []
    assert found.probabilities[7] == found.share
    assert sorted(found.ranks) == list(range(1, 41))
    found.save(tmp_path)
    assert Suspects.load(tmp_path) == found == found.decided({})
    lines = [json.loads(line) for line in (tmp_path / "suspects.jsonl").read_text().splitlines()]
    assert [line["rank"] for line in lines] == list(range(1, 41))
    assert all(line["data"] == found.rows[line["row"]] for line in lines)
    judged = [line["probability_wrong"] for line in lines[:-1]]
    assert judged == sorted(judged, reverse=True)
    summary = json.loads((tmp_path / "suspects_summary.json").read_text())
    assert summary["rows"] == 40 and summary["share_low"] <= summary["share_wrong"] <= summary["share_high"]
    assert summary["kind"] == "preference" and summary["how"] == "out of fold"


def test_pairs_of_a_prompt_vote_on_each_others_labels():
    """Out of fold; of completions that two prompts of a group have in common only within a prompt."""
    rng = np.random.default_rng(0)
    wrong = rng.random(120) < 0.2
    sides = [("yes", f"no {i % 4}") for i in range(120)]
    rows = [
        {"prompt": f"p{i // 4}", "chosen": pair[is_wrong], "rejected": pair[not is_wrong]}
        for i, (pair, is_wrong) in enumerate(zip(sides, wrong.tolist(), strict=True))
    ]
    margins = rng.normal(0.3, 1.0, (1, 120)) * np.where(wrong, -1, 1)
    margins[:, 7] = np.nan
    by_prompt = judge_rows(rows, "preference", margins, None, groups=[row["prompt"] for row in rows])
    in_one_group = judge_rows(rows, "preference", margins, None, groups=["all"] * 120)
    alone = judge_rows(rows, "preference", margins, None)

    def found(suspects):
        return np.mean([suspects.ranks[i] <= wrong.sum() for i in np.flatnonzero(wrong)])

    assert min(found(by_prompt), found(in_one_group)) > found(alone) + 0.2
    in_sample = [judge_rows(rows, "preference", None, margins, groups=x).ranks for x in (None, range(120))]
    assert in_sample[0] == in_sample[1]


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no suspects.jsonl: name the folder"):
        Suspects.load(tmp_path)
    suspects_of(np.random.default_rng(0).normal(0.5, 1.0, (1, 20))).save(tmp_path)
    lines = (tmp_path / "suspects.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "suspects.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(ValueError, match="are not whole, or of different runs"):
        Suspects.load(tmp_path)


def test_margins_that_are_not_finite_are_refused():
    margins = np.ones((2, 4))
    margins[1, 2] = np.inf
    with pytest.raises(ValueError, match="A margin is not finite: a model has diverged"):
        suspects_of(margins)


def test_rows_with_every_end_of_a_line_are_read_as_they_were_written(tmp_path):
    """`str.splitlines` knows eleven ends of a line, of which JSON escapes three."""
    ends = [chr(i) for i in range(0x11000) if len(f"a{chr(i)}b".splitlines()) == 2 or 0xD800 <= i < 0xD802]
    assert {"\u2028", "\x85", "\r", "\ud800"} <= {*ends}
    rows = [{"chosen": f"a{end}b", "rejected": end} for end in ends]
    found = judge_rows(rows, "preference", np.linspace(-1, 2, len(rows))[None], None)
    found.save(tmp_path)
    assert Suspects.load(tmp_path) == found
    assert not list(tmp_path.glob("*.part"))


def flipped_pairs(n=400, share=0.3, accuracy=1.2, seed=0):
    """Suspects of pairs of which some are wrong, and which these are."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(n) < share
    margins = np.where(wrong, -1, 1) * rng.normal(accuracy, 1.0, (1, n))
    rows = [{"chosen": f"{i}", "rejected": "x"} for i in range(n)]
    return judge_rows(rows, "preference", margins, margins + 0.5, groups=np.arange(n) // 2), wrong


def test_decisions_by_hand_are_learnt_from(tmp_path):
    found, wrong = flipped_pairs()
    first = sorted(range(400), key=found.ranks.__getitem__)[:100]
    decisions = {i: "flip" if wrong[i] else "keep" for i in first}
    decisions[first[0]] = "drop"
    after = found.decided(decisions)
    said = [i for i in first if decisions[i] != "drop"]
    assert all(after.probabilities[i] == wrong[i] for i in said)
    assert {after.ranks[i] for i in said if wrong[i]} == set(range(1, sum(wrong[said]) + 1))
    assert 0 < after.probabilities[first[0]] < 1  # a row that is left out may have a right label
    others = [i for i in range(400) if i not in decisions]
    assert [after.probabilities[i] for i in others] != [found.probabilities[i] for i in others]
    assert after.share_high - after.share_low < found.share_high - found.share_low
    assert after.share_low <= wrong.mean() <= after.share_high
    after.save(tmp_path)
    assert Suspects.load(tmp_path) == after and after.decided({}) == found
    summary = json.loads((tmp_path / "suspects_summary.json").read_text())
    counts = {word: list(decisions.values()).count(word) for word in ("keep", "flip", "drop")}
    assert summary["decided"] == counts
    lines = [json.loads(line) for line in (tmp_path / "suspects.jsonl").read_text().splitlines()]
    assert {line["row"]: line["decided"] for line in lines if "decided" in line} == decisions


@pytest.mark.parametrize("kind", ["completion", "label", "preference"])
def test_what_cannot_be_learnt_from_is_decided_all_the_same(kind):
    """Margins of completions and of three classes have no other side, and margins in sample know their labels."""
    rng = np.random.default_rng(0)
    margins = rng.normal(1, 1, (2, 30))
    margins[:, 4] = np.nan
    rows = [{"chosen": "c", "rejected": "r", "completion": "c", "label": i % 3} for i in range(30)]
    given = (None, margins) if kind == "preference" else (margins, None)
    before = judge_rows(rows, kind, *given)
    after = before.decided({3: "flip", 4: "keep", 5: "drop"})
    assert (after.probabilities[3], after.probabilities[4], after.ranks[3]) == (1.0, 0.0, 1)
    others = [i for i in range(30) if i not in (3, 4)]
    assert [after.probabilities[i] for i in others] == [before.probabilities[i] for i in others]
    assert (after.share, after.scores[4]) == (before.share, None) and sorted(after.ranks) == list(range(1, 31))


def test_files_of_before_there_were_groups_are_read(tmp_path):
    found, _ = flipped_pairs(20)
    found.save(tmp_path)
    file = tmp_path / "suspects.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({k: v for k, v in line.items() if k != "group"}) + "\n" for line in lines))
    assert Suspects.load(tmp_path) == dataclasses.replace(found, groups=None)


def dpo_trainer(train, rows):
    args = DPOConfig("out", **ON_CPU, num_train_epochs=2, learning_rate=3e-3, per_device_train_batch_size=4)
    return DPOTrainer(
        make_model(),
        make_model(),
        args=args,
        train_dataset=train,
        eval_dataset=rows,
        processing_class=make_tokenizer(),
    )


def sft_trainer(train, rows):
    args = SFTConfig("out", **ON_CPU, num_train_epochs=1, max_length=16, per_device_train_batch_size=4)
    return SFTTrainer(
        make_model(), args=args, train_dataset=train, eval_dataset=rows, processing_class=make_tokenizer()
    )


def completions(n):
    return preference_dataset(n, flipped=False).rename_column("chosen", "completion").remove_columns("rejected")


def test_any_dpo_trainer_with_adamw(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = preference_dataset(24)
    same = rows[3] | {"rejected": rows[3]["chosen"]}
    rows = Dataset.from_list([same if i == 3 else row for i, row in enumerate(rows)])
    trained, recorded = [], []
    record = MarginRecorder.on_epoch_end

    def on_epoch_end(self, *arguments, **more):
        record(self, *arguments, **more)
        if len(self.epochs) == 2:
            recorded.append(np.array(self.epochs))

    monkeypatch.setattr(MarginRecorder, "on_epoch_end", on_epoch_end)

    def make_trainer(train, measured):
        trained.append(train)
        assert len(measured) == 24 and ROW in measured.column_names and ROW not in train.column_names
        return dpo_trainer(train, measured)

    found = noise.find_wrong_labels(make_trainer, rows, folds=3)
    assert len(trained) == 3 and sum(map(len, trained)) == 48
    for row, fold in enumerate(found.folds):  # a row is judged by one model, and trained on by the other two
        assert found.margins[row] == recorded[fold][:, row].tolist()
        seen = [table[:, row] for k, table in enumerate(recorded) if k != fold]
        assert found.in_sample_margins[row] == pytest.approx(np.mean(seen, axis=0).tolist(), abs=1e-9)
    for fold, train in enumerate(trained):
        held_out = {row["prompt"] for row, of in zip(rows, found.folds, strict=True) if of == fold}
        assert not held_out & {*train["prompt"]}
    assert found.kind == "preference" and found.how == "out of fold" and found.rows == rows.to_list()
    assert {len(margins) for margins in found.margins} == {2} == {len(margins) for margins in found.in_sample_margins}
    # TRL keeps the pair of two equal sides, whose margin is 0
    assert found.margins[3] == [0.0, 0.0] and all(0 <= p <= 1 for p in found.probabilities)


def test_a_run_in_sample_of_completions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_wrong_labels(sft_trainer, completions(12), how="in_sample")
    assert found.kind == "completion" and found.how == "in sample" and found.folds is None
    assert found.margins == [[]] * 12 and {len(margins) for margins in found.in_sample_margins} == {1}


def test_classes_of_a_transformers_trainer(tmp_path, monkeypatch):
    """Two words tell the classes apart, and three labels of forty are wrong: they are the first suspects."""
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    wrong = {4, 17, 30}
    rows = [{"input_ids": tokenizer(f"w{i % 2} w{2 + i % 7}")["input_ids"], "label": i % 2} for i in range(40)]
    rows = Dataset.from_list(
        [{**row, "label": 1 - row["label"] if i in wrong else row["label"]} for i, row in enumerate(rows)]
    )
    config = AutoConfig.for_model(
        **make_model().config.to_dict() | {"num_labels": 2, "tie_word_embeddings": False, "pad_token_id": 0}
    )

    def make_trainer(train, measured):
        torch.manual_seed(0)
        args = TrainingArguments("out", **ON_CPU, num_train_epochs=8, learning_rate=1e-2)
        return Trainer(
            AutoModelForSequenceClassification.from_config(config), args, train_dataset=train, eval_dataset=measured
        )

    found = find_wrong_labels(make_trainer, rows, how="out_of_fold", folds=4)
    assert found.kind == "label" and {i for i, rank in enumerate(found.ranks) if rank <= 3} == wrong


def test_the_recorder_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="`eval_dataset` of the trainer must be a `datasets.Dataset`.* it is missing"):
        MarginRecorder(dpo_trainer(preference_dataset(4), None))
    with pytest.raises(TypeError, match="`dataset` must be a `datasets.Dataset`, got list"):
        find_wrong_labels(dpo_trainer, [])
    with pytest.raises(ValueError, match="`groups` is 'topic', and the columns"):
        find_wrong_labels(dpo_trainer, preference_dataset(4), groups="topic")
    with pytest.raises(ValueError, match="`groups` has 2 entries, and `dataset` 4 rows"):
        find_wrong_labels(dpo_trainer, preference_dataset(4), groups=[1, 2])
    with pytest.raises(ValueError, match="`how` must be one of out_of_fold, in_sample, both, got 'all'"):
        find_wrong_labels(dpo_trainer, preference_dataset(4), how="all")
