"""What a comparison has to know of its task: arguments, rows, trainer, and what a trained run gives."""

import os
import shlex
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import ModelConfig, get_quantization_config

from ..runs.methods import METHODS, Method
from ..runs.write import RunSpec
from .arguments import ComparisonArguments, help_groups, methods_help
from .command_line import CommandLine
from .data import Data
from .rows import Columns
from .simplicity import adapter_of


BUILT_IN_BATCH = 16  # examples a step of the built-in task, over all processes
BUILT_IN = {
    "num_train_epochs": 10,
    "lr_scheduler_type": "linear",
    "warmup_steps": 16,
    "max_grad_norm": 1.0,
    "weight_decay": 0.0,
    "max_length": 64,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 40,
    "per_device_eval_batch_size": 128,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def with_built_in_batch(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of the built-in task for as many processes as were launched."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if BUILT_IN_BATCH % world_size:
        raise ValueError(
            f"The built-in task has {BUILT_IN_BATCH} examples a step, which {world_size} processes cannot share "
            "evenly. Launch 1, 2, 4, 8 or 16."
        )
    settings = {**settings, "per_device_train_batch_size": BUILT_IN_BATCH // world_size}
    return settings if world_size == 1 else {**settings, "workers": 1}


def loading_settings(args: ModelConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that say how a model is loaded."""
    return {"revision": args.model_revision, "attn_implementation": args.attn_implementation, "dtype": args.dtype}


class Experiment(ABC):
    """A task on which methods are compared.

    A task is a subclass. It says in its class what its arguments are, and in its methods how a run is made.

    Attributes:
        command_line: what makes the same runs again.
    """

    command: ClassVar[str]  # of `prm-hf`
    description: ClassVar[str]
    task: ClassVar[str]  # in `run.json`
    output_dir: ClassVar[str]  # the default of the argument
    arguments_class: ClassVar[type[ComparisonArguments]] = ComparisonArguments
    config_class: ClassVar[type[TrainingArguments]]
    built_in: ClassVar[dict[str, Any]] = BUILT_IN  # the settings of the built-in task
    has_pairs: ClassVar[bool] = False  # whether a row is a pair, whose margin changes its sign with the label

    def __init__(
        self, script_args: ComparisonArguments, training_args: TrainingArguments, model_args: ModelConfig
    ) -> None:
        self.script_args, self.training_args, self.model_args = script_args, training_args, model_args
        self.command_line = ""

    @classmethod
    def parse(cls, arguments: list[str]) -> "Experiment":
        """From the command line and a YAML file, with the defaults of the built-in task where no dataset is named."""
        own = {"output_dir": cls.output_dir, "report_to": "none", "drift_metrics": True}

        def defaults(given: set[str]) -> dict[str, Any]:
            return own if "dataset_name" in given else {**own, **cls._built_in_settings()}

        types = (cls.arguments_class, cls.config_class, ModelConfig)
        parser = CommandLine(
            cls.command, cls.description, types, help_groups(*types), methods_help(cls.known_methods())
        )
        script_args, training_args, model_args = parser.parse(arguments, defaults)
        script_args.check(cls.known_methods(), training_args.learning_rate, training_args.max_grad_norm)
        if training_args.optim != "prm":
            name = getattr(training_args.optim, "value", training_args.optim)
            raise ValueError(f"`methods` choose the optimizers, and `optim` is {name!r}: leave it unset.")
        model = model_args.model_name_or_path
        if script_args.dataset_name is None and model is not None:
            raise ValueError(
                "`--model_name_or_path` needs a `--dataset_name`: the built-in task has a vocabulary of its own, and "
                "a model that comes with it."
            )
        if script_args.dataset_name is not None and model is None:
            raise ValueError("`--dataset_name` needs a `--model_name_or_path`: the model to train.")
        if model_args.use_peft and any(method.key == "adamw_embedding" for method in script_args.compared):
            raise ValueError("`adamw_embedding` changes the embedding's learning rate, which LoRA does not train.")
        if model_args.use_peft and any(method.key == "interpolate" for method in script_args.compared):
            raise ValueError(
                "`interpolate` moves the trained weights back, and the weights of LoRA multiply each other: leave "
                "it out of `methods`, or train without `use_peft`."
            )
        training_args.model_init_kwargs = {**loading_settings(model_args), **(training_args.model_init_kwargs or {})}
        experiment = cls(script_args, training_args, model_args)
        experiment.command_line = shlex.join(["prm-hf", cls.command, *arguments])
        return experiment

    @classmethod
    def _built_in_settings(cls) -> dict[str, Any]:
        return with_built_in_batch(cls.built_in)

    @classmethod
    def known_methods(cls) -> Collection[str]:
        """The methods of this task, without values."""
        return METHODS

    @staticmethod
    def built_in_rows(pairs: Dataset) -> Dataset:
        """The rows of the built-in task, of its preference pairs."""
        return pairs

    def info(self) -> dict[str, str]:
        """What `run.json` says of the task: `task`, and `accuracy` where it is not the task's."""
        return {"task": self.task}

    def settings(self) -> dict[str, Any]:
        """The settings of the task that make a run what it is."""
        return {}

    @abstractmethod
    def columns(self) -> Columns:
        """The columns of a dataset that the task reads."""

    def unused_arguments(self) -> dict[str, str]:
        """Arguments of the task that others leave without effect, each with the reason, as the end of a sentence."""
        return {}

    @abstractmethod
    def check_method(self, method: Method, config: TrainingArguments) -> None:
        """Raises ValueError if a trainer of the task would refuse a method, by its training configuration."""

    def check_simplicity(self, asked: Sequence[str]) -> None:  # noqa: B027 (most tasks have nothing to refuse)
        """Raises ValueError if a trainer of the task has rows on which these measures cannot be taken.

        Args:
            asked: `"effective_dimension"`, `"bound"`, or both.
        """

    @abstractmethod
    def check_rows(self, data: Data) -> None:
        """Raises ValueError for rows that a run would fail on."""

    def model_settings(self) -> dict[str, Any]:
        """Arguments of a TRL trainer that say how it is to load the model."""
        quantization = get_quantization_config(self.model_args)
        return {"quantization_config": quantization, "peft_config": adapter_of(self.script_args, self.model_args)}

    def prepare(self, data: Data) -> Data:
        """Makes of the data what all runs can share."""
        return data

    def readable(self, data: Data) -> Data:
        """The data with the columns that `noisy_rows` needs, and that a person can read."""
        return data

    @abstractmethod
    def noisy_rows(self, spec: RunSpec, data: Data) -> Dataset:
        """The training rows with the noise of a run, and a bool column that says which labels are wrong."""

    @abstractmethod
    def make_trainer(self, config: TrainingArguments, spec: RunSpec, data: Data) -> Trainer:
        """The trainer of one run, on `data.given` or, without them, on its noisy rows."""

    @abstractmethod
    def outcomes(self, trainer: Trainer, data: Data) -> tuple[dict[str, float], dict[str, list]]:
        """What a trained run gives besides its last evaluation: more metrics, and `margins.json`. Collective."""
