"""The step of a block on a CPU by torch's own fused AdamW, which reads and writes each tensor once.

With one mask value q a tensor, a step of PRM is one of AdamW whose learning rate is q times, and whose weight decay is
1/q times as large. With one a row or an element, AdamW's kernel steps a tensor of zeros, which then holds AdamW's
update, and this times q is added to the weights. What is beyond AdamW's reads and writes works on blocks that are in
the cache.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..sharding import is_fake
from . import masks
from .hyperparameters import Hyperparameters
from .quantized import is_quantized
from .reductions import inner_products, row_sums_of_squares


if TYPE_CHECKING:
    from .foreach import TensorLists


TINY = torch.finfo(torch.float32).tiny  # what is less may be flushed to 0


def supports(lists: "TensorLists", dtype: torch.dtype, h: Hyperparameters) -> bool:
    """Whether tensors that are computed with in `dtype` can be stepped so."""
    tensors = [x for xs in lists[:5] for x in xs]  # all that AdamW has
    return (
        tensors[0].device.type == "cpu"
        and not any(is_fake(x) for x in lists.params)
        and dtype in (torch.float32, torch.float64)
        and all(torch.promote_types(x.dtype, dtype) == dtype for x in tensors)
        and all(is_quantized(x) or x.is_contiguous() for x in tensors)
        and h.masked  # without a mask the numbers are those of AdamW(foreach=True), bit for bit
        and not h.capturable
        and (h.decoupled_weight_decay or h.weight_decay == 0)
    )


def unit_sums(x: "TensorLists", c: masks.StepScalars, h: Hyperparameters) -> Tensor:
    """Σ(g - center)² and Σm² of each unit, float64 `(units, 2)`, with the m of after the step, which is not taken.

    With `signal_beta` the signal's average advances, and its squares are summed in place of m².
    """
    if h.reduction == "per_row":
        grads, averages = ascended(x.grads, h), x.exp_avg_signals
        if averages:
            torch._foreach_lerp_(averages, grads, 1 - h.signal_beta)
        else:
            averages = torch._foreach_lerp(x.exp_avgs, grads, 1 - h.beta1)
        return torch.stack(list(map(row_sums_of_squares, (deviations(grads, x.exp_avgs, c), averages))), dim=1)
    # Of a tensor both follow from three products, which are formed without writing anything
    gg, gm, mm = inner_products(x.grads, x.exp_avgs).unbind(1)
    if h.maximize:
        gm = -gm
    center = torch.tensor(c.center, dtype=gg.dtype, device=gg.device)
    beta, rest = h.beta1, 1 - h.beta1
    squares = (gg - 2 * center * gm + center**2 * mm).clamp(min=0)
    return torch.stack([squares, (beta**2 * mm + 2 * beta * rest * gm + rest**2 * gg).clamp(min=0)], dim=1)


def ascended(grads: list[Tensor], h: Hyperparameters) -> list[Tensor]:
    """The gradients of what is minimized."""
    return torch._foreach_neg(grads) if h.maximize else grads


def makes_no_temporaries(h: Hyperparameters) -> bool:
    """Whether a step with these settings needs no block to keep what it makes in the cache."""
    return h.reduction == "per_tensor"


def deviations(grads: list[Tensor], exp_avgs: list[Tensor], c: masks.StepScalars) -> list[Tensor]:
    """g - center, with m before the step."""
    return [torch.sub(g, m, alpha=center) for g, m, center in zip(grads, exp_avgs, c.center, strict=True)]


def adamw(
    params: list[Tensor],
    x: "TensorLists",
    c: masks.StepScalars,
    h: Hyperparameters,
    lrs: list[float],
    eps: float,
    decays: list[float],
) -> None:
    """A step of AdamW's kernel on each tensor: w ← (1 - lr·decay) w - lr·m̂ / (√v̂ + eps), and m and v."""
    maxima = x.max_exp_avg_sqs or [None] * len(params)
    tensors = zip(params, x.grads, x.exp_avgs, x.exp_avg_sqs, maxima, strict=True)
    steps = {t: torch.tensor(float(t) if h.bias_correction else torch.inf, device="cpu") for t in set(c.step)}
    for (p, g, m, v, maximum), t, lr, decay in zip(tensors, c.step, lrs, decays, strict=True):
        torch._fused_adamw_(
            [p],
            [g],
            [m],
            [v],
            [] if maximum is None else [maximum],
            [steps[t]],
            lr=lr,
            beta1=h.beta1,
            beta2=h.beta2,
            weight_decay=decay,
            eps=eps,
            amsgrad=h.amsgrad,
            maximize=h.maximize,
        )


def add_masked(x: "TensorLists", updates: list[Tensor], c: masks.StepScalars, h: Hyperparameters) -> None:
    r"""w ← w + q · update with one q an element, in as few passes as these functions of torch allow.

    All masks are :math:`E / (E + b s + \epsilon')` or the sign of :math:`E = \max(m^2 - a s, 0)`. Not for steps at
    which a mask is another: the first, and those of the warm-up.
    """
    is_snr = h.mask == "snr"
    below = (h.estimator == "debiased") * 1.0, 0.0 if is_snr else h.noise_weight  # times floor, and by itself
    weight = h.softness * (h.noise_weight if is_snr else 1)
    tensors = zip(x.params, updates, x.exp_avgs, x.grad_vars, c.signal, c.noise, c.floor, strict=True)
    for p, update, m, s, signal, noise, floor in tensors:
        excess = m * m
        if a := noise / signal * (below[0] * floor + below[1]):
            excess.sub_(s, alpha=a).clamp_min_(0)
        if h.mask == "hard":
            p.addcmul_(update, excess.sign_())
            continue
        total = torch.add(excess, s, alpha=noise / signal * weight)
        total.add_(max(h.mask_epsilon / signal, TINY))
        p.addcdiv_(excess.mul_(update), total)
