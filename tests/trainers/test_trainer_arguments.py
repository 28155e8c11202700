"""The arguments of the trainers."""

import dataclasses
import json
import math

import pytest
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig, TrlParser

from prm_hf.trainers import PRMArguments, PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer

from ..tiny import make_model, make_tokenizer
from .trainer_runs import TRAIN, settings


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("config", [PRMDPOConfig, PRMSFTConfig])
def test_flags_and_yaml(config, tmp_path):
    flags = ["--prm_mask", "soft", "--prm_alpha", "0.5", "--prm_estimator", "debiased", "--prm_warmup_steps", "7"]
    file = tmp_path / "config.yaml"
    file.write_text("prm_rho: 0.9\nprm_mask_eps: 1.0e-8\nlearning_rate: 1.0e-4\n")
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--config", str(file)]
    (args,) = TrlParser((config,)).parse_args_and_config(args=[*common, *flags, "--no_drift_metrics"])
    assert (args.prm_mask, args.prm_alpha, args.prm_estimator, args.prm_warmup_steps) == ("soft", 0.5, "debiased", 7)
    assert (args.prm_rho, args.prm_mask_eps, args.learning_rate, args.drift_metrics) == (0.9, 1e-8, 1e-4, False)
    assert (args.optimizer_name, args.prm_reduction) == ("prm", "per_row")

    file.write_text("prm_maks: soft\n")
    with pytest.raises(ValueError, match="prm_maks"):
        TrlParser((config,)).parse_args_and_config(args=common, fail_with_unknown_args=True)


def test_arguments_stand_alone():
    assert PRMArguments().prm_reduction == "per_row"
    with pytest.raises(ValueError, match="`prm_mask` is 'snrr'"):
        PRMArguments(prm_mask="snrr")


def test_every_field_is_explained():
    own = {f.name: f for config in (PRMDPOConfig, PRMSFTConfig) for f in dataclasses.fields(config)}
    inherited = {f.name for config in (DPOConfig, SFTConfig) for f in dataclasses.fields(config)}
    documented = PRMArguments.__doc__ + PRMDPOConfig.__doc__
    own = {name: field for name, field in own.items() if name not in inherited}
    assert {"optimizer_name", "prm_mask", "prm_mask_eps", "drift_metrics", "memorization_max_pairs"} <= own.keys()
    for name, field in own.items():
        assert field.metadata["help"] and f"{name} (" in documented


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"optimizer_name": "adam"}, "`optimizer_name` is 'adam': set it to one of 'prm', 'adamw'"),
        ({"prm_mask": "snrr"}, "`prm_mask` is 'snrr': set it to one of 'snr', 'soft', 'hard', 'none'"),
        ({"prm_reduction": "per_column"}, "`prm_reduction` is 'per_column'.*'per_param', 'per_tensor', 'per_row'"),
        ({"prm_signal_beta": 1.0}, r"`prm_signal_beta` is 1.0: set it to a number in \[0, 1\), or to None"),
        (
            {"prm_signal_beta": 0.98, "prm_reduction": "per_tensor"},
            "PRM refuses.*signal_beta=0.98: it needs reduction='per_row'.*start with `prm_`",
        ),
        ({"prm_reduction": "per_row", "prm_state_dtype": "8bit"}, "PRM refuses.*'8bit'.*rows.*'per_tensor'"),
        ({"prm_estimator": "mean"}, "`prm_estimator` is 'mean'"),
        ({"prm_boundary": "epoch"}, "`prm_boundary` is 'epoch'"),
        ({"prm_softness": -1.0}, "`prm_softness` is -1.0.*not negative"),
        ({"prm_alpha": math.nan}, "`prm_alpha` is nan"),
        ({"prm_mask_eps": -1e-8}, "`prm_mask_eps` is -1e-08"),
        ({"prm_state_dtype": "fp8"}, "`prm_state_dtype` is 'fp8': set it to one of 'float32', 'bf16', '8bit'"),
        ({"prm_warmup_steps": -3}, "`prm_warmup_steps` is -3"),
        ({"prm_warmup_steps": 0.5}, "warmup_steps.*0.5"),
        ({"prm_rho": 1.0}, r"`prm_rho` is 1.0: set it to a number in \[0, 1\)"),
        ({"adam_beta1": 1.5}, "1.5.*`adam_beta1`"),
        ({"learning_rate": -1e-3}, "-0.001.*`learning_rate`"),
        ({"memorization_max_pairs": 0}, "`memorization_max_pairs` is 0.*drift_metrics=False"),
        ({"optim": "sgd"}, "`optim='sgd'` and `optimizer_name='prm'`.*optimizer_name='adamw'"),
        ({"optim_args": "a=1"}, "`optim_args='a=1'` and `optimizer_name='prm'`"),
        ({"precompute_ref_log_probs": True, "ld_alpha": 0.5}, "`ld_alpha=0.5`.*`drift_metrics=False`"),
    ],
)
def test_wrong_arguments_raise(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PRMDPOConfig(**settings(tmp_path, **kwargs))


def test_the_control_may_choose_its_optimizer(tmp_path):
    args = PRMDPOConfig(**settings(tmp_path, optimizer_name="adamw", optim="sgd"))
    assert args.optim == "sgd"


def test_arguments_survive_a_round_trip(tmp_path):
    args = PRMDPOConfig(**settings(tmp_path, prm_alpha=0.25, memorization_max_pairs=None))
    again = PRMDPOConfig(**{k: v for k, v in json.loads(args.to_json_string()).items() if k in args.__dict__})
    assert (again.prm_alpha, again.memorization_max_pairs, again.optim) == (0.25, None, args.optim)


@pytest.mark.parametrize(
    "trainer_class, args", [(PRMDPOTrainer, DPOConfig), (PRMSFTTrainer, SFTConfig), (PRMSFTTrainer, TrainingArguments)]
)
def test_another_config_raises(trainer_class, args, tmp_path):
    args = args(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(
        TypeError, match=f"`args` is a `{type(args).__name__}`: pass a `{trainer_class.__name__[:6]}Conf"
    ):
        trainer_class(make_model(), args=args, train_dataset=TRAIN, processing_class=make_tokenizer())
