"""Preference pairs that are tokenized: which of them say something, and whose log-probabilities they carry."""

import json
from itertools import islice
from typing import Any

import xxhash
from accelerate import Accelerator
from accelerate.logging import get_logger
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl import DPOConfig

from .digests import reference_digest


logger = get_logger(__name__)

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
# The column that says what the reference's log-probabilities were made with
FINGERPRINT = "ref_fingerprint"
CHECKED_ROWS = 4


def has_reference(dataset: Dataset | IterableDataset) -> bool:
    """Whether the rows carry the log-probabilities of a reference."""
    return {*REFERENCE} <= set(dataset.column_names or ())


def sample(dataset: Dataset | IterableDataset) -> list[dict[str, Any]]:
    """A few rows, spread over the dataset; of a stream the first ones."""
    if isinstance(dataset, IterableDataset):
        return list(islice(dataset, CHECKED_ROWS))
    n = min(CHECKED_ROWS, len(dataset))
    return dataset.with_format(None).select([i * len(dataset) // n for i in range(n)]).to_list()


# ---- Rows that say nothing ----


def warn_of_rows_left_out(name: str, what: str, n_before: int, n_after: int, found: list[str]) -> None:
    """One warning for a dataset with the numbers in `found`; ValueError if no row is left."""
    text = f"{n_before - n_after} of the {n_before} {what} of {name!r} are left out: {' and '.join(found)}."
    if n_after == 0:
        raise ValueError(
            f"{text} None is left: raise `max_length`, shorten the prompts, or look at whether the tokenizer fits the "
            "texts."
        )
    logger.warning(text)


def informative_rows(
    dataset: Dataset | IterableDataset, args: DPOConfig, name: str, n_before: int | None
) -> Dataset | IterableDataset:
    """The tokenized pairs from which something can be learnt, with a warning that counts the others.

    Left out are pairs whose prompt alone fills `max_length`, as TRL leaves them out when it tokenizes, and pairs whose
    two sides are equal once they are truncated: their gradient is 0, and their margin a tie. `n_before` is the number
    of rows before TRL left out some; None of a stream.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.filter(lambda row: _reason(row, args.max_length, args.truncation_mode, name) is None)
    columns = dataset.with_format(None).select_columns(list(IDS))
    reasons = [_reason(row, args.max_length, args.truncation_mode) for row in columns]
    kept = [i for i, reason in enumerate(reasons) if reason is None]
    n_equal = reasons.count("equal")
    n_full = n_before - len(kept) - n_equal
    found = [f"{n_full} whose prompt alone fills `max_length={args.max_length}`"] if n_full else []
    found += [f"{n_equal} whose two sides are equal, as they are truncated"] if n_equal else []
    if found:
        warn_of_rows_left_out(name, "pairs", n_before, len(kept), found)
    return dataset.select(kept) if len(kept) < len(dataset) else dataset


def _reason(
    row: dict[str, Any], max_length: int | None, truncation_mode: str, stream: str | None = None
) -> str | None:
    """Why a pair says nothing: `"full"` or `"equal"`; None if it says something."""
    prompt, *completions = (row[name] for name in IDS)
    if max_length is not None and truncation_mode == "keep_start" and len(prompt) >= max_length:
        reason = "full"
    else:
        places = slice(max_length) if truncation_mode == "keep_start" else slice(-(max_length or 0), None)
        # As TRL's collator makes them: tokens, and which of them are of the completion
        sides = [((prompt + ids)[places], ([0] * len(prompt) + [1] * len(ids))[places]) for ids in completions]
        reason = "equal" if sides[0] == sides[1] else None
    if reason is not None and stream is not None:
        logger.warning_once(
            f"Pairs of {stream!r} whose prompt fills `max_length`, or whose sides are equal, are left out."
        )
    return reason


# ---- Whose log-probabilities the rows carry ----


def reference_fingerprint(
    model: nn.Module,
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: DPOConfig,
    accelerator: Accelerator,
) -> dict[str, Any]:
    """All that a reference's log-probabilities depend on, beside the rows. Collective where parameters are sharded."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    text = json.dumps([sorted(tokenizer.get_vocab().items()), processing_class.chat_template])
    return {
        "reference model": reference_digest(model, accelerator),
        "tokenizer": xxhash.xxh3_64_hexdigest(text.encode()),
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        "ld_alpha": args.ld_alpha,
        "precision": accelerator.mixed_precision,
    }


def check_fingerprint(dataset: Dataset | IterableDataset, expected: dict[str, Any], name: str) -> bool:
    """Raises where the rows carry log-probabilities of another reference; returns whether they say of which."""
    if FINGERPRINT not in (dataset.column_names or ()):
        return False
    is_stream = isinstance(dataset, IterableDataset)
    found = {row[FINGERPRINT] for row in sample(dataset)} if is_stream else dataset.unique(FINGERPRINT)
    for text in found:
        made_with = json.loads(text)
        differ = [key for key in expected if key in made_with and made_with[key] != expected[key]]
        if differ:
            values = [
                f"another {key}" if key in ("reference model", "tokenizer") else f"`{key}={made_with[key]!r}`"
                for key in differ
            ]
            here = [f"`{key}={expected[key]!r}`" for key in differ if f"another {key}" not in values]
            of_this_run = f" (this run has {', '.join(here)})" if here else ""
            raise _stale(name, f"were made with {', '.join(values)}{of_this_run}")
    return True


def check_values(rows: list[dict[str, Any]], fresh: list[list[float]], name: str, is_exact: bool) -> None:
    """Raises where the log-probabilities that rows carry are not those that the reference gives, up to rounding.

    `fresh` has a list for each column of `REFERENCE`. Not `is_exact` are those of mixed precision.
    """
    relative, absolute = (1e-3, 1e-2) if is_exact else (1e-2, 0.1)
    for column, values in zip(REFERENCE, fresh, strict=True):
        for row, value in zip(rows, values, strict=True):
            if not abs(row[column] - value) <= absolute + relative * abs(value):
                raise _stale(
                    name, f"are stale: a row has `{column}` {row[column]:.4g}, and the reference gives {value:.4g}"
                )


def _stale(name: str, problem: str) -> ValueError:
    columns = ", ".join(map(repr, (*REFERENCE, FINGERPRINT)))
    return ValueError(
        f"The reference's log-probabilities in the rows of {name!r} {problem}. Remove the columns with "
        f"`dataset.remove_columns([{columns}])`, as far as they are there, so that they are computed anew; or train "
        "with the reference model and the settings that made them."
    )
