"""The multi-tensor implementation of PRM's step: the numbers of `reference.py`, in fewer launches.

A step has two halves where masks are decided between them: from sums over a whole tensor, or over rows that several
processes hold parts of.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from ..sharding import is_fake
from . import fused_cpu, masks
from .hyperparameters import Hyperparameters
from .quantized import REDUCED, Quantized, is_quantized, random_bits, read, write
from .reductions import row_mean_squares, row_sums_of_squares, sums_of_squares


# The implementation makes several temporaries of the size of what it works on, so it works on blocks of this many
# elements: on a CPU such that they stay in the cache, elsewhere such that they fill the device; fewer where the
# temporaries are all that is there in float32.
CPU_BLOCK, DEVICE_BLOCK, QUANTIZED_BLOCK = 2**18, 2**26, 2**24


def uses_foreach(params: list[Tensor], h: Hyperparameters, lr: float | Tensor) -> bool:
    """Whether tensors are stepped by this implementation: if asked for, and by default where torch's AdamW would."""
    if h.foreach is not None:
        return h.foreach
    _, foreach = _default_to_fused_or_foreach(params, h.differentiable, use_fused=False)
    # As in torch.optim: a tensor lr needs capturable for the multi-tensor path.
    return foreach and (h.capturable or not isinstance(lr, Tensor))


class TensorLists(NamedTuple):
    """Lists of tensors of one device and dtype, with one entry a tensor; empty where the settings have no such state.

    `grad_vars` are here only where masks are decided within a half of a step.
    """

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    max_exp_avg_sqs: list[Tensor]
    grad_vars: list[Tensor]
    exp_avg_signals: list[Tensor]


