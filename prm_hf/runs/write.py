"""The specification of a run, whether its folder holds it already, and the files of a run, each written whole."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from .read import checkpoints, read_json
from .schema import HISTORY_FILE, MARGINS_FILE, METRICS_FILE, RUN_FILE, VERSION, comparable_settings, named_metrics


@dataclass
class RunSpec:
    """One run of a comparison: what makes it this run and no other.

    Attributes:
        configured_as: of a control, the method whose configuration it has.
    """

    method: str
    learning_rate: float
    seed: int
    settings: dict[str, Any]
    configured_as: str | None = None

    @property
    def name(self) -> str:
        rate = f"{self.learning_rate:.3g}".replace("e-0", "e-")
        return f"{self.method.replace(':', '')}_lr{rate}_seed{self.seed}"

    def changes_from(self, info: dict[str, Any]) -> list[str]:
        """What makes this another run than that of a `run.json`, by name. A setting that is None may be missing."""
        method = self.configured_as or self.method
        ours = comparable_settings(json.loads(json.dumps(self.settings, default=str)), method)  # as the file has them
        theirs = comparable_settings(info.get("settings", {}), method)
        for key in ("method", "learning_rate", "seed"):
            ours[key], theirs[key] = getattr(self, key), info.get(key)
        return sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))


def find_run(spec: RunSpec, folder: Path, tell: Callable[[str], None]) -> tuple[dict[str, float] | None, bool]:
    """The metrics of a finished run of just this specification, and whether there is a checkpoint to go on from.

    A folder of other settings is emptied; `tell` is given a line that says why.
    """
    info = read_json(folder / RUN_FILE)
    changed = [] if info is None else spec.changes_from(info)
    if info is not None and not changed:
        return read_json(folder / METRICS_FILE), bool(checkpoints(folder))
    if folder.exists():
        tell(f"{spec.name}: trained again, since these settings changed: {', '.join(changed) or 'all'}")
        shutil.rmtree(folder)
    return None, False


def start_run(spec: RunSpec, folder: Path, info: dict[str, Any]) -> dict[str, Any]:
    """Writes `run.json` and returns what it says; `info` is what it says besides the specification."""
    specified = {key: getattr(spec, key) for key in ("name", "method", "learning_rate", "seed")}
    record = {"schema": VERSION, **specified, **info, "settings": spec.settings, "versions": versions()}
    record["started"] = _now()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / RUN_FILE, record)
    return record


def finish_run(
    folder: Path, record: dict[str, Any], history: Iterable[dict], margins: dict[str, list], metrics: dict[str, float]
) -> None:
    """Writes all files of a run; `record` is what `start_run` returned, and what is known of the run since then."""
    write_json(folder / RUN_FILE, {**record, "finished": _now()})
    (folder / HISTORY_FILE).write_text("".join(f"{json.dumps(row)}\n" for row in history), encoding="utf-8")
    write_json(folder / MARGINS_FILE, margins)
    write_json(folder / METRICS_FILE, metrics)  # last: a folder with it is finished


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: an interruption must not leave half a file that looks like a finished run."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, path)


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
