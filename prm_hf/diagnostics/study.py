"""What `recipes/compression.py` measures: bounds of small networks on true and random labels, and what lowers them."""

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars
from torch import nn

from ..runs.write import write_json
from .compression import CompressionBound, compression_bound, load_compressed
from .study_data import documents, handwritten_digits, make_language_model, make_network, rendered_digits
from .subspace import Subspace


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
        dim: The size of the subspace; 0 where the adapter has one vector already.
        steps: Steps of training in it.
        levels: The numbers of levels that are tried.
        is_random: Whether labels or tokens are random.
        start: `"init"`; `"rendered"`, trained on rendered digits; or `"half"`, trained on the first half of the rows.
    """

    name: str
    dim: int
    steps: int = 500
    levels: tuple[int, ...] = (5, 9)
    is_random: bool = False
    start: str = "init"


DIGITS = (
    Case("true labels", 150),
    Case("random labels", 150, is_random=True),
    Case("transfer from rendered digits", 100, start="rendered"),
    Case("data-dependent prior", 10, steps=100, levels=(2, 3), start="half"),
)
LANGUAGE = {
    "unilora": (Case("counting documents", 0), Case("random tokens", 0, is_random=True)),
    "lora": (Case("counting documents", LORA_DIM), Case("random tokens", LORA_DIM, is_random=True)),
}


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


def measure_digits(network: str, case: Case, output: Path, steps: float, qat_steps: int) -> Measured:
    """One row of a network: `steps` scales all numbers of training steps."""
    clock = time.perf_counter()
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
    return bounds_of(network, model, rows, test, "classification", case, options, output, qat_steps, clock)


def measure_language(adapter: str, case: Case, output: Path, steps: float, qat_steps: int) -> Measured:
    """One row of a language model with an adapter, on documents."""
    clock = time.perf_counter()
    rows, test = documents(DOCUMENTS, case.is_random), documents(EVALUATED_DOCUMENTS, case.is_random, seed=1)
    model = make_language_model(adapter)
    subspace = Subspace(model, case.dim) if case.dim else None
    train(model, rows, scaled(steps, case.steps), 0.05, subspace)
    options = {"subspace": subspace, "prior": "init", "n_evaluate": EVALUATED_DOCUMENTS, "unit": "row"}
    options |= {"levels": case.levels, "configurations": LOOKED_AT, "batch_size": BATCH}
    return bounds_of(adapter, model, rows, test, "lm", case, options, output, qat_steps, clock)


def bounds_of(model_name, model, rows, test, task, case, options, output, qat_steps, clock) -> Measured:
    options["output_dir"] = output / model_name / case.name.replace(" ", "_")
    plain = compression_bound(model, rows, task, **options)
    tuned = compression_bound(model, rows, task, qat_steps=qat_steps, **options)
    load_compressed(model, tuned.path, options["subspace"])
    # The risk of the file's weights on rows that nothing was trained on; the bound of that call is of no use
    options |= {"unit": "row", "levels": 2, "n_evaluate": None, "prior_data": None, "output_dir": None}
    if task == "lm":
        options["alphas"] = (tuned.alpha,)
    test_risk = compression_bound(model, test, task, **options).unquantized_risk
    return Measured(model_name, case, plain, tuned, test_risk, round(time.perf_counter() - clock, 1))


def scaled(steps: float, number: int) -> int:
    return max(1, round(steps * number))


def table_of(measured: Sequence[Measured]) -> str:
    """The rows as a table in markdown: errors in %, bits a token, and the bits of the file and what is paid beside."""
    names = ["model", "case", "n", "values", "bits", "trained", "file", "file, test rows", "bound", "with fine-tuning"]
    names += ["a guess", "vacuous"]
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in measured:
        found = row.tuned
        percent = found.task == "classification"

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


def main(argv: Sequence[str] | None = None) -> int:
    """Measures the rows, prints the table, and writes `compression.json` into `--output_dir`."""
    parser = argparse.ArgumentParser(prog="recipes/compression.py", description=__doc__)
    parser.add_argument("--output_dir", default="runs/compression", help="folder of the files and of compression.json")
    parser.add_argument(
        "--models", nargs="+", choices=("lenet", "vit", *LANGUAGE), default=["lenet", "vit", *LANGUAGE]
    )
    parser.add_argument("--qat_steps", type=int, default=150, help="steps of quantisation-aware fine-tuning")
    parser.add_argument("--steps", type=float, default=1.0, help="factor on all numbers of training steps")
    arguments = parser.parse_args(argv)
    disable_progress_bars()
    output, measured = Path(arguments.output_dir), []
    for name in arguments.models:
        measure = measure_language if name in LANGUAGE else measure_digits
        for case in LANGUAGE.get(name, DIGITS):
            row = measure(name, case, output, arguments.steps, arguments.qat_steps)
            print(f"{name}, {case.name}, {row.seconds} s: {str(row.tuned).splitlines()[0]}", flush=True)
            measured.append(row)
            write_json(output / "compression.json", [asdict(row) for row in measured])
    print(table_of(measured))
    return 0
