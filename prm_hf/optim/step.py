"""One PRM step on lists of tensors: the definition (`_single_tensor_*`), the functional form, and its two halves.

A step has two halves because of `reduction="per_tensor"`: between the moments and the update stand sums over a whole
tensor, parts of which may live in other processes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from . import masks
from .foreach import (
    _multi_tensor_moments,
    _multi_tensor_update,
    row_mean_squares,
    row_sums_of_squares,
    split_by_rows,
    sums_of_squares,
)
from .quantized import flat_slice, is_quantized, read, write


LOW_PRECISION = (torch.bfloat16, torch.float16)


def prm(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    grad_vars: list[Tensor],
    state_steps: list[Tensor],
    foreach: bool | None = None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    rho: float,
    eps: float,
    weight_decay: float,
    softness: float,
    alpha: float,
    mask: str,
    reduction: str,
    estimator: str,
    mask_eps: float,
    warmup_steps: int,
    amsgrad: bool,
    bias_correction: bool,
    decoupled_weight_decay: bool,
    maximize: bool,
    capturable: bool,
    differentiable: bool,
    signal_beta: float | None = None,
    exp_avg_signals: list[Tensor] | None = None,
) -> None:
    """Functional API of one PRM step on lists of tensors, updated in place. See [`PRM`] for the arguments.

    `params`, `grads`, `exp_avgs`, `exp_avg_sqs`, with `amsgrad` `max_exp_avg_sqs` and with `signal_beta`
    `exp_avg_signals` hold tensors of equal shapes; `grad_vars` such tensors too for `reduction="per_param"`, 0-dim
    ones for `"per_tensor"`, vectors with an entry a row for `"per_row"`, none for `mask="none"`; `state_steps` 0-dim
    tensors that count the steps before this one. `alpha` and `mask_eps` are numbers here.
    """
    hyper = {key: value for key, value in locals().items() if key in HYPERPARAMETERS}
    signals = exp_avg_signals or []
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, grad_vars, signals, state_steps)
    if params:
        torch._foreach_add_(state_steps, 1)
    for index in buckets(exp_avgs):
        step = ListStep(*([tensors[i] for i in index] if tensors else [] for tensors in lists), hyper, foreach)
        sums = step.moments()
        if step.per_tensor:
            q = tensor_masks(sums, [params[i].numel() for i in index], step.grad_vars, step.state_steps, hyper)
            step.update(q)
        else:
            step.update()


HYPERPARAMETERS = frozenset(
    {
        "lr",
        "beta1",
        "beta2",
        "rho",
        "eps",
        "weight_decay",
        "softness",
        "alpha",
        "mask",
        "reduction",
        "estimator",
        "signal_beta",
        "mask_eps",
        "warmup_steps",
        "amsgrad",
        "bias_correction",
        "decoupled_weight_decay",
        "maximize",
        "capturable",
        "differentiable",
    }
)


# The multi-tensor implementation makes several temporaries of the size of what it works on, so it works on blocks of
# this many elements: on a CPU such that they stay in the cache, elsewhere such that they fill the device; fewer where
# the temporaries are all that is there in float32.
CPU_BLOCK, DEVICE_BLOCK, QUANTIZED_BLOCK = 2**18, 2**26, 2**24


class ListStep:
    """A step on tensors of one device and one state dtype, in two halves. `state_steps` count this step already.

    The arguments are those of [`prm`]; with `hyper["reduction"] == "per_tensor"` `grad_vars` is not used by the
    halves but by [`tensor_masks`] between them. Nor is it for rows in parts, by [`row_masks`]; the tensors are then
    matrices.

    The step is computed in the dtype of `exp_avg_sqs` (float32 if they are quantized). What is kept in less is rounded
    once, when the step is done, and never between the halves.
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        grad_vars: list[Tensor],
        exp_avg_signals: list[Tensor],
        state_steps: list[Tensor],
        hyper: dict[str, Any],
        foreach: bool | None,
    ) -> None:
        if foreach is None:
            _, foreach = _default_to_fused_or_foreach(params, hyper["differentiable"], use_fused=False)
            # As in torch.optim: a tensor lr needs capturable for the multi-tensor path.
            foreach = foreach and (hyper["capturable"] or not isinstance(hyper["lr"], Tensor))
        self._hyper = hyper
        masked, reduction = hyper["mask"] != "none", hyper["reduction"]
        self.per_tensor = masked and reduction == "per_tensor"
        self._in_parts = masked and reduction == masks.ROWS_IN_PARTS
        self._per_row = masked and (reduction == "per_row" or self._in_parts)
        self._pauses = needs_sums(hyper)
        elementwise = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs)
        self._lists = (*elementwise, [] if self._pauses else grad_vars, exp_avg_signals)
        self.grad_vars, self.state_steps = grad_vars, state_steps
        self._quantized = any(map(is_quantized, exp_avgs))
        self._dtype = torch.float32 if self._quantized else exp_avg_sqs[0].dtype
        # Whether the first half leaves m and v alone, and the second computes them: what it reads must not be rounded.
        # Without a pause between the halves for sums, that also spares the memory a second pass.
        self._moments_last = not self._pauses or self._quantized or exp_avgs[0].dtype != self._dtype
        self._moments = _multi_tensor_moments if foreach else _single_tensor_moments
        self._update = _multi_tensor_update if foreach else _single_tensor_update
        self._scalars = scalar_lists(state_steps, hyper)
        size = DEVICE_BLOCK if params[0].device.type != "cpu" else CPU_BLOCK
        size = min(size, QUANTIZED_BLOCK) if self._quantized else size
        whole = [[(i, None) for i in range(len(params))]]
        self._blocks = divide(self._lists, size, self._per_row) if foreach or self._quantized else whole

    def _take(self, block: list[tuple[int, slice | None]]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
        """The parts of all lists in a block, as they are kept and as the step computes with them."""
        cut = Tensor.__getitem__ if self._per_row else flat_slice
        kept = [
            [tensors[i] if span is None else cut(tensors[i], span) for i, span in block] if tensors else []
            for tensors in self._lists
        ]
        # Promoted, as the variances of rows are more precise than the step
        return kept, [[read(x, torch.promote_types(x.dtype, self._dtype)) for x in tensors] for tensors in kept]

    def moments(self) -> Tensor | None:
        """For `per_tensor`: m and v, and Σ(g - center)² and Σm² of each tensor, float64 (n, 2).

        For rows in parts also the signal's average, and the sums of each row of each tensor.
        """
        if not self._pauses:
            return None
        sums, spans = [], [0] * len(self._lists[0])
        for block in self._blocks:
            kept, (params, grads, exp_avgs, exp_avg_sqs, *_, signals) = self._take(block)
            if self._moments_last:  # these are to be thrown away; the signal's average is never rounded
                exp_avgs, exp_avg_sqs = (
                    [x.clone() if x is old else x for x, old in zip(new, olds, strict=True)]
                    for new, olds in ((exp_avgs, kept[2]), (exp_avg_sqs, kept[3]))
                )
            scalars = self._scalars.take([i for i, _ in block])
            sums.append(self._moments(params, grads, exp_avgs, exp_avg_sqs, [], signals, scalars, **self._hyper))
            for i, _ in block:
                spans[i] += 1
        sums = torch.cat(sums)
        if self._in_parts or len(sums) == len(spans):
            return sums
        # Not by an index, which a CUDA graph could not upload and whose additions have no order on a device
        return torch.stack([part.sum(0) for part in sums.split(spans)])

    def update(self, q: Tensor | None = None) -> None:
        """What of the moments is not there yet, decoupled weight decay, the masked update.

        `q`, for `per_tensor`, has an entry for each tensor, for rows in parts one for each row of each tensor.
        """
        qs, row = None if q is None or self._in_parts else q.unbind(), 0
        for block in self._blocks:
            positions = [i for i, _ in block]
            scalars = self._scalars.take(positions)
            kept, working = self._take(block)
            params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, grad_vars, signals = working
            if self._moments_last:
                hyper = self._hyper if q is None else self._hyper | {"mask": "none"}  # no sums again
                self._moments(params, grads, exp_avgs, exp_avg_sqs, grad_vars, signals, scalars, **hyper)
            part = q
            if self._in_parts:  # blocks are of rows, in their order
                n = sum(map(masks.n_rows, params))
                part, row = q[row : row + n], row + n
            elif q is not None and len(self._blocks) > 1:
                part = torch.stack([qs[i] for i in positions])
            state = exp_avgs, exp_avg_sqs, max_exp_avg_sqs, grad_vars, signals
            self._update(params, *state, part, scalars, **self._hyper)
            for olds, news in zip(kept, working, strict=True):
                if olds is not kept[1]:  # gradients stay
                    for old, new in zip(olds, news, strict=True):
                        write(old, new)


def needs_sums(hyper: dict[str, Any]) -> bool:
    """Whether between the halves of a step stand sums over tensors, or over rows that are held in parts."""
    return hyper["mask"] != "none" and hyper["reduction"] in ("per_tensor", masks.ROWS_IN_PARTS)


def divide(lists: Sequence[list[Tensor]], size: int, by_rows: bool = False) -> list[list[tuple[int, slice | None]]]:
    """Tensors, of which several lists hold one each, in blocks of at most `size` elements where they can be cut.

    A block is a list of positions in the lists, with the span of a tensor that is taken apart: of elements, flattened,
    or `by_rows` of rows.
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
            if blocks[-1] and filled + part > size:
                blocks.append([])
                filled = 0
            blocks[-1].append((i, span))
            filled += part
    return blocks


def tensor_masks(
    sums: Tensor, numels: list[int], grad_vars: list[Tensor], state_steps: list[Tensor], hyper: dict[str, Any]
) -> Tensor:
    """One q a tensor, float64 (n,), from the sums of [`ListStep.moments`] over the tensors; updates `grad_vars`.

    The mean over a tensor commutes with the moving average, so `grad_var` is the average of the means: one scalar.
    """
    device = sums.device

    def vector(values: list) -> Tensor:
        if hyper["capturable"]:
            return torch.stack(values)
        return torch.tensor(values, dtype=torch.bool if isinstance(values[0], bool) else sums.dtype)

    c = scalar_lists(state_steps, hyper)
    c = masks.StepScalars(*(vector(values).to(device, non_blocking=True) for values in c))
    numels = torch.tensor(numels, dtype=sums.dtype).to(device, non_blocking=True)
    means = sums / numels.clamp(min=1).unsqueeze(1)
    q, var = masks_of_means(means, torch.stack(grad_vars), c, hyper)
    if hyper["differentiable"]:
        for grad_var, value in zip(grad_vars, var.unbind(), strict=True):
            grad_var.copy_(value)
    else:
        torch._foreach_copy_(grad_vars, list(var.unbind()))
    return q


def row_masks(
    sums: Tensor, tensors: list[tuple[int, int]], grad_vars: list[Tensor], state_steps: list[Tensor], hyper: dict
) -> Tensor:
    """One q a row, float64 (rows,), from the sums of [`ListStep.moments`] over whole rows; updates `grad_vars`.

    `tensors` has the rows of each tensor and the elements of one of its rows; `grad_vars` hold a value a row.
    """
    counts = torch.tensor([rows for rows, _ in tensors])

    def over_rows(values: Tensor) -> Tensor:
        # The size is given, or the host would wait for the device to know it
        repeated = values.repeat_interleave(counts.to(values.device), output_size=len(sums))
        return repeated.to(sums.device, sums.dtype, non_blocking=True)

    in_row = over_rows(torch.tensor([max(n, 1) for _, n in tensors]))
    steps = torch.stack(state_steps)
    ages = None if hyper["capturable"] else set(steps.tolist())
    c = scalars_of(ages.pop() if ages is not None and len(ages) == 1 else over_rows(steps), hyper)
    q, var = masks_of_means(sums / in_row.unsqueeze(1), torch.cat(grad_vars), c, hyper)
    torch._foreach_copy_(grad_vars, list(var.split([rows for rows, _ in tensors])))
    return q


def masks_of_means(means: Tensor, var: Tensor, c: masks.StepScalars, hyper: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """q and the next `grad_var`, float64 (n,), from the means of (g - center)² and m², (n, 2), and the last one."""
    var = hyper["rho"] * var + c.weight * means[:, 0]
    return masks.compute_mask(means[:, 1], var, c, **mask_arguments(hyper))[0], var


def _single_tensor_moments(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_vars: list[Tensor],
    exp_avg_signals: list[Tensor],
    c: masks.StepScalars,
    *,
    beta1: float,
    beta2: float,
    rho: float,
    weight_decay: float,
    mask: str,
    reduction: str,
    signal_beta: float | None,
    decoupled_weight_decay: bool,
    maximize: bool,
    differentiable: bool,
    **_,
) -> Tensor | None:
    """m, v, s and the signal's average; what it returns is as of `_multi_tensor_moments`."""
    sums = []
    for i, param in enumerate(params):
        grad = -grads[i] if maximize else grads[i]
        if weight_decay != 0 and not decoupled_weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        deviation = None if mask == "none" else grad - exp_avgs[i] * c.center[i]
        exp_avgs[i].lerp_(grad, 1 - beta1)
        exp_avg_sqs[i].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if mask == "none":
            continue
        if exp_avg_signals:
            exp_avg_signals[i].lerp_(grad, 1 - signal_beta)
        if reduction == masks.ROWS_IN_PARTS:
            average = exp_avg_signals[i] if exp_avg_signals else exp_avgs[i]
            sums.append(torch.stack([row_sums_of_squares([x]) for x in (deviation, average)], dim=1))
        elif reduction != "per_tensor":
            square = deviation.square() if reduction == "per_param" else row_mean_squares(deviation)
            grad_vars[i].mul_(rho).add_(square * c.weight[i])
        else:
            # Autograd keeps what it needs of m, which the next step changes in place.
            m = exp_avgs[i].clone() if differentiable else exp_avgs[i]
            sums.append(sums_of_squares([deviation, m]).unsqueeze(0))
    return torch.cat(sums) if sums else None


def _single_tensor_update(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    grad_vars: list[Tensor],
    exp_avg_signals: list[Tensor],
    q: Tensor | None,
    c: masks.StepScalars,
    *,
    lr: float | Tensor,
    eps: float,
    weight_decay: float,
    mask: str,
    reduction: str,
    amsgrad: bool,
    decoupled_weight_decay: bool,
    differentiable: bool,
    **hyper,
) -> None:
    """As `_multi_tensor_update`."""
    if q is not None and reduction == masks.ROWS_IN_PARTS:
        q = split_by_rows(q, exp_avgs)
    for i, param in enumerate(params):
        if weight_decay != 0 and decoupled_weight_decay:
            param.mul_(1 - lr * weight_decay)
        m = exp_avgs[i].clone() if differentiable else exp_avgs[i]
        v = exp_avg_sqs[i]
        if amsgrad:
            v = torch.maximum(max_exp_avg_sqs[i], v)
            max_exp_avg_sqs[i].copy_(v)
        denom = (v.sqrt() / c.bias2[i] ** 0.5).add_(eps)
        step_size = lr / c.bias1[i]
        update = m
        if mask != "none":
            if q is not None:
                update = m * q[i].to(m.dtype)
            else:
                arguments = mask_arguments({"mask": mask, **hyper})
                s = grad_vars[i].clone() if differentiable else grad_vars[i]
                average = m
                if exp_avg_signals:
                    average = exp_avg_signals[i].clone() if differentiable else exp_avg_signals[i]
                squares = average.square() if reduction == "per_param" else row_mean_squares(average)
                own_q = masks.compute_mask(squares, s, c.select(i), **arguments)[0]
                update = m * (own_q if reduction == "per_param" else masks.over_rows(own_q, m))
        if isinstance(step_size, Tensor):
            param.addcdiv_(update * -step_size, denom)
        else:
            param.addcdiv_(update, denom, value=-step_size)


def scalars_of(t: float | Tensor, hyper: dict[str, Any]) -> masks.StepScalars:
    """[`masks.step_scalars`] of the step or steps `t` under a group's settings."""
    keys = ("beta1", "beta2", "rho", "estimator", "bias_correction", "warmup_steps", "signal_beta")
    return masks.step_scalars(t, **{key: hyper[key] for key in keys})


def scalar_lists(state_steps: list[Tensor], hyper: dict[str, Any]) -> masks.StepScalars:
    """The scalars of each step as lists, of numbers, or with `capturable` of 0-dim tensors on the steps' device."""
    if hyper["capturable"]:
        t = torch.stack(state_steps).to(masks.statistics_dtype(state_steps[0].device))
        return masks.StepScalars(*(list(x.unbind()) for x in scalars_of(t, hyper)))
    steps = torch.stack(state_steps).tolist()
    by_step = {t: scalars_of(t, hyper) for t in set(steps)}  # all the same, but for tensors that skipped some
    return masks.StepScalars(*map(list, zip(*(by_step[t] for t in steps), strict=True)))


def mask_arguments(hyper: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of [`masks.compute_mask`] under a group's settings."""
    arguments = {key: hyper[key] for key in ("mask", "estimator", "alpha", "softness", "mask_eps")}
    arguments["first_ratio"] = masks.first_noise_ratio(hyper["beta1"], hyper["rho"], hyper["bias_correction"])
    return arguments


def buckets(tensors: list[Tensor]) -> list[list[int]]:
    """The positions of the tensors of each device and dtype: what one multi-tensor kernel can take."""
    positions = {}
    for i, tensor in enumerate(tensors):
        positions.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(positions.values())
