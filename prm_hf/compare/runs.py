"""Reading finished runs from disk: the folders that the recipes write, and any transformers Trainer's.

A run folder holds `run.json` (what was run), `history.jsonl` (one JSON object a logged step), `metrics.json` (the
final values, written last: a folder without it is unfinished) and, optionally, `margins.json` (one number an
example). A Trainer's folder holds `trainer_state.json`, in itself or in its `checkpoint-*` subfolders.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .measures import Measures, measures_of


ACCURACY = "rewards/accuracies"
CLEAN_FIT = "memorization/clean_fit"
KL = "drift/kl"
MEAN_Q = "mask/mean_q"

SCHEMA = 1
EXPECTED = (
    "expected a run folder (run.json and metrics.json, as the recipes write them, or a Trainer's "
    "trainer_state.json, also in checkpoint-*/), or a folder that holds such folders"
)
# What `write_report` puts beside the run folders; `prm-hf compare runs/dpo_noisy/*` is to work after a first report.
REPORT_FILES = ("comparison.json", "report.html", "frontier.png")
# Of several evaluation splits, the one that the accuracy is read from: held-out pairs with clean labels come first.
SPLITS = ("heldout", "held_out", "clean", "heldout_clean", "test", "validation", "valid", "val", "dev", "eval")
_SEARCH_DEPTH = 3


@dataclass(eq=False)
class Run:
    """One run as it lies on disk. What was not recorded is absent (`None`, or no key), never made up.

    Attributes:
        path: the folder.
        name: the run's name; a Trainer run takes its folder's.
        method: e.g. `"adamw"` or `"prm_per_tensor"`; a Trainer run takes its folder's name without `lr…` and `seed…`.
        learning_rate: the peak learning rate.
        seed: the training seed.
        source: `"prm_hf"` or `"trainer"`.
        finished: False if the folder has no `metrics.json`; all that follows is then empty.
        metrics: final values by name (`rewards/accuracies`, `drift/kl`, …; `wall_seconds`, `steps`).
        history: one dict a logged step, with `step`; values of training batches are prefixed `train/`.
        heldout: `[examples]` float64, one number a held-out example that is positive where the run is right, or None:
            of a pair β·(log-ratio of chosen − of rejected) against the clean label.
        info: `run.json`, or what `trainer_state.json` says about the run.
        notes: remarks that a reader of the comparison must know.
    """

    path: Path
    name: str
    method: str
    learning_rate: float | None
    seed: int | None
    source: str
    finished: bool = True
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    heldout: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def measures(self) -> Measures:
        return measures_of(self.info)

    @property
    def settings(self) -> dict[str, Any]:
        return self.info.get("settings", {})

    @property
    def mean_q(self) -> float | None:
        """Mean of the mask over the run: of the logged steps, else the final value, else that of `constant_q`."""
        logged = [entry[MEAN_Q] for entry in self.history if MEAN_Q in entry]
        if logged:
            return float(np.mean(logged))
        if MEAN_Q in self.metrics:
            return self.metrics[MEAN_Q]
        return (self.settings.get("constant_q") or {}).get("mean_q")

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, two `[n]` float64 arrays, of one key of the history; empty where it was not logged."""
        points = [(entry["step"], entry[name]) for entry in self.history if name in entry and "step" in entry]
        steps, values = zip(*points, strict=True) if points else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def load_runs(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Run]:
    """Reads every run under `paths`.

    Args:
        paths: a folder or several; each is a run, or holds runs (up to three levels down). Globs are expanded.

    Returns:
        The runs in the order given, unfinished ones included with `finished=False`.

    Raises:
        FileNotFoundError: a path, or what a glob should match, does not exist.
        ValueError: a folder holds no run, or a file in it cannot be read; the message names it.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    folders: dict[Path, Path] = {}
    for path in paths:
        for match in _expand(path):
            found = _find_run_folders(match, _SEARCH_DEPTH)
            if not found:
                raise ValueError(f"{match} holds no run: {EXPECTED}.")
            for folder in found:
                folders.setdefault(folder.resolve(), folder)
    if not folders:
        raise ValueError(f"No folder given: {EXPECTED}.")
    return [_read_trainer_run(folder) if _is_trainer_run(folder) else _read_run(folder) for folder in folders.values()]


def _expand(path: str | os.PathLike) -> list[Path]:
    path = Path(path).expanduser()
    if path.exists():
        matches = [path]
    else:
        matches = [Path(match) for match in sorted(glob.glob(str(path)))]
        if not matches:
            raise FileNotFoundError(f"{path} does not exist: {EXPECTED}.")
    for match in matches:
        if not match.is_dir() and match.name not in REPORT_FILES:
            raise ValueError(f"{match} is a file: {EXPECTED}.")
    return [match for match in matches if match.is_dir()]


def _is_own_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("run.json", "metrics.json", "history.jsonl"))


def _is_trainer_run(folder: Path) -> bool:
    return not _is_own_run(folder) and _trainer_state_file(folder) is not None


def _trainer_state_file(folder: Path) -> Path | None:
    """`trainer_state.json` of the folder itself (the end of training), else that of its latest checkpoint."""
    if (folder / "trainer_state.json").is_file():
        return folder / "trainer_state.json"
    checkpoints = [
        (int(match.group(1)), child / "trainer_state.json")
        for child in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", child.name)) and (child / "trainer_state.json").is_file()
    ]
    return max(checkpoints)[1] if checkpoints else None


def _find_run_folders(folder: Path, depth: int) -> list[Path]:
    if _is_own_run(folder) or _trainer_state_file(folder) is not None:
        return [folder]
    if depth == 0:
        return []
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return [found for child in children for found in _find_run_folders(child, depth - 1)]


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{file} cannot be read as JSON: {error}.") from error


def _read_run(folder: Path) -> Run:
    if not (folder / "metrics.json").is_file():
        method, learning_rate, seed = _parse_name(folder.name)
        return Run(folder, folder.name, method, learning_rate, seed, source="prm_hf", finished=False)
    if not (folder / "run.json").is_file():
        raise ValueError(f"{folder} has metrics.json but no run.json, which names its method, learning rate and seed.")
    info = _read_json(folder / "run.json")
    schema = info.get("schema") if isinstance(info, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"{folder / 'run.json'} has schema {schema!r}; this version of prm_hf reads schema {SCHEMA}.")
    missing = [key for key in ("name", "method", "learning_rate", "seed") if key not in info]
    if missing:
        raise ValueError(f"{folder / 'run.json'} lacks {', '.join(missing)}.")
    metrics = _read_json(folder / "metrics.json")
    bad = [name for name, value in metrics.items() if isinstance(value, bool) or not isinstance(value, int | float)]
    if bad:
        raise ValueError(f"{folder / 'metrics.json'} must map names to numbers; {bad[0]!r} is {metrics[bad[0]]!r}.")
    heldout = None
    if (folder / "margins.json").is_file():
        margins = _read_json(folder / "margins.json").get("heldout")
        heldout = np.asarray(margins, dtype=np.float64) if margins else None
    notes = []
    try:
        accuracy = measures_of(info).accuracy
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    if heldout is not None and abs(np.mean(heldout > 0) - metrics.get(accuracy, np.mean(heldout > 0))) > 0.005:
        notes.append(
            f"its metrics.json says {accuracy} {metrics[accuracy]:.3f}, its margins.json {np.mean(heldout > 0):.3f}; "
            "intervals use the latter"
        )
    return Run(
        path=folder,
        name=info["name"],
        method=info["method"],
        learning_rate=float(info["learning_rate"]),
        seed=info["seed"],
        source="prm_hf",
        metrics={name: float(value) for name, value in metrics.items()},
        history=_read_history(folder / "history.jsonl"),
        heldout=heldout,
        info=info,
        notes=notes,
    )


def _read_history(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        return []
    history = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            if line.strip():
                history.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{file}, line {number}, cannot be read as JSON: {error}.") from error
    return history


def _parse_name(name: str) -> tuple[str, float | None, int | None]:
    """`prm_per_tensor_lr3e-03_seed0` → (`prm_per_tensor`, 0.003, 0)."""
    seed = re.search(r"[-_.]?seed[-_=]?(\d+)", name, flags=re.IGNORECASE)
    rate = re.search(r"(?:^|[-_.])lr[-_=]?(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", name, flags=re.IGNORECASE)
    method = name
    for match in (seed, rate):
        method = method.replace(match.group(0), "") if match else method
    return method.strip("-_.") or name, float(rate.group(1)) if rate else None, int(seed.group(1)) if seed else None


def _read_trainer_run(folder: Path) -> Run:
    file = _trainer_state_file(folder)
    state = _read_json(file)
    log = state.get("log_history") if isinstance(state, dict) else None
    if log is None:
        raise ValueError(f"{file} has no log_history: it is not the state of a transformers Trainer.")
    name = folder.resolve().name
    if re.fullmatch(r"checkpoint-\d+", name):
        name = folder.resolve().parent.name
    method, named_rate, seed = _parse_name(name)
    rates = [entry["learning_rate"] for entry in log if _is_number(entry.get("learning_rate"))]
    run = Run(file.parent, name, method, max(rates, default=named_rate), seed, source="trainer")
    run.info = {key: state[key] for key in ("global_step", "max_steps", "num_train_epochs") if key in state}

    splits: dict[str, dict[str, Any]] = {}  # values of each split's last evaluation
    for entry in log:
        step = {key: entry[key] for key in ("step", "epoch") if key in entry}
        if any(key.startswith("eval_") for key in entry):
            split, values = _evaluation(entry)
            if splits.get(split, {}).get("step") != entry.get("step"):
                splits[split] = {}
            splits[split] |= {**step, **values}
            run.history.append({**step, **(values if not split else {f"{split}/{k}": v for k, v in values.items()})})
        elif "train_runtime" in entry:
            run.metrics["wall_seconds"] = float(entry["train_runtime"])
        else:
            values = {key: value for key, value in entry.items() if key not in step and _is_number(value)}
            named = {k if k.startswith("mask/") else f"train/{k}": v for k, v in values.items()}
            run.history.append({**step, **named})

    main = _main_split(splits)
    if main:  # the chosen split's curves go by the plain names
        for entry in run.history:
            entry.update({key[len(main) + 1 :]: entry[key] for key in list(entry) if key.startswith(f"{main}/")})
        run.notes.append(f"its accuracy is that of the evaluation split {main!r}")
    for split in sorted(splits, key=lambda split: split == main):  # the chosen split last: it has the plain names
        values = {key: float(value) for key, value in splits[split].items() if key not in ("step", "epoch")}
        run.metrics |= values if split in ("", main) else {f"{split}/{key}": value for key, value in values.items()}
    if main is None:
        run.notes.append(
            f"it was evaluated on several splits ({', '.join(filter(None, sorted(splits)))}) of which none is named "
            f"{', '.join(SPLITS)}: no accuracy is taken from them"
        )
    if not splits:
        run.notes.append("no evaluation was logged")
    if state.get("global_step") is not None:
        run.metrics["steps"] = float(state["global_step"])
        if state.get("max_steps", 0) > state["global_step"]:
            run.notes.append(f"it stopped, or was read, at step {state['global_step']} of {state['max_steps']}")
    return run


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _evaluation(entry: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """Split and values of one evaluation's log entry.

    With several evaluation sets the Trainer logs an entry a set and writes `eval_<split>_runtime`, but TRL adds its
    `eval_rewards/…` without the split: the split is read from the Trainer's own keys, and holds for the whole entry.
    """
    split = ""
    for own in ("runtime", "loss"):
        if f"eval_{own}" in entry:
            break
        named = [key for key in entry if re.fullmatch(rf"eval_.+_{own}", key)]
        if named:
            split = named[0].removeprefix("eval_").removesuffix(f"_{own}")
            break
    values = {}
    for key, value in entry.items():
        if key.startswith("eval_") and _is_number(value):
            named = f"eval_{split}_"
            values[key.removeprefix(named if split and key.startswith(named) else "eval_")] = value
    return split, values


def _main_split(splits: dict[str, dict[str, Any]]) -> str | None:
    """The split to read the accuracy from: the unnamed one, the only one, or the first of `SPLITS`; else None."""
    with_accuracy = [split for split, values in splits.items() if ACCURACY in values] or list(splits)
    if "" in with_accuracy or not splits:
        return ""
    if len(with_accuracy) == 1:
        return with_accuracy[0]
    return next((split for split in SPLITS if split in with_accuracy), None)


def finite(value: float | None) -> bool:
    """Whether `value` was measured and is a finite number."""
    return value is not None and math.isfinite(value)
