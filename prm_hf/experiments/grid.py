"""Which runs there are: those of a comparison are every method at each learning rate and seed, then the controls."""

import copy
import dataclasses
import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainingArguments

from .. import PopulationRiskStoppingCallback
from ..compare import compare_runs, format_comparison, load_runs, rate_at_kl, write_report
from ..runs.methods import CONTROL, Method, find_method, parse_method
from ..runs.schema import KL, MEAN_Q, NOT_SETTINGS, has_diverged, measures_of
from ..runs.write import RunSpec, evaluation_metrics
from ..suspects import MarginRecorder
from .arguments import half_decades
from .baselines import INTERPOLATE, PAIR_LOSSES, Interpolation
from .controls import MaskRecorder, is_sharded, mean_masks, set_up_optimizer
from .data import Data
from .experiment import Experiment
from .repair import FOLDS, Repairs, numbered, record_in_sample, recorded
from .simplicity import check_size, measure_simplicity, simplicity_settings


@dataclass(frozen=True)
class Made:
    """A run that has ended: its folder and its final metrics, or the `problem` where an error ended it."""

    folder: Path
    metrics: dict[str, Any] | None
    problem: str = ""

    @property
    def counts(self) -> bool:
        """Whether its numbers can be compared."""
        return self.metrics is not None and not has_diverged(self.metrics)


MadeRuns = dict[tuple[str, float], dict[int, Made]]  # by method and learning rate, then by seed


class Grid(ABC):
    """Runs that belong together, what they are made of, and the report on them, which goes into `output_dir`."""

    output_dir: Path

    def place(self, spec: RunSpec) -> Path:
        """The folder that the folder of a run lies in."""
        return self.output_dir

    def __len__(self) -> int:
        """The number of all runs, controls included."""
        return len(self.specify_runs())

    @abstractmethod
    def specify_runs(self) -> list[RunSpec]:
        """All runs but the controls."""

    def extend(self, made: MadeRuns) -> list[RunSpec]:
        """More runs, for what the runs so far leave open. Asked again when these are made, until there are none."""
        return []

    def specify_controls(self, made: MadeRuns) -> tuple[list[RunSpec], list[str]]:
        """The controls of these runs, and why others cannot be made."""
        return [], []

    def training_of(self, spec: RunSpec) -> RunSpec:
        """The run whose trained weights this one measures: itself, unless it trains nothing of its own."""
        return spec

    def along(self, spec: RunSpec) -> list[RunSpec]:
        """The other runs that can be made of the weights that this one trains, without more training."""
        return []

    @abstractmethod
    def info_of(self, spec: RunSpec) -> dict[str, Any]:
        """What `run.json` says of a run besides its specification: `task`, `noise_rate`, `model`, `dataset`."""

    @abstractmethod
    def make_trainer(self, spec: RunSpec, folder: Path) -> Trainer:
        """The trainer of one run."""

    @abstractmethod
    def outcomes(self, spec: RunSpec, trainer: Trainer) -> tuple[dict[str, float], dict[str, list]]:
        """What a trained run gives besides its last evaluation: more metrics, and `margins.json`. Collective."""

    @abstractmethod
    def describe(self, spec: RunSpec, metrics: dict[str, float]) -> str:
        """The final metrics of a run in a line."""

    @abstractmethod
    def report(self, made: list[Made]) -> None:
        """Prints what these runs say, of which one or more count, and writes the report."""


