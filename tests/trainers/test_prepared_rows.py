"""Prepared rows: those that say nothing are left out, and log-probabilities of another reference are refused."""

import copy

import pytest
import torch
from datasets import Dataset, concatenate_datasets
from peft import LoraConfig

from prm_hf.noise import flip_preferences
from prm_hf.trainers import PRMDPOTrainer
from prm_hf.trainers.prepared import FINGERPRINT, REFERENCE

from ..tiny import WORDS, make_model
from .trainer_runs import HELDOUT, TRAIN, dpo_trainer, sft_trainer, weights


pytestmark = pytest.mark.usefixtures("quiet")


# ---- Rows that say nothing ----


def pairs_of(*rows: tuple[int, str, str]) -> Dataset:
    """Pairs with prompts of so many words."""
    return Dataset.from_list(
        [
            {"prompt": " ".join(["w1"] * n), "chosen": f" {chosen} ", "rejected": f" {rejected} "}
            for n, chosen, rejected in rows
        ]
    )


LONG = pairs_of(
    (2, "w1 w2", "w3 w4"),
    (9, "w1", "w2"),  # the prompt fills 8 tokens
    (5, "w1 w2 w3 w4", "w1 w2 w3 w5"),  # they differ in the ninth token
    (3, "w6", "w6"),
    (2, "w1", "w2"),
)


def left_out(caplog) -> list[str]:
    return [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]


@pytest.mark.parametrize("are_prepared", [False, True])
def test_pairs_that_say_nothing_are_left_out_and_counted(tmp_path, caplog, are_prepared):
    rows = LONG
    if are_prepared:
        rows = prepared(tmp_path, LONG)
        caplog.clear()
    trainer = dpo_trainer(tmp_path, train=rows, eval_dataset=rows, max_length=8)
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 2
    messages = left_out(caplog)
    assert len(messages) == 2
    for name, message in zip(("train", "eval"), messages, strict=True):
        assert f"3 of the 5 pairs of '{name}' are left out: 1 whose prompt alone fills `max_length=8`" in message
        assert "2 whose two sides are equal" in message
    assert len(trainer.evaluate_pairs(rows)) == 2


def prepared(tmp_path, rows: Dataset) -> Dataset:
    """All rows tokenized, also those that a trainer would leave out."""
    trainer = dpo_trainer(tmp_path)
    return super(PRMDPOTrainer, trainer)._prepare_dataset(rows, trainer.processing_class, trainer.args, "train")


def test_what_is_kept_of_the_end_counts_where_the_end_is_kept(tmp_path, caplog):
    trainer = dpo_trainer(tmp_path, train=LONG, max_length=8, truncation_mode="keep_end")
    assert len(trainer.train_dataset) == 4 and "1 of the 5 pairs" in left_out(caplog)[0]


def test_a_pair_without_a_signal_leaves_training_as_it_was(tmp_path):
    """Its gradient is 0, and so it would only make the steps of the others smaller."""
    runs = [dpo_trainer(tmp_path, train=LONG.select(rows), max_length=8) for rows in ([0, 4], range(5))]
    for trainer in runs:
        trainer.train()
    assert torch.equal(*(weights(trainer.model) for trainer in runs))


def test_a_stream_leaves_them_out_too(tmp_path, caplog):
    trainer = dpo_trainer(tmp_path, train=LONG.to_iterable_dataset(), max_length=8)
    assert len(list(trainer.train_dataset)) == 2


def test_no_row_left_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="1 of the 1 pairs of 'train' are left out.*None is left: raise `max_length`"):
        dpo_trainer(tmp_path, train=LONG.select([1]), max_length=8)
    with pytest.raises(ValueError, match="'eval' has no rows"):
        dpo_trainer(tmp_path, eval_dataset=HELDOUT.select([]))


def test_sft_counts_the_rows_that_vanish(tmp_path, caplog):
    rows = Dataset.from_list([{"prompt": " ".join(WORDS[:n]), "completion": " w1 "} for n in (2, 9, 10, 3)])
    trainer = sft_trainer(tmp_path, make_model(), train=rows, eval_dataset=rows, max_length=8)
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == 2
    messages = left_out(caplog)
    assert ["'train'" in messages[0], "'eval'" in messages[1], len(messages)] == [True, True, 2]
    assert all("2 of the 4 rows" in message and "`max_length=8`" in message for message in messages)
    with pytest.raises(ValueError, match="None is left"):
        sft_trainer(tmp_path, make_model(), train=rows.select([1]), max_length=8)


# ---- Tokens of another tokenizer ----


def test_tokens_must_be_those_of_the_texts(tmp_path):
    rows = dpo_trainer(tmp_path).train_dataset
    ids = {
        name: [[token + 1 for token in row] for row in rows[name]]
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }
    others = rows.remove_columns(list(ids))
    for name, values in ids.items():
        others = others.add_column(name, values)
    with pytest.raises(ValueError, match="tokenized with another tokenizer or chat template"):
        dpo_trainer(tmp_path, train=others)
    dpo_trainer(tmp_path, train=rows.remove_columns(["prompt", "chosen", "rejected"]))  # nothing to compare with


# ---- Whose log-probabilities the rows carry ----


@pytest.fixture(scope="module")
def rows_with_reference(tmp_path_factory):
    trainer = dpo_trainer(tmp_path_factory.mktemp("rows"), eval_dataset=HELDOUT, precompute_ref_log_probs=True)
    return trainer.train_dataset, trainer.eval_dataset


