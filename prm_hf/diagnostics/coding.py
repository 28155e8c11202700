"""The file of a quantised vector: one byte with the number of levels, the codebook in float16, then the coded symbols.

The symbols are coded by constriction's range coder under the frequencies of the symbols before (each starts at ½, as
in Krichevsky & Trofimov, 1981), so that no table of frequencies is in the file. The reader must know how many values
there are, as it knows the model; the length of the file is what `prefix_bits` pays for.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from .._extras import require


require("prm_hf.diagnostics.compression", "constriction", "kmeans1d", extra="diagnostics")

import constriction  # noqa: E402


MOST_LEVELS = 255
_BLOCKS = 32  # after `start` symbols the next `start / 32` have the same frequencies, the first 63 have their own


@dataclass(frozen=True)
class Quantized:
    """A vector whose `n` values are among a few.

    Attributes:
        codebook: The values. Shape `(levels,)`, float16.
        symbols: The place of each value in the codebook. Shape `(n,)`, int32.
    """

    codebook: np.ndarray
    symbols: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Shape `(n,)`, float32."""
        return self.codebook[self.symbols].astype(np.float32)


def encode(quantized: Quantized) -> bytes:
    """The bytes of the file.

    Raises:
        ValueError: there are no levels or more than 255, or a value of the codebook is not finite in float16.
    """
    levels = len(quantized.codebook)
    if not 1 <= levels <= MOST_LEVELS:
        raise ValueError(f"`codebook` has {levels} values: a file has 1 to {MOST_LEVELS}.")
    codebook = quantized.codebook.astype("<f2")
    if not np.isfinite(codebook).all():
        raise ValueError(f"`codebook` reaches {np.abs(quantized.codebook).max()}, and float16 ends at 65504.")
    symbols = quantized.symbols.astype(np.int32)
    coder = constriction.stream.queue.RangeEncoder()
    counts = np.full(levels, 0.5)
    for start, end in _blocks(len(symbols) if levels > 1 else 0):
        coder.encode(symbols[start:end], _model(counts))
        counts += np.bincount(symbols[start:end], minlength=levels)
    head = bytes([levels]) + codebook.tobytes()
    return head + _shortest(coder.get_compressed().astype(">u4").tobytes(), symbols, levels)


def decode(data: bytes, n: int) -> Quantized:
    """What [`encode`] was given, of the bytes of a file and the number of values.

    Raises:
        ValueError: the bytes are not a file of `n` values.
    """
    if not data or len(data) < 1 + 2 * data[0] or data[0] == 0:
        raise ValueError(f"These {len(data)} bytes are not the file of a compressed vector.")
    levels = data[0]
    codebook = np.frombuffer(data, "<f2", count=levels, offset=1).astype(np.float16)
    return Quantized(codebook, _decode_symbols(data[1 + 2 * levels :], n, levels))


def prefix_bits(file_bits: int) -> float:
    """2·log2 of the file's bits: what saying its length costs, since Σ 1/m² over m ≥ 2 is below 1."""
    return 2 * math.log2(file_bits)


def _decode_symbols(coded: bytes, n: int, levels: int) -> np.ndarray:
    symbols = np.zeros(n, dtype=np.int32)
    if levels == 1:
        return symbols
    # What `_shortest` left out is zeros
    words = np.frombuffer(coded + bytes(-len(coded) % 4), ">u4").astype(np.uint32)
    coder, counts = constriction.stream.queue.RangeDecoder(words), np.full(levels, 0.5)
    try:
        for start, end in _blocks(n):
            symbols[start:end] = coder.decode(_model(counts), end - start)
            counts += np.bincount(symbols[start:end], minlength=levels)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"The bytes are not a file of {n} values in {levels} levels.") from error
    return symbols


def _shortest(coded: bytes, symbols: np.ndarray, levels: int) -> bytes:
    """The fewest bytes that are still read as the symbols.

    The coder ends in whole words of 4 bytes. They are a number of an interval, from the highest digit on, so a shorter
    one is the number cut off, or the next larger one of so many bytes.
    """
    for length in range(max(len(coded) - 8, 0), len(coded)):
        cut = int.from_bytes(coded[:length], "big")
        for number in (cut, cut + 1):
            try:
                shorter = number.to_bytes(length, "big")
                if np.array_equal(_decode_symbols(shorter, len(symbols), levels), symbols):
                    return shorter
            except (ValueError, OverflowError):
                continue
    return coded


def _model(counts: np.ndarray) -> constriction.stream.model.Categorical:
    return constriction.stream.model.Categorical(counts / counts.sum(), perfect=False)


def _blocks(n: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < n:
        end = min(n, start + max(1, start // _BLOCKS))
        yield start, end
        start = end
