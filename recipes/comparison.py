"""What the recipes share: methods, grids and controls, runs in folders of their own, resumable, and the report.

A recipe says how one run is trained (`make_trainer`) and what its held-out outcomes are; this module says which runs
there are, leaves out those that are finished, writes what `prm-hf compare` reads, and prints the result.
"""

import copy
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset, disable_progress_bars, load_dataset, load_from_disk
from methods import (
    ADAMW_MATCHED,
    CONSTANT_Q,
    CONTROLS,
    FIXED_Q,
    OF_TENSORS,
    SHUFFLED_Q,
    MaskRecorder,
    check_methods,
    describe_optimizer,
    has_tensor_masks,
    is_prm,
    mean_masks,
    set_up_optimizer,
    split_method,
)
from run_folder import final_metrics, hardware, history, read_json, show_progress, versions, write_json
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging
from trl import ModelConfig, TrlParser

from prm_hf.compare import compare_runs, format_comparison, load_runs, rate_at_kl, write_report
from prm_hf.compare.measures import measures_of


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
# Where a run is written and how it is shown do not make it another run.
NOT_SETTINGS = {
    "output_dir",
    "logging_dir",
    "run_name",
    "report_to",
    "disable_tqdm",
    "resume_from_checkpoint",
    "push_to_hub",
    "hub_model_id",
    "hub_token",
    "log_level",
    "log_level_replica",
    "local_rank",
    "use_cpu",
    "per_device_train_batch_size",  # the batch of a step counts, however it is spread: see `effective_batch_size`
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "deepspeed",
    "fsdp",
    "fsdp_config",
    "accelerator_config",
    "ddp_backend",
    "dataset_num_proc",
    "dataloader_num_workers",
    "learning_rate",  # named beside the settings
    "seed",
}


