"""`compression_bound`: how large the risk of a model can be, from its empirical risk and the size of its file.

A model that a short file describes cannot have learnt many labels by heart (Lotfi et al., 2022, arXiv 2211.13609; for
language models 2023, arXiv 2312.17173).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch import nn

from ..runs.write import write_json
from .bounds import bound_of_units
from .coding import MOST_LEVELS, decode, encode, prefix_bits
from .conditions import Tried, check_prior_data, misc_bits, units_of
from .quantize import fine_tune, quantize
from .risk import TASKS, Collate, RiskOf, RowLosses, Task, collator_of
from .subspace import Subspace, TrainedVector


ALPHAS = (1e-3, 1e-2, 0.05, 0.1, 0.25, 0.5)  # the smoothings of a language model
LEVELS = (3, 5, 7, 11, 17)


@dataclass(frozen=True)
class CompressionBound:
    """What [`compression_bound`] returns; risks in the units of the task.

    Attributes:
        bound: With probability 1 - `delta` over the rows, the risk on new rows is at most this.
        empirical_risk: The risk on the rows, of the weights that were decoded from the file. A share of wrong rows or
            pairs, or bits a token.
        unquantized_risk: The same of the weights before they were compressed.
        message_bits: The entropy-coded symbols and the number of levels.
        codebook_bits: The levels, 16 bits each. With `message_bits` these are all bits of the file.
        prefix_bits: What saying the length of the file costs.
        misc_bits: log2 of the number of configurations that are paid for.
        kl_nats: The sum of the four, times ln 2.
        n: Number of independent units.
        n_evaluated: Number of those that `empirical_risk` was measured on.
        guess: The risk of a guess.
        vacuous: Whether `bound` is not below `guess`.
        assumptions: What the bound rests on and nothing here could check.
        path: The file; None without `output_dir`.
        task: As it was asked for.
        kind: `bound` as it was asked for.
        delta: As it was asked for.
        dim: Number of compressed values.
        levels: How many different values the file has.
        qat_steps: Steps of fine-tuning that the file rests on; 0 where it is better without.
        alpha: The smoothing of a language model, else None.
        configurations: Number of configurations that are paid for.
    """

    bound: float
    empirical_risk: float
    unquantized_risk: float
    message_bits: int
    codebook_bits: int
    prefix_bits: float
    misc_bits: float
    kl_nats: float
    n: int
    n_evaluated: int
    guess: float
    vacuous: bool
    assumptions: tuple[str, ...]
    path: str | None
    task: Task
    kind: str
    delta: float
    dim: int
    levels: int
    qat_steps: int
    alpha: float | None
    configurations: float

    @property
    def certified_accuracy(self) -> float:
        """1 - `bound`: for preferences the share of new pairs that are ranked as labelled is at least this.

        Raises:
            ValueError: a language model has no accuracy here.
        """
        if self.task == "lm":
            raise ValueError("`certified_accuracy` is of `task='classification'` and `'preference'`, this is 'lm'.")
        return 1 - self.bound

    def __str__(self) -> str:
        unit = " bits a token" if self.task == "lm" else ""
        bits = self.message_bits + self.codebook_bits + self.prefix_bits + self.misc_bits
        verdict = f"vacuous, a guess has {self.guess:.4f}" if self.vacuous else f"a guess has {self.guess:.4f}"
        line = (
            f"risk ≤ {self.bound:.4f}{unit} with probability {1 - self.delta:g} ({verdict}); "
            f"{self.empirical_risk:.4f} on {self.n_evaluated} of {self.n} units; {bits:.0f} bits"
        )
        return "\n".join([line, *(f"assumed: {assumption}" for assumption in self.assumptions)])


def compression_bound(
    model: nn.Module,
    dataset: Dataset,
    task: Task,
    *,
    subspace: Subspace | None = None,
    base: nn.Module | None = None,
    levels: int | Sequence[int] = LEVELS,
    qat_steps: int = 0,
    qat_learning_rate: float = 0.05,
    delta: float = 0.05,
    bound: Literal["kl", "catoni", "subsampling"] = "kl",
    alphas: Sequence[float] = ALPHAS,
    prior: Literal["pretrained", "init"] = "pretrained",
    prior_data: Dataset | None = None,
    unit: str | None = None,
    n_evaluate: int | None = None,
    configurations: int = 1,
    beta: float = 0.1,
    ref_model: nn.Module | None = None,
    data_collator: Collate | None = None,
    batch_size: int = 32,
    seed: int = 0,
    output_dir: str | Path | None = None,
) -> CompressionBound:
    """Compresses what was trained of a model, and bounds the risk of the model that the file gives back.

    The trained values are quantised by optimal one-dimensional k-means, optionally fine-tuned with the levels in
    place, entropy-coded, decoded again, and evaluated from the decoded values. Of the numbers of levels, and of the
    file with and without fine-tuning, the one with the least bound is kept: the file says which it is, so the choice
    costs nothing more. The model's own weights are as before in the end.

    Args:
        model: A PEFT model with a `UniLoraConfig` adapter, whose one vector is compressed; a model that was trained in
            a [`Subspace`], whose vector is; or any other model, of which all trainable parameters are. It must be
            called with the columns of a batch and return `logits`, and `loss` for `qat_steps`.
        dataset: The rows that the model was trained on, or rows that nothing was trained on. `"lm"`: `input_ids`, and
            `labels` with -100 where a token does not count. `"classification"`: the model's inputs and `labels`.
            `"preference"`: `prompt_ids`, `chosen_ids` and `rejected_ids`, as in a DPOTrainer's `train_dataset`. Rows
            with wrong labels bound the risk on rows with wrong labels.
        task: `"lm"` (bits a token), `"classification"` (share of errors) or `"preference"` (share of pairs ranked
            wrongly by the implicit reward of DPO; a tie counts as ½).
        subspace: What the model was trained in.
        base: The model that training started from, of a checkpoint or a seed; then the differences from it are
            compressed. For a model of which all parameters were trained, without an adapter or a subspace.
        levels: How many values the compressed weights may have, 2 to 255; each number is tried.
        qat_steps: Steps of quantisation-aware fine-tuning, with Adam and batches of `batch_size` rows.
        qat_learning_rate: In units of the root mean square of the compressed values.
        delta: The probability that the bound fails.
        bound: `"kl"`, the KL-inverse bound; `"catoni"`, pactl's; `"subsampling"`, SubLoRA's.
        alphas: The smoothings of a language model; the best is taken and paid for.
        prior: Where the weights outside of the file come from: `"pretrained"`, a checkpoint; or `"init"`, a seed.
        prior_data: The rows that the checkpoint was trained on. They are compared with `dataset`.
        unit: The column that says which rows are not independent of each other, or `"row"`. Default: the prompt for
            preferences, else the row. Losses are averaged over the rows of a unit.
        n_evaluate: Evaluate the risk on so many random units only, which the bound pays for. Default: all.
        configurations: How many were tried by hand of what the reader of the file must know: `dim`, `projector` and
            `seed` of subspaces, models. Calls with the same `output_dir` count what they differ in by themselves.
        beta: DPO's β; only its sign matters for the risk.
        ref_model: DPO's reference. Default: the model without its adapter, or the log-probabilities in the rows.
        data_collator: From rows to a batch. Default: the usual one of the task.
        batch_size: Rows a forward pass, and a step of fine-tuning.
        seed: Of the units that `n_evaluate` draws, and of the batches of fine-tuning.
        output_dir: Where the file (`weights-1.bin`, …), its bound (`bound-1.json`, …) and what was tried are kept.

    Returns:
        The bound with all that it is made of.

    Raises:
        ValueError: an argument is out of its range; rows are copies of each other and `unit` is not given; a unit of
            `dataset` is in `prior_data`; the model was trained outside of `subspace`; BatchNorm keeps statistics of
            the data; there are several processes.
    """
    choices = _Choices(levels, alphas if task == "lm" else (0.0,), qat_steps, delta, bound, prior)
    choices.check(task, n_evaluate, configurations, qat_learning_rate)
    accelerator = _one_process(model)
    if subspace is not None and base is not None:
        raise ValueError("`base` and `subspace` both say what training started from: pass one of them.")
    vector = TrainedVector(model, base) if subspace is None else subspace
    vector.check()
    of_row, unit = units_of(dataset, task, unit)
    if prior_data is not None:
        check_prior_data(dataset, prior_data, unit)
    sample = _Sample.draw(of_row, n_evaluate, seed)
    collate = collator_of(task, data_collator, dataset.column_names)
    risk = RiskOf(task, collate, batch_size, choices.alphas, beta, ref_model, accelerator)

    described = {"dim": vector.dim, "projector": vector.projector_name, "seed": getattr(vector, "seed", None)}
    described |= {
        "base": base is not None,
        "prior": prior,
        "bound": bound,
        "delta": delta,
        "alphas": list(choices.alphas),
    }
    tried = Tried(output_dir, configurations).count(described, len(choices.alphas))
    judge = _Judge(choices, sample, tried)
    own = vector.read()
    rows = dataset.with_format(None).select(sample.rows)
    try:
        own_losses = sample.of_units(risk.rows(model, rows))
        best, data = None, b""
        for quantized, steps in _candidates(vector, own, choices, qat_learning_rate, model, dataset, risk, seed):
            coded = encode(quantized)
            vector.write(torch.from_numpy(decode(coded, len(own)).values).to(own.device))
            found = judge.judge(coded, steps, sample.of_units(risk.rows(model, rows)), own_losses, len(own), task)
            if best is None or found.bound < best.bound:
                best, data = found, coded
    finally:
        vector.write(own)
        model.zero_grad()
    best = replace(best, assumptions=_assumptions(prior, prior_data, unit, output_dir, configurations))
    return best if output_dir is None else _save(best, data, Path(output_dir))


def load_compressed(
    model: nn.Module, path: str | Path, subspace: Subspace | None = None, base: nn.Module | None = None
) -> None:
    """Gives a model the weights of a file that [`compression_bound`] wrote.

    Args:
        model: The model as it was before training, with its adapter or in its subspace.
        path: The file.
        subspace: What the model is trained in, of the same `dim`, `projector` and `seed`.
        base: The model that training started from, if the bound had it.

    Raises:
        ValueError: the file does not hold as many values as the model or subspace has.
    """
    vector = TrainedVector(model, base) if subspace is None else subspace
    values = decode(Path(path).read_bytes(), vector.dim).values
    vector.write(torch.from_numpy(values).to(next(iter(vector.parameters)).device))


@dataclass(frozen=True)
class _Choices:
    """What a call tries, checked."""

    levels: int | Sequence[int]
    alphas: Sequence[float]
    qat_steps: int
    delta: float
    bound: str
    prior: str

    def __post_init__(self):
        object.__setattr__(self, "levels", (self.levels,) if isinstance(self.levels, int) else tuple(self.levels))
        object.__setattr__(self, "alphas", tuple(self.alphas))

    def check(self, task: str, n_evaluate: int | None, configurations: int, qat_learning_rate: float) -> None:
        for name, value, holds, wanted in (
            ("task", task, task in TASKS, f"among {', '.join(TASKS)}"),
            ("bound", self.bound, self.bound in ("kl", "catoni", "subsampling"), "'kl', 'catoni' or 'subsampling'"),
            ("prior", self.prior, self.prior in ("pretrained", "init"), "'pretrained' or 'init'"),
            ("delta", self.delta, 0 < self.delta < 1, "in (0, 1)"),
            ("qat_steps", self.qat_steps, self.qat_steps >= 0, "at least 0"),
            ("qat_learning_rate", qat_learning_rate, qat_learning_rate > 0, "above 0"),
            ("configurations", configurations, configurations >= 1, "at least 1"),
            ("n_evaluate", n_evaluate, n_evaluate is None or n_evaluate >= 1, "at least 1, or None for all"),
            ("levels", self.levels, self.levels and all(2 <= k <= MOST_LEVELS for k in self.levels), "2 to 255 each"),
            (
                "alphas",
                self.alphas,
                self.alphas and (task != "lm" or all(0 < a < 1 for a in self.alphas)),
                "in (0, 1)",
            ),
        ):
            if not holds:
                raise ValueError(f"`{name}` must be {wanted}, got {value!r}.")


def _one_process(model: nn.Module) -> Accelerator:
    accelerator, device = Accelerator(), next(model.parameters()).device
    if accelerator.num_processes > 1:
        raise ValueError(f"`compression_bound` runs in one process, and there are {accelerator.num_processes}.")
    if device.type != accelerator.device.type:
        raise ValueError(f"`model` is on {device}: move it to {accelerator.device}, where its rows are evaluated.")
    return accelerator


@dataclass(frozen=True)
class _Sample:
    """The rows that are evaluated, and the units that they are of."""

    rows: np.ndarray
    of_row: np.ndarray
    n: int
    n_evaluated: int

    @classmethod
    def draw(cls, of_row: np.ndarray, n_evaluate: int | None, seed: int) -> "_Sample":
        n = int(of_row.max()) + 1 if len(of_row) else 0
        if n < 2:
            raise ValueError(f"`dataset` has {n} independent units: a bound needs at least 2.")
        if n_evaluate is None or n_evaluate >= n:
            return cls(np.arange(len(of_row)), of_row, n, n)
        taken = np.random.default_rng(seed).choice(n, n_evaluate, replace=False)
        rows = np.flatnonzero(np.isin(of_row, taken))
        return cls(rows, np.unique(of_row[rows], return_inverse=True)[1], n, n_evaluate)

    def of_units(self, found: RowLosses) -> RowLosses:
        """The mean loss of each unit."""
        counts = np.bincount(self.of_row)
        means = [np.bincount(self.of_row, weights=losses) / counts for losses in found.losses]
        return replace(found, losses=np.array(means))


def _candidates(vector, own, choices, learning_rate, model, dataset, risk, seed):
    """The files that are tried: of each number of levels, without and with fine-tuning."""
    rows, rng = dataset.with_format(None), np.random.default_rng(seed)

    def gradient(values: torch.Tensor, _step: int) -> torch.Tensor:
        vector.write(values)
        model.zero_grad()
        taken = rng.choice(len(rows), min(risk.batch_size, len(rows)), replace=False)
        risk.gradient_of(model, rows.__getitems__(taken.tolist()))
        return vector.gradient()

    for levels in choices.levels:
        quantized = quantize(own, levels)
        yield quantized, 0
        if choices.qat_steps:
            yield fine_tune(own, quantized, gradient, choices.qat_steps, learning_rate), choices.qat_steps


@dataclass(frozen=True)
class _Judge:
    """The bound of one file."""

    choices: _Choices
    sample: _Sample
    tried: float

    def judge(
        self, data: bytes, steps: int, found: RowLosses, own: RowLosses, dim: int, task: Task
    ) -> CompressionBound:
        levels, sample, choices = data[0], self.sample, self.choices
        bits = {"codebook_bits": 16 * levels, "message_bits": 8 * len(data) - 16 * levels}
        bits |= {"prefix_bits": prefix_bits(8 * len(data)), "misc_bits": misc_bits(self.tried)}
        kl = sum(bits.values()) * math.log(2)
        # What the evaluated units chose among, where they are not all
        tried = self.tried * len(choices.levels) * (2 if choices.qat_steps else 1)
        risks, bounds = found.losses.mean(1), []
        for risk, low, scale in zip(risks, found.smallest, found.scale, strict=True):
            args = (kl, sample.n, sample.n_evaluated, choices.delta, scale, tried)
            bounds.append(low + bound_of_units(choices.bound, float(risk), *args))
        i = int(np.argmin(bounds))
        return CompressionBound(
            bound=bounds[i],
            empirical_risk=found.smallest[i] + found.scale[i] * float(risks[i]),
            unquantized_risk=own.smallest[i] + own.scale[i] * float(own.losses[i].mean()),
            **bits,
            kl_nats=kl,
            n=sample.n,
            n_evaluated=sample.n_evaluated,
            guess=found.guess,
            vacuous=bounds[i] >= found.guess,
            assumptions=(),
            path=None,
            task=task,
            kind=choices.bound,
            delta=choices.delta,
            dim=dim,
            levels=levels,
            qat_steps=steps,
            alpha=choices.alphas[i] if task == "lm" else None,
            configurations=self.tried,
        )


def _assumptions(
    prior: str, prior_data: Any, unit: str, output_dir: str | Path | None, configurations: int
) -> tuple[str, ...]:
    found = [f"each {unit} of `dataset` was drawn independently of the others"]
    if prior == "init":
        found.append("the weights outside of the file are those of a seed that no data chose")
    elif prior_data is None:
        found.append(
            "the checkpoint that training started from has not seen `dataset`; `prior_data` would be compared"
        )
    else:
        found.append("`prior_data` are all rows that the checkpoint was trained on")
    if output_dir is None and configurations == 1:
        found.append(
            "no other `dim`, `projector`, seed of a subspace or model was tried; `configurations` pays for it"
        )
    return tuple(found)


def _save(found: CompressionBound, data: bytes, folder: Path) -> CompressionBound:
    number = 1 + len(list(folder.glob("weights-*.bin")))
    path = folder / f"weights-{number}.bin"
    path.write_bytes(data)
    found = replace(found, path=str(path))
    write_json(folder / f"bound-{number}.json", asdict(found))
    return found
