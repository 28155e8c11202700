"""By how much a model prefers the label of each row as given, after every epoch of its training."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..metrics import ClassEvaluation, PairEvaluation, SequenceEvaluation, reward_margins
from ..metrics.tables import evaluate_rows, first_batch
from ..runs.read import read_json
from ..runs.write import write_json


# The column of the rows that are measured with their numbers: trainers leave out rows that say nothing
ROW = "row_of_dataset"


def row_margins(
    table: ClassEvaluation | SequenceEvaluation | PairEvaluation,
    beta: float = 1.0,
    before: SequenceEvaluation | None = None,
) -> torch.Tensor:
    """By how much a model prefers each row's label as it is given. Shape `(n,)`, float64.

    Of pairs, the reward margin. Of classes, the logit of the label minus the largest other one. Of completions, the
    gain in mean log-probability a token over the model `before` training, which takes out how long and how unusual a
    completion is; without it the mean log-probability itself.
    """
    if isinstance(table, PairEvaluation):
        return reward_margins(table, beta)
    if isinstance(table, ClassEvaluation):
        return table.margin
    gained = table.logps if before is None else table.logps - before.logps
    return gained / table.tokens.clamp(min=1)


class MarginRecorder(TrainerCallback):
    """Measures the [`row_margins`] of all rows of the trainer's `eval_dataset` after every epoch.

    Collective over processes. For the trainers of pairs (DPO), completions (SFT) and classes, TRL's own included.

    Args:
        trainer: The trainer that it is added to. Its `eval_dataset` may have the column [`ROW`].
        file: Where the epochs so far are kept for a run that goes on from a checkpoint.
        held_out: The numbers of the rows that the trainer is not trained on.

    Attributes:
        rows (`list[int]`): The numbers of the rows that the trainer kept, by [`ROW`], else 0, 1, ….
        epochs (`list[list[float]]`): A list for each epoch so far, with one margin for each of `rows`.
    """

    def __init__(self, trainer: Trainer, file: Path | None = None, held_out: Collection[int] = ()) -> None:
        rows = trainer.eval_dataset
        if not isinstance(rows, Dataset):
            raise TypeError(
                f"`eval_dataset` of the trainer must be a `datasets.Dataset`, the rows that are measured, and it is "
                f"{'missing' if rows is None else f'a `{type(rows).__name__}`'}."
            )
        if getattr(trainer.args, "packing", False) or getattr(trainer.args, "eval_packing", False):
            raise ValueError("`packing` puts several rows into one, whose margins can't be told apart: unset it.")
        self.trainer, self.file, self.held_out = trainer, file, frozenset(held_out)
        has_numbers = ROW in rows.column_names
        self.rows: list[int] = list(rows.with_format(None)[ROW]) if has_numbers else list(range(len(rows)))
        self._loader = trainer.get_test_dataloader(rows.remove_columns(ROW) if has_numbers else rows)
        self._before: SequenceEvaluation | None = None
        self._steps: list[int] = []
        self.epochs: list[list[float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = (read_json(self.file) if self.file is not None and state.global_step > 0 else None) or {}
        done = [i for i, step in enumerate(kept.get("steps", [])) if step <= state.global_step]
        self._steps = [kept["steps"][i] for i in done]
        self.epochs = [kept["margins"][i] for i in done]
        batch = first_batch(self._loader)  # raises errors before a step is taken
        if "labels" not in batch or batch["labels"].dim() == 1:
            return
        if "before" in kept:
            logps, tokens = (torch.tensor(values) for values in kept["before"])
            self._before = SequenceEvaluation(logps.double(), None, tokens.long(), None)
        else:
            self._before = evaluate_rows(self.trainer, self._loader, needs_drift=False)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._steps and self._steps[-1] == state.global_step:  # a checkpoint at the end of an epoch
            return
        table = evaluate_rows(self.trainer, self._loader, needs_drift=False)
        margins = row_margins(table, getattr(self.trainer, "beta", 1.0), self._before)
        # Six digits, whatever the size: a small margin must not become a tie
        self.epochs.append([float(f"{x:.6g}") for x in margins.tolist()])
        self._steps.append(state.global_step)
        if self.file is not None and args.save_strategy != "no" and state.is_world_process_zero:
            kept = {"steps": self._steps, "margins": self.epochs}
            if self._before is not None:
                kept["before"] = [self._before.logps.tolist(), self._before.tokens.tolist()]
            write_json(self.file, kept)
