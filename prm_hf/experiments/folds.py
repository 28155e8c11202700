"""Folds of prompts: which rows a model is not trained on, and by how much it then prefers their labels as given."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import Trainer, TrainerCallback

from ..metrics import PairEvaluation, SequenceEvaluation, preference_scores, reward_margins, row_fit
from ..runs.read import read_json
from ..runs.schema import MARGINS_FILE
from ..runs.write import write_json
from ..trainers.tables import evaluate_rows


ROW = "row_number"  # the column that tells which row of a dataset a row of a trainer was
EPOCHS_FILE = "epochs.json"


def assign_folds(groups: Sequence[Hashable], folds: int, seed: int) -> np.ndarray:
    """The fold of each row, `(n,)` int64, from 0: rows of one group share theirs, and folds have about as many rows.

    Raises:
        ValueError: there are fewer groups than folds, or fewer than two folds.
    """
    distinct = list(dict.fromkeys(groups))
    if not 2 <= folds <= len(distinct):
        raise ValueError(
            f"There must be at least 2 folds, and no more than the {len(distinct)} different prompts; got {folds}: "
            "set `repair_folds`."
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


def hold_out(trainer: Trainer, folds: np.ndarray | None, fold: int | None) -> "LabelMargins":
    """Takes a fold out of the training rows of a trainer, and has its margins measured after each epoch.

    Args:
        trainer: its training rows are `numbered`. It has not begun to train.
        folds: from `assign_folds`.
        fold: None to train on all rows, and to measure all: in sample.
    """
    numbers = trainer.train_dataset[ROW][:]
    is_held = [fold is None or folds[number] == fold for number in numbers]
    held = trainer.train_dataset.select([i for i, held in enumerate(is_held) if held])
    if fold is not None:
        trainer.train_dataset = trainer.train_dataset.select([i for i, held in enumerate(is_held) if not held])
    recorder = LabelMargins(trainer, held)
    trainer.add_callback(recorder)
    return recorder


class LabelMargins(TrainerCallback):
    """Measures the `label_margins` of rows at the end of each epoch.

    With checkpoints they are kept in the output folder of the trainer, so that a resumed run has those of all epochs.
    """

    def __init__(self, trainer: Trainer, rows: Dataset) -> None:
        self.trainer, self.rows = trainer, rows[ROW][:]
        self._loader, self._file = trainer.get_test_dataloader(rows), Path(trainer.args.output_dir) / EPOCHS_FILE
        self._margins: dict[str, list[float]] = {}  # by the step, as JSON has it

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            kept = read_json(self._file) or {}
            self._margins = {step: margins for step, margins in kept.items() if int(step) <= state.global_step}

    def on_epoch_end(self, args, state, control, **kwargs):
        margins = label_margins(self.trainer, self._loader).tolist()
        self._margins[str(state.global_step)] = [float(f"{x:.6g}") for x in margins]  # a small one is no tie
        if args.save_strategy != "no" and state.is_world_process_zero:
            write_json(self._file, self._margins)

    def outcomes(self) -> tuple[dict[str, float], dict[str, list]]:
        """Metrics of the last margins, and what `margins.json` has: the rows' numbers, and their margins by epoch."""
        epochs = [self._margins[step] for step in sorted(self._margins, key=int)]
        last = torch.tensor(epochs[-1], dtype=torch.float64)
        loss = torch.nn.functional.softplus(-last).mean().item()
        metrics = {"agreement": preference_scores(last).mean().item(), "margin": last.mean().item(), "loss": loss}
        return metrics, {"rows": self.rows, "label_margins": epochs}


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
