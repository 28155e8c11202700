"""PRM with the debiased estimator, written to be changed: one tensor after another, whole tensors, one process.

It is an optimizer of its own and shares nothing with `prm_hf.PRM` but the formulas of `prm_hf.optim.masks`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prm_hf.optim import masks
from prm_hf.optim.hyperparameters import Hyperparameters


def unit_masks(mean_sq: Tensor, var: Tensor, t: int, h: Hyperparameters) -> Tensor:
    """q of each unit at step `t`, counted from 1, `(units,)`.

    `mean_sq` is the mean over each unit of the squared average that the signal is estimated from, `var` of `grad_var`.
    """
    return masks.compute_mask(mean_sq, var, masks.step_scalars(t, h), h)[0]


def mean_square(x: Tensor, rows: bool) -> Tensor:
    """The mean square of each row (dimension 0) of a tensor that has rows, or of the tensor; float64 `(units,)`."""
    flat = x.flatten(1) if rows and x.dim() > 1 else x.reshape(1, -1)
    return flat.double().square().mean(1)


class SearchedPRM(torch.optim.Optimizer):
    """Debiased PRM with one mask value a tensor, and options that PRM does not have, or not together.

    A unit is what has one mask value. State of a parameter: `step`, `exp_avg`, `exp_avg_sq` (its shape), `grad_var`
    (float64 `(units,)`), with `signal_beta` `exp_avg_signal` (its shape), with `within_step` `signal_sq` (`(units,)`).

    Args:
        params: parameters or groups of them, whole tensors.
        lr, betas, variance_beta, eps, weight_decay, softness: as of `PRM`.
        rows: one mask value a row, dimension 0, for tensors that have rows.
        signal_beta: decay rate of a gradient average of its own, from which the signal is estimated; a slower one
            sees smaller signals. The mask weighs it against the noise of the average that is stepped with.
        keep_mean: q divided by its mean over all parameters, so that the mean step is AdamW's and selection remains.
        shuffle: the masks of a step dealt out anew, at random, to the rows of each tensor.
        fixed: masks to step with instead of those that are measured, one vector for each of `params`.
        pools: for each of `params` a number; those of the same number have one mask value, from their means together.
        within_step: signal and noise from the gradients of the step's micro-batches, two or more. Of K such gradients,
            each divided by K, Σ|g|² gives the unbiased variance N of their sum; S is the sum's square less N.

    Attributes:
        mean_qs: of each step, the mean mask over all parameters, before `keep_mean`.

    Raises:
        ValueError: options that exclude each other, or at the first step a single micro-batch with `within_step`.
    """

    def __init__(
        self,
        params,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        variance_beta: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        softness: float = 1.0,
        rows: bool = False,
        signal_beta: float | None = None,
        keep_mean: bool = False,
        shuffle: bool = False,
        fixed: list[Tensor] | None = None,
        pools: list[int] | None = None,
        within_step: bool = False,
    ) -> None:
        if within_step and (rows or signal_beta is not None):
            raise ValueError(
                "`within_step` measures its own signal, over whole tensors: leave out `rows` and `signal_beta`, got "
                f"{rows} and {signal_beta}."
            )
        if pools is not None and (rows or within_step):
            raise ValueError("`pools` have one mask value for several tensors: leave out `rows` and `within_step`.")
        defaults = dict(lr=lr, betas=betas, variance_beta=variance_beta, eps=eps, weight_decay=weight_decay)
        super().__init__(params, defaults)
        self.softness, self.rows, self.signal_beta = softness, rows, signal_beta
        self.keep_mean, self.shuffle, self.within_step = keep_mean, shuffle, within_step
        every = [p for group in self.param_groups for p in group["params"]]
        self.fixed = {} if fixed is None else dict(zip(every, fixed, strict=True))
        self.pools = {} if pools is None else dict(zip(every, pools, strict=True))
        self.mean_qs: list[Tensor] = []
        self._micro: dict[Tensor, tuple[Tensor, float, int]] = {}  # gradient so far, sum of squares, micro-batches
        if within_step:
            for p in every:
                p.register_post_accumulate_grad_hook(self._see)

    def _see(self, p: Tensor) -> None:
        before, squares, count = self._micro.get(p, (torch.zeros_like(p), 0.0, 0))
        squares += (p.grad - before).double().square().sum().item()
        self._micro[p] = p.grad.detach().clone(), squares, count + 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else torch.enable_grad()(closure)()
        groups = {p: group for group in self.param_groups for p in group["params"] if p.grad is not None}
        for p, group in groups.items():
            self._advance(p, self._settings(group))
        qs = {p: self._mask(p, self._settings(group)) for p, group in groups.items()}
        mean = sum(q.mean() * p.numel() for p, q in qs.items()) / sum(p.numel() for p in qs)
        self.mean_qs.append(mean)
        generator = torch.Generator().manual_seed(len(self.mean_qs))
        for p, group in groups.items():
            q = qs[p]
            if self.keep_mean:
                q = q / torch.where(mean > 0, mean, 1)
            if self.shuffle:
                q = q[torch.randperm(len(q), generator=generator).to(q.device)]
            self._update(p, group, q)
        self._micro.clear()
        return loss

    def _settings(self, group: dict[str, Any]) -> Hyperparameters:
        """The settings of the debiased `snr` mask, for the formulas."""
        own = {name: group[name] for name in ("betas", "variance_beta")}
        return Hyperparameters(signal_beta=self.signal_beta, softness=self.softness, **own)

    def _advance(self, p: Tensor, h: Hyperparameters) -> None:
        """Takes the gradient of a tensor into its state."""
        state, (beta1, beta2) = self.state[p], h.betas
        if not state:
            units = p.shape[0] if self.rows and p.dim() > 1 else 1
            state["step"] = 0
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["grad_var"] = torch.zeros(units, dtype=torch.float64, device=p.device)
            if self.signal_beta is not None:
                state["exp_avg_signal"] = torch.zeros_like(p)
            if self.within_step:
                state["signal_sq"] = torch.zeros_like(state["grad_var"])
        state["step"] += 1
        if self.within_step:
            square, variance = self._of_micro_batches(p)
            state["grad_var"].mul_(h.variance_beta).add_((1 - h.variance_beta) * variance)
            state["signal_sq"].mul_(beta1).add_((1 - beta1) * (square - variance))
        else:
            c = masks.step_scalars(state["step"], h)
            deviation = mean_square(p.grad - c.center * state["exp_avg"], self.rows)
            state["grad_var"].mul_(h.variance_beta).add_(c.weight * deviation)
        state["exp_avg"].lerp_(p.grad, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        if self.signal_beta is not None:
            state["exp_avg_signal"].lerp_(p.grad, 1 - self.signal_beta)

    def _of_micro_batches(self, p: Tensor) -> tuple[float, float]:
        """Mean square of the step's gradient over the tensor, and the mean of its unbiased variance."""
        total, squares, count = self._micro[p]
        if count < 2:
            raise ValueError(
                f"`within_step` needs two micro-batches a step or more, got {count}: raise "
                "`gradient_accumulation_steps`."
            )
        whole, total = p.grad.double().square().sum().item(), total.double().square().sum().item()
        clipped = whole / total if total > 0 else 0.0  # the square of the factor by which gradients were clipped
        variance = count / (count - 1) * (clipped * squares - whole / count)
        return whole / p.numel(), variance / p.numel()

    def _mask(self, p: Tensor, h: Hyperparameters) -> Tensor:
        """q of each unit of a tensor, from its state, or from the states of its pool."""
        state = self.state[p]
        if self.fixed:
            return self.fixed[p].to(p.device)
        if self.within_step:
            t = state["step"]
            signal = (state["signal_sq"] / (1 - h.beta1**t)).clamp(min=0)
            noise = masks.averaging_variance(h.beta1, t) * state["grad_var"] / (1 - h.variance_beta**t)
            return masks.mask_values(signal, noise, h)
        pool = [p]
        if self.pools:
            pool = [other for other, number in self.pools.items() if number == self.pools[p] and self.state[other]]
        key = "exp_avg" if self.signal_beta is None else "exp_avg_signal"
        numel = sum(other.numel() for other in pool)
        mean_sq = sum(mean_square(self.state[x][key], self.rows) * (x.numel() / numel) for x in pool)
        var = sum(self.state[x]["grad_var"] * (x.numel() / numel) for x in pool)
        return unit_masks(mean_sq, var, state["step"], h)

    def _update(self, p: Tensor, group: dict[str, Any], q: Tensor) -> None:
        state, (beta1, beta2) = self.state[p], group["betas"]
        t, q = state["step"], q.to(p.dtype)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        denominator = (state["exp_avg_sq"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
        update = state["exp_avg"] * (q.view(-1, *[1] * (p.dim() - 1)) if p.dim() else q[0])
        p.addcdiv_(update, denominator, value=-group["lr"] / (1 - beta1**t))
