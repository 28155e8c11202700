"""What the recipes share: methods, grids and controls, runs in folders of their own, resumable, and the report.

A recipe says how one run is trained (`make_trainer`) and what its held-out outcomes are; this module says which runs
there are, leaves out those that are finished, writes what `prm-hf compare` reads, and prints the result.
"""

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from trl import ModelConfig

from .. import PopulationRiskStoppingCallback
from ..compare import compare_runs, format_comparison, load_runs, rate_at_kl, write_report
from ..compare.comparison import baseline_of
from ..compare.measures import measures_of
from .arguments import BuiltIn, ComparisonArguments, Data, load_data
from .controls import (
    ADAMW_MATCHED,
    CONSTANT_Q,
    CONTROLS,
    FIXED_Q,
    OF_TENSORS,
    SHUFFLED_Q,
    STOPPING,
    MaskRecorder,
    has_controls,
    has_tensor_masks,
    is_prm,
    is_sharded,
    mean_masks,
    set_up_optimizer,
    split_method,
)
from .run_folder import NOT_SETTINGS, RunSpec, find_run, make_run, show_progress


STARTED = time.monotonic()
OUT_OF_TIME = 75  # the exit code by which programs say "not now, try again"


def settings_of(config: TrainingArguments, **others: Any) -> dict[str, Any]:
    """The settings of a training configuration that make a run what it is, and `others`."""
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_SETTINGS}
    if config.optim != "prm":  # no control is trained again because PRM is tried with other settings
        values = {key: value for key, value in values.items() if not key.startswith("prm_")}
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return json.loads(json.dumps({**values, "effective_batch_size": per_step, **others}, sort_keys=True, default=str))


class OutOfTime(Exception):
    """The minutes that the command was given are over."""


class Comparison:
    """Runs specifications one after the other, each into its folder of `output_dir`, and reports on all of them.

    Several processes may run the same comparison at a time, one a GPU: each takes the next run that no other is at.

    Args:
        output_dir: the comparison's folder.
        train_run: trains one run. It is given the specification, its folder, and whether a checkpoint in it is to be
            resumed; it returns the trainer.
        outcomes: what a trained run gives besides its last evaluation: more metrics, and `margins.json`. Collective.
        info: what `run.json` says of every run: `task`, `noise_rate`, `model`, `dataset`.
        total: number of runs, for the progress bar.
        deadline: on the clock of `time.monotonic`, after which no run is started; None for never.
    """

    def __init__(
        self,
        output_dir: str,
        train_run: Callable[[RunSpec, Path, bool], Trainer],
        outcomes: Callable[[Trainer], tuple[dict[str, float], dict[str, list]]],
        info: dict[str, Any],
        total: int,
        deadline: float | None = None,
    ) -> None:
        self.deadline = deadline
        self.output_dir = Path(output_dir)
        self.train_run = train_run
        self.outcomes = outcomes
        self.info = info
        self.measures = measures_of(info)
        self.folders: list[Path] = []
        self.state = PartialState()
        self.bar = tqdm(total=total, desc="runs", unit="run", disable=not self.state.is_main_process)

    def run(self, specs: list[RunSpec]) -> list[dict[str, float]]:
        """The final metrics of runs, each trained now unless its folder has them already. Collective.

        What another process is training meanwhile comes last, and is waited for.

        Raises:
            OutOfTime: the deadline has passed, and a run is left.
        """
        found = [self._run(spec, wait=False) for spec in specs]
        return [self._run(spec, wait=True) if run is None else run for spec, run in zip(specs, found, strict=True)]

    def _run(self, spec: RunSpec, wait: bool) -> dict[str, float] | None:
        """As `run`; None for a run that another process is training, unless it is to be waited for."""
        folder = self.output_dir / spec.name
        lock = FileLock(self.output_dir / ".locks" / f"{spec.name}.lock")
        # One process looks, so that all go the same way.
        decision = [self._decide(spec, folder, lock, wait) if self.state.is_main_process else None]
        broadcast_object_list(decision)
        what, metrics, resume = decision[0]
        try:
            if what == "late":
                raise OutOfTime
            if what == "busy":
                return None
            self.folders.append(folder)
            note = "finished before"
            if metrics is None:
                metrics = make_run(spec, folder, resume, self.train_run, self.outcomes, self.info)
                note = f"{metrics['wall_seconds']:.0f} s"
                clear_device_cache(garbage_collection=True)  # a trainer is in circles with its callbacks
                if self.state.distributed_type != DistributedType.NO:
                    # accelerate takes one DeepSpeed configuration in the life of its state, and with a second
                    # Accelerator it forgets that there is FSDP.
                    AcceleratorState._reset_state()
        finally:
            lock.release()  # the main process'; the others never had it
        self.bar.update()
        if self.state.is_main_process:
            self.bar.write(self._line(spec, metrics, note))
        return metrics

    def _decide(
        self, spec: RunSpec, folder: Path, lock: FileLock, wait: bool
    ) -> tuple[str, dict[str, float] | None, bool]:
        """`"busy"` and `"late"`, or that the run is ours: with its metrics, or whether there is a checkpoint of it."""
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        left = -1.0 if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            lock.acquire(timeout=left if wait else 0)
        except Timeout:
            return "late" if wait else "busy", None, False
        metrics, resume = find_run(spec, folder, self.bar.write)
        return "late" if metrics is None and left == 0 else "mine", metrics, resume

    def _line(self, spec: RunSpec, metrics: dict[str, float], note: str) -> str:
        columns = (
            ("accuracy", self.measures.accuracy, ".3f"),
            (self.measures.noise_label, self.measures.noise_fit, ".3f"),
            ("KL", "drift/kl", ".4f"),
            ("mean q", "mask/mean_q", ".3f"),
        )
        shown = [f"{label} {metrics[key]:{form}}" for label, key, form in columns if key in metrics]
        return f"{spec.name:<36} {'  '.join(shown)}  ({note})"

    def skip(self, why: str) -> None:
        """Says that a run is not to be had."""
        self.bar.update()
        if self.state.is_main_process:
            self.bar.write(why)

    def report(self) -> None:
        """Prints the table of these runs and writes the report. The main process does; the others have nothing to do.

        Folders that an earlier comparison left beside them do not belong to it.
        """
        self.bar.close()
        if not self.state.is_main_process or not any((folder / "metrics.json").is_file() for folder in self.folders):
            return
        result = compare_runs(self.folders)
        print("\n" + format_comparison(result))
        with FileLock(self.output_dir / ".locks" / "report.lock"):
            try:
                write_report(result, self.output_dir)
                print(f"\nReport: {self.output_dir / 'report.html'}")
            except ImportError as error:
                print(f"\nNo report was written: {error}")


