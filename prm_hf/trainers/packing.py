"""Forward passes without padding: the sequences of a batch are packed into as few rows as they fit in."""

import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..metrics.forward import without_cudnn


def pack(lengths: list[int], capacity: int) -> tuple[list[tuple[int, int]], list[int]]:
    """Row and first column of each sequence in rows of `capacity` tokens, and how far each row is filled.

    First fit, the longest first.
    """
    places, filled = [(0, 0)] * len(lengths), []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, n in enumerate(filled) if n + lengths[i] <= capacity), len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = row, filled[row]
        filled[row] += lengths[i]
    return places, filled


def add_packing(model: PreTrainedModel) -> None:
    """Lets calls `model(input_ids, attention_mask, labels=…, fused_lm_head=True)` run without padding.

    The model must be patched with TRL's `add_fused_lm_head`; all other calls stay as they are. Inputs have the shape
    `(sequences, length)` and are padded on the right. They run as rows in which several sequences follow one another,
    each with positions from 0. The call returns for each token what the padded call returns, up to rounding.

    With `lengths` (see [`with_lengths`]), `attn_implementation="sdpa"` and no windows a call does not wait for the
    device.

    Raises:
        ValueError: a layer of the model lets sequences of a row see each other whatever their positions are.
    """
    config = model.config.get_text_config()
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    unsafe = kinds - {"full_attention", "sliding_attention", "chunked_attention", "attention"}
    if unsafe:
        raise ValueError(
            f"`padding_free=True` needs attention alone, and {type(model).__name__} has layers of the kind "
            f"{', '.join(sorted(unsafe))}: set `padding_free=False`."
        )
    has_windows = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    forward = model.forward

    @functools.wraps(type(model).forward)
    def packed_forward(self, *args, lengths=None, **kwargs):
        mask = kwargs.get("attention_mask")
        if args or mask is None or mask.dim() != 2 or not kwargs.get("fused_lm_head") or "position_ids" in kwargs:
            return forward(*args, **kwargs)
        lengths = lengths or mask.sum(1).tolist()
        # Flash attention needs all packed sequences in one row
        one_row = "flash" in (config._attn_implementation or "")
        index = _indices(lengths, sum(lengths) if one_row else max(lengths))
        index = (index.pin_memory() if mask.is_cuda else index).to(mask.device, non_blocking=True)
        filled, (sequence, position) = index[0] >= 0, index.clamp(min=0)
        borders = None
        if config._attn_implementation == "sdpa" and not has_windows:
            # transformers would make the same mask from the positions, but would wait for the device to do so
            keys, queries = index[:, :, None, None, :], index[:, :, None, :, None]
            borders = (queries[0] == keys[0]) & (queries[1] >= keys[1])
        kwargs |= {
            "attention_mask": borders,
            "input_ids": kwargs["input_ids"][sequence, position],
            # The rest of a row is a sequence of its own, whose results are not used
            "position_ids": position,
            "labels": kwargs["labels"][sequence, position].masked_fill(~filled | (position == 0), -100),
        }
        with without_cudnn():
            outputs = forward(**kwargs)
        # Entry t - 1 of a row is about its token t
        filled, sequence, position = (x[:, 1:] for x in (filled & (position > 0), sequence, position))
        place = (sequence[filled], position[filled] - 1)

        def unpack(x: Tensor | None) -> Tensor | None:
            return x if x is None else x.new_zeros(len(lengths), mask.shape[1] - 1).index_put(place, x[filled])

        per_token = [f.name for f in dataclasses.fields(outputs) if f.name not in ("loss", "aux_loss")]
        return dataclasses.replace(outputs, **{name: unpack(getattr(outputs, name)) for name in per_token})

    model.forward = types.MethodType(packed_forward, model)


def with_lengths(collate: Callable[[list[Any]], dict[str, Any]], rows: list[Any]) -> dict[str, Any]:
    """The batch that `collate` makes of `rows`, with the sequences' `lengths`, which a call needs on the host."""
    batch = collate(rows)
    return {**batch, "lengths": batch["attention_mask"].sum(1).tolist()}


def unpack_hidden(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Hidden states of the rows that a batch was packed into, `(rows, capacity, size)`, as those of the padded batch.

    `attention_mask` is that of the batch, `(sequences, length)`. States of padding are 0.
    """
    sequence, position = _indices(attention_mask.sum(1).tolist(), hidden.shape[1]).to(hidden.device)
    filled = sequence >= 0
    unpacked = hidden.new_zeros(*attention_mask.shape, hidden.shape[2])
    return unpacked.index_put((sequence[filled], position[filled]), hidden[filled])


def _indices(lengths: list[int], capacity: int) -> Tensor:
    """The sequence, and the position in it, of each place of the packed rows: int64, `(2, rows, capacity)`.

    Where a row is not filled, the sequence is -1 and positions count from 0 again.
    """
    places, filled = pack(lengths, capacity)
    index = torch.full((2, len(filled), capacity), -1)
    for i, (row, start) in enumerate(places):
        end = start + lengths[i]
        index[0, row, start:end], index[1, row, start:end] = i, torch.arange(lengths[i])
    for row, end in enumerate(filled):
        index[1, row, end:] = torch.arange(capacity - end)
    return index
