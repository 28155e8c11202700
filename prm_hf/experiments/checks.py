"""What is checked before anything is written, a model loaded or a step trained: arguments, methods and rows."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from .._extras import require
from ..runs.methods import CONTROL, Method, parse_method
from ..runs.write import check_name
from ..suspects import fold_of_rows
from ..trainers.config import check_deepspeed_config, check_optimizer
from .arguments import ComparisonArguments, check_names_of_folders
from .baselines import votes
from .controls import THIRD_PARTY, WHOLE_TENSORS
from .data import Data
from .experiment import Experiment
from .grid import configure, defaults_of
from .selection import SETTINGS as SELECTION
from .simplicity import check_simplicity, check_units


# Arguments that a Trainer has and a comparison does not use, each with the reason.
UNUSED = {
    "seed": "`seeds` has those of the runs",
    "resume_from_checkpoint": "a run goes on from its last checkpoint when the same command is given again",
    "hub_model_id": "all runs would be pushed to one repository; each has one of its own name without it",
    "auto_find_batch_size": "runs of different batch sizes cannot be compared",
    "do_predict": "nothing is predicted",
    "include_for_metrics": "no function `compute_metrics` is called",
    "batch_eval_metrics": "no function `compute_metrics` is called",
    "optim_target_modules": "it is for optimizers that no method has",
}
OF_A_DATASET = (
    *("dataset_config", "dataset_train_split", "dataset_test_split", "eval_dataset_name", "drop_overlap"),
    *SELECTION,
)
# How often a run is looked at is the user's, but for the methods that need to look more often.
_LOOKS = ("eval_strategy", "eval_steps", "logging_steps")


def check_experiment(experiment: Experiment) -> None:
    """Raises ValueError or ImportError for what is known to fail, or would have no effect, before it has cost time."""
    args = experiment.script_args
    check_names_of_folders(args)
    for method in args.compared:
        check_name(method.name, "methods")
    if len(args.dataset_name or ()) > 1:
        for name in args.dataset_name:
            folder_of_data(name)
    if os.path.lexists(experiment.training_args.output_dir) and not Path(experiment.training_args.output_dir).is_dir():
        raise ValueError(f"`output_dir` is {experiment.training_args.output_dir!r}, a file: name a folder.")
    processes = experiment.training_args.world_size
    if args.workers > 1 and processes > 1:
        raise ValueError(
            f"`workers` is {args.workers}, and {processes} processes were launched, which train each run together: "
            "leave `workers` out, or start one process."
        )
    _check_unused(experiment)
    check_simplicity(experiment)
    _check_methods(experiment)


def folder_of_data(name: str) -> str:
    """The folder of a dataset's runs where a command has several datasets."""
    return check_name(Path(name).stem, "dataset_name")


def folder_of_rate(noise_rate: float) -> str:
    """The folder of a noise rate's runs where a command has several, the same for no two rates."""
    short = f"{noise_rate:g}"
    return f"noise{short if float(short) == noise_rate else repr(noise_rate)}"


def check_unused_settings(config: TrainingArguments, what: str, unused: Mapping[str, str]) -> None:
    """Raises ValueError if a setting that `what` does not use is not its default; `unused` has the reasons."""
    defaults = defaults_of(type(config))
    for name, reason in unused.items():
        value = getattr(config, name)
        value = getattr(value, "value", value)  # of an enumeration
        if value not in (None, defaults[name]):
            raise ValueError(f"`{name}` is {value!r}, which {what} does not use: {reason}. Leave it out.")


def _check_unused(experiment: Experiment) -> None:
    args, config = experiment.script_args, experiment.training_args
    of_config, of_args = defaults_of(type(config)), defaults_of(type(args))
    check_unused_settings(config, "a comparison", UNUSED)
    unset = experiment.built_in if args.dataset_name is None else of_config
    if config.learning_rate not in {unset["learning_rate"], *args.learning_rates, *args.prm_learning_rates}:
        raise ValueError(
            f"`learning_rate` is {config.learning_rate!r}, and `learning_rates` are {args.learning_rates}: leave one "
            "of them out."
        )
    if args.dataset_name is None:
        _refuse(args, of_args, OF_A_DATASET, "is for a `dataset_name`, and there is none")
    elif any(Path(name).is_file() for name in args.dataset_name):
        _refuse(args, of_args, ["dataset_config"], "is for datasets on the hub, and a file has no configuration")
    for name, reason in experiment.unused_arguments().items():
        _refuse(args, of_args, [name], reason)