@dataclass
class ComparisonArguments:
    """
    Arguments of a comparison of methods, learning rates and seeds on one noisy dataset.

    Parameters:
        dataset_name (`str`, *optional*):
            Dataset on the hub, local folder, or local .json, .jsonl, .csv or .parquet file. `None` for the built-in
            task, whose clean labels are known.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, if it has several.
        dataset_train_split (`str`, *optional*, defaults to `"train"`):
            Split to train on, slices included (`train[:2000]`).
        dataset_test_split (`str`, *optional*, defaults to `"test"`):
            Held-out split, whose labels stay as they are.
        eval_dataset_name (`str`, *optional*):
            Dataset that the held-out split is read from, if it is another one than `dataset_name`.
        noise_rate (`float`, *optional*, defaults to `0.3`):
            Probability with which a training label is corrupted.
        seeds (`list[int]`, *optional*, defaults to `[0]`):
            Seeds; each has its own noise and its own order of the data.
        methods (`list[str]`, *optional*):
            Methods to compare.
        learning_rates (`list[float]`, *optional*):
            Learning rates of each method. Defaults to `learning_rate` alone, for the built-in task to a grid.
        prm_learning_rates (`list[float]`, *optional*):
            Learning rates of the PRM methods, if they are others than `learning_rates`; of the same number, so that
            every method gets a grid of one size.
    """

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Dataset on the hub, local folder, or local .json, .jsonl, .csv or .parquet file. None: the "
            "built-in task."
        },
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset, if it has several."}
    )
    dataset_train_split: str = field(
        default="train", metadata={"help": "Split to train on, slices included (`train[:2000]`)."}
    )
    dataset_test_split: str = field(
        default="test", metadata={"help": "Held-out split, whose labels stay as they are."}
    )
    eval_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Dataset that the held-out split is read from, if it is not in `dataset_name`."},
    )
    noise_rate: float = field(default=0.3, metadata={"help": "Probability with which a training label is corrupted."})
    seeds: list[int] = field(
        default_factory=lambda: [0],
        metadata={"help": "Seeds; each has its own noise and its own order of the data."},
    )
    methods: list[str] | None = field(
        default=None, metadata={"help": "Methods to compare. Default: AdamW, PRM per_tensor and debiased, constant_q."}
    )
    learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Learning rates of each method. Default: `learning_rate` alone."}
    )
    prm_learning_rates: list[float] | None = field(
        default=None, metadata={"help": "Learning rates of the PRM methods, if they are others; of the same number."}
    )

    def check(self, known_methods: list[str], learning_rate: float, max_grad_norm: float) -> None:
        """Fills in what was left open, and raises ValueError for what cannot be run."""
        if self.methods is None:
            self.methods = ["adamw", "prm_per_tensor", "prm_debiased", "constant_q"]
        if self.learning_rates is None:
            self.learning_rates = [learning_rate]
        if self.prm_learning_rates is None:
            self.prm_learning_rates = list(self.learning_rates)
        for name in ("methods", "seeds", "learning_rates", "prm_learning_rates"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ValueError(f"`{name}` must name at least one value and none of them twice, got {values}.")
        if len(self.learning_rates) != len(self.prm_learning_rates):
            raise ValueError(
                f"`learning_rates` has {len(self.learning_rates)} values and `prm_learning_rates` "
                f"{len(self.prm_learning_rates)}: give both as many, or the method with the larger grid wins by it."
            )
        for rate in (*self.learning_rates, *self.prm_learning_rates):
            if not 0 < rate < float("inf"):
                raise ValueError(f"`learning_rates` must be positive numbers, got {rate}.")
        if not 0 <= self.noise_rate < 1:
            raise ValueError(f"`noise_rate` must be in [0, 1), got {self.noise_rate}.")
        check_methods(self.methods, known_methods, self.seeds, max_grad_norm)


@dataclass(frozen=True)
class BuiltIn:
    """The built-in task of a recipe: settings, examples a step, and what makes its model and its rows."""

    settings: dict[str, Any]
    batch_size: int
    make: Callable[[], tuple[str, Dataset, Dataset]]


@dataclass(frozen=True)
class Data:
    """Name or path of the model, what model and dataset are called, and the rows to train on and to hold out."""

    model: str
    model_name: str
    dataset_name: str
    train: Dataset
    heldout: Dataset


def parse_arguments(
    arguments: list[str],
    arguments_class: type[ComparisonArguments],
    config_class: type[TrainingArguments],
    methods: list[str],
    output_dir: str,
    built_in: BuiltIn,
) -> tuple[ComparisonArguments, TrainingArguments, ModelConfig]:
    """The three groups of arguments, from the command line and a YAML file, with the defaults of the built-in task.

    Raises:
        ValueError: for what cannot be run.
    """
    parser = TrlParser((arguments_class, config_class, ModelConfig))
    parser.set_defaults(output_dir=output_dir, report_to="none")
    if not any(argument.split("=")[0] in ("--dataset_name", "--config") for argument in arguments):
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if built_in.batch_size % world_size:
            raise ValueError(
                f"The built-in task has {built_in.batch_size} examples a step, which {world_size} processes cannot "
                "share evenly. Launch 1, 2, 4, 8 or 16."
            )
        parser.set_defaults(**built_in.settings, per_device_train_batch_size=built_in.batch_size // world_size)
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    script_args.check(methods, training_args.learning_rate, training_args.max_grad_norm)
    if script_args.dataset_name is None and model_args.model_name_or_path is not None:
        raise ValueError(
            "`--model_name_or_path` needs a `--dataset_name`: the built-in task has a vocabulary of its own, and a "
            "model that comes with it."
        )
    if script_args.dataset_name is not None and model_args.model_name_or_path is None:
        raise ValueError("`--dataset_name` needs a `--model_name_or_path`: the model to train.")
    return script_args, training_args, model_args


def load_data(script_args: ComparisonArguments, model_args: ModelConfig, built_in: BuiltIn) -> Data:
    logging.set_verbosity_error()
    if script_args.dataset_name is None:
        logging.disable_progress_bar()  # many short bars for a tiny model and a tiny dataset
        disable_progress_bars()
        if PartialState().is_main_process:
            print(
                "Built-in task: the reference policy is trained now, for about 30 s, unless it is cached.", flush=True
            )
        model, train, heldout = built_in.make()
        return Data(model, "built-in", "built-in", train, heldout)
    name, config = script_args.dataset_name, script_args.dataset_config
    other = script_args.eval_dataset_name
    return Data(
        model=model_args.model_name_or_path,
        model_name=model_args.model_name_or_path,
        dataset_name=name,
        train=load_split(name, config, script_args.dataset_train_split),
        heldout=load_split(other or name, None if other else config, script_args.dataset_test_split),
    )


def load_split(name: str, config: str | None, split: str) -> Dataset:
    """A split of a dataset on the hub, in a local folder (also of `save_to_disk`), or in a local file.

    Raises:
        ValueError: the split is not there, or the file's format is not known.
    """
    path = Path(name)
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"`{name}` must end in one of {', '.join(FILE_FORMATS)}.")
        base = split.split("[")[0]
        return load_dataset(FILE_FORMATS[path.suffix], data_files={base: str(path)}, split=split)
    if (path / "dataset_dict.json").is_file():
        splits = load_from_disk(name)
        if split not in splits:
            raise ValueError(f"`{name}` has the splits {', '.join(splits)} and not {split!r}: name one of them.")
        return splits[split]
    return load_dataset(name, config, split=split)


@dataclass
class RunSpec:
    """One run of a comparison: what makes it this run and no other.

    Attributes:
        configured_as: the method whose configuration it has: its own, unless it is a control.
    """

    method: str
    learning_rate: float
    seed: int
    configured_as: str
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        rate = f"{self.learning_rate:.3g}".replace("e-0", "e-")
        return f"{self.method.replace(':', '')}_lr{rate}_seed{self.seed}"

    @property
    def hash(self) -> str:
        text = json.dumps([self.method, self.learning_rate, self.seed, self.settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def settings_of(config: TrainingArguments, **others: Any) -> dict[str, Any]:
    """The settings of a training configuration that make a run what it is, and `others`."""
    values = {key: value for key, value in config.to_dict().items() if key not in NOT_SETTINGS}
    if config.optimizer_name != "prm":  # no control is trained again because PRM is tried with other settings
        values = {key: value for key, value in values.items() if not key.startswith("prm_")}
    per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size
    return json.loads(json.dumps({**values, "effective_batch_size": per_step, **others}, sort_keys=True, default=str))


class Comparison:
    """Runs specifications one after the other, each into its folder of `output_dir`, and reports on all of them.

    Args:
        output_dir: the comparison's folder.
        train_run: trains one run. It is given the specification, its folder, and whether a checkpoint in it is to be
            resumed; it returns the trainer.
        outcomes: what a trained run gives besides its last evaluation: more metrics, and `margins.json`. Collective.
        info: what `run.json` says of every run: `task`, `noise_rate`, `model`, `dataset`.
        total: number of runs, for the progress bar.
    """

    def __init__(
        self,
        output_dir: str,
        train_run: Callable[[RunSpec, Path, bool], Trainer],
        outcomes: Callable[[Trainer], tuple[dict[str, float], dict[str, list]]],
        info: dict[str, Any],
        total: int,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.train_run = train_run
        self.outcomes = outcomes
        self.info = info
        self.measures = measures_of(info)
        self.folders: list[Path] = []
        self.state = PartialState()
        self.bar = tqdm(total=total, desc="runs", unit="run", disable=not self.state.is_main_process)

    def run(self, spec: RunSpec) -> dict[str, float]:
        """The final metrics of a run, trained now unless its folder has them already. Collective."""
        folder = self.output_dir / spec.name
        self.folders.append(folder)
        # One process looks, so that all go the same way.
        found = [self._look(spec, folder) if self.state.is_main_process else None]
        broadcast_object_list(found)
        metrics, resume = found[0]
        if metrics is None:
            metrics = self._train(spec, folder, resume)
            note = f"{metrics['wall_seconds']:.0f} s"
        else:
            note = "finished before"
        self.bar.update()
        if self.state.is_main_process:
            self.bar.write(self._line(spec, metrics, note))
        return metrics

    def _look(self, spec: RunSpec, folder: Path) -> tuple[dict[str, float] | None, bool]:
        """The metrics of a finished run of just this specification, and whether there is a checkpoint to go on from.

        A folder of other settings is emptied.
        """
        info = read_json(folder / "run.json")
        if info is not None and info.get("settings_hash") == spec.hash:
            return read_json(folder / "metrics.json"), get_last_checkpoint(folder) is not None
        if folder.exists():
            changed = sorted(
                key
                for key in {*spec.settings, *(info or {}).get("settings", {})}
                if spec.settings.get(key) != (info or {}).get("settings", {}).get(key)
            )
            self.bar.write(f"{spec.name}: trained again, since these settings changed: {', '.join(changed) or 'all'}")
            shutil.rmtree(folder)
        return None, False

    def _train(self, spec: RunSpec, folder: Path, resume: bool) -> dict[str, float]:
        started, clock = datetime.now(timezone.utc), time.perf_counter()
        info = {
            "schema": 1,
            "name": spec.name,
            "method": spec.method,
            "learning_rate": spec.learning_rate,
            "seed": spec.seed,
            **self.info,
            "settings": spec.settings,
            "settings_hash": spec.hash,
            "versions": versions(),
            "hardware": hardware(self.state),
            "started": started.isoformat(timespec="seconds"),
        }
        if self.state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "run.json", info)
        trainer = self.train_run(spec, folder, resume)
        more, margins = self.outcomes(trainer)
        metrics = final_metrics(trainer) | more
        metrics["wall_seconds"] = round(time.perf_counter() - clock, 3)
        if self.state.is_main_process:
            info["optimizer"] = describe_optimizer(trainer.innermost_optimizer())
            info["finished"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            write_json(folder / "run.json", info)
            lines = (json.dumps(row) for row in history(trainer))
            (folder / "history.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            write_json(folder / "margins.json", margins)
            write_json(folder / "metrics.json", metrics)  # last: a folder with it is finished
        self.state.wait_for_everyone()
        return metrics

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
        if not self.state.is_main_process:
            return
        result = compare_runs(self.folders)
        print("\n" + format_comparison(result))
        try:
            write_report(result, self.output_dir)
            print(f"\nReport: {self.output_dir / 'report.html'}")
        except ImportError as error:
            print(f"\nNo report was written: {error}")


def run_comparison(
    script_args: ComparisonArguments,
    training_args: TrainingArguments,
    model_args: ModelConfig,
    data: Data,
    methods: dict[str, dict[str, Any]],
    make_trainer: Callable[[TrainingArguments, RunSpec], Trainer],
    outcomes: Callable[[Trainer], tuple[dict[str, float], dict[str, list]]],
    info: dict[str, Any],
    **settings: Any,
) -> None:
    """Trains every method at each of its learning rates and seeds, then the controls of the best PRM row, and reports.

    Args:
        methods: what each method changes in the configuration.
        make_trainer: from a run's configuration and specification.
        outcomes: as in `Comparison`.
        info: `task`, and `accuracy` where it is not the task's.
        **settings: settings of the recipe that make a run what it is.
    """
    built_in = script_args.dataset_name is None
    output_dir = Path(training_args.output_dir)

    def configure(method: str, overrides: dict[str, Any]) -> TrainingArguments:
        config = copy.deepcopy(training_args)
        config.optimizer_name = "prm"
        for key, value in (methods[split_method(method)[0]] | overrides).items():
            setattr(config, key, value)
        return config

    def specify(method: str, learning_rate: float, seed: int, source: str | None = None, **extra: Any) -> RunSpec:
        configured_as = (source if method == SHUFFLED_Q else "adamw") if source else method
        described = settings_of(
            configure(configured_as, {}),
            noise_rate=script_args.noise_rate,
            model=data.model_name,
            dataset=data.dataset_name,
            train_split=None if built_in else script_args.dataset_train_split,
            test_split=None if built_in else script_args.dataset_test_split,
            eval_dataset=script_args.eval_dataset_name,
            train_rows=len(data.train),
            heldout_rows=len(data.heldout),
            **{f"model_{key}": value for key, value in vars(model_args).items() if key != "model_name_or_path"},
            **settings,
            **extra,
        )
        return RunSpec(method, learning_rate, seed, configured_as, described)

    def train_run(spec: RunSpec, folder: Path, resume: bool) -> Trainer:
        place = {"output_dir": str(folder), "learning_rate": spec.learning_rate, "seed": spec.seed}
        config = configure(spec.configured_as, place)
        config.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(config.model_init_kwargs or {}),
        }
        trainer = make_trainer(config, spec)
        multipliers = mean_masks(output_dir / spec.settings[FIXED_Q]["masks_of"]) if spec.method == FIXED_Q else None
        set_up_optimizer(trainer, spec.method, spec.seed, multipliers)
        if has_tensor_masks(spec.method):
            trainer.add_callback(MaskRecorder(trainer, folder))
        show_progress(trainer, spec.name)
        trainer.train(resume_from_checkpoint=resume or None)
        if config.save_strategy != "no":
            trainer.save_model(str(folder))
        return trainer

    grids = {
        method: script_args.prm_learning_rates if is_prm(method) else script_args.learning_rates
        for method in script_args.methods
        if method not in CONTROLS
    }
    controls = [method for method in script_args.methods if method in CONTROLS]
    n_runs = (sum(map(len, grids.values())) + len(controls)) * len(script_args.seeds)
    info = {**info, "noise_rate": script_args.noise_rate, "model": data.model_name, "dataset": data.dataset_name}
    comparison = Comparison(training_args.output_dir, train_run, outcomes, info, n_runs)

    metrics: dict[tuple[str, float], dict[int, dict[str, float]]] = {}
    for method, grid in grids.items():
        for learning_rate in grid:
            for seed in script_args.seeds:
                run = comparison.run(specify(method, learning_rate, seed))
                metrics.setdefault((method, learning_rate), {})[seed] = run

    def control_of(control: str, row: tuple[str, float], number: int) -> tuple[float, dict[str, Any]] | None:
        """The learning rate of a control of a seed's run in a row, and what it takes from it."""
        seed = script_args.seeds[number]
        if control == CONSTANT_Q:
            (run,) = load_runs(output_dir / specify(*row, seed).name)
            return row[1] * run.mean_q, {"mean_q": run.mean_q}
        if control == FIXED_Q:
            other = specify(*row, script_args.seeds[(number + 1) % len(script_args.seeds)]).name
            (run,) = load_runs(output_dir / other)
            return row[1], {"masks_of": other, "mean_q": run.mean_q}
        if control == ADAMW_MATCHED:
            kl = metrics[row][seed].get("drift/kl", float("nan"))
            kls = [metrics["adamw", rate][seed].get("drift/kl", float("nan")) for rate in grids["adamw"]]
            rate = rate_at_kl(grids["adamw"], kls, kl)
            if rate is None:
                comparison.skip(
                    f"{control} of {specify(*row, seed).name}: no two neighbouring rates of AdamW drift less "
                    f"and more than {kl:.3g}; add learning rates"
                )
                return None
            return rate, {"kl": kl}
        return row[1], {}

    for control in controls:
        rows = [row for row in metrics if (has_tensor_masks if control in OF_TENSORS else is_prm)(row[0])]
        means = {row: sum(m[comparison.measures.accuracy] for m in metrics[row].values()) for row in rows}
        method, learning_rate = row = max(means, key=means.get)
        for number, seed in enumerate(script_args.seeds):
            found = control_of(control, row, number)
            if found is not None:
                rate, detail = found
                extra = {control: {"of": specify(method, learning_rate, seed).name, **detail}}
                comparison.run(specify(control, rate, seed, source=method, **extra))

    comparison.report()
