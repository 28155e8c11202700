"""The runs of `prm-hf suspects`: one for each fold that is held out, or one on all rows."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from filelock import FileLock
from transformers import Trainer, TrainingArguments
from trl import ModelConfig

from ..runs.methods import parse_method
from ..runs.read import read_json
from ..runs.schema import MARGINS_FILE, METRICS_FILE, has_diverged
from ..runs.write import RunSpec, find_folder
from ..suspects import MarginRecorder, Suspects, judge_rows
from ..suspects.margins import EPOCHS_FILE, ROW, join_margins, label_metrics
from .controls import set_up_optimizer
from .grid import Grid, Made, configure, defaults_of, settings_of
from .suspects_kinds import Kind
from .suspects_report import report


if TYPE_CHECKING:
    from .suspects import SuspectsArguments


@dataclass
class SuspectsData:
    """The rows whose labels are doubted.

    Attributes:
        name: of the dataset.
        rows: as they were read, `n`.
        groups: of each row its prompt, or what else keeps rows together.
        folds: by seed the fold of each row, `(n,)` int.
        truth: whether each label is wrong, where a column says so.
        about: what a run's settings say of the data.
    """

    kind: Kind
    name: str
    rows: Dataset
    groups: list[str]
    folds: dict[int, np.ndarray]
    truth: list[bool] | None
    about: dict[str, Any]


class SuspectsGrid(Grid):
    """For each seed and learning rate a run for each fold; in sample one on all rows."""

    def __init__(
        self,
        args: "SuspectsArguments",
        training_args: TrainingArguments,
        model_args: ModelConfig,
        data: SuspectsData,
        command_line: str,
    ) -> None:
        self.args, self.training_args, self.data = args, training_args, data
        self.output_dir, self.command_line = Path(training_args.output_dir), command_line
        self.prepared = data.rows
        settings = {**data.about, "rows": len(data.rows), "kind": args.kind}
        of_model = {f"model_{k}": v for k, v in vars(model_args).items() if k != "model_name_or_path"}
        self.settings = {**settings, **of_model}
        self.defaults = {
            **defaults_of(type(training_args)),
            **{f"model_{name}": value for name, value in defaults_of(type(model_args)).items()},
        }
        folds = [{}] if args.how == "in_sample" else [{"fold": k, "folds": args.folds} for k in range(args.folds)]
        self.specs = [
            self._specify(rate, seed, **fold)
            for seed in args.seeds
            for rate in sorted(args.learning_rates)
            for fold in folds
        ]

    def prepare(self) -> None:
        """What all runs share of the rows, with their numbers. What one process computes, others find in a cache."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        locks = self.output_dir / ".locks"
        locks.mkdir(exist_ok=True)
        config = configure(self.training_args, self.args.method, self.args.noise_rate)
        with FileLock(locks / "prepare.lock"):
            numbered = self.data.rows.add_column(ROW, list(range(len(self.data.rows))))
            self.prepared = self.data.kind.prepare(numbered, config)

    # ---- Runs ----

    def place(self, spec: RunSpec) -> Path:
        fold, folds = spec.settings.get("fold"), spec.settings.get("folds")
        return self.output_dir / "runs" / ("all_rows" if fold is None else f"fold{fold}of{folds}")

    def specify_runs(self) -> list[RunSpec]:
        return self.specs

    def _specify(self, rate: float, seed: int, **fold: int) -> RunSpec:
        config = configure(self.training_args, self.args.method, self.args.noise_rate)
        settings = settings_of(config, **self.settings, **fold)
        return RunSpec(self.args.method, rate, seed, settings, defaults=self.defaults)

    # ---- One run ----

    def info_of(self, spec: RunSpec) -> dict[str, Any]:
        kind = self.data.kind
        known = {key: self.data.about[key] for key in ("model", "dataset", "noise_rate") if key in self.data.about}
        return {"task": kind.task, "accuracy": "agreement", **known, "command": self.command_line}

    def make_trainer(self, spec: RunSpec, folder: Path) -> Trainer:
        own = {"output_dir": str(folder), "learning_rate": spec.learning_rate, "seed": spec.seed}
        config = configure(self.training_args, spec.method, self.args.noise_rate, **own)
        config.run_name = "_".join(filter(None, (config.run_name, folder.parent.name, folder.name)))
        held_out = self._held_out(spec)
        train = [place for place, row in enumerate(self.prepared[ROW]) if row >= 0 and row not in held_out]
        train_rows = self.prepared.select(train).remove_columns(ROW)
        trainer = self.data.kind.make_trainer(config, train_rows, self.prepared)
        set_up_optimizer(trainer, parse_method(spec.method), spec.seed)
        trainer.add_callback(MarginRecorder(trainer, folder / EPOCHS_FILE, held_out))
        return trainer

    def _held_out(self, spec: RunSpec) -> set[int]:
        """The numbers of the rows that a run is not trained on."""
        fold = spec.settings.get("fold")
        return set() if fold is None else set(np.flatnonzero(self.data.folds[spec.seed] == fold).tolist())

    def outcomes(self, spec: RunSpec, trainer: Trainer) -> tuple[dict[str, float], dict[str, list]]:
        """The margins of all epochs, those of held-out rows apart, and what the last ones say."""
        (recorder,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, MarginRecorder))
        found: dict[str, list] = {}
        for part in ("heldout", "train"):
            places = [i for i, row in enumerate(recorder.rows) if (row in recorder.held_out) == (part == "heldout")]
            found[f"{part}_rows"] = [recorder.rows[i] for i in places]
            found[f"{part}_epochs"] = [[margins[i] for i in places] for margins in recorder.epochs]
        judged = "heldout" if found["heldout_rows"] else "train"
        found["heldout"] = found["heldout_epochs"][-1]
        return label_metrics(found[f"{judged}_epochs"][-1]), found

    def describe(self, spec: RunSpec, metrics: dict[str, float]) -> str:
        fold = spec.settings.get("fold")
        part = "all rows       " if fold is None else f"without fold {fold + 1}/{self.args.folds}"
        return f"{part}  agreement {metrics['agreement']:.3f}  margin {metrics['margin']:+.3f}"

    # ---- All runs ----

    def best_rate(self) -> float | None:
        """The learning rate whose models agree most with the labels, as given, of the rows that they have not seen.

        Of completions, nearly all of whose margins are above 0, by the mean margin. None where a run of
        every rate is missing, has failed or has diverged.
        """
        measure = "margin" if self.args.kind == "completion" else "agreement"

        def worth(margins: np.ndarray) -> float:
            return label_metrics(margins[-1][~np.isnan(margins[-1])])[measure]

        found = {rate: self._mean(rate, "heldout") for rate in sorted(self.args.learning_rates)}
        known = {rate: worth(margins) for rate, margins in found.items() if margins is not None}
        return max(known, key=known.get, default=None)

    def _mean(self, rate: float, part: str) -> np.ndarray | None:
        """Of each row the mean margin over the runs that have it in this part, `(epochs, n)`; None if one is missing.

        A row is `heldout` in one run of each seed, and in `train` of the others.
        """
        specs = [spec for spec in self.specs if spec.learning_rate == rate]
        found = [_read_margins(find_folder(spec, self.place(spec), lambda line: None)[0]) for spec in specs]
        if not found or None in found:
            return None
        parts = [(one[f"{part}_rows"], one[f"{part}_epochs"]) for one in found]
        return join_margins(parts, len(self.data.rows))

    @property
    def margins(self) -> tuple[float, np.ndarray | None, np.ndarray | None] | None:
        """Learning rate, margins out of fold and in sample, as far as `how` asks for; None where one is missing."""
        how = self.args.how
        if how == "in_sample":
            (rate,) = self.args.learning_rates
            in_sample = self._mean(rate, "train")
            return None if in_sample is None else (rate, None, in_sample)
        rate = self.best_rate()
        if rate is None:
            return None
        return rate, self._mean(rate, "heldout"), self._mean(rate, "train") if how == "both" else None

    def report(self, made: list[Made]) -> None:
        """Writes the suspects, unless a run that they need is missing."""
        found = self.margins
        if found is not None:
            report(self._judge(*found), self.output_dir, self.args, self.data.truth, self.data.kind.model)

    def _judge(self, rate: float, out_of_fold: np.ndarray | None, in_sample: np.ndarray | None) -> Suspects:
        args, data = self.args, self.data
        settings = {"method": args.method, "learning_rate": rate, "seeds": args.seeds, "folds": args.folds}
        settings |= {"model": data.about["model"], "dataset": data.name, "command": self.command_line}
        return judge_rows(
            data.rows.with_format(None).to_list(),
            args.kind,
            out_of_fold,
            in_sample,
            groups=data.groups,
            folds=data.folds.get(args.seeds[0]),
            settings=settings,
        )


def _read_margins(folder: Path) -> dict[str, list] | None:
    """The margins of a finished run; None of another one."""
    metrics = read_json(folder / METRICS_FILE)
    if metrics is None or has_diverged(metrics):
        return None
    return read_json(folder / MARGINS_FILE)
