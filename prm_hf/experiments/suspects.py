"""Which labels of a dataset are wrong: `prm-hf suspects`, which docs/suspects.md explains."""

import argparse
import math
import os
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset, disable_progress_bars
from transformers import TrainingArguments
from transformers.utils import logging
from trl import ModelConfig

from ..demo import build_demo
from ..noise.columns import MARKS
from ..runs.methods import BASELINE, METHODS, PRM, Method, parse_method
from ..runs.write import check_seed
from ..suspects import fold_of_rows
from ..suspects.margins import ROW
from ..suspects.repair import check_repair
from ..trainers.checks import check_losses
from ..trainers.config import check_deepspeed_config, check_optimizer, with_help
from . import OUT_OF_TIME, interruptible
from .arguments import check_lists, check_ranges, half_decades, help_groups
from .checks import UNUSED, check_unused_settings
from .command_line import CommandLine, read_yaml
from .console import messages_shown, silenced
from .data import BUILT_IN_WAIT, digest, load_split, local_name, model_digest
from .experiment import BUILT_IN, loading_settings, with_built_in_batch
from .grid import configure
from .runner import FAILED, OutOfTime, Runner, workers_beside
from .suspects_grid import SuspectsData, SuspectsGrid
from .suspects_kinds import KINDS, Kind
from .suspects_report import decide_again


DESCRIPTION = (
    "Finds the rows of DATA whose label is probably wrong: models that were not trained on a row say by how much they "
    "prefer its label. Writes each row with a probability, a page to look through them, and repaired rows. Without "
    "DATA it is the built-in task, of which some labels are flipped."
)
USAGE = "prm-hf suspects [DATA] [--model MODEL] [--output FOLDER] [--config FILE.yaml] [--argument VALUE ...]"
SHORT = {"--model": "--model_name_or_path", "--output": "--output_dir"}
# Of the other methods some need a noise rate, other labels or another run, and some end at a time of their own.
METHODS_THAT_FIND = [name for name, m in METHODS.items() if m.group in (BASELINE, PRM) and name != "prm_stopping"]
NOT_USED = {
    **UNUSED,
    "eval_strategy": "the margins of all rows are measured after every epoch",
    "load_best_model_at_end": "no weights are chosen",
}


