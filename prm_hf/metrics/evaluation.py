"""One pass over held-out rows: a table with one entry a completion, from which every metric is computed.

The tables are on the CPU, in dataset order, the same on every process, and without the duplicates that fill uneven
last batches; the metrics are pure functions of them. If a trainer runs both models anyway, `captured_hidden_states`,
`score_rows` and `evaluations_of` make the same tables from its passes.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.data_loader import IterableDatasetShard
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader
from transformers.trainer_utils import has_length

from .forward import Forward, as_reference, evaluation_mode, forward, unwrap


# Number of logits that exist at one time, per model: 0.5 GB in float32, and 2 GB with the intermediate results. With a
# vocabulary of 150,000 these are 883 tokens; a few hundred tokens would leave most of a GPU without work.
CHUNK_LOGITS = 2**27

Rows = Sequence[dict[str, Any]]
Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class SequenceEvaluation:
    """What the policy and its reference say about `n` completions.

    Attributes:
        logps: Summed log-probability of each completion under the policy, nats. Shape `(n,)`, float64.
        logratio: Summed log π(completion) - log π_ref(completion), nats. Shape `(n,)`, float64; None if there is no
            reference.
        tokens: Number of completion tokens. Shape `(n,)`, int64; 0 where truncation left none.
        kl: KL(π‖π_ref) over the full vocabulary, summed over the positions of the completion's tokens, nats.
            Shape `(n,)`, float64; None if the reference is known by its log-probabilities alone, or not at all.
        correct: Number of completion tokens that greedy decoding would give. Shape `(n,)`, int64.
    """

    logps: torch.Tensor
    logratio: torch.Tensor | None
    tokens: torch.Tensor
    kl: torch.Tensor | None
    correct: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.logps.numel()

    def select(self, rows: torch.Tensor) -> "SequenceEvaluation":
        """The table of some completions only; `rows` is a bool mask of shape `(n,)` or a list of indices."""
        return _by_column(lambda values: values[rows], self)


@dataclass(frozen=True)
class PairEvaluation:
    """The evaluation of `n` preference pairs: `chosen` and `rejected`, entry i of both from row i of the dataset."""

    chosen: SequenceEvaluation
    rejected: SequenceEvaluation

    def __len__(self) -> int:
        return len(self.chosen)

    def select(self, rows: torch.Tensor) -> "PairEvaluation":
        """The table of some pairs only, as of [`SequenceEvaluation`]."""
        return PairEvaluation(self.chosen.select(rows), self.rejected.select(rows))

    def completions(self) -> SequenceEvaluation:
        """All 2n completions in one table, chosen ones first."""
        return _by_column(lambda *values: torch.cat(values), self.chosen, self.rejected)


def _by_column(function: Callable[..., torch.Tensor], *tables: SequenceEvaluation) -> SequenceEvaluation:
    columns = {f.name: [getattr(table, f.name) for table in tables] for f in fields(SequenceEvaluation)}
    return SequenceEvaluation(**{k: None if values[0] is None else function(*values) for k, values in columns.items()})


@dataclass(frozen=True)
class ClassEvaluation:
    """What a classifier says about `n` rows.

    Attributes:
        correct: Whether the label has the largest logit. Shape `(n,)`, bool.
        loss: Cross-entropy, nats. Shape `(n,)`, float64.
        margin: Logit of the label minus the largest of the other classes. Shape `(n,)`, float64; None if unknown.
    """

    correct: torch.Tensor
    loss: torch.Tensor
    margin: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.loss.numel()


def evaluate_pairs(
    model: nn.Module,
    dataset: Rows,
    collate: Collate,
    accelerator: Accelerator,
    *,
    ref_model: nn.Module | None = None,
    batch_size: int = 8,
) -> PairEvaluation:
    """Evaluates preference pairs under a policy and its reference.

    Collective: every process calls it with the same dataset, and makes the same number of forward passes.

    Args:
        model: The policy, as it is called in training (wrapped by DDP, FSDP or DeepSpeed, or plain).
        dataset: `n` rows, by index.
        collate: From a list of rows to the batch of TRL's `DataCollatorForPreference`: `input_ids`, `attention_mask`
            and `completion_mask` of shape `(2 * rows, length)`, all chosen before all rejected sequences; optionally
            `ref_chosen_logps` and `ref_rejected_logps` of shape `(rows,)`.
        accelerator: The accelerator that `model` was prepared with.
        ref_model: The reference policy. None: for a PEFT model the adapter `"ref"` if there is one, else the base
            model with adapters disabled; for any other model the log-probabilities that come with the batch.
        batch_size: Pairs a process and forward pass.

    Raises:
        ValueError: if there is no reference of any kind, no row, or the model's output can't be rebuilt from its
            hidden states and output embedding; under tensor, context or sequence parallelism.
        TypeError: if `model` is wrapped by FSDP version 1.
    """
    return PairEvaluation(*_evaluate(model, dataset, collate, accelerator, ref_model, batch_size, 2))


def evaluate_sequences(
    model: nn.Module,
    dataset: Rows,
    collate: Collate,
    accelerator: Accelerator,
    *,
    ref_model: nn.Module | None = None,
    batch_size: int = 8,
) -> SequenceEvaluation:
    """Evaluates single sequences: as `evaluate_pairs`, for batches that hold one sequence a row.

    The batch has `input_ids` and `labels` of shape `(rows, length)`, labels -100 where a token is not evaluated. A
    reference is not needed; without one `logratio` and `kl` are None.
    """
    return _evaluate(model, dataset, collate, accelerator, ref_model, batch_size, 1)[0]


def evaluate_classes(
    model: nn.Module, dataset: Rows, collate: Collate, accelerator: Accelerator, *, batch_size: int = 8
) -> ClassEvaluation:
    """Evaluates a classifier (`logits` of shape `(rows, classes)`): batches have `labels` of shape `(rows,)`."""

    def score(batch: dict[str, Any], _: bool) -> torch.Tensor:
        batch = _on_device(batch, accelerator)
        labels = batch.pop("labels")
        with torch.no_grad(), accelerator.autocast():
            logits = model(**batch).logits.float()
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        own = logits.gather(1, labels[:, None]).squeeze(1)
        margin = own - logits.scatter(1, labels[:, None], -math.inf).amax(1)
        return torch.stack([logits.argmax(-1) == labels, loss, margin], dim=1).cpu().double()

    correct, loss, margin = _table([model], dataset, collate, accelerator, batch_size, score).unbind(1)
    return ClassEvaluation(correct.bool(), loss, margin)


def _evaluate(
    model, dataset, collate, accelerator, ref_model, batch_size, sequences_per_row
) -> list[SequenceEvaluation]:
    def score(batch: dict[str, Any], is_first: bool) -> torch.Tensor:
        return score_rows(model, ref_model, batch, accelerator, sequences_per_row, check=is_first)

    models = [m for m in (model, ref_model) if m is not None]
    scores = _table(models, dataset, collate, accelerator, batch_size, score)
    return evaluations_of(scores, has_kl=ref_model is not None or unwrap(model, accelerator)[1])


class Scores(NamedTuple):
    """Sums over the tokens of each sequence, of one shape, float64; 0 for what there is no reference for."""

    logps: torch.Tensor
    tokens: torch.Tensor
    correct: torch.Tensor
    logratio: torch.Tensor
    kl: torch.Tensor


def evaluations_of(stacked: torch.Tensor, has_kl: bool) -> list[SequenceEvaluation]:
    """A table for each sequence of a row, from what [`score_rows`] gave; `has_kl` says if there was a reference."""
    scores, sequences = Scores(*stacked.unbind(1)), stacked.shape[2]
    return [
        SequenceEvaluation(
            logps=scores.logps[:, i],
            logratio=scores.logratio[:, i] if has_kl or sequences == 2 else None,
            tokens=scores.tokens[:, i].long(),
            kl=scores.kl[:, i] if has_kl else None,
            correct=scores.correct[:, i].long(),
        )
        for i in range(sequences)
    ]


def rows_of(dataloader: DataLoader) -> Rows:
    """The rows that a dataloader of a trainer goes through, by index. A stream is read to its end."""
    dataset = dataloader.dataset
    if has_length(dataset):
        return dataset
    return list(dataset.dataset if isinstance(dataset, IterableDatasetShard) else dataset)


def _on_device(batch: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    return {k: v.to(accelerator.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}


def check_parallelism(model: nn.Module, accelerator: Accelerator) -> None:
    """Raises an error if several processes share a row, or if the weights can't be read."""
    parallelism = accelerator.parallelism_config
    if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            f"Drift can't be measured under tensor, context or sequence parallelism ({parallelism}). Use data "
            "parallelism alone, or set `drift_metrics=False`."
        )
    if isinstance(model, FullyShardedDataParallel):
        raise TypeError("Drift needs FSDP version 2: set `fsdp_version: 2`, or `drift_metrics=False`.")


