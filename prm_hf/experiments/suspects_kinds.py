"""What `prm-hf suspects` has to know of preferences, completions and class labels: rows, configuration, trainer."""

import copy
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from datasets import ClassLabel, Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)
from trl import ModelConfig, get_peft_config, get_quantization_config

from .. import PRM, PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer, flip_preferences
from ..demo import completion_rows
from ..noise import corrupt
from ..noise.columns import LABELS, MARKS
from ..suspects.margins import with_other_prompts
from ..trainers.config import PRMArguments, prm_kwargs, scaled_by_relative_eps, with_help
from ..trainers.presets import with_preset
from .experiment import loading_settings
from .rows import Columns, check_rows, prompts_of


@with_help
@dataclass
class PRMClassConfig(PRMArguments, TrainingArguments):
    """
    Configuration of a classifier: the arguments of [`PRMArguments`] and of [`~transformers.TrainingArguments`].

    Parameters:
        max_length (`int`, *optional*, defaults to `512`):
            Number of tokens that a text is truncated to.
    """

    max_length: int = 512


class Kind(ABC):
    """A kind of labels that can be wrong. One object serves all runs of a command.

    Attributes:
        model: name or path of the model.
    """

    name: ClassVar[str]
    task: ClassVar[str]  # in `run.json`
    config_class: ClassVar[type[TrainingArguments]]
    built_in: ClassVar[dict[str, Any]] = {}  # what the settings of the built-in task have beside those of all kinds

    def __init__(self, model: str, model_args: ModelConfig) -> None:
        self.model, self.model_args = model, model_args

    @staticmethod
    @abstractmethod
    def built_in_rows(pairs: Dataset, noise_rate: float, seed: int) -> Dataset:
        """The rows of the built-in task, with a column of `MARKS`."""

    @staticmethod
    @abstractmethod
    def columns(rows: Dataset) -> Columns:
        """The columns that are read."""

    def check(self, rows: Dataset, place: str) -> None:
        """Raises ValueError for rows that a run would fail on; `place` are words for the rows."""
        check_rows(rows, place, self.columns(rows))

    def groups(self, rows: Dataset) -> list[str]:
        """The prompt of each row."""
        return prompts_of(rows, self.columns(rows))

    def prepare(self, rows: Dataset, config: TrainingArguments) -> Dataset:
        """What all runs can share of the rows, whose column `ROW` stays. Collective."""
        return rows

    @abstractmethod
    def make_trainer(self, config: TrainingArguments, train: Dataset, rows: Dataset) -> Trainer:
        """A trainer on some of the prepared rows, whose `eval_dataset` are all of them."""

    def model_settings(self) -> dict[str, Any]:
        """Arguments of a TRL trainer that say how it is to load the model."""
        args = self.model_args
        return {"quantization_config": get_quantization_config(args), "peft_config": get_peft_config(args)}


class Preferences(Kind):
    """Pairs whose sides may be exchanged."""

    name, task, config_class = "preference", "preferences", PRMDPOConfig
    built_in: ClassVar[dict[str, Any]] = {"beta": 0.1, "max_length": 64, "learning_rate": 1e-3}

    def __init__(self, model: str, model_args: ModelConfig) -> None:
        super().__init__(model, model_args)
        self.tokenizer: Any = None

    @staticmethod
    def built_in_rows(pairs: Dataset, noise_rate: float, seed: int) -> Dataset:
        return flip_preferences(pairs, noise_rate, seed=seed)

    @staticmethod
    def columns(rows: Dataset) -> Columns:
        return Columns("prompt", ("chosen", "rejected"), needs_prompt=False, advice="Rename yours in the dataset.")

    def prepare(self, rows: Dataset, config: PRMDPOConfig) -> Dataset:
        """The rows tokenized, with the reference's log-probabilities, which the folds then share.

        Where several processes train one run, each run computes its own, as in a comparison.
        """
        if config.world_size > 1 or config.deepspeed_plugin is not None or config.sync_ref_model:
            return rows
        config = copy.deepcopy(config)
        config.precompute_ref_log_probs, config.optim = True, "adamw_torch"
        trainer = self._trainer(config, rows, None)
        self.tokenizer = trainer.processing_class
        return trainer.train_dataset

    def make_trainer(self, config: PRMDPOConfig, train: Dataset, rows: Dataset) -> PRMDPOTrainer:
        config.precompute_ref_log_probs |= "ref_chosen_logps" in rows.column_names
        return self._trainer(config, train, rows)

    def _trainer(self, config: PRMDPOConfig, train: Dataset, rows: Dataset | None) -> PRMDPOTrainer:
        return PRMDPOTrainer(
            model=self.model,
            args=config,
            train_dataset=train,
            eval_dataset=rows,
            processing_class=self.tokenizer,
            **self.model_settings(),
        )


