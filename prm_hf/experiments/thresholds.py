"""Tasks that are judged by the steps until a metric reaches a threshold: their arguments, and what a task defines.

A task is a subclass of [`ThresholdTask`] in a module of its own, whose `main` calls `run_thresholds` of
`thresholds_grid.py`, which has the runs. `compare/survival.py` has what they say.
"""

import argparse
import dataclasses
import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from transformers import Trainer, TrainingArguments

from .._extras import require
from ..runs.methods import BASELINE, CONTROL, METHODS, OTHER, PRM, Method, parse_method
from ..runs.schema import Threshold
from ..runs.write import RunSpec, check_seed
from ..trainers.config import PRMArguments, check_optimizer, with_help
from .arguments import check_lists, check_ranges, methods_help
from .checks import check_given_settings, check_unused_settings
from .command_line import CommandLine, read_yaml
from .controls import THIRD_PARTY
from .ensembles import can_stack
from .grid import configure
from .problems import Problem, ProblemTrainer
from .sven import SVEN, SvenProblemTrainer


# Methods that are more than an optimizer, or end before the threshold
_NOT_OPTIMIZERS = ("adamw_embedding", "interpolate", "prm_stopping")
# What every task sets; its presets come on top.
_DEFAULTS = {
    "report_to": "none",
    "save_strategy": "no",
    "eval_strategy": "steps",
    "eval_on_start": True,
    "drift_metrics": False,
    "bf16": False,
}
_UNUSED = {
    "learning_rate": "`learning_rates` and `prm_learning_rates` are the grids",
    "weight_decay": "`weight_decays` and `prm_weight_decays` are the grids",
    "seed": "`seeds` has several",
    "load_best_model_at_end": "runs are judged by their steps to a threshold",
    "resume_from_checkpoint": "the same command goes on where it stopped",
}
_TRAINING = ("max_steps", "per_device_train_batch_size", "lr_scheduler_type", "warmup_steps", "max_grad_norm")
_TRAINING += ("adam_beta1", "adam_beta2", "adam_epsilon", "use_cpu", "output_dir", "eval_steps", "report_to")
_PRM = tuple(f.name for f in fields(PRMArguments) if f.name.startswith("prm_") and f.default is not ...)


def optimizer_methods() -> list[str]:
    """The methods that are an optimizer and nothing else, and the control that is AdamW at PRM's mean mask."""

    def is_one(method: Method) -> bool:
        is_more = method.repair or method.clean_labels or method.needs_pairs or method.key in _NOT_OPTIMIZERS
        return method.key == "constant_q" or (method.group in (BASELINE, PRM, OTHER) and not is_more)

    return [name for name, method in METHODS.items() if is_one(method)]


@dataclass
class ThresholdConfig(PRMArguments, TrainingArguments):
    """The training configuration of all runs: transformers' arguments, and those of PRM."""


@with_help
@dataclass
class ThresholdArguments:
    """
    Which runs to make, and when one has reached the threshold. A task adds its own arguments in a subclass.

    Parameters:
        preset (`str`, *optional*):
            Settings for a machine, which single arguments override: `cpu` shows the effect in minutes on two cores,
            `full` is for a GPU.
        methods (`list[str]`):
            Methods to compare.
        seeds (`list[int]`):
            Seeds of the data, the weights and the order of the batches.
        learning_rates (`list[float]`):
            Learning rates of each method.
        prm_learning_rates (`list[float]`, *optional*):
            Those of the PRM methods, if they are others; as many, so that every method gets a grid of one size.
        weight_decays (`list[float]`):
            Weight decays of each method, each at every learning rate.
        prm_weight_decays (`list[float]`, *optional*):
            Those of the PRM methods, if they are others; as many.
        threshold (`float`, *optional*):
            What the metric must reach. Default: the task's, to which the published numbers belong.
        stop_at_threshold (`bool`):
            Whether a run ends at the evaluation that reaches the threshold.
        models_at_once (`int`):
            Models that are trained at the same time, stacked: faster where they are small. 1 is one after another,
            through the Hugging Face Trainer, as are methods whose optimizer is that of another library.
        workers (`int`):
            Processes of this machine that train at the same time. They share its cores.
        max_minutes (`float`, *optional*):
            Minutes after which no new run is started. The same command goes on where it stopped.
        overwrite_runs (`bool`):
            Whether runs of other settings in the same place are removed. By default they stay.

    After `check`, `compared` are the methods that `methods` names.
    """

    preset: str | None = None
    methods: list[str] = field(default_factory=lambda: ["adamw", "prm_per_param", "prm_rows", "constant_q"])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2, 3, 4])
    learning_rates: list[float] = field(default_factory=lambda: [1e-3])
    prm_learning_rates: list[float] | None = None
    weight_decays: list[float] = field(default_factory=lambda: [0.0])
    prm_weight_decays: list[float] | None = None
    threshold: float | None = None
    stop_at_threshold: bool = True
    models_at_once: int = 1
    workers: int = 1
    max_minutes: float | None = None
    overwrite_runs: bool = False
    compared: list[Method] = field(init=False, default_factory=list)

    def check(self, known: list[str], threshold: Threshold) -> None:
        """Fills in what was left open; ValueError for what cannot be run."""
        for name in ("learning_rates", "weight_decays"):
            check_lists(self, **{name: None})
            if getattr(self, f"prm_{name}") is None:
                setattr(self, f"prm_{name}", list(getattr(self, name)))
            check_lists(self, **{f"prm_{name}": None})
            sizes = len(getattr(self, name)), len(getattr(self, f"prm_{name}"))
            if sizes[0] != sizes[1]:
                raise ValueError(
                    f"`{name}` has {sizes[0]} values and `prm_{name}` {sizes[1]}: give both as many, or the method "
                    "with the larger grid wins by it."
                )
        check_lists(self, methods=None, seeds=None)
        for seed in self.seeds:
            check_seed(seed)
        if self.threshold is None:
            self.threshold = threshold.value
        inf = float("inf")
        check_ranges(
            self,
            *((name, lambda x: 0 < x < inf, "positive numbers") for name in ("learning_rates", "prm_learning_rates")),
            *((name, lambda x: 0 <= x < inf, "at least 0") for name in ("weight_decays", "prm_weight_decays")),
            ("threshold", lambda x: abs(x) < inf, "a finite number"),
            ("max_minutes", lambda x: 0 < x < inf, "above 0"),
            ("models_at_once", lambda x: x >= 1, "at least 1"),
            ("workers", lambda x: x >= 1, "at least 1"),
        )
        self.compared = [parse_method(name, known) for name in self.methods]
        is_control = [method.group == CONTROL for method in self.compared]
        if all(is_control) or any(is_control) and not any(method.has_controls for method in self.compared):
            raise ValueError(f"`constant_q` takes the mean mask of a PRM run: add a PRM method, got {self.methods}.")