def _table(
    models: list[nn.Module],
    dataset: Rows,
    collate: Collate,
    accelerator: Accelerator,
    batch_size: int,
    score: Callable[[dict[str, Any], bool], torch.Tensor],
) -> torch.Tensor:
    """What `score(batch, is_first)` gives, float64 with one entry a row of the batch, for all `n` rows; on the CPU."""
    n = len(dataset)
    if n == 0:
        raise ValueError("`dataset` has no rows to evaluate: pass a dataset with at least one row.")
    check_parallelism(models[0], accelerator)
    world, rank = accelerator.num_processes, accelerator.process_index
    batch_size = min(batch_size, math.ceil(n / world))
    steps = math.ceil(n / (batch_size * world))

    table = []
    with evaluation_mode(models):
        for step in range(steps):
            start = (step * world + rank) * batch_size
            # Every process makes the same number of forward passes, since ZeRO-3 and FSDP gather weights in each. Rows
            # past the end are earlier ones, and cut off below.
            indices = [i % n for i in range(start, start + batch_size)]
            # torch's protocol for reading in batches, which `datasets.Dataset` has and a list has not
            read = getattr(dataset, "__getitems__", lambda indices: [dataset[i] for i in indices])
            table.append(score(collate([dict(row) for row in read(indices)]), step == 0))

    table = torch.stack(table)  # (steps, rows, …)
    if world > 1:
        table = accelerator.gather(table.to(accelerator.device))
    # Gathered process by process; the dataset goes step by step, and within a step process by process
    return table.cpu().view(world, steps, batch_size, *table.shape[2:]).transpose(0, 1).flatten(0, 2)[:n]


