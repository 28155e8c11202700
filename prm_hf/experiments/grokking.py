"""Grokking: a small transformer learns modular arithmetic from a share of all pairs, and the others long afterwards.

`prm-hf grokking`. A run is judged by the step at which its accuracy on the pairs that it did not train on reaches 95 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForSequenceClassification, EvalPrediction, PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from ..runs.schema import Threshold
from ..runs.write import RunSpec
from ..trainers.config import with_help
from . import interruptible
from .thresholds import ThresholdArguments, ThresholdConfig, ThresholdTask
from .thresholds_grid import run_thresholds


# By name: the result of a and b modulo p. `divide` leaves out b = 0.
OPERATIONS: dict[str, Callable[[int, int, int], int]] = {
    "divide": lambda a, b, p: a * pow(b, -1, p) % p,
    "add": lambda a, b, p: (a + b) % p,
    "subtract": lambda a, b, p: (a - b) % p,
    "multiply": lambda a, b, p: a * b % p,
}
TRAIN_ACCURACY = "train_accuracy"


@with_help
@dataclass
class GrokkingArguments(ThresholdArguments):
    """
    The task and its model, besides those of [`ThresholdArguments`].

    Parameters:
        modulus (`int`):
            p, a prime number. The task has the pairs (a, b) of numbers below p.
        operation (`str`):
            What is learnt of a and b modulo p: `divide` (a times the inverse of b, which is not 0), `add`, `subtract`
            or `multiply`.
        train_share (`float`):
            The share of all pairs to train on, drawn by the seed. All others are held out.
        layers (`int`):
            Layers of the transformer.
        width (`int`):
            Size of its hidden states.
        heads (`int`):
            Heads of its attention.
    """

    modulus: int = 97
    operation: str = "divide"
    train_share: float = 0.25
    layers: int = 2
    width: int = 128
    heads: int = 4


class Equations(Dataset):
    """Rows of `input_ids`, int64 `[n, 3]`, and `labels`, int64 `[n]`, of which a batch is taken at once."""

    def __init__(self, input_ids: Tensor, labels: Tensor) -> None:
        self.input_ids, self.labels = input_ids, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Any) -> dict[str, Tensor]:
        return {"input_ids": self.input_ids[rows], "labels": self.labels[rows]}

    __getitems__ = __getitem__  # with which a DataLoader takes the rows of a batch


def equations(operation: str, modulus: int) -> Equations:
    """All pairs of an operation, in order: the tokens a, b and "=", which is p, and the label, the result."""
    smallest = 1 if operation == "divide" else 0
    rows = [(a, b, modulus) for a in range(modulus) for b in range(smallest, modulus)]
    labels = [OPERATIONS[operation](a, b, p) for a, b, p in rows]
    return Equations(torch.tensor(rows), torch.tensor(labels))


def split(rows: Equations, train_share: float, seed: int) -> tuple[Equations, Equations]:
    """The rows to train on, `round(train_share * n)` of them, and all others."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(rows)))
    n = round(train_share * len(rows))
    return Equations(**rows[order[:n]]), Equations(**rows[order[n:]])


