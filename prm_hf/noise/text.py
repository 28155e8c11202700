"""Noise in text: the completion of another row, tokens renamed or in another order, tokens from the unigrams.

A text is a string, a list of messages (each `content` is then a text), or a list of token ids. Special tokens stay
where they are. A string is tokenised, changed and decoded, and the model's tokenizer may cut the new string in other
places: corrupt token ids (`input_ids`) where every token counts. In strings, tokens that are no whole characters stay
too, since away from their neighbours they would not survive decoding.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset

from .images import fixed_order
from .rng import row_generator, row_uniforms
from .rows import RowNoise


@dataclass(frozen=True)
class OtherRows:
    """The columns of row `others[i]` of `donors` in place of those of row i."""

    donors: Dataset
    others: np.ndarray

    def __call__(self, rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        return self.donors[self.others[indices].tolist()]


def other_rows(dataset: Dataset, columns: list[str], seed: int, stream: str, derangement: bool) -> OtherRows:
    """For each row another one, uniform among all others; with `derangement`, each row is taken exactly once."""
    n = len(dataset)
    if n < 2:
        raise ValueError(f"`dataset` has {n} row(s): there is no other one to take {', '.join(columns)} from.")
    if derangement:  # a uniformly chosen cycle through all rows: a permutation without a fixed point
        cycle = fixed_order(n, seed, stream)
        others = np.empty(n, dtype=np.int64)
        others[cycle] = np.roll(cycle, 1)
    else:
        steps = (row_uniforms(seed, np.arange(n), stream) * (n - 1)).astype(np.int64) + 1
        others = (np.arange(n) + steps) % n
    return OtherRows(dataset.with_format(None).select_columns(columns), others)


@dataclass(frozen=True)
class TokenNoise(RowNoise):
    """Noise in token ids but those in `kept`; a subclass gives the function that changes the ids of some row."""

    tokenizer: Any
    kept: np.ndarray

    def change_row(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        new = self.changer(index)

        def change(ids: np.ndarray) -> np.ndarray:
            free = ~np.isin(ids, self.kept)
            result = ids.copy()
            result[free] = new(ids[free])
            return result

        return {name: change_tokens(value, change, self.tokenizer) for name, value in row.items()}


@dataclass(frozen=True)
class RenameTokens(TokenNoise):
    """One bijection of the vocabulary for all rows."""

    mapping: np.ndarray

    def changer(self, index: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda ids: self.mapping[ids]


@dataclass(frozen=True)
class ReorderTokens(TokenNoise):
    """One order of positions for all rows, or with `per_row` one for each row, the same in all columns of it."""

    seed: int
    stream: str
    per_row: bool
    window: int | None

    def changer(self, index: int) -> Callable[[np.ndarray], np.ndarray]:
        def reorder(ids: np.ndarray) -> np.ndarray:
            places = np.arange(len(ids))
            if self.per_row:
                keys = row_generator(self.seed, index, self.stream).random(len(ids))
            else:
                keys = row_uniforms(self.seed, places, self.stream)
            return ids[np.lexsort((keys, places // (self.window or max(len(ids), 1))))]

        return reorder


@dataclass(frozen=True)
class DrawTokens(TokenNoise):
    """Independent tokens from the unigram distribution, as many as there were."""

    seed: int
    stream: str
    tokens: np.ndarray
    cumulative: np.ndarray

    def changer(self, index: int) -> Callable[[np.ndarray], np.ndarray]:
        rng = row_generator(self.seed, index, self.stream)
        return lambda ids: self.tokens[np.searchsorted(self.cumulative, rng.random(len(ids)), side="right")]


def kept_ids(tokenizer: Any, is_text: bool) -> np.ndarray:
    """Sorted ids of the tokens that stay: special ones, and in strings those that are no whole characters."""
    kept = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | set(tokenizer.all_special_ids)
    if is_text:
        vocabulary = range(len(tokenizer))
        kept |= {i for i in vocabulary if (text := _decode(tokenizer, [i])) == "" or "\ufffd" in text}
    return np.array(sorted(kept), dtype=np.int64)


def vocabulary_bijection(tokenizer: Any, kept: np.ndarray, seed: int, stream: str) -> np.ndarray:
    """New id of each token of the vocabulary: a bijection that leaves the ids in `kept` as they are."""
    mapping = np.arange(len(tokenizer))
    free = np.setdiff1d(mapping, kept)
    mapping[free] = free[fixed_order(len(free), seed, stream)]
    return mapping


def unigrams(values: Iterable[Any], tokenizer: Any, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the texts, those in `kept` left out, and their cumulative shares."""
    counts = Counter()

    def count(ids: np.ndarray) -> np.ndarray:
        counts.update(ids.tolist())
        return ids

    for value in values:
        change_tokens(value, count, tokenizer)
    for token in kept.tolist():
        counts.pop(token, None)
    if not counts:
        raise ValueError("The texts hold no token but special ones: there is no unigram distribution to draw from.")
    tokens = np.array(sorted(counts))
    cumulative = np.cumsum([counts[token] for token in tokens.tolist()]) / counts.total()
    cumulative[-1] = 1.0
    return tokens, cumulative


def change_tokens(value: Any, change: Callable[[np.ndarray], np.ndarray], tokenizer: Any) -> Any:
    """`value` with its token ids changed, an int64 array at a time."""
    if isinstance(value, str):
        ids, spaced = encode(tokenizer, value)
        changed = change(np.asarray(ids, dtype=np.int64)).tolist()
        if changed == ids:  # to decode what was encoded may change spaces, which is not noise
            return value
        text = _decode(tokenizer, changed)
        return text.removeprefix(" ") if spaced else text
    if value and isinstance(value[0], dict):
        odd = next((message for message in value if not isinstance(message.get("content"), str)), None)
        if odd is not None:
            raise ValueError(f"The content of each message must be a string, got {odd!r}. Make it text first.")
        return [{**m, "content": change_tokens(m["content"], change, tokenizer)} for m in value]
    return change(np.asarray(value, dtype=np.int64)).tolist()


def encode(tokenizer: Any, text: str) -> tuple[list[int], bool]:
    """Token ids of `text`, and whether it took a space before it, which a vocabulary of whole words may need."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if _decode(tokenizer, ids) != text:
        spaced = tokenizer.encode(f" {text}", add_special_tokens=False)
        if _decode(tokenizer, spaced) == f" {text}":
            return spaced, True
    return ids, False


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
