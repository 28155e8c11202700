"""Folds of prompts: which rows a model is not trained on, and by how much it then prefers their labels as given."""

import json
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ..metrics import PairEvaluation, SequenceEvaluation, reward_margins, row_fit
from ..runs.read import read_json
from ..runs.schema import MARGINS_FILE
from ..trainers.tables import evaluate_rows


ROW = "row_number"  # the column that tells which row of a dataset a row of a trainer was
EPOCHS_FILE = "epochs.jsonl"  # in the folder of a run: a line an epoch, so that a resumed run has them all


def assign_folds(groups: Sequence[Hashable], folds: int, seed: int) -> np.ndarray:
    """The fold of each row, `(n,)` int64, from 0: rows of one group share theirs, and folds have about as many rows.

    Raises:
        ValueError: there are fewer groups than folds, or fewer than two folds.
    """
    distinct = list(dict.fromkeys(groups))
    if not 2 <= folds <= len(distinct):
        raise ValueError(
            f"There must be at least 2 folds, and no more than the {len(distinct)} different prompts; got {folds}."
        )
    rows = {group: [] for group in distinct}
    for row, group in enumerate(groups):
        rows[group].append(row)
    found, sizes = np.empty(len(groups), dtype=np.int64), np.zeros(folds, dtype=np.int64)
    for place in np.random.default_rng(seed).permutation(len(distinct)):
        fold = sizes.argmin()
        found[rows[distinct[place]]] = fold
        sizes[fold] += len(rows[distinct[place]])
    return found


def fold_method(method: str, fold: int | None, folds: int) -> str:
    """The method in the specification of a run of `method` without one fold; of one with all rows `fold` is None."""
    return f"{method}-all" if fold is None else f"{method}-fold{fold + 1}of{folds}"


def numbered(rows: Dataset) -> Dataset:
    """The rows with the column `ROW`, by which `hold_out` knows them again."""
    return rows.add_column(ROW, list(range(len(rows))))


def hold_out(trainer: Trainer, folds: np.ndarray | None, fold: int | None, folder: Path) -> "LabelMargins":
    """Takes a fold out of the training rows of a trainer, and has its margins measured after each epoch.

    Args:
        trainer: its training rows are `numbered`. It has not begun to train.
        folds: from `assign_folds`.
        fold: None to train on all rows, and to measure all: in sample.
        folder: of the run, for what has been measured so far.
    """
    numbers = trainer.train_dataset[ROW][:]
    is_held = [fold is None or folds[number] == fold for number in numbers]
    held = trainer.train_dataset.select([i for i, held in enumerate(is_held) if held])
    if fold is not None:
        trainer.train_dataset = trainer.train_dataset.select([i for i, held in enumerate(is_held) if not held])
    recorder = LabelMargins(trainer, held, folder)
    trainer.add_callback(recorder)
    return recorder


class LabelMargins(TrainerCallback):
    """Measures the `label_margins` of rows at the end of each epoch, and keeps them in the folder of the run."""

    def __init__(self, trainer: Trainer, rows: Dataset, folder: Path) -> None:
        self.trainer, self.file, self.rows = trainer, Path(folder) / EPOCHS_FILE, rows[ROW][:]
        self._loader = trainer.get_test_dataloader(rows)

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 0:
            self.file.unlink(missing_ok=True)

    def on_epoch_end(self, args, state, control, **kwargs):
        margins = label_margins(self.trainer, self._loader).tolist()
        if state.is_world_process_zero:
            line = {"step": state.global_step, "margins": [float(f"{x:.6g}") for x in margins]}
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def outcomes(self) -> dict[str, list]:
        """What `margins.json` has: the numbers of the rows, and a list of their margins for each epoch."""
        lines = map(json.loads, self.file.read_text(encoding="utf-8").splitlines()) if self.file.exists() else ()
        steps = {line["step"]: line["margins"] for line in lines}  # a resumed run repeats those after its checkpoint
        return {"rows": self.rows, "label_margins": [steps[step] for step in sorted(steps)]}


def label_margins(trainer: Trainer, loader: torch.utils.data.DataLoader) -> torch.Tensor:
    """By how much a model prefers the label of each row as given, `(n,)` float64. Collective.

    Of pairs the reward margin, of completions the mean log-probability of a token, and of classes the log-odds of the
    label.
    """
    table = evaluate_rows(trainer, loader, needs_drift=False)
    if isinstance(table, PairEvaluation):
        return reward_margins(table, trainer.beta)
    _, loss = row_fit(table)
    return -loss if isinstance(table, SequenceEvaluation) else -torch.expm1(loss).log()


def join_margins(folders: Sequence[Path], n: int) -> np.ndarray:
    """The margins that runs of all folds have measured, `(epochs, n)`; NaN of a row that no trainer took.

    Where folds have not as many epochs, the last ones that all have.
    """
    found = [read_json(folder / MARGINS_FILE) for folder in folders]
    epochs = min(len(run["label_margins"]) for run in found)
    margins = np.full((epochs, n), np.nan)
    for run in found:
        margins[:, run["rows"]] = run["label_margins"][len(run["label_margins"]) - epochs :]
    return margins
