"""One PRM step on lists of tensors: the definition (`_single_tensor_*`), the functional form, and its two halves.

A step has two halves because of `reduction="per_tensor"`: between the moments and the update stand sums over a whole
tensor, parts of which may live in other processes.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _default_to_fused_or_foreach

from . import masks
from .foreach import _multi_tensor_moments, _multi_tensor_update, sum_of_squares


LOW_PRECISION = (torch.bfloat16, torch.float16)


def prm(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    grad_vars: list[Tensor],
    state_steps: list[Tensor],
    foreach: bool | None = None,
    *,
    lr: float | Tensor,
    beta1: float,
    beta2: float,
    rho: float,
    eps: float,
    weight_decay: float,
    softness: float,
    alpha: float,
    mask: str,
    reduction: str,
    estimator: str,
    mask_eps: float,
    warmup_steps: int,
    amsgrad: bool,
    bias_correction: bool,
    decoupled_weight_decay: bool,
    maximize: bool,
    capturable: bool,
    differentiable: bool,
) -> None:
    """Functional API of one PRM step on lists of tensors, updated in place. See [`PRM`] for the arguments.

    `params`, `grads`, `exp_avgs`, `exp_avg_sqs` and, with `amsgrad`, `max_exp_avg_sqs` hold tensors of equal shapes;
    `grad_vars` such tensors too for `reduction="per_param"`, 0-dim ones for `"per_tensor"`, none for `mask="none"`;
    `state_steps` 0-dim tensors that count the steps before this one. `alpha` and `mask_eps` are numbers here.
    """
    hyper = {key: value for key, value in locals().items() if key in HYPERPARAMETERS}
    lists = (params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, grad_vars, state_steps)
    if params:
        torch._foreach_add_(state_steps, 1)
    for index in buckets(exp_avgs):
        step = ListStep(*([tensors[i] for i in index] if tensors else [] for tensors in lists), hyper, foreach)
        sums = step.moments()
        if step.per_tensor:
            q = tensor_masks(sums, [params[i].numel() for i in index], step.grad_vars, step.state_steps, hyper)
            step.update(q)
        else:
            step.update()


HYPERPARAMETERS = frozenset(
    {
        "lr",
        "beta1",
        "beta2",
        "rho",
        "eps",
        "weight_decay",
        "softness",
        "alpha",
        "mask",
        "reduction",
        "estimator",
        "mask_eps",
        "warmup_steps",
        "amsgrad",
        "bias_correction",
        "decoupled_weight_decay",
        "maximize",
        "capturable",
        "differentiable",
    }
)


# The multi-tensor implementation makes several temporaries of the size of what it works on. On a CPU it works on
# blocks that stay in the cache with them, elsewhere on as many tensors as fill the device.
CPU_BLOCK, CPU_BLOCKS, DEVICE_BLOCK = 2**16, 4, 2**26


class ListStep:
    """A step on tensors of one device and one state dtype, in two halves. `state_steps` count this step already.

    The arguments are those of [`prm`]; with `hyper["reduction"] == "per_tensor"` `grad_vars` is not used by the
    halves but by [`tensor_masks`] between them.
    """

    def __init__(
        self,
        params: list[Tensor],
        grads: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
        max_exp_avg_sqs: list[Tensor],
        grad_vars: list[Tensor],
        state_steps: list[Tensor],
        hyper: dict[str, Any],
        foreach: bool | None,
    ) -> None:
        if foreach is None:
            _, foreach = _default_to_fused_or_foreach(params, hyper["differentiable"], use_fused=False)
            # As in torch.optim: a tensor lr needs capturable for the multi-tensor path.
            foreach = foreach and (hyper["capturable"] or not isinstance(hyper["lr"], Tensor))
        self._foreach = foreach
        self._hyper = hyper
        self.per_tensor = hyper["mask"] != "none" and hyper["reduction"] == "per_tensor"
        self._params, self._grads, self._exp_avgs, self._exp_avg_sqs = params, grads, exp_avgs, exp_avg_sqs
        self._max_exp_avg_sqs, self.grad_vars, self.state_steps = max_exp_avg_sqs, grad_vars, state_steps
        self._scalars = scalar_lists(state_steps, hyper)
        self._blocks = self._divide() if foreach else [[(i, None) for i in range(len(params))]]

    def _divide(self) -> list[list[tuple[int, slice | None]]]:
        """The tensors in blocks: each a list of positions, with the span of a tensor that is taken apart."""
        cpu = self._params[0].device.type == "cpu"
        lists = [self._params, self._grads, self._exp_avgs, self._exp_avg_sqs, self._max_exp_avg_sqs]
        lists = [tensors for tensors in (*lists, [] if self.per_tensor else self.grad_vars) if tensors]
        blocks, filled = [[]], 0
        for i, param in enumerate(self._params):
            n = param.numel()
            spans = [None]
            if cpu and n > CPU_BLOCK and all(tensors[i].is_contiguous() for tensors in lists):
                spans = [slice(start, min(start + CPU_BLOCK, n)) for start in range(0, n, CPU_BLOCK)]
            for span in spans:
                size = n if span is None else span.stop - span.start
                if blocks[-1] and filled + size > (CPU_BLOCK * CPU_BLOCKS if cpu else DEVICE_BLOCK):
                    blocks.append([])
                    filled = 0
                blocks[-1].append((i, span))
                filled += size
        return blocks

    def _take(self, tensors: list[Tensor], block: list[tuple[int, slice | None]]) -> list[Tensor]:
        if not tensors:
            return []
        return [tensors[i] if span is None else tensors[i].view(-1)[span] for i, span in block]

    def _in_state_dtype(self, tensors: list[Tensor]) -> list[Tensor]:
        """Gradients and parameters of low precision in the dtype of their state, in which the step is computed."""
        dtype = self._exp_avgs[0].dtype
        return [x if x.dtype == dtype else x.to(dtype) for x in tensors]

    def moments(self) -> Tensor | None:
        """m, v and, for `per_param`, s. For `per_tensor`: Σ(g - center)² and Σm² of each tensor, float64 (n, 2)."""
        function = _multi_tensor_moments if self._foreach else _single_tensor_moments
        sums, owners = [], []
        for block in self._blocks:
            part = function(
                self._in_state_dtype(self._take(self._params, block)),
                self._in_state_dtype(self._take(self._grads, block)),
                self._take(self._exp_avgs, block),
                self._take(self._exp_avg_sqs, block),
                [] if self.per_tensor else self._take(self.grad_vars, block),
                self._scalars.take([i for i, _ in block]),
                **self._hyper,
            )
            if self.per_tensor:
                sums.append(part)
                owners += [i for i, _ in block]
        if not self.per_tensor:
            return None
        sums = torch.cat(sums)
        if len(owners) == len(self._params):
            return sums
        return sums.new_zeros(len(self._params), 2).index_add_(0, torch.tensor(owners, device=sums.device), sums)

    def update(self, q: Tensor | None = None) -> None:
        """Decoupled weight decay and the masked update. `q`, for `per_tensor`, has an entry for each tensor."""
        function = _multi_tensor_update if self._foreach else _single_tensor_update
        for block in self._blocks:
            positions = [i for i, _ in block]
            params = self._take(self._params, block)
            working = self._in_state_dtype(params)
            function(
                working,
                self._take(self._exp_avgs, block),
                self._take(self._exp_avg_sqs, block),
                self._take(self._max_exp_avg_sqs, block),
                [] if self.per_tensor else self._take(self.grad_vars, block),
                q if q is None or len(self._blocks) == 1 else q[positions],
                self._scalars.take(positions),
                **self._hyper,
            )
            for param, updated in zip(params, working, strict=True):
                if updated is not param:
                    param.copy_(updated)  # rounded once


def tensor_masks(
    sums: Tensor, numels: list[int], grad_vars: list[Tensor], state_steps: list[Tensor], hyper: dict[str, Any]
) -> Tensor:
    """One q a tensor, float64 (n,), from the sums of [`ListStep.moments`] over the tensors; updates `grad_vars`.

    The mean over a tensor commutes with the moving average, so `grad_var` is the average of the means: one scalar.
    """
    device = sums.device

    def vector(values: list) -> Tensor:
        if hyper["capturable"]:
            return torch.stack(values)
        return torch.tensor(values, dtype=torch.bool if isinstance(values[0], bool) else sums.dtype)

    c = scalar_lists(state_steps, hyper)
    c = masks.StepScalars(*(vector(values).to(device, non_blocking=True) for values in c))
    numels = torch.tensor(numels, dtype=sums.dtype).to(device, non_blocking=True)
    means = sums / numels.clamp(min=1).unsqueeze(1)
    var = hyper["rho"] * torch.stack(grad_vars) + c.weight * means[:, 0]
    if hyper["differentiable"]:
        for grad_var, value in zip(grad_vars, var.unbind(), strict=True):
            grad_var.copy_(value)
    else:
        torch._foreach_copy_(grad_vars, list(var.unbind()))
    return masks.compute_mask(means[:, 1], var, c, **mask_arguments(hyper))[0]


def _single_tensor_moments(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_vars: list[Tensor],
    c: masks.StepScalars,
    *,
    beta1: float,
    beta2: float,
    rho: float,
    weight_decay: float,
    mask: str,
    reduction: str,
    decoupled_weight_decay: bool,
    maximize: bool,
    differentiable: bool,
    **_,
) -> Tensor | None:
    """m, v and, for `per_param`, s. For `per_tensor` returns Σ(g - center)² and Σm², (tensors, 2)."""
    sums = []
    for i, param in enumerate(params):
        grad = -grads[i] if maximize else grads[i]
        if weight_decay != 0 and not decoupled_weight_decay:
            grad = grad.add(param, alpha=weight_decay)
        deviation = None if mask == "none" else grad - exp_avgs[i] * c.center[i]
        exp_avgs[i].lerp_(grad, 1 - beta1)
        exp_avg_sqs[i].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        if mask == "none":
            continue
        if reduction == "per_param":
            grad_vars[i].mul_(rho).add_(deviation.square() * c.weight[i])
        else:
            # Autograd keeps what it needs of m, which the next step changes in place.
            m = exp_avgs[i].clone() if differentiable else exp_avgs[i]
            sums.append(torch.stack([sum_of_squares(deviation), sum_of_squares(m)]))
    return torch.stack(sums) if sums else None


def _single_tensor_update(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    grad_vars: list[Tensor],
    q: Tensor | None,
    c: masks.StepScalars,
    *,
    lr: float | Tensor,
    eps: float,
    weight_decay: float,
    mask: str,
    amsgrad: bool,
    decoupled_weight_decay: bool,
    differentiable: bool,
    **hyper,
) -> None:
    """w ← (1 - lr·λ) w - lr · q · m̂ / (√v̂ + eps), with `q` one a tensor, or from `grad_vars` one a parameter."""
    for i, param in enumerate(params):
        if weight_decay != 0 and decoupled_weight_decay:
            param.mul_(1 - lr * weight_decay)
        m = exp_avgs[i].clone() if differentiable else exp_avgs[i]
        v = exp_avg_sqs[i]
        if amsgrad:
            v = torch.maximum(max_exp_avg_sqs[i], v)
            max_exp_avg_sqs[i].copy_(v)
        denom = (v.sqrt() / c.bias2[i] ** 0.5).add_(eps)
        step_size = lr / c.bias1[i]
        update = m
        if mask != "none":
            if q is not None:
                update = m * q[i].to(m.dtype)
            else:
                arguments = mask_arguments({"mask": mask, **hyper})
                s = grad_vars[i].clone() if differentiable else grad_vars[i]
                update = m * masks.compute_mask(m.square(), s, c.select(i), **arguments)[0]
        if isinstance(step_size, Tensor):
            param.addcdiv_(update * -step_size, denom)
        else:
            param.addcdiv_(update, denom, value=-step_size)


def scalars_of(t: float | Tensor, hyper: dict[str, Any]) -> masks.StepScalars:
    """[`masks.step_scalars`] of the step or steps `t` under a group's settings."""
    keys = ("beta1", "beta2", "rho", "estimator", "bias_correction", "warmup_steps")
    return masks.step_scalars(t, **{key: hyper[key] for key in keys})


