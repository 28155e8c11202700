"""The arguments of the trainers."""

import copy
import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig, TrlParser

from prm_hf import PRM
from prm_hf.trainers import PRMArguments, PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer
from prm_hf.trainers.config import RENAMED, prm_kwargs

from ..tiny import make_model, make_tokenizer
from .trainer_runs import SENTENCES, TRAIN, settings


pytestmark = pytest.mark.usefixtures("quiet")


@pytest.mark.parametrize("config", [PRMDPOConfig, PRMSFTConfig])
def test_flags_and_yaml(config, tmp_path):
    flags = ["--prm_mask", "soft", "--prm_alpha", "0.5", "--prm_estimator", "debiased", "--prm_mask_warmup_steps", "7"]
    file = tmp_path / "config.yaml"
    file.write_text("prm_variance_beta: 0.9\nprm_mask_eps: 1.0e-8\nlearning_rate: 1.0e-4\n")
    common = ["--output_dir", str(tmp_path), "--use_cpu", "--bf16", "False", "--config", str(file)]
    (args,) = TrlParser((config,)).parse_args_and_config(args=[*common, *flags, "--drift_metrics", "False"])
    assert (args.prm_mask, args.prm_alpha, args.prm_estimator, args.prm_mask_warmup_steps) == (
        "soft",
        0.5,
        "debiased",
        7,
    )
    assert (args.prm_variance_beta, args.prm_mask_eps, args.learning_rate, args.drift_metrics) == (
        0.9,
        1e-8,
        1e-4,
        False,
    )
    assert (args.optim, args.prm_reduction) == ("prm", "per_row")

    with pytest.raises(SystemExit):  # argparse knows the choices
        TrlParser((config,)).parse_args_and_config(args=[*common, "--prm_mask", "snrr"])
    file.write_text("prm_maks: soft\n")
    with pytest.raises(ValueError, match="prm_maks"):
        TrlParser((config,)).parse_args_and_config(args=common, fail_with_unknown_args=True)


def test_arguments_stand_alone():
    assert PRMArguments().prm_reduction == "per_row"
    with pytest.raises(ValueError, match="Invalid prm_mask='snrr': it must be one of"):
        PRMArguments(prm_mask="snrr")


def test_every_field_is_explained():
    for config in (PRMDPOConfig, PRMSFTConfig):
        inherited = {f.name for f in dataclasses.fields(config.__mro__[2])} - {"optim"}
        own = {f.name: f for f in dataclasses.fields(config) if f.name not in inherited | RENAMED.keys()}
        assert {"optim", "relative_eps", "prm_preset", "prm_mask", "drift_metrics"} <= own.keys()
        documented = PRMArguments.__doc__ + config.__doc__
        for name, field in own.items():
            assert f"{name} (" in documented and len(field.metadata["help"]) > 30


def test_defaults_are_those_of_prm():
    """One set of defaults, whichever way PRM is reached."""
    theirs = {name: parameter.default for name, parameter in inspect.signature(PRM).parameters.items()}
    ours = prm_kwargs(PRMArguments())
    assert ours == {name: theirs[name] for name in ours}


def by_keyword(values: dict) -> PRMDPOConfig:
    return PRMDPOConfig(**values)


def by_flag(values: dict) -> PRMDPOConfig:
    flags = [str(part) for name, value in values.items() for part in (f"--{name}", value)]
    return TrlParser((PRMDPOConfig,)).parse_args_and_config(args=flags)[0]


def by_yaml(values: dict) -> PRMDPOConfig:
    file = Path(values["output_dir"]) / "config.yaml"
    file.write_text(json.dumps(values))
    return TrlParser((PRMDPOConfig,)).parse_args_and_config(args=["--config", str(file)])[0]


