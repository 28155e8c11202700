"""Reading the state of any transformers Trainer, which does not say which method, data and model it was."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .run import Run, UnreadableError, is_number, parse_name
from .schema import ACCURACY, named_metrics


# Of several evaluation splits, the one that the accuracy is read from: held-out pairs with clean labels come first.
SPLITS = ("heldout", "held_out", "clean", "heldout_clean", "test", "validation", "valid", "val", "dev", "eval")


def read_trainer_run(folder: Path, file: Path, state: Any) -> Run:
    """The run of a folder, from a `trainer_state.json` and what it holds.

    Raises:
        UnreadableError: it is not the state of a Trainer.
    """
    log = state.get("log_history") if isinstance(state, dict) else None
    if not isinstance(log, list) or not all(isinstance(entry, dict) for entry in log):
        raise UnreadableError(f"{file} has no log_history: it is not the state of a transformers Trainer.")
    for i, entry in enumerate(log):
        if not is_number(entry.get("step", 0)):
            raise UnreadableError(f"{file}: `step` of entry {i} of log_history is {entry['step']!r}, no number.")
    folder = folder.resolve()
    name = (folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder).name
    method, named_rate, seed = parse_name(name)
    rates = [entry["learning_rate"] for entry in log if is_number(entry.get("learning_rate"))]
    run = Run(file.parent, name, method, max(rates, default=named_rate), seed, source="trainer")
    known = ("global_step", "max_steps", "num_train_epochs")
    run.info = {key: state[key] for key in known if is_number(state.get(key))}
    for entry in log:
        if is_number(entry.get("train_runtime")):
            run.metrics["wall_seconds"] = float(entry["train_runtime"])
    _take_log(run, [entry for entry in log if "train_runtime" not in entry])
    if "global_step" in run.info:
        run.metrics["steps"] = float(run.info["global_step"])
        if run.info.get("max_steps", 0) > run.info["global_step"]:
            run.notes.append(f"it stopped, or was read, at step {state['global_step']} of {state['max_steps']}")
    run.check_numbers()
    return run


def _take_log(run: Run, log: list[dict[str, Any]]) -> None:
    """Fills history, metrics and notes of a Trainer's run. The main evaluation split has the plain names."""
    evaluations = [_evaluation(entry) for entry in log]
    last: dict[str, dict[str, Any]] = {}  # of each split the values of its last evaluation, which may have two entries
    for entry, (split, values) in zip(log, evaluations, strict=True):
        if split is not None:
            before = last.get(split, {})
            same = before.get("step") == entry.get("step")
            last[split] = {**(before if same else {}), **values, "step": entry.get("step")}
    main = _main_split(last)
    if main is None:
        run.notes.append(
            f"it was evaluated on several splits ({', '.join(filter(None, sorted(last)))}) of which none is named "
            f"{', '.join(SPLITS)}: no accuracy is taken from them"
        )
    elif main:
        run.notes.append(f"its accuracy is that of the evaluation split {main!r}")
    elif not last:
        run.notes.append("no evaluation was logged")

    def named(split: str | None, values: dict[str, float]) -> dict[str, float]:
        return values if split in (None, "", main) else {f"{split}/{key}": value for key, value in values.items()}

    for entry, (split, values) in zip(log, evaluations, strict=True):
        step = {key: entry[key] for key in ("step", "epoch") if key in entry}
        run.history.append({**step, **named(split, values)})
    for split in sorted(last, key=lambda split: split == main):  # the main split last: it wins
        run.metrics |= named(split, {key: float(value) for key, value in last[split].items() if key != "step"})


def _evaluation(entry: dict[str, Any]) -> tuple[str | None, dict[str, float]]:
    """Split and values of an evaluation's log entry; None and the values of one of training.

    With several evaluation sets the Trainer logs an entry a set and writes `eval_<split>_runtime`, but TRL adds its
    `eval_rewards/…` without the split: the split is read from the Trainer's own keys, and holds for the whole entry.
    """
    values = {key: value for key, value in entry.items() if is_number(value) and key not in ("step", "epoch")}
    if not any(key.startswith("eval_") for key in entry):
        return None, named_metrics(values)
    own = (re.fullmatch(rf"eval_(?:(.+)_)?{n}", key) for n in ("runtime", "loss") for key in sorted(entry, key=len))
    split = next((match[1] or "" for match in own if match), "")
    values = {key: value for key, value in values.items() if key.startswith("eval_")}
    return split, {key.removeprefix("eval_").removeprefix(f"{split}_"): value for key, value in values.items()}


def _main_split(splits: dict[str, dict[str, Any]]) -> str | None:
    """The split to read the accuracy from: the unnamed one, the only one, or the first of `SPLITS`; else None."""
    with_accuracy = [split for split, values in splits.items() if ACCURACY in values] or list(splits)
    if "" in with_accuracy or not splits:
        return ""
    if len(with_accuracy) == 1:
        return with_accuracy[0]
    return next((split for split in SPLITS if split in with_accuracy), None)
