"""TensorBoard, W&B (offline) and trackio show what this package measures beside TRL's own metrics.

The real clients write on the disk, and what they wrote is read back.
"""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from pathlib import Path

import pytest


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
# By run, metrics of TRL and of transformers, and those of this package
SHOWN = {
    "own": {
        *("train/loss", "train/rewards/accuracies", "train/learning_rate", "train/mask/mean_q", "train/mask/snr"),
        *("eval/loss", "eval/rewards/margins", "eval/drift/kl", "eval/memorization/flipped_fit"),
    },
    "other": {
        *("train/loss", "train/mean_token_accuracy", "eval/loss", "eval/memorization/corrupted_fit"),
        *("eval/memorization/train_fit", "eval/suspects/auc", "train/mask/mean_q", "train/mask/snr"),
    },
}  # fmt: skip


def run(folder, *command):
    """Runs a command of Python whose clients write below the folder and send nothing."""
    places = {"WANDB_DIR": str(folder), "TRACKIO_DIR": str(folder / "trackio"), "WANDB_MODE": "offline"}
    more = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRACKIO_SHOW_DASHBOARD": "0", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **places, **more},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def of_tensorboard(folder):
    """By tag the values that were written below a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = {path.parent for path in folder.rglob("events.out.tfevents*")}
    found = EventAccumulator(str(events))
    found.Reload()
    return {tag: [x.value for x in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def of_wandb(folder):
    """By the name of each offline run, by key its values."""
    from wandb.proto import wandb_internal_pb2 as proto

    found = {}
    for file in sorted(folder.rglob("run-*.wandb")):
        name, values = None, {}
        for data in _records(file.read_bytes()):
            record = proto.Record.FromString(data)
            name = record.run.display_name or name
            for item in record.history.item:
                values.setdefault(item.key or "/".join(item.nested_key), []).append(json.loads(item.value_json))
        assert name not in found
        found[name] = values
    return found


def _records(data):
    """The records of a log in LevelDB's format: parts of them in blocks of 32 KiB, each behind a header of 7 bytes."""
    at, parts = 7, b""  # W&B has a header of 7 bytes, too
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def of_trackio(folder):
    """By the name of each run, by key its values."""
    (file,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("SELECT run_name, metrics FROM metrics ORDER BY id").fetchall()
    found = {}
    for name, metrics in rows:
        for key, value in json.loads(metrics).items():
            found.setdefault(name, {}).setdefault(key, []).append(value)
    return found


def shown_name(key):
    """As transformers renames a metric for all trackers."""
    return f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    run(folder, "-m", "tests.trainers.tracked_runs", str(folder))
    return folder


@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb", "trackio"])
def test_what_a_tracker_shows(name, tracker, written):
    history = json.loads((written / "histories.json").read_text())[name]
    found = {
        "tensorboard": lambda: of_tensorboard(written / name),
        "wandb": lambda: of_wandb(written)[name],
        "trackio": lambda: of_trackio(written)[name],
    }[tracker]()
    assert not SHOWN[name] - {*found}
    for key in SHOWN[name]:
        logged = [entry[old] for entry in history for old in entry if shown_name(old) == key]
        # NaN, as the ratio of the first step, is a text in two of them
        assert [*map(float, found[key])] == pytest.approx(logged, rel=1e-5, nan_ok=True), key


def test_nothing_is_logged_after_the_end_of_a_run(written):
    """Where trackers end their run with the training, the evaluation at its end must have come before."""
    (events,) = {path.parent for path in (written / "own").rglob("events.out.tfevents*")}
    assert len(list(events.iterdir())) == 1
    assert {*of_trackio(written)} == {*of_wandb(written)} == {"own", "other"}


def test_each_run_of_a_comparison_is_one_of_the_tracker(tmp_path):
    """Also where one process makes several."""
    arguments = ["--methods", "adamw", "prm_debiased", "--learning_rates", "1e-3", "--prm_learning_rates", "3e-3"]
    arguments += ["--seeds", "0", "--max_steps", "2", "--eval_steps", "2", "--logging_steps", "1", "--workers", "1"]
    arguments += ["--max_extensions", "0", "--report_to", "all", "--output_dir", "runs"]
    run(tmp_path, "-m", "prm_hf", "dpo", *arguments)
    folders = {path.parent.name: path.parent for path in tmp_path.glob("runs/*/metrics.json")}
    assert len(folders) == 2
    for found in (of_wandb(tmp_path), of_trackio(tmp_path), {x: of_tensorboard(folders[x]) for x in folders}):
        assert {*found} == {*folders}
        for name, values in found.items():
            assert len(values["train/loss"]) == 2 and values["eval/drift/kl"]
            assert ("train/mask/mean_q" in values) == name.startswith("prm")
