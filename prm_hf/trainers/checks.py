"""Checks of a training configuration, before transformers, TRL or torch meet what cannot be right."""

import argparse
import functools
import inspect
import math
import os
import types
from collections.abc import Callable
from numbers import Real
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from .._names import did_you_mean, number_in_quotes


# Of TRL's DPO, which looks at the name when it computes the first loss.
LOSSES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)


def _at_least(least: float) -> tuple[Callable[[float], bool], str]:
    return lambda x: least <= x < math.inf, f"it must be a finite number of at least {least}"


_SIZE = (lambda x: x >= 1, "it must be at least 1")
_SEED = (lambda x: 0 <= x < 2**32, "it must be in [0, 2**32)")
# What each number must be, where its type alone does not say so. None is left to the type.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "per_device_train_batch_size": _SIZE,
    "per_device_eval_batch_size": _SIZE,
    "gradient_accumulation_steps": _SIZE,
    "max_length": (lambda x: x >= 1, "it must be at least 1, or None for rows as long as they are"),
    "num_train_epochs": _at_least(0),
    "max_steps": (lambda x: x >= 1 or x == -1, "it must be at least 1, or -1 for `num_train_epochs`"),
    "warmup_steps": _at_least(0),
    "learning_rate": _at_least(0),
    "weight_decay": _at_least(0),
    "max_grad_norm": (lambda x: 0 <= x < math.inf, "it must be a finite number of at least 0; 0 clips nothing"),
    "seed": _SEED,
    "data_seed": _SEED,
    "beta": (lambda x: 0 < x < math.inf, "it must be a finite number above 0"),
    "label_smoothing": (lambda x: x < 0.5, "it must be below 0.5, the share of wrong labels that says nothing"),
}


def check_names(config: type, given: dict[str, Any]) -> None:
    """Raises TypeError for a keyword argument that a configuration does not have."""
    parameters = inspect.signature(config.__init__).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    for name in () if takes_all else given.keys() - parameters.keys():
        fields = config.__dataclass_fields__.items()
        known = [known for known, field in fields if field.metadata.get("help") != argparse.SUPPRESS]
        raise TypeError(
            f"{config.__name__}() got an unexpected keyword argument {name!r}.{did_you_mean(name, known)} "
            f"`help({config.__name__})` lists its arguments."
        )


def check_numbers(args: Any) -> None:
    """Raises ValueError for a number of a configuration that is text, a bool, NaN or out of its range."""
    for name, kinds in _numbers_of(type(args)).items():
        value = getattr(args, name, None)
        is_nan = isinstance(value, float) and math.isnan(value)
        if value is None or value is ... or (type(value) in kinds and not is_nan):
            continue
        if is_nan or not isinstance(value, Real) or isinstance(value, bool) or (float not in kinds and value % 1 != 0):
            wanted = "a number" if float in kinds else "an integer"
            raise ValueError(f"Invalid {name}={value!r}: it must be {wanted}.{number_in_quotes(value)}")
    for name, (holds, words) in _RANGES.items():
        value = getattr(args, name, None)
        if isinstance(value, Real) and not holds(value):
            raise ValueError(f"Invalid {name}={value!r}: {words}.")


def check_losses(names: list[str] | str) -> None:
    """Raises ValueError for a loss that TRL's DPO does not have."""
    for name in [names] if isinstance(names, str) else names:
        if name not in LOSSES:
            raise ValueError(
                f"`loss_type` has {name!r}, and TRL knows {', '.join(LOSSES)}.{did_you_mean(name, LOSSES)}"
            )


def check_output_dir(folder: Any) -> None:
    """Raises ValueError if a run could not write into this folder, which need not exist."""
    if not isinstance(folder, str | os.PathLike) or not str(folder):
        raise ValueError(f"`output_dir` must be the path of a folder, got {folder!r}.")
    path = Path(folder)
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        what = "a file" if there == path else f"in {str(there)!r}, a file"
        raise ValueError(f"`output_dir` is {str(folder)!r}, {what}: name a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` is {str(folder)!r}, and {there} is not writable: name another folder.")


@functools.cache
def _numbers_of(config: type) -> dict[str, set[type]]:
    """The fields of a dataclass that hold numbers, with all types that they may have."""
    found = {}
    for name, hint in get_type_hints(config).items():
        is_union = get_origin(hint) in (Union, types.UnionType)
        kinds = set(get_args(hint) if is_union else (hint,))
        if kinds & {int, float}:
            found[name] = kinds
    return found