def with_rows(tmp_path, rows, *, model=None, **kwargs) -> PRMDPOTrainer:
    model = model or make_model()
    return dpo_trainer(
        tmp_path, model=model, ref_model=copy.deepcopy(model), train=rows[0], eval_dataset=rows[1], **kwargs
    )


def test_the_right_reference_is_taken(tmp_path, rows_with_reference):
    trainer = with_rows(tmp_path, rows_with_reference)
    assert trainer.precompute_ref_logps
    assert trainer.evaluate()["eval_loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    flipped = flip_preferences(rows_with_reference[0].remove_columns("flipped"), 0.5)
    assert with_rows(tmp_path, (flipped, rows_with_reference[1])).precompute_ref_logps
    # The model without its new adapter is the same reference
    peft = {"trainer_kwargs": {"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])}}
    train, heldout = rows_with_reference
    assert dpo_trainer(tmp_path, model=make_model(), train=train, eval_dataset=heldout, **peft).precompute_ref_logps
    with pytest.raises(ValueError, match="another reference model"):
        dpo_trainer(tmp_path, model=make_model(1), train=train, eval_dataset=heldout, **peft)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"model": 1}, "made with another reference model"),
        ({"max_length": 20}, r"made with `max_length=1024` \(this run has `max_length=20`\)"),
        ({"truncation_mode": "keep_end"}, "made with `truncation_mode='keep_start'`"),
        ({"ld_alpha": 0.5, "drift_metrics": False}, "made with `ld_alpha=None`"),
        ({"bf16": True}, "made with `precision='no'`"),
        ({"model": 1, "max_length": 20}, "another reference model, `max_length=1024`"),
    ],
)
@pytest.mark.parametrize("precompute", [False, True])
def test_another_reference_is_refused(tmp_path, rows_with_reference, kwargs, message, precompute):
    kwargs = {**kwargs, "model": make_model(kwargs.get("model", 0))}
    with pytest.raises(ValueError, match=f"{message}.*Remove the columns with `dataset.remove_columns"):
        with_rows(tmp_path, rows_with_reference, precompute_ref_log_probs=precompute, **kwargs)


def test_one_changed_number_of_the_weights_is_another_reference(tmp_path, rows_with_reference):
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-6
    with pytest.raises(ValueError, match="another reference model"):
        with_rows(tmp_path, rows_with_reference, model=model)


def test_rows_without_a_fingerprint_are_computed_again(tmp_path, rows_with_reference):
    bare = [rows.remove_columns(FINGERPRINT) for rows in rows_with_reference]
    with_rows(tmp_path, bare)
    with pytest.raises(ValueError, match="'train' are stale: a row has `ref_chosen_logps` .* the reference gives"):
        with_rows(tmp_path, bare, model=make_model(1))
    with pytest.raises(ValueError, match="'train' are stale"):  # cut to other tokens
        with_rows(tmp_path, bare, max_length=7)
    changed = bare[1].map(lambda row: {REFERENCE[1]: row[REFERENCE[1]] - 1})
    with pytest.raises(ValueError, match="'eval' are stale: a row has `ref_rejected_logps`"):
        with_rows(tmp_path, (bare[0], changed))
    # Also where they still claim to be right
    with pytest.raises(ValueError, match="'eval' are stale"):
        with_rows(
            tmp_path, (rows_with_reference[0], changed.add_column(FINGERPRINT, rows_with_reference[1][FINGERPRINT][:]))
        )


def test_rows_of_two_references_are_refused(tmp_path, rows_with_reference):
    other = with_reference(tmp_path, make_model(1), HELDOUT)
    mixed = concatenate_datasets([rows_with_reference[1], other])
    with pytest.raises(ValueError, match="'eval' were made with another reference model"):
        with_rows(tmp_path, (rows_with_reference[0], mixed))


def with_reference(tmp_path, model, rows):
    return dpo_trainer(
        tmp_path, model=model, ref_model=copy.deepcopy(model), train=rows, precompute_ref_log_probs=True
    ).train_dataset


def test_the_cache_has_the_truncation_in_its_key(tmp_path):
    """Of rows on a disk, which TRL's cache finds again."""
    TRAIN.save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")
    # Their tokens are the same whatever is cut off later
    trainer = dpo_trainer(tmp_path, train=rows, max_length=30, truncation_mode="keep_end")
    tokens = trainer.train_dataset
    logps = {}
    for max_length in (30, 6):
        made = dpo_trainer(
            tmp_path, train=tokens, max_length=max_length, truncation_mode="keep_end", precompute_ref_log_probs=True
        ).train_dataset
        logps[max_length] = made[REFERENCE[0]][:]
    assert len(logps[30]) == len(logps[6]) and logps[30] != logps[6]


def test_rows_that_cannot_be_checked_are_refused(tmp_path, rows_with_reference):
    """After training without a reference, the policy is none."""
    trainer = dpo_trainer(
        tmp_path, model=make_model(), train=TRAIN, eval_dataset=HELDOUT, precompute_ref_log_probs=True
    )
    assert trainer.ref_model is None
    trainer.train()
    assert len(trainer.evaluate_pairs(rows_with_reference[1])) == 7
    with pytest.raises(ValueError, match="can't be checked, since no reference is kept"):
        trainer.evaluate_pairs(rows_with_reference[1].remove_columns(FINGERPRINT))
    with pytest.raises(ValueError, match="another reference model"):
        trainer.evaluate_pairs(with_reference(tmp_path, make_model(1), HELDOUT))