def score_rows(
    model: nn.Module,
    ref_model: nn.Module | None,
    batch: dict[str, Any],
    accelerator: Accelerator,
    sequences_per_row: int,
    hidden: Sequence[torch.Tensor] = (),
    check: bool = False,
) -> torch.Tensor:
    """What [`evaluations_of`] makes tables of. Collective where parameters are sharded.

    Args:
        model, ref_model, batch, accelerator: As in [`evaluate_pairs`]; the batch as `collate` makes it.
        hidden: The [`captured_hidden_states`] of policy and reference on this batch, `(sequences, length, hidden
            size)`. What is missing is run.
        check: Whether to compare with the logits of what is run.

    Returns:
        The [`Scores`] of each sequence, stacked: `(rows, len(Scores._fields), sequences_per_row)`, float64.
    """
    batch = _on_device(batch, accelerator)
    ref_logps = [batch.pop(key, None) for key in ("ref_chosen_logps", "ref_rejected_logps")]
    labels = _take_labels(batch)
    # Sequence and position before each token that is evaluated
    places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    targets = labels[:, 1:][places]

    with torch.no_grad():
        known = iter(hidden)
        policy = forward(model, batch, places, accelerator, next(known, None))
        with as_reference(model, ref_model, accelerator) as reference:
            ref = None if reference is None else forward(reference, batch, places, accelerator, next(known, None))
        # Precomputed log-probabilities come from logits in autocast's precision, so ours must have it too. With a
        # reference both are float32, since rounding to bf16 alone is a KL of 1e-3, the size of a short run's drift.
        full_precision = torch.autocast(accelerator.device.type, enabled=False)
        precision = accelerator.autocast() if ref is None else full_precision
        with contextlib.ExitStack() as stack, precision, _tensor_cores():
            for passed in (policy,) if ref is None else (policy, ref):
                stack.enter_context(passed.gathered())
                if check:
                    passed.check()
            scored = _score_tokens(policy, ref, targets)

    totals = [_total(column, labels, places) for column in (*scored, torch.ones_like(targets))]
    logps, correct, *drift, tokens = totals
    if ref is None and ref_logps[0] is not None:
        drift = [logps - torch.cat(ref_logps).to(logps), torch.zeros_like(logps)]
    elif ref is None and sequences_per_row == 2:
        raise ValueError(
            "There is no reference: `model` is not a PEFT model and the batch has no `ref_chosen_logps`. Pass "
            "`ref_model`, or precompute the reference log-probabilities."
        )
    logratio, kl = drift or [torch.zeros_like(logps)] * 2
    scores = Scores(logps, tokens, correct, logratio, kl)
    return torch.stack(scores).view(len(scores), sequences_per_row, -1).permute(2, 0, 1)


