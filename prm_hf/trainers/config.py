"""The settings of a run with PRM, as dataclass fields: command-line flags and YAML keys through `trl.TrlParser`."""

import argparse
import math
import re
import textwrap
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import DPOConfig, SFTConfig
from trl.trainer.utils import get_config_model_id

from .._names import warn_renamed
from ..optim import PRM
from ..sharding import ShardingPath
from ..sharding.deepspeed import check_config
from .checks import check_losses, check_names, check_numbers, check_output_dir
from .presets import preset_note, with_preset


# Old names of fields: accepted as flags, YAML keys, keyword arguments and in assignments, but never read.
RENAMED = {
    "optimizer_name": "optim",
    "prm_rho": "prm_variance_beta",
    "prm_warmup_steps": "prm_mask_warmup_steps",
    "memorization_max_pairs": "memorization_max_rows",
    "no_drift_metrics": "drift_metrics",
}
_DEFAULTS = {f.name: f.default for f in fields(TrainingArguments)}
# Metrics of which less is better; for transformers these are losses alone
SMALLER_IS_BETTER = re.compile(
    r"(drift/.*|memorization/(corrupted_fit|flipped_fit|gap)|rewards/(ties|rejected)|logps/rejected|entropy)$"
)
LARGER_IS_BETTER = re.compile(r"(memorization/corrupted_loss|suspects/.*)$")


def _old_name() -> Any:
    return field(default=..., repr=False, compare=False, metadata={"help": argparse.SUPPRESS})


def with_help(config: type) -> type:
    """Gives each field of a dataclass the `help` of its flag: what the class' docstring says of it."""
    entry = r"^        (\w+) \(.*\):\n((?:            .*(?:\n|$)|\n(?=            ))+)"
    for name, text in re.findall(entry, config.__doc__, re.MULTILINE):
        explained = config.__dataclass_fields__[name]
        text = " ".join(textwrap.dedent(text).split()).replace("%", "%%")
        explained.metadata = MappingProxyType({**explained.metadata, "help": text})
    return config


