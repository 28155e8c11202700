"""The randomization tests: can a model fit pure noise, how long does it take, and what does PRM change?

`prm-hf randomization`, and recipes/randomization.py, which has the commands.
"""

import itertools
import logging
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Array3D, ClassLabel, Dataset, DatasetDict, Features, disable_progress_bars
from transformers import (
    AutoModelForImageClassification,
    AutoTokenizer,
    ResNetConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
)
from transformers.utils import logging as transformers_logging

from .. import PRM, PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer
from .._extras import require
from ..demo import build_demo, completion_rows
from ..noise import corrupt
from ..noise.corrupt import KINDS
from ..runs.methods import parse_method
from ..runs.schema import HELDOUT_FIT, TRAIN_FIT
from ..runs.write import RunSpec, check_seed, history_of
from ..sven import SvenTrainer
from ..trainers import MemorizationCallback
from . import interruptible
from .arguments import check_lists, check_ranges
from .command_line import CommandLine
from .console import silenced
from .controls import set_up_optimizer
from .data import BUILT_IN_WAIT
from .grid import Grid, Made
from .randomization_report import FITTED, report
from .runner import Runner, workers_beside
from .sven import SvenWholeBatchTrainer, trainer_class


CLASSES = 10
INPUT_KINDS = tuple(kind for kind in KINDS if kind.endswith("_inputs"))  # for a text they change its tokens
METHODS = ("adamw", "prm_per_tensor", "prm_per_param", "prm_debiased", "prm_debiased_per_param")
KNOWN_METHODS = (*METHODS, "sven")


@dataclass(frozen=True)
class Model:
    """How a model is trained, and on how many rows.

    Each method has a learning rate of its own, because at one rate for all the mask alone would make PRM slower. Three
    rates were tried with seed 1: 1e-3, 3e-3 and 1e-2 for AdamW, 3e-3, 1e-2 and 3e-2 for PRM. This is the rate at which
    the method had learnt all random labels by heart in the fewest steps.
    """

    learning_rates: dict[str, float]
    max_steps: int
    batch_size: int
    rows: int
    heldout_rows: int


def rates(*values: float) -> dict[str, float]:
    return dict(zip(KNOWN_METHODS, values, strict=True))


MODELS = {
    "vit": Model(rates(3e-3, 3e-2, 3e-2, 1e-2, 3e-3, 3e-3), 400, 32, 128, 256),
    "resnet": Model(rates(3e-3, 3e-2, 1e-2, 3e-2, 3e-3, 3e-3), 320, 32, 256, 256),
    "sft": Model(rates(3e-3, 3e-2, 3e-2, 1e-2, 1e-2, 3e-3), 400, 16, 48, 128),
    "dpo": Model(rates(3e-3, 3e-2, 3e-2, 3e-2, 1e-2, 3e-3), 240, 16, 100, 192),
}
# Of random weights: 40,000 parameters the ViT, 74,000 the ResNet.
CLASSIFIERS = {
    "vit": ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=CLASSES,
        initializer_range=0.15,  # 1/√48; the usual 0.02 is that of wide models
    ),
    "resnet": ResNetConfig(
        num_channels=1,
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        num_labels=CLASSES,
        downsample_in_first_stage=False,
    ),
}
TRAINING = {
    "eval_steps": 8,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 16,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
}