class ForeachStep:
    """A step on the tensors of one parameter group, in blocks.

    The step is computed in the dtype of `exp_avg_sqs` (float32 or more if `state_dtype` keeps them in less). What is
    kept in less is rounded once, when a half has formed it, and what the second half reads is never rounded between.

    Args:
        lists: the tensors; `grads` may be replaced before each step by others of the same layout.
        h: the settings.
        halves: whether masks are decided between the halves of a step.
        one_by_one: works on one tensor at a time, which needs less memory.
    """

    def __init__(self, lists: TensorLists, h: Hyperparameters, halves: bool, one_by_one: bool) -> None:
        self._h, self._halves = h, halves
        self._quantized = any(map(is_quantized, lists.exp_avgs))
        dtype = lists.exp_avg_sqs[0].dtype
        self._rounds = h.state_dtype != "float32" and dtype in REDUCED
        self._dtype = torch.promote_types(lists.params[0].dtype, torch.float32) if self._rounds else dtype
        self._lists = lists
        self.set_grads(lists.grads)
        # Whether the first half leaves m and v alone, and the second computes them: what it reads must not be rounded.
        # Without a pause between the halves for sums, that also spares the memory a second pass.
        self._by_adamw = fused_cpu.supports(lists, self._dtype, h)
        self._moments_last = not halves or self._by_adamw or self._rounds or lists.exp_avgs[0].dtype != self._dtype
        size = DEVICE_BLOCK if lists.params[0].device.type != "cpu" else CPU_BLOCK
        size = min(size, QUANTIZED_BLOCK) if self._quantized else size
        if self._by_adamw and fused_cpu.makes_no_temporaries(h) and not self._rounds:
            size = sum(x.numel() for x in lists.params)
        self._by_rows = h.masked and h.reduction == "per_row"
        self._cuts_rows = self._by_rows or self._quantized
        self._blocks = divide([x for x in lists if x], size, self._cuts_rows, one_by_one)

    def _take(self, block: list[tuple[int, slice | None]]) -> tuple[TensorLists, TensorLists]:
        """The shares of all lists in a block, as they are kept and as the step computes with them."""
        kept = TensorLists(*([cut(xs[i], span, self._cuts_rows) for i, span in block if xs] for xs in self._lists))
        # Promoted, as the variances of rows are more precise than the step
        if self._in_place:
            return kept, kept
        working = ([read(x, torch.promote_types(x.dtype, self._dtype)) for x in tensors] for tensors in kept)
        return kept, TensorLists(*working)

    def set_grads(self, grads: list[Tensor]) -> None:
        self._lists = self._lists._replace(grads=grads)
        dtypes = {xs[0].dtype for xs in self._lists if xs}
        # Whether the step computes with what is kept
        self._in_place = not self._quantized and all(torch.promote_types(x, self._dtype) == x for x in dtypes)

    def sums(self, scalars: masks.StepScalars) -> Tensor:
        """The first half: m and v, and Σ(g - center)² and Σm² of each unit, float64 `(units, 2)`.

        With `signal_beta` the signal's average advances, too, and its squares are summed in place of m².
        """
        sums = []
        for block in self._blocks:
            kept, working = self._take(block)
            c = scalars.take([i for i, _ in block])
            if self._moments_last and not self._by_adamw:  # these are to be thrown away
                working = working._replace(
                    exp_avgs=_copies(working.exp_avgs, kept.exp_avgs),
                    exp_avg_sqs=_copies(working.exp_avg_sqs, kept.exp_avg_sqs),
                )
            if self._by_adamw:
                sums.append(fused_cpu.unit_sums(working, c, self._h))
            else:
                sums.append(advance_moments(working, c, self._h, sums_wanted=True))
            for old, new in zip(kept.exp_avg_signals, working.exp_avg_signals, strict=True):
                write(old, new)
        sums = torch.cat(sums)
        if self._by_rows or len(sums) == len(self._lists.params):
            return sums
        spans = Counter(i for block in self._blocks for i, _ in block)  # of each tensor, in their order
        # Not by an index, which a CUDA graph could not upload and whose additions have no order on a device
        return torch.stack([part.sum(0) for part in sums.split(list(spans.values()))])

    def update(self, scalars: masks.StepScalars, lr: float | Tensor, eps: float, q: Tensor | None = None) -> None:
        """What of the moments is not there yet, decoupled weight decay, the masked update.

        `q` is needed if masks are decided between the halves: one of each unit, in the order of [`sums`].
        """
        row = 0
        for block in self._blocks:
            positions = [i for i, _ in block]
            c = scalars.take(positions)
            kept, working = self._take(block)
            q_of_block = q
            if q is not None and self._by_rows:  # blocks are of rows, in their order
                n = sum(map(masks.n_rows, working.params))
                q_of_block, row = q[row : row + n], row + n
            elif q is not None and len(self._blocks) > 1:
                q_of_block = torch.stack([q[i] for i in positions])
            if self._by_adamw:
                step_by_adamw(working, c, self._h, float(lr), eps, q_of_block, signal=not self._halves)
            else:
                if self._moments_last:
                    advance_moments(working, c, self._h, sums_wanted=False, signal=not self._halves)
                apply_update(working, c, self._h, lr, eps, q_of_block)
            self._keep(block, kept, working, c)

    def _keep(
        self, block: list[tuple[int, slice | None]], kept: TensorLists, working: TensorLists, c: masks.StepScalars
    ) -> None:
        """Writes what a step has computed elsewhere than in the tensors themselves."""
        if kept is working:
            return
        for name, old_ones, new_ones in zip(TensorLists._fields, kept, working, strict=True):
            if name == "grads" or (name == "exp_avg_signals" and self._halves):  # kept by the first half
                continue
            for (_, span), old, new, step in zip(block, old_ones, new_ones, c.step, strict=False):
                noise = None
                if self._rounds and name == "exp_avg_sqs":
                    in_row = new.numel() // max(masks.n_rows(new), 1) if self._cuts_rows else 1
                    noise = random_bits(new, 0 if span is None else span.start * in_row, step)
                write(old, new, noise)


def _copies(working: list[Tensor], kept: list[Tensor]) -> list[Tensor]:
    return [x.clone() if x is old else x for x, old in zip(working, kept, strict=True)]


def cut(tensor: Tensor | Quantized, span: slice | None, by_rows: bool) -> Tensor | Quantized:
    """A span of a tensor, see [`divide`]; shares its memory."""
    if span is None:
        return tensor
    return tensor[span] if by_rows else tensor.view(-1)[span]


