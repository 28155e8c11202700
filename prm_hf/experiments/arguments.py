"""The arguments of a comparison and their checks."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..runs.methods import CONTROL, GROUPS, METHODS, PRM, Method, parse_method
from ..runs.write import check_seed
from ..trainers.config import with_help


# What `--help` shows of the arguments of trainers and models, beside those of the comparison.
_MODEL = ("model_name_or_path", "dtype", "attn_implementation", "use_peft", "lora_r", "lora_alpha")
_TRAINING = (
    *("num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "beta", "loss_type"),
    *("bf16", "gradient_checkpointing", "padding_free", "use_cpu"),
)
_FILES = ("output_dir", "save_strategy", "save_steps", "save_total_limit")
_EVALUATION = ("eval_strategy", "eval_steps", "per_device_eval_batch_size", "logging_steps", "report_to")
_MASK = ("prm_mask", "prm_boundary", "prm_mask_warmup_steps", "prm_state_dtype")


def help_groups(comparison: type, config: type, model: type) -> dict[str, list[str]]:
    """What `--help` shows, by the titles of its groups."""
    own = [f.name for f in fields(comparison) if f.init]
    known = {f.name for kind in (config, model) for f in fields(kind)}
    groups = {"model": _MODEL, "training": _TRAINING, "evaluation": _EVALUATION, "files": _FILES, "PRM": _MASK}
    shown = {title: [name for name in names if name in known] for title, names in groups.items()}
    return {"the comparison": own, **shown}


def methods_help(known: Collection[str]) -> str:
    """What `--help` says of the methods, in the order of the table."""
    lines = ["methods (controls take something from a PRM run):"]
    for method in (METHODS[name] for group in GROUPS for name in known if METHODS[name].group == group):
        value = ":VALUE" if method.value_help else ""
        group = "" if method.group == PRM else f" ({method.group})"
        lines.append(f"  {method.name + value:<32}{method.title}{group}")
    more = "All arguments, of TRL's configuration and of its `ModelConfig`: --help-all."
    return "\n".join([*lines, "", f"{more} With --config they stand in a YAML file.", ""])


def check_lists(args: Any, **known: Collection[str] | None) -> None:
    """Raises ValueError unless each argument has at least one value, none twice, and known ones (None: any)."""
    for name, choices in known.items():
        values = getattr(args, name)
        if not values or len(set(values)) < len(values) or (choices and not set(values) <= set(choices)):
            among = f" of {', '.join(choices)}" if choices else ""
            raise ValueError(f"`{name}` must name at least one{among}, and none twice, got {values}.")


def check_ranges(args: Any, *ranges: tuple[str, Callable[[float], bool], str]) -> None:
    """Raises ValueError unless all values of the arguments are in their ranges: name, condition and words of each."""
    for name, holds, words in ranges:
        found = getattr(args, name)
        for value in found if isinstance(found, list) else [found]:
            if value is not None and not holds(value):
                raise ValueError(f"`{name}` must be {words}, got {value}.")


def half_decades(rate: float, n: int) -> float:
    """A learning rate times the n-th power of the square root of 10, of two digits."""
    return float(f"{rate * 10 ** (n / 2):.1e}")


@with_help
@dataclass
class ComparisonArguments:
    """
    Arguments of a comparison of methods, learning rates and seeds on noisy datasets.

    Parameters:
        dataset_name (`list[str]`, *optional*):
            Datasets on the hub, local folders, or local .json, .jsonl, .csv or .parquet files, each with a comparison
            of its own. Default: the built-in task, whose clean labels are known.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, if it has several.
        dataset_train_split (`str`):
            Split to train on, slices included (`train[:2000]`).
        dataset_test_split (`str`):
            Held-out split, whose labels stay as they are.
        eval_dataset_name (`list[str]`, *optional*):
            Datasets that the held-out splits are read from, if not `dataset_name`; as many.
        task_seed (`int`):
            Seed of the built-in task: of its prompts, its pairs and its reference policy.
        noise_rate (`list[float]`):
            Probabilities with which a training label is corrupted, each with a comparison of its own.
        seeds (`list[int]`):
            Seeds; each has its own noise and its own order of the data.
        methods (`list[str]`):
            Methods to compare.
        learning_rates (`list[float]`, *optional*):
            Learning rates of each method. Default: four around `learning_rate`, half a decade apart.
        prm_learning_rates (`list[float]`, *optional*):
            Learning rates of the PRM methods, if they are others; of the same number, so that every method gets a grid
            of one size. Default: `learning_rates`, or where these are not given either, half a decade above them.
        max_extensions (`int`):
            How often the grids of two learning rates or more are extended by half a decade, all methods alike, while
            the most accurate rate of a method is its smallest or its largest.
        workers (`int`):
            Processes of this machine that train a run each, at the same time. They share its cores. For GPUs there is
            `prm-hf sweep`.
        max_minutes (`float`, *optional*):
            Minutes after which no new run is started. The command then ends with exit code 75, and goes on where it
            stopped when it is given again.
        overwrite_runs (`bool`):
            Whether runs of other settings in the same place, of the same method, learning rate and seed, are removed.
            By default they stay, each in a folder of its own.
        drop_overlap (`bool`):
            Whether held-out rows whose prompt or text is among the training rows are left out. By default they are an
            error.
        repair_folds (`int`):
            Folds of prompts of the methods that repair labels: a label is judged by models that were trained on the
            other folds. With 0 it is judged in sample, by the runs of the method that is named first.
        suspects (`bool`):
            Whether to look for wrong labels after the comparison, as `prm-hf suspects` does, with the method and the
            learning rate of its most accurate row. They are those of the training rows as they are given; where they
            are corrupted, of the labels of the first seed. The folder `suspects` has them.
        pairs_per_prompt (`int`, *optional*):
            Rows of each prompt that are kept, the first ones, of training and held-out rows alike. With 1 no two
            rows share a prompt, so that each is an example of its own. Default: all.
        heldout_filter_column (`str`, *optional*):
            Column of booleans: only held-out rows with true are kept, such as those on which all raters agree.
        label_votes_column (`str`, *optional*):
            Column with a list of the votes of several raters on each training pair: 1 for `chosen`, which is what most
            prefer, and -1 for `rejected`. With it the training labels are those of one rater, real noise in place of
            a `noise_rate`; `adamw_clean` trains on those of the majority.
        label_rater (`int`, *optional*):
            Place of that rater in the list, from 0.
        effective_dimension (`float`, *optional*):
            Alpha, above 0: the effective dimension of each trained model is measured, on 256 of its training rows. A
            run without it is another run.
        bound (`bool`):
            Whether the risk of each trained adapter on new rows is bounded, by the size of its compressed file. A run
            without it is another run.
        unilora_dim (`int`, *optional*):
            With `use_peft`: the length of a UniLora adapter, in place of LoRA.

    After `check`, `compared` are the methods that `methods` names.
    """

    dataset_name: list[str] | None = None
    dataset_config: str | None = None
    dataset_train_split: str = "train"
    dataset_test_split: str = "test"
    eval_dataset_name: list[str] | None = None
    task_seed: int = 0
    noise_rate: list[float] = field(default_factory=lambda: [0.3])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    methods: list[str] = field(default_factory=lambda: ["adamw", "adamw_eps:10", "prm_noisy_labels", "adamw_clean"])
    learning_rates: list[float] | None = None
    prm_learning_rates: list[float] | None = None
    max_extensions: int = 3
    workers: int = 1
    max_minutes: float | None = None
    overwrite_runs: bool = False
    drop_overlap: bool = False
    repair_folds: int = 5
    suspects: bool = False
    pairs_per_prompt: int | None = None
    heldout_filter_column: str | None = None
    label_votes_column: str | None = None
    label_rater: int | None = None
    effective_dimension: float | None = None
    bound: bool = False
    unilora_dim: int | None = None
    compared: list[Method] = field(init=False, default_factory=list)

    def check(self, known: Collection[str], learning_rate: float, max_grad_norm: float) -> None:
        """Fills in what was left open.

        Args:
            known: the names of methods that the task has, without values.
            learning_rate, max_grad_norm: of the training configuration.

        Raises:
            ValueError: for what cannot be run.
        """
        if self.learning_rates is None:
            self.learning_rates = [half_decades(learning_rate, n) for n in range(-2, 2)]
            if self.prm_learning_rates is None:  # a mask shrinks the step
                self.prm_learning_rates = [half_decades(learning_rate, n) for n in range(-1, 3)]
        if self.prm_learning_rates is None:
            self.prm_learning_rates = list(self.learning_rates)
        check_lists(self, **dict.fromkeys(("methods", "seeds", "noise_rate", "learning_rates", "prm_learning_rates")))
        if len(self.learning_rates) != len(self.prm_learning_rates):
            raise ValueError(
                f"`learning_rates` has {len(self.learning_rates)} values and `prm_learning_rates` "
                f"{len(self.prm_learning_rates)}: give both as many, or the method with the larger grid wins by it."
            )

        def is_rate(x: float) -> bool:
            return 0 < x < math.inf

        check_ranges(
            self,
            ("learning_rates", is_rate, "positive numbers"),
            ("prm_learning_rates", is_rate, "positive numbers"),
            ("max_minutes", lambda x: x > 0, "above 0"),
            ("max_minutes", math.isfinite, "finite, or left out for no limit"),
            ("max_extensions", lambda x: x >= 0, "at least 0"),
            ("workers", lambda x: x >= 1, "at least 1"),
            ("repair_folds", lambda x: x == 0 or x >= 2, "at least 2, or 0 for margins in sample"),
            ("pairs_per_prompt", lambda x: x >= 1, "at least 1"),
            ("label_rater", lambda x: x >= 0, "at least 0"),
            ("effective_dimension", is_rate, "a positive number, the alpha"),
            ("unilora_dim", lambda x: x >= 1, "at least 1"),
        )
        check_names_of_folders(self)
        self._check_datasets()
        self.compared = [parse_method(name, known) for name in self.methods]
        check_methods(self.compared, self.seeds, max_grad_norm)
        names = [method.name for method in self.compared]
        for method in self.compared:
            if method.repair is not None and not self.repair_folds and method.source not in names:
                raise ValueError(
                    f"`{method.name}` with `repair_folds` 0 takes the margins of the runs of `{method.source}`: add "
                    f"`{method.source}` to `methods`."
                )
        for method in self.compared:
            if not method.clean_labels and all(method.changes(rate) is None for rate in self.noise_rate):
                raise ValueError(
                    f"`{method.name}` needs a noise rate between 0 and 0.5, got `noise_rate` {self.noise_rate}: leave "
                    "it out of `methods`."
                )

    def methods_for(self, noise_rate: float) -> list[Method]:
        """The methods that can be compared at a noise rate."""
        is_noisy = self.label_rater is not None
        return [method for method in self.compared if method.exists_for(noise_rate, is_noisy)]

    def _check_datasets(self) -> None:
        if self.task_seed < 0 or (self.task_seed and self.dataset_name is not None):
            raise ValueError(
                f"`task_seed` is the built-in task's and at least 0, got {self.task_seed}: leave it out with a "
                "`dataset_name`."
            )
        names, others = self.dataset_name or [None], self.eval_dataset_name
        if others is not None and len(others) != len(names):
            raise ValueError(
                f"`eval_dataset_name` has {len(others)} values and `dataset_name` {len(names)}: give one for each."
            )
        if (self.label_votes_column is None) != (self.label_rater is None):
            raise ValueError(
                f"`label_votes_column` is {self.label_votes_column!r} and `label_rater` {self.label_rater!r}: give "
                "both, or neither."
            )
        if self.label_rater is not None and self.noise_rate != [0]:
            raise ValueError(
                f"`noise_rate` is {self.noise_rate}, and the labels of a `label_rater` have noise of their own: set "
                "it to 0."
            )
        if len({Path(name or "").stem for name in names}) != len(names):
            raise ValueError(f"`dataset_name` has two datasets of one name, {names}: their runs would share a folder.")


def check_names_of_folders(args: ComparisonArguments) -> None:
    """Raises ValueError for seeds and noise rates, of which folders are named, that are none."""
    for seed in args.seeds:
        check_seed(seed)
    for rate in args.noise_rate:
        if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
            raise ValueError(f"`noise_rate` must be in [0, 1), got {rate!r}.")


def check_methods(methods: Sequence[Method], seeds: Sequence[int], max_grad_norm: float) -> None:
    """Raises ValueError for methods that lack what they need."""
    names, sources = [method.name for method in methods], [method for method in methods if method.has_controls]
    for control in (method.name for method in methods if method.group == CONTROL):
        if not sources:
            raise ValueError(f"`{control}` takes something from a PRM run: add a PRM method to `methods`.")
        if METHODS[control].tensor_masks and not any(method.tensor_masks for method in sources):
            raise ValueError(
                f"`{control}` is about the masks of tensors: add a method to `methods` that has them, as prm_debiased."
            )
        missing = [method for method in sources if control == "adamw_matched" and method.baseline not in names]
        if missing:
            raise ValueError(
                f"`{control}` of `{missing[0].name}` lies between runs of AdamW with the same eps: add "
                f"`{missing[0].baseline}` to `methods`."
            )
        if control == "fixed_q" and len(seeds) < 2:
            raise ValueError(f"`{control}` takes the masks of another seed: give two `seeds` or more, got {seeds}.")
    for method in methods:
        if method.clean_labels and method.base not in names:
            raise ValueError(
                f"`{method.name}` says what wrong labels cost `{method.base}`: add `{method.base}` to `methods`."
            )
        if not max_grad_norm and (method.value_setting == "relative_eps" or method.key in ("msvag", "sven")):
            raise ValueError(f"`{method.key}` is scaled by the clipped gradient: set `max_grad_norm` above 0.")