@dataclass(frozen=True)
class Recipe:
    """What a recipe knows of its task.

    Attributes:
        built_in: the built-in task.
        methods: by the noise rate, what each method changes in the configuration.
        prepare: makes of the data what all runs can share.
        make_trainer: from a run's configuration, its specification, and the data.
        outcomes: of a trained run, what `Comparison` takes.
        info: `task`, and `accuracy` where it is not the task's.
        settings: settings of the recipe that make a run what it is.
    """

    built_in: BuiltIn
    methods: Callable[[float], dict[str, dict[str, Any]]]
    prepare: Callable[[Data, TrainingArguments], Data]
    make_trainer: Callable[[TrainingArguments, RunSpec, Data], Trainer]
    outcomes: Callable[[Trainer, Data], tuple[dict[str, float], dict[str, list]]]
    info: dict[str, str]
    settings: dict[str, Any]


def run_comparisons(
    script_args: ComparisonArguments, training_args: TrainingArguments, model_args: ModelConfig, recipe: Recipe
) -> int:
    """One comparison for each dataset and noise rate; returns the exit code, `OUT_OF_TIME` if runs are left."""
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    # What one process of a sweep computes, the others find in the datasets' cache.
    preparing = FileLock(Path(training_args.output_dir) / ".locks" / "prepare.lock")
    Path(preparing.lock_file).parent.mkdir(parents=True, exist_ok=True)
    for data in load_data(script_args, model_args, recipe.built_in):
        with preparing:
            data = recipe.prepare(data, training_args)
        for noise_rate in script_args.noise_rate:
            output_dir = Path(training_args.output_dir)
            if len(script_args.dataset_name or ()) > 1:
                output_dir /= Path(data.dataset_name).stem
            if len(script_args.noise_rate) > 1:
                output_dir /= f"noise{noise_rate:g}"
            grid = Grid(script_args, training_args, model_args, recipe, data, noise_rate, output_dir)
            try:
                grid.run()
            except OutOfTime:
                grid.comparison.report()
                if PartialState().is_main_process:
                    print(f"\nThe {script_args.max_minutes:g} minutes are over. The same command goes on from here.")
                return OUT_OF_TIME
            grid.comparison.report()
    return 0


