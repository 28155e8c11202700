"""Short comparisons for the tests of this folder: their data in files, and what they leave in their folders."""

import json
import re
from pathlib import Path

from prm_hf.demo import build_demo
from prm_hf.experiments import dpo


ROOT = Path(__file__).parents[2]
SHORT = ["--max_steps", "3", "--logging_steps", "1", "--eval_steps", "3", "--warmup_steps", "1"]
SHORT += ["--max_extensions", "0", "--workers", "1", "--seeds", "0"]
ON_CPU = ["--use_cpu", "--bf16", "False"]
ONE_RATE = ["--learning_rates", "1e-3", "--prm_learning_rates", "3e-3"]


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def stamps(folder):
    """By the name of the folder of each finished run the time at which it was finished."""
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(folder).glob("*/metrics.json")}


def infos(folder):
    """By the name of each run's folder its run.json."""
    return {path.parent.name: read(path) for path in Path(folder).glob("*/run.json")}


def folder_of(folder, name):
    """The only folder of a run in a folder, by its name without the hash."""
    (found,) = (
        path for path in Path(folder).iterdir() if re.fullmatch(rf"{re.escape(name)}(_[0-9a-f]{{8}})?", path.name)
    )
    return found


def plain(names):
    """Names of folders without their hashes."""
    return {re.sub(r"_[0-9a-f]{8}$", "", name) for name in names}


def write_pairs(folder, train=40, test=24):
    demo = build_demo()
    for name, n in (("train", train), ("test", test)):
        getattr(demo, name).select(range(n)).to_json(folder / f"{name}.jsonl")


def on_files(folder, train="train.jsonl", test="test.jsonl"):
    """The arguments for the reference policy of the built-in task, trained on rows in files."""
    return [
        *["--model_name_or_path", build_demo().model_path, "--dataset_name", str(folder / train)],
        *["--eval_dataset_name", str(folder / test), "--dataset_test_split", "train", *ON_CPU],
        *["--per_device_train_batch_size", "4", "--gradient_checkpointing", "False", "--save_strategy", "no"],
    ]


def run_dpo(output_dir, *arguments):
    """A short comparison at one learning rate for each method, unless the arguments say otherwise; the exit code."""
    return dpo.main(["--output_dir", str(output_dir), *SHORT, *ONE_RATE, *arguments])


def run_dpo_on_files(folder, output_dir, *arguments):
    """Four steps, evaluated once, with a checkpoint after each second one."""
    more = ["--max_steps", "4", "--eval_strategy", "no", "--weight_decay", "0", "--max_length", "64"]
    more += ["--save_strategy", "steps", "--save_steps", "2", "--lr_scheduler_type", "constant"]
    return run_dpo(output_dir, *on_files(folder), *more, *arguments)
