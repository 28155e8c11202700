"""Memorization: which training rows it is measured on, and the callback that measures it in any trainer."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._names import renamed_arguments
from ..metrics import fit_metrics, memorization_rows, row_fit, suspect_metrics
from ..metrics.tables import evaluate_rows, first_batch
from .config import greater_is_better


logger = logging.getLogger(__name__)

# The columns that say which rows of a dataset are noisy: of `prm_hf.noise.corrupt`, and of `flip_preferences`
NOISE_COLUMNS = ("corrupted", "flipped")


def noisy_rows(
    dataset: Dataset | IterableDataset, memorization_max_rows: int | None, columns: Sequence[str] = NOISE_COLUMNS
) -> tuple[list[int], torch.Tensor]:
    """The training rows that are measured, and which of them are noisy, a bool tensor; none without a column.

    Raises:
        TypeError: `dataset` is a stream, or no dataset.
        ValueError: the column is not of bools, or some rows have no entry.
    """
    if not isinstance(dataset, Dataset):
        found = type(dataset).__name__
        raise TypeError(
            f"`train_dataset` must be a `datasets.Dataset`, whose rows can be chosen, and it is an `{found}`."
        )
    rows = memorization_rows(len(dataset), memorization_max_rows)
    column = next((name for name in columns if name in dataset.column_names), None)
    if column is None:
        return rows, torch.zeros(len(rows), dtype=torch.bool)
    if (dtype := dataset.features[column].dtype) != "bool":
        raise ValueError(f"The column {column!r} of `train_dataset` must be bool, got {dtype}: cast it.")
    flags = dataset.with_format(None).select(rows)[column][:]
    if None in flags:
        raise ValueError(
            f"The column {column!r} of `train_dataset` is empty in some rows: fill it with True or False."
        )
    return rows, torch.tensor(flags)


class MemorizationCallback(TrainerCallback):
    """
    Measures at each evaluation how well corrupted and clean training rows are fitted, and held-out rows beside them.

    For the trainers of classifiers (a model with `logits` of a class each row), SFT and DPO, TRL's own ones included.
    The numbers of [`~prm_hf.metrics.fit_metrics`], of the fit by [`~prm_hf.metrics.row_fit`], are logged and added to
    what `evaluate` returns, as `eval_memorization/…`; and as `eval_suspects/…` those of
    [`~prm_hf.metrics.suspect_metrics`], how well their losses tell which rows are corrupted. All are exact over rows,
    and collective over processes.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that it is added to. A bool column `corrupted` or `flipped` of its `train_dataset` says which
            rows are noisy; without it all count as clean.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out rows, as the trainer has them prepared. Defaults to its `eval_dataset`, unless that is a dict.
        memorization_max_rows (`int`, *optional*, defaults to `1024`):
            Number of training rows measured, spread evenly over the training set. `None` for all.

    Example:

    ```python
    >>> trainer = SFTTrainer(model, args=args, train_dataset=corrupt(train, "partial_labels", 0.3), eval_dataset=test)
    >>> trainer.add_callback(MemorizationCallback(trainer))
    ```
    """

    @renamed_arguments(max_rows="memorization_max_rows")
    def __init__(
        self, trainer: Trainer, eval_dataset: Dataset | None = None, memorization_max_rows: int | None = 1024
    ):
        if memorization_max_rows is not None and memorization_max_rows < 1:
            raise ValueError(f"`memorization_max_rows` must be at least 1, or None, got {memorization_max_rows!r}.")
        is_own = eval_dataset is None and isinstance(trainer.eval_dataset, Dataset)
        eval_dataset = trainer.eval_dataset if is_own else eval_dataset
        _check_measurable(trainer.args, is_own)
        self.trainer = trainer
        self.rows, self.corrupted = noisy_rows(trainer.train_dataset, memorization_max_rows)
        self._datasets = {"train": trainer.train_dataset.select(self.rows)}
        if eval_dataset is not None:
            self._datasets["heldout"] = eval_dataset
        self._loaders: dict[str, DataLoader] = {}
        self._step: int | None = None
        self._measured: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        metric = args.metric_for_best_model
        if metric is not None and args.greater_is_better and greater_is_better(metric) is False:
            logger.warning(
                "`metric_for_best_model=%r` is better the smaller it is, and `greater_is_better` is True, which "
                "transformers sets by itself: the best model is the one with the largest. Set it to False.",
                metric,
            )
        # Raise errors now rather than at the first evaluation
        for name in self._datasets:
            first_batch(self._loader(name))

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs
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
        beta = getattr(self.trainer, "beta", 1.0)
        fits = {name: row_fit(evaluate_rows(self.trainer, self._loader(name), False), beta) for name in self._datasets}
        _, loss = fits["train"]
        found = suspect_metrics(loss, self.corrupted)
        return {**fit_metrics(fits["train"], self.corrupted, fits.get("heldout")), **found}

    def _loader(self, name: str) -> DataLoader:
        if name not in self._loaders:
            self._loaders[name] = self.trainer.get_test_dataloader(self._datasets[name])
        return self._loaders[name]


def _check_measurable(args: TrainingArguments, takes_trainers_eval_dataset: bool) -> None:
    """Raises where a row is not one example, or where the reference follows the policy."""
    packs = getattr(args, "packing", False)
    eval_packs = packs if getattr(args, "eval_packing", None) is None else args.eval_packing
    problem = None
    if packs:
        problem = "`packing=True` puts several examples into a row and drops the columns that say which are noisy"
    elif eval_packs and takes_trainers_eval_dataset:
        problem = "`eval_packing=True` puts several held-out examples into a row"
    elif getattr(args, "sync_ref_model", False):
        problem = "`sync_ref_model=True` moves the reference that the fit of a pair is measured by"
    if problem is not None:
        raise ValueError(
            f"`MemorizationCallback` can't measure the fit of single examples, since {problem}: unset it"
            f"{', for instance for `padding_free=True`' if packs else ''}, or leave the callback out."
        )