@with_help
@dataclass
class SuspectsArguments:
    """
    Arguments of `prm-hf suspects`.

    Parameters:
        dataset_name (`str`, *optional*):
            DATA: a dataset on the hub, a local folder, or a local .json, .jsonl, .csv or .parquet file. Default: the
            built-in task.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, if it has several.
        dataset_train_split (`str`):
            Split whose labels are doubted, slices included (`train[:2000]`).
        kind (`str`, *optional*):
            What may be wrong: `preference` (columns `chosen` and `rejected`), `completion` (`prompt` and `completion`)
            or `label` (`label`, with a column `text`, or with others of which a text is made). Default: by the
            columns.
        how (`str`):
            `both` has each row judged by a model that was not trained on its fold, and ranked with the help of those
            that were; `out_of_fold` has no such help. `in_sample` trains one model, on all rows, which takes as many
            times less time as there are folds; its probabilities deserve less trust.
        folds (`int`):
            Number of folds. Rows of one prompt, or of one value of a column `group`, are in the same fold.
        seeds (`list[int]`):
            Seeds of training and of the folds. Over several of them margins are averaged.
        method (`str`):
            Method that the models are trained with.
        learning_rates (`list[float]`, *optional*):
            Learning rates, of which the one whose models agree most with held-out labels as they are given is taken.
            Default: that of the built-in task; otherwise `learning_rate` and, of a method with a mask, half a decade
            and a decade above it.
        repair (`str`):
            What `repaired.jsonl` does with suspects: `drop` leaves them out, `flip` gives them the other label, `soft`
            writes the probability into a column that `PRMDPOTrainer` reads.
        threshold (`float`, *optional*):
            Probability above which a row is repaired. Default: 0.5, and 0 of `soft`.
        decisions (`str`, *optional*):
            File that `suspects.html` exported. What `output_dir` has of suspects is written anew by it, and nothing is
            trained.
        noise_rate (`float`):
            Of the built-in task, the share of labels that is flipped.
        task_seed (`int`):
            Seed of the built-in task.
        workers (`int`):
            Processes of this machine that train a run each, at the same time. For GPUs there is `prm-hf sweep`.
        max_minutes (`float`, *optional*):
            Minutes after which no new run is started. The command then ends with exit code 75, and goes on where it
            stopped when it is given again.
        overwrite_runs (`bool`):
            Whether runs of other settings in the same place are removed. By default they stay.
    """

    dataset_name: str | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    kind: Literal["preference", "completion", "label"] | None = None
    how: Literal["out_of_fold", "in_sample", "both"] = "both"
    folds: int = 5
    seeds: list[int] = field(default_factory=lambda: [0])
    method: str = "prm_noisy_labels"
    learning_rates: list[float] | None = None
    repair: Literal["drop", "flip", "soft"] = "drop"
    threshold: float | None = None
    decisions: str | None = None
    noise_rate: float = 0.3
    task_seed: int = 0
    workers: int = 1
    max_minutes: float | None = None
    overwrite_runs: bool = False

    def check(self, training_args: TrainingArguments) -> Method:
        """Fills in what was left open; returns the method. A ValueError says what cannot be run."""
        try:
            method = parse_method(self.method, METHODS_THAT_FIND)
        except ValueError as error:
            raise ValueError(str(error).replace("`methods`", "`method`", 1)) from error
        if self.learning_rates is None:
            above = range(3) if self.dataset_name is not None and method.has_mask and self.how != "in_sample" else [0]
            self.learning_rates = [half_decades(training_args.learning_rate, n) for n in above]
        check_lists(self, seeds=None, learning_rates=None)
        check_ranges(
            self,
            ("learning_rates", lambda x: 0 < x < math.inf, "positive numbers"),
            ("folds", lambda x: x >= 2, "at least 2"),
            ("threshold", lambda x: 0 <= x <= 1, "in [0, 1]"),
            ("noise_rate", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("task_seed", lambda x: x >= 0, "at least 0"),
            ("max_minutes", lambda x: 0 < x < math.inf, "above 0 and finite, or left out for no limit"),
            ("workers", lambda x: x >= 1, "at least 1"),
        )
        for seed in self.seeds:
            check_seed(seed)
        if self.how == "in_sample" and len(self.learning_rates) > 1:
            raise ValueError(
                f"`how` is 'in_sample', and `learning_rates` are {self.learning_rates}: rates are told apart by rows "
                "that are held out. Give one, or another `how`."
            )
        own = {"noise_rate": 0.3, "task_seed": 0} if self.dataset_name is not None else {}
        other = {"dataset_config": None, "dataset_train_split": "train"} if self.dataset_name is None else {}
        for name, default in (own | other).items():
            if getattr(self, name) != default:
                reason = "the built-in task's" if name in own else "for a dataset, and none is named"
                raise ValueError(f"`{name}` is {getattr(self, name)!r}, which is {reason}: leave it out.")
        if self.repair == "soft" and self.kind != "preference":
            raise ValueError(f"`repair` is 'soft', which is for preferences, and these are of the kind {self.kind!r}.")
        if self.repair == "flip" and self.kind == "completion":
            raise ValueError("`repair` is 'flip', and a completion has no other one to be exchanged with: use 'drop'.")
        return method


@dataclass
class Command:
    """A command line that is read and checked."""

    args: SuspectsArguments
    training_args: TrainingArguments
    model_args: ModelConfig
    method: Method
    kind: type[Kind]
    line: str


def parse(arguments: Sequence[str]) -> Command:
    """Reads and checks a command line and its YAML file.

    Raises:
        ValueError, TypeError, ImportError: for what is known to fail, or would have no effect.
    """
    line = shlex.join(["prm-hf", "suspects", *arguments])
    arguments = in_full(arguments)
    kind = KINDS[_find_kind(arguments)]

    def defaults(given: set[str]) -> dict[str, Any]:
        own = {"output_dir": "runs/suspects", "report_to": "none", "drift_metrics": False, "save_strategy": "no"}
        if "dataset_name" in given:
            return own
        built_in = {**BUILT_IN, **kind.built_in, "workers": 2, "eval_strategy": "no"}
        return {**own, **with_built_in_batch({k: v for k, v in built_in.items() if k != "eval_steps"})}

    types = (SuspectsArguments, kind.config_class, ModelConfig)
    groups = help_groups(*types)
    groups = {"suspects": groups.pop("the comparison"), **groups}
    more = "All arguments, of the trainer's configuration and of TRL's `ModelConfig`: --help-all.\n"
    parser = CommandLine("suspects", DESCRIPTION, types, groups, more)
    parser.usage = USAGE
    args, training_args, model_args = parser.parse(list(arguments), defaults)
    args.kind = kind.name
    command = Command(args, training_args, model_args, args.check(training_args), kind, line)
    _check(command)
    return command


def in_full(arguments: Sequence[str]) -> list[str]:
    """DATA and the short flags as flags of their full names."""
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words[:1] = ["--dataset_name", words[0]]
    found = []
    for word in words:
        flag, equals, value = word.partition("=")
        found.append(SHORT.get(flag, flag) + equals + value)
    flags = [word.partition("=")[0] for word in found]
    for flag in ("--dataset_name", *SHORT.values()):
        if flags.count(flag) > 1:
            raise ValueError(f"`{flag}` is given twice, once perhaps by a shorter form: give it once.")
    return found


def _find_kind(arguments: Sequence[str]) -> str:
    """The kind, which says what the other flags are: as it is given, or by the columns of the dataset."""
    names = ("kind", "dataset_name", "dataset_config", "dataset_train_split", "decisions")
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in (*names, "config"):
        finder.add_argument(f"--{name}")
    try:
        given = vars(finder.parse_known_args(list(arguments))[0])
    except argparse.ArgumentError:  # which the whole parser says in its words
        return "preference"
    if given["config"] is not None:
        given |= {k: v for k, v in read_yaml(Path(given["config"])).items() if k in names and given[k] is None}
    if given["kind"] is not None:
        return given["kind"] if given["kind"] in KINDS else "preference"
    if (
        given["dataset_name"] is None
        or given["decisions"] is not None
        or {"-h", "--help", "--help-all"} & {*arguments}
    ):
        return "preference"
    split = given["dataset_train_split"] or "train"
    columns = _load(str(given["dataset_name"]), given["dataset_config"], str(split)).column_names
    if {"chosen", "rejected"} <= {*columns}:
        return "preference"
    found = [
        kind
        for name, kind in (("completion", "completion"), ("label", "label"), ("labels", "label"))
        if name in columns
    ]
    if not found:
        raise ValueError(
            f"{given['dataset_name']} has the columns {columns}, and none that is known for its labels: `chosen` and "
            "`rejected`, `completion`, or `label`. Rename yours."
        )
    return found[0]


def _load(name: str, config: str | None, split: str) -> Dataset:
    if Path(name).is_file() and split.split("[")[0] != "train":
        raise ValueError(
            f"`dataset_train_split` is {split!r}, and {name} has one split, 'train': leave it out, or name a slice of "
            "it, as `train[:2000]`."
        )
    disable_progress_bars()  # many short ones, also of the runs
    return load_split(name, config, split)


def _check(command: Command) -> None:
    """Raises ValueError or ImportError for what is known to fail, before data or a model are loaded."""
    args, config, model = command.args, command.training_args, command.model_args.model_name_or_path
    if args.decisions is not None:
        return
    if args.dataset_name is None and model is not None:
        raise ValueError("`--model` needs DATA, the dataset: the built-in task has a model of its own.")
    if args.dataset_name is not None and model is None:
        raise ValueError("DATA needs a `--model`, the name or the folder of the model to train.")
    if os.path.lexists(config.output_dir) and not Path(config.output_dir).is_dir():
        raise ValueError(f"`output_dir` is {config.output_dir!r}, a file: name a folder.")
    if args.workers > 1 and config.world_size > 1:
        raise ValueError(
            f"`workers` is {args.workers}, and {config.world_size} processes were launched, which train each run "
            "together: leave `workers` out, or start one process."
        )
    if config.optim != "prm":
        name = getattr(config.optim, "value", config.optim)
        raise ValueError(f"`method` chooses the optimizer, and `optim` is {name!r}: leave it unset.")
    check_unused_settings(config, "`prm-hf suspects`", NOT_USED)
    for name in ("packing", "eval_packing"):
        if getattr(config, name, False):
            raise ValueError(f"`{name}` puts several rows into one, whose margins can't be told apart: leave it out.")
    try:
        configured = configure(config, args.method, args.noise_rate)
        check_optimizer(configured)
        check_deepspeed_config(configured)
        if command.kind.name == "preference":
            check_losses(configured.loss_type)
    except ValueError as error:
        raise ValueError(f"`{args.method}` of `method`: {error}") from error
    if command.kind.name != "label":  # which loads its model by itself
        config.model_init_kwargs = {**loading_settings(command.model_args), **(config.model_init_kwargs or {})}


def load_data(command: Command) -> SuspectsData:
    """The rows, checked, and with their folds.

    Raises:
        ValueError: a dataset or split cannot be read, or a run would fail on its rows.
    """
    args, model_args = command.args, command.model_args
    logging.set_verbosity_error()
    if args.dataset_name is None:
        disable_progress_bars()
        logging.disable_progress_bar()
        if PartialState().is_main_process:
            print(BUILT_IN_WAIT, flush=True)
        demo = build_demo(args.task_seed)
        kind, name = command.kind(demo.model_path, model_args), "built-in"
        rows = kind.built_in_rows(demo.train, args.noise_rate, args.task_seed)
        about = {"model": "built-in", "dataset": "built-in", "noise_rate": args.noise_rate}
        about |= {"task_seed": args.task_seed} if args.task_seed else {}
    else:
        model = model_args.model_name_or_path
        kind, name = command.kind(model, model_args), args.dataset_name
        rows = _load(args.dataset_name, args.dataset_config, args.dataset_train_split)
        about = {"model": local_name(model), "dataset": local_name(name), "train_split": args.dataset_train_split}
        if of_model := model_digest(model, model_args.model_revision):
            about["model_digest"] = of_model
    return doubt(args, kind, name, f"The rows, {args.dataset_train_split!r} of {name},", rows, about)


def doubt(
    args: SuspectsArguments,
    kind: Kind,
    name: str,
    place: str,
    rows: Dataset,
    about: dict[str, Any],
    groups: Sequence[Any] | None = None,
) -> SuspectsData:
    """The rows of a dataset, checked, and with their folds.

    Args:
        name: of the dataset.
        place: words for the rows, with which a sentence begins.
        about: what a run's settings say of the model and the dataset.
        groups: one entry a row, the same for rows of one fold. Default: by a column `group`, or the prompts.

    Raises:
        ValueError: a run would fail on the rows.
    """
    kind.check(rows, place)
    if ROW in rows.column_names:
        raise ValueError(f"{name} has a column {ROW!r}, which is to hold the numbers of rows: rename it.")
    try:
        check_repair(rows, args.repair)
    except ValueError as error:
        raise ValueError(f"`repair` is {args.repair!r}. {error}") from error
    if groups is None:
        groups = rows["group"] if "group" in rows.column_names else kind.groups(rows)
    groups = list(map(str, groups))
    # Also in sample, for which they are resampled by
    folds = {} if args.how == "in_sample" else {seed: fold_of_rows(groups, args.folds, seed) for seed in args.seeds}
    truth = next((rows[name][:] for name in MARKS if _is_bool(rows, name)), None)
    about = {**about, "train_digest": digest(rows, kind.columns(rows))}
    return SuspectsData(kind, name, rows, groups, folds, truth, about)


def _is_bool(rows: Dataset, name: str) -> bool:
    return name in rows.column_names and getattr(rows.features[name], "dtype", "") == "bool"


def find(command: Command, deadline: float | None, reports: bool = True) -> int:
    """Makes all runs; returns the exit code of a comparison."""
    data = load_data(command)
    grid = SuspectsGrid(command.args, command.training_args, command.model_args, data, command.line)
    try:
        return make_suspects(grid, deadline, reports)
    except OutOfTime:
        if PartialState().is_main_process and reports:
            print(f"\nThe {command.args.max_minutes:g} minutes are over. The same command goes on from here.")
        return OUT_OF_TIME


def make_suspects(grid: SuspectsGrid, deadline: float | None, reports: bool = True) -> int:
    """Makes all runs and writes the suspects; returns 0, or `FAILED` if there are none. Collective.

    Raises:
        OutOfTime: the deadline has left a run.
    """
    grid.prepare()
    runner = Runner(grid, deadline, grid.args.overwrite_runs, grid.training_args.disable_tqdm, reports)
    code = runner.run()
    if grid.margins is None:
        runner.tell("\nNo suspects are written: at every learning rate a run has failed or diverged. Lower it.")
        return FAILED
    return code


def _find_beside(arguments: list[str], deadline: float | None, threads: int) -> None:
    torch.set_num_threads(threads)
    with silenced():
        find(parse(arguments), deadline, reports=False)


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line.

    Returns:
        The exit code: `OUT_OF_TIME` if runs are left, `FAILED` if one failed or all suspects are missing, otherwise 0.
    """
    with messages_shown():
        command = parse(arguments)
        args = command.args
        if args.decisions is not None:
            decide_again(Path(command.training_args.output_dir), args)
            return 0
        deadline = None if args.max_minutes is None else time.monotonic() + 60 * args.max_minutes
        if args.workers > 1:
            torch.set_num_threads(max(1, torch.get_num_threads() // args.workers))
        with workers_beside(args.workers - 1, _find_beside, arguments, deadline, torch.get_num_threads()):
            return find(command, deadline)
