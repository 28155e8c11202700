"""Batches for a curvature matrix: read once, since every product with the matrix passes over the same rows."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import DataLoader, default_collate


IGNORED = -100  # the label of a token without a loss, as in transformers


@dataclass(frozen=True)
class Batch:
    """One batch, ready for a model.

    Attributes:
        inputs: keyword arguments of the model, or its one positional argument.
        targets: `(terms, …)`, what the predictions are compared with.
        places: rows and positions of the logits that predict a token, int64 `(tokens,)` each; None for classes.
        tokens: the tokens there, int64 `(tokens,)`; of completions alone.
        reference: of preference pairs, the difference of log-probabilities under the reference, float32 `(pairs,)`.
        drawn: targets that were drawn from the model, shaped as `targets`.
    """

    inputs: Any
    targets: Any
    places: tuple[torch.Tensor, torch.Tensor] | None = None
    tokens: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    drawn: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        return replace(self, **{name: _to(value, device) for name, value in vars(self).items()})


def read_batches(data: Any, loss: str | Callable, batch_size: int, max_batches: int | None) -> list[Batch]:
    """The batches of a dataloader, or those of a dataset's rows.

    Raises:
        ValueError: there are none, or they lack what the loss needs.
    """
    if not isinstance(data, Iterable):
        raise TypeError(f"`data` is a {type(data).__name__}: pass a dataset, a list of rows or a DataLoader.")
    prepare = _PREPARE.get(loss, _plain) if isinstance(loss, str) else _plain
    with torch.random.fork_rng(devices=[]):  # a dataloader draws from it
        raw = iter(data)
        if not isinstance(data, DataLoader):
            raw = (_collate(rows, loss) for rows in _chunks(raw, batch_size))
        batches = [prepare(batch) for batch in itertools.islice(raw, max_batches)]
    if not batches:
        raise ValueError("`data` has no rows.")
    return batches


def _chunks(rows: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _to(each, device) for name, each in value.items()}
    return tuple(_to(each, device) for each in value) if isinstance(value, tuple | list) else value


def _collate(rows: list[Any], loss: str | Callable) -> Any:
    first = rows[0]
    if not isinstance(first, Mapping):
        return default_collate(rows)
    if loss == "dpo":
        return _collate_pairs(rows)
    if "input_ids" not in first:
        if loss == "causal_lm":
            raise _untokenized(first, "`input_ids`, and `labels` or `completion_mask`")
        return default_collate(rows)
    batch = {"input_ids": _padded([row["input_ids"] for row in rows], 0)}
    batch["attention_mask"] = _padded([row.get("attention_mask", [1] * len(row["input_ids"])) for row in rows], 0)
    if loss != "causal_lm":
        key = "labels" if "labels" in first else "label"
        return {**batch, "labels": torch.tensor([row[key] for row in rows])}
    if "completion_mask" in first:
        return {**batch, "completion_mask": _padded([row["completion_mask"] for row in rows], 0)}
    labels = [row.get("labels", row["input_ids"]) for row in rows]
    return {**batch, "labels": _padded(labels, IGNORED)}


def _collate_pairs(rows: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """As TRL's `DataCollatorForPreference`: the chosen sequences, and behind them the rejected ones."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    if not {*names} <= rows[0].keys():
        raise _untokenized(rows[0], ", ".join(f"`{name}`" for name in names))
    sides = [(list(row["prompt_ids"]), list(row[side])) for side in names[1:] for row in rows]
    batch = {
        "input_ids": _padded([prompt + completion for prompt, completion in sides], 0),
        "attention_mask": _padded([[1] * len(prompt + completion) for prompt, completion in sides], 0),
        "completion_mask": _padded([[0] * len(prompt) + [1] * len(completion) for prompt, completion in sides], 0),
    }
    known = [name for name in ("ref_chosen_logps", "ref_rejected_logps") if name in rows[0]]
    return batch | {name: torch.tensor([float(row[name]) for row in rows]) for name in known}


def _untokenized(row: Mapping[str, Any], needed: str) -> ValueError:
    return ValueError(
        f"The rows of `data` have {', '.join(row)}, and the loss needs {needed}: tokenize them, or pass a trainer's "
        "dataloader, as `trainer.get_train_dataloader()`."
    )


def _padded(rows: Sequence[Any], value: int) -> torch.Tensor:
    tensors = [torch.as_tensor(row) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def _split(batch: Any) -> tuple[Any, Any]:
    """What a model is called with, and the labels."""
    if isinstance(batch, Mapping):
        inputs = dict(batch)
        labels = inputs.pop("labels", None)
        mask = inputs.pop("completion_mask", None)
        if mask is not None:
            labels = inputs["input_ids"].masked_fill(mask == 0, IGNORED)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
    else:
        raise ValueError(
            f"A batch of `data` is a {type(batch).__name__}: it must be a dictionary with `labels`, or inputs and "
            "labels, a tuple of two."
        )
    if labels is None:
        raise ValueError(f"A batch of `data` has {', '.join(inputs)}, and neither `labels` nor `completion_mask`.")
    return inputs, labels


def _plain(batch: Any) -> Batch:
    return Batch(*_split(batch))


def _of_tokens(batch: Any) -> Batch:
    inputs, labels = _split(batch)
    places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    return Batch(inputs, labels[:, 1:][places], places)


def _of_pairs(batch: Any) -> Batch:
    inputs, labels = _split(batch)
    known = [inputs.pop(name, None) for name in ("ref_chosen_logps", "ref_rejected_logps")]
    if len(labels) % 2:
        raise ValueError(f"A batch of `data` has {len(labels)} sequences: pairs are chosen ones, then rejected ones.")
    places = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
    reference = None if None in known else (known[0] - known[1]).float()
    return Batch(inputs, torch.ones(len(labels) // 2), places, labels[:, 1:][places], reference)


_PREPARE = {"causal_lm": _of_tokens, "dpo": _of_pairs}
