"""What Sven brings to zero: the residuals R of a batch, made of the losses of its samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Residuals:
    """R = ℓ^(κ/2), ℓ the mean losses of groups of m samples, and what turns the gradients of the losses into R's.

    With J the gradients of the samples, those of R are M = D A J: A takes the means of the groups, and D has
    dR/dℓ = (κ/2) ℓ^(κ/2-1) on its diagonal.

    Attributes:
        values: R, `(rows,)`, float64.
        factors: D A, `(rows, samples)`, float64.
    """

    values: Tensor
    factors: Tensor


def residuals_of(losses: Tensor, kappa: float, microbatch_size: int = 1) -> Residuals:
    """The residuals of the losses of a batch, `(B,)`; the last group has what is left over.

    Where a loss is 0 and κ < 2, ℓ^(κ/2) has no gradient: the row is 0, so that the sample asks for nothing.

    Raises:
        ValueError: a loss is negative, infinite or NaN.
    """
    losses = losses.detach().double()
    if not bool(torch.isfinite(losses).all()):
        bad = losses[~torch.isfinite(losses)][0].item()
        raise ValueError(f"The loss of a sample is {bad}: lower the learning rate or set `max_norm`.")
    if bool((losses < 0).any()):
        raise ValueError(
            f"Sven brings losses to zero, and the loss of a sample is {losses.min().item():.4g}: use a loss that is "
            "not negative, as by adding a constant."
        )
    groups = torch.arange(len(losses), device=losses.device) // microbatch_size
    rows = torch.arange(int(groups[-1]) + 1, device=losses.device) if len(losses) else groups
    average = (rows.unsqueeze(1) == groups).double()
    average = average / average.sum(1, keepdim=True)
    mean = average @ losses
    slope = kappa / 2 * mean ** (kappa / 2 - 1)
    return Residuals(mean ** (kappa / 2), slope.nan_to_num(posinf=0.0).unsqueeze(1) * average)
