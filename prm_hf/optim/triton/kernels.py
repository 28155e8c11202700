"""The two Triton kernels of a step, and the tables that they read.

`step_kernel` works through a list of items, each a chunk of a tensor. Without per-tensor statistics an item reads
everything of its chunk, and writes p, m and v (and s) once.

`reduction="per_tensor"` needs two sums over a tensor before the first of its elements can be updated, hence a second
read of g and m. Each chunk has an item for its statistics and one for its update. Whoever finishes the last statistics
of a tensor adds up the partial sums, in their order and so always to the same result, and writes the mask.

Large tensors take two launches, with one program an item: statistics and masks, then updates. Small ones take one, as
launches cost more than their kernels. There the kernel is persistent: its programs draw items from a counter, and
updates wait for the mask. They cannot wait forever, because an item waits only for items that come before it in the
list, and those are drawn by programs that run already. A tensor's updates follow soon after its statistics and in
reverse order, so that what the statistics read last is still in the L2 cache.

`reduction="per_row"` waits for nobody: the rows of an item are whole, and one program reads their g and m twice in a
row. It has `row_kernel`, launched once for each shape of tile that the rows of a list are cut into. Where rows are
sharded it is launched twice, for the sums and for the update, as `step_kernel` is for sharded tensors.
"""

# Arguments stand on few lines, so that a kernel fits on a screen.
# fmt: off
import triton
import triton.language as tl

from .moments import BLOCK, load, load_moment, store, store_moment


class _Position(tl.constexpr):
    """A position in a table. Triton compares each that a kernel reads at each launch, which must take no time."""

    def __eq__(self, other) -> bool:
        return self.value == getattr(other, "value", other)

    def __ne__(self, other) -> bool:
        return self.value != getattr(other, "value", other)

    __hash__ = object.__hash__


# A row of the table of scalars, float64: the step's own, then the settings of its group. A kernel reads them by name.
SCALARS = (
    "step_size", "bias2_sqrt", "decay", "center", "weight", "signal", "noise", "first", "open", "one_minus_beta1",
    "beta2", "one_minus_beta2", "variance_beta", "eps", "weight_decay", "noise_weight", "softness", "mask_epsilon",
    "first_ratio", "unscale", "floor", "one_minus_signal_beta", "step"
)
(
    _STEP_SIZE, _BIAS2_SQRT, _DECAY, _CENTER, _WEIGHT, _SIGNAL, _NOISE, _FIRST, _OPEN, _ONE_MINUS_BETA1, _BETA2,
    _ONE_MINUS_BETA2, _VARIANCE_BETA, _EPS, _WEIGHT_DECAY, _NOISE_WEIGHT, _SOFTNESS, _MASK_EPSILON, _FIRST_RATIO,
    _UNSCALE, _FLOOR, _ONE_MINUS_SIGNAL_BETA, _STEP
) = map(_Position, range(len(SCALARS)))
# A row of the table of tensors, int64: where each is (0 for none), its elements, the first of its chunks, its rows,
# and the first of them among those of all tensors.
STATES = ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad_var", "exp_avg_signal")
SCALES = ("exp_avg_scale", "exp_avg_sq_scale", "exp_avg_signal_scale")  # where these are kept in 8 bits
TENSOR = (*STATES, *SCALES, "numel", "first_chunk", "rows", "first_row")
(
    _PARAM, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _GRAD_VAR, _EXP_AVG_SIGNAL, _EXP_AVG_SCALE, _EXP_AVG_SQ_SCALE,
    _EXP_AVG_SIGNAL_SCALE, _NUMEL, _FIRST_CHUNK, _N_ROWS, _FIRST_ROW
) = map(_Position, range(len(TENSOR)))
_N_SCALARS, _N_ENTRIES = _Position(len(SCALARS)), _Position(len(TENSOR))


