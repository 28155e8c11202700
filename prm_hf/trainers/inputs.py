"""Checks of what a trainer is given: rows, tokenizer and model, before any of them is worked on.

TRL and torch meet the same faults later, as a `KeyError`, a `StopIteration` or an index out of range.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset, LargeList, List, Value
from transformers import AutoConfig, AutoProcessor, TrainingArguments
from trl import SFTConfig
from trl.trainer.utils import get_config_model_id

from .._names import did_you_mean


logger = get_logger(__name__)

TOKEN_COLUMNS = ("prompt_ids", "chosen_ids", "rejected_ids", "input_ids")
SEPARATORS = (";", "\t", "|")
_PAIRS, _COMPLETIONS = "`chosen` and `rejected`, and may have `prompt`", "`prompt` and `completion`"
_NEEDS = {
    **dict.fromkeys(("chosen", "rejected"), _PAIRS),
    **dict.fromkeys(("prompt", "completion"), _COMPLETIONS),
    "text": f"{_COMPLETIONS}, or `messages`, or the column that `dataset_text_field` names",
}


def check_inputs(init: Callable, positional: Sequence[Any], keywords: dict[str, Any]) -> int | None:
    """Raises an error for arguments that a TRL trainer cannot train with.

    Args:
        init: TRL's `__init__`, whose signature says which argument is which.
        positional, keywords: the arguments that it will get.

    Returns:
        The number of rows of the model's input embedding; None where it is not known yet.

    Raises:
        TypeError: a dataset is none.
        FileNotFoundError: the model's folder does not exist.
        ValueError: a dataset has no rows, lacks a column or holds what is not text; the model or its tokenizer is not
            there, or does not fit the rows.
    """
    given = inspect.signature(init).bind_partial(*positional, **keywords).arguments
    args, heldout = given["args"], given.get("eval_dataset")
    rows = _check_model(given["model"], args)
    sets = {"train": given.get("train_dataset")}
    sets |= heldout if isinstance(heldout, dict) else {} if heldout is None else {"eval": heldout}
    prepared = given.get("formatting_func") is not None or "skip_prepare_dataset" in (
        getattr(args, "dataset_kwargs", None) or {}
    )
    kinds = set()
    for where, dataset in sets.items():
        first = _first_row(dataset, where)
        columns = () if prepared else text_columns(args, list(first))
        kinds |= _check_columns(first, dataset.features or {}, where, columns)
        if isinstance(dataset, Dataset):
            _check_texts(dataset, where, columns)
            check_ids(dataset, where, rows)
    if kinds:
        _check_tokenizer(given, kinds)
    return rows


# ---- The model and its tokenizer ----


def _check_model(model: Any, args: TrainingArguments) -> int | None:
    if not isinstance(model, str):
        embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        grows = getattr(args, "chat_template_path", None) is not None  # TRL adds the template's tokens to the model
        return None if grows else getattr(embedding, "num_embeddings", None)
    path = Path(model).expanduser()
    looks_local = path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1
    way_out = "name a folder with a `config.json`, or a model on the hub"
    if looks_local and not path.exists():
        raise FileNotFoundError(f"`model` {model!r} does not exist: {way_out}.")
    if path.is_file():
        raise ValueError(f"`model` {model!r} is a file: {way_out}.")
    if (path / "adapter_config.json").is_file():
        return None
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"`model` {model!r} is a folder without a `config.json`: name one that a model was saved to.")
    config = _load(
        AutoConfig, model, args, f"`model` {model!r} cannot be loaded: name a folder or a model on the hub."
    )
    return getattr(config.get_text_config(), "vocab_size", None)


def _load(auto_class: Any, name: str, args: TrainingArguments, problem: str) -> Any:
    own = args.model_init_kwargs or {}
    trusted = own.get("trust_remote_code", args.trust_remote_code)
    try:
        return auto_class.from_pretrained(name, revision=own.get("revision"), trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        raise ValueError(f"{problem} ({str(error).strip().splitlines()[0]})") from error


def _check_tokenizer(given: dict[str, Any], kinds: set[str]) -> None:
    args, model, processing_class = given["args"], given["model"], given.get("processing_class")
    if processing_class is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        if not name:
            raise ValueError("`processing_class` is None, and the model was made in memory: pass its tokenizer.")
        if (Path(name) / "adapter_config.json").is_file():
            return
        processing_class = _load(AutoProcessor, name, args, f"{name!r} has no tokenizer: pass a `processing_class`.")
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    eos = getattr(args, "eos_token", None) or tokenizer.eos_token
    if eos is None and "text" in kinds:
        raise ValueError("The tokenizer has no `eos_token`, which ends each text: set `tokenizer.eos_token`.")
    if eos is None and (args.pad_token or tokenizer.pad_token) is None:
        raise ValueError("The tokenizer has neither `pad_token` nor `eos_token`: set `tokenizer.pad_token`.")
    templates = (processing_class, tokenizer, args)
    if "messages" in kinds and not any(
        getattr(x, name, None) for x in templates for name in ("chat_template", "chat_template_path")
    ):
        raise ValueError(
            "The rows are messages, and the tokenizer has no `chat_template`: take that of an instruct model, set "
            "`tokenizer.chat_template`, or make the rows text."
        )


# ---- Rows ----


def text_columns(args: TrainingArguments, names: list[str]) -> tuple[str, ...]:
    """The columns that TRL will tokenize; none of rows that are tokenized already, or that hold images."""
    if {*TOKEN_COLUMNS, "image", "images", "conversations"} & set(names):
        return ()
    if not isinstance(args, SFTConfig):
        return ("prompt", "chosen", "rejected") if "prompt" in names else ("chosen", "rejected")
    if "messages" in names:
        return ("messages",)
    return ("prompt", "completion") if {"prompt", "completion"} & set(names) else (args.dataset_text_field,)


def _first_row(dataset: Any, where: str) -> dict[str, Any]:
    """The first row as its transform makes it; an error, of TRL's type, for what is no dataset, or has no rows."""
    if dataset is None and where == "train":
        raise ValueError("`train_dataset` is required: pass a `Dataset`. Rows become one with `Dataset.from_list`.")
    if not isinstance(dataset, Dataset | IterableDataset):
        name = "`train_dataset`" if where == "train" else f"The dataset {where!r}"
        found = "None" if dataset is None else f"a {type(dataset).__name__}"
        way_out = f"pass one of {list(dataset)}" if isinstance(dataset, dict) else "rows become one with `from_list`"
        raise TypeError(f"{name} must be a `Dataset` or `IterableDataset`, got {found}: {way_out}.")
    first = next(iter(dataset), None)
    if first is None:
        raise ValueError(f"The dataset {where!r} has no rows: pass one with at least one row.")
    return first


