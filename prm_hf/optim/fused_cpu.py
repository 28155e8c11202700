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
from .reductions import row_sums_of_squares, sums_of_squares


if TYPE_CHECKING:
    from .foreach import TensorLists


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
    grads = torch._foreach_neg(x.grads) if h.maximize else x.grads
    if h.reduction == "per_row":
        averages = x.exp_avg_signals
        if averages:
            torch._foreach_lerp_(averages, grads, 1 - h.signal_beta)
        else:
            averages = torch._foreach_lerp(x.exp_avgs, grads, 1 - h.beta1)
        return torch.stack(list(map(row_sums_of_squares, (deviations(grads, x.exp_avgs, c), averages))), dim=1)
    # Of a tensor both follow from three products, which are formed without writing anything
    gg, mm = sums_of_squares(grads), sums_of_squares(x.exp_avgs)
    gm = _dots(grads, x.exp_avgs)
    center = torch.tensor(c.center, dtype=gg.dtype, device=gg.device)
    beta, rest = h.beta1, 1 - h.beta1
    squares = (gg - 2 * center * gm + center**2 * mm).clamp(min=0)
    return torch.stack([squares, (beta**2 * mm + 2 * beta * rest * gm + rest**2 * gg).clamp(min=0)], dim=1)


def makes_no_temporaries(h: Hyperparameters) -> bool:
    """Whether a step with these settings needs no block to keep what it makes in the cache."""
    return h.reduction == "per_tensor" and not h.maximize


def _dots(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """Σxy of each of the tensors, float64 `(n,)`, from sums over 2**14 products, which are float32."""
    xs, ys = ([x.view(-1).split(2**14) for x in tensors] for tensors in (xs, ys))
    dots = [torch.dot(a, b) for x, y in zip(xs, ys, strict=True) for a, b in zip(x, y, strict=True)]
    dots, counts = torch.stack(dots).to(torch.float64), list(map(len, xs))
    if len(dots) == len(xs):
        return dots
    return torch.stack([part.sum() for part in dots.split(counts)])


def deviations(grads: list[Tensor], exp_avgs: list[Tensor], c: masks.StepScalars) -> list[Tensor]:
    """g - center, with m before the step."""
    return [torch.sub(g, m, alpha=center) for g, m, center in zip(grads, exp_avgs, c.center, strict=True)]


def adamw(
    params: list[Tensor],
    x: "TensorLists",
    c: masks.StepScalars,
    h: Hyperparameters,
    lr: float,
    eps: float,
    decay: float,
) -> None:
    """A step of AdamW's kernel: w ← (1 - lr·decay) w - lr·m̂ / (√v̂ + eps), and m and v."""
    steps = [torch.tensor(float(t) if h.bias_correction else torch.inf, device="cpu") for t in c.step]
    torch._fused_adamw_(
        params,
        x.grads,
        x.exp_avgs,
        x.exp_avg_sqs,
        x.max_exp_avg_sqs,
        steps,
        lr=lr,
        beta1=h.beta1,
        beta2=h.beta2,
        weight_decay=decay,
        eps=eps,
        amsgrad=h.amsgrad,
        maximize=h.maximize,
    )
