"""What the trainers log, and what they measure of preference pairs."""

import copy
import dataclasses
import inspect
import json
import logging

import pytest
import torch
from transformers import Qwen2ForCausalLM, TrainerCallback
from trl import DPOConfig, DPOTrainer

from prm_hf.metrics import (
    PairEvaluation,
    SequenceEvaluation,
    memorization_metrics,
    preference_scores,
    reward_margins,
    suspect_metrics,
)
from prm_hf.trainers import PRMDPOConfig

from ..tiny import make_model, make_tokenizer
from .trainer_runs import (
    HELDOUT,
    MASK_KEYS,
    OTHER,
    TRAIN,
    count_passes,
    dpo_trainer,
    evaluations,
    expected_pair_metrics,
    lora,
    settings,
    weights,
)


pytestmark = pytest.mark.usefixtures("quiet")
PAIR_KEYS = {
    "rewards/accuracies",
    "rewards/ties",
    "rewards/margins",
    "rewards/chosen",
    "rewards/rejected",
    "logps/chosen",
    "logps/rejected",
    "drift/reward_abs",
    "drift/logratio_abs",
    "drift/kl",
}


# ---- Logs ----


def test_mask_statistics_are_in_the_logs_of_training_steps_alone(tmp_path):
    seen = []

    class Reporter(TrainerCallback):  # as wandb and its like see the logs
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    trainer = dpo_trainer(
        tmp_path,
        eval_dataset=HELDOUT,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        logging_steps=2,
        trainer_kwargs={"callbacks": [Reporter()]},
    )
    trainer.train()
    steps = [log for log in seen if "loss" in log]
    others = [log for log in seen if "loss" not in log]
    assert len(steps) == 2 and len(others) == 3  # two evaluations and the summary
    for log in steps:
        assert MASK_KEYS <= log.keys() and 0 < log["mask/mean_q"] <= 1
        assert log["mask/parameter_count"] == sum(p.numel() for p in trainer.model.parameters())
    assert not any(key.startswith("mask/") for log in others for key in log)
    stats = trainer.find_prm().get_mask_stats()
    assert {k: v for k, v in steps[-1].items() if k in MASK_KEYS} == {f"mask/{k}": v for k, v in stats.items()}


# ---- Evaluation of preference pairs ----


def assert_same_pairs(actual: PairEvaluation, expected: PairEvaluation) -> None:
    for side in ("chosen", "rejected"):
        for column in dataclasses.fields(SequenceEvaluation):
            values = [getattr(getattr(pairs, side), column.name) for pairs in (actual, expected)]
            torch.testing.assert_close(*values, rtol=1e-4, atol=2e-5)


