"""Methods that repair labels: the runs of their first stage, and the rows that these leave for the second.

The runs of the source method are cross-fitted: at each learning rate and seed one for each fold of prompts, which is
trained on the other folds. They lie in `.folds`, where `prm-hf compare` does not look, and serve all methods of one
source. The learning rate is the one whose models agree most with the labels, as given, that they have not seen.
Without folds the margins are in sample: those of the source's own run at the nearest learning rate.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import Trainer

from ..metrics import suspect_metrics
from ..noise.wrong_labels import estimate_wrong_labels
from ..runs.methods import DROP, FLIP, parse_method
from ..runs.read import read_json
from ..runs.schema import MARGINS_FILE
from ..runs.write import RunSpec
from ..suspects import MarginRecorder, fold_of_rows
from ..suspects.margins import EPOCHS_FILE, ROW, join_margins, label_metrics, with_other_prompts
from ..suspects.repair import repair
from ..trainers.memorization import NOISE_COLUMNS
from .baselines import pair_votes
from .data import Data


if TYPE_CHECKING:
    from .grid import ComparisonGrid, Made, MadeRuns

FOLDS = ".folds"  # the folder of the runs


class Repairs:
    """The first stage of the methods of a comparison that repair labels.

    Attributes:
        sources: the methods whose margins say which labels are wrong.
        made: all runs of the comparison, once those of the first stage are made.
        metrics: by the name of a run's folder what is known of its repair.
    """

    def __init__(self, grid: "ComparisonGrid", folds: int) -> None:
        self.grid, self.folds = grid, folds
        self.methods = [method for method in grid.methods if method.repair is not None]
        self.sources = list(dict.fromkeys(method.source for method in self.methods))
        self.made: MadeRuns | None = None
        self.metrics: dict[str, dict[str, float]] = {}
        if self.sources and folds:
            self.folds_of(0)  # raises before a run is made

    def folds_of(self, seed: int) -> np.ndarray:
        """The fold of each training row, `(n,)` int."""
        return fold_of_rows(self.grid.data.train_groups, self.folds, seed)

    def rates_of(self, source: str) -> list[float]:
        """The learning rates of the first stage. They are not extended; runs of a comparison are taken as they are."""
        grid = self.grid
        return grid.grids[parse_method(source).has_mask] if self.folds else grid.rates[source]

    def specify_folds(self) -> list[RunSpec]:
        """The runs of the first stage, seed by seed."""
        return [
            self.grid.specify(fold_method(source, fold, self.folds), rate, seed, source, fold=fold, folds=self.folds)
            for seed in self.grid.seeds
            for source in self.sources
            for rate in self.rates_of(source)
            for fold in range(self.folds)
        ]

    def hold_out(self, spec: RunSpec, rows: Dataset) -> Data:
        """The data of a run of the first stage: rows without its fold, and the fold in the place of held-out rows."""
        is_held = self.folds_of(spec.seed) == spec.settings["fold"]
        held = np.flatnonzero(is_held).tolist()
        measured = rows.select(held).add_column(ROW, held)
        if not self.grid.experiment.has_pairs:
            measured = with_other_prompts(measured)
        return dataclasses.replace(self.grid.data, given=rows.select(np.flatnonzero(~is_held)), heldout=measured)

    def choose(self, source: str, seed: int, learning_rate: float) -> dict[str, Any]:
        """Which runs say what labels are wrong: settings of the run of this seed and learning rate.

        Their list is empty where there are none that have finished.
        """
        runs = {rate: self._runs(source, rate, seed) for rate in self.rates_of(source)}
        runs = {rate: found for rate, found in runs.items() if found and all(run.counts for run in found)}
        if self.folds:
            # Margins of completions have no sign that says which are wrong: the rate is that of the largest ones
            measure = "agreement" if self.grid.experiment.has_pairs else "margin"
            rate = max(runs, key=lambda rate: sum(run.metrics[measure] for run in runs[rate]), default=None)
        else:
            rate = min(runs, key=lambda rate: abs(math.log(rate / learning_rate)), default=None)
        names = [run.folder.name for run in runs.get(rate, ())]
        return {"folds": self.folds, "source_learning_rate": rate, "margins_of": names}

    def _runs(self, source: str, rate: float, seed: int) -> "list[Made]":
        names = [fold_method(source, fold, self.folds) for fold in range(self.folds)] or [source]
        found = [self.made.get((name, rate), {}).get(seed) for name in names]
        return [] if None in found else found

    def repair(self, spec: RunSpec, rows: Dataset) -> Dataset:
        """The rows that a run is trained on. What is known of the repair comes into `metrics`.

        Args:
            rows: `n` training rows with the labels as given.

        Raises:
            ValueError: the first stage has not been finished.
        """
        method, detail = parse_method(spec.method), spec.settings[spec.method]
        if not detail["margins_of"]:
            what = f"all {self.folds} folds" if self.folds else "the whole training set"
            raise ValueError(
                f"`{spec.method}` needs runs of `{method.source}` on {what} with the seed {spec.seed}, and at no "
                "learning rate have they all finished: lower the learning rates, or see why they failed."
            )
        place = self.grid.output_dir / FOLDS if self.folds else self.grid.output_dir
        margins = read_margins([place / name for name in detail["margins_of"]], len(rows))
        judged = ~np.isnan(margins).any(0)  # trainers leave out rows that say nothing
        margins, groups = margins[:, judged], np.asarray(self.grid.data.train_groups)[judged]
        has_pairs = self.grid.experiment.has_pairs
        known = {"margins": margins, "antisymmetric": has_pairs} if self.folds else {"in_sample": margins}
        if has_pairs and self.folds:
            known["votes"] = pair_votes(rows, self.grid.data.train_groups)[judged]
        found = estimate_wrong_labels(**known, groups=groups)
        probabilities = np.zeros(len(rows))
        probabilities[judged] = found.probabilities
        repaired, _ = repair(rows, probabilities, method.repair)
        metrics = {"suspects/share": float(found.share), "cost_seconds": self._cost(method.source, spec.seed, detail)}
        column = next((name for name in NOISE_COLUMNS if name in rows.column_names), None)
        if column is not None:
            wrong = np.array(rows[column][:], dtype=bool)
            metrics |= suspect_metrics(found.scores, wrong[judged])
            metrics["suspects/share_error"] = abs(float(found.share) - wrong.mean())
            metrics["suspects/wrong_left"] = wrong_left(wrong, probabilities, method.repair)
        self.metrics[spec.folder_name] = metrics
        return repaired

    def _cost(self, source: str, seed: int, detail: dict[str, Any]) -> float:
        """The seconds of a seed's runs of the first stage, at all learning rates; without folds of the one run."""
        rates = self.rates_of(source) if self.folds else [detail["source_learning_rate"]]
        runs = [run for rate in rates for run in self._runs(source, rate, seed)]
        return sum(run.metrics["wall_seconds"] for run in runs if run.metrics is not None)


