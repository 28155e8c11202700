"""The multi-tensor implementation of PRM's step: the numbers of `_single_tensor_*` in `step.py`, in fewer launches."""

import math

import torch
from torch import Tensor

from . import masks


def sums_of_squares(xs: list[Tensor]) -> Tensor:
    """Σx² of each of the tensors of one device, accumulated in float64 (float32 on Apple's GPUs). Shape `(n,)`.

    On a device the number of launches does not depend on n, but on the number of elements.

    Not in float32: the debiased estimator subtracts two such sums that are nearly equal where there is only noise, and
    a sum must not depend on how a tensor is split over processes. On a CPU, where float64 takes four times as long,
    the sums of 256 squares are float32, which leaves an error of about 1e-8 in the sum over a matrix.
    """
    dtype = masks.statistics_dtype(xs[0].device)
    if xs[0].device.type == "cpu":
        xs = [torch.linalg.vector_norm(x.view(-1, 256), dim=1) if _has_rows_of_256(x) else x for x in xs]
    return torch.stack(torch._foreach_norm(xs, 2, dtype)).square()


def _has_rows_of_256(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_contiguous() and x.numel() > 0 and x.numel() % 256 == 0


def row_mean_squares(x: Tensor) -> Tensor:
    """The means of x² over each row, [`masks.as_rows`], shape `(rows,)`; as precise as [`sums_of_squares`]."""
    rows = masks.as_rows(x)
    return _row_norms(rows).square() / max(rows.shape[1], 1)


def row_sums_of_squares(tensors: list[Tensor]) -> Tensor:
    """Σx² of each row of each of the tensors, `(all rows,)`; as precise as [`sums_of_squares`]."""
    return torch.cat([_row_norms(masks.as_rows(x)) for x in tensors]).square()


def split_by_rows(q: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Of a mask of all rows of all tensors, one after the other, what each of them can be multiplied with."""
    qs = q.split([masks.n_rows(x) for x in tensors])
    return [masks.over_rows(*pair) for pair in zip(qs, tensors, strict=True)]


def multi_row_mean_squares(tensors: list[Tensor]) -> list[Tensor]:
    """[`row_mean_squares`] of several tensors, with one launch a tensor."""
    rows = [masks.as_rows(x) for x in tensors]
    squares = [_row_norms(x) for x in rows]
    torch._foreach_mul_(squares, squares)
    torch._foreach_div_(squares, [max(x.shape[1], 1) for x in rows])
    return squares


def _row_norms(rows: Tensor) -> Tensor:
    # On a CPU the sums that are float32 are of 256, 128 or 64 squares, whatever divides the length of a row.
    dtype = masks.statistics_dtype(rows.device)
    if rows.device.type == "cpu" and rows.dtype == torch.float32 and rows.is_contiguous() and rows.numel():
        part = math.gcd(rows.shape[1], 256)
        if part >= 64:
            rows = torch.linalg.vector_norm(rows.unflatten(1, (-1, part)), dim=-1)
    return torch.linalg.vector_norm(rows, dim=1, dtype=dtype)


def _multi_tensor_moments(
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
    estimator: str,
    signal_beta: float | None,
    decoupled_weight_decay: bool,
    maximize: bool,
    **_,
) -> Tensor | None:
    """m, v, s and the signal's average. For `per_tensor` no s, but returns Σ(g - center)² and Σm², (tensors, 2).

    For rows in parts the same of each row, (rows, 2), with the signal's average for m if there is one.
    """
    if maximize:
        grads = torch._foreach_neg(grads)
    if weight_decay != 0 and not decoupled_weight_decay:
        grads = torch._foreach_add(grads, params, alpha=weight_decay)
    deviations = None
    if mask != "none":
        if estimator == "debiased":
            centers = torch._foreach_mul(exp_avgs, c.center)
            deviations = torch._foreach_sub(grads, centers)
            del centers
        else:
            deviations = torch._foreach_sub(grads, exp_avgs)
    torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
    torch._foreach_mul_(exp_avg_sqs, beta2)
    torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
    if mask == "none":
        return None
    if exp_avg_signals:
        torch._foreach_lerp_(exp_avg_signals, grads, 1 - signal_beta)
    if reduction == masks.ROWS_IN_PARTS:
        return torch.stack([row_sums_of_squares(xs) for xs in (deviations, exp_avg_signals or exp_avgs)], dim=1)
    if reduction == "per_row":
        variances = multi_row_mean_squares(deviations)
        torch._foreach_mul_(variances, c.weight)
        torch._foreach_mul_(grad_vars, rho)
        torch._foreach_add_(grad_vars, variances)
        return None
    if reduction == "per_param":
        torch._foreach_mul_(grad_vars, rho)
        if isinstance(c.weight[0], Tensor):
            torch._foreach_mul_(deviations, deviations)
            torch._foreach_mul_(deviations, c.weight)
            torch._foreach_add_(grad_vars, deviations)
        else:
            torch._foreach_addcmul_(grad_vars, deviations, deviations, c.weight)
        return None
    return torch.stack([sums_of_squares(deviations), sums_of_squares(exp_avgs)], dim=1)


def _multi_tensor_update(
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
    **hyper,
) -> None:
    """w ← (1 - lr·λ) w - lr · q · m̂ / (√v̂ + eps), `q` one a tensor, or from `grad_vars` one a parameter or a row.

    For rows in parts `q` is one a row.
    """
    if weight_decay != 0 and decoupled_weight_decay:
        torch._foreach_mul_(params, 1 - lr * weight_decay)
    if amsgrad:
        torch._foreach_maximum_(max_exp_avg_sqs, exp_avg_sqs)
        exp_avg_sqs = max_exp_avg_sqs
    updates, step_sizes = exp_avgs, [-lr / x for x in c.bias1]
    if q is not None and reduction == masks.ROWS_IN_PARTS:
        updates = torch._foreach_mul(exp_avgs, split_by_rows(q, exp_avgs))
    elif q is not None and q.device.type == "cpu" and not isinstance(step_sizes[0], Tensor):
        step_sizes = [x * y for x, y in zip(step_sizes, q.tolist(), strict=True)]  # spares a pass
    elif q is not None:
        updates = torch._foreach_mul(exp_avgs, list(q.to(exp_avgs[0].dtype).unbind()))
    elif mask != "none" and reduction == "per_row":
        squares = multi_row_mean_squares(exp_avg_signals or exp_avgs)
        qs = _multi_tensor_masks(squares, grad_vars, c, mask=mask, **hyper)
        updates = torch._foreach_mul(exp_avgs, [masks.over_rows(*pair) for pair in zip(qs, exp_avgs, strict=True)])
    elif mask != "none":
        updates = _multi_tensor_masks(torch._foreach_mul(exp_avgs, exp_avgs), grad_vars, c, mask=mask, **hyper)
        torch._foreach_mul_(updates, exp_avgs)
    denoms = torch._foreach_sqrt(exp_avg_sqs)
    torch._foreach_div_(denoms, [x**0.5 for x in c.bias2])
    torch._foreach_add_(denoms, eps)
    if isinstance(step_sizes[0], Tensor):
        torch._foreach_div_(updates := torch._foreach_mul(updates, step_sizes), denoms)
        torch._foreach_add_(params, updates)
    else:
        torch._foreach_addcdiv_(params, updates, denoms, step_sizes)


def _multi_tensor_masks(
    signals: list[Tensor],
    grad_vars: list[Tensor],
    c: masks.StepScalars,
    *,
    mask: str,
    estimator: str,
    signal_beta: float | None,
    softness: float,
    alpha: float,
    mask_eps: float,
    beta1: float,
    rho: float,
    bias_correction: bool,
    **_,
) -> list[Tensor]:
    """[`masks.compute_mask`] on lists, of m² or its means over rows, which the masks overwrite."""
    torch._foreach_mul_(signals, c.signal)
    noises = torch._foreach_mul(grad_vars, c.noise)
    if estimator == "debiased":
        torch._foreach_sub_(signals, noises if signal_beta is None else torch._foreach_mul(noises, c.floor))
        torch._foreach_clamp_min_(signals, 0)
    else:
        first_ratio = masks.first_noise_ratio(beta1, rho, bias_correction)
        _overwrite(noises, c.first, lambda i: signals[i] * first_ratio)

    if mask == "snr":
        if softness * alpha != 1:
            torch._foreach_mul_(noises, softness * alpha)
        torch._foreach_add_(noises, signals)
        torch._foreach_add_(noises, mask_eps)
        torch._foreach_div_(signals, noises)
    else:
        torch._foreach_sub_(signals, torch._foreach_mul(noises, alpha))
        torch._foreach_clamp_min_(signals, 0)
        if mask == "hard":
            torch._foreach_sign_(signals)
        else:
            torch._foreach_mul_(noises, softness)
            torch._foreach_add_(noises, signals)
            torch._foreach_add_(noises, mask_eps)
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
