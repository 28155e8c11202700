"""`optim="prm"` in every Trainer of transformers, with `optim_args` as `"reduction=per_row,relative_eps=10"`.

transformers has no public way to add an optimizer. What is extended here are the two places where it keeps its own.
"""

from typing import Any

import torch
import transformers
import transformers.trainer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from .._names import did_you_mean
from ..optim import PRM
from ..optim.hyperparameters import NAMES
from ..trainers.callbacks import PRMCallback


NAME = "prm"
# Hyperparameters of PRM that are arguments of transformers: the names that these have there.
FLAGS = {
    "lr": "learning_rate",
    "betas": "adam_beta1` and `adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}
_WORDS = {"true": True, "false": False, "none": None}


class OptimCallback(PRMCallback):
    """[`PRMCallback`] for all Trainers of a process: it does nothing where `optim` is not the name registered here."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if _is_asked_for(args):
            cls, settings = optimizer_cls_and_kwargs(args)
            cls([torch.zeros(1, requires_grad=True)], **settings)

    def on_train_begin(self, args: TrainingArguments, *others, **kwargs) -> None:
        if _is_asked_for(args):
            super().on_train_begin(args, *others, **kwargs)

    def on_step_end(self, args: TrainingArguments, *others, **kwargs) -> None:
        if _is_asked_for(args):
            super().on_step_end(args, *others, **kwargs)

    def on_log(self, args: TrainingArguments, *others, **kwargs) -> None:
        if _is_asked_for(args):
            super().on_log(args, *others, **kwargs)


def register() -> None:
    """Lets `TrainingArguments`, `HfArgumentParser` and every Trainer of this process know the optimizer `"prm"`.

    Call it before arguments are parsed. Each Trainer with `optim="prm"` then has [`OptimCallback`] too. A second call
    changes nothing.

    Raises:
        ImportError: this version of transformers keeps its optimizers elsewhere.
    """
    if NAME in OptimizerNames._value2member_map_:
        return
    handlers = getattr(transformers.trainer, "_OPTIMIZER_HANDLERS", None)
    callbacks = getattr(transformers.trainer, "DEFAULT_CALLBACKS", None)
    if handlers is None or callbacks is None:
        raise ImportError(
            f'`optim="prm"` cannot be registered in transformers {transformers.__version__}, which keeps its '
            "optimizers or callbacks in other places than 5.4 to 5.23. Pass PRM as "
            "`Trainer(optimizer_cls_and_kwargs=(PRM, {...}))`, or use `PRMDPOTrainer` and `PRMSFTTrainer`."
        )
    handlers[_new_member()] = lambda context: optimizer_cls_and_kwargs(context.args)
    callbacks.append(OptimCallback)


def optimizer_cls_and_kwargs(args: TrainingArguments) -> tuple[type[PRM], dict[str, Any]]:
    """[`PRM`] and the keyword arguments that `args` stand for, as `Trainer(optimizer_cls_and_kwargs=…)` takes them.

    Args:
        args (`TrainingArguments`): `learning_rate`, `adam_beta1`, `adam_beta2` and `adam_epsilon` are taken from them,
            with `relative_eps` also `max_grad_norm`, and all other hyperparameters from `optim_args`.

    Raises:
        ValueError: `optim_args` names what PRM does not know, or what has a flag of its own; a value is out of its
            range.
    """
    settings = {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    settings |= _parse(args.optim_args)
    if settings.get("relative_eps") is not None:
        settings["max_grad_norm"] = args.max_grad_norm
    try:
        PRM([torch.zeros(1, requires_grad=True)], **settings)
    except ValueError as error:
        raise ValueError(f"{error} PRM was made from `optim_args={args.optim_args!r}` and the flags.") from error
    return PRM, settings


def _parse(optim_args: str | None) -> dict[str, Any]:
    """The hyperparameters in `"name=value,name=value"`. PRM itself checks the values."""
    settings = {}
    for entry in filter(None, (optim_args or "").replace(" ", "").split(",")):
        name, equals, text = entry.partition("=")
        if not equals or name not in NAMES:
            known = ", ".join(known for known in NAMES if known not in FLAGS)
            raise ValueError(
                f"`optim_args` has {entry!r}, which is no hyperparameter of PRM: write `name=value`, with one of "
                f"{known}.{did_you_mean(name, NAMES)}"
            )
        if name in FLAGS:
            raise ValueError(f"`optim_args` has {entry!r}, which has an argument of its own: set `{FLAGS[name]}`.")
        settings[name] = _value(text)
    return settings


def _value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            pass
    return text


def _new_member() -> OptimizerNames:
    """Adds `OptimizerNames.PRM`. An enum has no way to do that; these are the tables that its metaclass fills."""
    member = str.__new__(OptimizerNames, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    member.__objclass__, member._sort_order_ = OptimizerNames, len(OptimizerNames)
    # A process that has not registered the name learns it when it loads the pickle, as a worker or `training_args.bin`
    member.__reduce_ex__ = lambda protocol: (_member, ())
    setattr(OptimizerNames, member._name_, member)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[NAME] = member
    return member


def _member() -> OptimizerNames:
    register()
    return OptimizerNames(NAME)


def _is_asked_for(args: TrainingArguments) -> bool:
    """Whether `optim` is the name registered here. Our own configurations have it as plain text, and other checks."""
    return isinstance(args.optim, OptimizerNames) and args.optim == NAME