@dataclass
class Arguments:
    """Which runs to make."""

    output_dir: str = field(default="runs/randomization", metadata={"help": "Folder of the runs and the report."})
    models: list[str] = field(default_factory=lambda: list(MODELS), metadata={"help": f"Among {', '.join(MODELS)}."})
    kinds: list[str] = field(default_factory=lambda: list(KINDS), metadata={"help": f"Among {', '.join(KINDS)}."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS), metadata={"help": f"Among {', '.join(KNOWN_METHODS)}."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds of noise, weights and order of the data."}
    )
    noise_rate: float = field(default=0.3, metadata={"help": "Share of the rows that partial_labels corrupts."})
    max_steps: int | None = field(default=None, metadata={"help": "At most so many steps. Default: each model's."})
    workers: int = field(default=2, metadata={"help": "Runs at a time, each on one core."})
    overwrite_runs: bool = field(
        default=False, metadata={"help": "Remove runs of other settings in the same place. Default: they stay."}
    )

    def __post_init__(self):
        check_lists(self, models=MODELS, kinds=KINDS, methods=KNOWN_METHODS, seeds=None)
        check_ranges(
            self,
            ("noise_rate", lambda x: 0 < x <= 1, "in (0, 1]"),
            ("max_steps", lambda x: x >= 1, "at least 1"),
            ("workers", lambda x: x >= 1, "at least 1"),
        )
        for seed in self.seeds:
            check_seed(seed)
        if CLASSIFIERS.keys() & set(self.models):
            require("prm_hf.experiments.randomization", "sklearn", extra="vision")


# ---- One run ----


def digits(rows: int, heldout_rows: int) -> DatasetDict:
    """Of scikit-learn's 1797 digits of 8 x 8 pixels, in [0, 1], some to train on and some others."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype("float32").reshape(-1, 1, 8, 8)
    order = np.random.default_rng(0).permutation(len(labels))
    features = Features({"pixel_values": Array3D((1, 8, 8), "float32"), "label": ClassLabel(num_classes=CLASSES)})
    chosen = {"train": order[:rows], "test": order[rows : rows + heldout_rows]}
    columns = {name: {"pixel_values": pixels[ids], "label": labels[ids]} for name, ids in chosen.items()}
    return DatasetDict({name: Dataset.from_dict(split, features=features) for name, split in columns.items()})


class StopWhenFitted(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if (logs or {}).get(f"eval_{TRAIN_FIT}", 0.0) == 1.0:
            control.should_training_stop = True


class RandomizationGrid(Grid):
    """Each model on each kind of data, with each method and seed; a folder for each model and kind."""

    def __init__(self, args: Arguments) -> None:
        self.args, self.output_dir = args, Path(args.output_dir)

    def place(self, spec: RunSpec) -> Path:
        return self.output_dir / spec.settings["model"] / spec.settings["kind"]

    def info_of(self, spec: RunSpec) -> dict[str, Any]:
        return {"task": "randomization", "noise_rate": spec.settings["p"], "model": spec.settings["model"]}

    def specify_runs(self) -> list[RunSpec]:
        """All runs, with all that they depend on in their settings."""
        args, specs = self.args, []
        for name, kind, method, seed in itertools.product(args.models, args.kinds, args.methods, args.seeds):
            model = MODELS[name]
            settings = {**asdict(model), **TRAINING, "model": name, "kind": kind, **parse_method(method).changes()}
            del settings["learning_rates"]
            settings["p"] = args.noise_rate if kind == "partial_labels" else 1.0
            settings["max_steps"] = args.max_steps or model.max_steps
            specs.append(RunSpec(method, model.learning_rates[method], seed, settings))
        return specs

    def make_trainer(self, spec: RunSpec, folder: Path) -> Trainer:
        settings, method = spec.settings, parse_method(spec.method).changes()
        config = {
            "output_dir": str(folder),
            "seed": spec.seed,
            "learning_rate": spec.learning_rate,
            **{name: settings[name] for name in (*TRAINING, "max_steps")},
            "per_device_train_batch_size": settings["batch_size"],
            "per_device_eval_batch_size": 256,
            "eval_strategy": "steps",
            "eval_on_start": True,
            "logging_steps": settings["eval_steps"],
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "bf16": False,
            "disable_tqdm": True,
        }
        noise = {"kind": settings["kind"], "noise_rate": settings["p"], "seed": spec.seed}
        if settings["model"] in CLASSIFIERS:
            data = corrupt(digits(settings["rows"], settings["heldout_rows"]), **noise).with_format("torch")
            torch.manual_seed(spec.seed)
            prm = {name.removeprefix("prm_"): value for name, value in method.items() if name.startswith("prm_")}
            kind = trainer_class(Trainer, spec.method)
            if kind is SvenTrainer and settings["model"] == "resnet":
                kind = SvenWholeBatchTrainer
            trainer = kind(
                AutoModelForImageClassification.from_config(CLASSIFIERS[settings["model"]]),
                TrainingArguments(**config, **({"optim": method["optim"]} if kind is not Trainer else {})),
                train_dataset=data["train"],
                eval_dataset=data["test"],
                optimizer_cls_and_kwargs=(PRM, {"lr": spec.learning_rate, **prm}) if prm else None,
            )
        else:
            demo = build_demo()
            data = {
                "train": demo.train.select(range(settings["rows"])),
                "test": demo.test.select(range(settings["heldout_rows"])),
            }
            kind, config_class = PRMDPOTrainer, PRMDPOConfig
            if settings["model"] == "sft":
                data = {name: completion_rows(split) for name, split in data.items()}
                kind, config_class = PRMSFTTrainer, PRMSFTConfig
            if settings["kind"] in INPUT_KINDS:
                noise["tokenizer"] = AutoTokenizer.from_pretrained(demo.model_path)
            data = corrupt(DatasetDict(data), **noise)
            args = config_class(**config, **method, max_length=64, drift_metrics=False, gradient_checkpointing=False)
            kind = trainer_class(kind, spec.method)
            trainer = kind(demo.model_path, args=args, train_dataset=data["train"], eval_dataset=data["test"])
        set_up_optimizer(trainer, parse_method(spec.method), spec.seed)
        trainer.add_callback(MemorizationCallback(trainer))
        trainer.add_callback(StopWhenFitted())
        return trainer

    def outcomes(self, spec: RunSpec, trainer: Trainer) -> tuple[dict[str, float], dict[str, list]]:
        """When training rows were fitted, how many of them are corrupted, and the fit of held-out rows by chance."""
        log = history_of(trainer.state.log_history)
        step = next((row["step"] for row in log if row.get(TRAIN_FIT, 0) >= FITTED), None)
        found = {} if step is None else {"steps_to_fit": step}
        found["corrupted_rows"] = sum(trainer.train_dataset.with_format(None)["corrupted"][:])
        found["chance"] = 0.5 if isinstance(trainer, PRMDPOTrainer) else 1 / CLASSES
        if isinstance(trainer, PRMSFTTrainer):
            # What another row's completion would score: all of them have some words in common
            rows = [[token for token in row if token != -100] for row in trainer.eval_dataset["labels"]]
            pairs = zip(rows, rows[1:] + rows[:1], strict=True)
            equal = [np.mean([x == y for x, y in zip(*both, strict=False)]) for both in pairs]
            found["chance"] = float(np.mean(equal))
        return found, {}

    def describe(self, spec: RunSpec, metrics: dict[str, float]) -> str:
        steps = f"{metrics['steps_to_fit']:.0f}" if "steps_to_fit" in metrics else f">{metrics['steps']}"
        fits = f"train {metrics[TRAIN_FIT]:.2f}  held-out {metrics[HELDOUT_FIT]:.2f}"
        return f"{spec.settings['model']}/{spec.settings['kind']}  steps {steps:>4}  {fits}"

    def report(self, made: list[Made]) -> None:
        report([run.folder for run in made if run.counts], self.output_dir)


def prepare_process() -> None:
    """What each process does before its first run: one thread multiplies matrices this small soonest."""
    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    logging.getLogger("prm_hf").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bars()


def work(args: Arguments) -> None:
    """Makes runs beside the process that reports, which says of each how it ended."""
    prepare_process()
    with silenced():
        Runner(RandomizationGrid(args), overwrite=args.overwrite_runs, reports=False).make_all()


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of [`Runner.run`]."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("Each run has a process of its own: start one with `python`, and set `--workers`.")
    parser = CommandLine("randomization", __doc__.splitlines()[0], (Arguments,))
    (args,) = parser.parse(arguments, lambda given: {})
    if {"sft", "dpo"} & set(args.models):
        print(BUILT_IN_WAIT, flush=True)
        build_demo()
    # Such small models gain nothing from a second thread; several runs at a time do.
    with workers_beside(args.workers - 1, work, args):
        prepare_process()
        return Runner(RandomizationGrid(args), overwrite=args.overwrite_runs).run()
