"""PRM on one whole tensor after another: the algorithm as it is meant to be read.

All other implementations are tested against this one. It also takes the steps of `foreach=False` (the default on a
CPU) and of `differentiable=True`, for autograd runs through it. Equation numbers are those of Litman & Guo,
*A Theory of Generalization in Deep Learning*, arXiv 2605.01172, Algorithm 1.
"""

from typing import Any

import torch
from torch import Tensor

from . import masks
from .hyperparameters import Hyperparameters, is_batched
from .reductions import row_sums_of_squares, sums_of_squares


def reference_step(
    param: Tensor,
    grad: Tensor,
    state: dict[str, Tensor],
    c: masks.StepScalars,
    h: Hyperparameters,
    lr: float | Tensor,
    eps: float,
) -> None:
    """One step of one parameter tensor, which changes `param` and `state` in place.

    Args:
        param, grad: the tensor and its gradient, of one shape.
        state: `exp_avg` (m), `exp_avg_sq` (v), with `amsgrad` `max_exp_avg_sq`, with `signal_beta` `exp_avg_signal`
            (a), each of the shape of `param`; unless `mask="none"` `grad_var` (s): of that shape for `per_param`,
            `(rows,)` for `per_row`, 0-dim for `per_tensor`.
        c: [`masks.step_scalars`] of this step: the bias corrections.
        h: the settings.
        lr, eps: the learning rate and Adam's epsilon, with `relative_eps` accounted for.
    """
    m, v = state["exp_avg"], state["exp_avg_sq"]
    if h.maximize:
        grad = -grad
    if h.has_decay and not h.decoupled_weight_decay:
        decay = h.weight_decay
        grad = grad.addcmul(_kept(param, h), decay) if isinstance(decay, Tensor) else grad.add(param, alpha=decay)

    # s ← ρ s + (1-ρ)(g - m)², with m before this step; in the mean over a row or a tensor where it has one mask value
    if h.masked:
        deviation = grad - _kept(m, h) * c.center
        _advance(state["grad_var"], h.variance_beta, _mean_squares(deviation, h) * c.weight)
    # m ← β1 m + (1-β1) g, v ← β2 v + (1-β2) g², a ← β_S a + (1-β_S) g
    _change(m, "lerp", grad, _weight(h.beta1, m))
    if isinstance(h.beta2, Tensor):  # autograd or vmap follows it
        _change(v, "lerp", grad.square(), _weight(h.beta2, v))
    else:
        _change(v.mul_(h.beta2), "addcmul", grad, grad, value=1 - h.beta2)
    if h.masked and h.signal_beta is not None:
        _change(state["exp_avg_signal"], "lerp", grad, 1 - h.signal_beta)

    # Weight decay is not masked
    if h.has_decay and h.decoupled_weight_decay:
        param.mul_(1 - lr / h.step_length * h.weight_decay)
    if h.amsgrad:
        v = torch.maximum(_kept(state["max_exp_avg_sq"], h), _kept(v, h))
        state["max_exp_avg_sq"].copy_(v)
    denominator = (v.sqrt() / c.bias2**0.5).add_(eps)

    # w ← w - η q m̂ / (√v̂ + ε)
    update, step_size = _kept(m, h), lr / c.bias1
    if h.masked:
        average = update if h.signal_beta is None else _kept(state["exp_avg_signal"], h)
        q = decide_mask(average, _kept(state["grad_var"], h), c, h)
        update = update * (masks.over_rows(q, update) if h.reduction == "per_row" else q.to(update.dtype))
    if isinstance(step_size, Tensor):
        _change(param, "addcdiv", update * -step_size, denominator)
    else:
        _change(param, "addcdiv", update, denominator, value=-step_size)


def decide_mask(average: Tensor, grad_var: Tensor, c: masks.StepScalars, h: Hyperparameters) -> Tensor:
    """q from the squared signal S and its noise N, eqs. 241-243, shaped as `grad_var`."""
    return masks.compute_mask(_mean_squares(average, h), grad_var, c, h)[0]


def _change(x: Tensor, operation: str, *args: Any, **kwargs: Any) -> None:
    """An operation in place. Under vmap, which has rules for these out of place alone, its result is copied back."""
    if is_batched(x):
        x.copy_(getattr(x, operation)(*args, **kwargs))
    else:
        getattr(x, f"{operation}_")(*args, **kwargs)


def _weight(beta: float | Tensor, x: Tensor) -> float | Tensor:
    weight = 1 - beta
    return weight.to(x.dtype) if isinstance(weight, Tensor) else weight


def _mean_squares(x: Tensor, h: Hyperparameters) -> Tensor:
    """x² in the mean over what has one mask value, shaped as `grad_var`."""
    if h.reduction == "per_param":
        return x.square()
    if h.reduction == "per_row":
        return row_sums_of_squares([x]) / max(masks.as_rows(x).shape[1], 1)
    return sums_of_squares([x])[0] / max(x.numel(), 1)


def _advance(average: Tensor, beta: float, x: Tensor) -> None:
    average.mul_(beta).add_(x)


def _kept(x: Tensor, h: Hyperparameters) -> Tensor:
    """`x` as autograd may keep it: the next step changes it in place."""
    return x.clone() if h.differentiable else x