def test_splits_are_kept_apart_by_name(tmp_path):
    splits = {"clean": HELDOUT, "other": OTHER}
    trainer = dpo_trainer(tmp_path, eval_dataset=splits, eval_strategy="steps", eval_steps=3, beta=0.3)
    trainer.train()
    logs = evaluations(trainer)
    assert len(logs) == 2
    returned = trainer.last_eval_metrics
    for name, log in zip(splits, logs, strict=True):
        expected = expected_pair_metrics(trainer, splits[name])
        assert PAIR_KEYS == expected.keys()
        for key, value in expected.items():
            assert log[f"eval_{name}_{key}"] == returned[f"eval_{name}_{key}"] == pytest.approx(value, rel=1e-6)
        assert f"eval_{name}_entropy" in log and f"eval_{name}_loss" in log
        assert_same_pairs(trainer.pair_evaluations[f"eval_{name}"], trainer.evaluate_pairs(name))
    run_keys = {"eval_drift/params_rel", "eval_memorization/flipped_fit", "eval_memorization/clean_fit"}
    run_keys |= {"eval_suspects/auc", "eval_suspects/average_precision"}
    assert run_keys <= returned.keys() and run_keys <= logs[0].keys() and not run_keys & logs[1].keys()
    # Nothing of a split is named as if it were all of the evaluation
    apart = ("eval_clean_", "eval_other_")
    assert {k for k in returned if k.startswith("eval_") and not k.startswith(apart)} == run_keys


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "lora", "precomputed", "precomputed_ref_model", "precomputed_lora", "ref"])
@pytest.mark.parametrize("padding_free", [False, True], ids=["padded", "padding_free"])
def test_evaluation_takes_no_passes_but_trls(tmp_path, kind, padding_free):
    """What TRL's passes leave is what passes of our own give: 7 rows in batches of 3, so that the last is uneven."""
    model, ref_model = make_model(), make_model()
    if kind.endswith("lora"):
        model, ref_model = lora(model), None
    elif kind == "ref":  # the adapter that training started from
        model, ref_model = lora(model), None
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.add_(0.1)
    trainer = dpo_trainer(
        tmp_path,
        model=model,
        ref_model=ref_model,
        train=TRAIN.remove_columns("flipped"),
        eval_dataset=HELDOUT,
        precompute_ref_log_probs=kind.startswith("precomputed"),
        per_device_eval_batch_size=3,
        padding_free=padding_free,
    )
    if kind == "precomputed":
        trainer.ref_model = ref_model = None  # as for a model that TRL loads by name
    trainer.train()
    assert_same_pairs(trainer.pair_evaluations["eval"], trainer.evaluate_pairs())
    assert (trainer.pair_evaluations["eval"].chosen.kl is None) == (kind == "precomputed")
    assert trainer.pair_evaluations["eval"].chosen.logratio.abs().min() > 0

    policy = trainer.model.get_base_model() if ref_model is None and kind != "precomputed" else trainer.model
    rows, rows_of_reference = count_passes(policy), [] if ref_model is None else count_passes(ref_model)
    trainer.evaluate()
    assert len(rows) == (3 if ref_model is not None or kind == "precomputed" else 6)  # with the adapter and without
    assert len(rows_of_reference) == (3 if ref_model is not None else 0)


@pytest.mark.parametrize("kwargs", [{"dataloader_drop_last": True}, {"train_sampling_strategy": "group_by_length"}])
def test_rows_that_trl_leaves_out_or_permutes_are_evaluated_in_order(tmp_path, kwargs):
    prepared = dpo_trainer(tmp_path, eval_dataset=HELDOUT)
    train, heldout = (
        rows.map(lambda row: {"length": len(row["prompt_ids"] + row["chosen_ids"])})
        for rows in (prepared.train_dataset, prepared.eval_dataset)
    )
    trainer = dpo_trainer(tmp_path, train=train, eval_dataset=heldout, remove_unused_columns=False, **kwargs)
    trainer.train()
    assert_same_pairs(trainer.pair_evaluations["eval"], trainer.evaluate_pairs())