class ComparisonGrid(Grid):
    """The runs on one dataset with one noise rate of the training rows.

    Attributes:
        methods, controls, left_out: those of the comparison that the noise rate has, and those that it does not have.
        rates: by the name of a method its learning rates.
        info: what `run.json` says of every run.
    """

    def __init__(self, experiment: Experiment, data: Data, noise_rate: float, output_dir: Path) -> None:
        self.experiment, self.data, self.noise_rate, self.output_dir = experiment, data, noise_rate, output_dir
        args = experiment.script_args
        self.seeds = args.seeds
        methods = args.methods_for(noise_rate)
        self.left_out = [method.name for method in args.compared if method not in methods]
        self.controls = [method for method in methods if method.group == CONTROL]
        self.methods = [method for method in methods if method.group != CONTROL]
        grids = {True: args.prm_learning_rates, False: args.learning_rates}
        self.grids = {has_mask: sorted(rates) for has_mask, rates in grids.items()}
        self.rates = {method.name: list(self.grids[method.has_mask]) for method in self.methods}
        self.extensions = 0
        self.repairs = Repairs(self, args.repair_folds)
        of_data = {"noise_rate": noise_rate, "model": data.model_name, "dataset": data.dataset_name}
        self.info = {**experiment.info(), **of_data, "command": experiment.command_line}
        self.settings = {
            **of_data,
            **data.source,
            **data.digests,
            "train_rows": len(data.train),
            "heldout_rows": len(data.heldout),
            **{f"model_{k}": v for k, v in vars(experiment.model_args).items() if k != "model_name_or_path"},
            **experiment.settings(),
            **simplicity_settings(args),
        }
        self.defaults = {
            **defaults_of(experiment.config_class),
            **{f"model_{name}": value for name, value in defaults_of(type(experiment.model_args)).items()},
            **defaults_of(experiment.arguments_class),
        }

    def __len__(self) -> int:
        rows = sum(map(len, self.rates.values())) + len(self.controls)
        return rows * len(self.seeds) + len(self.repairs.specify_folds())

    def place(self, spec: RunSpec) -> Path:
        return self.output_dir / FOLDS if is_fold(spec) else self.output_dir

    def specify_runs(self) -> list[RunSpec]:
        """All runs but the controls and those on repaired labels, then the folds that these need.

        Seed by seed, so that what is there when time is up can be compared.
        """
        methods = [method for method in self.methods if not method.repair]
        rows = [(method.name, rate) for method in trained_first(methods) for rate in self.rates[method.name]]
        return [*(self._specify_row(*row, seed) for seed in self.seeds for row in rows), *self.repairs.specify_folds()]

    def extend(self, made: MadeRuns) -> list[RunSpec]:
        """The runs on repaired labels, now that what says which labels are wrong has been made; then more rates.

        One more learning rate for every method, if the most accurate one of any is the smallest or largest it has. All
        methods get one, so that their grids stay as large: at the end that is nearer to the best rate.
        """
        if self.repairs.methods and self.repairs.made is None:
            self.repairs.made = made
            rows = [(method.name, rate) for method in self.repairs.methods for rate in self.rates[method.name]]
            return [self._specify_row(*row, seed) for seed in self.seeds for row in rows]
        best = {name: self.best(made, [name]) for name in self.rates}
        places = {name: rates.index(best[name][1]) for name, rates in self.rates.items()}
        # Where all runs ended in errors nothing is known of the rates
        at_end = any(
            place in (0, len(self.rates[name]) - 1)
            and any(run.metrics is not None for run in made[best[name]].values())
            for name, place in places.items()
        )
        has_grid = all(len(rates) > 1 for rates in self.rates.values())
        if not (at_end and has_grid) or self.extensions == self.experiment.script_args.max_extensions:
            return []
        self.extensions += 1
        self.info = {**self.info, "extension": self.extensions}  # in `run.json` of all runs from here on
        added = []
        for name in (method.name for method in trained_first(self.methods)):
            rates, place = self.rates[name], places[name]
            end, step = (-1, 1) if 2 * place >= len(rates) - 1 else (0, -1)
            added.append((name, half_decades(rates[end], step)))
            self.rates[name] = sorted([*rates, added[-1][1]])
        return [self._specify_row(*row, seed) for seed in self.seeds for row in added]

    def specify_controls(self, made: MadeRuns) -> tuple[list[RunSpec], list[str]]:
        """The controls of the most accurate PRM row."""
        found = []
        for control in self.controls:
            able = [m.name for m in self.methods if m.has_controls and (m.tensor_masks or not control.tensor_masks)]
            row = self.best(made, able)
            found += [self._control(control.name, row, seed, made) for seed in self.seeds]
        return [x for x in found if isinstance(x, RunSpec)], [x for x in found if isinstance(x, str)]

    def best(self, made: MadeRuns, methods: list[str]) -> tuple[str, float]:
        """The most accurate row of these methods. Rows with a run that does not count come last."""
        accuracy = measures_of(self.info).accuracy

        def worth(row: tuple[str, float]) -> tuple[int, float]:
            values = [run.metrics[accuracy] for run in made[row].values() if run.counts]
            return len(values), sum(values)

        return max(((method, rate) for method in methods for rate in self.rates[method]), key=worth)

    def training_of(self, spec: RunSpec) -> RunSpec:
        """Of a part of the way AdamW's run."""
        return self.specify("adamw", spec.learning_rate, spec.seed) if _is_interpolated(spec) else spec

    def along(self, spec: RunSpec) -> list[RunSpec]:
        """The parts of AdamW's way, of its run or of another part, which trains AdamW where it has to."""
        if spec.method != "adamw" and not _is_interpolated(spec):
            return []
        rate = spec.learning_rate
        others = [m.name for m in self.methods if m.key == INTERPOLATE and rate in self.rates[m.name]]
        return [self._specify_row(name, rate, spec.seed) for name in others if name != spec.method]

    def configure(self, method: str, **overrides: Any) -> TrainingArguments:
        """The training configuration of a method."""
        return configure(self.experiment.training_args, method, self.noise_rate, **overrides)

    def info_of(self, spec: RunSpec) -> dict[str, Any]:
        return {**self.info, "task": "suspects"} if is_fold(spec) else self.info

    def make_trainer(self, spec: RunSpec, folder: Path) -> Trainer:
        method = parse_method(spec.configured_as if is_fold(spec) else spec.method)
        own = {"output_dir": str(folder), "learning_rate": spec.learning_rate, "seed": spec.seed}
        if is_fold(spec):  # nothing is held out but the fold, and no model is kept
            own |= {"eval_strategy": "no", "drift_metrics": False, "save_strategy": "no"}
        config = self.configure(spec.configured_as, **own)
        config.run_name = "_".join(filter(None, (config.run_name, folder.name)))
        rows = self.experiment.noisy_rows(spec, self.data)
        if is_fold(spec):
            data = self.repairs.hold_out(spec, rows)
            trainer = self.experiment.make_trainer(config, spec, data)
            set_up_optimizer(trainer, method, spec.seed)
            trainer.add_callback(MarginRecorder(trainer))
            return trainer
        if method.repair is not None:
            rows = self.repairs.repair(spec, rows)
        is_source = not self.repairs.folds and method.name in self.repairs.sources
        data = dataclasses.replace(self.data, given=numbered(rows) if is_source else rows)
        trainer = self.experiment.make_trainer(config, spec, data)
        check_size(trainer, self.experiment.script_args)
        masks_of = spec.settings["fixed_q"]["masks_of"] if method.name == "fixed_q" else None
        set_up_optimizer(trainer, method, spec.seed, masks_of and mean_masks(self.output_dir / masks_of))
        if _is_interpolated(spec) or self.along(spec):
            trainer.add_callback(Interpolation(trainer))
        if is_source:
            record_in_sample(trainer, folder)
        if method.has_controls and method.tensor_masks and not is_sharded(trainer):
            trainer.add_callback(MaskRecorder(trainer, folder))
        if method.name == "prm_stopping":
            trainer.add_callback(PopulationRiskStoppingCallback())
        return trainer

    def outcomes(self, spec: RunSpec, trainer: Trainer) -> tuple[dict[str, float], dict[str, list]]:
        known, of_training_rows = recorded(trainer)
        if is_fold(spec):
            return known, of_training_rows
        known = self.repairs.metrics.get(spec.folder_name, {})
        if _is_interpolated(spec):
            (way,) = (x for x in trainer.callback_handler.callbacks if isinstance(x, Interpolation))
            way.move(parse_method(spec.method).value)
            known, of_training_rows = evaluation_metrics(trainer.evaluate()), {}
        metrics, margins = self.experiment.outcomes(trainer, self.data)
        metrics |= measure_simplicity(trainer, self.experiment.script_args)
        margins = {**margins, **of_training_rows, "heldout_groups": list(self.data.heldout_groups)}
        return {**metrics, **known}, margins

    def describe(self, spec: RunSpec, metrics: dict[str, float]) -> str:
        measures = measures_of(self.info)
        columns = [("accuracy", measures.accuracy, ".3f"), (measures.noise_label, measures.noise_fit, ".3f")]
        columns += [("KL", KL, ".4f"), ("mean q", MEAN_Q, ".3f"), ("agreement", "agreement", ".3f")]
        return "  ".join(f"{label} {metrics[key]:{form}}" for label, key, form in columns if key in metrics)

    def report(self, made: list[Made]) -> None:
        folders = [run.folder for run in made if run.folder.parent == self.output_dir]
        if not folders:
            return
        result = compare_runs(folders)
        print("\n" + format_comparison(result))
        try:
            write_report(result, self.output_dir)
            print(f"\nReport: {self.output_dir / 'report.html'}")
        except ImportError as error:
            print(f"\nNo report was written: {error}")

    def _specify_row(self, method: str, learning_rate: float, seed: int) -> RunSpec:
        """A run of a method of the comparison; one that repairs labels says by which runs."""
        parsed = parse_method(method)
        if parsed.key in PAIR_LOSSES:  # one that looks at the batch of a process
            pairs = self.experiment.training_args.per_device_train_batch_size
            return self.specify(method, learning_rate, seed, **{method: {"pairs": pairs}})
        if parsed.repair is None:
            return self.specify(method, learning_rate, seed)
        chosen = self.repairs.choose(parsed.source, seed, learning_rate)
        return self.specify(method, learning_rate, seed, **{method: chosen})

    def specify(
        self, method: str, learning_rate: float, seed: int, configured_as: str | None = None, **extra: Any
    ) -> RunSpec:
        """One run. A control or a fold is configured as another method; `extra` are settings of its own."""
        configured_as = configured_as or method
        if parse_method(configured_as).clean_labels:
            extra["noise_rate"] = 0.0
            extra |= {"label_rater": None} if "label_rater" in self.settings else {}
        described = settings_of(self.configure(configured_as), **{**self.settings, **extra})
        return RunSpec(method, learning_rate, seed, described, configured_as, self.defaults)

    def _control(self, control: str, row: tuple[str, float], seed: int, made: MadeRuns) -> RunSpec | str:
        """The control of one seed's run, with what it takes from that run; a string says why there is none."""
        run, rate, detail = made[row][seed], row[1], {}
        of = run.folder.name
        other = self.seeds[(self.seeds.index(seed) + 1) % len(self.seeds)]
        sources = [run, made[row][other]] if control == "fixed_q" else [run]
        if missing := [source.folder.name for source in sources if not source.counts]:
            return f"{control} of {of}: {missing[0]} has failed or diverged"
        if control == "constant_q":
            detail["mean_q"] = _mean_q(run)
            rate *= detail["mean_q"]
        elif control == "fixed_q":
            detail = {"masks_of": sources[1].folder.name, "mean_q": _mean_q(sources[1])}
        elif control == "adamw_matched":
            adamw = parse_method(row[0]).baseline
            baselines = [made[adamw, rate][seed] for rate in self.rates[adamw]]
            curve = [x.metrics.get(KL, float("nan")) if x.counts else float("nan") for x in baselines]
            detail = {"kl": run.metrics.get(KL, float("nan"))}
            rate = rate_at_kl(self.rates[adamw], curve, detail["kl"])
            if rate is None:
                return (
                    f"{control} of {of}: no two neighbouring rates of {adamw} drift less and more than "
                    f"{detail['kl']:.3g}; add learning rates"
                )
        configured_as = row[0] if control == "shuffled_q" else parse_method(row[0]).baseline
        return self.specify(control, rate, seed, configured_as, **{control: {"of": of, **detail}})