def _check_columns(first: dict[str, Any], features: dict[str, Any], where: str, columns: Sequence[str]) -> set[str]:
    """`{"text"}` or `{"messages"}`, which the columns hold, by the first row and by their types."""
    names = list(first)
    missing = next((name for name in columns if name not in names), None)
    if missing is not None:
        separator = next((mark for mark in SEPARATORS if len(names) == 1 and mark in names[0]), None)
        way_out = "Rename yours with `dataset.rename_column`"
        if separator is not None:
            way_out = f"It seems to be a CSV file separated by {separator!r}: load it with `sep={separator!r}`"
        raise ValueError(
            f"The dataset {where!r} has no column {missing!r}, and has {names}.{did_you_mean(missing, names)} "
            f"It needs {_NEEDS.get(missing, _NEEDS['text'])}. {way_out}."
        )
    kinds = {name: _check_column(first[name], features.get(name), where, name) for name in columns}
    if len(set(kinds.values())) > 1:
        described = ", ".join(f"{name!r} holds {kind}" for name, kind in kinds.items())
        raise ValueError(
            f"The dataset {where!r} mixes text and messages: {described}. Make all of them one or the other."
        )
    return set(kinds.values())


def _check_column(value: Any, feature: Any, where: str, name: str) -> str:
    keys = _message_keys(feature)
    if keys is None and isinstance(value, list) and value and isinstance(value[0], dict):
        keys = set(value[0])
    if keys is not None and not {"role", "content"} <= keys:
        raise ValueError(
            f"Column {name!r} of the dataset {where!r} has messages of {sorted(keys)}: name these keys `role` and "
            "`content`."
        )
    if isinstance(feature, Value):
        found, is_text = feature.dtype, "string" in feature.dtype or feature.dtype == "null"
    else:
        found, is_text = type(value).__name__, value is None or isinstance(value, str) or keys is not None
    if not is_text:
        raise ValueError(
            f"Column {name!r} of the dataset {where!r} holds {found} (row 0: {value!r}), and must hold text or "
            f"messages: make it so, as with `dataset.cast_column({name!r}, Value('string'))`."
        )
    return "text" if keys is None else "messages"


