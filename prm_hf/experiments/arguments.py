"""The arguments of a comparison, and the data that they name."""

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars, load_dataset, load_from_disk
from transformers import TrainingArguments
from transformers.utils import logging
from trl import ModelConfig, TrlParser

from .controls import check_methods


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass
class ComparisonArguments:
    """
    Arguments of a comparison of methods, learning rates and seeds on one noisy dataset.

    Parameters:
        dataset_name (`list[str]`, *optional*):
            Datasets on the hub, local folders, or local .json, .jsonl, .csv or .parquet files, each with a comparison
            of its own. `None` for the built-in task, whose clean labels are known.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, if it has several.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on, slices included (`train[:2000]`).
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Held-out split, whose labels stay as they are.
        eval_dataset_name (`list[str]`, *optional*):
            Datasets that the held-out splits are read from, if they are others than `dataset_name`; as many.
        task_seed (`int`, *optional*, defaults to `0`):
            Seed of the built-in task: of its prompts, its pairs and its reference policy.
        noise_rate (`list[float]`, *optional*, defaults to `[0.3]`):
            Probabilities with which a training label is corrupted, each with a comparison of its own.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Seeds; each has its own noise and its own order of the data.
        methods (`list[str]`, *optional*):
            Methods to compare.
        learning_rates (`list[float]`, *optional*):
            Learning rates of each method. Defaults to `learning_rate` alone, for the built-in task to a grid.
        prm_learning_rates (`list[float]`, *optional*):
            Learning rates of the PRM methods, if they are others than `learning_rates`; of the same number, so that
            every method gets a grid of one size.
        max_minutes (`float`, *optional*):
            Minutes after which no new run is started. The command then ends with exit code 75, and goes on where it
            stopped when it is given again.
    """

    dataset_name: list[str] | None = field(
        default=None,
        metadata={
            "help": "Datasets on the hub, local folders, or local .json, .jsonl, .csv or .parquet files, each with a "
            "comparison of its own. None: the built-in task."
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
    eval_dataset_name: list[str] | None = field(
        default=None,
        metadata={"help": "Datasets that the held-out splits are read from, if not `dataset_name`; as many."},
    )
    task_seed: int = field(
        default=0, metadata={"help": "Seed of the built-in task: of its prompts, its pairs and its reference policy."}
    )
    noise_rate: list[float] = field(
        default_factory=lambda: [0.3],
        metadata={
            "help": "Probabilities with which a training label is corrupted, each with a comparison of its own."
        },
    )
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
    max_minutes: float | None = field(
        default=None,
        metadata={
            "help": "Minutes after which no new run is started; the exit code is then 75. The same command goes on."
        },
    )

    def check(self, known_methods: list[str], learning_rate: float, max_grad_norm: float) -> None:
        """Fills in what was left open, and raises ValueError for what cannot be run."""
        for name in ("dataset_name", "eval_dataset_name", "noise_rate"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, list):  # one value of a YAML file
                setattr(self, name, [value])
        if self.methods is None:
            self.methods = ["adamw", "prm_per_tensor", "prm_debiased", "constant_q"]
        if self.learning_rates is None:
            self.learning_rates = [learning_rate]
        if self.prm_learning_rates is None:
            self.prm_learning_rates = list(self.learning_rates)
        for name in ("methods", "seeds", "noise_rate", "learning_rates", "prm_learning_rates"):
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
        for rate in self.noise_rate:
            if not 0 <= rate < 1:
                raise ValueError(f"`noise_rate` must be in [0, 1), got {rate}.")
        if self.task_seed < 0 or (self.task_seed and self.dataset_name is not None):
            raise ValueError(
                f"`task_seed` is the built-in task's and at least 0, got {self.task_seed}: leave it out with a "
                "`dataset_name`."
            )
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise ValueError(f"`max_minutes` must be above 0, got {self.max_minutes}.")
        names, others = self.dataset_name or [None], self.eval_dataset_name
        if others is not None and len(others) != len(names):
            raise ValueError(
                f"`eval_dataset_name` has {len(others)} values and `dataset_name` {len(names)}: give one for each."
            )
        if len({Path(name or "").stem for name in names}) != len(names):
            raise ValueError(f"`dataset_name` has two datasets of one name, {names}: their runs would share a folder.")
        check_methods(self.methods, known_methods, self.seeds, max_grad_norm)


@dataclass(frozen=True)
class BuiltIn:
    """The built-in task of a recipe: settings, examples a step, and what makes its model and rows of a seed."""

    settings: dict[str, Any]
    batch_size: int
    make: Callable[[int], tuple[str, Dataset, Dataset]]


@dataclass(frozen=True)
class Data:
    """Name or path of the model, what model and dataset are called, and the rows to train on and to hold out.

    `source` is what else tells this data from other data: splits, and the contents of local files. `processing_class`
    is the model's tokenizer, where it is loaded already.
    """

    model: str
    model_name: str
    dataset_name: str
    train: Dataset
    heldout: Dataset
    source: dict[str, Any]
    processing_class: Any = None


def parse_arguments(
    arguments: list[str],
    arguments_class: type[ComparisonArguments],
    config_class: type[TrainingArguments],
    methods: list[str],
    output_dir: str,
    built_in: BuiltIn,
) -> tuple[ComparisonArguments, TrainingArguments, ModelConfig]:
    """The three groups of arguments, from the command line and a YAML file, with the defaults of the built-in task.

    Raises:
        ValueError: for what cannot be run.
    """
    parser = TrlParser((arguments_class, config_class, ModelConfig))
    parser.set_defaults(output_dir=output_dir, report_to="none", drift_metrics=True)
    if not any(argument.split("=")[0] in ("--dataset_name", "--config") for argument in arguments):
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if built_in.batch_size % world_size:
            raise ValueError(
                f"The built-in task has {built_in.batch_size} examples a step, which {world_size} processes cannot "
                "share evenly. Launch 1, 2, 4, 8 or 16."
            )
        parser.set_defaults(**built_in.settings, per_device_train_batch_size=built_in.batch_size // world_size)
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    script_args.check(methods, training_args.learning_rate, training_args.max_grad_norm)
    if script_args.dataset_name is None and model_args.model_name_or_path is not None:
        raise ValueError(
            "`--model_name_or_path` needs a `--dataset_name`: the built-in task has a vocabulary of its own, and a "
            "model that comes with it."
        )
    if model_args.use_peft and any(method.startswith("adamw_embedding") for method in script_args.methods):
        raise ValueError("`adamw_embedding` changes the embedding's learning rate, which LoRA does not train.")
    if script_args.dataset_name is not None and model_args.model_name_or_path is None:
        raise ValueError("`--dataset_name` needs a `--model_name_or_path`: the model to train.")
    return script_args, training_args, model_args


def load_data(script_args: ComparisonArguments, model_args: ModelConfig, built_in: BuiltIn) -> Iterator[Data]:
    """The data of each comparison, one after the other."""
    logging.set_verbosity_error()
    if script_args.dataset_name is None:
        logging.disable_progress_bar()  # many short bars for a tiny model and a tiny dataset
        disable_progress_bars()
        if PartialState().is_main_process:
            print(
                "Built-in task: the reference policy is trained now, for about 30 s, unless it is cached.", flush=True
            )
        seed = script_args.task_seed
        model, train, heldout = built_in.make(seed)
        yield Data(model, "built-in", "built-in", train, heldout, {"task_seed": seed} if seed else {})
        return
    config = script_args.dataset_config
    splits = {"train_split": script_args.dataset_train_split, "test_split": script_args.dataset_test_split}
    others = script_args.eval_dataset_name or script_args.dataset_name
    for name, other in zip(script_args.dataset_name, others, strict=True):
        yield Data(
            model=model_args.model_name_or_path,
            model_name=local_name(model_args.model_name_or_path),
            dataset_name=local_name(name),
            train=load_split(name, config, splits["train_split"]),
            heldout=load_split(other, config if other == name else None, splits["test_split"]),
            source={**splits, "train_file": _digest(name), "test_file": _digest(other)},
        )


def local_name(name: str | None) -> str | None:
    """Of a local file or folder its own name, so that a run is the same wherever it lies; a hub's id stays."""
    return Path(name).name if name and Path(name).exists() else name


def _digest(name: str) -> str:
    """What tells the contents of a local file from others; a dataset on the hub or in a folder goes by its name."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else local_name(name)


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
