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
from ..runs.methods import CONTROL, parse_method
from ..runs.schema import KL, MEAN_Q, NOT_SETTINGS, has_diverged, measures_of
from ..runs.write import RunSpec
from .arguments import half_decades
from .controls import MaskRecorder, is_sharded, mean_masks, set_up_optimizer
from .data import Data
from .experiment import Experiment


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

    @abstractmethod
    def info_of(self, spec: RunSpec) -> dict[str, Any]:
        """What `run.json` says of a run besides its specification: `task`, `noise_rate`, `model`, `dataset`."""

    @abstractmethod
    def make_trainer(self, spec: RunSpec, folder: Path) -> Trainer:
        """The trainer of one run."""

    @abstractmethod
    def outcomes(self, trainer: Trainer) -> tuple[dict[str, float], dict[str, list]]:
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
        self.rates = {method.name: sorted(grids[method.has_mask]) for method in self.methods}
        self.extensions = 0
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
        }
        self.defaults = {
            **defaults_of(experiment.config_class),
            **{f"model_{name}": value for name, value in defaults_of(type(experiment.model_args)).items()},
            **defaults_of(experiment.arguments_class),
        }

    def __len__(self) -> int:
        return super().__len__() + len(self.controls) * len(self.seeds)

    def specify_runs(self) -> list[RunSpec]:
        """All runs but the controls, seed by seed, so that what is there when time is up can be compared."""
        rows = [(method, rate) for method, rates in self.rates.items() for rate in rates]
        return [self._specify(*row, seed) for seed in self.seeds for row in rows]

    def extend(self, made: MadeRuns) -> list[RunSpec]:
        """One more learning rate for every method, if the most accurate one of any is the smallest or largest it has.

        All methods get one, so that their grids stay as large: at the end that is nearer to the best rate.
        """
        best = {name: self._best(made, [name]) for name in self.rates}
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
        added = []
        for name, place in places.items():
            rates = self.rates[name]
            end, step = (-1, 1) if 2 * place >= len(rates) - 1 else (0, -1)
            added.append((name, half_decades(rates[end], step)))
            self.rates[name] = sorted([*rates, added[-1][1]])
        return [self._specify(*row, seed) for seed in self.seeds for row in added]

    def specify_controls(self, made: MadeRuns) -> tuple[list[RunSpec], list[str]]:
        """The controls of the most accurate PRM row."""
        found = []
        for control in self.controls:
            able = [m.name for m in self.methods if m.has_controls and (m.tensor_masks or not control.tensor_masks)]
            row = self._best(made, able)
            found += [self._control(control.name, row, seed, made) for seed in self.seeds]
        return [x for x in found if isinstance(x, RunSpec)], [x for x in found if isinstance(x, str)]

    def _best(self, made: MadeRuns, methods: list[str]) -> tuple[str, float]:
        """The most accurate row of these methods. Rows with a run that does not count come last."""
        accuracy = measures_of(self.info).accuracy

        def worth(row: tuple[str, float]) -> tuple[int, float]:
            values = [run.metrics[accuracy] for run in made[row].values() if run.counts]
            return len(values), sum(values)

        return max(((method, rate) for method in methods for rate in self.rates[method]), key=worth)

    def configure(self, method: str, **overrides: Any) -> TrainingArguments:
        """The training configuration of a method."""
        return configure(self.experiment.training_args, method, self.noise_rate, **overrides)

    def info_of(self, spec: RunSpec) -> dict[str, Any]:
        return self.info

    def make_trainer(self, spec: RunSpec, folder: Path) -> Trainer:
        method = parse_method(spec.method)
        own = {"output_dir": str(folder), "learning_rate": spec.learning_rate, "seed": spec.seed}
        config = self.configure(spec.configured_as, **own)
        config.run_name = "_".join(filter(None, (config.run_name, folder.name)))
        trainer = self.experiment.make_trainer(config, spec, self.data)
        masks_of = spec.settings["fixed_q"]["masks_of"] if method.name == "fixed_q" else None
        set_up_optimizer(trainer, method, spec.seed, masks_of and mean_masks(self.output_dir / masks_of))
        if method.has_controls and method.tensor_masks and not is_sharded(trainer):
            trainer.add_callback(MaskRecorder(trainer, folder))
        if method.name == "prm_stopping":
            trainer.add_callback(PopulationRiskStoppingCallback())
        return trainer

    def outcomes(self, trainer: Trainer) -> tuple[dict[str, float], dict[str, list]]:
        return self.experiment.outcomes(trainer, self.data)

    def describe(self, spec: RunSpec, metrics: dict[str, float]) -> str:
        measures = measures_of(self.info)
        columns = [("accuracy", measures.accuracy, ".3f"), (measures.noise_label, measures.noise_fit, ".3f")]
        columns += [("KL", KL, ".4f"), ("mean q", MEAN_Q, ".3f")]
        return "  ".join(f"{label} {metrics[key]:{form}}" for label, key, form in columns if key in metrics)

    def report(self, made: list[Made]) -> None:
        result = compare_runs([run.folder for run in made])
        print("\n" + format_comparison(result))
        try:
            write_report(result, self.output_dir)
            print(f"\nReport: {self.output_dir / 'report.html'}")
        except ImportError as error:
            print(f"\nNo report was written: {error}")

    def _specify(self, method: str, learning_rate: float, seed: int, source: str | None = None, **extra) -> RunSpec:
        """One run. A control has a `source`, the method of the run that it is bound to."""
        configured_as = method
        if source is not None:
            configured_as = source if method == "shuffled_q" else parse_method(source).baseline
        if parse_method(method).clean_labels:
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
        return self._specify(control, rate, seed, source=row[0], **{control: {"of": of, **detail}})


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