@with_help
@dataclass
class PRMArguments:
    """
    Arguments of the PRM optimizer and of the drift metrics, for use beside those of a trainer.

    The learning rate, betas, epsilon and weight decay are `TrainingArguments`' own: `learning_rate`, `adam_beta1`,
    `adam_beta2`, `adam_epsilon`, `weight_decay`.

    Parameters:
        optim (`str`, *optional*, defaults to `"prm"`):
            `"prm"`, or an optimizer of [`~transformers.TrainingArguments`], as `"adamw_torch"`, to train the control
            with the same script: the `prm_*` arguments then have no effect.
        relative_eps (`float`, *optional*):
            Adam's ε relative to the root mean square of the clipped gradient, in place of `adam_epsilon`: ε is
            `relative_eps * max_grad_norm / sqrt(d)`, with d the number of trained parameters over all processes, and
            the step is `1 + relative_eps` times as long, so that it is about as long as AdamW's at `learning_rate`.
            For `optim="adamw_torch"` and its kin too.
        prm_preset (`str`, *optional*):
            `"noisy_labels"` for the setting that the evidence supports where labels are wrong: `prm_reduction`
            `"per_row"`, `prm_estimator` `"debiased"` and `prm_signal_beta` 0.98, in full fine-tuning with
            `relative_eps` 10. What it sets is logged once.
        prm_mask (`str`, *optional*, defaults to `"snr"`):
            Mask: `"snr"`, `"soft"`, `"hard"`, or `"none"` for plain AdamW computed by PRM.
        prm_reduction (`str`, *optional*, defaults to `"per_row"`):
            `"per_row"` for one mask value an output row, which costs no more memory than AdamW and a number a row (not
            under FSDP1); `"per_tensor"` for one a parameter tensor, at no cost; or
            `"per_param"` for one a scalar parameter, which costs half as much again.
        prm_softness (`float`, *optional*, defaults to `1.0`):
            λ, how strongly noise closes the mask.
        prm_estimator (`str`, *optional*, defaults to `"debiased"`):
            How signal and noise are told apart: `"ema"` (the paper) or `"debiased"`, which takes the noise that is
            left in the averaged gradient off the signal.
        prm_signal_beta (`float`, *optional*):
            Decay rate, in [0, 1), of a gradient average of its own from which the signal is estimated, which costs
            half as much memory again as AdamW's state (4 bytes a parameter). For `prm_reduction="per_row"` with
            `prm_estimator="debiased"`; 0.98 is what has been measured. By default the signal is estimated from the
            average that the step takes.
        prm_variance_beta (`float`, *optional*, defaults to `0.99`):
            Decay rate of the gradient's running variance, in [0, 1).
        prm_boundary (`str`, *optional*, defaults to `"batch"`):
            α, the weight of the noise: `"batch"` for 1, `"empirical"` for b/(n-b), where the examples of an optimizer
            step b (over all processes and accumulation steps) and the size n of the training set are filled in from
            the run.
        prm_alpha (`float`, *optional*):
            α as a number. Overrides `prm_boundary`.
        prm_mask_eps (`float`, *optional*):
            ε of the mask's denominator. The default is scale-free; `1e-8` is the published behaviour, which closes
            the mask on the small gradients of language models.
        prm_mask_warmup_steps (`int`, *optional*, defaults to `0`):
            Number of first steps that are plain AdamW while the running variance forms.
        prm_mask_min_elements (`int`, *optional*, defaults to `32`):
            Tensors of fewer elements are updated as by AdamW, with the debiased estimator and one mask a row or a
            tensor; 0 masks all tensors.
        prm_state_dtype (`str`, *optional*, defaults to `"float32"`):
            How the moments are kept: `"float32"`; `"bf16"`; or `"8bit"`, where those of embeddings stay in float32.
            Under FSDP1 in float32 alone.

        drift_metrics (`bool`, *optional*):
            Whether to measure how far the policy drifts (for preference pairs also rewards and memorization) at each
            evaluation and at the end of training; by default with `optim="prm"` alone. Nothing is measured without an
            `eval_dataset`. It costs a product of the hidden states, which TRL's evaluation has at hand, with the
            output embedding; a pass over a reference that TRL does not run; and a copy of the trained weights in the
            main process' host memory.
    """

    optim: str = "prm"
    relative_eps: float | None = None
    prm_preset: Literal["noisy_labels"] | None = None
    prm_mask: Literal["snr", "soft", "hard", "none"] = "snr"
    prm_reduction: Literal["per_row", "per_tensor", "per_param"] = "per_row"
    prm_softness: float = 1.0
    prm_estimator: Literal["ema", "debiased"] = "debiased"
    prm_signal_beta: float | None = None
    prm_variance_beta: float = 0.99
    prm_boundary: Literal["batch", "empirical"] = "batch"
    prm_alpha: float | None = None
    prm_mask_eps: float | None = None
    prm_mask_warmup_steps: int = 0
    prm_mask_min_elements: int = 32
    prm_state_dtype: Literal["float32", "bf16", "8bit"] = "float32"
    # The flag may have no value
    drift_metrics: bool | None = field(default=None, metadata={"nargs": "?", "const": True})

    optimizer_name: Literal["prm", "adamw"] = _old_name()
    prm_rho: float = _old_name()
    prm_warmup_steps: int = _old_name()
    no_drift_metrics: bool | None = _old_name()

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in RENAMED:
            super().__setattr__(name, value)
        elif value is not ...:
            self._set_by_old_name(name, value)

    def _set_by_old_name(self, name: str, value: Any) -> None:
        if name == "no_drift_metrics":
            value = not value
        elif name == "optimizer_name" and value == "adamw":
            value = _DEFAULTS["optim"] if self.optim == "prm" else self.optim
        elif name == "optimizer_name" and (value != "prm" or self.optim not in ("prm", _DEFAULTS["optim"])):
            raise ValueError(f"`optimizer_name={value!r}` contradicts `optim={self.optim!r}`: set `optim` alone.")
        warn_renamed(name, RENAMED[name], stacklevel=5)
        setattr(self, RENAMED[name], value)

    def __new__(cls, *args, **kwargs):
        check_names(cls, kwargs)
        return super().__new__(cls)

    def __post_init__(self):
        check_numbers(self)
        if self.drift_metrics is None:
            self.drift_metrics = self.optim == "prm"
        if isinstance(self, TrainingArguments):
            check_output_dir("trainer_output" if self.output_dir is None else self.output_dir)
            chosen = self.optim
            if chosen == "prm":  # which transformers does not know
                self.optim = _DEFAULTS["optim"]
            if self.greater_is_better is None and self.metric_for_best_model is not None:
                self.greater_is_better = greater_is_better(self.metric_for_best_model)
            super().__post_init__()
            self.optim = chosen if chosen == "prm" else self.optim
        check_optimizer(self)

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in RENAMED}


