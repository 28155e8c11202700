"""By how much a model prefers the label of each row as given, after every epoch of its training."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..metrics import ClassEvaluation, PairEvaluation, SequenceEvaluation, preference_scores, reward_margins
from ..metrics.tables import evaluate_rows, first_batch
from ..runs.read import read_json
from ..runs.write import write_json


# The column of the rows that are measured with their numbers: trainers leave out rows that say nothing
ROW = "row_of_dataset"
EPOCHS_FILE = "epochs.json"  # in the folder of a run with checkpoints, for going on from one


def with_other_prompts(rows: Dataset) -> Dataset:
    """Rows of completions, and after them a copy of each with the prompt of another row.

    What a completion says after its own prompt is compared with what it says after another one, so that margins do not
    depend on how long or how unusual a completion is.

    Args:
        rows: `n` rows with the columns `prompt`, `completion` and [`ROW`], the numbers 0 to n - 1.

    Returns:
        The rows, and copies whose numbers are -1, -2, …, of the rows 0, 1, …; none where all prompts are equal.
    """
    columns, n = rows.with_format(None).to_dict(), len(rows)
    prompts = columns["prompt"]
    # From the middle of the dataset on, since neighbours may be of one document
    shifts = [*range(n // 2, n), *range(1, n // 2)]
    others = [
        next(((i + k) % n for k in shifts if prompts[(i + k) % n] != prompt), i) for i, prompt in enumerate(prompts)
    ]
    kept = [i for i, other in enumerate(others) if other != i]
    copies = {name: [values[i] for i in kept] for name, values in columns.items()}
    copies |= {"prompt": [prompts[others[i]] for i in kept], ROW: [-1 - columns[ROW][i] for i in kept]}
    return concatenate_datasets([rows, Dataset.from_dict(copies, features=rows.features)]) if kept else rows


def row_margins(table: ClassEvaluation | SequenceEvaluation | PairEvaluation, beta: float = 1.0) -> torch.Tensor:
    """By how much a model prefers each row's label as it is given. Shape `(n,)`, float64.

    Of pairs, the reward margin. Of classes, the logit of the label minus the largest other one. Of completions, the
    mean log-probability of a token.
    """
    if isinstance(table, PairEvaluation):
        return reward_margins(table, beta)
    return table.margin if isinstance(table, ClassEvaluation) else table.logps / table.tokens.clamp(min=1)


def label_metrics(margins: Sequence[float]) -> dict[str, float]:
    """How far models agree with labels as given, of the margins of their rows: `agreement`, `margin` and `loss`."""
    values = torch.as_tensor(margins, dtype=torch.float64)
    loss = torch.nn.functional.softplus(-values).mean().item()
    return {"agreement": preference_scores(values).mean().item(), "margin": values.mean().item(), "loss": loss}


def join_margins(parts: Iterable[tuple[Sequence[int], Sequence[Sequence[float]]]], n: int) -> np.ndarray:
    """The margins that several models have of parts of `n` rows, as one table.

    Args:
        parts: of each model the numbers of its rows, and for each epoch a margin for each of these; NaN where it has
            none.

    Returns:
        Shape `(epochs, n)`, float64: the mean over the models that have a row, NaN where none has. Where models have
        not as many epochs, the last ones that all have.
    """
    parts = [(rows, np.asarray(margins, dtype=np.float64)) for rows, margins in parts]
    epochs = min(len(margins) for _, margins in parts)
    total, counts = np.zeros((epochs, n)), np.zeros((epochs, n))
    for rows, margins in parts:
        is_known = ~np.isnan(margins[-epochs:])
        total[:, rows] += np.where(is_known, margins[-epochs:], 0.0)
        counts[:, rows] += is_known
    return np.where(counts > 0, total / np.maximum(counts, 1), np.nan)


class MarginRecorder(TrainerCallback):
    """Measures the [`row_margins`] of all rows of the trainer's `eval_dataset` after every epoch.

    Collective over processes. For the trainers of pairs (DPO), completions (SFT) and classes, TRL's own included. From
    the margin of a completion that of its copy [`with_other_prompts`] is subtracted, if there are copies.

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
        numbers = list(rows.with_format(None)[ROW]) if has_numbers else list(range(len(rows)))
        place = {row: i for i, row in enumerate(numbers)}
        has_copies = any(row < 0 for row in numbers)
        self.rows: list[int] = [row for row in numbers if row >= 0 and (not has_copies or -1 - row in place)]
        self._places = [place[row] for row in self.rows]
        self._copies = [place[-1 - row] for row in self.rows] if has_copies else None
        self._loader = trainer.get_test_dataloader(rows.remove_columns(ROW) if has_numbers else rows)
        self._steps: list[int] = []
        self.epochs: list[list[float]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept = (read_json(self.file) if self.file is not None and state.global_step > 0 else None) or {}
        done = [i for i, step in enumerate(kept.get("steps", [])) if step <= state.global_step]
        self._steps = [kept["steps"][i] for i in done]
        self.epochs = [kept["margins"][i] for i in done]
        first_batch(self._loader)  # raises errors before a step is taken
        if state.global_step > 0 and float(state.epoch or 0.5).is_integer():
            self._measure(args, state)  # the checkpoint is of the end of an epoch, and its margins may be missing

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._measure(args, state)

    def _measure(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._steps and self._steps[-1] == state.global_step:
            return
        table = evaluate_rows(self.trainer, self._loader, needs_drift=False)
        found = row_margins(table, getattr(self.trainer, "beta", 1.0))
        margins = found[self._places] if self._copies is None else found[self._places] - found[self._copies]
        # Six digits, whatever the size: a small margin must not become a tie
        self.epochs.append([float(f"{x:.6g}") for x in margins.tolist()])
        self._steps.append(state.global_step)
        if self.file is not None and args.save_strategy != "no" and state.is_world_process_zero:
            write_json(self.file, {"steps": self._steps, "margins": self.epochs})
