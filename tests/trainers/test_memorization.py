"""What is learnt by heart: metrics against plain loops, and the callback in trainers of classes, text and pairs."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, List, Value
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from prm_hf import PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer
from prm_hf.metrics import (
    ClassEvaluation,
    PairEvaluation,
    SequenceEvaluation,
    completion_metrics,
    drift_metrics,
    evaluate_classes,
    evaluate_sequences,
    fit_metrics,
    row_fit,
)
from prm_hf.noise import corrupt
from prm_hf.trainers import MemorizationCallback

from ..tiny import make_model, make_tokenizer, preference_dataset


SETTINGS = {
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 5,
    "learning_rate": 1e-2,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant",
    "logging_steps": 1000,
}


class Linear(nn.Module):
    """A classifier of vectors, as small as a Trainer takes it."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def vectors(n=60, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 6)).astype("float32")
    features = Features({"x": List(Value("float32")), "label": ClassLabel(num_classes=4)})
    return Dataset.from_dict({"x": x.tolist(), "label": x[:, :4].argmax(1).tolist()}, features=features)


def sentences(n=24, seed=0):
    data = preference_dataset(n, seed, flipped=False)
    return data.rename_column("chosen", "completion").remove_columns("rejected")


# ---- Metrics ----


def test_row_fit():
    classes = ClassEvaluation(torch.tensor([True, False]), torch.tensor([0.1, 2.0], dtype=torch.float64))
    assert [x.tolist() for x in row_fit(classes)] == [[1.0, 0.0], [0.1, 2.0]]
    tokens, correct = torch.tensor([4, 2, 0]), torch.tensor([1, 2, 0])
    logps = torch.tensor([-4.0, -1.0, 0.0]).double()
    text = SequenceEvaluation(logps, None, tokens, None, correct)
    assert [x.tolist() for x in row_fit(text)] == [[0.25, 1.0, 0.0], [1.0, 0.5, 0.0]]
    # The completion without a token is not known by heart.
    assert completion_metrics(text) == {"exact_match": pytest.approx(1 / 3), "token_accuracy": pytest.approx(1.25 / 3)}
    ratio = torch.tensor([3.0, 0.0, -1.0]).double()
    zero = SequenceEvaluation(ratio, torch.zeros(3).double(), tokens, None)
    fit, loss = row_fit(PairEvaluation(SequenceEvaluation(ratio, ratio, tokens, None), zero), beta=0.5)
    assert fit.tolist() == [1.0, 0.5, 0.0]
    assert loss.tolist() == pytest.approx([math.log1p(math.exp(-m)) for m in (1.5, 0.0, -0.5)])
    with pytest.raises(ValueError, match="without a reference"):
        drift_metrics(text)


def test_fit_metrics():
    train = torch.tensor([1.0, 0.0, 1.0, 0.5]), torch.tensor([0.0, 1.0, 2.0, 3.0])
    heldout = torch.tensor([0.5]), torch.tensor([4.0])
    assert fit_metrics(train, [True, True, False, False], heldout) == {
        "memorization/corrupted_fit": 0.5,
        "memorization/corrupted_loss": 0.5,
        "memorization/clean_fit": 0.75,
        "memorization/clean_loss": 2.5,
        "memorization/train_fit": 0.625,
        "memorization/heldout_fit": 0.5,
        "memorization/heldout_loss": 4.0,
        "memorization/gap": 0.125,
    }
    assert "memorization/corrupted_fit" not in fit_metrics(train, [False] * 4)
    with pytest.raises(ValueError, match=r"each of the 4 rows, got shape \(3,\)"):
        fit_metrics(train, [False] * 3)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_classes_equal_a_plain_loop(batch_size):
    model, data = Linear(), vectors(20)
    logits = model(torch.tensor(data["x"][:])).logits
    labels = torch.tensor(data["label"][:])

    def collate(rows):
        return {"x": torch.tensor([row["x"] for row in rows]), "labels": torch.tensor([row["label"] for row in rows])}

    model.train()
    table = evaluate_classes(model, data, collate, Accelerator(cpu=True), batch_size=batch_size)
    assert model.training and len(table) == 20
    assert table.correct.tolist() == (logits.argmax(-1) == labels).tolist()
    expected = nn.functional.cross_entropy(logits, labels, reduction="none").double()
    torch.testing.assert_close(table.loss, expected.detach(), rtol=1e-5, atol=1e-6)