def test_logits_that_are_not_head_times_hidden_state_raise_in_evaluation(tmp_path):
    trainer = dpo_trainer(tmp_path, eval_dataset=HELDOUT)
    forward = trainer.model.forward

    def cubed(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        if "fused_lm_head" not in kwargs:
            outputs.logits = outputs.logits**3 * 1000
        return outputs

    cubed.__signature__ = inspect.signature(forward)
    trainer.model.forward = cubed
    with pytest.raises(ValueError, match="drift_metrics=False"):
        trainer.evaluate()


def test_rewards_are_exact_over_uneven_batches(tmp_path):
    """5 rows in batches of 4: TRL's own mean of batch means would give the last row the weight of four."""
    trainer = dpo_trainer(tmp_path, eval_dataset=OTHER)
    trainer.train()
    parent = DPOTrainer(
        trainer.model,
        make_model(),
        DPOConfig(**settings(tmp_path, per_device_eval_batch_size=1)),
        train_dataset=TRAIN,
        eval_dataset=OTHER,
        processing_class=make_tokenizer(),
    ).evaluate()
    for key in ("rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected"):
        assert trainer.last_eval_metrics[f"eval_{key}"] == pytest.approx(parent[f"eval_{key}"], rel=1e-4, abs=1e-6)


def test_without_drift_metrics_the_names_are_right_all_the_same(tmp_path):
    trainer = dpo_trainer(tmp_path, eval_dataset={"a": HELDOUT, "b": OTHER}, drift_metrics=False)
    returned = trainer.evaluate()
    assert {"eval_a_rewards/accuracies", "eval_b_rewards/accuracies"} <= returned.keys()
    assert not any("drift/" in key or "memorization/" in key or key.startswith("eval_rewards") for key in returned)
    assert trainer.parameter_drift is None and not trainer.pair_evaluations


def test_memorization_is_measured_on_spread_training_rows(tmp_path):
    trainer = dpo_trainer(tmp_path, eval_dataset=HELDOUT, memorization_max_rows=6, max_steps=2)
    trainer.train()
    rows = trainer.memorization_rows
    assert rows == [0, 2, 4, 7, 9, 11]
    pairs = trainer.evaluate_pairs(TRAIN.select(rows))
    assert torch.equal(trainer.pair_evaluations["train"].rejected.logratio, pairs.rejected.logratio)
    for key, value in memorization_metrics(pairs, TRAIN.select(rows)["flipped"], trainer.beta).items():
        assert trainer.last_eval_metrics[f"eval_{key}"] == value
    flags = TRAIN.select(rows)["flipped"][:]
    for key, value in suspect_metrics(-reward_margins(pairs, trainer.beta), flags).items():
        assert trainer.last_eval_metrics[f"eval_{key}"] == value
    everything = dpo_trainer(tmp_path, eval_dataset=HELDOUT, memorization_max_rows=None)
    assert everything.memorization_rows == list(range(14))


def test_memorization_needs_a_bool_column(tmp_path, caplog):
    plain = TRAIN.remove_columns("flipped")
    assert not any("memorization" in k for k in dpo_trainer(tmp_path, train=plain, eval_dataset=HELDOUT).evaluate())
    with caplog.at_level(logging.WARNING):
        trainer = dpo_trainer(tmp_path, train=plain.add_column("flipped", [0, 1] * 7), eval_dataset=HELDOUT)
    assert "not measured: The column 'flipped' of `train_dataset` must be bool, got int64" in caplog.text
    assert not any("memorization" in key for key in trainer.evaluate())


def test_nothing_is_measured_without_an_eval_dataset(tmp_path):
    trainer = dpo_trainer(tmp_path)
    trainer.train()
    assert trainer.parameter_drift is None and not trainer.memorization_rows
    assert not evaluations(trainer) and not trainer.last_eval_metrics


def test_the_end_of_training_is_evaluated_once(tmp_path):
    never = dpo_trainer(tmp_path, eval_dataset=HELDOUT)
    never.train()
    assert [log["step"] for log in evaluations(never)] == [3]
    at_2 = dpo_trainer(tmp_path, eval_dataset=HELDOUT, eval_strategy="steps", eval_steps=2)
    at_2.train()
    assert [log["step"] for log in evaluations(at_2)] == [2, 3]
    at_3 = dpo_trainer(tmp_path, eval_dataset=HELDOUT, eval_strategy="steps", eval_steps=3)
    at_3.train()
    assert [log["step"] for log in evaluations(at_3)] == [3]


def test_a_best_model_that_is_loaded_is_evaluated(tmp_path):
    trainer = dpo_trainer(
        tmp_path,
        eval_dataset=HELDOUT,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="drift/kl",  # least at the first step, and less is better
    )
    trainer.train()
    logs = evaluations(trainer)
    assert len(logs) == 4 and trainer.state.best_global_step == 1
    assert logs[3]["eval_drift/kl"] == pytest.approx(logs[0]["eval_drift/kl"], rel=1e-5)
    assert trainer.last_eval_metrics["eval_drift/kl"] == logs[3]["eval_drift/kl"]


def test_measuring_changes_nothing_in_training(tmp_path):
    runs = [
        dpo_trainer(tmp_path, eval_dataset=HELDOUT, eval_strategy="steps", eval_steps=1, drift_metrics=on)
        for on in (True, False)
    ]
    for trainer in runs:
        trainer.train()
    assert torch.equal(weights(runs[0].model), weights(runs[1].model))


def test_an_untrained_policy_has_not_drifted(tmp_path):
    metrics = dpo_trainer(tmp_path, eval_dataset=HELDOUT).evaluate()
    assert metrics["eval_drift/kl"] == metrics["eval_drift/reward_abs"] == metrics["eval_drift/params_rel"] == 0
    assert metrics["eval_rewards/accuracies"] == 0.5 and metrics["eval_rewards/ties"] == 1
    assert metrics["eval_memorization/flipped_fit"] == metrics["eval_memorization/clean_fit"] == 0.5


def test_params_rel_counts_from_the_weights_before_training(tmp_path):
    trainer = dpo_trainer(tmp_path, eval_dataset=HELDOUT)
    start = weights(trainer.model)
    trainer.train()
    expected = (weights(trainer.model) - start).norm() / start.norm()
    assert trainer.last_eval_metrics["eval_drift/params_rel"] == pytest.approx(expected.item(), rel=1e-4)


def test_evaluate_takes_a_dataset_and_evaluate_pairs_needs_one(tmp_path):
    trainer = dpo_trainer(tmp_path, max_steps=2)
    trainer.train()
    metrics = trainer.evaluate(OTHER, metric_key_prefix="test")
    for key, value in expected_pair_metrics(trainer, OTHER).items():
        assert metrics[f"test_{key}"] == pytest.approx(value, rel=1e-6)
    both = trainer.evaluate({"a": OTHER, "b": HELDOUT})
    assert both["eval_a_drift/kl"] == metrics["test_drift/kl"] and "eval_b_drift/kl" in both
    prepared = trainer._prepare_dataset(OTHER, trainer.processing_class, trainer.args, "test")
    assert "test_rewards/accuracies" in trainer.predict(prepared).metrics and not trainer._metrics["eval"]
    with pytest.raises(ValueError, match="no `eval_dataset`. Pass `dataset`"):
        trainer.evaluate_pairs()
    trainer.eval_dataset = {"a": OTHER, "b": HELDOUT}
    with pytest.raises(ValueError, match=r"\['a', 'b'\]. Name one"):
        trainer.evaluate_pairs()


def test_a_reference_that_moves_is_not_measured_from(tmp_path):
    with pytest.raises(ValueError, match="`sync_ref_model=True` moves the reference.*`drift_metrics=False`"):
        dpo_trainer(tmp_path, eval_dataset=HELDOUT, sync_ref_model=True)
    rows = dpo_trainer(tmp_path, precompute_ref_log_probs=True).train_dataset
    trainer = dpo_trainer(tmp_path, train=rows, sync_ref_model=True, ref_model_sync_steps=1)
    assert not trainer.precompute_ref_logps  # the log-probabilities of the rows are those of the first reference
    start = weights(trainer.ref_model)
    trainer.train()
    assert not torch.equal(weights(trainer.ref_model), start)


@pytest.mark.parametrize(
    "metric, direction",
    [
        ("drift/kl", False),
        ("eval_drift/params_rel", False),
        ("eval_clean_drift/logratio_abs", False),
        ("eval_memorization/flipped_fit", False),
        ("eval_suspects/auc", True),
        ("memorization/corrupted_fit", False),
        ("eval_memorization/gap", False),
        ("eval_memorization/clean_fit", True),
        ("eval_memorization/heldout_loss", False),
        ("eval_memorization/corrupted_loss", True),
        ("eval_rewards/accuracies", True),
        ("eval_a_rewards/ties", False),
        ("rewards/margins", True),
        ("eval_entropy", False),
        ("eval_loss", False),
        ("exact_match", True),
    ],
)
def test_which_direction_of_a_metric_is_better(tmp_path, metric, direction):
    best = {"metric_for_best_model": metric}
    assert PRMDPOConfig(**settings(tmp_path, **best)).greater_is_better is direction
    for chosen in (False, True):
        assert PRMDPOConfig(**settings(tmp_path, **best, greater_is_better=chosen)).greater_is_better is chosen


@pytest.mark.slow
def test_a_resumed_run_measures_drift_from_where_training_started(tmp_path):
    """Not from the weights of the checkpoint, if these are passed as the model."""
    saving = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_dataset": HELDOUT}
    dpo_trainer(tmp_path, **saving).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    model = Qwen2ForCausalLM.from_pretrained(checkpoint)
    resumed = dpo_trainer(tmp_path, model=model, ref_model=make_model(), **saving)
    with pytest.raises(ValueError, match="`model` is not the one that training started from.*drift_metrics=False"):
        resumed.train(resume_from_checkpoint=checkpoint)
    dpo_trainer(tmp_path, model=model, ref_model=make_model(), **saving, drift_metrics=False).train(
        resume_from_checkpoint=checkpoint
    )
    # A second resumption still knows the start, also with the states of callbacks restored
    for _ in range(2):
        resumed = dpo_trainer(tmp_path, **{**saving, "max_steps": 6}, restore_callback_states_from_checkpoint=True)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.last_eval_metrics["eval_drift/params_rel"] > 0
    # A checkpoint that does not say where training started is taken as before
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    known = json.loads(state.read_text())
    del known["stateful_callbacks"]["DriftStart"]
    state.write_text(json.dumps(known))
    for eval_dataset in (HELDOUT, None):
        trainer = dpo_trainer(tmp_path, **{**saving, "max_steps": 6, "eval_dataset": eval_dataset})
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


@pytest.mark.parametrize("drift_metrics", [False, True])
def test_ties_count_half_in_every_log(tmp_path, drift_metrics):
    """Policy and reference are equal before the first step."""
    trainer = dpo_trainer(tmp_path, eval_dataset=HELDOUT, drift_metrics=drift_metrics)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/accuracies"] == 0.5 and metrics["eval_rewards/ties"] == 1
    trainer.train()
    steps = [log for log in trainer.state.log_history if "loss" in log]
    assert steps[0]["rewards/accuracies"] == 0.5 and steps[0]["rewards/ties"] == 1
    assert steps[-1]["rewards/ties"] == 0
    pairs = trainer.evaluate_pairs()
    margins = reward_margins(pairs, trainer.beta)
    last = trainer.evaluate()
    assert last["eval_rewards/accuracies"] == pytest.approx(preference_scores(margins).mean().item())
    assert last["eval_rewards/ties"] == 0


def test_ties_of_some_pairs_in_bf16(tmp_path):
    """Weights in bf16 that a small step changes little: many margins are exactly 0."""
    model = make_model().to(torch.bfloat16)
    settings = {"model": model, "ref_model": copy.deepcopy(model), "learning_rate": 1e-6, "max_steps": 1}
    trainer = dpo_trainer(tmp_path, eval_dataset=HELDOUT, optim="sgd", drift_metrics=True, **settings)
    trainer.train()
    margins = reward_margins(trainer.pair_evaluations["eval"], trainer.beta)
    assert trainer.last_eval_metrics["eval_rewards/ties"] == (margins == 0).double().mean().item() > 0
    assert trainer.last_eval_metrics["eval_rewards/accuracies"] >= 0.5 * trainer.last_eval_metrics["eval_rewards/ties"]
