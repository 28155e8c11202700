"""Noise in images and other arrays of numbers: pixels in another order, or Gaussian ones.

A pixel is one position with all its channels. An array of three dimensions has its channels first or last, where it
is at most four long; in arrays of one or two dimensions each number is a pixel.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .rng import row_generator, row_uniforms
from .rows import RowNoise


_MODES = ("L", "RGB", "RGBA")


@dataclass(frozen=True)
class ShufflePixels(RowNoise):
    """The same order of pixels for all images of one size, or with `per_row` another one for each."""

    seed: int
    stream: str
    per_row: bool

    def change_row(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        result = {}
        for column, value in row.items():
            pixels, restore = _to_pixels(value, column)
            if self.per_row:
                order = row_generator(self.seed, index, self.stream).permutation(len(pixels))
            else:
                order = fixed_order(len(pixels), self.seed, self.stream)
            moved = pixels[order]
            result[column] = value if np.array_equal(moved, pixels) else restore(moved)
        return result


@dataclass(frozen=True)
class GaussianPixels(RowNoise):
    """Independent normal numbers. By column: mean and standard deviation of each channel, and the type of a number."""

    seed: int
    stream: str
    moments: dict[str, tuple[list[float], list[float]]]
    dtypes: dict[str, str]

    def change_row(self, row: dict[str, Any], index: int) -> dict[str, Any]:
        rng = row_generator(self.seed, index, self.stream)
        result = {}
        for column, value in row.items():
            pixels, restore = _to_pixels(value, column)
            mean, std = self.moments[column]
            draws = rng.normal(mean, std, size=pixels.shape)
            dtype = np.dtype(self.dtypes[column])
            if dtype == np.uint8:
                draws = np.clip(np.rint(draws), 0, 255)
            elif np.issubdtype(dtype, np.integer):
                draws = np.rint(draws)
            result[column] = restore(draws.astype(dtype))
        return result


def fixed_order(n: int, seed: int, stream: str) -> np.ndarray:
    """A permutation of n positions, int64 of shape `(n,)`: a function of its arguments alone."""
    return np.argsort(row_uniforms(seed, np.arange(n), stream), kind="stable")


def gaussian_moments(images: Iterable[Any], column: str, dtype: str) -> tuple[list[float], list[float]]:
    """Mean and standard deviation to draw each channel with, so that the drawn pixels have those of `images`.

    The numbers make up for the rounding and clipping of bytes.
    """
    count, total, squares = 0, 0.0, 0.0
    for value in images:
        pixels = _to_pixels(value, column)[0]
        if count and np.size(total) != pixels.shape[1]:
            raise ValueError(
                f"The images in {column!r} have {np.size(total)} and {pixels.shape[1]} channels: make them equal."
            )
        count += len(pixels)
        total = total + pixels.sum(axis=0, dtype=np.float64)
        squares = squares + np.square(pixels, dtype=np.float64).sum(axis=0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    if dtype == "uint8":
        fitted = [_before_clipping(m, s) for m, s in zip(mean, std, strict=True)]
        mean, std = np.array(fitted).T
    return mean.tolist(), std.tolist()


def _before_clipping(mean: float, std: float) -> tuple[float, float]:
    """Parameters of a normal that has these moments once it is rounded to 0 … 255, by fixed-point iteration."""
    if std == 0:
        return mean, 0.0
    levels = np.arange(256)
    location, scale = mean, std
    for _ in range(2000):
        below = [0.5 * math.erfc(-(edge - location) / (scale * math.sqrt(2))) for edge in levels[:-1] + 0.5]
        probabilities = np.diff([0.0, *below, 1.0])
        actual = float(probabilities @ levels)
        spread = math.sqrt(float(probabilities @ (levels - actual) ** 2))
        if abs(actual - mean) < 1e-4 * std and abs(spread / std - 1) < 1e-4:
            break
        location += mean - actual
        scale *= std / max(spread, 1e-3 * std)
    return location, scale


def _to_pixels(value: Any, column: str):
    """The pixels, of shape `(pixels, channels)`, and the function that makes a value of that kind of them again."""
    if type(value).__module__.startswith("PIL."):
        from PIL import Image

        image = value.convert("RGB") if value.mode == "P" else value
        array = np.asarray(image)
        if image.mode in _MODES:
            height, width = array.shape[:2]
            return array.reshape(height * width, -1), lambda p: Image.fromarray(p.reshape(array.shape))
        found = f"an image of the mode {image.mode!r}"
    else:
        array = np.asarray(value)
        if array.dtype != object and array.size:
            if array.ndim in (1, 2):
                return array.reshape(-1, 1), lambda p: p.reshape(array.shape).tolist()
            if array.ndim == 3 and array.shape[0] <= 4:
                rest = array.shape[1:]
                return array.reshape(len(array), -1).T, lambda p: p.T.reshape(-1, *rest).tolist()
            if array.ndim == 3 and array.shape[2] <= 4:
                return array.reshape(-1, array.shape[2]), lambda p: p.reshape(array.shape).tolist()
        found = f"{type(value).__name__} of shape {array.shape}"
    raise ValueError(
        f"Column {column!r} must hold PIL images ({', '.join(_MODES)}) or arrays of numbers, in three dimensions with "
        f"at most 4 channels first or last; got {found}. Convert them with `dataset.map` first."
    )
