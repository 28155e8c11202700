"""How the kernels read and write a tensor: as float32, and as what a state is kept in, see `quantized.py`."""

# fmt: off
import triton
import triton.language as tl


BLOCK = tl.constexpr(256)  # as `quantized.BLOCK`


@triton.jit
def load(pointer, offsets, mask, MASKED: tl.constexpr, policy: tl.constexpr):
    # Without a mask where a chunk is whole: the compiler cannot know that a mask spares whole vectors, and would load
    # element by element.
    if MASKED:
        return tl.load(pointer + offsets, mask=mask, other=0.0, eviction_policy=policy).to(tl.float32)
    else:
        return tl.load(pointer + offsets, eviction_policy=policy).to(tl.float32)


@triton.jit
def store(pointer, offsets, value, mask, MASKED: tl.constexpr):
    value = value.to(pointer.dtype.element_ty)
    if MASKED:
        tl.store(pointer + offsets, value, mask=mask, eviction_policy="evict_first")
    else:
        tl.store(pointer + offsets, value, eviction_policy="evict_first")


@triton.jit
def load_moment(
    pointer, scale, offsets, blocks, mask, MASKED: tl.constexpr, policy: tl.constexpr, SIGNED: tl.constexpr
):
    """`read`: of 8 bits the last dimension of `offsets` is a block, and `blocks` are their numbers, -1 for none."""
    if pointer.dtype.element_ty == tl.uint8:
        codes = tl.load(pointer + offsets, mask=mask, other=0, eviction_policy=policy).to(tl.int32)
        number = codes & 127 if SIGNED else codes
        value = ((number + _lowest(SIGNED)) << 20).to(tl.float32, bitcast=True)
        if SIGNED:
            value = tl.where(number == 0, 0.0, tl.where(codes >= 128, -value, value))
        scales = tl.load(scale + blocks, mask=blocks >= 0, other=0.0)
        return value * tl.expand_dims(scales, len(blocks.shape))
    else:
        return load(pointer, offsets, mask, MASKED, policy)


@triton.jit
def store_moment(
    pointer, scale, offsets, blocks, value, step, mask, MASKED: tl.constexpr, SIGNED: tl.constexpr
):
    """`write`: rounded to the nearest, or stochastically what is not `SIGNED`, which is `exp_avg_sq`."""
    bits = value.to(tl.int32, bitcast=True)
    if pointer.dtype.element_ty == tl.uint8:
        magnitude = bits & 0x7FFFFFFF
        # Of bits, whose order is that of the numbers, and in which NaN is the largest
        largest = tl.max(tl.where(mask, magnitude, 0), len(blocks.shape)).to(tl.float32, bitcast=True)
        scales = largest * (1 / 1.875)
        scales = tl.where(scales < 1.1754943508222875e-38, 0.0, scales)
        inverse = tl.where(scales == 0.0, 0.0, tl.div_rn(1.0, tl.where(scales == 0.0, 1.0, scales)))
        scaled = magnitude.to(tl.float32, bitcast=True) * tl.expand_dims(inverse, len(blocks.shape))
        noise = 1 << 19
        if not SIGNED:
            noise = (random_bits(offsets, step) & 0xFFFFF).to(tl.int32)
        codes = ((scaled.to(tl.int32, bitcast=True) + noise) >> 20) - _lowest(SIGNED)
        codes = tl.minimum(tl.maximum(codes, 0), 127 if SIGNED else 255)
        if SIGNED:
            codes += tl.where(bits < 0, 128, 0)
        tl.store(pointer + offsets, codes.to(tl.uint8), mask=mask, eviction_policy="evict_first")
        # Several threads hold a block's scale: none may read what another has written already
        tl.debug_barrier()
        tl.store(scale + blocks, scales, mask=blocks >= 0)
    elif SIGNED:
        store(pointer, offsets, value, mask, MASKED)
    else:
        if pointer.dtype.element_ty == tl.bfloat16:
            rounded = (bits + (random_bits(offsets, step) & 0xFFFF).to(tl.int32)) & -65536
            is_finite = (bits & 0x7F800000) != 0x7F800000
            value = tl.where(is_finite, rounded.to(tl.float32, bitcast=True), value)
        store(pointer, offsets, value, mask, MASKED)


@triton.jit
def _lowest(SIGNED: tl.constexpr):
    """`quantized.lowest`."""
    return 112 * 8 if SIGNED else 96 * 8


@triton.jit
def random_bits(offsets, step):
    """`quantized.random_bits`, uint32, of the elements at `offsets` of a tensor at a step, a float64."""
    return _scramble(offsets.to(tl.uint32) * 0x9E3779B9 + _scramble(step.to(tl.int64).to(tl.uint32)))


@triton.jit
def _scramble(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)
