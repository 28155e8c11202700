"""What the recipes share: the runs of a comparison, in folders of their own, resumable, and the report over them.

A recipe says how one run is trained (`train_run`); this module says which runs there are, leaves out those that are
finished, writes what `prm-hf compare` reads, and prints the result.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, load_dataset, load_from_disk
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from prm_hf.compare import compare_runs, format_comparison, write_report
from prm_hf.metrics import PairEvaluation, reward_margins


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Where a run is written and how it is shown do not make it another run.
NOT_SETTINGS = {
    "output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "disable_tqdm",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "log_level",
    "log_level_replica",
    "local_rank",
    "use_cpu",
    "per_device_train_batch_size",  # the batch of a step counts, however it is spread: see `effective_batch_size`
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "accelerator_config",
    "ddp_backend",
    "dataset_num_proc",
    "dataloader_num_workers",
    "learning_rate",  # named beside the settings
    "seed",
}


@dataclass
class ComparisonArguments:
    """
    Arguments of a comparison of methods, learning rates and seeds on one noisy dataset.

    Parameters:
        dataset_name (`str`, *optional*):
            Dataset on the hub, local folder, or local .json, .jsonl, .csv or .parquet file. `None` for the built-in
            task, whose clean labels are known.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, if it has several.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on, slices included (`train[:2000]`).
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Held-out split, whose labels stay as they are.
        eval_dataset_name (`str`, *optional*):
            Dataset that the held-out split is read from, if it is another one than `dataset_name`.
        noise_rate (`float`, *optional*, defaults to `0.3`):
            Probability with which a training label is corrupted.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Seeds; each has its own noise and its own order of the data.
        methods (`list[str]`, *optional*):
            Methods to compare.
        learning_rates (`list[float]`, *optional*):
            Learning rates of each method. Defaults to `learning_rate` alone, for the built-in task to a grid.
        prm_learning_rates (`list[float]`, *optional*):
            Learning rates of the PRM methods, if they are others than `learning_rates`; of the same number, so that
            every method gets a grid of one size.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset on the hub, local folder, or local .json, .jsonl, .csv or .parquet file. None: the "
            "built-in task."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, if it has several."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on, slices included (`train[:2000]`)."}
    )
    dataset_test_split: str = field(
        default="test", metadata={"help": "Held-out split, whose labels stay as they are."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset that the held-out split is read from, if it is not in `dataset_name`."},
    )
    noise_rate: float = field(default=0.3, metadata={"help": "Probability with which a training label is corrupted."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds; each has its own noise and its own order of the data."},
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": "Methods to compare. Default: AdamW, PRM per_tensor and debiased, constant_q."}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Learning rates of each method. Default: `learning_rate` alone."}
    )
    prm_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Learning rates of the PRM methods, if they are others; of the same number."}
    )

    def check(self, known_methods: list[str], learning_rate: float) -> None:
        """Fills in what was left open, and raises ValueError for what cannot be run."""
        if self.methods is None:
            self.methods = ["adamw", "prm_per_tensor", "prm_debiased", "constant_q"]
        if self.learning_rates is None:
            self.learning_rates = [learning_rate]
        if self.prm_learning_rates is None:
            self.prm_learning_rates = list(self.learning_rates)
        for name in ("methods", "seeds", "learning_rates", "prm_learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"`{name}` must name at least one value and none of them twice, got {values}.")
        if len(self.learning_rates) != len(self.prm_learning_rates):
            raise ValueError(
                f"`learning_rates` has {len(self.learning_rates)} values and `prm_learning_rates` "
                f"{len(self.prm_learning_rates)}: give both as many, or the method with the larger grid wins by it."
            )
        for rate in (*self.learning_rates, *self.prm_learning_rates):
            if not 0 < rate < float("inf"):
                raise ValueError(f"`learning_rates` must be positive numbers, got {rate}.")
        if not 0 <= self.noise_rate < 1:
            raise ValueError(f"`noise_rate` must be in [0, 1), got {self.noise_rate}.")
        unknown = sorted(set(self.methods) - set(known_methods))
        if unknown:
            raise ValueError(f"`methods`: {', '.join(unknown)} unknown. Known are {', '.join(known_methods)}.")
        if "constant_q" in self.methods and not any(is_prm(method) for method in self.methods):
            raise ValueError("`constant_q` takes the mean mask of a PRM run: add a PRM method to `methods`.")


def is_prm(method: str) -> bool:
    return method.startswith("prm_")


def load_split(name: str, config: str | None, split: str) -> Dataset:
    """A split of a dataset on the hub, in a local folder (also of `save_to_disk`), or in a local file.

    Raises:
        ValueError: the split is not there, or the file's format is not known.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"`{name}` must end in one of {', '.join(FILE_FORMATS)}.")
        base = split.split("[")[0]
        return load_dataset(FILE_FORMATS[path.suffix], data_files={base: str(path)}, split=split)
    if (path / "dataset_dict.json").is_file():
        splits = load_from_disk(name)
        if split not in splits:
            raise ValueError(f"`{name}` has the splits {', '.join(splits)} and not {split!r}: name one of them.")
        return splits[split]
    return load_dataset(name, config, split=split)


@dataclass
class RunSpec:
    """One run of a comparison: what makes it this run and no other."""

    method: str
    learning_rate: float
    seed: int
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        rate = f"{self.learning_rate:.3g}".replace("e-0", "e-")
        return f"{self.method}_lr{rate}_seed{self.seed}"

    @property
    def hash(self) -> str:
        text = json.dumps([self.method, self.learning_rate, self.seed, self.settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def settings_of(config: TrainingArguments, **others: Any) -> dict[str, Any]:
    """The settings of a training configuration that make a run what it is, and `others`."""
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_SETTINGS}
    if config.optimizer_name != "prm":  # no control is trained again because PRM is tried with other settings
        values = {key: value for key, value in values.items() if not key.startswith("prm_")}
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return json.loads(json.dumps({**values, "effective_batch_size": per_step, **others}, sort_keys=True, default=str))


class Comparison:
    """Runs specifications one after the other, each into its folder of `output_dir`, and reports on all of them.

    Args:
        output_dir: the comparison's folder.
        train_run: trains one run. It is given the specification, its folder, and whether a checkpoint in it is to be
            resumed; it returns the trainer.
        info: what `run.json` says of every run: `noise_rate`, `model`, `dataset`.
        total: number of runs, for the progress bar.
    """

    def __init__(
        self,
        output_dir: str,
        train_run: Callable[[RunSpec, Path, bool], Trainer],
        info: dict[str, Any],
        total: int,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.train_run = train_run
        self.info = info
        self.folders: list[Path] = []
        self.state = PartialState()
        self.bar = tqdm(total=total, desc="runs", unit="run", disable=not self.state.is_main_process)

    def run(self, spec: RunSpec) -> dict[str, float]:
        """The final metrics of a run, trained now unless its folder has them already. Collective."""
        folder = self.output_dir / spec.name
        self.folders.append(folder)
        # One process looks, so that all go the same way.
        found = [self._look(spec, folder) if self.state.is_main_process else None]
        broadcast_object_list(found)
        metrics, resume = found[0]
        if metrics is None:
            metrics = self._train(spec, folder, resume)
            note = f"{metrics['wall_seconds']:.0f} s"
        else:
            note = "finished before"
        self.bar.update()
        if self.state.is_main_process:
            self.bar.write(run_line(spec, metrics, note))
        return metrics

    def _look(self, spec: RunSpec, folder: Path) -> tuple[dict[str, float] | None, bool]:
        """The metrics of a finished run of just this specification, and whether there is a checkpoint to go on from.

        A folder of other settings is emptied.
        """
        info = read_json(folder / "run.json")
        if info is not None and info.get("settings_hash") == spec.hash:
            return read_json(folder / "metrics.json"), get_last_checkpoint(folder) is not None
        if folder.exists():
            changed = sorted(
                key
                for key in {*spec.settings, *(info or {}).get("settings", {})}
                if spec.settings.get(key) != (info or {}).get("settings", {}).get(key)
            )
            self.bar.write(f"{spec.name}: trained again, since these settings changed: {', '.join(changed) or 'all'}")
            shutil.rmtree(folder)
        return None, False

    def _train(self, spec: RunSpec, folder: Path, resume: bool) -> dict[str, float]:
        started, clock = datetime.now(timezone.utc), time.perf_counter()
        info = {
            "schema": 1,
            "name": spec.name,
            "method": spec.method,
            "learning_rate": spec.learning_rate,
            "seed": spec.seed,
            **self.info,
            "settings": spec.settings,
            "settings_hash": spec.hash,
            "versions": versions(),
            "hardware": hardware(self.state),
            "started": started.isoformat(timespec="seconds"),
        }
        if self.state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", info)
        trainer = self.train_run(spec, folder, resume)
        metrics = final_metrics(trainer)
        metrics["wall_seconds"] = round(time.perf_counter() - clock, 3)
        if self.state.is_main_process:
            info["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_json(folder / "run.json", info)
            lines = (json.dumps(row) for row in history(trainer))
            (folder / "history.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            write_json(folder / "margins.json", margins(trainer))
            write_json(folder / "metrics.json", metrics)  # last: a folder with it is finished
        self.state.wait_for_everyone()
        return metrics

    def report(self) -> None:
        """Prints the table of these runs and writes the report. The main process does; the others have nothing to do.

        Folders that an earlier comparison left beside them do not belong to it.
        """
        self.bar.close()
        if not self.state.is_main_process:
            return
        result = compare_runs(self.folders)
        print("\n" + format_comparison(result))
        try:
            write_report(result, self.output_dir)
            print(f"\nReport: {self.output_dir / 'report.html'}")
        except ImportError as error:
            print(f"\nNo report was written: {error}")


class RunProgress(TrainerCallback):
    """The steps of one run on a bar of their own, in place of the trainer's bar and its printed logs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar = None

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            self.bar = tqdm(total=state.max_steps, desc=self.name, unit="step", leave=False, position=1)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and "loss" in (logs or {}):
            self.bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def show_progress(trainer: Trainer, name: str) -> None:
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(RunProgress(name))


def metric_name(key: str) -> str | None:
    """The name in design.md's sense of a key of a trainer's log: evaluations plain, training batches under train/."""
    if key.endswith(("_runtime", "_per_second", "_preparation_time")):
        return None
    if key in ("step", "epoch") or key.startswith("mask/"):
        return key
    return key.removeprefix("eval_") if key.startswith("eval_") else f"train/{key}"


def history(trainer: Trainer) -> list[dict[str, float]]:
    rows = []
    for entry in trainer.state.log_history:
        if "train_runtime" in entry:
            continue
        rows.append({name: value for key, value in entry.items() if (name := metric_name(key)) is not None})
    return rows


def final_metrics(trainer: Trainer) -> dict[str, float]:
    """The last evaluation and the mask of the last step."""
    evaluation = {metric_name(key): value for key, value in trainer.last_eval_metrics.items()}
    metrics = {key: value for key, value in evaluation.items() if key not in (None, "epoch", "train/epoch")}
    logged = [row for row in trainer.state.log_history if any(key.startswith("mask/") for key in row)]
    if logged:
        metrics |= {key: value for key, value in logged[-1].items() if key.startswith("mask/")}
    return {**metrics, "steps": trainer.state.global_step}


def margins(trainer: Trainer) -> dict[str, list]:
    """One number a pair, for paired statistics: beta times the difference of the log-ratios."""

    def rounded(pairs: PairEvaluation) -> list[float]:
        return [round(x, 6) for x in reward_margins(pairs, trainer.beta).tolist()]

    tables = trainer.pair_evaluations
    result = {"heldout": rounded(tables["eval"])}
    if "train" in tables:
        rows = trainer.memorization_rows
        result["train"] = rounded(tables["train"])
        result["train_flipped"] = trainer.train_dataset.select(rows)["flipped"][:]
    return result


def run_line(spec: RunSpec, metrics: dict[str, float], note: str) -> str:
    columns = (
        ("accuracy", "rewards/accuracies", ".3f"),
        ("flipped fit", "memorization/flipped_fit", ".3f"),
        ("KL", "drift/kl", ".4f"),
        ("mean q", "mask/mean_q", ".3f"),
    )
    shown = [f"{label} {metrics[key]:{form}}" for label, key, form in columns if key in metrics]
    return f"{spec.name:<36} {'  '.join(shown)}  ({note})"


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("prm-hf", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed"):
        try:
            found[name.replace("-", "_")] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware(state: PartialState) -> dict[str, Any]:
    cuda = state.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(state.device) if cuda else f"{state.device.type} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "world_size": state.num_processes,
        "distributed_type": str(state.distributed_type),
    }


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all: an interruption must not leave half a file that looks like a finished run."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1), encoding="utf-8")
    os.replace(part, path)