def _take_labels(batch: dict[str, Any]) -> torch.Tensor:
    """The tokens that are evaluated, -100 elsewhere, out of a batch, which keeps what the model is called with."""
    labels, completion_mask = batch.pop("labels", None), batch.pop("completion_mask", None)
    if completion_mask is not None:
        return batch["input_ids"].masked_fill(completion_mask == 0, -100)
    if labels is None:
        raise ValueError(
            f"`collate` made a batch of {sorted(batch)}, with neither `completion_mask` nor `labels`. Use TRL's "
            "collator, or one that adds either."
        )
    return labels


def _total(per_token: torch.Tensor, labels: torch.Tensor, places: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """The sum over the tokens of each sequence, float64, always in the same order, without waiting for the device."""
    device = torch.device("cpu") if labels.device.type == "mps" else labels.device  # which has no float64
    grid = torch.zeros(labels.shape, dtype=torch.float64, device=device)
    return grid.index_put(tuple(x.to(device) for x in places), per_token.to(device).double()).sum(1)


@contextlib.contextmanager
def _tensor_cores() -> Iterator[None]:
    """Lets a CUDA device multiply float32 matrices as TF32: eight times as fast, at a KL of 1e-6."""
    backend = torch.backends.cuda.matmul
    # torch 2.9 brought the first, and raises errors where both are read
    name, value = ("fp32_precision", "tf32") if hasattr(backend, "fp32_precision") else ("allow_tf32", True)
    before = getattr(backend, name)
    setattr(backend, name, value)
    try:
        yield
    finally:
        setattr(backend, name, before)


def _score_tokens(policy: Forward, ref: Forward | None, targets: torch.Tensor) -> list[torch.Tensor]:
    """Of each target: its log-probability, whether it is the most probable token; with a reference also the difference
    to its log-probability, and the KL there. Shapes `(tokens,)`."""
    chunks = []
    # Split up front, so that a batch without a single completion token gives one empty chunk
    for positions in torch.arange(len(targets), device=targets.device).split(CHUNK_LOGITS // len(policy.weight)):
        log_p = policy.logits(policy.hidden[positions]).log_softmax(-1)
        target = targets[positions, None].to(log_p.device)
        logps = log_p.gather(-1, target).squeeze(-1)
        chunks.append([logps, log_p.argmax(-1) == target.squeeze(-1)])
        if ref is not None:
            log_r = ref.logits(ref.hidden[positions]).log_softmax(-1).to(log_p.device)
            if log_r.shape != log_p.shape:
                raise ValueError(
                    f"`ref_model` has {log_r.shape[-1]} logits a token and the policy {log_p.shape[-1]}: resize both "
                    "embeddings alike before training."
                )
            ref_logps = log_r.gather(-1, target).squeeze(-1)
            # Σ p (log p - log r), in place. A token that the policy never emits adds nothing, even if the reference
            # never emits it, although 0·∞ and ∞ - ∞ are NaN. A row with NaN logits stays NaN by its log-probability.
            log_r = torch.sub(log_p, log_r, out=log_r)
            kl = log_p.exp_().mul_(log_r).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf).sum(-1)
            either = logps + ref_logps
            chunks[-1] += [logps - ref_logps, kl.where(~either.isnan(), either)]
    return [torch.cat(column) for column in zip(*chunks, strict=True)]
