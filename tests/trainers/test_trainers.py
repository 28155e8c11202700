"""What TRL lets one do with a trainer, in those of this package."""

import copy
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from trl import DPOTrainer

from prm_hf.metrics import evaluate_pairs
from prm_hf.noise import flip_preferences
from prm_hf.trainers import PRMDPOConfig, PRMDPOTrainer

from ..distributed.launch import kill_with_children
from ..tiny import make_model, make_tokenizer
from .trainer_runs import (
    HELDOUT,
    OTHER,
    TRAIN,
    dpo_trainer,
    evaluations,
    expected_pair_metrics,
    lora,
    settings,
    sft_trainer,
    weights,
)


pytestmark = pytest.mark.usefixtures("quiet")


# ---- What TRL's trainer can do ----


def test_precomputed_reference(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = PRMDPOTrainer(
            make_model(),
            args=PRMDPOConfig(**settings(tmp_path, precompute_ref_log_probs=True)),
            train_dataset=TRAIN,
            eval_dataset=HELDOUT,
            processing_class=make_tokenizer(),
        )
    assert caplog.text.count("`drift/kl` is not measured") == 1 and "precompute_ref_log_probs=False" in caplog.text
    trainer.train()
    usual = dpo_trainer(tmp_path, eval_dataset=HELDOUT)
    usual.train()
    torch.testing.assert_close(weights(trainer.model), weights(usual.model), rtol=1e-4, atol=1e-6)
    assert "eval_drift/kl" not in trainer.last_eval_metrics
    names = {key for key in usual.last_eval_metrics if "drift/" in key or "memorization/" in key or "rewards/" in key}
    assert len(names) == 4 + 5 + 2
    for key in names - {"eval_drift/kl"}:
        assert trainer.last_eval_metrics[key] == pytest.approx(usual.last_eval_metrics[key], rel=1e-3, abs=1e-6)


def test_rows_with_a_reference_are_taken_as_they_are(tmp_path, monkeypatch):
    """Rows that another trainer prepared spare tokenizing and the reference in training, and nothing else changes."""
    first = dpo_trainer(tmp_path, eval_dataset=HELDOUT, precompute_ref_log_probs=True)
    train, heldout = first.train_dataset, first.eval_dataset
    usual = dpo_trainer(tmp_path, eval_dataset=HELDOUT)
    usual.train()

    prepare, tokenized = DPOTrainer._prepare_dataset, []
    monkeypatch.setattr(
        DPOTrainer,
        "_prepare_dataset",
        lambda self, rows, *args: tokenized.append(len(rows)) or prepare(self, rows, *args),
    )
    ref_model, calls = make_model(), []
    ref_model.model.register_forward_pre_hook(
        lambda module, args: calls.append(trainer is not None and trainer.model.training)
    )
    trainer = None  # which the reference has no part in while it is made, but for a few rows that are checked
    trainer = dpo_trainer(tmp_path, model=make_model(), ref_model=ref_model, train=train, eval_dataset=heldout)
    trainer.train()
    assert tokenized == [4, 4]  # of each dataset, a few rows to compare with
    assert calls and not any(calls)  # in evaluation alone, for the KL
    torch.testing.assert_close(weights(trainer.model), weights(usual.model), rtol=1e-4, atol=1e-6)
    for key, value in usual.last_eval_metrics.items():
        if "drift/" in key or "memorization/" in key or "rewards/" in key:
            assert trainer.last_eval_metrics[key] == pytest.approx(value, rel=1e-3, abs=1e-6)

    monkeypatch.undo()
    expected = usual.evaluate(OTHER)["eval_drift/kl"]
    assert trainer.evaluate(OTHER)["eval_drift/kl"] == pytest.approx(expected, rel=1e-3)
    # Where one of the datasets comes without, the reference is run as usual
    mixed = dpo_trainer(tmp_path, train=train, eval_dataset=HELDOUT)
    assert not mixed.precompute_ref_logps and mixed.evaluate()["eval_drift/kl"] == 0


def test_flipping_takes_the_reference_along(tmp_path):
    rows = dpo_trainer(tmp_path, train=TRAIN.remove_columns("flipped"), precompute_ref_log_probs=True).train_dataset
    flipped = flip_preferences(rows, 0.5)
    expected = dpo_trainer(
        tmp_path, train=flip_preferences(TRAIN.remove_columns("flipped"), 0.5), precompute_ref_log_probs=True
    ).train_dataset
    assert any(flipped["flipped"])
    for name in ("chosen_ids", "rejected_ids", "flipped"):
        assert flipped[name][:] == expected[name][:]
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert flipped[name][:] == pytest.approx(expected[name][:], rel=1e-5)


@pytest.mark.parametrize("precompute", [False, True])
def test_mixed_precision_starts_at_drift_zero(tmp_path, precompute):
    """Log-probabilities that TRL precomputed from bf16 logits must meet the policy's from bf16 logits."""
    model = make_model(hidden_size=64, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    trainer = PRMDPOTrainer(
        copy.deepcopy(model),
        model,
        PRMDPOConfig(**settings(tmp_path, bf16=True, precompute_ref_log_probs=precompute)),
        train_dataset=TRAIN,
        eval_dataset=HELDOUT,
        processing_class=make_tokenizer(),
    )
    if precompute:
        trainer.ref_model = None  # as for a model that TRL loads by name
    assert trainer.evaluate()["eval_drift/logratio_abs"] < 1e-5


@pytest.mark.parametrize("task", ["dpo", "sft"])
def test_the_reference_has_the_kernels_of_the_model(tmp_path, monkeypatch, task):
    """Liger's, which transformers gives to the model when training begins; a GPU is needed to run them."""
    patched = []
    for module in ("transformers.trainer", "prm_hf.trainers.evaluation"):
        monkeypatch.setattr(f"{module}.apply_liger_kernel", lambda model, config: patched.append((model, config)))
    model, ref_model = make_model(), make_model()
    settings = {"use_liger_kernel": True, "liger_kernel_config": {"rope": False}, "max_steps": 1}
    if task == "dpo":
        trainer = dpo_trainer(tmp_path, model=model, ref_model=ref_model, eval_dataset=HELDOUT, **settings)
    else:
        trainer = sft_trainer(tmp_path, model, trainer_kwargs={"ref_model": ref_model}, **settings)
    trainer.evaluate()
    assert not patched
    trainer.train()
    assert {id(patient) for patient, _ in patched} == {id(model), id(ref_model)}
    assert all(config == patched[0][1] and config["rope"] is False for _, config in patched)


@pytest.mark.parametrize("loss", [["ipo"], ["robust"], ["sigmoid", "sft"]], ids="-".join)
def test_losses(tmp_path, loss):
    smoothing = {"label_smoothing": 0.3} if loss == ["robust"] else {}
    trainer = dpo_trainer(tmp_path, eval_dataset=HELDOUT, loss_type=loss, **smoothing)
    trainer.train()
    assert trainer.last_eval_metrics["eval_drift/kl"] > 0


@pytest.mark.parametrize("precompute", [False, True])
def test_lora(tmp_path, precompute):
    base = make_model()
    trainer = PRMDPOTrainer(
        copy.deepcopy(base),
        args=PRMDPOConfig(
            **settings(tmp_path, precompute_ref_log_probs=precompute, eval_strategy="steps", eval_steps=1)
        ),
        train_dataset=TRAIN,
        eval_dataset=HELDOUT,
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
    )
    trainer.train()
    drifts = [log["eval_drift/params_rel"] for log in evaluations(trainer)]
    assert drifts[0] < drifts[1] < drifts[2]  # training goes on after an evaluation with the adapter off
    assert trainer.last_eval_metrics["eval_drift/kl"] > 0
    expected = evaluate_pairs(
        trainer.model, trainer.eval_dataset, trainer.data_collator, trainer.accelerator, ref_model=base
    )
    assert torch.allclose(trainer.pair_evaluations["eval"].chosen.kl, expected.chosen.kl, atol=1e-6)
    prm_params = {id(p) for group in trainer.find_prm().param_groups for p in group["params"]}
    assert prm_params == {id(p) for n, p in trainer.model.named_parameters() if "lora_" in n}


def test_a_continued_adapter_drifts_from_where_it_was(tmp_path):
    model = lora(make_model())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
    trainer = dpo_trainer(tmp_path, model=model, eval_dataset=HELDOUT)
    before = trainer.evaluate()
    assert before["eval_drift/kl"] == 0 and before["eval_drift/params_rel"] == 0
    trainer.train()
    assert trainer.last_eval_metrics["eval_drift/kl"] > 0 and trainer.last_eval_metrics["eval_drift/params_rel"] > 0


@pytest.mark.parametrize("options", [{}, {"precompute_ref_log_probs": True}, {"padding_free": True}])
def test_a_frozen_half_of_an_adapter_is_not_trained(tmp_path, options):
    """PEFT lets each adapter train that it switches on again, as after a pass of the reference."""
    model = lora(make_model())
    frozen = {
        name: p.requires_grad_(False).detach().clone() for name, p in model.named_parameters() if "lora_A" in name
    }
    trainer = dpo_trainer(tmp_path, model=model, eval_dataset=HELDOUT, **options)
    trainer.train()
    trained = dict(trainer.model.named_parameters())
    assert all(torch.equal(trained[name], value) and not trained[name].requires_grad for name, value in frozen.items())
    assert any(p.requires_grad for p in trained.values())


def test_streams(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = dpo_trainer(
            tmp_path, train=TRAIN.to_iterable_dataset(), eval_dataset=HELDOUT.to_iterable_dataset(), max_steps=2
        )
    assert "Memorization is not measured: `train_dataset` must be a `datasets.Dataset`" in caplog.text
    trainer.train()
    for key, value in expected_pair_metrics(trainer, HELDOUT).items():
        assert trainer.last_eval_metrics[f"eval_{key}"] == pytest.approx(value, rel=1e-6)


def test_compute_metrics_sees_each_split(tmp_path):
    rows = []

    def compute_metrics(prediction):
        rows.append(len(prediction.label_ids))
        return {"rows": len(prediction.label_ids)}

    trainer = dpo_trainer(
        tmp_path, eval_dataset={"a": HELDOUT, "b": OTHER}, trainer_kwargs={"compute_metrics": compute_metrics}
    )
    metrics = trainer.evaluate()
    assert [metrics["eval_a_rows"], metrics["eval_b_rows"]] == rows
    assert metrics["eval_a_drift/kl"] == 0 and "eval_b_rewards/margins" in metrics


def test_gradient_accumulation_and_clipping_see_prm(tmp_path):
    trainer = dpo_trainer(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_grad_norm=0.1)
    trainer.train()
    steps = {int(state["step"]) for state in trainer.find_prm().state.values()}
    assert steps == {3}


def test_resuming_equals_not_stopping(tmp_path):
    kwargs = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_dataset": HELDOUT}
    kwargs["per_device_train_batch_size"] = 2  # 7 steps an epoch
    whole = dpo_trainer(tmp_path / "whole", **kwargs)
    whole.train()
    for step in (2, 4):  # at its last step, inside an epoch, no other one is made
        resumed = dpo_trainer(tmp_path / "whole", **kwargs)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert torch.equal(weights(resumed.model), weights(whole.model)) and resumed.state.global_step == 4
        # Drift counts from the beginning of training, not from the checkpoint
        key = "eval_drift/params_rel"
        assert resumed.last_eval_metrics[key] == pytest.approx(whole.last_eval_metrics[key], rel=1e-6)


# ---- Several processes ----


@pytest.mark.slow
def test_two_processes_measure_what_one_does(tmp_path):
    """7, 5 and 14 rows on two processes in batches of 2: no count is even, and each row must count once."""
    log = tmp_path / "log"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += [
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "tests.trainers.launched_dpo",
        str(tmp_path),
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    with log.open("w") as stream:
        run = subprocess.Popen(
            command, cwd=Path(__file__).parents[2], env=env, stdout=stream, stderr=subprocess.STDOUT
        )
        try:
            code = run.wait(timeout=300)
        except subprocess.TimeoutExpired:
            code = "a timeout"
            kill_with_children(run)
    assert code == 0, f"exit with {code}:\n{log.read_text()[-5000:]}"

    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    assert [result["world_size"] for result in results] == [2, 2]
    # Of the splits TRL's own, where the seventh row is a step that both processes make, and those of the train rows
    assert [result["passes"] for result in results] == [3 + 2 + 4] * 2
    assert results[0]["metrics"] == results[1]["metrics"]
    for name, table in results[0]["tables"].items():
        for side in table:
            for key, value in table[side].items():
                assert torch.equal(value, results[1]["tables"][name][side][key])

    trainer = dpo_trainer(tmp_path, eval_dataset={"clean": HELDOUT, "other": OTHER}, per_device_eval_batch_size=1)
    trainer.model.load_state_dict(results[0]["weights"])
    metrics = trainer.evaluate()
    assert trainer.pair_evaluations.keys() == results[0]["tables"].keys() == {"eval_clean", "eval_other", "train"}
    for name, pairs in trainer.pair_evaluations.items():
        for side, columns in results[0]["tables"][name].items():
            for key, value in columns.items():
                expected = getattr(getattr(pairs, side), key)
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    for key, value in metrics.items():
        counted = "num_tokens", "epoch"  # of training, which this trainer has not done
        if not key.endswith(("_runtime", "_per_second", "_preparation_time", *counted)):
            assert results[0]["metrics"][key] == pytest.approx(value, rel=1e-4, abs=1e-6), key
    assert results[0]["metrics"]["eval_drift/params_rel"] > 0
    # b of the empirical boundary counts both processes
    assert results[0]["sizes"] == (2 * 2 * 2, 14)


# ---- Model card ----


def test_model_card(tmp_path):
    trainer = dpo_trainer(tmp_path, eval_dataset=HELDOUT, prm_estimator="debiased", prm_alpha=0.5, weight_decay=0.1)
    trainer.train()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert "prm-optimizer" in card.split("---")[1] and "prm-optimizer" in trainer.model.model_tags
    assert "## Optimizer" in card and "Population Risk Minimization" in card and "2605.01172" in card
    for line in (
        "| `estimator` | debiased |",
        "| `alpha` | 0.5 |",
        "| `lr` | 0.01 |",
        "| `weight_decay` | 0.0 and 0.1 |",
    ):
        assert line in card
    kl = trainer.last_eval_metrics["eval_drift/kl"]
    assert f"| `eval_drift/kl` | {kl:.4g} |" in card and "at step 3" in card and "eval_runtime" not in card

    control = dpo_trainer(tmp_path / "control", optim="adamw_torch_fused")
    control.create_model_card()
    card = (tmp_path / "control" / "README.md").read_text()
    assert "Population Risk" not in card and "prm-optimizer" not in card


def test_model_card_of_a_checkpoint(tmp_path):
    trainer = dpo_trainer(tmp_path, save_strategy="steps", save_steps=2)
    trainer.train()
    assert (tmp_path / "README.md").read_text().count("## Optimizer") == 1