def _message_keys(feature: Any) -> set[str] | None:
    inner = feature.feature if isinstance(feature, List | LargeList) else None
    inner = feature[0] if isinstance(feature, list) and feature else inner
    return set(inner) if isinstance(inner, dict) else None


def _batches(dataset: Dataset, names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    start = 0
    for table in dataset.select_columns(list(names)).with_format("arrow").iter(batch_size=10_000):
        yield start, table
        start += len(table)


def _check_texts(dataset: Dataset, where: str, columns: Sequence[str]) -> None:
    """Raises ValueError for rows without text, and where no row has anything to learn; warns where some have not."""
    columns = [name for name in columns if name in dataset.features]  # others come from a transform
    is_plain = {name: isinstance(dataset.features[name], Value) for name in columns}
    found: dict[tuple[str, str], list[int]] = {}

    def note(fault: tuple[str, str], start: int, mask: Any) -> None:
        found.setdefault(fault, []).extend(start + i for i in pc.indices_nonzero(mask).to_pylist())

    for start, table in _batches(dataset, columns) if columns else ():
        for name in columns:
            column = table[name]
            note((name, "is None"), start, pc.is_null(column))
            if is_plain[name] and name != "prompt" and not pa.types.is_null(column.type):
                note((name, "is empty"), start, pc.equal(column, pa.scalar("", column.type)))
            elif _message_keys(dataset.features[name]) is not None:
                note((name, "has no messages"), start, pc.equal(pc.list_value_length(column), 0))
    for (name, fault), rows in found.items():
        if not rows:
            continue
        more = f" ({len(rows)} such rows of {len(dataset)})" if len(rows) > 1 else ""
        words = f"`{name}` {fault} in row {rows[0]} of the dataset {where!r}{more}"
        if fault in ("is None", "has no messages") or len(rows) == len(dataset):
            raise ValueError(f"{words}: fill it in, or leave such rows out with `dataset.filter`.")
        logger.warning(f"{words}.")


def check_ids(dataset: Dataset, where: str, rows: int | None) -> None:
    """Raises ValueError for a token that a model with so many `rows` of its input embedding does not have."""
    names = [name for name in TOKEN_COLUMNS if name in dataset.features]
    for start, table in _batches(dataset, names) if names and rows is not None else ():
        for name in names:
            column = table[name].combine_chunks()
            ids = pc.list_flatten(column)
            largest = pc.max(ids).as_py()
            if largest is not None and largest >= rows:
                row = start + pc.list_parent_indices(column)[pc.index(ids, largest).as_py()].as_py()
                raise ValueError(
                    f"`{name}` in row {row} of the dataset {where!r} has the token {largest}, and the model {rows}: "
                    "it was tokenized with another tokenizer or chat template than the model's. Take that, or "
                    "call `model.resize_token_embeddings(len(tokenizer))`."
                )
