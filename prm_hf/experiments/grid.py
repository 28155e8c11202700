"""Which runs a comparison has: every method at each learning rate and seed, then the controls of the best PRM row."""

import copy
import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..compare import load_runs, rate_at_kl
from ..runs.methods import CONTROL, parse_method
from ..runs.schema import KL, NOT_SETTINGS, measures_of
from ..runs.write import RunSpec
from .data import Data
from .experiment import Experiment


Metrics = dict[tuple[str, float], dict[int, dict[str, float]]]  # by method and learning rate, then by seed


class Grid:
    """The runs on one dataset with one noise rate of the training rows, in `output_dir`.

    Attributes:
        methods, controls, left_out: those of the comparison that the noise rate has, and those that it does not have.
        rates: by the name of a method its learning rates.
        info: what `run.json` says of every run.
    """

    def __init__(self, experiment: Experiment, data: Data, noise_rate: float, output_dir: Path) -> None:
        self.experiment, self.data, self.noise_rate, self.output_dir = experiment, data, noise_rate, output_dir
        args = experiment.script_args
        self.seeds = args.seeds
        methods = [method for method in args.compared if method.changes(noise_rate) is not None]
        self.left_out = [method.name for method in args.compared if method not in methods]
        self.controls = [method for method in methods if method.group == CONTROL]
        self.methods = [method for method in methods if method.group != CONTROL]
        self.rates = {m.name: args.prm_learning_rates if m.has_mask else args.learning_rates for m in self.methods}
        of_data = {"noise_rate": noise_rate, "model": data.model_name, "dataset": data.dataset_name}
        self.info = {**experiment.info(), **of_data}
        self.settings = {
            **of_data,
            **data.source,
            "train_rows": len(data.train),
            "heldout_rows": len(data.heldout),
            **{f"model_{k}": v for k, v in vars(experiment.model_args).items() if k != "model_name_or_path"},
            **experiment.settings(),
        }

    def __len__(self) -> int:
        return (sum(map(len, self.rates.values())) + len(self.controls)) * len(self.seeds)

    def specify_runs(self) -> list[RunSpec]:
        """All runs but the controls, seed by seed, so that what is there when time is up can be compared."""
        rows = [(method, rate) for method, rates in self.rates.items() for rate in rates]
        return [self._specify(*row, seed) for seed in self.seeds for row in rows]

    def specify_controls(self, metrics: Metrics) -> tuple[list[RunSpec], list[str]]:
        """The controls of the PRM row with the best accuracy, and why others cannot be made; `metrics` of all runs."""
        accuracy, found = measures_of(self.info).accuracy, []
        for control in self.controls:
            able = [m.name for m in self.methods if m.has_controls and (m.tensor_masks or not control.tensor_masks)]
            rows = [row for row in metrics if row[0] in able]
            row = max(rows, key=lambda row: sum(run[accuracy] for run in metrics[row].values()))
            found += [self._control(control.name, row, seed, metrics) for seed in self.seeds]
        return [x for x in found if isinstance(x, RunSpec)], [x for x in found if isinstance(x, str)]

    def configure(self, method: str, **overrides: Any) -> TrainingArguments:
        """The training configuration of a method."""
        config = copy.deepcopy(self.experiment.training_args)
        config.optim = "prm"
        for key, value in {**parse_method(method).changes(self.noise_rate), **overrides}.items():
            setattr(config, key, value)
        return config

    def _specify(self, method: str, learning_rate: float, seed: int, source: str | None = None, **extra) -> RunSpec:
        """One run. A control has a `source`, the method of the run that it is bound to."""
        configured_as = method
        if source is not None:
            configured_as = source if method == "shuffled_q" else parse_method(source).baseline
        if parse_method(method).clean_labels:
            extra["noise_rate"] = 0.0
        described = settings_of(self.configure(configured_as), **{**self.settings, **extra})
        return RunSpec(method, learning_rate, seed, described, configured_as)

    def _control(self, control: str, row: tuple[str, float], seed: int, metrics: Metrics) -> RunSpec | str:
        """The control of one seed's run, with what it takes from that run; a string says why there is none."""
        of, rate, detail = self._specify(*row, seed).name, row[1], {}
        if control == "constant_q":
            detail["mean_q"] = self._mean_q(of)
            rate *= detail["mean_q"]
        elif control == "fixed_q":
            other = self.seeds[(self.seeds.index(seed) + 1) % len(self.seeds)]
            name = self._specify(*row, other).name
            detail = {"masks_of": name, "mean_q": self._mean_q(name)}
        elif control == "adamw_matched":
            adamw = parse_method(row[0]).baseline
            curve = [metrics[adamw, rate][seed].get(KL, float("nan")) for rate in self.rates[adamw]]
            detail = {"kl": metrics[row][seed].get(KL, float("nan"))}
            rate = rate_at_kl(self.rates[adamw], curve, detail["kl"])
            if rate is None:
                return (
                    f"{control} of {of}: no two neighbouring rates of {adamw} drift less and more than "
                    f"{detail['kl']:.3g}; add learning rates"
                )
        return self._specify(control, rate, seed, source=row[0], **{control: {"of": of, **detail}})

    def _mean_q(self, name: str) -> float:
        (run,) = load_runs(self.output_dir / name)
        return run.mean_q


def settings_of(config: TrainingArguments, **others: Any) -> dict[str, Any]:
    """The settings of a training configuration that make a run what it is, and `others`."""
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_SETTINGS}
    if config.optim != "prm":  # no control is trained again because PRM is tried with other settings
        values = {key: value for key, value in values.items() if not key.startswith("prm_")}
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return json.loads(json.dumps({**values, "effective_batch_size": per_step, **others}, sort_keys=True, default=str))