class Completions(Kind):
    """Prompts whose completion may be that of another prompt."""

    name, task, config_class = "completion", "sft", PRMSFTConfig
    built_in: ClassVar[dict[str, Any]] = {"max_length": 64, "learning_rate": 1e-2}

    @staticmethod
    def built_in_rows(pairs: Dataset, noise_rate: float, seed: int) -> Dataset:
        return corrupt(completion_rows(pairs), "partial_labels", noise_rate, seed=seed)

    @staticmethod
    def columns(rows: Dataset) -> Columns:
        return Columns("prompt", ("completion",), needs_prompt=True, advice="Rename yours in the dataset.")

    def prepare(self, rows: Dataset, config: PRMSFTConfig) -> Dataset:
        return with_other_prompts(rows)

    def make_trainer(self, config: PRMSFTConfig, train: Dataset, rows: Dataset) -> PRMSFTTrainer:
        return PRMSFTTrainer(
            model=self.model, args=config, train_dataset=train, eval_dataset=rows, **self.model_settings()
        )


class Classes(Kind):
    """Texts, or rows of a table, whose class may be another one.

    Without a column `text` the text of a row is made of all its columns but the label, as `age: 37`.
    """

    name, task, config_class = "label", "labels", PRMClassConfig

    def __init__(self, model: str, model_args: ModelConfig) -> None:
        super().__init__(model, model_args)
        self.tokenizer: Any = None
        self.n_classes = 0

    @staticmethod
    def built_in_rows(pairs: Dataset, noise_rate: float, seed: int) -> Dataset:
        raise ValueError("`kind` is 'label', and the built-in task has preferences and completions: name a dataset.")

    @staticmethod
    def columns(rows: Dataset) -> Columns:
        column = next((name for name in LABELS if name in rows.column_names), "label")
        return Columns("text", (column,), needs_prompt=False, advice="Rename yours in the dataset.")

    def check(self, rows: Dataset, place: str) -> None:
        (column,) = self.columns(rows).completions
        if not len(rows) or column not in rows.column_names:
            raise ValueError(f"{place} have no column 'label'; they have {rows.column_names}. Rename yours.")
        labels = rows[column][:]
        wrong = [i for i, x in enumerate(labels) if x == -1 or not isinstance(x, str | int) or isinstance(x, bool)]
        if wrong:
            raise ValueError(
                f"{place} must have a class in the column {column!r}, a name or a whole number, and {len(wrong)} of "
                f"{len(rows)} have none: the first is {labels[wrong[0]]!r} in row {wrong[0]} (from 0). Correct them, "
                "or remove these rows."
            )
        if len(set(labels)) < 2:
            raise ValueError(f"{place} are all of the class {labels[0]!r}: there is no other one to be mistaken for.")
        empty = [i for i, text in enumerate(self._texts(rows)) if not text]
        if empty:
            raise ValueError(f"{place} must have a text, and {len(empty)} have none: the first is row {empty[0]}.")

    def groups(self, rows: Dataset) -> list[str]:
        return self._texts(rows)

    def _texts(self, rows: Dataset) -> list[str]:
        if "text" in rows.column_names:
            return [text or "" for text in rows["text"]]
        left_out = {*self.columns(rows).completions, *MARKS, "group"}
        names = [name for name in rows.column_names if name not in left_out]
        return ["\n".join(f"{name}: {row[name]}" for name in names) for row in rows.select_columns(names)]

    def prepare(self, rows: Dataset, config: PRMClassConfig) -> Dataset:
        """Tokens, and labels from 0, beside the other columns."""
        (column,) = self.columns(rows).completions
        labels, feature = rows[column][:], rows.features[column]
        if isinstance(feature, ClassLabel):
            self.n_classes, codes = feature.num_classes, labels
        else:
            places = {label: place for place, label in enumerate(sorted(set(labels)))}
            self.n_classes, codes = len(places), [places[label] for label in labels]
        self.tokenizer = AutoTokenizer.from_pretrained(self.model, revision=self.model_args.model_revision)
        tokens = self.tokenizer(self._texts(rows), truncation=True, max_length=config.max_length)
        kept = rows.select_columns([name for name in rows.column_names if name not in ("label", "labels", *tokens)])
        for name, values in {**tokens, "labels": codes}.items():
            kept = kept.add_column(name, values)
        return kept

    def make_trainer(self, config: PRMClassConfig, train: Dataset, rows: Dataset) -> Trainer:
        loading = {name: value for name, value in loading_settings(self.model_args).items() if value is not None}
        quantization = get_quantization_config(self.model_args)
        if quantization is not None:
            loading["quantization_config"] = quantization
        model = AutoModelForSequenceClassification.from_pretrained(self.model, num_labels=self.n_classes, **loading)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        peft_config = get_peft_config(self.model_args)
        if peft_config is not None:
            from peft import TaskType, get_peft_model

            peft_config.task_type = TaskType.SEQ_CLS  # the head is trained beside the adapters
            model = get_peft_model(model, peft_config)
        return Trainer(
            model,
            config,
            train_dataset=train,
            eval_dataset=rows,
            data_collator=DataCollatorWithPadding(self.tokenizer),
            processing_class=self.tokenizer,
            optimizer_cls_and_kwargs=_optimizer(config, model, peft_config is not None),
        )


def _optimizer(config: PRMClassConfig, model: Any, is_peft: bool) -> tuple[type, dict[str, Any]]:
    """The optimizer that the arguments stand for, as TRL's trainers with PRM choose it."""
    if config.optim == "prm":
        return PRM, prm_kwargs(with_preset(config, is_peft))
    optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(config, model)
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return optimizer, scaled_by_relative_eps(config, settings, numel)


KINDS: dict[str, type[Kind]] = {kind.name: kind for kind in (Preferences, Completions, Classes)}
