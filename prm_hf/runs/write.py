"""The specification of a run, the folder that it has, and the files of a run, each written whole."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .._files import set_aside, write_whole
from .read import read_json
from .schema import (
    FAILED_FILE,
    HISTORY_FILE,
    MARGINS_FILE,
    METRICS_FILE,
    RUN_FILE,
    VERSION,
    comparable_settings,
    named_metrics,
)


# What a version before did not record: a run that lacks it may be of any.
_UNRECORDED = {"train_digest", "heldout_digest", "model_digest"}


def check_name(text: Any, argument: str) -> str:
    """Returns a text that becomes the name of a folder.

    Raises:
        ValueError: it is no text, or might name another folder than one beside those of the other runs.
    """
    if not isinstance(text, str) or not re.fullmatch(r"[\w+-][\w .,:+-]*", text):
        raise ValueError(
            f"`{argument}` becomes the name of a folder, and is {text!r}: it may have letters, digits, spaces and "
            "`_ - + . , :`, and does not begin with a dot."
        )
    return text


def check_seed(seed: Any) -> int:
    """Returns a seed; a ValueError unless it is a whole number that random number generators take."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"`seeds` must be integers in [0, 2**32), got {seed!r}.")
    return seed


@dataclass
class RunSpec:
    """One run of a comparison: what makes it this run and no other.

    Attributes:
        configured_as: of a control, the method whose configuration it has.
        defaults: values of settings that were not given. A `run.json` of before a setting existed has these.
    """

    method: str
    learning_rate: float
    seed: int
    settings: dict[str, Any]
    configured_as: str | None = None
    defaults: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.method, "methods")
        check_seed(self.seed)
        self.settings = json.loads(json.dumps(self.settings, default=str))  # as the file has them

    @property
    def name(self) -> str:
        """What people call the run. Two of one name can differ in their settings, or in a rate's fourth digit."""
        rate = f"{self.learning_rate:.3g}".replace("e-0", "e-")
        return f"{self.method.replace(':', '')}_lr{rate}_seed{self.seed}"

    @property
    def folder_name(self) -> str:
        """The name of a new folder of this run: its name and a hash of all that makes it this run."""
        what = {key: value for key, value in self._comparable(self.settings).items() if value is not None}
        text = json.dumps([self.method, self.learning_rate, self.seed, what], sort_keys=True)
        return f"{self.name}_{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def changes_from(self, info: dict[str, Any]) -> list[str]:
        """What makes this another run than that of a `run.json`, by name. A setting that is None may be missing."""
        ours, theirs = self._comparable(self.settings), self._comparable(info.get("settings", {}))
        # What the file does not have is what it was before anyone could set it, or not known.
        unset = {key for key in ours.keys() - theirs.keys() if ours[key] == self.defaults.get(key)}
        unset |= _UNRECORDED - theirs.keys()
        for key in ("method", "learning_rate", "seed"):
            ours[key], theirs[key] = getattr(self, key), info.get(key)
        return sorted(key for key in {*ours, *theirs} - unset if ours.get(key) != theirs.get(key))

    def _comparable(self, settings: dict[str, Any]) -> dict[str, Any]:
        return comparable_settings(settings, self.configured_as or self.method)


def find_folder(spec: RunSpec, parent: Path, tell: Callable[[str], None] = print) -> tuple[Path, dict[Path, str]]:
    """The folder of a run in `parent`, which need not exist yet, and those of the same run but for its settings.

    A folder is the run's if its `run.json` says so, whatever version wrote it; its name alone says nothing.

    Returns:
        The folder, and by each other one the names of the settings that differ.

    Raises:
        ValueError: something else has the name that a new folder would get.
    """
    own, others = [], {}
    pattern = re.compile(rf"{re.escape(spec.name)}(_[0-9a-f]{{8}})?")
    for folder in sorted(parent.glob("*")) if parent.is_dir() else ():
        info = _info_of(folder) if pattern.fullmatch(folder.name) else None
        if info is not None:
            changed = spec.changes_from(info)
            if not changed:
                own.append(folder)
            elif not {"method", "learning_rate", "seed"} & set(changed):
                others[folder] = ", ".join(changed)
    own.sort(key=lambda folder: not (folder / METRICS_FILE).is_file())  # a finished one first
    return own[0] if own else _new_folder(spec, parent, tell), others


