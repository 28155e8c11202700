"""SGD with Polyak's step size, a baseline to Sven."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class PolyakSGD(Optimizer):
    """SGD whose learning rate is min((loss - f*) / (‖gradient‖² + eps), max_lr): Sven with one row, the mean loss.

    Args:
        params: the parameters, or groups of them, which share one step size.
        f_star: f*, the loss that can be reached. A loss below it makes no step.
        max_lr: the largest learning rate.
        eps: added to the squared norm of the gradient.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        f_star: float = 0.0,
        max_lr: float = 1.0,
        eps: float = 1e-8,
    ) -> None:
        for name, value in (("max_lr", max_lr), ("eps", eps)):
            if not 0 < value < float("inf"):
                raise ValueError(f"`{name}` must be above 0, got {value!r}.")
        super().__init__(params, {"f_star": f_star, "max_lr": max_lr, "eps": eps, "lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Makes a step; `closure` computes the loss and the gradients, and returns the loss. `lr` is the one used."""
        with torch.enable_grad():
            loss = closure()
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        squared_norm = sum(grad.double().square().sum() for grad in grads)
        for group in self.param_groups:
            rate = (float(loss) - group["f_star"]) / (float(squared_norm) + group["eps"])
            group["lr"] = min(max(rate, 0.0), group["max_lr"])
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"])
        return loss