@with_help
@dataclass
class PRMDPOConfig(PRMArguments, DPOConfig):
    """
    Configuration of [`PRMDPOTrainer`]: the arguments of [`PRMArguments`] and all of TRL's [`~trl.DPOConfig`].

    With `precompute_ref_log_probs=True` and no reference model at hand, `drift/kl` is not measured. With `ld_alpha`,
    the measured rewards are those of the plain log-probabilities.

    Parameters:
        memorization_max_rows (`int`, *optional*, defaults to `512`):
            Number of training pairs on which memorization is measured, if the training set has a column `flipped`.
            The pairs are spread evenly over the training set and are the same at each evaluation. `None` for all.
            Each costs about half as much as training on it once.
    """

    memorization_max_rows: int | None = 512

    memorization_max_pairs: int | None = _old_name()

    def __post_init__(self):
        super().__post_init__()
        if self.memorization_max_rows is not None and self.memorization_max_rows < 1:
            raise ValueError(
                f"`memorization_max_rows` is {self.memorization_max_rows!r}: set it to at least 1, or to None for "
                "all; or set `drift_metrics=False`."
            )
        if self.drift_metrics and self.precompute_ref_log_probs and self.ld_alpha is not None:
            raise ValueError(
                f"`drift_metrics` can't be computed from the log-probabilities of `precompute_ref_log_probs=True` "
                f"with `ld_alpha={self.ld_alpha}`. Set `drift_metrics=False` or `precompute_ref_log_probs=False`."
            )


@dataclass
class PRMSFTConfig(PRMArguments, SFTConfig):
    """Configuration of [`PRMSFTTrainer`]: the arguments of [`PRMArguments`] and all of [`~trl.SFTConfig`]."""


def greater_is_better(metric: str) -> bool | None:
    """Whether more of a metric is better; None if transformers knows. The name may carry the prefix of its split."""
    name = re.sub(r"^eval_(?:.*_)?(?=(?:drift|memorization|suspects|rewards|logps)/|entropy$)", "", metric)
    if LARGER_IS_BETTER.match(name):
        return True
    return False if SMALLER_IS_BETTER.match(name) else None


_PRM_NAMES = [
    f.name.removeprefix("prm_")
    for f in fields(PRMArguments)
    if f.name.startswith("prm_") and f.name not in {*RENAMED, "prm_preset"}
]


def check_relative_eps(args: PRMArguments) -> None:
    """Raises ValueError if `relative_eps` is not in its range or contradicts other arguments."""
    relative_eps = args.relative_eps
    if relative_eps is None:
        return
    if isinstance(relative_eps, bool) or not 0 < relative_eps < math.inf:
        raise ValueError(f"`relative_eps` is {relative_eps!r}: set it to a positive finite number, or to None.")
    if not isinstance(args, TrainingArguments):
        return
    if not args.max_grad_norm:
        raise ValueError(f"`relative_eps={relative_eps!r}` and `max_grad_norm` is {args.max_grad_norm!r}: set both.")
    if args.adam_epsilon != _DEFAULTS["adam_epsilon"]:
        both = f"`adam_epsilon={args.adam_epsilon!r}` and `relative_eps={relative_eps!r}`"
        raise ValueError(f"{both} contradict each other: set one of them.")