def _info_of(folder: Path) -> dict[str, Any] | None:
    """What the `run.json` of a folder says; None where there is none, or none that can be read."""
    try:
        info = read_json(folder / RUN_FILE)
    except (ValueError, OSError):
        return None
    return info if isinstance(info, dict) and isinstance(info.get("settings", {}), dict) else None


def _new_folder(spec: RunSpec, parent: Path, tell: Callable[[str], None]) -> Path:
    folder = parent / spec.folder_name
    if (folder / RUN_FILE).is_file() and _info_of(folder) is None:
        tell(f"{folder / RUN_FILE} cannot be read. {set_aside(folder)} has what there is, and the run is made again.")
    # A run that ended before its run.json was whole has left at most a part of it.
    is_free = not os.path.lexists(folder) or (folder.is_dir() and {x.name for x in folder.iterdir()} <= {"run.part"})
    if not is_free and spec.changes_from(_info_of(folder) or {}):  # another process may have begun this run just now
        raise ValueError(
            f"{folder} is not the folder of a run of these settings, by its {RUN_FILE}, and the run {spec.name} would "
            "be written there. Nothing in it was touched: move it away, or name another `output_dir`."
        )
    return folder


def finished_metrics(folder: Path, tell: Callable[[str], None] = print) -> dict[str, Any] | None:
    """The metrics of a finished run; None for another one. `tell` is given a line about a file that is set aside."""
    file = folder / METRICS_FILE
    try:
        metrics = read_json(file)
    except ValueError:
        metrics = None
    if metrics is None and file.is_file() or not isinstance(metrics, dict | None):
        tell(f"{file} cannot be read. It is set aside as {set_aside(file).name}, and the run is made again.")
        return None
    return metrics


def failure_of(folder: Path) -> tuple[str, float] | None:
    """Why a run failed, in words, and when on the clock of `time.time`; None for one that did not."""
    file = folder / FAILED_FILE
    try:
        found = read_json(file)
        return f"{found['error']}: {found['message']}", file.stat().st_mtime
    except (OSError, ValueError, TypeError, KeyError):
        return None


def fail_run(folder: Path, error: BaseException) -> None:
    """Writes `failed.json`, which the next attempt at the run removes. Of several processes the first one's stays."""
    if (folder / FAILED_FILE).exists():
        return
    trace = "".join(traceback.format_exception(error))
    write_json(folder / FAILED_FILE, {"error": type(error).__name__, "message": str(error), "traceback": trace})


def start_run(spec: RunSpec, folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Writes `run.json` and returns what it says; `info` is what it says besides the specification."""
    specified = {"name": folder.name, **{key: getattr(spec, key) for key in ("method", "learning_rate", "seed")}}
    record = {"schema": VERSION, **specified, **info, "settings": spec.settings, "versions": versions()}
    record["started"] = _now()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_FILE, record)
    (folder / FAILED_FILE).unlink(missing_ok=True)
    return record


def finish_run(
    folder: Path, record: dict[str, Any], history: Iterable[dict], margins: dict[str, list], metrics: dict[str, float]
) -> None:
    """Writes all files of a run; `record` is what `start_run` returned, and what is known of the run since then."""
    write_json(folder / RUN_FILE, {**record, "finished": _now()})
    write_whole(folder / HISTORY_FILE, (f"{json.dumps(row)}\n" for row in history))
    write_json(folder / MARGINS_FILE, margins)
    write_json(folder / METRICS_FILE, metrics)  # last: a folder with it is finished


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: an interruption must not leave half a file that looks like a finished run."""
    write_whole(path, [json.dumps(value, indent=1)])


def history_of(log: Iterable[dict[str, float]]) -> list[dict[str, float]]:
    """The rows of `history.jsonl`, from a trainer's `state.log_history`."""
    return [named_metrics(entry) for entry in log if "train_runtime" not in entry]


def evaluation_metrics(evaluation: dict[str, float]) -> dict[str, float]:
    """What an evaluation of a trainer returned, by the names in a run's files."""
    return {key: value for key, value in named_metrics(evaluation).items() if key != "epoch"}


def versions() -> dict[str, str]:
    """Of Python and of the packages that a run depends on, where they are installed."""
    found = {"python": platform.python_version()}
    for name in ("prm-hf", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed"):
        try:
            found[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