def divide(
    lists: Sequence[list[Tensor]], size: int, by_rows: bool = False, one_by_one: bool = False
) -> list[list[tuple[int, slice | None]]]:
    """Tensors, of which several lists hold one each, in blocks of at most `size` elements where they can be cut.

    A block is a list of positions in the lists, with the span of a tensor that is taken apart: of elements, flattened,
    or `by_rows` of rows. With `one_by_one` a block is of one tensor.
    """
    blocks, filled = [[]], 0
    for i, tensor in enumerate(lists[0]):
        n = tensor.numel()
        length = masks.n_rows(tensor) if by_rows else n
        can_be_cut = length > 1 if by_rows else all(tensors[i].is_contiguous() for tensors in lists if tensors)
        spans = [None]
        if n > size and can_be_cut:
            stride = max(size * length // n, 1)
            spans = [slice(start, min(start + stride, length)) for start in range(0, length, stride)]
        for span in spans:
            part = n if span is None else (span.stop - span.start) * (n // length)
            if blocks[-1] and (filled + part > size or one_by_one):
                blocks.append([])
                filled = 0
            blocks[-1].append((i, span))
            filled += part
    return blocks


def advance_moments(
    x: TensorLists, c: masks.StepScalars, h: Hyperparameters, sums_wanted: bool, signal: bool = True
) -> Tensor | None:
    """m, v and, where there are `grad_vars`, s; unless not `signal`, also the signal's average.

    Returns:
        With `sums_wanted` Σ(g - center)² and Σm² of each unit (a tensor, or a row), float64 `(units, 2)`, with the
        signal's average for m if there is one.
    """
    grads, deviations = x.grads, None
    if h.maximize:
        grads = torch._foreach_neg(grads)
    if h.weight_decay != 0 and not h.decoupled_weight_decay:
        grads = torch._foreach_add(grads, x.params, alpha=h.weight_decay)
    if sums_wanted or x.grad_vars:
        centers = torch._foreach_mul(x.exp_avgs, c.center) if h.estimator == "debiased" else x.exp_avgs
        deviations = torch._foreach_sub(grads, centers)
        del centers
    torch._foreach_lerp_(x.exp_avgs, grads, 1 - h.beta1)
    torch._foreach_mul_(x.exp_avg_sqs, h.beta2)
    torch._foreach_addcmul_(x.exp_avg_sqs, grads, grads, 1 - h.beta2)
    if x.exp_avg_signals and signal:
        torch._foreach_lerp_(x.exp_avg_signals, grads, 1 - h.signal_beta)
    if sums_wanted:
        sums_of = row_sums_of_squares if h.reduction == "per_row" else sums_of_squares
        return torch.stack([sums_of(deviations), sums_of(x.exp_avg_signals or x.exp_avgs)], dim=1)
    if x.grad_vars:
        _advance_variances(x.grad_vars, deviations, c, h)
    return None


def _advance_variances(
    grad_vars: list[Tensor], deviations: list[Tensor], c: masks.StepScalars, h: Hyperparameters
) -> None:
    torch._foreach_mul_(grad_vars, h.variance_beta)
    if h.reduction != "per_row" and not isinstance(c.weight[0], Tensor):
        torch._foreach_addcmul_(grad_vars, deviations, deviations, c.weight)
        return
    squares = row_mean_squares(deviations) if h.reduction == "per_row" else torch._foreach_mul(deviations, deviations)
    torch._foreach_mul_(squares, c.weight)
    torch._foreach_add_(grad_vars, squares)


def apply_update(
    x: TensorLists, c: masks.StepScalars, h: Hyperparameters, lr: float | Tensor, eps: float, q: Tensor | None
) -> None:
    """w ← (1 - lr·λ) w - lr · q · m̂ / (√v̂ + eps), with `q` one a unit, or from `grad_vars`."""
    if h.weight_decay != 0 and h.decoupled_weight_decay:
        torch._foreach_mul_(x.params, 1 - lr / h.step_length * h.weight_decay)
    exp_avg_sqs = x.exp_avg_sqs
    if h.amsgrad:
        torch._foreach_maximum_(x.max_exp_avg_sqs, exp_avg_sqs)
        exp_avg_sqs = x.max_exp_avg_sqs
    updates, step_sizes = x.exp_avgs, [-lr / bias for bias in c.bias1]
    if h.masked and h.reduction == "per_param":
        updates = _masks(torch._foreach_mul(x.exp_avgs, x.exp_avgs), x.grad_vars, c, h)
        torch._foreach_mul_(updates, x.exp_avgs)
    elif h.masked and h.reduction == "per_row":
        updates = torch._foreach_mul(x.exp_avgs, _row_masks(x, c, h, q))
    elif h.masked and q.device.type == "cpu" and not is_fake(q) and not isinstance(step_sizes[0], Tensor):
        # spares a pass
        step_sizes = [size * of_tensor for size, of_tensor in zip(step_sizes, q.tolist(), strict=True)]
    elif h.masked:
        updates = torch._foreach_mul(x.exp_avgs, list(q.to(x.exp_avgs[0].dtype).unbind()))
    denoms = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denoms, [bias**0.5 for bias in c.bias2])
    torch._foreach_add_(denoms, eps)
    if isinstance(step_sizes[0], Tensor):
        torch._foreach_div_(updates := torch._foreach_mul(updates, step_sizes), denoms)
        torch._foreach_add_(x.params, updates)
    else:
        torch._foreach_addcdiv_(x.params, updates, denoms, step_sizes)


def step_by_adamw(
    x: TensorLists, c: masks.StepScalars, h: Hyperparameters, lr: float, eps: float, q: Tensor | None, signal: bool
) -> None:
    """[`advance_moments`] and [`apply_update`] by the kernel of torch's AdamW, see `fused_cpu.py`."""
    decay, n = h.weight_decay / h.step_length, len(x.params)
    if h.reduction == "per_tensor":
        scaled = [lr * of_tensor or 1e-300 for of_tensor in q.tolist()]  # with q = 0 weights decay, too
        fused_cpu.adamw(x.params, x, c, h, scaled, eps, [decay * lr / size for size in scaled])
        return
    grads = fused_cpu.ascended(x.grads, h)
    if x.grad_vars:
        _advance_variances(x.grad_vars, fused_cpu.deviations(grads, x.exp_avgs, c), c, h)
    if x.exp_avg_signals and signal:
        torch._foreach_lerp_(x.exp_avg_signals, grads, 1 - h.signal_beta)
    updates = [torch.zeros_like(p) for p in x.params]
    fused_cpu.adamw(updates, x, c, h, [lr] * n, eps, [0.0] * n)
    if decay:
        torch._foreach_mul_(x.params, 1 - lr * decay)
    if h.reduction == "per_param" and not any(c.first) and not any(c.open):
        fused_cpu.add_masked(x, updates, c, h)
    elif h.reduction == "per_param":
        qs = _masks(torch._foreach_mul(x.exp_avgs, x.exp_avgs), x.grad_vars, c, h)
        torch._foreach_addcmul_(x.params, updates, qs)
    else:
        torch._foreach_addcmul_(x.params, updates, _row_masks(x, c, h, q))


def _row_masks(x: TensorLists, c: masks.StepScalars, h: Hyperparameters, q: Tensor | None) -> list[Tensor]:
    """The masks of rows, given or from `grad_vars`, so that they can be multiplied with the tensors."""
    if q is None:
        qs = _masks(row_mean_squares(x.exp_avg_signals or x.exp_avgs), x.grad_vars, c, h)
    else:
        qs = q.split([masks.n_rows(m) for m in x.exp_avgs])
    return [masks.over_rows(q, m) for q, m in zip(qs, x.exp_avgs, strict=True)]


def _masks(signals: list[Tensor], grad_vars: list[Tensor], c: masks.StepScalars, h: Hyperparameters) -> list[Tensor]:
    """[`masks.compute_mask`] on lists, of m² or its means over rows, which the masks overwrite."""
    torch._foreach_mul_(signals, c.signal)
    noises = torch._foreach_mul(grad_vars, c.noise)
    if h.estimator == "debiased":
        torch._foreach_sub_(signals, noises if h.signal_beta is None else torch._foreach_mul(noises, c.floor))
        torch._foreach_clamp_min_(signals, 0)
    else:
        first_ratio = masks.first_noise_ratio(h)
        _overwrite(noises, c.first, lambda i: signals[i] * first_ratio)

    weight = h.softness
    if h.mask == "snr":
        weight *= h.noise_weight
    else:
        torch._foreach_sub_(signals, torch._foreach_mul(noises, h.noise_weight))
        torch._foreach_clamp_min_(signals, 0)
    if h.mask == "hard":
        torch._foreach_sign_(signals)
    else:
        if weight != 1:
            torch._foreach_mul_(noises, weight)
        torch._foreach_add_(noises, signals)
        torch._foreach_add_(noises, h.mask_epsilon)
        torch._foreach_div_(signals, noises)
    _overwrite(signals, c.open, lambda i: torch.ones_like(signals[i]))
    return signals


def _overwrite(tensors: list[Tensor], conditions: list, value) -> None:
    """tensors[i] ← value(i) where conditions[i] holds; with tensor conditions without reading them on the host."""
    for i, condition in enumerate(conditions):
        if isinstance(condition, Tensor):
            tensors[i].copy_(torch.where(condition, value(i), tensors[i]))
        elif condition:
            tensors[i].copy_(value(i))
