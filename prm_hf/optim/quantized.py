r"""State tensors as the step computes with them, and as they are kept: in bfloat16, or in 8 bits a value.

A value of 8 bits is a float of 3 mantissa bits, in units of the `scale` of its block. A block is 256 neighbours in one
row (the last one of a row may be shorter), and its largest value has the largest code. Blocks end where rows do, so
that a step may take any rows, and so that a process that holds whole rows holds whole blocks. In a flat buffer they
also begin and end where the part of a row does that the buffer holds.

==========  ====================================  ==================================  ========
            bits                                  smallest, of the block's largest    zero
==========  ====================================  ==================================  ========
signed      sign, 4 of the exponent, 3            :math:`2^{-15} / 1.875`             code 0
unsigned    5 of the exponent, 3                  :math:`2^{-31} / 1.875`             none
==========  ====================================  ==================================  ========

`exp_avg_sq` has no zero: a value that is small within its block would be rounded to 0, and its update divided by eps
(Li et al., *Memory Efficient Optimizers with 4-bit States*, arXiv 2309.01507). It is rounded stochastically, in
bfloat16 too: β₂ = 0.999 changes it by a thousandth a step, which rounding to the nearest would take back each time.
The random numbers follow from the step and the position of the value in its tensor alone, so a run can be repeated
and resumed bit for bit. All else is rounded to the nearest.

Blocks: Dettmers et al., *8-bit Optimizers via Block-wise Quantization*, arXiv 2110.02861. Their map of codes is finer
near the largest value of a block and coarser elsewhere. This one needs no table, so that a kernel forms and reads
codes by shifts of a float's bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sharding import FlatBuffer, Slice, UnitRange, has_whole_rows, is_dtensor, local_tensor, shard_rows
from .masks import as_rows, n_rows


BLOCK = 256
# Smaller tensors stay in float32, which costs nothing and is safer for norms and biases; and so do those of rows so
# short that the scales would take as much as a tenth of the codes.
SMALLEST, SHORTEST_ROW = 4096, 64
MANTISSA, LARGEST = 3, 1.875  # bits; the largest float of so many below 2
SHIFT = 23 - MANTISSA  # of the bits that float32 has beyond
TINY = torch.finfo(torch.float32).tiny
SIGNED = ("exp_avg", "exp_avg_signal")
MOMENTS = (*SIGNED, "exp_avg_sq")  # what `state_dtype` is about
REDUCED = (torch.uint8, torch.bfloat16)
_WHOLE = Slice(UnitRange(0, 0, 1), 0, 0, None)  # of a tensor that is no flat buffer


def lowest(signed: bool) -> int:
    """The mantissa and exponent bits of a float that code 0 stands for: 16 or 32 powers of two end with 1."""
    return (127 + 1 - (16 if signed else 32)) << MANTISSA


@dataclass(frozen=True)
class Quantized:
    """A tensor in 8 bits.

    Attributes:
        codes: uint8, of the tensor's shape.
        scale: float32 `(rows, blocks of a row)`; of a flat buffer `(blocks,)`, slice by slice.
        signed: whether values may be negative.
    """

    codes: Tensor
    scale: Tensor
    signed: bool

    @property
    def dtype(self) -> torch.dtype:
        return self.codes.dtype

    @property
    def device(self) -> torch.device:
        return self.codes.device

    def numel(self) -> int:
        return self.codes.numel()

    def __getitem__(self, rows: slice) -> "Quantized":
        if self.codes.dim() < 2:
            return self
        return Quantized(self.codes[rows], self.scale[rows], self.signed)

    def slices(self, slices: list[Slice]) -> list["Quantized"]:
        """[`slices_of`]."""
        codes, scale = [piece.of(self.codes) for piece in slices], local_tensor(self.scale)
        scales = scale.split([_n_blocks(x) for x in codes]) if scale.dim() == 1 else [scale]
        by_row = [
            x.view(n_rows(own), -(-own.shape[-1] // BLOCK)) if x.dim() == 1 else x
            for own, x in zip(codes, scales, strict=True)
        ]
        return [Quantized(own, x, self.signed) for own, x in zip(codes, by_row, strict=True)]


def is_quantized(tensor: Tensor | Quantized) -> bool:
    return tensor.dtype == torch.uint8


def slices_of(tensor: Tensor | Quantized, slices: list[Slice]) -> list[Tensor | Quantized]:
    """The slices of what is shaped as a local tensor, all of them where it is in 8 bits; they share its memory."""
    return tensor.slices(slices) if is_quantized(tensor) else [piece.of(tensor) for piece in slices]


def is_quantizable(p: Tensor, flat: FlatBuffer | None = None) -> bool:
    """Whether the state of a local tensor is kept in 8 bits where it is asked for.

    That of a flat buffer is if that of any of its tensors would be.

    Raises:
        ValueError: the rows of a tensor, so large that it is, are cut between processes.
    """
    shapes = [(n_rows(p), p.numel() // max(n_rows(p), 1))] if flat is None else flat.shapes
    large = any(n * in_row >= SMALLEST and in_row >= SHORTEST_ROW for n, in_row in shapes)
    if not large or not p.is_contiguous() or p.dtype == torch.float64:
        return False
    if not is_dtensor(p) or has_whole_rows(p):
        return True
    if p.dim() > 1:
        raise ValueError(
            f"Invalid state_dtype='8bit': a parameter of shape {tuple(p.shape)} has the placements {p.placements}, "
            "which cut its rows, and with them blocks of 256 neighbours, whose scale would be that of two processes. "
            "Shard dimension 0 (without `shard_placement_fn`), or use state_dtype='bf16'."
        )
    return False


def scale_key(key: str) -> str:
    return f"{key}_scale"


def moment_of(state: dict[str, Tensor], key: str) -> Tensor | Quantized:
    """A moment as a state keeps it; one in 8 bits is two tensors of it, `exp_avg` and `exp_avg_scale`."""
    tensor = state[key]
    return Quantized(tensor, state[scale_key(key)], key in SIGNED) if is_quantized(tensor) else tensor


def quantized_zeros(like: Tensor, key: str, flat: FlatBuffer | None = None) -> dict[str, Tensor]:
    """The two tensors of a moment of zeros."""
    codes = torch.zeros_like(like, dtype=torch.uint8)
    shape = (n_rows(like), _n_blocks(like) // n_rows(like)) if flat is None else (n_blocks_of(codes, flat),)
    scale = torch.zeros(shape, dtype=torch.float32, device=like.device)
    return {key: codes, scale_key(key): scale if flat is not None else shard_rows(scale, like)}


def n_blocks_of(flat_tensor: Tensor, flat: FlatBuffer) -> int:
    """How many blocks what is shaped as a flat buffer has."""
    return sum(_n_blocks(piece.of(flat_tensor)) for piece in flat.slices)


def _n_blocks(x: Tensor) -> int:
    return n_rows(x) * -(-x.numel() // (max(n_rows(x), 1) * BLOCK))


def requantize(old: Tensor | Quantized, new: Tensor | Quantized, dtype: torch.dtype, flat: FlatBuffer | None) -> None:
    """Keeps in `new` what `old` keeps, rounded to the nearest; both are of one local tensor."""
    slices = [_WHOLE] if flat is None else flat.slices
    for source, target in zip(slices_of(old, slices), slices_of(new, slices), strict=True):
        write(target, read(source, dtype))


def read(tensor: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
    """The values in `dtype`: the tensor itself where it is kept so."""
    if not is_quantized(tensor):
        return tensor if tensor.dtype == dtype else tensor.to(dtype)
    codes = tensor.codes.to(torch.int32)
    bits = (codes & 127 if tensor.signed else codes).add_(lowest(tensor.signed)).bitwise_left_shift_(SHIFT)
    values = bits.view(torch.float32)
    if tensor.signed:
        values.mul_(1 - (codes >> 6 & 2))  # the sign is bit 7
        values.mul_(codes & 127 != 0)
    rows, scale = as_rows(values), tensor.scale
    for whole, part in _blocks(rows):
        part.mul_(scale[:, whole].unsqueeze(2))
    return values.to(dtype)


def write(tensor: Tensor | Quantized, values: Tensor, noise: Tensor | None = None) -> None:
    """Keeps `values`, rounded to the nearest that `tensor` can hold; nothing where `values` is `tensor`.

    Args:
        noise: int32, uniform random bits of each value, by which it is rounded stochastically instead.
    """
    if tensor is values:
        return
    if is_quantized(tensor):
        _quantize(tensor, values.float(), noise)
    elif noise is not None and tensor.dtype == torch.bfloat16:
        exact = values.float()
        bits = exact.view(torch.int32) + (noise & 0xFFFF)
        rounded = (bits & -0x10000).view(torch.float32)
        tensor.copy_(torch.where(exact.isfinite(), rounded, exact))
    else:
        tensor.copy_(values)


def _quantize(tensor: Quantized, values: Tensor, noise: Tensor | None) -> None:
    magnitudes = values.abs() if tensor.signed else values.clone(memory_format=torch.contiguous_format)
    rows = as_rows(magnitudes)
    for whole, part in _blocks(rows):
        scale = part.amax(2).mul_(1 / LARGEST)
        scale.masked_fill_(scale < TINY, 0.0)  # not where it is NaN
        tensor.scale[:, whole] = scale
        part.mul_(torch.where(scale == 0, 0.0, 1 / scale).unsqueeze(2))
    bits = magnitudes.view(torch.int32)
    bits.add_(1 << (SHIFT - 1) if noise is None else noise & ((1 << SHIFT) - 1))
    lo = lowest(tensor.signed)
    codes = bits.bitwise_right_shift_(SHIFT).sub_(lo).clamp_(0, (128 << MANTISSA) - 1 - lo)
    if tensor.signed:
        codes.add_(values.signbit(), alpha=128)
    tensor.codes.copy_(codes)


def _blocks(rows: Tensor) -> list[tuple[slice, Tensor]]:
    """The blocks of rows as views `(rows, blocks, elements)`: the whole ones, and those that are left at the ends."""
    n, end = rows.shape[1] // BLOCK, rows.shape[1] // BLOCK * BLOCK
    parts = [(slice(0, n), rows[:, :end].unflatten(1, (n, BLOCK)))] if n else []
    if end < rows.shape[1]:
        parts.append((slice(n, n + 1), rows[:, end:].unsqueeze(1)))
    return parts


def random_bits(values: Tensor, start: int, step: float | Tensor) -> Tensor:
    """32 random bits for each value at a step, int32 of the shape of `values`: the same whenever it is called.

    Args:
        start: the position of the first of them in the flattened tensor.
        step: the number of the step, or a 0-dim tensor of it.
    """
    key = step.to(torch.int64) if isinstance(step, Tensor) else torch.tensor(int(step), device=values.device)
    index = torch.arange(values.numel(), dtype=torch.int32, device=values.device)
    index += (start + 2**31) % 2**32 - 2**31
    # With a whole period of the golden ratio between the steps
    bits = _scramble(index.mul_(-0x61C88647).add_(_scramble(key.to(torch.int32))))
    return bits.view(values.shape)


def _scramble(x: Tensor) -> Tensor:
    """A permutation of the 32-bit numbers without visible pattern: `lowbias32` of C. Wellons' hash-prospector."""
    x = x ^ (x >> 16 & 0xFFFF)
    x *= 0x7FEB352D
    x ^= x >> 15 & 0x1FFFF
    x *= 0x846CA68B - 2**32
    x ^= x >> 16 & 0xFFFF
    return x
