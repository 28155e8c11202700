"""What a model has learnt by heart, measured at each evaluation of any Trainer."""

from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..metrics import (
    evaluate_classes,
    evaluate_pairs,
    evaluate_sequences,
    fit_metrics,
    memorization_rows,
    row_fit,
)
from .mixin import rows_of


_FLAGS = ("corrupted", "flipped")


class MemorizationCallback(TrainerCallback):
    """
    Measures at each evaluation how well corrupted and clean training rows are fitted, and held-out rows beside them.

    For the trainers of classifiers (a model with `logits` of a class each row), SFT and DPO, TRL's own ones included.
    The fit of a row is, against the label trained on: whether the class is right; the share of the completion's tokens
    that are the most probable ones; whether the chosen completion has the larger implicit reward. Logged, and added to
    what `evaluate` returns, are (as `eval_…`) the means `memorization/corrupted_fit`, `memorization/clean_fit`,
    `memorization/train_fit`, `memorization/heldout_fit`, their losses `…_loss`, and `memorization/gap`, the train fit
    minus the held-out fit. All are exact over rows, and collective over processes.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that it is added to, with a `train_dataset` that has a bool column `corrupted` (from
            `prm_hf.noise.corrupt`) or `flipped`. Without the column all rows count as clean.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out rows, as the trainer has them prepared. Defaults to the trainer's `eval_dataset`; of a dict of
            datasets, none.
        max_rows (`int`, *optional*, defaults to `1024`):
            Number of training rows measured, spread evenly over the training set. `None` for all.

    Example:

    ```python
    >>> trainer = SFTTrainer(model, args=args, train_dataset=corrupt(train, "partial_labels", 0.3), eval_dataset=test)
    >>> trainer.add_callback(MemorizationCallback(trainer))
    ```
    """

    def __init__(self, trainer: Trainer, eval_dataset: Dataset | None = None, max_rows: int | None = 1024):
        if not isinstance(trainer.train_dataset, Dataset):
            raise TypeError(
                "`trainer.train_dataset` must be a `datasets.Dataset`, whose rows can be chosen, got "
                f"{type(trainer.train_dataset).__name__}."
            )
        if max_rows is not None and max_rows < 1:
            raise ValueError(f"`max_rows` must be at least 1, or None for all training rows, got {max_rows!r}.")
        self.trainer = trainer
        self.rows = memorization_rows(len(trainer.train_dataset), max_rows)
        chosen = trainer.train_dataset.select(self.rows)
        column = next((name for name in _FLAGS if name in chosen.column_names), None)
        self.corrupted = torch.tensor(chosen.with_format(None)[column][:] if column else [False] * len(chosen))
        if self.corrupted.dtype != torch.bool:
            raise ValueError(
                f"The column {column!r} of `trainer.train_dataset` must be bool, got {self.corrupted.dtype}."
            )
        if eval_dataset is None and isinstance(trainer.eval_dataset, Dataset):
            eval_dataset = trainer.eval_dataset
        self._datasets = {"train": chosen, "heldout": eval_dataset}
        self._loaders: dict[str, Any] = {}
        self._step: int | None = None
        self._measured: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # What cannot be measured is said now rather than at the first evaluation
        for name, dataset in self._datasets.items():
            if dataset is not None:
                self._first_batch(name)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs,
    ) -> None:
        is_other_split = isinstance(self.trainer.eval_dataset, dict) and self._step == state.global_step
        if not is_other_split:
            self._step = state.global_step
            self._measured = {f"eval_{name}": value for name, value in self.measure().items()}
            self.trainer.log(dict(self._measured))
        if metrics is not None:
            metrics.update(self._measured)

    def measure(self) -> dict[str, float]:
        """The metrics of the present weights, by their names without a prefix. Collective."""
        fits = {name: self._fit(name) for name, dataset in self._datasets.items() if dataset is not None}
        return fit_metrics(fits["train"], self.corrupted, fits.get("heldout"))

    def _first_batch(self, name: str) -> dict[str, torch.Tensor]:
        """The batch of the first row alone, whose shapes say what kind of task it is."""
        if name not in self._loaders:
            self._loaders[name] = self.trainer.get_test_dataloader(self._datasets[name])
        loader = self._loaders[name]
        batch = loader.collate_fn([dict(rows_of(loader)[0])])
        labels = batch.get("labels")
        if labels is not None and (labels.is_floating_point() or labels.dim() > 2):
            raise ValueError(
                "`MemorizationCallback` measures the fit of classes, completions and preference pairs; the `labels` "
                f"of this trainer are {labels.dtype} of shape {tuple(labels.shape)}, a batch of one row. Leave it out."
            )
        return batch

    def _fit(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        trainer, batch = self.trainer, self._first_batch(name)
        loader = self._loaders[name]
        arguments = (trainer.model_wrapped, rows_of(loader), loader.collate_fn, trainer.accelerator)
        batch_size = trainer.args.per_device_eval_batch_size
        if "labels" in batch and batch["labels"].dim() == 1:
            return row_fit(evaluate_classes(*arguments, batch_size=batch_size))
        if "labels" in batch:
            # A padding-free batch is one long sequence: taken row by row, its sums are the row's
            batch_size = 1 if getattr(trainer, "padding_free", False) else batch_size
            return row_fit(evaluate_sequences(*arguments, batch_size=batch_size))
        pairs = evaluate_pairs(*arguments, ref_model=trainer.ref_model, batch_size=batch_size)
        return row_fit(pairs, trainer.beta)
