"""Random numbers of a row: a pure function of (seed, stream, row index), whoever asks and in whatever order."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np


def row_uniforms(seed: int, indices: Sequence[int] | np.ndarray, stream: str) -> np.ndarray:
    """One uniform number for each row.

    NumPy's Philox is counter-based: block `i` of its output depends on the key and on `i` alone. The key is made of
    `seed` and `stream`, the counter is the row index.

    Args:
        seed: non-negative integer.
        indices: row indices, shape `(n,)`, non-negative. Time and memory grow with `max - min`.
        stream: name of the use; different names give independent numbers under one seed.

    Returns:
        float64 array of shape `(n,)` in [0, 1).

    Raises:
        ValueError: `seed` is not a non-negative integer.
    """
    indices = np.asarray(indices, dtype=np.int64)
    if indices.size == 0:
        return np.zeros(0)
    first, last = int(indices.min()), int(indices.max())
    # A block has four words, of which a row takes the first. 53 bits are all that a float64 in [0, 1) holds.
    words = _philox(seed, stream).advance(first).random_raw(4 * (last - first + 1))[::4]
    return (words[indices - first] >> np.uint64(11)) * 2.0**-53


def check_switches(**switches: Any) -> None:
    """Raise `ValueError` unless each argument is True or False."""
    for name, value in switches.items():
        if not any(value is known for known in (True, False, np.True_, np.False_)):
            raise ValueError(f"`{name}` must be True or False, got {value!r}.")


def check_seed(seed: int) -> None:
    """Raise `ValueError` unless `seed` is a non-negative integer (of Python or NumPy)."""
    if not isinstance(seed, numbers.Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative integer, got {seed!r}.")


def check_noise_rate(noise_rate: Any) -> None:
    """Raise `ValueError` unless `noise_rate` is a number (of Python or NumPy) in [0, 1]."""
    if not isinstance(noise_rate, numbers.Real) or isinstance(noise_rate, bool) or not 0 <= noise_rate <= 1:
        raise ValueError(f"`noise_rate` must be a number in [0, 1], got {noise_rate!r}.")


def row_generator(seed: int, index: int, stream: str) -> np.random.Generator:
    """A generator of a row's own, for a row that needs many numbers; each row has 2^128 blocks to itself."""
    return np.random.Generator(_philox(seed, stream).advance(int(index) << 128))


def _philox(seed: int, stream: str) -> np.random.Philox:
    check_seed(seed)
    return np.random.Philox(np.random.SeedSequence(int(seed), spawn_key=tuple(stream.encode())))
