"""Reading finished runs from disk: folders as `schema` has them, and those of any transformers Trainer.

A Trainer's folder holds `trainer_state.json`, in itself or in its `checkpoint-*` subfolders.
"""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .run import DIVERGED, FAILED, UNFINISHED, UNREADABLE, Run, UnreadableError, is_number, parse_name
from .schema import (
    FAILED_FILE,
    HISTORY_FILE,
    MARGINS_FILE,
    METRICS_FILE,
    REPORT_FILES,
    RUN_FILE,
    VERSION,
    measures_of,
)
from .text import short
from .trainer import read_trainer_run


STATE_FILE = "trainer_state.json"
EXPECTED = (
    "expected a run folder (run.json and metrics.json, as the recipes write them, or a Trainer's "
    "trainer_state.json, also in checkpoint-*/), or a folder that holds such folders"
)
_SEARCH_DEPTH = 3


def load_runs(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> list[Run]:
    """Reads every run under `paths`, in the order given; `Run.end` says which of them finished.

    Reading changes nothing on the disk. A run of which a file cannot be read is among them, with what is wrong with
    it, as long as another run can be read.

    Args:
        paths: a folder or several; each is a run, or holds runs (up to three levels down). Globs are expanded.

    Raises:
        FileNotFoundError: a path, or what a glob should match, does not exist.
        ValueError: a path is a file, a folder holds no run, or no run can be read; the message names it.
    """
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    runs: dict[Path, Run] = {}
    for match in (match for path in paths for match in _expand(Path(os.path.expanduser(path)))):
        found = list(_find_runs(match, _SEARCH_DEPTH))
        if not found:
            raise ValueError(f"{match} holds no run: {EXPECTED}.")
        for run in found:
            runs.setdefault(run.path.resolve(), run)
    if not runs:
        raise ValueError(f"No folder given: {EXPECTED}.")
    problems = [run.problem for run in runs.values() if run.end == UNREADABLE]
    if len(problems) == len(runs):
        more = f" So are {len(problems) - 1} other runs." if len(problems) > 1 else ""
        raise UnreadableError(f"{problems[0]}{more} Train it again, or give another folder.")
    return list(runs.values())


def read_json(file: Path) -> Any:
    """What a file holds, or None where there is none; an UnreadableError that names a file that is not JSON."""
    try:
        return _parse(file.read_bytes(), str(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableError(f"{file} cannot be read: {error.strerror}.") from error


def _parse(text: bytes, place: str) -> Any:
    if not text.strip():
        raise UnreadableError(f"{place} cannot be read as JSON: it is empty.")
    try:
        return json.loads(text.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UnreadableError(f"{place} cannot be read as JSON: it is not text in UTF-8.") from error
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{place} cannot be read as JSON: {error}.") from error


def _read_object(file: Path) -> dict[str, Any] | None:
    """The JSON object of a file; None where there is no file."""
    if not os.path.lexists(file):
        return None
    found = read_json(file)
    if not isinstance(found, dict):
        raise UnreadableError(f"{file} must hold a JSON object, and holds {short(found)}.")
    return found


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
    if re.search(r"\.corrupt\d*$", folder.name):
        yield _unread(folder, "prm_hf", f"{folder} was set aside when it could not be read.")
    elif any(os.path.lexists(folder / name) for name in (RUN_FILE, METRICS_FILE, HISTORY_FILE, FAILED_FILE)):
        yield _read(folder, "prm_hf", lambda: _read_run(folder))
    # The state of the folder itself is that of the end of training.
    elif states := [x / STATE_FILE for x in (*checkpoints(folder), folder) if os.path.lexists(x / STATE_FILE)]:
        yield _read(folder, "trainer", lambda: read_trainer_run(folder, states[-1], read_json(states[-1])))
    elif depth:
        for child in sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith(".")):
            yield from _find_runs(child, depth - 1)


def _read(folder: Path, source: str, read: Callable[[], Run]) -> Run:
    """The run that `read` gives, or one that says why it cannot be read."""
    try:
        return read()
    except UnreadableError as error:
        return _unread(folder, source, str(error))


def _unread(folder: Path, source: str, problem: str) -> Run:
    return Run(folder, folder.name, *parse_name(folder.name), source=source, end=UNREADABLE, problem=problem)


def _read_run(folder: Path) -> Run:
    metrics, failed = _read_object(folder / METRICS_FILE), _read_object(folder / FAILED_FILE)
    if metrics is None and failed is None:
        return Run(folder, folder.name, *parse_name(folder.name), source="prm_hf", end=UNFINISHED)
    info = _read_object(folder / RUN_FILE)
    if metrics is None:
        problem = ": ".join(str(failed[key]) for key in ("error", "message") if failed.get(key)) or "no reason given"
        return Run(folder, folder.name, *parse_name(folder.name), source="prm_hf", end=FAILED, problem=problem)
    if info is None:
        raise UnreadableError(
            f"{folder} has metrics.json but no run.json, which names its method, learning rate and seed."
        )
    _check_info(folder / RUN_FILE, info)
    rate, seed = float(info["learning_rate"]), info["seed"]
    run = Run(folder, info["name"], info["method"], rate, seed, "prm_hf", info=info)
    _take_metrics(run, folder / METRICS_FILE, metrics)
    run.history = _read_history(folder / HISTORY_FILE)
    run.heldout, run.heldout_groups = _read_examples(folder / MARGINS_FILE, "heldout")
    run.solved, run.solved_groups = _read_examples(folder / MARGINS_FILE, "solve")
    run.check_numbers()
    accuracy, outcomes = run.measures.accuracy, run.outcomes()
    if run.finished and run.heldout is not None:
        right = outcomes.mean()
        if abs(right - run.metrics.get(accuracy, right)) > 0.005:
            run.notes.append(
                f"its metrics.json says {accuracy} {run.metrics[accuracy]:.3f}, its margins.json {right:.3f}; "
                "intervals use the latter"
            )
    return run


def _check_info(file: Path, info: dict[str, Any]) -> None:
    """Raises UnreadableError where `run.json` does not name its run, and ValueError for a task that is not known."""
    if info.get("schema") != VERSION:
        wrote = " A newer version wrote it: update prm_hf." if is_number(info.get("schema")) else ""
        raise UnreadableError(
            f"{file} has schema {short(info.get('schema'))}; this version of prm_hf reads schema {VERSION}.{wrote}"
        )
    missing = [key for key in ("name", "method", "learning_rate", "seed") if key not in info]
    if missing:
        raise UnreadableError(f"{file} lacks {', '.join(missing)}.")

    def is_text(value: Any) -> bool:
        return isinstance(value, str) and bool(value)

    def is_rate(value: Any) -> bool:
        return is_number(value) and 0 <= value < float("inf")

    def is_seed(value: Any) -> bool:
        return value is None or (is_number(value) and isinstance(value, int))

    def is_settings(value: Any) -> bool:
        control = value.get(info["method"]) if isinstance(value, dict) else None
        control = control if isinstance(control, dict) else {}
        return isinstance(value, dict) and is_text(control.get("of", "x")) and is_number(control.get("mean_q", 0))

    wanted = {
        "name": (is_text, "a text"),
        "method": (is_text, "a text"),
        "learning_rate": (is_rate, "a number of at least 0"),
        "seed": (is_seed, "a whole number or null"),
        "task": (is_text, "a text"),
        "accuracy": (is_text, "a text"),
        "settings": (is_settings, "an object of settings"),
    }
    for key, (holds, words) in wanted.items():
        if key in info and not holds(info[key]):
            raise UnreadableError(f"{file}: {key!r} must be {words}, and is {short(info[key])}.")
    try:
        measures_of(info)
    except ValueError as error:
        raise ValueError(f"{file.parent}: {error}") from error


def _take_metrics(run: Run, file: Path, metrics: dict[str, Any]) -> None:
    """Fills the metrics of a run, and how it ended."""
    diverged, step = metrics.pop("diverged", False), metrics.pop("diverged_at_step", None)
    if not isinstance(diverged, bool):
        raise UnreadableError(f"{file}: 'diverged' must be true or false, and is {short(diverged)}.")
    if diverged:
        run.end, run.problem = DIVERGED, f"at step {step}" if is_number(step) else "it says so"
        metrics = {name: value for name, value in metrics.items() if value is not None}
    bad = [name for name, value in metrics.items() if not is_number(value)]
    if bad:
        raise UnreadableError(f"{file} must map names to numbers; {bad[0]!r} is {short(metrics[bad[0]])}.")
    run.metrics = {name: float(value) for name, value in metrics.items()}


def _read_history(file: Path) -> list[dict[str, Any]]:
    """The logged steps; what is no number in them is left out."""
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(f"{file} cannot be read: {error.strerror}.") from error
    history = []
    for i, line in enumerate(lines, start=1):
        if line.strip():
            entry = _parse(line, f"{file}, line {i},")
            if not isinstance(entry, dict):
                raise UnreadableError(f"{file}, line {i}, must hold a JSON object, and holds {short(entry)}.")
            history.append({key: value for key, value in entry.items() if is_number(value)})
    return history


def _read_examples(file: Path, name: str) -> tuple[np.ndarray | None, np.ndarray | None]:
    """A number for each example, the margins of `heldout` or 0 and 1 of `solve`, and which belong together."""
    found, of_groups = _read_object(file) or {}, f"{name}_groups"
    numbers, groups = (found.get(key) or [] for key in (name, of_groups))
    if not isinstance(numbers, list) or not all(map(is_number, numbers)):
        raise UnreadableError(f"{file}: {name!r} must be a list of numbers.")
    if name == "solve" and not all(0 <= x <= 1 for x in numbers):
        raise UnreadableError(f"{file}: 'solve' must be a list of 0 and 1.")
    if not isinstance(groups, list) or not all(is_number(x) and isinstance(x, int) and abs(x) < 2**63 for x in groups):
        raise UnreadableError(f"{file}: {of_groups!r} must be a list of whole numbers.")
    if groups and len(groups) != len(numbers):
        raise UnreadableError(
            f"{file}: {of_groups!r} must be one for each of the {len(numbers)} numbers of {name!r}, and are "
            f"{len(groups)}."
        )
    of_examples = np.array(numbers, dtype=np.float64) if numbers else None
    return of_examples, np.array(groups, dtype=np.int64) if groups else None