@triton.jit
def _pointer(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    # ALIGNED: 0, or how many elements a thread may read at once. Where it reads more of one tensor than of another,
    # the compiler moves values between threads.
    pointer = tl.load(address).to(tl.pointer_type(dtype))
    if ALIGNED:
        size: tl.constexpr = ALIGNED * pointer.dtype.element_ty.primitive_bitwidth // 8
        if size > 16:
            pointer = tl.multiple_of(pointer, 16)
        else:
            pointer = tl.multiple_of(pointer, size)
    return pointer


@triton.jit
def _scalar(row, i: tl.constexpr, dtype: tl.constexpr):
    return tl.load(row + i).to(dtype)


@triton.jit
def _mask(mean_sq, var, row, dtype: tl.constexpr, MASK: tl.constexpr, DEBIASED: tl.constexpr):
    """q from m² and s, as `masks.compute_mask`."""
    signal = mean_sq * _scalar(row, _SIGNAL, dtype)
    noise = var * _scalar(row, _NOISE, dtype)
    if DEBIASED:
        signal = tl.maximum(signal - _scalar(row, _FLOOR, dtype) * noise, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        noise = tl.where(_scalar(row, _FIRST, dtype) != 0, signal * _scalar(row, _FIRST_RATIO, dtype), noise)
    alpha, softness = _scalar(row, _NOISE_WEIGHT, dtype), _scalar(row, _SOFTNESS, dtype)
    mask_eps = _scalar(row, _MASK_EPSILON, dtype)
    if MASK == 0:  # snr
        q = signal / (signal + softness * alpha * noise + mask_eps)
    else:
        excess = signal - alpha * noise
        if MASK == 2:  # hard
            q = tl.where(excess > 0, 1.0, 0.0).to(dtype)
        else:
            excess = tl.maximum(excess, 0.0, propagate_nan=tl.PropagateNan.ALL)
            q = excess / (excess + softness * noise + mask_eps)
    return tl.where(_scalar(row, _OPEN, dtype) != 0, 1.0, q)


@triton.jit
def _gradient(
    g_ptr, p, offsets, mask, row, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, SCALED: tl.constexpr, MASKED:
    tl.constexpr, policy: tl.constexpr
):
    g = load(g_ptr, offsets, mask, MASKED, policy)
    if SCALED:
        g = g * _scalar(row, _UNSCALE, tl.float32)
    if MAXIMIZE:
        g = -g
    if COUPLED:
        g = g + _scalar(row, _WEIGHT_DECAY, tl.float32) * p
    return g


@triton.jit
def _update_chunk(
    p_ptr, g_ptr, m_ptr, v_ptr, x_ptr, s_ptr, m_scale, v_scale, row, q, offsets, blocks, mask, MASK: tl.constexpr,
    DEBIASED: tl.constexpr, PER_TENSOR: tl.constexpr, AMSGRAD: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE:
    tl.constexpr, SCALED: tl.constexpr, MASKED: tl.constexpr
):
    p = load(p_ptr, offsets, mask, MASKED, "evict_first")
    m = load_moment(m_ptr, m_scale, offsets, blocks, mask, MASKED, "evict_first", True)
    v = load_moment(v_ptr, v_scale, offsets, blocks, mask, MASKED, "evict_first", False)
    g = _gradient(g_ptr, p, offsets, mask, row, COUPLED, MAXIMIZE, SCALED, MASKED, "evict_first")
    if not COUPLED:
        p = p * _scalar(row, _DECAY, tl.float32)
    s = 0.0
    if MASK != 3 and not PER_TENSOR:
        s = load(s_ptr, offsets, mask, MASKED, "evict_first")
        deviation = g - m * _scalar(row, _CENTER, tl.float32)
        s = _scalar(row, _VARIANCE_BETA, tl.float32) * s + deviation * deviation * _scalar(row, _WEIGHT, tl.float32)
        store(s_ptr, offsets, s, mask, MASKED)
    m = m + _scalar(row, _ONE_MINUS_BETA1, tl.float32) * (g - m)
    v = _scalar(row, _BETA2, tl.float32) * v + _scalar(row, _ONE_MINUS_BETA2, tl.float32) * (g * g)
    step = tl.load(row + _STEP)
    store_moment(m_ptr, m_scale, offsets, blocks, m, step, mask, MASKED, True)
    store_moment(v_ptr, v_scale, offsets, blocks, v, step, mask, MASKED, False)
    if AMSGRAD:
        v = tl.maximum(load(x_ptr, offsets, mask, MASKED, "evict_first"), v, propagate_nan=tl.PropagateNan.ALL)
        store(x_ptr, offsets, v, mask, MASKED)
    denominator = tl.sqrt(v) / _scalar(row, _BIAS2_SQRT, tl.float32) + _scalar(row, _EPS, tl.float32)
    if MASK == 3:
        update = m
    elif PER_TENSOR:
        update = m * q
    else:
        update = m * _mask(m * m, s, row, tl.float32, MASK, DEBIASED)
    p = p - _scalar(row, _STEP_SIZE, tl.float32) * (update / denominator)
    store(p_ptr, offsets, p, mask, MASKED)


@triton.jit
def _before_update(
    p_ptr, g_ptr, m_ptr, m_scale, row, offsets, blocks, mask, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, SCALED:
    tl.constexpr, MASKED: tl.constexpr
):
    """g, the next m and g - center, of elements that are read again for their update; 0 outside of the mask."""
    p = load(p_ptr, offsets, mask, MASKED, "evict_last") if COUPLED else 0.0
    g = _gradient(g_ptr, p, offsets, mask, row, COUPLED, MAXIMIZE, SCALED, MASKED, "evict_last")
    m = load_moment(m_ptr, m_scale, offsets, blocks, mask, MASKED, "evict_last", True)
    deviation = g - m * _scalar(row, _CENTER, tl.float32)
    return g, m + _scalar(row, _ONE_MINUS_BETA1, tl.float32) * (g - m), deviation


@triton.jit
def _chunk_sums(
    p_ptr, g_ptr, m_ptr, m_scale, row, offsets, blocks, mask, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, SCALED:
    tl.constexpr, MASKED: tl.constexpr
):
    """Σ(g - center)² and Σm² of a chunk, float64, m being what the update will make of it."""
    _, m, deviation = _before_update(
        p_ptr, g_ptr, m_ptr, m_scale, row, offsets, blocks, mask, COUPLED, MAXIMIZE, SCALED, MASKED
    )
    if len(offsets.shape) > 1:  # in 8 bits
        deviations, squares = tl.sum(deviation * deviation, 1).to(tl.float64), tl.sum(m * m, 1).to(tl.float64)
        return tl.sum(deviations, 0), tl.sum(squares, 0)
    else:
        if MASKED:
            # A tensor of one chunk has no other sums among which the rounding of this one would vanish, and would get
            # another mask where it is cut into shards; a chunk a tensor costs no time, also where float64 is slow.
            deviation, m = deviation.to(tl.float64), m.to(tl.float64)
        return tl.sum(deviation * deviation, 0).to(tl.float64), tl.sum(m * m, 0).to(tl.float64)


@triton.jit
def _chunk(entry, number, CHUNK: tl.constexpr, QUANTIZED: tl.constexpr, EVEN: tl.constexpr):
    """The elements of a chunk of a tensor, in 8 bits as `(blocks, 256)`, and which of them there are.

    Returns:
        offsets, mask; the numbers of the blocks, of none without 8 bits; whether all elements are there; how many
        chunks the tensor has.
    """
    numel = tl.load(entry + _NUMEL)
    if QUANTIZED:
        n_rows = tl.load(entry + _N_ROWS)
        n_columns = numel // n_rows
        if EVEN:
            n_columns = tl.multiple_of(n_columns, 16)
        in_row = tl.cdiv(n_columns, BLOCK)
        blocks = (number * (CHUNK // BLOCK)).to(tl.int64) + tl.arange(0, CHUNK // BLOCK)
        columns = (blocks % in_row * BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
        there = blocks < n_rows * in_row
        offsets, mask = (blocks // in_row * n_columns)[:, None] + columns, there[:, None] & (columns < n_columns)
        n_chunks = tl.cdiv(n_rows * in_row, CHUNK // BLOCK)
        return offsets, mask, tl.where(there, blocks, -1), False, n_chunks
    else:  # or what follows were compiled, too
        offsets = number * CHUNK + tl.arange(0, CHUNK)
        return offsets, offsets < numel, offsets, number * CHUNK + CHUNK <= numel, tl.cdiv(numel, CHUNK)


@triton.jit
def _tensor_sums(partials, begin, end, BLOCK: tl.constexpr):
    """The partial sums [begin, end) of a tensor added up in float64, in an order that depends on nothing else."""
    deviations = tl.zeros((BLOCK,), dtype=tl.float64)
    squares = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < end
        # From the L2 cache, where other programs have written them.
        deviations += tl.load(partials + 2 * rows, mask=inside, other=0.0, cache_modifier=".cg")
        squares += tl.load(partials + 2 * rows + 1, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.sum(deviations, 0), tl.sum(squares, 0)


@triton.jit
def _item(
    item, chunk_tensors, tensors, n_tensors, grads, scalars, counters, partials, sums, qs, P: tl.constexpr, G:
    tl.constexpr, M: tl.constexpr, V: tl.constexpr, MASK: tl.constexpr, DEBIASED: tl.constexpr, PER_TENSOR:
    tl.constexpr, AMSGRAD: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, SCALED: tl.constexpr, ALIGNED:
    tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr, PHASE: tl.constexpr, STATISTICS: tl.constexpr
):
    """The statistics of a chunk, or its update."""
    statistics_done = counters + 1
    q_there = statistics_done + n_tensors
    chunk = item // 2
    tensor = tl.load(chunk_tensors + chunk)
    entry = tensors + tensor * _N_ENTRIES
    begin = tl.load(entry + _FIRST_CHUNK)  # of its chunks
    offsets, inside, blocks, whole, n_chunks = _chunk(entry, chunk - begin, CHUNK, M == tl.uint8, EVEN)
    row = scalars + tl.load(grads + 2 * tensor + 1) * _N_SCALARS
    p_ptr = _pointer(entry + _PARAM, P, ALIGNED)
    g_ptr = _pointer(grads + 2 * tensor, G, ALIGNED)
    m_ptr = _pointer(entry + _EXP_AVG, M, ALIGNED)
    m_scale = _pointer(entry + _EXP_AVG_SCALE, tl.float32, 0)
    if STATISTICS:
        if whole:
            deviations, squares = _chunk_sums(
                p_ptr, g_ptr, m_ptr, m_scale, row, offsets, blocks, inside, COUPLED, MAXIMIZE, SCALED, False
            )
        else:
            deviations, squares = _chunk_sums(
                p_ptr, g_ptr, m_ptr, m_scale, row, offsets, blocks, inside, COUPLED, MAXIMIZE, SCALED, True
            )
        tl.store(partials + 2 * chunk, deviations)
        tl.store(partials + 2 * chunk + 1, squares)
        finished = tl.atomic_add(statistics_done + tensor, 1, sem="acq_rel")
        if finished == n_chunks - 1:
            total_deviations, total_squares = _tensor_sums(partials, begin, begin + n_chunks, 256)
            if PHASE == 1:
                tl.store(sums + 2 * tensor, total_deviations)
                tl.store(sums + 2 * tensor + 1, total_squares)
            else:
                count = tl.load(entry + _NUMEL).to(tl.float64)
                s_ptr = _pointer(entry + _GRAD_VAR, tl.float64, 0)
                s = _scalar(row, _VARIANCE_BETA, tl.float64) * tl.load(s_ptr)
                s += _scalar(row, _WEIGHT, tl.float64) * (total_deviations / count)
                tl.store(s_ptr, s)
                q = _mask(total_squares / count, s, row, tl.float64, MASK, DEBIASED)
                tl.store(qs + tensor, q.to(tl.float32))
                tl.atomic_add(q_there + tensor, 1, sem="release")
    else:
        v_ptr = _pointer(entry + _EXP_AVG_SQ, V, ALIGNED)
        v_scale = _pointer(entry + _EXP_AVG_SQ_SCALE, tl.float32, 0)
        x_ptr = _pointer(entry + _MAX_EXP_AVG_SQ, tl.float32, ALIGNED) if AMSGRAD else v_ptr
        s_ptr = v_ptr
        q = 1.0
        if PER_TENSOR:
            if PHASE == 0:
                ready = tl.atomic_add(q_there + tensor, 0, sem="acquire")
                while ready == 0:
                    ready = tl.atomic_add(q_there + tensor, 0, sem="acquire")
            q = tl.load(qs + tensor, cache_modifier=".cg")
        elif MASK != 3:
            s_ptr = _pointer(entry + _GRAD_VAR, tl.float32, ALIGNED)
        if whole:
            _update_chunk(
                p_ptr, g_ptr, m_ptr, v_ptr, x_ptr, s_ptr, m_scale, v_scale, row, q, offsets, blocks, inside, MASK,
                DEBIASED, PER_TENSOR, AMSGRAD, COUPLED, MAXIMIZE, SCALED, False
            )
        else:
            _update_chunk(
                p_ptr, g_ptr, m_ptr, v_ptr, x_ptr, s_ptr, m_scale, v_scale, row, q, offsets, blocks, inside, MASK,
                DEBIASED, PER_TENSOR, AMSGRAD, COUPLED, MAXIMIZE, SCALED, True
            )


@triton.jit
def step_kernel(
    items, n_items, chunk_tensors, tensors, n_tensors, grads, scalars, counters, partials, sums, qs, found_inf, P:
    tl.constexpr, G: tl.constexpr, M: tl.constexpr, V: tl.constexpr, MASK: tl.constexpr, DEBIASED: tl.constexpr,
    PER_TENSOR: tl.constexpr, AMSGRAD: tl.constexpr, COUPLED: tl.constexpr, MAXIMIZE: tl.constexpr, SCALED:
    tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, CHUNK: tl.constexpr, PHASE: tl.constexpr, PERSISTENT:
    tl.constexpr
):
    # PHASE: 0 all, 1 the sums over tensors alone, 2 the update alone with the masks given in `qs`, 3 sums and masks
    # PERSISTENT: programs draw items from a counter; else there is one program an item
    # EVEN: with 8 bits, rows are of whole 16 elements
    # tensors: a row a tensor, `TENSOR`; grads: likewise, where its gradient is, and which row of `scalars` is its own
    # counters, 0 at first: [0] the next item; from 1 on, finished statistics items of each tensor; then whether its q
    # is there
    if SCALED and tl.load(found_inf) != 0:
        n_items = 0  # GradScaler skips this step
    ticket = tl.atomic_add(counters, 1, sem="relaxed") if PERSISTENT else tl.program_id(0)
    while ticket < n_items:
        item = tl.load(items + ticket)
        if PER_TENSOR and PHASE == 0:
            if item % 2 == 0:
                _item(
                    item, chunk_tensors, tensors, n_tensors, grads, scalars, counters, partials, sums, qs, P, G, M, V,
                    MASK, DEBIASED, PER_TENSOR, AMSGRAD, COUPLED, MAXIMIZE, SCALED, ALIGNED, EVEN, CHUNK, PHASE, True
                )
            else:
                _item(
                    item, chunk_tensors, tensors, n_tensors, grads, scalars, counters, partials, sums, qs, P, G, M, V,
                    MASK, DEBIASED, PER_TENSOR, AMSGRAD, COUPLED, MAXIMIZE, SCALED, ALIGNED, EVEN, CHUNK, PHASE, False
                )
        else:
            _item(
                item, chunk_tensors, tensors, n_tensors, grads, scalars, counters, partials, sums, qs, P, G, M, V,
                MASK, DEBIASED, PER_TENSOR, AMSGRAD, COUPLED, MAXIMIZE, SCALED, ALIGNED, EVEN, CHUNK, PHASE,
                PER_TENSOR and PHASE != 2
            )
        ticket = tl.atomic_add(counters, 1, sem="relaxed") if PERSISTENT else ticket + n_items


@triton.jit
def _tile(rows, there, n_columns, start, COLS: tl.constexpr, QUANTIZED: tl.constexpr):
    """Columns from `start` on of rows, `(rows, COLS)`, or in 8 bits `(rows, blocks, 256)`: as [`_chunk`]."""
    if QUANTIZED:
        starts = start + BLOCK * tl.arange(0, COLS // BLOCK)[None, :]
        blocks = (rows * tl.cdiv(n_columns, BLOCK))[:, None] + starts // BLOCK
        blocks = tl.where(there[:, None] & (starts < n_columns), blocks, -1)
        columns = starts[:, :, None] + tl.arange(0, BLOCK)[None, None, :]
        offsets, mask = (rows * n_columns)[:, None, None] + columns, there[:, None, None] & (columns < n_columns)
        return offsets, mask, blocks
    else:
        columns = start + tl.arange(0, COLS)[None, :]
        offsets, mask = (rows * n_columns)[:, None] + columns, there[:, None] & (columns < n_columns)
        return offsets, mask, offsets


@triton.jit
def _row_sums(x):
    if len(x.shape) > 2:
        x = tl.sum(x, 2)
    return tl.sum(x, 1).to(tl.float64)


@triton.jit
def row_kernel(
    items, tensors, grads, scalars, sums, qs, found_inf, P: tl.constexpr, G: tl.constexpr, M: tl.constexpr, V:
    tl.constexpr, MASK: tl.constexpr, DEBIASED: tl.constexpr, SIGNAL: tl.constexpr, AMSGRAD: tl.constexpr, COUPLED:
    tl.constexpr, MAXIMIZE: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS:
    tl.constexpr, EVEN: tl.constexpr, PHASE: tl.constexpr
):
    # items: tensor and first row of each; the tables as those of `step_kernel`, `sums` and `qs` of rows.
    # EVEN: rows are of whole 16 elements
    item = items + 2 * tl.program_id(0)
    tensor = tl.load(item)
    entry = tensors + tensor * _N_ENTRIES
    n_rows = tl.load(entry + _N_ROWS)
    n_cols = tl.load(entry + _NUMEL) // n_rows
    if EVEN:
        n_cols = tl.multiple_of(n_cols, 16)
    rows = tl.load(item + 1).to(tl.int64) + tl.arange(0, ROWS)
    if SCALED and tl.load(found_inf) != 0:
        n_rows = n_rows * 0  # GradScaler skips this step
    there = rows < n_rows
    row = scalars + tl.load(grads + 2 * tensor + 1) * _N_SCALARS
    p_ptr = _pointer(entry + _PARAM, P, ALIGNED)
    g_ptr = _pointer(grads + 2 * tensor, G, ALIGNED)
    m_ptr = _pointer(entry + _EXP_AVG, M, ALIGNED)
    m_scale = _pointer(entry + _EXP_AVG_SCALE, tl.float32, 0)
    v_ptr = _pointer(entry + _EXP_AVG_SQ, V, ALIGNED)
    x_ptr = _pointer(entry + _MAX_EXP_AVG_SQ, tl.float32, ALIGNED) if AMSGRAD else v_ptr
    number = tl.load(entry + _FIRST_ROW) + rows  # among the rows of all tensors
    if PHASE != 2:
        a_ptr = _pointer(entry + _EXP_AVG_SIGNAL, M, ALIGNED) if SIGNAL else v_ptr
        a_scale = _pointer(entry + _EXP_AVG_SIGNAL_SCALE, tl.float32, 0)
        deviations = tl.zeros((ROWS,), dtype=tl.float64)
        squares = tl.zeros((ROWS,), dtype=tl.float64)
        for start in range(0, n_cols, COLS):
            offsets, inside, blocks = _tile(rows, there, n_cols, start, COLS, M == tl.uint8)
            g, m, deviation = _before_update(
                p_ptr, g_ptr, m_ptr, m_scale, row, offsets, blocks, inside, COUPLED, MAXIMIZE, SCALED, True
            )
            if SIGNAL:
                m = load_moment(a_ptr, a_scale, offsets, blocks, inside, True, "evict_first", True)
                m = m + _scalar(row, _ONE_MINUS_SIGNAL_BETA, tl.float32) * (g - m)
                store_moment(a_ptr, a_scale, offsets, blocks, m, 0.0, inside, True, True)
            deviations += _row_sums(deviation * deviation)
            squares += _row_sums(m * m)
    if PHASE == 1:
        tl.store(sums + 2 * number, deviations, mask=there)
        tl.store(sums + 2 * number + 1, squares, mask=there)
    else:
        if PHASE == 2:
            q = tl.load(qs + number, mask=there, other=0.0)
        else:
            count = n_cols.to(tl.float64)
            s_ptr = _pointer(entry + _GRAD_VAR, tl.float64, 0) + rows
            s = _scalar(row, _VARIANCE_BETA, tl.float64) * tl.load(s_ptr, mask=there, other=0.0)
            s += _scalar(row, _WEIGHT, tl.float64) * (deviations / count)
            # Several threads hold a row's s: none may read what another has written already
            tl.debug_barrier()
            tl.store(s_ptr, s, mask=there)
            q = _mask(squares / count, s, row, tl.float64, MASK, DEBIASED).to(tl.float32)
        v_scale = _pointer(entry + _EXP_AVG_SQ_SCALE, tl.float32, 0)
        q = q[:, None, None] if M == tl.uint8 else q[:, None]
        for start in range(0, n_cols, COLS):
            offsets, inside, blocks = _tile(rows, there, n_cols, start, COLS, M == tl.uint8)
            _update_chunk(
                p_ptr, g_ptr, m_ptr, v_ptr, x_ptr, v_ptr, m_scale, v_scale, row, q, offsets, blocks, inside, MASK,
                DEBIASED, True, AMSGRAD, COUPLED, MAXIMIZE, SCALED, True
            )