def _refuse(args: ComparisonArguments, defaults: Mapping[str, Any], names: Any, reason: str) -> None:
    for name in names:
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"`{name}` is {getattr(args, name)!r}, which {reason}: leave it out.")


def _check_methods(experiment: Experiment) -> None:
    """Each method by its training configuration, and what was given against what the methods make of it."""
    args, given = experiment.script_args, experiment.training_args
    if not given.drift_metrics:
        raise ValueError("`drift_metrics` is False, and a comparison is of what it measures: leave it on.")
    sharded = given.deepspeed_plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    configs = {}
    sources = dict.fromkeys(method.source for method in args.compared if method.repair is not None)
    for method in [*args.compared, *map(parse_method, sources)]:
        if method.key in THIRD_PARTY:
            require("prm_hf.experiments.controls", THIRD_PARTY[method.key], extra="controls")
        if method.key in WHOLE_TENSORS and sharded:
            raise ValueError(
                f"`{method.name}` runs on whole tensors: launch it on one GPU, or several without sharding."
            )
        if method.key == "msvag" and given.weight_decay:
            raise ValueError(f"`msvag` has no weight decay, and `weight_decay` is {given.weight_decay}: set it to 0.")
        for rate in args.noise_rate:
            is_control = method.group == CONTROL  # which is configured as another method
            if is_control or method not in args.methods_for(rate):
                continue
            configs[method.name, rate] = config = configure(given, method.name, rate)
            try:
                check_optimizer(config)
                check_deepspeed_config(config)
                experiment.check_method(method, config)
            except ValueError as error:
                raise ValueError(f"`{method.name}` of `methods`: {error}") from error
    check_given_settings(given, args.compared, list(configs.values()))


def check_given_settings(
    given: TrainingArguments, compared: Iterable[Method], configs: Sequence[TrainingArguments]
) -> None:
    """Raises ValueError for a setting that no method has since each sets its own.

    Args:
        given: the training configuration of the command line.
        compared: the methods.
        configs: what they make of it.
    """
    defaults = defaults_of(type(given))
    changed = {name for method in compared for name in (method.changes(0.3) or ())} - {*_LOOKS, "optim"}
    for name in sorted(changed | {name for name in defaults if name.startswith("prm_")}):
        value = getattr(given, name, None)
        users = [config for config in configs if config.optim == "prm" or not name.startswith("prm_")]
        if value != defaults.get(name) and value not in [getattr(config, name) for config in users]:
            raise ValueError(
                f"`{name}` is {value!r}, and no method in `methods` has it: leave it out, or name one that has."
            )


def check_data(experiment: Experiment, data: Data) -> None:
    """Raises ValueError for rows that a run could not be trained or judged on."""
    experiment.check_rows(data)
    args, compared = experiment.training_args, experiment.script_args.compared
    check_units(experiment.script_args, data.train_groups, experiment.has_pairs)
    if any(method.key == "vote" for method in compared):
        votes(data.train, data.train_groups)
    if any(method.repair is not None for method in compared) and experiment.script_args.repair_folds:
        fold_of_rows(data.train_groups, experiment.script_args.repair_folds)
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    has_prm = any(method.has_mask for method in compared)
    if has_prm and args.prm_boundary == "empirical" and args.prm_alpha is None and len(data.train) <= per_step:
        raise ValueError(
            f"`prm_boundary` is 'empirical', and {data.dataset_name} has {len(data.train)} training rows for "
            f"{per_step} a step: lower `per_device_train_batch_size`, or set `prm_boundary` to 'batch'."
        )
