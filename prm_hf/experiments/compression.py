"""What `recipes/compression.py` measures: bounds of small networks on true and random labels, and what lowers them."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..diagnostics.compression import CompressionBound, compression_bound, load_compressed
from ..diagnostics.subspace import Subspace
from ..runs.write import write_json
from . import interruptible
from .arguments import check_lists, check_ranges
from .command_line import CommandLine
from .compression_data import (
    documents,
    handwritten_digits,
    make_language_model,
    make_network,
    preferences,
    rendered_digits,
    train_pairs,
    train_prior,
)


BATCH = 128
# So many sizes of subspaces, numbers of steps and starts were tried before those below were fixed: all bounds pay.
LOOKED_AT = 16
SUBSPACE_RATE, NETWORK_RATE = 0.1, 3e-3  # of Adam
RENDERED_ROWS, RENDERED_STEPS, HALF_STEPS = 4000, 600, 300
DOCUMENTS, EVALUATED_DOCUMENTS = 20_000, 2_000
LORA_DIM = 256  # as many as the adapter of `UniLoraConfig` has


@dataclass(frozen=True)
class Case:
    """A row of the table.

    Attributes:
        name: What the row shows.
        dim: The size of the subspace; an adapter of `UniLoraConfig` has a vector of that size already.
        steps: Steps of training in it.
        levels: The numbers of levels that are tried.
        is_random: Whether labels or tokens are random.
        start: `"init"`; `"rendered"`, trained on rendered digits; or `"half"`, trained on half of the rows.
        rows: Of the built-in task how many pairs, each of a prompt of its own.
    """

    name: str
    dim: int
    steps: int = 500
    levels: tuple[int, ...] = (5, 9)
    is_random: bool = False
    start: str = "init"
    rows: int = 0


DIGITS = (
    Case("true labels", 150),
    Case("random labels", 150, is_random=True),
    Case("transfer from rendered digits", 100, start="rendered"),
    Case("data-dependent prior", 10, steps=100, levels=(2, 3), start="half"),
)
DOCUMENTS_OF = (Case("counting documents", LORA_DIM), Case("random tokens", LORA_DIM, is_random=True))
# The more prompts, the more values are worth their bits. Sizes were chosen on pairs of other seeds.
PAIRS = (
    Case("256 prompts", 8, steps=200, levels=(2, 3), rows=256),
    Case("1,024 prompts", 32, steps=200, levels=(2, 3), rows=1024),
    Case("2,048 prompts", 32, steps=200, levels=(2, 3), rows=2048),
    Case("4,096 prompts", 64, steps=200, levels=(2, 3), rows=4096),
    Case("16,384 prompts", 128, steps=300, levels=(3, 5), rows=16384),
    Case("4,096 prompts, random labels", 64, steps=200, levels=(2, 3), is_random=True, rows=4096),
)
# Without a size: those of `--dims`.
GIVEN_PAIRS = (
    Case("labels as given", 0, steps=150, levels=(2, 3)),
    Case("random labels", 0, steps=150, levels=(2, 3), is_random=True),
    Case("data-dependent prior", 8, steps=40, levels=(2, 3), start="half"),
)
EVALUATED_PAIRS = 4096
CASES = {"lenet": DIGITS, "vit": DIGITS, "unilora": DOCUMENTS_OF, "lora": DOCUMENTS_OF, "preferences": PAIRS}


@dataclass
class CompressionArguments:
    """Which models are measured, and for preferences on what."""

    output_dir: str = field(default="runs/compression", metadata={"help": "Folder of the files and the table."})
    models: list[str] = field(default_factory=lambda: list(CASES), metadata={"help": f"Among {', '.join(CASES)}."})
    qat_steps: int = field(default=150, metadata={"help": "Steps of quantisation-aware fine-tuning."})
    train_factor: float = field(default=1.0, metadata={"help": "Factor on all numbers of training steps."})
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model of `preferences`. Default: the reference policy of the built-in task."}
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Its training pairs, of which the first of each prompt is used: a name on the hub or a file."
        },
    )
    eval_dataset_name: str | None = field(default=None, metadata={"help": "Its pairs to test on."})
    dims: list[int] = field(
        default_factory=lambda: [24],
        metadata={"help": "With a dataset: sizes of its UniLora vector; each is paid for."},
    )
    learning_rate: float = field(default=0.3, metadata={"help": "Of its vector."})
    max_length: int = field(default=512, metadata={"help": "Longest pair in tokens."})
    batch_size: int = field(default=32, metadata={"help": "Its pairs in a step, and in a forward pass."})

    def __post_init__(self):
        check_lists(self, models=CASES, dims=None)
        check_ranges(
            self,
            ("qat_steps", lambda x: x >= 1, "at least 1"),
            ("train_factor", lambda x: x > 0, "above 0"),
            ("learning_rate", lambda x: x > 0, "above 0"),
            ("batch_size", lambda x: x >= 1, "at least 1"),
            ("max_length", lambda x: x >= 2, "at least 2"),
            ("dims", lambda x: x >= 1, "at least 1"),
        )
        given = [self.model_name_or_path, self.dataset_name, self.eval_dataset_name]
        if any(given) and not all(given):
            raise ValueError(
                "`model_name_or_path`, `dataset_name` and `eval_dataset_name` belong together: pass all or none."
            )


@dataclass(frozen=True)
class Measured:
    """The bound of a case without and with fine-tuning, and the risk on rows that nothing was trained on."""

    model: str
    case: Case
    plain: CompressionBound
    tuned: CompressionBound
    test_risk: float
    seconds: float


def train(model: nn.Module, rows: Dataset, steps: int, rate: float, subspace: Subspace | None = None) -> None:
    """Adam with a cosine on the trainable parameters, or on the vector of a subspace."""
    columns = rows.with_format("torch")[:]
    columns.setdefault("labels", columns.get("input_ids"))
    parameters = [p for p in model.parameters() if p.requires_grad] if subspace is None else [subspace.vector]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    if subspace is not None:
        subspace.attach(optimizer)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        taken = torch.randint(len(rows), (BATCH,), generator=generator)
        optimizer.zero_grad()
        model(**{name: values[taken] for name, values in columns.items()}).loss.backward()
        optimizer.step()
        schedule.step()


def measure_digits(network: str, case: Case, args: CompressionArguments) -> list[Measured]:
    """One row of a network."""
    steps, clock = args.train_factor, time.perf_counter()
    rows, test = handwritten_digits(case.is_random)
    model = make_network(network)
    options = {"prior": "init" if case.start == "init" else "pretrained", "batch_size": BATCH}
    if case.start != "init":
        seen = rows.select(range(len(rows) // 2)) if case.start == "half" else rendered_digits(RENDERED_ROWS)
        train(model, seen, scaled(steps, HALF_STEPS if case.start == "half" else RENDERED_STEPS), NETWORK_RATE)
        rows = rows.select(range(len(rows) // 2, len(rows))) if case.start == "half" else rows
        options["prior_data"] = seen
    subspace = Subspace(model, case.dim)
    train(model, rows, scaled(steps, case.steps), SUBSPACE_RATE, subspace)
    options |= {"subspace": subspace, "levels": case.levels, "configurations": LOOKED_AT}
    return [bounds_of(network, case, model, (rows, test), "classification", options, args, clock)]


def measure_language(adapter: str, case: Case, args: CompressionArguments) -> list[Measured]:
    """One row of a language model with an adapter, on documents."""
    clock = time.perf_counter()
    rows, test = documents(DOCUMENTS, case.is_random), documents(EVALUATED_DOCUMENTS, case.is_random, seed=1)
    model = make_language_model(adapter)
    subspace = Subspace(model, case.dim) if adapter == "lora" else None
    train(model, rows, scaled(args.train_factor, case.steps), 0.05, subspace)
    options = {"subspace": subspace, "prior": "init", "n_evaluate": EVALUATED_DOCUMENTS, "unit": "row"}
    options |= {"levels": case.levels, "configurations": LOOKED_AT, "batch_size": BATCH}
    return [bounds_of(adapter, case, model, (rows, test), "lm", options, args, clock)]


def measure_preferences(name: str, case: Case, args: CompressionArguments) -> list[Measured]:
    """A row for each size of a vector that was trained by DPO on pairs of different prompts.

    Of the built-in task it moves the word embeddings in a random subspace; of a dataset it is that of UniLora, or
    moves a LoRA adapter that was trained on half of the pairs.
    """
    found = []
    for dim in [case.dim] if case.dim else args.dims:
        clock = time.perf_counter()
        model, rows, test = preferences(args, case.is_random, case.rows)
        options: dict[str, Any] = {"n_evaluate": EVALUATED_PAIRS if case.rows else None}
        prior = None
        if case.start == "half":
            halves = rows.train_test_split(0.5, seed=0)
            prior, rows = train_prior((model, halves["train"], test), args), halves["test"]
            options["prior_data"] = prior.train_dataset
        steps = scaled(args.train_factor, case.steps)
        trainer, subspace = train_pairs((model, rows, test), dim, steps, args, prior)
        options |= {"data_collator": trainer.data_collator, "beta": trainer.beta, "subspace": subspace}
        options |= {"levels": case.levels, "configurations": LOOKED_AT, "batch_size": args.batch_size}
        rows = trainer.train_dataset, trainer.eval_dataset
        found.append(bounds_of(name, case, trainer.model, rows, "preference", options, args, clock))
    return found


MEASURE: dict[str, Callable[[str, Case, CompressionArguments], list[Measured]]] = {
    "lenet": measure_digits,
    "vit": measure_digits,
    "unilora": measure_language,
    "lora": measure_language,
    "preferences": measure_preferences,
}


def bounds_of(
    name: str,
    case: Case,
    model: nn.Module,
    rows: tuple[Dataset, Dataset],
    task: str,
    options: dict[str, Any],
    args: CompressionArguments,
    clock: float,
) -> Measured:
    """The bounds of a trained model on the first of the two datasets, and the risk of its file on the second."""
    options = {**options, "output_dir": Path(args.output_dir) / name / case.name.replace(" ", "_")}
    plain = compression_bound(model, rows[0], task, **options)
    tuned = compression_bound(model, rows[0], task, qat_steps=args.qat_steps, **options)
    load_compressed(model, tuned.path, options.get("subspace"))
    # The bound of this call is of no use
    options |= {"unit": "row", "levels": 2, "n_evaluate": None, "prior_data": None, "output_dir": None}
    if task == "lm":
        options["alphas"] = (tuned.alpha,)
    test_risk = compression_bound(model, rows[1], task, **options).unquantized_risk
    return Measured(name, case, plain, tuned, test_risk, round(time.perf_counter() - clock, 1))


def scaled(steps: float, number: int) -> int:
    return max(1, round(steps * number))


def table_of(measured: Sequence[Measured]) -> str:
    """The rows as a table in markdown: errors in %, bits a token, and the bits of the file and what is paid beside."""
    names = ["model", "case", "n", "values", "bits", "trained", "file", "file, test rows", "bound", "with fine-tuning"]
    names += ["a guess", "vacuous"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in measured:
        found = row.tuned
        percent = found.task != "lm"

        def cell(risk: float, percent: bool = percent) -> str:
            return f"{100 * risk:.1f} %" if percent else f"{risk:.2f}"

        bits = found.message_bits + found.codebook_bits + found.prefix_bits + found.misc_bits
        risks = (
            found.unquantized_risk,
            found.empirical_risk,
            row.test_risk,
            row.plain.bound,
            found.bound,
            found.guess,
        )
        cells = [row.model, row.case.name, f"{found.n:,}", found.dim, f"{bits:.0f}", *map(cell, risks)]
        lines.append(f"| {' | '.join(map(str, cells))} | {'yes' if found.vacuous else 'no'} |")
    return "\n".join(lines)


@interruptible
def main(arguments: list[str]) -> int:
    """Measures the rows, prints the table, and writes `compression.json` into `--output_dir`."""
    (args,) = CommandLine("compression", __doc__, [CompressionArguments]).parse(arguments, lambda given: {})
    measured: list[Measured] = []
    for name in args.models:
        for case in GIVEN_PAIRS if name == "preferences" and args.dataset_name else CASES[name]:
            for row in MEASURE[name](name, case, args):
                print(f"{name}, {case.name}, {row.seconds} s: {str(row.tuned).splitlines()[0]}", flush=True)
                measured.append(row)
                write_json(Path(args.output_dir) / "compression.json", [asdict(row) for row in measured])
    print(table_of(measured))
    return 0
