"""The randomization tests of Zhang et al. (2017, arXiv 1611.03530) for class labels, images, text and preferences."""

import dataclasses
import numbers
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
)

from .._names import renamed_arguments
from .columns import input_columns, is_text, is_tokens, label_columns, named_columns, pixel_dtype
from .images import GaussianPixels, ShufflePixels, gaussian_moments
from .labels import redraw_class
from .preferences import flip
from .rng import check_noise_rate, check_seed, check_switches, row_uniforms
from .rows import check_new, check_plain, map_rows, map_splits, originals, pinned, same_value
from .text import DrawTokens, RenameTokens, ReorderTokens, kept_ids, other_rows, unigrams, vocabulary_bijection


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
        dataset: as for [`flip_preferences`]. Kinds that need the whole dataset (completions of other rows, Gaussian
            pixels, unigrams) are not for streams.
        kind: as in the table.
        noise_rate: probability, in [0, 1], with which a row is corrupted; 1 for `"true_labels"` and `"random_labels"`.
        seed: non-negative integer. Two datasets need two seeds, or must be splits of one dict: equal seeds and indices
            have equal noise.
        columns: the column or columns to corrupt. Default: of labels, the preference, else `completion`, else a class
            label in `label` or `labels`; of inputs, `prompt` (if there is one), `chosen` and `rejected`, else the
            first there is of `image`, `img`, `pixel_values`, `prompt`, `text`, `messages`, `input_ids`.
        tokenizer: the model's, for the inputs of text. A string is tokenised, changed and decoded, and may then be
            tokenised otherwise. A list of integers holds token ids with a tokenizer, and pixels without one.
        keep_original: keep the values before as `original_<column>`.
        exclude_true: draw from the other classes alone, so that a share `noise_rate` of the labels changes.
        transition: C x C matrix of probabilities: the new class of a row of class i is drawn from row i.
        shuffle: for `"shuffled_inputs"` of text, `"vocabulary"` renames tokens and `"positions"` reorders them.
        window: for `"random_inputs"` of text: tokens move within blocks of so many only.
        splits: the split or splits of a dict to corrupt; the others come back as they are. Default: `train` for
            labels, so that evaluation stays clean, and all splits for inputs, with statistics of `train` if there is
            one, else of the first.
        num_proc: processes for `Dataset.map`.

    Returns:
        The same type as `dataset`, with the bool column `corrupted`: whether anything in the row, input or label, is
        not what it was. Preferences with noisy labels also have `flipped`, as from `flip_preferences`.

    Raises:
        TypeError: `dataset` is none of the four types, or a stream with a table format.
        ValueError: an argument, a column or the dataset does not fit the kind.
    """
    check_seed(seed)
    check_switches(keep_original=keep_original, exclude_true=exclude_true)
    noise = _Noise(
        kind=kind,
        noise_rate=noise_rate,
        seed=int(seed),
        tokenizer=tokenizer,
        exclude_true=exclude_true,
        transition=transition,
        shuffle=shuffle,
        window=window,
    )

    def change(split: Dataset | IterableDataset, name: str) -> Dataset | IterableDataset:
        source = dataset.get("train", next(iter(dataset.values()))) if isinstance(dataset, dict) else dataset
        of_split = dataclasses.replace(noise, split=name)
        return of_split.corrupt(pinned(split), columns, pinned(source), keep_original, num_proc)

    return map_splits(dataset, splits, ["train"] if kind in LABEL_KINDS else dataset, change)


@dataclass(frozen=True, kw_only=True)
class _Noise:
    """The noise of one split; the fields are the arguments of [`corrupt`]."""

    kind: str
    noise_rate: float
    seed: int
    tokenizer: Any
    exclude_true: bool
    transition: Any
    shuffle: str
    window: int | None
    split: str = "train"

    def __post_init__(self) -> None:
        kind, window = self.kind, self.window
        for name, value, known in (("kind", kind, KINDS), ("shuffle", self.shuffle, SHUFFLES)):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}, got {value!r}.")
        check_noise_rate(self.noise_rate)
        if kind in ("true_labels", "random_labels") and self.noise_rate != 1:
            raise ValueError(
                f"`noise_rate={self.noise_rate!r}` has no meaning for {kind!r}: use 'partial_labels' for a share."
            )
        for name, is_set, only in (
            ("exclude_true", self.exclude_true, "partial_labels"),
            ("transition", self.transition is not None, "partial_labels"),
            ("shuffle", self.shuffle != "vocabulary", "shuffled_inputs"),
            ("window", window is not None, "random_inputs"),
        ):
            if is_set and kind != only:
                raise ValueError(f"`{name}` is for `kind={only!r}`, got {kind!r}. Leave it out.")
        if window is not None and not (isinstance(window, numbers.Integral) and window >= 2):  # True is 1
            raise ValueError(f"`window` must be an integer of at least 2, got {window!r}.")

    @property
    def stream(self) -> str:
        # Rows of two splits must not have the same noise because they have the same index.
        return f"corrupt {self.kind}" if self.split == "train" else f"corrupt {self.kind} {self.split}"

    def corrupt(
        self,
        dataset: Dataset | IterableDataset,
        columns: str | Sequence[str] | None,
        source: Dataset | IterableDataset,
        keep_original: bool,
        num_proc: int | None,
    ) -> Dataset | IterableDataset:
        """The dataset with noise; its inputs have the statistics of `source`."""
        check_new(dataset, "corrupted", "corrupting")
        features = dataset.features or Features()
        change = None
        if self.kind == "true_labels":
            names = [] if columns is None else named_columns(columns, features)
        elif self.kind not in LABEL_KINDS:
            names = input_columns(columns, features)
            change = self.input_noise(dataset, source, names)
        elif names := label_columns(columns, features):
            change = self.label_noise(dataset, names)
        else:
            self.check_no_classes("a preference")
            rate = 0.5 if self.kind == "random_labels" else float(self.noise_rate)
            return flip(dataset, rate, self.seed, num_proc=num_proc, keep_original=keep_original, mark="corrupted")
        copies = originals(features, names) if keep_original else {}
        kept = {copy: features[name] for copy, name in copies.items()}
        # Rows that stay keep the bytes of their images: to decode and encode a JPEG again changes it
        images = [name for name in names if isinstance(features[name], Image)]
        for name in images:
            dataset = dataset.cast_column(name, Image(decode=False))
        return map_rows(
            dataset,
            _corrupt_rows,
            Features({**features, **kept, "corrupted": Value("bool")}),
            num_proc=num_proc,
            desc="Corrupting",
            fn_kwargs={
                "names": names,
                "images": images,
                "change": change,
                "noise_rate": 0.0 if self.kind == "true_labels" else float(self.noise_rate),
                "seed": self.seed,
                "stream": self.stream,
                "copies": copies,
            },
        )

    def label_noise(self, dataset: Dataset | IterableDataset, names: list[str]) -> Any:
        values, feature = f"{self.stream} values", dataset.features[names[0]]
        if isinstance(feature, ClassLabel):
            if len(names) > 1:
                raise ValueError(f"`columns={names}` are several columns: corrupt one class label at a time.")
            return redraw_class(feature, self.seed, values, self.exclude_true, self.transition)
        self.check_no_classes("text")
        self.check_whole(dataset, "completions of other rows")
        return other_rows(dataset, names, self.seed, values, derangement=self.kind == "random_labels")

    def input_noise(self, dataset: Any, source: Any, names: list[str]) -> Any:
        tokenizer, shuffle, window = self.tokenizer, self.shuffle, self.window
        features = [dataset.features[name] for name in names]
        holds_text = all(map(is_text, features))
        holds_tokens = tokenizer is not None and all(map(is_tokens, features))
        if not (holds_text or holds_tokens or all(map(pixel_dtype, features))):
            raise ValueError(
                f"The columns {', '.join(names)} of `dataset` ({', '.join(map(str, features))}) must all hold images, "
                "or all text, or all token ids."
            )
        if self.kind == "gaussian_inputs":
            self.check_whole(source, "statistics of all rows")
        per_row = self.kind == "random_inputs"
        values = f"corrupt {self.kind} values" if self.kind == "shuffled_inputs" else f"{self.stream} values"
        if not (holds_text or holds_tokens):
            if shuffle != "vocabulary" or window is not None or tokenizer is not None:
                name = "tokenizer" if tokenizer is not None else "shuffle" if window is None else "window"
                raise ValueError(f"`{name}` is for text, and {', '.join(names)} holds images. Leave it out.")
            if self.kind != "gaussian_inputs":
                return ShufflePixels(self.seed, values, per_row)
            dtypes = dict(zip(names, map(pixel_dtype, features), strict=True))
            moments = {name: gaussian_moments(_values(source, [name]), name, dtypes[name]) for name in names}
            return GaussianPixels(self.seed, values, moments, dtypes)
        if tokenizer is None or isinstance(tokenizer, str):
            raise ValueError(
                f"`kind={self.kind!r}` of text needs a `tokenizer`: pass that of the model, got {tokenizer!r}."
            )
        kept = kept_ids(tokenizer, holds_text)
        if self.kind == "gaussian_inputs":
            return DrawTokens(tokenizer, kept, self.seed, values, *unigrams(_values(source, names), tokenizer, kept))
        if self.kind == "shuffled_inputs" and shuffle == "vocabulary":
            return RenameTokens(tokenizer, kept, vocabulary_bijection(tokenizer, kept, self.seed, values))
        return ReorderTokens(tokenizer, kept, self.seed, values, per_row, window)

    def check_no_classes(self, what: str) -> None:
        if self.exclude_true or self.transition is not None:
            raise ValueError(f"`exclude_true` and `transition` are for class labels, and this is {what}.")

    def check_whole(self, dataset: Dataset | IterableDataset, what: str) -> None:
        is_stream = isinstance(dataset, IterableDataset)
        if is_stream:
            raise ValueError(
                f"`kind={self.kind!r}` needs {what}, which an IterableDataset does not have at hand. Load the dataset "
                "without streaming."
            )


def _corrupt_rows(rows, indices, names, images, change, noise_rate, seed, stream, copies) -> dict[str, list]:
    check_plain(rows, "corrupting")
    result = {name: list(rows[name]) for name in names} | {copy: rows[name] for copy, name in copies.items()}
    result["corrupted"] = [False] * len(indices)
    chosen = np.flatnonzero(row_uniforms(seed, indices, stream) < noise_rate).tolist()
    if not chosen:
        return result
    old = {name: [rows[name][i] for i in chosen] for name in names}
    old |= {name: [Image().decode_example(value) for value in old[name]] for name in images}
    for name, values in change(old, [indices[i] for i in chosen]).items():
        for i, before, after in zip(chosen, old[name], values, strict=True):
            if not same_value(after, before):
                result["corrupted"][i] = True
                result[name][i] = Image().encode_example(after) if name in images else after
    return result


def _values(dataset: Dataset, names: list[str]) -> Iterator[Any]:
    for rows in dataset.with_format(None).select_columns(names).iter(batch_size=256):
        for name in names:
            yield from rows[name]
