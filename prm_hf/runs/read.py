"""Reading finished runs from disk: folders as `schema` has them, and those of any transformers Trainer.

A Trainer's folder holds `trainer_state.json`, in itself or in its `checkpoint-*` subfolders.
"""

from __future__ import annotations

import glob
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .schema import (
    ACCURACY,
    HISTORY_FILE,
    MARGINS_FILE,
    MEAN_Q,
    METRICS_FILE,
    REPORT_FILES,
    RUN_FILE,
    VERSION,
    Measures,
    measures_of,
    named_metrics,
)


STATE_FILE = "trainer_state.json"
EXPECTED = (
    "expected a run folder (run.json and metrics.json, as the recipes write them, or a Trainer's "
    "trainer_state.json, also in checkpoint-*/), or a folder that holds such folders"
)
# Of several evaluation splits, the one that the accuracy is read from: held-out pairs with clean labels come first.
SPLITS = ("heldout", "held_out", "clean", "heldout_clean", "test", "validation", "valid", "val", "dev", "eval")
_SEARCH_DEPTH = 3


@dataclass(eq=False)
class Run:
    """One run as it lies on disk. What was not recorded is absent (`None`, or no key), never made up.

    Attributes:
        name, method: of a Trainer's run the folder's name, and that without `lr…` and `seed…`.
        learning_rate: the peak learning rate.
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
    def control_of(self) -> str | None:
        """Of a control, the name of the run that it takes something from."""
        control = self.settings.get(self.method)
        return control.get("of") if isinstance(control, dict) else None

    @property
    def mean_q(self) -> float | None:
        """Mean of the mask over the run: of the logged steps, else the final value, else that of `constant_q`."""
        logged = self.series(MEAN_Q)[1]
        if logged.size:
            return float(logged.mean())
        return self.metrics.get(MEAN_Q, (self.settings.get("constant_q") or {}).get("mean_q"))

    def outcomes(self) -> np.ndarray | None:
        """`[examples]` float64, 1 where the held-out example is right, ½ where its margin is 0; `[1]`, the accuracy,
        where they are unknown."""
        if self.heldout is not None:
            return np.heaviside(self.heldout, 0.5)
        accuracy = self.metrics.get(self.measures.accuracy)
        return None if accuracy is None or not math.isfinite(accuracy) else np.array([accuracy])

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, two `[n]` float64 arrays, of one key of the history; empty where it was not logged."""
        points = [(entry["step"], entry[name]) for entry in self.history if name in entry and "step" in entry]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return steps, values


