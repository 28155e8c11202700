"""`PRMSFTTrainer`."""

import dataclasses
import logging

import pytest
import torch
from peft import LoraConfig
from torch import nn

from prm_hf.metrics import SequenceEvaluation

from ..tiny import make_model
from .trainer_runs import MASK_KEYS, SENTENCES, count_passes, lora, sft_trainer


pytestmark = pytest.mark.usefixtures("quiet")


def sft_kl(model: nn.Module, ref_model: nn.Module, trainer) -> float:
    """Mean KL over the completion tokens, from whole logits, row by row."""
    total, tokens = 0.0, 0
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
            log_r = ref_model(input_ids=ids).logits.log_softmax(-1)[0, :-1]
        mask = labels[1:] != -100
        total += (log_p.exp() * (log_p - log_r)).sum(-1)[mask].sum().item()
        tokens += mask.sum().item()
    return total / tokens


def test_sft_without_a_reference_measures_the_weights(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = sft_trainer(tmp_path, make_model())
    assert "pass `ref_model`" in caplog.text
    trainer.train()
    assert trainer.last_eval_metrics["eval_drift/params_rel"] > 0
    assert not {"eval_drift/kl", "eval_drift/logratio_abs"} & trainer.last_eval_metrics.keys()
    assert MASK_KEYS <= trainer.state.log_history[0].keys()


def test_sft_with_a_reference(tmp_path):
    trainer = sft_trainer(tmp_path, make_model(), trainer_kwargs={"ref_model": make_model()})
    trainer.train()
    expected = sft_kl(trainer.model.eval(), make_model().eval(), trainer)
    assert trainer.last_eval_metrics["eval_drift/kl"] == pytest.approx(expected, rel=1e-3)
    assert trainer.last_eval_metrics["eval_drift/logratio_abs"] > 0


def test_sft_with_lora_and_named_splits(tmp_path):
    trainer = sft_trainer(
        tmp_path,
        make_model(),
        eval_dataset={"a": SENTENCES, "b": SENTENCES.select(range(5))},
        trainer_kwargs={"peft_config": LoraConfig(r=4, target_modules=["q_proj", "v_proj"])},
    )
    trainer.train()
    metrics = trainer.last_eval_metrics
    assert metrics["eval_a_drift/kl"] > 0 and metrics["eval_b_drift/kl"] > 0 and metrics["eval_drift/params_rel"] > 0
    assert "eval_a_entropy" in metrics and "eval_entropy" not in metrics


@pytest.mark.parametrize("kind", ["full", "ref_model", "lora", "padding_free"])
@pytest.mark.filterwarnings("ignore:.*(padding|packing).*")
def test_sft_evaluation_takes_the_policys_passes_from_trl(tmp_path, kind):
    model = make_model() if kind != "lora" else lora(make_model())
    reference = make_model() if kind == "ref_model" else None
    flat = {"padding_free": True, "max_length": None} if kind == "padding_free" else {}
    trainer = sft_trainer(tmp_path, model, trainer_kwargs={"ref_model": reference}, **flat)
    trainer.train()
    policy = count_passes(model.get_base_model() if kind == "lora" else model)
    of_reference = [] if reference is None else count_passes(reference)
    trainer.evaluate()
    # 14 rows in batches of 4: TRL's passes, with LoRA the reference's; and flattened rows are taken one by one
    assert len(policy) == {"lora": 4 + 4, "padding_free": 4 + 14}.get(kind, 4)
    assert len(of_reference) == (0 if reference is None else 4)
    expected = trainer.evaluate_sequences(trainer.get_eval_dataloader())
    for column in dataclasses.fields(SequenceEvaluation):
        values = [getattr(table, column.name) for table in (trainer.sequence_evaluations["eval"], expected)]
        assert (values[0] is None) == (values[1] is None)
        if values[0] is not None:
            torch.testing.assert_close(*values, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore:.*(padding|packing).*")
def test_sft_with_packing(tmp_path):
    trainer = sft_trainer(
        tmp_path, make_model(), packing=True, max_length=24, trainer_kwargs={"ref_model": make_model()}
    )
    trainer.train()
    assert trainer.last_eval_metrics["eval_drift/kl"] > 0
    assert "eval_drift/logratio_abs" not in trainer.last_eval_metrics


def test_sft_explicit_optimizer_and_wrong_references(tmp_path):
    model = make_model()
    trainer = sft_trainer(
        tmp_path, model, max_steps=1, trainer_kwargs={"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    )
    trainer.train()
    assert type(trainer.innermost_optimizer()) is torch.optim.SGD
    with pytest.raises(ValueError, match="`ref_model` is `model` itself"):
        sft_trainer(tmp_path, model, trainer_kwargs={"ref_model": model})
    with pytest.raises(ValueError, match="`ref_model` only serves `drift_metrics`"):
        sft_trainer(tmp_path, model, drift_metrics=False, trainer_kwargs={"ref_model": make_model()})
