"""The randomization tests of Zhang et al. (2017, arXiv 1611.03530) for class labels, images, text and preferences."""

import numbers
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    Value,
)

from .._names import renamed_arguments
from .columns import input_columns, is_text, is_tokens, label_columns, named_columns, pixel_dtype
from .images import GaussianPixels, ShufflePixels, gaussian_moments
from .labels import redraw_class
from .preferences import flip_preferences
from .rng import check_noise_rate, check_seed, row_uniforms
from .rows import check_dataset, check_plain, map_rows, named_splits, pinned
from .text import (
    OTHER,
    DrawTokens,
    OtherRow,
    RenameTokens,
    ReorderTokens,
    kept_ids,
    unigrams,
    vocabulary_bijection,
    with_other_rows,
)


KINDS = ("true_labels", "partial_labels", "random_labels", "shuffled_inputs", "random_inputs", "gaussian_inputs")
LABEL_KINDS = KINDS[1:3]
SHUFFLES = ("vocabulary", "positions")


@renamed_arguments(p="noise_rate")
def corrupt(
    dataset: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    kind: str,
    noise_rate: float = 1.0,
    seed: int = 0,
    columns: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    *,
    keep_original: bool = False,
    exclude_true: bool = False,
    transition: Sequence[Sequence[float]] | np.ndarray | None = None,
    shuffle: str = "vocabulary",
    window: int | None = None,
    splits: str | Sequence[str] | None = None,
    num_proc: int | None = None,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Replace labels or inputs by noise of a known kind and share.

    | `kind` | class labels, images | prompts and completions, text | preferences |
    |---|---|---|---|
    | `"true_labels"` | as they are | as they are | as they are |
    | `"partial_labels"` | with probability r a uniform class | with probability r another row's completion | flipped \
with probability r |
    | `"random_labels"` | every label a uniform class | every completion another row's, each used once | flipped with \
probability 1/2 |
    | `"shuffled_inputs"` | one order of pixels for all images | one bijection of the vocabulary, or one order of \
positions | the same on both sides |
    | `"random_inputs"` | another order of pixels for each image | another order of tokens for each row | the same on \
both sides |
    | `"gaussian_inputs"` | normal pixels with the dataset's mean and variance | tokens from the dataset's unigram \
distribution | likewise |

    r is `noise_rate`. A uniform class may be the true one, so that r (1 - 1/C) of the labels change. What happens to
    a row depends on `seed`, on its index in `dataset` as given and on the dataset where the kind says so, and on
    nothing else; a row that is corrupted at one rate is corrupted at every higher rate under the same seed.

    Args:
        dataset: `Dataset`, `IterableDataset`, or a dict of either. It is not changed. A stream comes back as one
            shard, since a row's index in a stream read in several places at once is not known. Kinds that need the
            whole dataset (completions of other rows, Gaussian pixels, unigrams) are not for streams.
        kind: as in the table.
        noise_rate: probability, in [0, 1], with which a row is corrupted; 1 for `"true_labels"` and `"random_labels"`.
        seed: non-negative integer. Two datasets need two seeds, or must be splits of one dict: equal seeds and indices
            have equal noise.
        columns: the column or columns to corrupt. Default: of labels, the preference, else `completion`, else a class
            label in `label` or `labels`; of inputs, `prompt` (if there is one), `chosen` and `rejected`, else the
            first there is of `image`, `img`, `pixel_values`, `prompt`, `text`, `messages`, `input_ids`.
        tokenizer: the model's, for the inputs of text. A string is tokenised, changed and decoded; with subwords the
            new string may be tokenised otherwise, and only token ids are exact. A list of integers holds token ids if
            there is a tokenizer, and is an array of pixels otherwise.
        keep_original: keep the values before as `original_<column>`.
        exclude_true: draw from the other classes alone, so that a share `noise_rate` of the labels changes.
        transition: C x C matrix of probabilities: the new class of a row of class i is drawn from row i.
        shuffle: for `"shuffled_inputs"` of text, `"vocabulary"` renames tokens and `"positions"` reorders them.
        window: for `"random_inputs"` of text: tokens move within blocks of so many only.
        splits: the split or splits of a dict to corrupt; the others come back as they are. Default: `train` for
            labels, so that evaluation stays clean, and all splits for inputs, with statistics of `train` if there is
            one, else of the first.
        num_proc: processes for `Dataset.map`; streams do not use it.

    Returns:
        The same type as `dataset`, with the bool column `corrupted`: whether anything in the row, input or label, is
        not what it was. Preferences with noisy labels also have `flipped`, as from `flip_preferences`.

    Raises:
        TypeError: `dataset` is none of the four types, or a stream with a table format.
        ValueError: an argument is out of its range, missing, or of no use for this kind and data; a column is missing
            or of the wrong type; there is a column `corrupted` already; a stream where the whole dataset is needed.
    """
    _check_arguments(kind, noise_rate, seed, exclude_true, transition, shuffle, window)
    options = {
        "kind": kind,
        "noise_rate": 0.5 if kind == "random_labels" else float(noise_rate),
        "seed": int(seed),
        "tokenizer": tokenizer,
        "keep_original": keep_original,
        "exclude_true": exclude_true,
        "transition": transition,
        "shuffle": shuffle,
        "window": window,
        "num_proc": num_proc,
    }
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        default = ["train"] if kind in LABEL_KINDS else list(dataset)
        source = dataset["train" if "train" in dataset else next(iter(dataset))]
        changed = {
            name: _corrupt(dataset[name], columns, source=source, split=name, **options)
            for name in named_splits(dataset, splits, default)
        }
        return type(dataset)({**dataset, **changed})
    check_dataset(dataset, splits)
    return _corrupt(dataset, columns, source=dataset, split="train", **options)


def _check_arguments(kind, noise_rate, seed, exclude_true, transition, shuffle, window) -> None:
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    check_noise_rate(noise_rate)
    if kind in ("true_labels", "random_labels") and noise_rate != 1:
        share = "no row is corrupted" if kind == "true_labels" else "every label is drawn anew"
        raise ValueError(
            f"`noise_rate={noise_rate!r}` has no meaning for {kind!r}, where {share}. `'partial_labels'` takes a "
            "share."
        )
    check_seed(seed)
    if kind != "partial_labels" and (exclude_true or transition is not None):
        name = "exclude_true" if exclude_true else "transition"
        raise ValueError(f"`{name}` is for `kind='partial_labels'`, got {kind!r}. Leave it out.")
    if shuffle not in SHUFFLES:
        raise ValueError(f"`shuffle` must be one of {', '.join(map(repr, SHUFFLES))}, got {shuffle!r}.")
    if shuffle != "vocabulary" and kind != "shuffled_inputs":
        raise ValueError(f"`shuffle` is for `kind='shuffled_inputs'`, got {kind!r}. Leave it out.")
    is_count = isinstance(window, numbers.Integral) and window >= 2  # True is 1
    if window is not None and (kind != "random_inputs" or not is_count):
        raise ValueError(
            "`window` must be an integer of at least 2, and is for `kind='random_inputs'`; got "
            f"{window!r} for {kind!r}."
        )


def _corrupt(
    dataset,
    columns,
    *,
    source,
    split,
    kind,
    noise_rate,
    seed,
    tokenizer,
    keep_original,
    exclude_true,
    transition,
    shuffle,
    window,
    num_proc,
) -> Dataset | IterableDataset:
    """`corrupt` of one split, whose inputs have the statistics of `source`."""
    dataset = pinned(dataset)
    features = dataset.features or Features()
    if "corrupted" in features:
        raise ValueError(
            "`dataset` has a column 'corrupted' already: corrupting twice would hide which rows are clean. Start from "
            "the clean dataset, or rename the column if it means something else."
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("`dataset` has no rows, so there is nothing to corrupt.")
    # Rows of two splits must not have the same noise because they have the same index.
    stream = f"corrupt {kind}" if split == "train" else f"corrupt {kind} {split}"
    arguments = {"keep_original": keep_original, "num_proc": num_proc}
    if kind == "true_labels":
        names = [] if columns is None else named_columns(columns, features)
        return _apply(dataset, names, None, 0.0, seed, stream, **arguments)
    if kind not in LABEL_KINDS:
        names = input_columns(columns, features)
        change = _input_noise(dataset, pinned(source), names, kind, seed, stream, tokenizer, shuffle, window)
        return _apply(dataset, names, change, noise_rate, seed, stream, **arguments)

    replaces_all = kind == "random_labels"
    is_class_noise = exclude_true or transition is not None
    names = label_columns(columns, features)
    if not names:
        if is_class_noise:
            raise ValueError("`exclude_true` and `transition` are for class labels, and this is a preference.")
        return _flip(dataset, noise_rate, seed, **arguments)
    if isinstance(features[names[0]], ClassLabel):
        if len(names) > 1:
            raise ValueError(f"`columns={columns!r}` names several columns: corrupt one class label at a time.")
        change = redraw_class(features[names[0]], seed, f"{stream} values", exclude_true, transition)
        return _apply(dataset, names, change, 1.0 if replaces_all else noise_rate, seed, stream, **arguments)
    if is_class_noise:
        raise ValueError("`exclude_true` and `transition` are for class labels, and this is text.")
    is_stream = isinstance(dataset, IterableDataset)
    if is_stream:
        raise ValueError(
            f"`kind={kind!r}` takes {', '.join(names)} from other rows, which an IterableDataset does not have at "
            "hand. Load the dataset without streaming."
        )
    joined = with_other_rows(dataset, names, seed, f"{stream} values", derangement=replaces_all)
    rate = 1.0 if replaces_all else noise_rate
    return _apply(joined, names, OtherRow(), rate, seed, stream, others=True, **arguments)


def _apply(
    dataset: Dataset | IterableDataset,
    names: list[str],
    change: Callable[[dict[str, Any], int], dict[str, Any]] | None,
    noise_rate: float,
    seed: int,
    stream: str,
    keep_original: bool,
    num_proc: int | None,
    others: bool = False,
) -> Dataset | IterableDataset:
    features = {name: feature for name, feature in dataset.features.items() if not name.startswith(OTHER)}
    originals = {f"original_{name}": features[name] for name in names} if keep_original else {}
    taken = [name for name in originals if name in features]
    if taken:
        raise ValueError(f"`keep_original` would overwrite the column {taken[0]!r}: rename it first.")
    return map_rows(
        dataset,
        _corrupt_rows,
        Features({**features, **originals, "corrupted": Value("bool")}),
        num_proc=num_proc,
        desc="Corrupting",
        fn_kwargs={
            "names": names,
            "change": change,
            "noise_rate": noise_rate,
            "seed": seed,
            "stream": stream,
            "prefixes": ["", OTHER] if others else [""],
            "keep_original": keep_original,
        },
    )


def _corrupt_rows(rows, indices, names, change, noise_rate, seed, stream, prefixes, keep_original) -> dict[str, list]:
    check_plain(rows, "corrupting")
    chosen = row_uniforms(seed, indices, stream) < noise_rate
    result = {name: list(rows[name]) for name in names}
    corrupted = [False] * len(indices)
    for i, index in enumerate(indices):
        if not chosen[i]:
            continue
        values = change({prefix + name: rows[prefix + name][i] for name in names for prefix in prefixes}, index)
        for name in names:
            corrupted[i] |= not _equal(values[name], rows[name][i])
            result[name][i] = values[name]
    originals = {f"original_{name}": rows[name] for name in names} if keep_original else {}
    return {**result, **originals, "corrupted": corrupted}


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, (str, int)) or isinstance(a, list) and a and isinstance(a[0], dict):
        return a == b
    return np.array_equal(np.asarray(a), np.asarray(b))


def _flip(
    dataset: Dataset | IterableDataset, noise_rate: float, seed: int, keep_original: bool, num_proc: int | None
) -> Any:
    flipped = pinned(flip_preferences(dataset, noise_rate, seed, num_proc=num_proc))
    names = ("chosen", "rejected") if keep_original else ()
    originals = {f"original_{name}": flipped.features[name] for name in names}
    features = Features({**flipped.features, **originals, "corrupted": Value("bool")})
    return map_rows(
        flipped, _mark_flipped, features, num_proc, "Corrupting", fn_kwargs={"keep_original": keep_original}
    )


def _mark_flipped(rows, indices, keep_original) -> dict[str, list]:
    result = {"corrupted": rows["flipped"]}
    if keep_original:
        for name, other in (("chosen", "rejected"), ("rejected", "chosen")):
            result[f"original_{name}"] = [rows[other if flip else name][i] for i, flip in enumerate(rows["flipped"])]
    return result


def _input_noise(
    dataset: Dataset | IterableDataset,
    source: Dataset | IterableDataset,
    names: list[str],
    kind: str,
    seed: int,
    stream: str,
    tokenizer: Any,
    shuffle: str,
    window: int | None,
) -> Callable[[dict[str, Any], int], dict[str, Any]]:
    features = [dataset.features[name] for name in names]
    holds_text = all(is_text(feature) for feature in features)
    holds_tokens = tokenizer is not None and all(is_tokens(feature) for feature in features)
    holds_pixels = not holds_text and not holds_tokens and all(pixel_dtype(feature) for feature in features)
    if not (holds_text or holds_tokens or holds_pixels):
        raise ValueError(
            f"The columns {', '.join(names)} of `dataset` ({', '.join(map(str, features))}) must all hold images, or "
            "all text, or all token ids."
        )
    if kind == "gaussian_inputs" and isinstance(source, IterableDataset):
        raise ValueError(
            "`kind='gaussian_inputs'` needs statistics of the whole dataset, which an IterableDataset does not have. "
            "Load the dataset without streaming."
        )
    fixed = f"corrupt {kind}"  # the same in all splits
    if holds_pixels:
        if shuffle != "vocabulary" or window is not None or tokenizer is not None:
            name = "shuffle" if shuffle != "vocabulary" else "window" if window is not None else "tokenizer"
            raise ValueError(f"`{name}` is for text, and {', '.join(names)} holds images. Leave it out.")
        if kind == "gaussian_inputs":
            dtypes = {name: pixel_dtype(feature) for name, feature in zip(names, features, strict=True)}
            moments = {name: gaussian_moments(_values(source, [name]), name, dtypes[name]) for name in names}
            return GaussianPixels(seed, f"{stream} values", moments, dtypes)
        per_row = kind == "random_inputs"
        return ShufflePixels(seed, f"{stream if per_row else fixed} values", per_row)
    if tokenizer is None:
        raise ValueError(f"`kind={kind!r}` of text needs a `tokenizer`: pass that of the model.")
    kept = kept_ids(tokenizer, holds_text)
    if kind == "gaussian_inputs":
        distribution = unigrams(_values(source, names), tokenizer, kept)
        return DrawTokens(tokenizer, kept, seed, f"{stream} values", *distribution)
    if kind == "shuffled_inputs" and shuffle == "vocabulary":
        return RenameTokens(tokenizer, vocabulary_bijection(tokenizer, kept, seed, f"{fixed} values"))
    per_row = kind == "random_inputs"
    where = stream if per_row else fixed
    return ReorderTokens(tokenizer, kept, seed, f"{where} values", per_row, window)


def _values(dataset: Dataset, names: list[str]) -> Iterator[Any]:
    for rows in dataset.with_format(None).select_columns(names).iter(batch_size=256):
        for name in names:
            yield from rows[name]
