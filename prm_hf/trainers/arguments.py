"""The settings of a run with PRM, as dataclass fields: command-line flags and YAML keys through `trl.TrlParser`."""

import copy
import inspect
import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from ..optim import PRM
from ..optim.masks import BOUNDARIES, ESTIMATORS, MASKS, REDUCTIONS
from ..optim.validation import STATE_DTYPES, check_held_in_parts
from ..sharding.deepspeed import check_config


OPTIMIZER_NAMES = ("prm", "adamw")
# What the evidence supports, by the preset's name; with LoRA the larger eps costs accuracy.
PRESETS = {
    "noisy_labels": {
        "prm_reduction": "per_row",
        "prm_estimator": "debiased",
        "prm_signal_beta": 0.98,
        "relative_eps": 10.0,
    }
}
WITH_LORA = {"noisy_labels": {"relative_eps": None}}


@dataclass
class PRMArguments:
    """
    Arguments of the PRM optimizer and of the drift metrics, for use beside those of a trainer.

    The learning rate, betas, epsilon and weight decay are `TrainingArguments`' own: `learning_rate`, `adam_beta1`,
    `adam_beta2`, `adam_epsilon`, `weight_decay`.

    Parameters:
        > Parameters that control the optimizer

        optimizer_name (`str`, *optional*, defaults to `"prm"`):
            `"prm"`, or `"adamw"` to train the control with the same script: then `optim` chooses the optimizer as in
            any other trainer, and the `prm_*` arguments have no effect.
        relative_eps (`float`, *optional*):
            Adam's ε relative to the root mean square of the clipped gradient, in place of `adam_epsilon`: ε is
            `relative_eps * max_grad_norm / sqrt(d)`, with d the number of trained parameters over all processes, and
            the step is `1 + relative_eps` times as long, so that it is about as long as AdamW's at `learning_rate`.
            For `optimizer_name="adamw"` too.
        prm_preset (`str`, *optional*):
            `"noisy_labels"` for the setting that the evidence supports where labels are wrong: `prm_reduction`
            `"per_row"`, `prm_estimator` `"debiased"` and `prm_signal_beta` 0.98, in full fine-tuning with
            `relative_eps` 10. What it sets is logged once.
        prm_mask (`str`, *optional*, defaults to `"snr"`):
            Mask: `"snr"`, `"soft"`, `"hard"`, or `"none"` for plain AdamW computed by PRM.
        prm_reduction (`str`, *optional*, defaults to `"per_row"`):
            `"per_row"` for one mask value an output row, which costs no more memory than AdamW and a number a row (not
            under FSDP1, nor with 8-bit state); `"per_tensor"` for one a parameter tensor, at no cost; or
            `"per_param"` for one a scalar parameter, which costs half as much again.
        prm_softness (`float`, *optional*, defaults to `1.0`):
            λ, how strongly noise closes the mask.
        prm_estimator (`str`, *optional*, defaults to `"debiased"`):
            How signal and noise are told apart: `"ema"` (the paper, and [`PRM`]'s default) or `"debiased"`, which
            takes the noise that is left in the averaged gradient off the signal.
        prm_signal_beta (`float`, *optional*):
            Decay rate, in [0, 1), of a gradient average of its own from which the signal is estimated, which costs
            half as much memory again as AdamW's state (4 bytes a parameter). For `prm_reduction="per_row"` with
            `prm_estimator="debiased"`; 0.98 is what has been measured. By default the signal is estimated from the
            average that the step takes.
        prm_rho (`float`, *optional*, defaults to `0.99`):
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
        prm_warmup_steps (`int`, *optional*, defaults to `0`):
            Number of first steps that are plain AdamW while the running variance forms.
        prm_state_dtype (`str`, *optional*, defaults to `"float32"`):
            How the moments are kept: `"float32"`; `"bf16"` for the first moment in bfloat16 (not under DeepSpeed ZeRO
            and FSDP1); or `"8bit"` for both in 8 bits (on one process and under DDP; needs torchao).

        > Parameters that control the metrics

        drift_metrics (`bool`, *optional*, defaults to `True`):
            Whether to measure how far the policy drifts (for preference pairs also rewards and memorization) at each
            evaluation and at the end of training. Nothing is measured without an `eval_dataset`. It costs a product
            of the hidden states, which TRL's evaluation has at hand, with the output embedding; a pass over a
            reference that TRL does not run; and a copy of the trained weights in the main process' host memory.
    """

    optimizer_name: str = field(
        default="prm",
        metadata={
            "help": "Optimizer: `'prm'`, or `'adamw'` to train the control with the same script; then `optim` chooses "
            "the optimizer, and the `prm_*` arguments have no effect.",
            "choices": list(OPTIMIZER_NAMES),
        },
    )
    relative_eps: float | None = field(
        default=None,
        metadata={
            "help": "Adam's epsilon relative to the root mean square of the clipped gradient, in place of "
            "`adam_epsilon`; the step is `1 + relative_eps` times as long, so that it is about as long as AdamW's. "
            "For `optimizer_name='adamw'` too."
        },
    )
    prm_preset: Literal["noisy_labels"] | None = field(
        default=None,
        metadata={
            "help": "`'noisy_labels'` for the setting that the evidence supports where labels are wrong: per_row, "
            "debiased and `prm_signal_beta=0.98`, in full fine-tuning with `relative_eps=10`."
        },
    )
    prm_mask: str = field(
        default="snr",
        metadata={
            "help": "Mask of PRM: `'snr'`, `'soft'`, `'hard'`, or `'none'` for plain AdamW computed by PRM.",
            "choices": list(MASKS),
        },
    )
    prm_reduction: str = field(
        default="per_row",
        metadata={
            "help": "`'per_row'` for one mask value an output row, which costs no more memory than AdamW and a number "
            "a row (not under FSDP1, nor with 8-bit state); `'per_tensor'` for one a parameter tensor, at no cost; or "
            "`'per_param'` for one a scalar parameter, which costs half as much again.",
            "choices": list(REDUCTIONS),
        },
    )
    prm_softness: float = field(
        default=1.0,
        metadata={"help": "Softness (lambda) of the mask: how strongly noise closes it."},
    )
    prm_estimator: str = field(
        default="debiased",
        metadata={
            "help": "How signal and noise are told apart: `'ema'` (the paper), or `'debiased'`, which takes the noise "
            "that is left in the averaged gradient off the signal.",
            "choices": list(ESTIMATORS),
        },
    )
    prm_signal_beta: float | None = field(
        default=None,
        metadata={
            "help": "Decay rate, in [0, 1), of a gradient average of its own from which the signal is estimated, "
            "which costs half as much memory again as AdamW's state (4 bytes a parameter). For "
            "`prm_reduction='per_row'` with `prm_estimator='debiased'`; 0.98 is what has been measured."
        },
    )
    prm_rho: float = field(
        default=0.99,
        metadata={"help": "Decay rate of the gradient's running variance, in [0, 1)."},
    )
    prm_boundary: str = field(
        default="batch",
        metadata={
            "help": "Weight (alpha) of the noise: `'batch'` for 1, `'empirical'` for b/(n-b), with the examples b of "
            "an optimizer step and the size n of the training set filled in from the run.",
            "choices": list(BOUNDARIES),
        },
    )
    prm_alpha: float | None = field(
        default=None,
        metadata={"help": "Weight (alpha) of the noise as a number. Overrides `prm_boundary`."},
    )
    prm_mask_eps: float | None = field(
        default=None,
        metadata={
            "help": "Epsilon of the mask's denominator. The default is scale-free; 1e-8 is the published behaviour, "
            "which closes the mask on the small gradients of language models."
        },
    )
    prm_warmup_steps: int = field(
        default=0,
        metadata={"help": "Number of first steps that are plain AdamW while the running variance forms."},
    )
    prm_state_dtype: str = field(
        default="float32",
        metadata={
            "help": "How the moments are kept: `'float32'`; `'bf16'` for the first moment in bfloat16 (not under "
            "DeepSpeed ZeRO and FSDP1); or `'8bit'` for both in 8 bits (on one process and under DDP; needs torchao).",
            "choices": list(STATE_DTYPES),
        },
    )
    drift_metrics: bool = field(
        default=True,
        metadata={
            "help": "Whether to measure how far the policy drifts (for preference pairs also rewards and "
            "memorization) at each evaluation and at the end of training, if there is an `eval_dataset`."
        },
    )

    def __post_init__(self):
        for name, valid in (
            ("optimizer_name", OPTIMIZER_NAMES),
            ("prm_mask", MASKS),
            ("prm_reduction", REDUCTIONS),
            ("prm_estimator", ESTIMATORS),
            ("prm_boundary", BOUNDARIES),
            ("prm_state_dtype", STATE_DTYPES),
        ):
            value = getattr(self, name)
            if value not in valid:
                raise ValueError(f"`{name}` is {value!r}: set it to one of {', '.join(map(repr, valid))}.")
        for name in ("prm_softness", "prm_alpha", "prm_mask_eps", "prm_warmup_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"`{name}` is {value!r}: set it to a finite number that is not negative.")
        if not 0 <= self.prm_rho < 1:
            raise ValueError(f"`prm_rho` is {self.prm_rho!r}: set it to a number in [0, 1).")
        if self.prm_signal_beta is not None and not 0 <= self.prm_signal_beta < 1:
            raise ValueError(
                f"`prm_signal_beta` is {self.prm_signal_beta!r}: set it to a number in [0, 1), or to None."
            )


@dataclass
class PRMDPOConfig(PRMArguments, DPOConfig):
    """
    Configuration of [`PRMDPOTrainer`]: the arguments of [`PRMArguments`] and all of TRL's [`~trl.DPOConfig`].

    With `precompute_ref_log_probs=True` and no reference model at hand, `drift/kl` is not measured. With `ld_alpha`,
    the measured rewards are those of the plain log-probabilities.

    Parameters:
        memorization_max_pairs (`int`, *optional*, defaults to `512`):
            Number of training pairs on which memorization is measured, if the training set has a column `flipped`.
            The pairs are spread evenly over the training set and are the same at each evaluation. `None` for all.
            Each costs about half as much as training on it once.
    """

    memorization_max_pairs: int | None = field(
        default=512,
        metadata={
            "help": "Number of training pairs, spread evenly over the training set, on which memorization is measured "
            "if the training set has a column `flipped`. `None` for all."
        },
    )

    def __post_init__(self):
        PRMArguments.__post_init__(self)
        if self.memorization_max_pairs is not None and self.memorization_max_pairs < 1:
            raise ValueError(
                f"`memorization_max_pairs` is {self.memorization_max_pairs!r}: set it to at least 1, or to None for "
                "all training pairs; `drift_metrics=False` turns the measurement off."
            )
        DPOConfig.__post_init__(self)
        check_optimizer(self)
        if self.drift_metrics and self.precompute_ref_log_probs and self.ld_alpha is not None:
            raise ValueError(
                f"`precompute_ref_log_probs=True` with `ld_alpha={self.ld_alpha}` stores reference log-probabilities "
                "that are weighted by `ld_alpha`, from which `drift_metrics` can't be computed. Set "
                "`drift_metrics=False` or `precompute_ref_log_probs=False`."
            )


@dataclass
class PRMSFTConfig(PRMArguments, SFTConfig):
    """
    Configuration of [`PRMSFTTrainer`]: the arguments of [`PRMArguments`] and all of TRL's [`~trl.SFTConfig`].
    """

    def __post_init__(self):
        PRMArguments.__post_init__(self)
        SFTConfig.__post_init__(self)
        check_optimizer(self)


def preset_values(args: PRMArguments, is_peft: bool | None) -> dict[str, Any]:
    """The fields that `prm_preset` sets for a PEFT model or for any other one; for None, those that it sets for both.

    Raises:
        ValueError: a field was set to something else than its default and the preset's value.
    """
    if args.prm_preset is None:
        return {}
    if args.prm_preset not in PRESETS:
        raise ValueError(
            f"`prm_preset` is {args.prm_preset!r}: set it to one of {', '.join(map(repr, PRESETS))}, or to None."
        )
    others = WITH_LORA[args.prm_preset]
    values = {**PRESETS[args.prm_preset], **others}
    if not is_peft:
        values = {k: v for k, v in PRESETS[args.prm_preset].items() if is_peft is not None or k not in others}
    defaults = {f.name: f.default for f in fields(PRMArguments)}
    for name, value in values.items():
        if getattr(args, name) not in (defaults[name], value):
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` and `prm_preset={args.prm_preset!r}`, which sets it to {value!r}"
                f"{' with LoRA' if is_peft else ''}, contradict each other. Leave `{name}` unset, or set the other "
                f"fields of the preset yourself instead of `prm_preset`: {_listed(values)}."
            )
    return values


def with_preset(args: PRMArguments, is_peft: bool | None) -> PRMArguments:
    """A copy of `args` with the [`preset_values`]; the user's own stays as it is, for other trainers."""
    result = copy.copy(args)
    for name, value in preset_values(args, is_peft).items():
        setattr(result, name, value)
    check_relative_eps(result)
    return result


def preset_note(args: PRMArguments, is_peft: bool | None) -> str:
    """A sentence about what the preset sets; empty without a preset."""
    values = preset_values(args, is_peft)
    return f"`prm_preset={args.prm_preset!r}` sets {_listed(values)}." if values else ""


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in values.items())


def check_relative_eps(args: TrainingArguments) -> None:
    relative_eps = args.relative_eps
    if relative_eps is None:
        return
    if isinstance(relative_eps, bool) or not 0 < relative_eps < math.inf:
        raise ValueError(
            f"`relative_eps` is {relative_eps!r}: set it to a positive finite number, or to None for `adam_epsilon`."
        )
    if not args.max_grad_norm:
        raise ValueError(
            f"`relative_eps={relative_eps!r}` is relative to the clipped gradient, and `max_grad_norm` is "
            f"{args.max_grad_norm!r}: set `max_grad_norm` above 0."
        )
    default = next(f.default for f in fields(TrainingArguments) if f.name == "adam_epsilon")
    if args.adam_epsilon != default:
        raise ValueError(
            f"`adam_epsilon={args.adam_epsilon!r}` and `relative_eps={relative_eps!r}` contradict each other: set one "
            "of them."
        )


def scaled_by_relative_eps(args: TrainingArguments, kwargs: dict[str, Any], numel: int) -> dict[str, Any]:
    """The keyword arguments of Adam's kin with the eps and the learning rate that `args.relative_eps` stands for.

    Args:
        numel: Number of trained parameters, over all processes.
    """
    if args.relative_eps is None:
        return kwargs
    if "eps" not in kwargs:
        raise ValueError(
            f"`relative_eps={args.relative_eps!r}` sets Adam's eps, and `optim={args.optim.value!r}` has none: leave "
            "one of them unset."
        )
    eps = args.relative_eps * args.max_grad_norm / numel**0.5
    return {**kwargs, "eps": eps, "lr": kwargs["lr"] * (1 + args.relative_eps)}


# Whether PRM scales its step by itself. Otherwise its arguments are scaled as AdamW's are.
PRM_SCALES = "relative_eps" in inspect.signature(PRM).parameters


def prm_kwargs(args: PRMArguments) -> dict[str, Any]:
    """The keyword arguments of [`PRM`] that `args`, which are also `TrainingArguments`, stand for.

    With `prm_boundary="empirical"` the run's `batch_size` and `n_dataset` have to be added.
    """
    scaling = {"relative_eps": args.relative_eps, "max_grad_norm": args.max_grad_norm}
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        **(scaling if PRM_SCALES and args.relative_eps is not None else {}),
        "mask": args.prm_mask,
        "reduction": args.prm_reduction,
        "softness": args.prm_softness,
        "estimator": args.prm_estimator,
        "signal_beta": args.prm_signal_beta,
        "rho": args.prm_rho,
        "boundary": args.prm_boundary,
        "alpha": args.prm_alpha,
        "mask_eps": args.prm_mask_eps,
        "warmup_steps": args.prm_warmup_steps,
        "state_dtype": args.prm_state_dtype,
    }


def check_optimizer(args: TrainingArguments) -> None:
    """Raises before anything is loaded if PRM would refuse its arguments or another optimizer is asked for."""
    check_relative_eps(args)
    if args.optimizer_name != "prm":
        return
    default = next(f.default for f in fields(TrainingArguments) if f.name == "optim")
    if args.optim != default or args.optim_args:
        name, value = ("optim", args.optim.value) if args.optim != default else ("optim_args", args.optim_args)
        raise ValueError(
            f"`{name}={value!r}` and `optimizer_name='prm'` contradict each other. Leave `{name}` unset to train with "
            "PRM, whose arguments start with `prm_`, or set `optimizer_name='adamw'` to let `optim` choose."
        )
    probed = with_preset(args, is_peft=None)
    sizes = {"batch_size": 1, "n_dataset": 2} if args.prm_boundary == "empirical" else {}
    try:
        PRM([torch.zeros(1, requires_grad=True)], weight_decay=args.weight_decay, **prm_kwargs(probed), **sizes)
    except ValueError as error:
        raise ValueError(
            f"PRM refuses an argument: {error} Its `lr`, `betas` and `eps` are `learning_rate`, `adam_beta1`, "
            "`adam_beta2` and `adam_epsilon`; the others are those that start with `prm_`. "
            f"{preset_note(args, is_peft=None)}".rstrip()
        ) from error


def check_deepspeed_config(args: TrainingArguments) -> None:
    """Raises if under the DeepSpeed configuration of the run the optimizer would not be PRM, or not exact."""
    plugin = args.deepspeed_plugin
    if args.optimizer_name == "prm" and plugin is not None:
        try:
            check_config(plugin.deepspeed_config)
            stage = (plugin.deepspeed_config.get("zero_optimization") or {}).get("stage", 0)
            if stage != 0:
                check_held_in_parts(args.prm_reduction, args.prm_state_dtype, f"DeepSpeed ZeRO-{stage}")
        except ValueError as error:
            note = preset_note(args, is_peft=None)
            raise ValueError(f"{error} Or set `optimizer_name='adamw'`. {note}".rstrip()) from error
    elif args.relative_eps is not None and plugin is not None and "optimizer" in plugin.deepspeed_config:
        raise ValueError(
            "The DeepSpeed configuration has a section `optimizer`, whose eps `relative_eps` does not set. Remove the "
            "section, or leave `relative_eps` unset."
        )
