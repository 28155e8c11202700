"""What the recipes share: methods, grids and controls, runs in folders of their own, resumable, and the report.

A recipe says how one run is trained (`make_trainer`) and what its held-out outcomes are; this module says which runs
there are, leaves out those that are finished, writes what `prm-hf compare` reads, and prints the result.
"""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars, load_dataset, load_from_disk
from run_folder import RunSpec, finish_run, show_progress
from tqdm.auto import tqdm
from transformers import Trainer, TrainingArguments
from transformers.utils import logging
from trl import ModelConfig, TrlParser

from prm_hf.compare import compare_runs, format_comparison, load_runs, write_report
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

# What a method changes in the configuration. A recipe may know more methods, as losses.
OPTIMIZERS = {
    "adamw": {"optimizer_name": "adamw"},
    "prm_per_tensor": {"prm_reduction": "per_tensor", "prm_estimator": "ema"},
    "prm_per_param": {"prm_reduction": "per_param", "prm_estimator": "ema"},
    "prm_debiased": {"prm_reduction": "per_tensor", "prm_estimator": "debiased"},
    "prm_debiased_per_param": {"prm_reduction": "per_param", "prm_estimator": "debiased"},
}
# AdamW with the step that a PRM run took on average: whether it is the selection that helps, or the smaller step.
CONSTANT_Q = "constant_q"


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

    def check(self, known_methods: list[str], learning_rate: float) -> None:
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
        unknown = sorted(set(self.methods) - set(known_methods))
        if unknown:
            raise ValueError(f"`methods`: {', '.join(unknown)} unknown. Known are {', '.join(known_methods)}.")
        if CONSTANT_Q in self.methods and not any(is_prm(method) for method in self.methods):
            raise ValueError("`constant_q` takes the mean mask of a PRM run: add a PRM method to `methods`.")


def is_prm(method: str) -> bool:
    return method.startswith("prm_")


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
    script_args.check([*methods, CONSTANT_Q], training_args.learning_rate)
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
        metrics, note = finish_run(spec, folder, self.train_run, self.outcomes, self.info, self.bar.write)
        self.bar.update()
        if self.state.is_main_process:
            self.bar.write(self._line(spec, metrics, note))
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
    make_trainer: Callable[[TrainingArguments, int], Trainer],
    outcomes: Callable[[Trainer], tuple[dict[str, float], dict[str, list]]],
    info: dict[str, Any],
    **settings: Any,
) -> None:
    """Trains every method at each of its learning rates and seeds, then the control, and reports.

    Args:
        methods: what each method changes in the configuration.
        make_trainer: from a run's configuration and seed.
        outcomes: as in `Comparison`.
        info: `task`, and `accuracy` where it is not the task's.
        **settings: settings of the recipe that make a run what it is.
    """
    built_in = script_args.dataset_name is None

    def configure(method: str, overrides: dict[str, Any]) -> TrainingArguments:
        config = copy.deepcopy(training_args)
        config.optimizer_name = "prm"
        for key, value in (methods["adamw" if method == CONSTANT_Q else method] | overrides).items():
            setattr(config, key, value)
        return config

    def specify(method: str, learning_rate: float, seed: int, **extra: Any) -> RunSpec:
        described = settings_of(
            configure(method, {}),
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
        return RunSpec(method, learning_rate, seed, described)

    def train_run(spec: RunSpec, folder: Path, resume: bool) -> Trainer:
        place = {"output_dir": str(folder), "learning_rate": spec.learning_rate, "seed": spec.seed}
        config = configure(spec.method, place)
        config.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(config.model_init_kwargs or {}),
        }
        trainer = make_trainer(config, spec.seed)
        show_progress(trainer, spec.name)
        trainer.train(resume_from_checkpoint=resume or None)
        if config.save_strategy != "no":
            trainer.save_model(str(folder))
        return trainer

    def all_outcomes(trainer: Trainer) -> tuple[dict[str, float], dict[str, list]]:
        more, margins = outcomes(trainer)
        prm = trainer.find_prm()  # a run of fewer steps than `logging_steps` has logged no mask
        mask = {} if prm is None else {f"mask/{name}": value for name, value in prm.get_mask_stats().items()}
        return {**more, **mask}, margins

    grids = {
        method: script_args.prm_learning_rates if is_prm(method) else script_args.learning_rates
        for method in script_args.methods
        if method != CONSTANT_Q
    }
    n_runs = (sum(map(len, grids.values())) + (CONSTANT_Q in script_args.methods)) * len(script_args.seeds)
    info = {**info, "noise_rate": script_args.noise_rate, "model": data.model_name, "dataset": data.dataset_name}
    comparison = Comparison(training_args.output_dir, train_run, all_outcomes, info, n_runs)

    accuracy: dict[tuple[str, float], list[float]] = {}
    for method, grid in grids.items():
        for learning_rate in grid:
            for seed in script_args.seeds:
                metrics = comparison.run(specify(method, learning_rate, seed))
                accuracy.setdefault((method, learning_rate), []).append(metrics[comparison.measures.accuracy])

    if CONSTANT_Q in script_args.methods:
        prm_rows = {row: sum(values) / len(values) for row, values in accuracy.items() if is_prm(row[0])}
        method, learning_rate = max(prm_rows, key=prm_rows.get)
        for seed in script_args.seeds:
            source = specify(method, learning_rate, seed)
            (run,) = load_runs(comparison.output_dir / source.name)
            constant = {"of": source.name, "mean_q": run.mean_q}
            comparison.run(specify(CONSTANT_Q, learning_rate * run.mean_q, seed, constant_q=constant))

    comparison.report()
