"""Which optimizer a trainer has, in ours and, by `PRMCallback`, in others."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from prm_hf.optim import PRM
from prm_hf.trainers import PRMCallback, PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer

from ..tiny import make_model, make_tokenizer
from .trainer_runs import (
    HELDOUT,
    MASK_KEYS,
    SENTENCES,
    TRAIN,
    dpo_trainer,
    settings,
    weights,
)


pytestmark = pytest.mark.usefixtures("quiet")


# ---- In our trainers ----


def test_prm_is_built_from_the_arguments_with_decay_groups(tmp_path):
    trainer = dpo_trainer(
        tmp_path,
        weight_decay=0.1,
        adam_beta1=0.8,
        adam_beta2=0.95,
        adam_epsilon=1e-6,
        prm_mask="hard",
        prm_reduction="per_param",
        prm_softness=2.0,
        prm_estimator="debiased",
        prm_variance_beta=0.95,
        prm_alpha=0.5,
        prm_mask_eps=1e-9,
        prm_mask_warmup_steps=2,
        prm_mask_min_elements=4,
        prm_state_dtype="bf16",
    )
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is PRM
    decay, no_decay = optimizer.param_groups
    assert decay["weight_decay"] == 0.1 and no_decay["weight_decay"] == 0.0
    norms = [p for n, p in trainer.model.named_parameters() if "norm" in n or "bias" in n]
    assert {id(p) for p in no_decay["params"]} == {id(p) for p in norms}
    assert len(decay["params"]) + len(norms) == len(list(trainer.model.parameters()))
    expected = {
        "lr": 1e-2,
        "betas": (0.8, 0.95),
        "eps": 1e-6,
        "mask": "hard",
        "reduction": "per_param",
        "softness": 2.0,
        "estimator": "debiased",
        "variance_beta": 0.95,
        "boundary": "batch",
        "alpha": 0.5,
        "mask_eps": 1e-9,
        "mask_warmup_steps": 2,
        "mask_min_elements": 4,
        "state_dtype": "bf16",
    }
    for group in optimizer.param_groups:
        assert {key: group[key] for key in expected} == expected


def test_with_8_bits_embeddings_are_a_group_with_float32_state(tmp_path):
    trainer = dpo_trainer(tmp_path, weight_decay=0.1, prm_state_dtype="8bit")
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    decay, no_decay, embeddings = trainer.create_optimizer().param_groups
    assert [names[id(p)] for p in embeddings["params"]] == ["model.embed_tokens.weight"]
    assert [g["state_dtype"] for g in (decay, no_decay, embeddings)] == ["8bit", "8bit", "float32"]
    assert [g["weight_decay"] for g in (decay, no_decay, embeddings)] == [0.1, 0.0, 0.1]
    assert sum(len(g["params"]) for g in (decay, no_decay, embeddings)) == len(names)
    trainer.train()


def test_the_control_trains_exactly_as_the_parent(tmp_path):
    control = dpo_trainer(tmp_path, optim="adamw_torch_fused", prm_mask="hard", eval_dataset=HELDOUT)
    parent = DPOTrainer(
        make_model(),
        make_model(),
        DPOConfig(**settings(tmp_path), optim="adamw_torch_fused"),
        train_dataset=TRAIN,
        processing_class=make_tokenizer(),
    )
    control.train()
    parent.train()
    assert torch.equal(weights(control.model), weights(parent.model))
    assert not any(key.startswith("mask/") for log in control.state.log_history for key in log)


def test_mask_none_trains_as_adamw_and_masks_do_not(tmp_path):
    runs = {
        name: dpo_trainer(tmp_path, **kwargs)
        for name, kwargs in {
            "adamw": {"optim": "adamw_torch_fused"},
            "none": {"prm_mask": "none"},
            "snr": {},
        }.items()
    }
    for trainer in runs.values():
        trainer.train()
    adamw, none, snr = (weights(runs[name].model) for name in ("adamw", "none", "snr"))
    torch.testing.assert_close(none, adamw, rtol=0, atol=1e-5)  # of steps of 1e-2
    assert (snr - adamw).abs().max() > 1e-3


def test_explicit_optimizers_win(tmp_path):
    model = make_model()
    given = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = dpo_trainer(
        tmp_path, model=model, ref_model=make_model(), trainer_kwargs={"optimizers": (given, None)}, max_steps=1
    )
    trainer.train()
    assert trainer.innermost_optimizer() is given and trainer.find_prm() is None
    assert "prm-optimizer" not in trainer._tag_names

    chosen = (PRM, {"lr": 1e-3, "mask": "soft"})
    trainer = dpo_trainer(
        tmp_path, optim="adamw_torch_fused", trainer_kwargs={"optimizer_cls_and_kwargs": chosen}, max_steps=1
    )
    trainer.train()
    assert trainer.find_prm().param_groups[0]["mask"] == "soft"
    assert MASK_KEYS <= trainer.state.log_history[0].keys() and "prm-optimizer" in trainer._tag_names

    with pytest.raises(RuntimeError, match="optimizers.*optimizer_cls_and_kwargs"):
        dpo_trainer(
            tmp_path,
            model=model,
            ref_model=make_model(),
            trainer_kwargs={"optimizers": (given, None), "optimizer_cls_and_kwargs": chosen},
        )


def test_empirical_boundary_takes_its_sizes_from_the_run(tmp_path):
    empirical = {"prm_boundary": "empirical", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer = dpo_trainer(tmp_path, **empirical, max_steps=1)
    trainer.train()
    for group in trainer.find_prm().param_groups:
        assert (group["boundary"], group["batch_size"], group["n_dataset"]) == ("empirical", 6, 14)

    with pytest.raises(ValueError, match="14 examples and 16 a step.*per_device_train_batch_size"):
        dpo_trainer(tmp_path, prm_boundary="empirical", per_device_train_batch_size=16)
    with pytest.raises(ValueError, match="`prm_boundary='empirical'`.*`IterableDataset`"):
        dpo_trainer(tmp_path, train=TRAIN.to_iterable_dataset(), prm_boundary="empirical")
    with pytest.raises(ValueError, match="`auto_find_batch_size=True`"):
        dpo_trainer(tmp_path, prm_boundary="empirical", auto_find_batch_size=True)
    # A number for alpha needs no sizes
    dpo_trainer(
        tmp_path, train=TRAIN.to_iterable_dataset(), prm_boundary="empirical", prm_alpha=0.1
    ).create_optimizer()


@pytest.mark.parametrize(
    "trainer_class, config", [(PRMDPOTrainer, PRMDPOConfig), (PRMSFTTrainer, PRMSFTConfig)], ids=["dpo", "sft"]
)
def test_a_deepspeed_optimizer_raises(trainer_class, config, tmp_path):
    args = config(**settings(tmp_path))
    # What `--deepspeed` and `accelerate launch` both end in
    args.deepspeed_plugin = SimpleNamespace(deepspeed_config={"optimizer": {"type": "AdamW"}}, zero_stage=2)
    with pytest.raises(ValueError, match="section `optimizer`.*optim='adamw_torch'"):
        trainer_class(make_model(), args=args, train_dataset=TRAIN, processing_class=make_tokenizer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prm_reduction": "per_row"}, "'per_row': it is not supported under FSDP1.*Use FSDP2.*'per_tensor'"),
        ({"prm_reduction": "per_tensor", "prm_state_dtype": "8bit"}, "state_dtype='8bit': .* under FSDP1.*Use FSDP2"),
    ],
)
def test_what_fsdp1_cannot_hold_raises(tmp_path, monkeypatch, changes, message):
    args = PRMSFTConfig(**settings(tmp_path, drift_metrics=False, **changes))
    with pytest.raises(ValueError, match=message):
        under_fsdp(monkeypatch, 1)(make_model(), args=args, train_dataset=SENTENCES, processing_class=make_tokenizer())


def test_training_with_masks_of_rows(tmp_path):
    trainer = dpo_trainer(tmp_path, max_steps=4, prm_reduction="per_row", prm_signal_beta=0.98, eval_dataset=HELDOUT)
    trainer.train()
    prm = trainer.find_prm()
    p = trainer.model.get_input_embeddings().weight
    assert prm.state[p]["grad_var"].shape == p.shape[:1] and prm.state[p]["exp_avg_signal"].shape == p.shape
    (*_, last) = [log for log in trainer.state.log_history if "mask/mean_q" in log]
    assert 0 < last["mask/mean_q"] < 1 and last["mask/mean_q"] == prm.get_mask_stats()["mean_q"]
    trainer.create_model_card()
    card = (Path(trainer.args.output_dir) / "README.md").read_text()
    assert "| `reduction` | per_row |" in card and "| `signal_beta` | 0.98 |" in card


def test_an_optimizer_in_prms_place_raises(tmp_path):
    class Replaced(PRMDPOTrainer):
        def create_optimizer(self, *args, **kwargs):
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    args = PRMDPOConfig(**settings(tmp_path))
    trainer = Replaced(make_model(), make_model(), args, train_dataset=TRAIN, processing_class=make_tokenizer())
    with pytest.raises(
        RuntimeError, match="to train with PRM.*optimizer in effect is SGD.*zero_force_ds_cpu_optimizer"
    ):
        trainer.train()


def test_the_first_step_says_where_the_tensors_are(tmp_path, caplog):
    trainer = dpo_trainer(tmp_path, max_steps=2)
    with caplog.at_level(logging.WARNING, logger="prm_hf"):
        trainer.train()
    number = sum(p.requires_grad for p in trainer.model.parameters())
    assert caplog.text.count(f"PRM trains {number} tensors with per_row masks as whole tensors on 1 process.") == 1


def under_fsdp(monkeypatch, version):
    class UnderFSDP(PRMSFTTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            plugin = SimpleNamespace(fsdp_version=version, use_orig_params=True)
            monkeypatch.setitem(AcceleratorState._shared_state, "fsdp_plugin", plugin)
            self.is_fsdp_enabled = True

    return UnderFSDP


def test_fsdp_version_1_raises_where_drift_is_measured(tmp_path, monkeypatch):
    args = PRMSFTConfig(**settings(tmp_path, prm_reduction="per_tensor"))
    with pytest.raises(ValueError, match="FSDP version 2, got version 1.*drift_metrics=False"):
        under_fsdp(monkeypatch, 1)(
            make_model(),
            args=args,
            train_dataset=SENTENCES,
            eval_dataset=SENTENCES,
            processing_class=make_tokenizer(),
        )


# ---- Trainers that are not ours ----


def plain_trainer(tmp_path, model, **kwargs):
    rows = [{"input_ids": list(range(3, 12)), "labels": list(range(3, 12))}] * 8
    return Trainer(model, TrainingArguments(**settings(tmp_path)), train_dataset=Dataset.from_list(rows), **kwargs)


def trl_sft_trainer(tmp_path, model, **kwargs):
    args = SFTConfig(**settings(tmp_path))
    return SFTTrainer(model, args, train_dataset=SENTENCES, processing_class=make_tokenizer(), **kwargs)


def trl_reward_trainer(tmp_path, model, **kwargs):
    config = Qwen2Config(**{**make_model().config.to_dict(), "num_labels": 1})
    torch.manual_seed(0)
    model = Qwen2ForSequenceClassification(config)
    if "optimizers" in kwargs:
        kwargs["optimizers"] = (PRM(model.parameters(), lr=1e-2), None)
    args = RewardConfig(**settings(tmp_path))
    return RewardTrainer(model, args, train_dataset=TRAIN, processing_class=make_tokenizer(), **kwargs)


@pytest.mark.parametrize("how", ["optimizer_cls_and_kwargs", "optimizers"])
@pytest.mark.parametrize("make", [plain_trainer, trl_sft_trainer, trl_reward_trainer])
def test_prm_in_other_trainers(tmp_path, make, how):
    model = make_model()
    if how == "optimizers":
        trainer = make(tmp_path, model, optimizers=(PRM(model.parameters(), lr=1e-2), None))
    else:
        trainer = make(tmp_path, model, optimizer_cls_and_kwargs=(PRM, {"lr": 1e-2, "reduction": "per_tensor"}))
    before = weights(trainer.model)
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is PRM and {int(s["step"]) for s in optimizer.state.values()} == {3}
    assert optimizer.param_groups[0]["reduction"] == ("per_row" if how == "optimizers" else "per_tensor")
    assert not torch.equal(weights(trainer.model), before)


@pytest.mark.parametrize("make", [plain_trainer, trl_sft_trainer])
def test_the_check_of_our_trainers_in_other_ones(tmp_path, caplog, make):
    trainer = make(
        tmp_path, make_model(), optimizer_cls_and_kwargs=(PRM, {"reduction": "per_param"}), callbacks=[PRMCallback()]
    )
    trainer.train()
    number = sum(p.requires_grad for p in trainer.model.parameters())
    assert caplog.text.count(f"PRM trains {number} tensors with per_param masks as whole tensors on 1 process.") == 1
    trainer = make(tmp_path, make_model(), callbacks=[PRMCallback()])
    with pytest.raises(RuntimeError, match="to train with PRM, but the optimizer in effect is AdamW"):
        trainer.train()


@pytest.mark.parametrize("how", ["instance", "class", "added"])
def test_trackers_see_what_the_callback_adds(tmp_path, how):
    """A Trainer calls those of `report_to` before the callbacks that it is given."""
    seen = []

    class Tracker(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    callbacks = {"instance": [PRMCallback()], "class": [PRMCallback], "added": []}[how]
    trainer = plain_trainer(
        tmp_path, make_model(), optimizer_cls_and_kwargs=(PRM, {}), callbacks=[Tracker, *callbacks]
    )
    if how == "added":
        trainer.add_callback(PRMCallback)
    names = sorted(type(callback).__name__ for callback in trainer.callback_handler.callbacks)
    trainer.train()
    assert [("mask/mean_q" in logs) for logs in seen] == [("loss" in logs) for logs in seen] and len(seen) > 3
    assert sorted(type(callback).__name__ for callback in trainer.callback_handler.callbacks) == names
