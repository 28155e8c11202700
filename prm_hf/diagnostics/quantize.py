"""Values to a few levels: the best levels by one-dimensional k-means, and fine-tuning with the levels in place."""

from collections.abc import Callable

import kmeans1d
import numpy as np
import torch

from .coding import Quantized


def quantize(values: torch.Tensor, levels: int) -> Quantized:
    """The levels with the least squared error, which is found exactly (Wu, 1991; by `kmeans1d`).

    Args:
        values: shape `(n,)`, any float dtype.
        levels: at most so many; fewer where there are fewer different values. The levels are rounded to float16.

    Raises:
        ValueError: a value is not finite.
    """
    array = values.detach().cpu().double().numpy()
    if not np.isfinite(array).all():
        raise ValueError("The weights are not finite: there is nothing to compress after training diverged.")
    k = min(levels, len(np.unique(array)))
    symbols, codebook = kmeans1d.cluster(array, k)
    with np.errstate(over="ignore"):  # `encode` says what is too large
        codebook = np.asarray(codebook).astype(np.float16)
    return Quantized(codebook, np.asarray(symbols, dtype=np.int32))


def nearest(values: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
    """The place of the nearest level of each value: `(n,)` and `(levels,)`, in any order, to int64 `(n,)`."""
    ordered, order = codebook.sort()
    return order[torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)]


class StraightThrough(torch.autograd.Function):
    """The nearest level of each value. The gradient goes to the values as it is, and its sums to the levels."""

    @staticmethod
    def forward(ctx, values: torch.Tensor, codebook: torch.Tensor) -> torch.Tensor:
        symbols = nearest(values, codebook)
        ctx.save_for_backward(symbols)
        ctx.levels = len(codebook)
        return codebook[symbols]

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (symbols,) = ctx.saved_tensors
        return grad, torch.zeros(ctx.levels, dtype=grad.dtype, device=grad.device).index_add(0, symbols, grad)


def fine_tune(
    values: torch.Tensor,
    quantized: Quantized,
    gradient: Callable[[torch.Tensor, int], torch.Tensor],
    steps: int,
    learning_rate: float,
) -> Quantized:
    """Quantisation-aware fine-tuning: Adam on the values and the levels, with the levels in the forward pass.

    Args:
        values: where to start, shape `(n,)`.
        quantized: their levels.
        gradient: from the levels of all values, `(n,)`, and the number of the step, to the gradient of the loss there.
        steps: number of steps.
        learning_rate: in units of the root mean square of `values`. It falls to 0 along a cosine.
    """
    moving = values.detach().float().clone().requires_grad_()
    codebook = torch.tensor(quantized.codebook.astype(np.float32), device=values.device, requires_grad=True)
    scale = moving.detach().square().mean().sqrt().item()
    optimizer = torch.optim.Adam([moving, codebook], lr=learning_rate * scale)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        optimizer.zero_grad()
        at_levels = StraightThrough.apply(moving, codebook)
        at_levels.backward(gradient(at_levels.detach(), step).to(at_levels))
        optimizer.step()
        schedule.step()
    symbols = nearest(moving.detach(), codebook.detach())
    return Quantized(codebook.detach().cpu().numpy().astype(np.float16), symbols.cpu().numpy().astype(np.int32))