def test_tokens_that_greedy_decoding_gives_are_correct():
    torch.manual_seed(0)  # of rows in which the model would not end before the completion does
    model = make_model(initializer_range=1.0).eval()
    rows = [{"input_ids": torch.randint(3, 43, (9,)).tolist()} for _ in range(6)]
    for row in rows[:3]:  # completions that are the model's own
        prompt = torch.tensor([row["input_ids"][:4]])
        decoded = model.generate(prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
        row["input_ids"] = decoded[0].tolist()

    def collate(examples):
        ids = torch.tensor([row["input_ids"] for row in examples])
        labels = ids.clone()
        labels[:, :4] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    table = evaluate_sequences(model, rows, collate, Accelerator(cpu=True), batch_size=4)
    assert table.logratio is None and table.kl is None and table.tokens.tolist() == [5] * 6
    with torch.no_grad():
        batch = collate(rows)
        logits = model(input_ids=batch["input_ids"]).logits[:, 3:-1]
    assert table.correct.tolist() == (logits.argmax(-1) == batch["input_ids"][:, 4:]).sum(-1).tolist()
    assert completion_metrics(table)["exact_match"] >= 0.5 and table.correct[:3].tolist() == [5] * 3


# ---- The callback ----


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_classifier_learns_random_labels_and_nothing_else(tmp_path):
    train = corrupt(vectors(), "partial_labels", 0.5)
    args = TrainingArguments(str(tmp_path), num_train_epochs=60, eval_strategy="steps", eval_steps=120, **SETTINGS)
    torch.manual_seed(0)
    trainer = Trainer(Linear(), args, train_dataset=train, eval_dataset=vectors(40, seed=1))
    trainer.add_callback(MemorizationCallback(trainer))
    trainer.train()
    fits = logged(trainer, "eval_memorization/corrupted_fit")
    assert len(fits) == 4 and fits[-1] == 1.0
    assert trainer.evaluate()["eval_memorization/corrupted_fit"] == 1.0
    model, callback = trainer.model, MemorizationCallback(trainer)
    right = model(torch.tensor(train["x"][:])).logits.argmax(-1) == torch.tensor(train["label"][:])
    mask = torch.tensor(train["corrupted"][:])
    measured = callback.measure()
    assert measured["memorization/corrupted_fit"] == pytest.approx(right[mask].double().mean().item())
    assert measured["memorization/clean_fit"] == pytest.approx(right[~mask].double().mean().item())
    heldout = vectors(40, seed=1)
    right = model(torch.tensor(heldout["x"][:])).logits.argmax(-1) == torch.tensor(heldout["label"][:])
    assert measured["memorization/heldout_fit"] == pytest.approx(right.double().mean().item())
    train_fit = measured["memorization/train_fit"]
    assert measured["memorization/gap"] == pytest.approx(train_fit - measured["memorization/heldout_fit"])


def test_it_changes_nothing_in_training(tmp_path):
    weights = []
    for with_callback in (False, True):
        args = TrainingArguments(str(tmp_path), max_steps=6, eval_strategy="steps", eval_steps=2, **SETTINGS)
        torch.manual_seed(0)
        trainer = Trainer(Linear(), args, train_dataset=corrupt(vectors(), "random_labels"), eval_dataset=vectors(9))
        if with_callback:
            trainer.add_callback(MemorizationCallback(trainer))
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.parametrize(("trainer_class", "config"), [(SFTTrainer, SFTConfig), (PRMSFTTrainer, PRMSFTConfig)])
def test_sft(trainer_class, config, tmp_path):
    train = corrupt(sentences(), "partial_labels", 0.5, seed=3)
    args = config(str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, **SETTINGS)
    trainer = trainer_class(
        make_model(), args, train_dataset=train, eval_dataset=sentences(7, 1), processing_class=make_tokenizer()
    )
    callback = MemorizationCallback(trainer, memorization_max_rows=11)
    trainer.add_callback(callback)
    trainer.train()
    assert len(logged(trainer, "eval_memorization/corrupted_fit")) == 2
    measured = callback.measure()
    model, fits, losses = trainer.model.eval(), [], []
    for row in trainer.train_dataset.select(callback.rows):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        mask = labels != -100
        fits.append((log_p.argmax(-1) == labels)[mask].double().mean().item())
        losses.append(-log_p[mask].gather(-1, labels[mask, None]).mean().item())
    flags = np.array([train["corrupted"][i] for i in callback.rows])
    assert measured["memorization/corrupted_fit"] == pytest.approx(np.mean(np.array(fits)[flags]))
    assert measured["memorization/clean_loss"] == pytest.approx(np.mean(np.array(losses)[~flags]), rel=1e-4)
    pairs = [(a > b) + (a == b) / 2 for a in np.array(losses)[flags] for b in np.array(losses)[~flags]]
    assert measured["suspects/auc"] == pytest.approx(np.mean(pairs))
    if trainer_class is PRMSFTTrainer:
        metrics = trainer.last_eval_metrics
        assert metrics["eval_memorization/heldout_fit"] == pytest.approx(metrics["eval_token_accuracy"])
        assert 0 <= metrics["eval_exact_match"] <= metrics["eval_token_accuracy"]


def test_dpo(tmp_path):
    train = corrupt(preference_dataset(20, flipped=False), "partial_labels", 0.5)
    args = DPOConfig(str(tmp_path), num_train_epochs=12, eval_strategy="epoch", **SETTINGS)
    trainer = DPOTrainer(
        make_model(),
        make_model(),
        args,
        train_dataset=train,
        eval_dataset=preference_dataset(6, 1, flipped=False),
        processing_class=make_tokenizer(),
    )
    trainer.add_callback(MemorizationCallback(trainer))
    trainer.train()
    fits = logged(trainer, "eval_memorization/corrupted_fit")
    assert len(fits) == 12 and fits[-1] == 1.0
    assert logged(trainer, "eval_memorization/clean_fit")[-1] == 1.0


def test_several_splits_are_one_evaluation(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=4, eval_strategy="steps", eval_steps=2, **SETTINGS)
    splits = {"a": vectors(9), "b": vectors(8)}
    trainer = Trainer(Linear(), args, train_dataset=corrupt(vectors(), "random_labels"), eval_dataset=splits)
    trainer.add_callback(MemorizationCallback(trainer, eval_dataset=splits["b"]))
    trainer.train()
    assert len(logged(trainer, "eval_memorization/gap")) == 2
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_memorization/corrupted_fit"} <= metrics.keys()


def test_wrong_trainers_are_refused(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, **SETTINGS)
    stream = Trainer(Linear(), args, train_dataset=vectors().to_iterable_dataset())
    with pytest.raises(TypeError, match="must be a `datasets.Dataset`"):
        MemorizationCallback(stream)
    trainer = Trainer(Linear(), args, train_dataset=vectors(4).add_column("corrupted", [0, 1, 0, 1]))
    with pytest.raises(ValueError, match="'corrupted' of `train_dataset` must be bool"):
        MemorizationCallback(trainer)
    with pytest.raises(ValueError, match="`memorization_max_rows` must be at least 1"):
        MemorizationCallback(trainer, memorization_max_rows=0)
    with pytest.warns(DeprecationWarning, match="`max_rows` is now `memorization_max_rows`"):
        assert MemorizationCallback(Trainer(Linear(), args, train_dataset=vectors(4)), max_rows=2).rows == [0, 2]


def test_other_tasks_are_refused_before_training(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, **SETTINGS)
    numbers = vectors(6).cast_column("label", Value("float32"))
    trainer = Trainer(Linear(), args, train_dataset=numbers)
    trainer.add_callback(MemorizationCallback(trainer))
    with pytest.raises(ValueError, match=r"the `labels` of this trainer are torch.float32 of shape \(1,\)"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    "packing, message",
    [
        ({"packing": True}, "`packing=True` puts several examples into a row and drops the columns"),
        ({"packing": True, "packing_strategy": "wrapped"}, "`packing=True`"),
        ({"eval_packing": True}, "`eval_packing=True` puts several held-out examples into a row"),
    ],
)
@pytest.mark.parametrize(("trainer_class", "config"), [(SFTTrainer, SFTConfig), (PRMSFTTrainer, PRMSFTConfig)])
def test_packed_rows_are_refused(trainer_class, config, packing, message, tmp_path):
    """Their noise column is lost, and half noise would be reported as a clean fit."""
    train = corrupt(sentences(), "partial_labels", 0.5)
    args = config(str(tmp_path), max_length=32, **packing, **SETTINGS)
    trainer = trainer_class(
        make_model(), args, train_dataset=train, eval_dataset=sentences(7, 1), processing_class=make_tokenizer()
    )
    with pytest.raises(ValueError, match=message):
        MemorizationCallback(trainer)
    if "eval_packing" in packing:  # held-out rows of one's own are not packed
        assert MemorizationCallback(trainer, eval_dataset=trainer.train_dataset).corrupted.any()


def test_a_reference_that_moves_is_refused(tmp_path):
    args = DPOConfig(str(tmp_path), sync_ref_model=True, **SETTINGS)
    train = preference_dataset(6)
    trainer = DPOTrainer(make_model(), make_model(), args, train_dataset=train, processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="`sync_ref_model=True` moves the reference that the fit"):
        MemorizationCallback(trainer)


def test_a_flag_for_every_row_is_needed(tmp_path):
    args = TrainingArguments(str(tmp_path), max_steps=1, **SETTINGS)
    trainer = Trainer(Linear(), args, train_dataset=vectors(3).add_column("corrupted", [True, None, False]))
    with pytest.raises(ValueError, match="'corrupted' of `train_dataset` is empty in some rows"):
        MemorizationCallback(trainer)


def test_both_ways_of_measuring_pairs_agree(tmp_path):
    """The callback, and what `PRMDPOTrainer` does by itself."""
    trainer = PRMDPOTrainer(
        make_model(),
        make_model(),
        PRMDPOConfig(str(tmp_path), max_steps=3, memorization_max_rows=None, **SETTINGS),
        train_dataset=preference_dataset(20),
        eval_dataset=preference_dataset(6, 1, flipped=False),
        processing_class=make_tokenizer(),
    )
    trainer.add_callback(MemorizationCallback(trainer, memorization_max_rows=None))
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_memorization/flipped_fit"] == metrics["eval_memorization/corrupted_fit"]
    (own,) = {log["eval_memorization/clean_fit"] for log in trainer.state.log_history[-2:]}
    assert own == metrics["eval_memorization/clean_fit"] and 0 < own <= 1
