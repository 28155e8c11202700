"""The command that makes the runs of a comparison, and what to add to it for more seeds, rates or methods."""

from __future__ import annotations

import shlex
from typing import Any

from ..runs.methods import CONTROL
from .comparison import Comparison
from .rows import format_rate


_PROGRAMS = {"preferences": "prm-hf dpo", "sft": "prm-hf sft"}
# Options of the data and the training that `run.json` has under other names, or not under a name of their own.
_OPTIONS = {
    "train_split": "--dataset_train_split",
    "test_split": "--dataset_test_split",
    "effective_batch_size": "--per_device_train_batch_size",
    **{
        name: f"--{name}"
        for name in ("num_train_epochs", "max_steps", "max_length", "beta", "lr_scheduler_type", "warmup_steps")
    },
    "weight_decay": "--weight_decay",
    "model_use_peft": "--use_peft",
}
_UNSET = (None, False, -1, -1.0)


def options(**changes: list[Any]) -> str:
    """What to add to a command for other values of some options, of which the last ones count; empty without any."""
    return shlex.join(word for name, values in changes.items() for word in (f"--{name}", *map(str, values)))


def command(comparison: Comparison, **changes: list[Any]) -> str:
    """The command that makes these runs, on one device; empty if the runs are not all `prm-hf`'s, of one program.

    It is that of the latest run. Runs of version 0.1 did not record it, and it is made of their settings.

    Args:
        changes: other values of `methods`, `learning_rates`, `prm_learning_rates` or `seeds`.
    """
    runs = comparison.runs
    if recorded := max(runs, key=lambda run: run.info.get("started", "")).info.get("command"):
        return _changed(shlex.split(recorded), changes)
    task = runs[0].info.get("task", "preferences")
    if task not in _PROGRAMS or any(run.source != "prm_hf" for run in runs):
        return ""
    lists = {**_lists(comparison), **changes}
    info, settings = runs[0].info, runs[0].settings
    words = [_PROGRAMS[task]]
    if info.get("dataset", "built-in") != "built-in":
        words += ["--dataset_name", info["dataset"], "--model_name_or_path", info.get("model")]
        for key, option in _OPTIONS.items():
            value = settings.get(key)
            if value is True:
                words.append(option)
            elif value not in _UNSET and isinstance(value, str | int | float):
                words += [option, value]
    elif isinstance(settings.get("max_steps"), int) and settings["max_steps"] > 0:
        words += ["--max_steps", settings["max_steps"]]
    if isinstance(info.get("noise_rate"), int | float):
        words += ["--noise_rate", info["noise_rate"]]
    for name, values in lists.items():
        words += [f"--{name}", *values] if values else []
    words += ["--output_dir", runs[0].path.parent]
    return " ".join(
        [words[0], *(shlex.quote(f"{word:g}" if isinstance(word, float) else str(word)) for word in words[1:])]
    )


def _changed(words: list[str], changes: dict[str, list[Any]]) -> str:
    """A command with other values of some options, without the old ones."""
    kept, is_old = [], False
    for word in words:
        if word.startswith("--"):
            is_old = word.partition("=")[0].removeprefix("--") in changes
        kept += [] if is_old else [word]
    return " ".join(filter(None, (shlex.join(kept), options(**changes))))


def _lists(comparison: Comparison) -> dict[str, list[Any]]:
    """The values of the options that say which runs there are."""
    rows = [row for row in comparison.rows if row.group != CONTROL and row.learning_rate is not None]
    rates = {
        mask: sorted({row.learning_rate for row in rows if row.kind.has_mask == mask}, key=float)
        for mask in (False, True)
    }
    return {
        "methods": list(dict.fromkeys(row.method for row in comparison.rows)),
        "learning_rates": list(map(format_rate, rates[False] or rates[True])),
        "prm_learning_rates": list(map(format_rate, rates[True] or rates[False])),
        "seeds": sorted({run.seed for row in comparison.rows for run in row.runs if run.seed is not None}),
    }


def more_seeds(comparison: Comparison, n: int = 5) -> list[int]:
    """The seeds that there are, and others up to `n`."""
    seeds = _lists(comparison)["seeds"]
    return [*seeds, *[seed for seed in range(n + len(seeds)) if seed not in seeds]][: max(n, len(seeds))]


def wider_rates(rates: list[float]) -> list[str]:
    """Learning rates with one more at each end, as far apart as the others are: threefold where there is one."""
    rates = sorted(rates)
    low, high = (rates[1] / rates[0], rates[-1] / rates[-2]) if len(rates) > 1 else (3.0, 3.0)
    return list(map(format_rate, [rates[0] / low, *rates, rates[-1] * high]))