class Grid:
    """Every method at each learning rate and seed on one noisy dataset, then the controls of the best PRM row."""

    def __init__(
        self,
        script_args: ComparisonArguments,
        training_args: TrainingArguments,
        model_args: ModelConfig,
        recipe: Recipe,
        data: Data,
        noise_rate: float,
        output_dir: Path,
    ) -> None:
        self.training_args, self.recipe, self.data = training_args, recipe, data
        self.seeds, self.output_dir = script_args.seeds, output_dir
        self.changes = recipe.methods(noise_rate)
        known = [m for m in script_args.methods if m in CONTROLS or split_method(m)[0] in self.changes]
        if len(known) < len(script_args.methods) and PartialState().is_main_process:
            left_out = ", ".join(sorted({*script_args.methods} - {*known}))
            print(f"Without {left_out}, which are not for the noise rate {noise_rate:g}.")
        self.rates = {
            method: script_args.prm_learning_rates if is_prm(method) else script_args.learning_rates
            for method in known
            if method not in CONTROLS
        }
        self.controls = [method for method in known if method in CONTROLS]
        self.settings = {
            "noise_rate": noise_rate,
            "model": data.model_name,
            "dataset": data.dataset_name,
            **data.source,
            "train_rows": len(data.train),
            "heldout_rows": len(data.heldout),
            **{f"model_{key}": value for key, value in vars(model_args).items() if key != "model_name_or_path"},
            **recipe.settings,
        }
        info = {**recipe.info, **{key: self.settings[key] for key in ("noise_rate", "model", "dataset")}}
        n_runs = (sum(map(len, self.rates.values())) + len(self.controls)) * len(self.seeds)
        deadline = None if script_args.max_minutes is None else STARTED + 60 * script_args.max_minutes
        self.comparison = Comparison(
            output_dir, self._train, lambda trainer: recipe.outcomes(trainer, data), info, n_runs, deadline
        )

    def run(self) -> None:
        # Seed by seed, so that what is there when time is up can be compared.
        specs = [
            self._specify(method, rate, seed)
            for seed in self.seeds
            for method, rates in self.rates.items()
            for rate in rates
        ]
        metrics: dict[tuple[str, float], dict[int, dict[str, float]]] = {}
        for spec, run in zip(specs, self.comparison.run(specs), strict=True):
            metrics.setdefault((spec.method, spec.learning_rate), {})[spec.seed] = run
        accuracy = self.comparison.measures.accuracy
        specs = []
        for control in self.controls:
            rows = [row for row in metrics if (has_tensor_masks if control in OF_TENSORS else has_controls)(row[0])]
            row = max(rows, key=lambda row: sum(run[accuracy] for run in metrics[row].values()))
            found = [self._control(control, row, seed, metrics) for seed in self.seeds]
            specs += [spec for spec in found if spec is not None]
        self.comparison.run(specs)

    def _configure(self, method: str, overrides: dict[str, Any]) -> TrainingArguments:
        config = copy.deepcopy(self.training_args)
        config.optim = "prm"
        for key, value in (self.changes[split_method(method)[0]] | overrides).items():
            setattr(config, key, value)
        return config

    def _specify(self, method: str, learning_rate: float, seed: int, source: str | None = None, **extra) -> RunSpec:
        """`source`: of a control the method of the run that it is the control of."""
        configured_as = (source if method == SHUFFLED_Q else baseline_of(source)) if source else method
        described = settings_of(self._configure(configured_as, {}), **self.settings, **extra)
        return RunSpec(method, learning_rate, seed, described, configured_as)

    def _control(self, control: str, row: tuple[str, float], seed: int, metrics: dict) -> RunSpec | None:
        """The control of a seed's run in a row, with what it takes from it; None if it is not to be had."""
        of, rate, detail = self._specify(*row, seed).name, row[1], {}
        if control == CONSTANT_Q:
            detail["mean_q"] = self._mean_q(of)
            rate *= detail["mean_q"]
        elif control == FIXED_Q:
            other = self.seeds[(self.seeds.index(seed) + 1) % len(self.seeds)]
            name = self._specify(*row, other).name
            detail = {"masks_of": name, "mean_q": self._mean_q(name)}
        elif control == ADAMW_MATCHED:
            adamw = baseline_of(row[0])
            kl, *kls = (
                metrics[key][seed].get("drift/kl", float("nan"))
                for key in (row, *((adamw, rate) for rate in self.rates[adamw]))
            )
            rate, detail = rate_at_kl(self.rates[adamw], kls, kl), {"kl": kl}
            if rate is None:
                self.comparison.skip(
                    f"{control} of {of}: no two neighbouring rates of {adamw} drift less and more than {kl:.3g}; add "
                    "learning rates"
                )
                return None
        return self._specify(control, rate, seed, source=row[0], **{control: {"of": of, **detail}})

    def _mean_q(self, name: str) -> float:
        (run,) = load_runs(self.output_dir / name)
        return run.mean_q

    def _train(self, spec: RunSpec, folder: Path, resume: bool) -> Trainer:
        place = {"output_dir": str(folder), "learning_rate": spec.learning_rate, "seed": spec.seed}
        config = self._configure(spec.configured_as, place)
        trainer = self.recipe.make_trainer(config, spec, self.data)
        masks_of = self.output_dir / spec.settings[FIXED_Q]["masks_of"] if spec.method == FIXED_Q else None
        multipliers = mean_masks(masks_of) if masks_of else None
        set_up_optimizer(trainer, spec.method, spec.seed, multipliers, spec.configured_as)
        if has_tensor_masks(spec.method) and not is_sharded(trainer):
            trainer.add_callback(MaskRecorder(trainer, folder))
        if spec.method == STOPPING:
            trainer.add_callback(PopulationRiskStoppingCallback())
        show_progress(trainer, spec.name)
        trainer.train(resume_from_checkpoint=resume or None)
        if config.save_strategy != "no":
            trainer.save_model(str(folder))
        return trainer