def is_fold(spec: RunSpec) -> bool:
    """Whether a run belongs to the first stage of methods that repair labels."""
    return "fold" in spec.settings


def trained_first(methods: list[Method]) -> list[Method]:
    """The methods in an order in which those that measure the weights of another one come behind it."""
    return sorted(methods, key=lambda method: method.key == INTERPOLATE)


def _is_interpolated(spec: RunSpec) -> bool:
    return find_method(spec.method).key == INTERPOLATE  # a fold's name, `adamw-fold1of3`, is no method's


def _mean_q(made: Made) -> float:
    (run,) = load_runs(made.folder)
    return run.mean_q


def defaults_of(arguments: type) -> dict[str, Any]:
    """By the name of a field of a dataclass of arguments its default, as JSON has it."""
    found = {}
    for f in dataclasses.fields(arguments):
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if default not in (dataclasses.MISSING, ...):
            found[f.name] = json.loads(json.dumps(getattr(default, "value", default), default=str))
    return found


def configure(config: TrainingArguments, method: str, noise_rate: float, **overrides: Any) -> TrainingArguments:
    """A training configuration with what a method changes in it."""
    config = copy.deepcopy(config)
    config.optim = "prm"
    for key, value in {**parse_method(method).changes(noise_rate), **overrides}.items():
        setattr(config, key, value)
    return config


def settings_of(config: TrainingArguments, **others: Any) -> dict[str, Any]:
    """The settings of a training configuration that make a run what it is, and `others`."""
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_SETTINGS}
    if config.optim != "prm":  # no control is trained again because PRM is tried with other settings
        values = {key: value for key, value in values.items() if not key.startswith("prm_")}
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return json.loads(json.dumps({**values, "effective_batch_size": per_step, **others}, sort_keys=True, default=str))