def fold_method(method: str, fold: int, folds: int) -> str:
    """The method in the specification of a run without one fold."""
    return f"{method}-fold{fold + 1}of{folds}"


def numbered(rows: Dataset) -> Dataset:
    """The rows with the column by which a recorder knows them."""
    return rows.add_column(ROW, list(range(len(rows))))


def record_in_sample(trainer: Trainer, folder: Path) -> None:
    """Has the margins of a trainer's own rows, which are `numbered`, measured after each epoch."""
    heldout, trainer.eval_dataset = trainer.eval_dataset, trainer.train_dataset
    trainer.add_callback(MarginRecorder(trainer, folder / EPOCHS_FILE))
    trainer.eval_dataset = heldout


def recorded(trainer: Trainer) -> tuple[dict[str, float], dict[str, list]]:
    """Metrics of the last margins that were recorded, and what `margins.json` has of all; of no recorder nothing."""
    found = [x for x in trainer.callback_handler.callbacks if isinstance(x, MarginRecorder)]
    if not found:
        return {}, {}
    return label_metrics(found[0].epochs[-1]), {"rows": found[0].rows, "label_margins": found[0].epochs}


def read_margins(folders: Sequence[Path], n: int) -> np.ndarray:
    """The margins that runs of all folds have measured, `(epochs, n)`; NaN of a row that no trainer took.

    Raises:
        ValueError: a run of before there were such methods has none.
    """
    found = [read_json(folder / MARGINS_FILE) or {} for folder in folders]
    if missing := [folder for folder, run in zip(folders, found, strict=True) if not run.get("label_margins")]:
        raise ValueError(f"{missing[0]} has no margins of its training rows: remove it to run it again.")
    return join_margins([(run["rows"], run["label_margins"]) for run in found], n)


def wrong_left(wrong: np.ndarray, probabilities: np.ndarray, how: str) -> float:
    """The share of wrong labels after a repair; of soft labels the weight that the wrong ones of two labels have.

    Args:
        wrong: whether each label as given is wrong, `(n,)` bool.
        probabilities: that it is, `(n,)`.
    """
    is_suspect = probabilities > 0.5
    if how == DROP:
        return float(wrong[~is_suspect].mean()) if not is_suspect.all() else math.nan
    if how == FLIP:
        return float((wrong != is_suspect).mean())
    return float(np.where(wrong, 1 - probabilities, probabilities).mean())