@pytest.mark.parametrize(
    "old, new",
    [
        ({"prm_rho": 0.9}, {"prm_variance_beta": 0.9}),
        ({"prm_warmup_steps": 3}, {"prm_mask_warmup_steps": 3}),
        ({"optimizer_name": "prm"}, {"optim": "prm"}),
        ({"optimizer_name": "adamw"}, {"optim": TrainingArguments.optim}),
        ({"optimizer_name": "adamw", "optim": "sgd"}, {"optim": "sgd"}),
        ({"memorization_max_pairs": None}, {"memorization_max_rows": None}),
        ({"no_drift_metrics": True}, {"drift_metrics": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("read", [by_keyword, by_flag, by_yaml])
def test_old_names_are_accepted_with_a_warning(tmp_path, old, new, read):
    common = settings(tmp_path)
    if read is by_flag and None in old.values():
        pytest.skip("a flag has no word for None")
    with pytest.warns(DeprecationWarning, match=f"`{next(iter(old))}` is now `{next(iter(new))}`"):
        args = read({**common, **old})
    assert {name: getattr(args, name) for name in new} == new
    assert args.to_dict() == PRMDPOConfig(**common, **new).to_dict()


def test_flags_of_drift_metrics_need_no_value(tmp_path):
    flags = [str(part) for name, value in settings(tmp_path, optim="sgd").items() for part in (f"--{name}", value)]
    (args,) = TrlParser((PRMDPOConfig,)).parse_args_and_config(args=[*flags, "--drift_metrics"])
    assert args.drift_metrics is True
    with pytest.warns(DeprecationWarning, match="`no_drift_metrics` is now `drift_metrics`"):
        (args,) = TrlParser((PRMDPOConfig,)).parse_args_and_config(args=[*flags, "--no_drift_metrics"])
    assert args.drift_metrics is False


def test_drift_is_measured_by_default_with_prm_alone(tmp_path):
    defaults = [PRMDPOConfig(**settings(tmp_path, optim=optim)).drift_metrics for optim in ("prm", "adamw_torch")]
    assert defaults == [True, False]
    assert PRMDPOConfig(**settings(tmp_path, optim="adamw_torch", drift_metrics=True)).drift_metrics


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"optim": "adam"}, "adam is not a valid OptimizerNames"),
        ({"optimizer_name": "prm", "optim": "sgd"}, "`optimizer_name='prm'` contradicts `optim='sgd'`: set `optim`"),
        ({"prm_mask": "snrr"}, "prm_mask='snrr': it must be one of 'snr', 'soft', 'hard', 'none'"),
        ({"prm_reduction": "per_column"}, "prm_reduction='per_column'.*'per_param', 'per_tensor', 'per_row'"),
        ({"prm_signal_beta": 1.0}, r"prm_signal_beta=1.0: it must be None or in \[0, 1\)"),
        (
            {"prm_signal_beta": 0.98, "prm_reduction": "per_tensor"},
            "Invalid prm_signal_beta=0.98: it needs prm_reduction='per_row' and prm_estimator='debiased'",
        ),
        ({"prm_estimator": "mean"}, "prm_estimator='mean'"),
        ({"prm_boundary": "epoch"}, "prm_boundary='epoch'"),
        ({"prm_softness": -1.0}, "prm_softness=-1.0"),
        ({"prm_alpha": math.nan}, "prm_alpha=nan"),
        ({"prm_mask_eps": -1e-8}, "prm_mask_eps=-1e-08"),
        ({"prm_state_dtype": "fp8"}, "prm_state_dtype='fp8': it must be one of 'float32', 'bf16', '8bit'"),
        ({"prm_mask_warmup_steps": -3}, "prm_mask_warmup_steps=-3"),
        ({"prm_mask_warmup_steps": 0.5}, "prm_mask_warmup_steps=0.5"),
        ({"prm_mask_min_elements": -1}, "prm_mask_min_elements=-1"),
        ({"prm_variance_beta": 1.0}, r"prm_variance_beta=1.0: it must be in \[0, 1\)"),
        ({"adam_beta1": 1.5}, "adam_beta1=1.5"),
        ({"learning_rate": -1e-3}, "learning_rate=-0.001"),
        ({"memorization_max_rows": 0}, "`memorization_max_rows` is 0.*drift_metrics=False"),
        ({"optim_args": "a=1"}, "`optim_args='a=1'` is not for `optim='prm'`"),
        ({"precompute_ref_log_probs": True, "ld_alpha": 0.5}, "`ld_alpha=0.5`.*`drift_metrics=False`"),
    ],
)
def test_wrong_arguments_raise(kwargs, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        PRMDPOConfig(**settings(tmp_path, **kwargs))


def test_a_subclass_may_take_more(tmp_path):
    class Named(PRMDPOConfig):
        def __init__(self, nickname, **kwargs):
            super().__init__(**kwargs)
            self.nickname = nickname

    args = Named(nickname="x", **settings(tmp_path))
    assert (args.nickname, args.optim) == ("x", "prm")
    assert copy.deepcopy(args).to_dict() == args.to_dict()


def test_the_control_may_choose_its_optimizer(tmp_path):
    args = PRMDPOConfig(**settings(tmp_path, optim="sgd"))
    assert args.optim == "sgd"


def test_arguments_survive_a_round_trip(tmp_path):
    args = PRMDPOConfig(**settings(tmp_path, prm_alpha=0.25, memorization_max_rows=None))
    again = PRMDPOConfig(**{k: v for k, v in json.loads(args.to_json_string()).items() if k in args.__dict__})
    assert (again.prm_alpha, again.memorization_max_rows, again.optim) == (0.25, None, args.optim)


@pytest.mark.parametrize(
    "trainer_class, args", [(PRMDPOTrainer, DPOConfig), (PRMDPOTrainer, TrainingArguments), (PRMSFTTrainer, DPOConfig)]
)
def test_another_config_raises(trainer_class, args, tmp_path):
    args = args(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(
        TypeError, match=f"`args` is a `{type(args).__name__}`: pass a `{trainer_class.__name__[:6]}Conf"
    ):
        trainer_class(make_model(), args=args, train_dataset=TRAIN, processing_class=make_tokenizer())


@pytest.mark.parametrize("optim", [TrainingArguments.optim, "sgd"])
@pytest.mark.parametrize("config", [TrainingArguments, SFTConfig])
def test_sft_takes_the_configs_that_trls_trainer_takes(config, optim, tmp_path):
    """All values are kept; an optimizer that was not named is PRM."""
    changed = {"eos_token": "<eos>"} if config is SFTConfig else {}
    args = config(**settings(tmp_path, optim=optim, hub_token="token", max_steps=1, eval_strategy="steps", **changed))
    arguments = {"train_dataset": SENTENCES, "eval_dataset": SENTENCES, "processing_class": make_tokenizer()}
    trainer = PRMSFTTrainer(make_model(), args, **arguments)
    assert trainer.trains_with_prm == trainer.args.drift_metrics == (optim != "sgd")
    for field in dataclasses.fields(args):
        if field.name != "optim":
            assert getattr(trainer.args, field.name) == getattr(args, field.name), field.name
    trainer.train()
    assert isinstance(trainer.innermost_optimizer(), torch.optim.SGD if optim == "sgd" else PRM)