def make_model(args: GrokkingArguments, seed: int) -> PreTrainedModel:
    """GPT-2 of this size, without dropout, which says the result at the last token."""
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=args.modulus + 2,  # the numbers, "=" and a padding token, which no row has
        n_positions=3,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        activation_function="relu",
        num_labels=args.modulus,
        problem_type="single_label_classification",
        bos_token_id=args.modulus,
        eos_token_id=args.modulus,
        pad_token_id=args.modulus + 1,
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForSequenceClassification.from_config(config)


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Of the classes that are predicted, `[n]`."""
    return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}


class GrokkingTrainer(Trainer):
    """Measures at each evaluation the accuracy on the training rows too: grokking is what comes long after them."""

    @torch.no_grad()
    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        rows = {name: tensor.to(self.args.device) for name, tensor in self.train_dataset[:].items()}
        right = self.model(input_ids=rows["input_ids"]).logits.argmax(-1) == rows["labels"]
        output.metrics[f"{metric_key_prefix}_{TRAIN_ACCURACY}"] = right.double().mean().item()
        return output


_TRAINING = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "adam_beta2": 0.98,
    "per_device_eval_batch_size": 16384,  # all rows in one batch
    "eval_steps": 50,
}


class GrokkingTask(ThresholdTask):
    """Modular arithmetic by the steps until 95 % of the held-out pairs are right."""

    command = "grokking"
    description = "Modular arithmetic: the steps until 95 % of the pairs that were not trained on are right."
    threshold = Threshold("accuracy", 0.95, larger_is_better=True, label="held-out accuracy")
    published: ClassVar = {"AdamW": 29_450, "PRM": 5_950}
    published_source = "For a·b⁻¹ mod 97 with 25 % of the pairs to train on, by the authors of PRM."
    arguments_class = GrokkingArguments
    curves: ClassVar = {TRAIN_ACCURACY: "training accuracy"}
    presets: ClassVar = {
        "cpu": {
            **_TRAINING,
            "modulus": 31,
            "train_share": 0.6,
            "layers": 1,
            "width": 32,
            "heads": 2,
            "per_device_train_batch_size": 279,  # half of the 558 rows
            "max_steps": 2000,
            "methods": ["adamw", "prm_per_param", "prm_rows"],
            "seeds": [0, 1, 2],
            "learning_rates": [1e-2],
            "weight_decays": [1.0],
        },
        "full": {
            **_TRAINING,
            "per_device_train_batch_size": 582,  # a quarter of the 2328 rows
            "max_steps": 50_000,
            "learning_rates": [3e-4, 1e-3, 3e-3],
            "weight_decays": [0.3, 1.0, 3.0],
            "models_at_once": 64,
        },
    }

    def __init__(self, args: GrokkingArguments, training_args: ThresholdConfig) -> None:
        super().__init__(args, training_args)
        full = GrokkingArguments()
        if any(getattr(args, name) != getattr(full, name) for name in ("modulus", "operation", "train_share")):
            self.published = {}  # which belong to that task

    def check(self) -> None:
        args, config = self.args, self.training_args
        if args.operation not in OPERATIONS:
            raise ValueError(f"`operation` must be one of {', '.join(OPERATIONS)}, got {args.operation!r}.")
        p = args.modulus
        if p < 3 or any(p % q == 0 for q in range(2, int(p**0.5) + 1)):
            raise ValueError(f"`modulus` must be a prime number above 2, as 31 or 97, got {p}.")
        for name in ("layers", "width", "heads"):
            if getattr(args, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(args, name)}.")
        if args.width % args.heads:
            raise ValueError(f"`width` must be a multiple of `heads`, got {args.width} and {args.heads}.")
        n = len(equations(args.operation, p))
        train = round(args.train_share * n) if 0 < args.train_share < 1 else 0
        if not 0 < train < n:
            raise ValueError(
                f"`train_share` must be between 0 and 1 and leave a pair on either side, got {args.train_share}."
            )
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
        if batch > train:
            raise ValueError(
                f"A step has {batch} rows (`per_device_train_batch_size`), and there are {train} to train on: "
                "set it lower."
            )

    def make_trainer(self, config: ThresholdConfig, spec: RunSpec) -> Trainer:
        args = self.args
        config.remove_unused_columns = False  # rows come as batches
        train, heldout = split(equations(args.operation, args.modulus), args.train_share, spec.seed)
        return GrokkingTrainer(
            model=make_model(args, spec.seed),
            args=config,
            train_dataset=train,
            eval_dataset=heldout,
            data_collator=dict,
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of [`run_thresholds`]."""
    return run_thresholds(GrokkingTask, arguments)
