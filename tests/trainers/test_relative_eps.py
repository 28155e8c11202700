"""Adam's eps relative to the clipped gradient, and the preset that sets it."""

import pytest
import torch
from peft import LoraConfig
from torch import nn
from trl import TrlParser

from prm_hf import PRM
from prm_hf.sharding import ShardingPath
from prm_hf.trainers import PRMDPOConfig
from prm_hf.trainers.config import check_sharding
from prm_hf.trainers.presets import PRESETS

from ..tiny import make_model
from .trainer_runs import dpo_trainer, lora, settings, sft_trainer, weights


pytestmark = pytest.mark.usefixtures("quiet")


def scaled(model: nn.Module, relative_eps: float, norm: float, lr: float) -> tuple[float, float]:
    """Eps and learning rate as they are defined."""
    d = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return relative_eps * norm / d**0.5, lr * (1 + relative_eps)


def groups_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[dict]:
    return [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in optimizer.param_groups]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_adamw_with_relative_eps_is_adamw_with_that_eps_and_learning_rate(tmp_path, optim):
    run = {"max_grad_norm": 0.5, "weight_decay": 0.1, "max_steps": 2}
    trainer = dpo_trainer(tmp_path, optim=optim, relative_eps=3.0, **run)
    by_hand = dpo_trainer(tmp_path, optim=optim, **run)
    eps, lr = scaled(by_hand.model, 3.0, 0.5, by_hand.args.learning_rate)
    groups = groups_of(by_hand.create_optimizer(), by_hand.model)
    for group in groups:  # the decay of a step is that of the plain learning rate
        group["weight_decay"] /= 4.0
    by_hand.optimizer = torch.optim.AdamW(groups, lr=lr, eps=eps, fused=optim == "adamw_torch_fused")
    trainer.train()
    by_hand.train()
    assert torch.equal(weights(trainer.model), weights(by_hand.model))


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_prm_with_relative_eps_is_prm_with_that_eps_and_learning_rate(tmp_path, adapter):
    model = lora(make_model()) if adapter else make_model()
    run = {"max_grad_norm": 0.5, "max_steps": 2, "eval_dataset": None}
    trainer = sft_trainer(tmp_path, model, relative_eps=10.0, **run)
    by_hand = sft_trainer(tmp_path, lora(make_model()) if adapter else make_model(), **run)
    eps, lr = scaled(by_hand.model, 10.0, 0.5, by_hand.args.learning_rate)
    kwargs = by_hand.get_optimizer_cls_and_kwargs(by_hand.args)[1] | {"eps": eps, "lr": lr}
    by_hand.optimizer = PRM(groups_of(by_hand.create_optimizer(), by_hand.model), **kwargs)
    trainer.train()
    by_hand.train()
    torch.testing.assert_close(weights(trainer.model), weights(by_hand.model), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"relative_eps": 0.0}, "`relative_eps` is 0.0: set it to a positive finite number"),
        ({"relative_eps": float("inf")}, "`relative_eps` is inf"),
        ({"relative_eps": 10.0, "max_grad_norm": 0.0}, "`relative_eps=10.0`.*`max_grad_norm` is 0.0: set"),
        (
            {"relative_eps": 10.0, "adam_epsilon": 1e-6, "optim": "adamw_torch_fused"},
            "`adam_epsilon=1e-06` and `relative_eps=10.0` contradict each other",
        ),
        (
            {"prm_preset": "clean_labels"},
            "`prm_preset` is 'clean_labels': set it to one of 'noisy_labels', or to None",
        ),
        (
            {"prm_preset": "noisy_labels", "prm_reduction": "per_param"},
            "`prm_reduction='per_param'` and `prm_preset='noisy_labels'`, which sets it to 'per_row', contradict",
        ),
    ],
)
def test_contradictions_raise(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        PRMDPOConfig(**settings(tmp_path, **kwargs))


@pytest.mark.parametrize("preset", [None, "noisy_labels"])
def test_refused_sharding_names_the_preset(tmp_path, preset):
    args = PRMDPOConfig(**settings(tmp_path, prm_preset=preset))
    check_sharding(args, ShardingPath.FSDP2)
    message = "reduction='per_row'.*FSDP1.*" + ("'per_tensor'.$" if preset is None else "`prm_preset='noisy_labels'`")
    with pytest.raises(ValueError, match=message):
        check_sharding(args, ShardingPath.FSDP1)


def test_an_optimizer_without_eps_raises(tmp_path):
    with pytest.raises(ValueError, match="`relative_eps=10.0` sets Adam's eps, and `optim='sgd'` has none"):
        dpo_trainer(tmp_path, optim="sgd", relative_eps=10.0).train()


def test_the_preset_is_what_its_table_says(tmp_path, caplog):
    args = PRMDPOConfig(**settings(tmp_path, prm_preset="noisy_labels"))
    trainer = dpo_trainer(tmp_path, prm_preset="noisy_labels")
    by_hand = dpo_trainer(tmp_path, **PRESETS["noisy_labels"])
    assert caplog.text.count("`prm_preset='noisy_labels'` sets `prm_reduction='per_row'`") == 1
    assert "`relative_eps=10.0`" in caplog.text
    for ours, theirs in zip(*(t.create_optimizer().param_groups for t in (trainer, by_hand)), strict=True):
        assert {**ours, "params": None} == {**theirs, "params": None}
        assert (ours["reduction"], ours["estimator"], ours["signal_beta"]) == ("per_row", "debiased", 0.98)
    assert args.relative_eps is None  # a user's arguments serve other trainers too

    control = dpo_trainer(tmp_path, prm_preset="noisy_labels", optim="adamw_torch_fused")
    assert control.create_optimizer().param_groups[0]["eps"] == 1e-8  # `prm_*` arguments have no effect


def test_the_preset_keeps_the_usual_eps_with_lora(tmp_path, caplog):
    peft_config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = sft_trainer(
        tmp_path, make_model(), prm_preset="noisy_labels", trainer_kwargs={"peft_config": peft_config}
    )
    group = trainer.create_optimizer().param_groups[0]
    assert (group["eps"], group["lr"], group["signal_beta"]) == (1e-8, 1e-2, 0.98)
    assert "`relative_eps=None`" in caplog.text
    with pytest.raises(ValueError, match="`relative_eps=5.0` and .*, which sets it to None with LoRA, contradict"):
        sft_trainer(tmp_path, lora(make_model()), prm_preset="noisy_labels", relative_eps=5.0)


def test_flags(tmp_path):
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--prm_preset"]
    (args,) = TrlParser((PRMDPOConfig,)).parse_args_and_config(args=[*common, "noisy_labels", "--relative_eps", "10"])
    assert (args.relative_eps, args.prm_preset) == (10.0, "noisy_labels")
    with pytest.raises(SystemExit):
        TrlParser((PRMDPOConfig,)).parse_args_and_config(args=[*common, "other"])
