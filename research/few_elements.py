"""How often is the mask of a tensor of n independent elements 0? The tables of results/few_elements.md.

    python research/few_elements.py    # minutes on one core

Each row of one parameter is a tensor of its own: with `reduction="per_row"` it has a mask of its own.
"""

import math

import torch
from torch import Tensor

from prm_hf import PRM


SIZES = (1, 2, 4, 8, 16, 32, 64, 512)
SNRS = (0.1, 0.01, 0.0)  # the mean square of the elements' mean gradients, over their variance
STEPS, SETTLED = 200, 100  # masks are counted after `SETTLED` steps


class Observed(PRM):
    """PRM that notes which masks are 0, of each step `(units,)`."""

    def transform_unit_masks(self, q: Tensor) -> Tensor:
        self.zeros = [*getattr(self, "zeros", ()), q == 0]
        return q


def closed_masks(n: int, snr: float, tensors: int = 4000, steps: int = STEPS) -> Tensor:
    """Which masks are 0, boolean `(steps, tensors)`, of tensors of `n` elements with the default settings."""
    generator = torch.Generator().manual_seed(0)
    mean = math.sqrt(snr) * torch.randn(tensors, n, generator=generator)
    p = torch.nn.Parameter(torch.zeros(tensors, n))
    optimizer = Observed([p], mask_min_elements=0)
    for _ in range(steps):
        p.grad = mean + torch.randn(tensors, n, generator=generator)
        optimizer.step()
    return torch.stack(optimizer.zeros)


def main() -> None:
    """Prints a row for each signal, and how many tensors without one never move."""
    print("| n |", " | ".join(map(str, SIZES)), "|")
    for snr in SNRS:
        closed = [closed_masks(n, snr) for n in SIZES]
        print(f"| snr {snr:g} |", " | ".join(f"{zeros[SETTLED:].double().mean():.2f}" for zeros in closed), "|")
    for steps in (10, 50):
        stay = [f"{zeros[:steps].all(0).double().mean():.4f}" for zeros in closed]
        print(f"| no signal, 0 in all of the first {steps} steps |", " | ".join(stay), "|")


if __name__ == "__main__":
    main()
