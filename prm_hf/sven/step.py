"""What a Sven step is made of: coefficients, the parameters that it moves, gradients, the check of the Jacobian."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .hyperparameters import SvenSettings
from .jacobian import Jacobian
from .pseudoinverse import Residuals, Solution, solve_gram, solve_rows


@dataclass(frozen=True)
class SvenStep(Solution):
    """A step, by the rows of M that it solves for.

    Attributes:
        residuals: R, `(rows,)`, float64.
    """

    residuals: Tensor

    def first(self, rank: int) -> SvenStep:
        """The same step with its first components alone."""
        return replace(self, components=self.components[:, :rank])


def solve(
    jacobian: Jacobian,
    residuals: Residuals,
    settings: SvenSettings,
    weights: Mapping[nn.Parameter, Tensor] | None = None,
    n_steps: int = 0,
) -> SvenStep:
    """The coefficients of the step on a batch whose samples have these gradients."""
    k = settings.most_components(len(residuals.values))
    if settings.svd == "gram":
        return solve_samples(jacobian.gram(weights=weights), residuals, settings)
    jacobian_rows = jacobian.rows(weights)
    rows = residuals.factors.to(jacobian_rows) @ jacobian_rows
    more = (settings.svd, settings.power_iterations, 1_000_003 * settings.seed + n_steps)
    solution = solve_rows(rows, residuals.values, k, settings.rtol, *more)
    return SvenStep(solution.components, solution.singular_values, residuals.values)


def solve_samples(gram: Tensor, residuals: Residuals, settings: SvenSettings) -> SvenStep:
    """The same from J Jᵀ, `(samples, samples)`."""
    factors = residuals.factors.to(gram.device)
    of_rows = (factors @ gram.double() @ factors.T).to(gram.dtype)
    k = settings.most_components(len(residuals.values))
    solution = solve_gram(of_rows, residuals.values, k, settings.rtol)
    return SvenStep(solution.components, solution.singular_values, residuals.values)


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


def call_model(model: nn.Module, x: Any, params: dict[str, Tensor] | None = None) -> Any:
    """What a model returns for x, or for `**x` where that is a mapping; with `params` in place of its own."""
    args, kwargs = ((), dict(x)) if isinstance(x, Mapping) else ((x,), {})
    return model(*args, **kwargs) if params is None else functional_call(model, params, args, kwargs)


def weighted_gradients(losses: Tensor, weights: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
    """Σ weights·∇losses by parameter, 0 where there is no influence; the graph of the losses is kept."""
    with torch.enable_grad():
        total = (weights.to(losses) * losses).sum()
    grads = torch.autograd.grad(total, params, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)]


def without_worse_components(
    step: SvenStep,
    direction: Callable[[Tensor], dict[nn.Parameter, Tensor]],
    mean_loss: Callable[[dict[nn.Parameter, Tensor]], Tensor],
    before: Tensor,
) -> SvenStep:
    """The step with the components before the first that brings the mean loss above that before the step.

    Args:
        step: the step with all its components.
        direction: from coefficients to what the step would subtract, without the learning rate.
        mean_loss: the mean loss of the batch after subtracting.
        before: the mean loss before the step.
    """
    total: dict[nn.Parameter, Tensor] = {}
    for rank, component in enumerate(step.components.T):
        total = {p: total[p] + grad if total else grad for p, grad in direction(component).items()}
        if not mean_loss(total) <= before:
            return step.first(rank)
    return step


def check_jacobian(jacobian: Jacobian, losses: Tensor, params: list[nn.Parameter], is_rounded: bool = False) -> None:
    """Raises ValueError unless J is the Jacobian of these losses, by the norm of Jᵀv for random signs v.

    It is not if samples depend on each other, or if a parameter is used outside its layer's `forward`. `is_rounded`
    says that the model computes in 16 bits, whatever the dtype of losses and parameters.
    """
    signs = torch.randint(2, losses.shape, generator=torch.Generator().manual_seed(0)).to(losses) * 2 - 1
    true = sum(grad.double().square().sum() for grad in weighted_gradients(losses, signs, params))
    found = signs.double() @ jacobian.gram().double() @ signs.double()
    is_rounded |= torch.is_autocast_enabled(losses.device.type) or any(x.dtype.itemsize < 4 for x in (losses, *params))
    tolerance = 0.1 if is_rounded else 1e-3
    are_finite = bool(torch.isfinite(found + true))  # the step says which value is not
    if are_finite and not torch.isclose(found, true, rtol=tolerance, atol=1e-30):
        raise ValueError(
            f"The per-sample gradients of the layers do not add up to the model's gradient (squared norms "
            f"{found.item():.6g} and {true.item():.6g}): samples depend on each other, or a parameter is used outside "
            'its layer\'s `forward`. Set `jacobian="loop"`, which takes a backward pass for each sample.'
        )
