"""The 8-bit and bfloat16 state written a second time, from its definition: NumPy, tables of values, no shifts of bits.

It shares no code with the package, as `reference_prm.py`.
"""

import numpy as np


BLOCK = 256
OCTAVES = {True: 16, False: 32}


def table(signed):
    """The values of codes 0 to 127 or 255, without sign, in units of a block's scale: 8 an octave, the last 1.875."""
    n = 8 * OCTAVES[signed]
    values = np.array([(1 + i % 8 / 8) * 2.0 ** (i // 8 + 1 - OCTAVES[signed]) for i in range(n)])
    if signed:
        values[0] = 0.0
    return values


def blocks_of(x):
    """The indices of each block of a flattened tensor: 256 neighbours of a row, or what is left at its end."""
    columns = x.size // x.shape[0] if x.ndim > 1 else x.size
    rows = np.arange(x.size).reshape(-1, columns)
    return [[row[i : i + BLOCK] for i in range(0, columns, BLOCK)] for row in rows]


def quantize(x, signed, noise=None):
    """Codes of the shape of `x` and scales, one a block; `noise` are 32 random bits for each value."""
    flat, values = np.asarray(x, dtype=np.float32).ravel(), table(signed)
    codes, scales = np.zeros(x.size, dtype=np.int64), []
    for row in blocks_of(x):
        scales.append([])
        for block in row:
            scale = np.abs(flat[block]).max() * np.float32(1 / 1.875)
            scales[-1].append(scale)
            y = np.abs(flat[block]) * (np.float32(1) / scale if scale > 0 else np.float32(0))
            y = np.clip(y.astype(np.float64), 2.0 ** (1 - OCTAVES[signed]) / 2, values[-1])
            if noise is None:  # code 0 has the place of the octave's first value, also where it stands for 0
                grid = np.concatenate([[2.0 ** (1 - OCTAVES[signed])], values[1:]])
                code = np.searchsorted((grid[1:] + grid[:-1]) / 2, y, side="right")
            else:
                y = np.maximum(y, values[0])
                code = np.clip(np.searchsorted(values, y, side="right") - 1, 0, len(values) - 2)
                share = (y - values[code]) / (values[code + 1] - values[code])
                code = code + (share + (noise.ravel()[block] & 0xFFFFF) / 2**20 >= 1)
            codes[block] = code + 128 * (signed & np.signbit(flat[block]))
    return codes.reshape(x.shape), np.array(scales)


def dequantize(codes, scales, signed):
    values = table(signed)
    out = np.zeros(codes.size)
    for row, of_row in zip(blocks_of(codes), scales, strict=True):
        for block, scale in zip(row, of_row, strict=True):
            code = codes.ravel()[block].astype(np.int64)
            sign = np.where(code >= 128, -1.0, 1.0) if signed else 1.0
            out[block] = sign * values[code % 128 if signed else code] * float(scale)
    return out.reshape(codes.shape)


def random_bits(n, step):
    """32 bits for each of n values at a step."""
    index = np.arange(n, dtype=np.uint64)
    return _scramble((index * 0x9E3779B9 + int(_scramble(np.uint64(step)))) % 2**32).astype(np.int64)


def _scramble(x):
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor) % np.uint64(2**32)
    return x


def bf16_stochastic(x, step):
    """Rounded up with the probability of what is cut off; 16 bits of a float32 are left."""
    exact = np.asarray(x, dtype=np.float32)
    bits = exact.ravel().view(np.uint32).astype(np.int64)
    noise = random_bits(x.size, step) % 2**16
    up = bits % 2**16 + noise >= 2**16
    bits = (bits // 2**16 + up) * 2**16
    return bits.astype(np.uint32).view(np.float32).reshape(exact.shape).astype(np.float64)
