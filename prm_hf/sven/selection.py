"""The random part of the parameters that a step moves."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def draw_masks(
    params: list[nn.Parameter], fraction: float, by_block: bool, key: tuple[int, int]
) -> dict[nn.Parameter, Tensor]:
    """By parameter 1 where an element is drawn and 0 elsewhere; `int(fraction * elements)` are, and at least one.

    Args:
        params: the trained parameters.
        fraction: share of all their elements.
        by_block: draw tensors, in a random order until the number is reached, of the last one the first elements.
        key: a seed and the number of the step, which decide the masks on all devices and processes alike.
    """
    generator = torch.Generator().manual_seed(1_000_003 * key[0] + key[1])
    sizes = [p.numel() for p in params]
    left = max(1, int(fraction * sum(sizes)))
    if by_block:
        masks = [torch.zeros(size) for size in sizes]
        for i in torch.randperm(len(params), generator=generator).tolist():
            masks[i][:left] = 1
            left = max(0, left - sizes[i])
    else:
        flat = torch.zeros(sum(sizes))
        flat[torch.randperm(len(flat), generator=generator)[:left]] = 1
        masks = flat.split(sizes)
    return {p: mask.view(p.shape).to(p) for p, mask in zip(params, masks, strict=True)}
