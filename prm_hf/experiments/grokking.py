"""Grokking: a small transformer learns modular arithmetic from a share of all pairs, and the others long afterwards.

`prm-hf grokking`, and recipes/grokking.py, which has the commands. A run is judged by the step at which its accuracy
on the pairs that it did not train on reaches 95 %.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ..runs.schema import Threshold
from ..trainers.config import with_help
from . import interruptible
from .arguments import check_ranges
from .problems import Problem
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
    operation: Literal["divide", "add", "subtract", "multiply"] = "divide"
    train_share: float = 0.25
    layers: int = 1
    width: int = 128
    heads: int = 4


def equations(operation: str, modulus: int) -> tuple[Tensor, Tensor]:
    """All pairs of an operation, in order: the tokens a, b and "=", which is p, `(n, 3)`; the results, `(n,)`."""
    smallest = 1 if operation == "divide" else 0
    rows = [(a, b, modulus) for a in range(modulus) for b in range(smallest, modulus)]
    return torch.tensor(rows), torch.tensor([OPERATIONS[operation](*row) for row in rows])


class Calculator(nn.Module):
    """GPT-2 without dropout, with a class for each result at the last token."""

    def __init__(self, args: GrokkingArguments) -> None:
        super().__init__()
        config = AutoConfig.for_model(
            "gpt2",
            vocab_size=args.modulus + 1,  # the numbers and "="
            n_positions=3,
            n_embd=args.width,
            n_layer=args.layers,
            n_head=args.heads,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
            activation_function="relu",
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        self.transformer = AutoModel.from_config(config, attn_implementation="eager")
        self.head = nn.Linear(args.width, args.modulus, bias=False)
        nn.init.normal_(self.head.weight, std=config.initializer_range)
        # The causal mask, which GPT-2 would make on the host in each pass: a CUDA graph cannot take it from there
        causal = torch.full((1, 1, 3, 3), torch.finfo(torch.float32).min).triu(1)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """`input_ids` is `(rows, 3)`, `labels` `(rows,)`, `logits` `(rows, p)`."""
        mask = self.causal.expand(len(input_ids), -1, -1, -1)
        hidden = self.transformer(input_ids=input_ids, attention_mask=mask).last_hidden_state
        logits = self.head(hidden[:, -1])
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def measure(call: Callable[..., dict[str, Tensor]], data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The share of right results, and of the held-out rows the loss too."""
    heldout = call(input_ids=data["input_ids"], labels=data["labels"])
    train = call(input_ids=data["train_input_ids"], labels=data["train_labels"])

    def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(-1) == labels).double().mean()

    return {
        "accuracy": accuracy(heldout["logits"], data["labels"]),
        "loss": heldout["loss"],
        TRAIN_ACCURACY: accuracy(train["logits"], data["train_labels"]),
    }


_TRAINING = {
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "adam_beta2": 0.98,
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
    row_losses = staticmethod(
        lambda outputs, rows: nn.functional.cross_entropy(outputs["logits"], rows["labels"], reduction="none")
    )
    curves: ClassVar = {TRAIN_ACCURACY: "training accuracy"}
    presets: ClassVar = {
        "cpu": {
            **_TRAINING,
            "modulus": 31,
            "train_share": 0.6,
            "width": 32,
            "heads": 2,
            "per_device_train_batch_size": 279,  # half of the 558 rows
            "max_steps": 1500,
            "methods": ["adamw", "prm_per_param"],
            "seeds": [0, 1, 2],
            "learning_rates": [3e-3, 1e-2],
            "weight_decays": [1.0, 3.0],
            "models_at_once": 12,  # the runs of a method
            "use_cpu": True,
        },
        "full": {
            **_TRAINING,
            "per_device_train_batch_size": 582,  # a quarter of the 2328 rows
            "max_steps": 50_000,
            "learning_rates": [1e-3, 3e-3, 1e-2],
            "weight_decays": [1.0, 3.0, 10.0],
            "models_at_once": 45,  # the runs of a method
        },
    }

    def __init__(self, args: GrokkingArguments, training_args: ThresholdConfig) -> None:
        super().__init__(args, training_args)
        full = GrokkingArguments()
        if any(getattr(args, name) != getattr(full, name) for name in ("modulus", "operation", "train_share")):
            self.published = {}  # which belong to that task

    def check(self) -> None:
        args, config = self.args, self.training_args
        p, n = args.modulus, args.modulus * (args.modulus - (args.operation == "divide"))
        if p < 3 or any(p % q == 0 for q in range(2, int(p**0.5) + 1)):
            raise ValueError(f"`modulus` must be a prime number above 2, as 31 or 97, got {p}.")
        check_ranges(
            args,
            *((name, lambda x: x >= 1, "at least 1") for name in ("layers", "width", "heads")),
            ("train_share", lambda x: 0 < x < 1 and 0 < round(x * n) < n, f"above 0 and below 1, with {n} pairs"),
        )
        if args.width % args.heads:
            raise ValueError(f"`width` must be a multiple of `heads`, got {args.width} and {args.heads}.")
        rows, batch = round(args.train_share * n), config.per_device_train_batch_size
        most = rows - (config.prm_boundary == "empirical")  # whose α is that of the rows that are not in a batch
        if batch > most:
            raise ValueError(
                f"`per_device_train_batch_size` must be at most {most}, with {rows} pairs to train on and "
                f"`prm_boundary={config.prm_boundary!r}`, got {batch}."
            )

    def problem(self, seed: int) -> Problem:
        args = self.args
        input_ids, labels = equations(args.operation, args.modulus)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, heldout = order.tensor_split([round(args.train_share * len(labels))])
        rows = {"input_ids": input_ids[train], "labels": labels[train]}
        data = {"input_ids": input_ids[heldout], "labels": labels[heldout]}
        data |= {f"train_{name}": column for name, column in rows.items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Calculator(args)
        return Problem(model, rows, data, measure)


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of [`run_thresholds`]."""
    return run_thresholds(GrokkingTask, arguments)