def load_runs(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Run]:
    """Reads every run under `paths`, in the order given, unfinished ones included with `finished=False`.

    Args:
        paths: a folder or several; each is a run, or holds runs (up to three levels down). Globs are expanded.

    Raises:
        FileNotFoundError: a path, or what a glob should match, does not exist.
        ValueError: a folder holds no run, or a file in it cannot be read; the message names it.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    runs: dict[Path, Run] = {}
    for match in (match for path in paths for match in _expand(Path(path).expanduser())):
        found = list(_find_runs(match, _SEARCH_DEPTH))
        if not found:
            raise ValueError(f"{match} holds no run: {EXPECTED}.")
        for run in found:
            runs.setdefault(run.path.resolve(), run)
    if not runs:
        raise ValueError(f"No folder given: {EXPECTED}.")
    return list(runs.values())


def read_json(file: Path) -> Any:
    """What a file holds, or None where there is none; a ValueError that names a file that is not JSON."""
    try:
        return _parse(file.read_bytes(), str(file))
    except FileNotFoundError:
        return None


def _parse(text: bytes, place: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} cannot be read as JSON: {error}.") from error


def checkpoints(folder: Path) -> list[Path]:
    """The folders `checkpoint-<step>` in a folder, by their steps."""
    found = [child for child in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", child.name)]
    return sorted(found, key=lambda child: int(child.name.removeprefix("checkpoint-")))


def _expand(path: Path) -> list[Path]:
    matches = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(str(path)))]
    if not matches:
        raise FileNotFoundError(f"{path} does not exist: {EXPECTED}.")
    folders = [match for match in matches if match.is_dir()]
    for match in matches:
        if match not in folders and match.name not in REPORT_FILES:
            raise ValueError(f"{match} is a file: {EXPECTED}.")
    return folders


def _find_runs(folder: Path, depth: int) -> Iterator[Run]:
    """The runs in a folder: it is one itself, or they lie up to `depth` levels below it."""
    if any((folder / name).is_file() for name in (RUN_FILE, METRICS_FILE, HISTORY_FILE)):
        yield _read_run(folder)
        return
    # The state of the folder itself is that of the end of training.
    states = [place / STATE_FILE for place in (*checkpoints(folder), folder) if (place / STATE_FILE).is_file()]
    if states:
        yield _read_trainer_run(folder, states[-1])
    elif depth:
        for child in sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")):
            yield from _find_runs(child, depth - 1)


def _read_run(folder: Path) -> Run:
    metrics = read_json(folder / METRICS_FILE)
    if metrics is None:
        return Run(folder, folder.name, *_parse_name(folder.name), source="prm_hf", finished=False)
    info = read_json(folder / RUN_FILE)
    if info is None:
        raise ValueError(f"{folder} has metrics.json but no run.json, which names its method, learning rate and seed.")
    version = info.get("schema") if isinstance(info, dict) else None
    if version != VERSION:
        raise ValueError(f"{folder / RUN_FILE} has schema {version!r}; this version of prm_hf reads schema {VERSION}.")
    missing = [key for key in ("name", "method", "learning_rate", "seed") if key not in info]
    if missing:
        raise ValueError(f"{folder / RUN_FILE} lacks {', '.join(missing)}.")
    bad = [name for name, value in metrics.items() if not _is_number(value)]
    if bad:
        raise ValueError(f"{folder / METRICS_FILE} must map names to numbers; {bad[0]!r} is {metrics[bad[0]]!r}.")
    try:
        accuracy = measures_of(info).accuracy
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    run = Run(folder, info["name"], info["method"], float(info["learning_rate"]), info["seed"], "prm_hf", info=info)
    run.metrics = {name: float(value) for name, value in metrics.items()}
    history = folder / HISTORY_FILE
    lines = history.read_bytes().splitlines() if history.is_file() else []
    run.history = [_parse(line, f"{history}, line {i},") for i, line in enumerate(lines, start=1) if line.strip()]
    margins = (read_json(folder / MARGINS_FILE) or {}).get("heldout")
    if margins:
        run.heldout = np.asarray(margins, dtype=np.float64)
        right = run.outcomes().mean()
        if abs(right - run.metrics.get(accuracy, right)) > 0.005:
            run.notes.append(
                f"its metrics.json says {accuracy} {run.metrics[accuracy]:.3f}, its margins.json {right:.3f}; "
                "intervals use the latter"
            )
    return run


def _parse_name(name: str) -> tuple[str, float | None, int | None]:
    """`prm_per_tensor_lr3e-03_seed0` → (`prm_per_tensor`, 0.003, 0)."""
    seed = re.search(r"[-_.]?seed[-_=]?(\d+)", name, flags=re.IGNORECASE)
    rate = re.search(r"(?:^|[-_.])lr[-_=]?(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", name, flags=re.IGNORECASE)
    method = name
    for match in filter(None, (seed, rate)):
        method = method.replace(match[0], "")
    return method.strip("-_.") or name, float(rate[1]) if rate else None, int(seed[1]) if seed else None


def _read_trainer_run(folder: Path, file: Path) -> Run:
    state = read_json(file)
    log = state.get("log_history") if isinstance(state, dict) else None
    if log is None:
        raise ValueError(f"{file} has no log_history: it is not the state of a transformers Trainer.")
    folder = folder.resolve()
    name = (folder.parent if re.fullmatch(r"checkpoint-\d+", folder.name) else folder).name
    method, named_rate, seed = _parse_name(name)
    rates = [entry["learning_rate"] for entry in log if _is_number(entry.get("learning_rate"))]
    run = Run(file.parent, name, method, max(rates, default=named_rate), seed, source="trainer")
    run.info = {key: state[key] for key in ("global_step", "max_steps", "num_train_epochs") if key in state}
    for entry in log:
        if "train_runtime" in entry:
            run.metrics["wall_seconds"] = float(entry["train_runtime"])
    _take_log(run, [entry for entry in log if "train_runtime" not in entry])
    if state.get("global_step") is not None:
        run.metrics["steps"] = float(state["global_step"])
        if state.get("max_steps", 0) > state["global_step"]:
            run.notes.append(f"it stopped, or was read, at step {state['global_step']} of {state['max_steps']}")
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


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _evaluation(entry: dict[str, Any]) -> tuple[str | None, dict[str, float]]:
    """Split and values of an evaluation's log entry; None and the values of one of training.

    With several evaluation sets the Trainer logs an entry a set and writes `eval_<split>_runtime`, but TRL adds its
    `eval_rewards/…` without the split: the split is read from the Trainer's own keys, and holds for the whole entry.
    """
    values = {key: value for key, value in entry.items() if _is_number(value) and key not in ("step", "epoch")}
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