class ThresholdTask:
    """A task on which methods are compared by the steps until a metric reaches a threshold.

    A subclass says in its attributes what is measured, and in `make_trainer` how a run is made. The harness does the
    rest: it gives the trainer the optimizer of the method, learning rate and weight decay of the run, evaluates every
    `eval_steps`, notes the step and the seconds of training at which the threshold is reached, and reports.

    Attributes:
        command, description: of `prm-hf <command>`; the runs' default folder is `runs/<command>`.
        threshold: the metric, as the history of a run has it (`eval_accuracy` of a Trainer is `accuracy` there), and
            the value that it must reach. With `--threshold` the object has that value.
        published: published steps to the threshold by what people call the method: `{"AdamW": 29450, "PRM": 5950}`.
        published_source: where these stand, in a sentence.
        presets: by the value of `--preset` the defaults of any argument, the harness' and transformers' alike. The
            first one is the default. Each must have `max_steps` and `eval_steps`.
        arguments_class: the arguments; a task with its own subclasses [`ThresholdArguments`]. All that the subclass
            adds is a setting of the runs: two values are two experiments.
        curves: further metrics of the history that the report draws over the steps, with their titles.
        row_losses: from what a problem's model returns, and the rows of a batch, to the loss of each row, `(rows,)`.
            The method `sven` needs it.
        args, training_args: the parsed arguments.
    """

    command: ClassVar[str]
    description: ClassVar[str]
    threshold: Threshold
    published: ClassVar[dict[str, float]] = {}
    published_source: ClassVar[str] = ""
    presets: ClassVar[dict[str, dict[str, Any]]]
    arguments_class: ClassVar[type[ThresholdArguments]] = ThresholdArguments
    curves: ClassVar[dict[str, str]] = {}
    row_losses: ClassVar[Callable[[dict[str, Tensor], dict[str, Tensor]], Tensor] | None] = None

    def __init__(self, args: ThresholdArguments, training_args: ThresholdConfig) -> None:
        self.args, self.training_args = args, training_args
        self.command_line = ""
        if args.threshold != self.threshold.value:
            self.threshold = dataclasses.replace(self.threshold, value=args.threshold)
            self.published = {}  # which belong to another threshold

    @classmethod
    def parse(cls, arguments: list[str]) -> "ThresholdTask":
        """From the command line and a YAML file; ValueError or TypeError for what cannot be run."""
        preset = cls.presets[cls._preset(arguments)]
        own = [f.name for f in fields(cls.arguments_class) if f.init]
        shown = {"the runs": own, "training": _TRAINING, "PRM": _PRM}
        known = [name for name in optimizer_methods() if name != SVEN or cls.row_losses is not None]
        types = (cls.arguments_class, ThresholdConfig)
        parser = CommandLine(cls.command, cls.description, types, shown, methods_help(known))
        defaults = {"output_dir": f"runs/{cls.command}", **_DEFAULTS, **preset}
        # Who gives a grid for all methods does not mean the preset's for PRM
        grids = {f"prm_{name}": name for name in ("learning_rates", "weight_decays")}
        given: set[str] = set()

        def defaults_beside(names: set[str]) -> dict[str, Any]:
            given.update(names)
            return {k: value for k, value in defaults.items() if grids.get(k) not in names}

        args, training_args = parser.parse(arguments, defaults_beside)
        if "logging_steps" not in given:  # the loss and the mask are drawn beside the metric
            training_args.logging_steps = training_args.eval_steps
        args.check(known, cls.threshold)
        task = cls(args, training_args)
        task.command_line = shlex.join(["prm-hf", cls.command, *arguments])
        task._check()
        return task

    @classmethod
    def _preset(cls, arguments: list[str]) -> str:
        """The preset that the command line, or else the file of `--config`, names."""
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.error = lambda message: None  # the parser of all arguments says what is wrong
        for flag in ("--preset", "--config"):
            finder.add_argument(flag, nargs="?")
        found = finder.parse_known_args(arguments)[0]
        name = found.preset or (read_yaml(Path(found.config)).get("preset") if found.config else None)
        if name is not None and name not in cls.presets:
            raise ValueError(f"`preset` must be one of {', '.join(cls.presets)}, got {name!r}.")
        return name or next(iter(cls.presets))

    def _check(self) -> None:
        args, config = self.args, self.training_args
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("Each run has a process of its own: start one with `prm-hf`, and set `--workers`.")
        check_unused_settings(config, f"`prm-hf {self.command}`", _UNUSED)
        if config.optim != "prm":
            name = getattr(config.optim, "value", config.optim)
            raise ValueError(f"`methods` choose the optimizers, and `optim` is {name!r}: leave it unset.")
        if config.drift_metrics:
            raise ValueError("`drift_metrics` are those of language models: leave them out.")
        if config.eval_strategy != "steps" or config.max_steps <= 0:
            raise ValueError(
                f"A threshold is reached at a step: set `max_steps` above 0, got {config.max_steps}, and leave "
                f"`eval_strategy` at 'steps', got {getattr(config.eval_strategy, 'value', config.eval_strategy)!r}."
            )
        if config.eval_steps < 1 or config.eval_steps != int(config.eval_steps):
            raise ValueError(f"`eval_steps` must be a whole number of steps, at least 1, got {config.eval_steps:g}.")
        configs = []
        for method in args.compared:
            if method.key in THIRD_PARTY:
                require("prm_hf.experiments.controls", THIRD_PARTY[method.key], extra="controls")
            if method.key == "msvag" and args.weight_decays != [0]:
                raise ValueError(f"`msvag` has no weight decay, and `weight_decays` are {args.weight_decays}.")
            if method.group != CONTROL:
                configs.append(configure(config, method.name, 0.0))
                try:
                    check_optimizer(configs[-1])
                except ValueError as error:
                    raise ValueError(f"`{method.name}` of `methods`: {error}") from error
        check_given_settings(config, args.compared, configs)
        if args.models_at_once > 1 and not can_stack(config):
            raise ValueError(
                f"`models_at_once` is {args.models_at_once}, and a stack computes neither bf16 nor fp16, accumulated "
                "gradients nor state in other types: leave these out, or set it to 1."
            )
        self.check()

    def check(self) -> None:
        """Raises ValueError for arguments of the task that cannot be run, before anything takes time."""

    def settings(self) -> dict[str, Any]:
        """What of the task's own arguments makes a run what it is: all of them."""
        names = {f.name for f in fields(self.arguments_class)} - {f.name for f in fields(ThresholdArguments)}
        return {name: getattr(self.args, name) for name in sorted(names)}

    def make_trainer(self, config: ThresholdConfig, spec: RunSpec) -> Trainer:
        """The trainer of one run, of the class `transformers.Trainer`, without an optimizer; by default of `problem`.

        Its model's forward returns the loss. Data, weights and noise depend on `spec.seed` alone, so that all methods
        get the same. Its evaluation must log `eval_<metric of the threshold>`, by `compute_metrics` or in `evaluate`.

        Args:
            config: the `args` of the trainer, with output folder, learning rate, weight decay and seed of the run.
            spec: the run; `self.args` has the arguments of the task.
        """
        problem = self.problem(spec.seed)
        if problem is None:
            raise TypeError(f"{type(self).__name__} needs a method `make_trainer` or `problem`.")
        if parse_method(spec.method).key == SVEN:
            return SvenProblemTrainer(problem, config, self.row_losses)
        return ProblemTrainer(problem, config)

    def outcomes(self, trainer: Trainer) -> dict[str, float]:
        """More numbers of a trained run, for its `metrics.json`."""
        return {}

    def problem(self, seed: int) -> Problem | None:
        """The task of a seed in tensors, which `models_at_once` needs; None where there is no such form."""
        return None