def scalar_lists(state_steps: list[Tensor], hyper: dict[str, Any]) -> masks.StepScalars:
    """The scalars of each step as lists, of numbers, or with `capturable` of 0-dim tensors on the steps' device."""
    if hyper["capturable"]:
        t = torch.stack(state_steps).to(masks.statistics_dtype(state_steps[0].device))
        return masks.StepScalars(*(list(x.unbind()) for x in scalars_of(t, hyper)))
    steps = torch.stack(state_steps).tolist()
    by_step = {t: scalars_of(t, hyper) for t in set(steps)}  # all the same, but for tensors that skipped some
    return masks.StepScalars(*map(list, zip(*(by_step[t] for t in steps), strict=True)))


def mask_arguments(hyper: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of [`masks.compute_mask`] under a group's settings."""
    arguments = {key: hyper[key] for key in ("mask", "estimator", "alpha", "softness", "mask_eps")}
    arguments["first_ratio"] = masks.first_noise_ratio(hyper["beta1"], hyper["rho"], hyper["bias_correction"])
    return arguments


def buckets(tensors: list[Tensor]) -> list[list[int]]:
    """The positions of the tensors of each device and dtype: what one multi-tensor kernel can take."""
    positions = {}
    for i, tensor in enumerate(tensors):
        positions.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(positions.values())
