"""`optim_args`, as `"reduction=per_row,relative_eps=10"`, and the flags beside it, as arguments of PRM.

transformers need not be installed: the arguments are read by their names.
"""

from typing import Any

from torch import zeros

from .._names import did_you_mean
from ..optim import PRM
from ..optim.hyperparameters import NAMES


# Hyperparameters of PRM that are arguments of transformers: the names that these have there.
FLAGS = {
    "lr": "learning_rate",
    "betas": "adam_beta1` and `adam_beta2",
    "eps": "adam_epsilon",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}
_WORDS = {"true": True, "false": False, "none": None}


def optimizer_cls_and_kwargs(args: Any) -> tuple[type[PRM], dict[str, Any]]:
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
        PRM([zeros(1, requires_grad=True)], **settings)
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
