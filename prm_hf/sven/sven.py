"""The optimizer Sven for a plain loop: the minimum-norm step that lowers the loss of every sample at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .capture import Capture, JacobianMethod
from .hyperparameters import SvenSettings
from .step import (
    SvenStep,
    call_model,
    check_jacobian,
    draw_masks,
    solve,
    weighted_gradients,
    without_worse_components,
)


class Sven(Optimizer):
    r"""Sven (singular value descent, [arXiv 2604.01279](https://arxiv.org/abs/2604.01279)).

    With the losses ℓ of a batch's samples, R = ℓ^(κ/2) and M = ∂R/∂θ, a step is θ ← θ - lr·M⁺R, M⁺ the
    pseudo-inverse over the k largest singular values of M: to first order it brings all losses to zero at once, and no
    shorter step does. It is written as M⁺R = Mᵀc, with c from M Mᵀ, a matrix of the samples alone, so that a step
    costs two backward passes and M is not stored.

    Only trained parameters (`requires_grad`) take part. Parameters may be tied. Samples whose loss is 0, and samples
    without a gradient, ask for nothing.

    Args:
        model: any model whose samples do not depend on each other.
        loss_fn: from what the model returns and the rest of the batch to the loss of each sample, `(B,)`, at least 0.
        lr: learning rate; 1 is the whole step.
        k: the largest number of singular values that are used. By default half of the rows.
        rtol: singular values below this part of the largest are left out.
        kappa: κ. 2 brings the losses themselves to zero; 1 is Gauss-Newton for squared errors.
        svd: `"gram"` takes singular values from M Mᵀ; `"svd"` and `"randomized"` from M, which they store. These two
            are for `rtol` below 1e-3.
        power_iterations: of `"randomized"`.
        microbatch_size: samples whose mean loss is one row of M. The last row of a batch takes what is left.
        param_fraction: share of the trained elements that a step moves, drawn anew for each step.
        mask_by_block: draw whole tensors, the last one cut, in place of elements.
        variable_k: use as many singular values, up to `k`, as do not raise the mean loss above that before the step.
            Each of them costs a forward and a backward pass.
        rmsprop: `"before"` finds the step that is shortest in units of RMSprop's root mean square of the mean
            gradient; `"after"` makes RMSprop's step from M⁺R as gradient.
        rmsprop_alpha: decay of RMSprop's mean square.
        rmsprop_eps: added to its root.
        momentum: of RMSprop, for `rmsprop="after"`.
        max_norm: a longer M⁺R is shortened to this norm.
        jacobian: `"layers"` takes gradients from the inputs and outputs of layers; `"loop"` with a backward pass for
            each sample, for models that `"layers"` refuses.
        seed: of the drawn parameters and of `"randomized"`; with the number of the step it decides them.

    Attributes:
        last_step: the losses, singular values and coefficients of the last step.

    Raises:
        ValueError: an argument is out of its range, or contradicts another one.

    Example:

    ```python
    >>> optimizer = Sven(model, lambda outputs, y: (outputs - y).square().mean(1), lr=0.1)
    >>> for x, y in loader:
    ...     losses = optimizer.step((x, y))
    ```
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[..., Tensor],
        lr: float = 0.1,
        k: int | None = None,
        rtol: float = 1e-3,
        *,
        kappa: float = 2.0,
        svd: Literal["gram", "svd", "randomized"] = "gram",
        power_iterations: int = 1,
        microbatch_size: int = 1,
        param_fraction: float = 1.0,
        mask_by_block: bool = False,
        variable_k: bool = False,
        rmsprop: Literal["before", "after"] | None = None,
        rmsprop_alpha: float = 0.99,
        rmsprop_eps: float = 1e-8,
        momentum: float = 0.0,
        max_norm: float | None = None,
        jacobian: JacobianMethod = "layers",
        seed: int = 0,
    ) -> None:
        own = {
            "k": k, "rtol": rtol, "kappa": kappa, "svd": svd, "power_iterations": power_iterations,
            "microbatch_size": microbatch_size, "param_fraction": param_fraction, "mask_by_block": mask_by_block,
            "variable_k": variable_k, "rmsprop": rmsprop, "rmsprop_alpha": rmsprop_alpha, "rmsprop_eps": rmsprop_eps,
            "momentum": momentum, "max_norm": max_norm, "jacobian": jacobian, "seed": seed,
        }  # fmt: skip
        settings = SvenSettings(**own)
        settings.check()
        if not lr >= 0:
            raise ValueError(f"`lr` must be at least 0, got {lr}.")
        params = [p for p in model.parameters() if p.requires_grad]
        if not params:
            raise ValueError("No parameter of `model` has `requires_grad`: unfreeze some.")
        self.model, self.loss_fn = model, loss_fn
        self.last_step: SvenStep | None = None
        self._is_checked = False
        self._looped: set[nn.Parameter] = set()
        super().__init__(params, {"lr": lr, **own, "n_steps": 0})

    def __repr__(self) -> str:
        group = self.param_groups[0]
        return f"Sven({', '.join(f'{name}={group[name]!r}' for name in ('lr', *SvenSettings.names()))})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Sven solves for all parameters together, so that there is one group."""
        if self.param_groups:
            raise ValueError("Sven has one parameter group, because it solves for all parameters together.")
        super().add_param_group(param_group)

    @property
    def _settings(self) -> SvenSettings:
        return SvenSettings(**{name: self.param_groups[0][name] for name in SvenSettings.names()})

    @torch.no_grad()
    def step(self, batch: tuple[Any, ...]) -> Tensor:
        """Makes a step on a batch.

        Args:
            batch: `(x, *rest)`. The model is called with x, or with `**x` where that is a mapping, and `loss_fn` with
                what it returns and the rest.

        Returns:
            The losses before the step, `(B,)`, without their graph.

        Raises:
            ValueError: the losses have another shape, are negative or not finite; or the model is none whose gradients
                `jacobian="layers"` can see.
        """
        losses = self.backward(batch)
        group, settings = self.param_groups[0], self._settings
        for p in group["params"]:
            if settings.rmsprop == "after":
                p.sub_(group["lr"] * self._rmsprop(p, settings))
            else:
                p.sub_(p.grad, alpha=group["lr"])
        group["n_steps"] += 1
        return losses

    @torch.no_grad()
    def backward(self, batch: tuple[Any, ...]) -> Tensor:
        """Sets `p.grad` to M⁺R, for another optimizer to take a step with; arguments and return value as of `step`."""
        settings, params = self._settings, self.param_groups[0]["params"]
        with torch.enable_grad():
            with Capture(self.model, settings.jacobian, self._looped) as capture:
                losses = self._losses(batch)
            jacobian = capture.differentiate(losses)
        residuals = settings.residuals(losses)
        if not self._is_checked:
            check_jacobian(jacobian, losses, params)
            self._is_checked = True

        def gradients(coefficients: Tensor) -> list[Tensor]:
            return weighted_gradients(losses, residuals.factors.T @ coefficients, params)

        weights = self._weights(gradients, len(residuals.values))

        def direction(coefficients: Tensor) -> dict[nn.Parameter, Tensor]:
            found = zip(params, gradients(coefficients), strict=True)
            return {p: grad if weights is None else grad * weights[p] for p, grad in found}

        step = solve(jacobian, residuals, settings, weights, self.param_groups[0]["n_steps"])
        if settings.variable_k:
            step = without_worse_components(
                step, direction, lambda update: self._mean_loss(batch, update), losses.detach().mean()
            )
        for p, grad in direction(step.coefficients).items():
            p.grad = grad
        if settings.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, settings.max_norm)
        self.last_step = step
        return losses.detach()

    def _losses(self, batch: tuple[Any, ...], params: dict[str, Tensor] | None = None) -> Tensor:
        return self.loss_fn(call_model(self.model, batch[0], params), *batch[1:])

    def _weights(self, gradients: Callable[[Tensor], list[Tensor]], rows: int) -> dict[nn.Parameter, Tensor] | None:
        """By parameter the diagonal of H, of the step H Mᵀ(M H Mᵀ)⁺R; None for 1: drawn elements, and RMSprop's."""
        settings, params = self._settings, self.param_groups[0]["params"]
        weights = None
        if settings.param_fraction < 1:
            key = (settings.seed, self.param_groups[0]["n_steps"])
            weights = draw_masks(params, settings.param_fraction, settings.mask_by_block, key)
        if settings.rmsprop == "before":
            mean = gradients(torch.full((rows,), 1 / rows, dtype=torch.float64, device=params[0].device))
            scales = {p: self._root_mean_square(p, g, settings) for p, g in zip(params, mean, strict=True)}
            weights = {p: (1 if weights is None else weights[p]) / scales[p].square() for p in params}
        return weights

    def _root_mean_square(self, p: nn.Parameter, grad: Tensor, settings: SvenSettings) -> Tensor:
        state, alpha = self.state[p], settings.rmsprop_alpha
        square_avg = state.setdefault("square_avg", torch.zeros_like(p))
        square_avg.mul_(alpha).addcmul_(grad, grad, value=1 - alpha)
        return square_avg.sqrt().add_(settings.rmsprop_eps)

    def _rmsprop(self, p: nn.Parameter, settings: SvenSettings) -> Tensor:
        update = p.grad / self._root_mean_square(p, p.grad, settings)
        if not settings.momentum:
            return update
        buffer = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
        return buffer.mul_(settings.momentum).add_(update)

    def _mean_loss(self, batch: tuple[Any, ...], update: dict[nn.Parameter, Tensor]) -> Tensor:
        """The mean loss after an update, which is not made."""
        lr = self.param_groups[0]["lr"]
        named = {name: p for name, p in self.model.named_parameters() if p in update}
        return self._losses(batch, {name: p - lr * update[p] for name, p in named.items()}).mean()