def scaled_by_relative_eps(args: TrainingArguments, kwargs: dict[str, Any], numel: int) -> dict[str, Any]:
    """`kwargs` of Adam's kin with the eps and learning rate of `args.relative_eps` for `numel` trained parameters."""
    if args.relative_eps is None:
        return kwargs
    if "eps" not in kwargs:
        raise ValueError(
            f"`relative_eps={args.relative_eps!r}` sets Adam's eps, and `optim={OptimizerNames(args.optim).value!r}` "
            "has none: unset one."
        )
    eps = args.relative_eps * args.max_grad_norm / numel**0.5
    return {**kwargs, "eps": eps, "lr": kwargs["lr"] * (1 + args.relative_eps)}


def prm_kwargs(args: PRMArguments) -> dict[str, Any]:
    """The keyword arguments of [`PRM`] that `args` stand for, with those of `TrainingArguments` if it has them.

    With `prm_boundary="empirical"` the run's `batch_size` and `n_dataset` have to be added.
    """
    kwargs = {}
    if isinstance(args, TrainingArguments):
        kwargs = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
        if args.relative_eps is not None:
            kwargs |= {"relative_eps": args.relative_eps, "max_grad_norm": args.max_grad_norm}
    return kwargs | {name: getattr(args, f"prm_{name}") for name in _PRM_NAMES}


def check_optimizer(args: PRMArguments) -> None:
    """Raises before anything is loaded if PRM would refuse its arguments."""
    settings = with_preset(args, is_peft=None) if args.optim == "prm" else args
    check_relative_eps(settings)
    if args.optim != "prm":
        return
    if getattr(args, "optim_args", None):
        raise ValueError(
            f"`optim_args={args.optim_args!r}` is not for `optim='prm'`: use those that start with `prm_`."
        )
    kwargs = prm_kwargs(settings)
    if args.prm_boundary == "empirical":
        kwargs |= {"batch_size": 1, "n_dataset": 2}
    if isinstance(args, TrainingArguments):
        kwargs["weight_decay"] = args.weight_decay
    try:
        PRM([torch.zeros(1, requires_grad=True)], **kwargs)
    except ValueError as error:
        raise ValueError(f"{_by_field_name(str(error))} {preset_note(args, is_peft=None)}".rstrip()) from error


def _by_field_name(message: str) -> str:
    """An error of PRM's, about the field that the argument comes from."""
    names = {"lr": "learning_rate", "betas[0]": "adam_beta1", "betas[1]": "adam_beta2", "eps": "adam_epsilon"}
    names |= {name: f"prm_{name}" for name in _PRM_NAMES}
    pattern = r"(?<![\w`])(" + "|".join(map(re.escape, names)) + r")(?==)"
    return re.sub(pattern, lambda found: names[found[0]], message)


def check_sharding(args: PRMArguments, path: ShardingPath) -> None:
    """Raises if PRM does not run as `args` say where `path` says how tensors are held in parts."""
    try:
        path.check(with_preset(args, is_peft=None).prm_reduction, args.prm_state_dtype)
    except ValueError as error:
        raise ValueError(f"{error} {preset_note(args, is_peft=None)}".rstrip()) from error


def check_deepspeed_config(args: TrainingArguments) -> None:
    """Raises if under the DeepSpeed configuration of the run the optimizer would not be PRM, or not exact."""
    config = {} if args.deepspeed_plugin is None else args.deepspeed_plugin.deepspeed_config
    stage = (config.get("zero_optimization") or {}).get("stage", 0)
    if args.optim == "prm":
        try:
            check_config(config)
            if (path := ShardingPath.of_zero(stage)) is not None:
                check_sharding(args, path)
        except ValueError as error:
            raise ValueError(f"{error} Or set `optim='adamw_torch'`.") from error
    elif args.relative_eps is not None and "optimizer" in config:
        raise ValueError("`relative_eps` does not reach DeepSpeed's section `optimizer`: remove the section.")


def checked_config(args: Any, config: type, model: "str | PreTrainedModel", task: str) -> Any:
    """The configuration that a trainer was given, or the default one; raises where the trainer can't use it."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        args = config(f"{name.split('/')[-1]}-{task}")
    if not isinstance(args, config):
        raise TypeError(f"`args` is a `{type(args).__name__}`: pass a `{config.__name__}`, which has all its fields.")
    if isinstance(args, DPOConfig):
        check_losses(args.loss_type)
    check_deepspeed_config(args)
    return args
