"""The functional form of PRM's step."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import masks
from .foreach import ForeachStep, TensorLists, uses_foreach
from .hyperparameters import Hyperparameters, is_batched, normalize
from .reference import decide_mask, reference_step


def prm(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    grad_vars: list[Tensor],
    state_steps: list[Tensor],
    exp_avg_signals: list[Tensor] = (),
    **hyperparameters: Any,
) -> None:
    """Functional API of one PRM step on lists of whole tensors, updated in place.

    It works under `torch.func.vmap`, over models of one shape that are trained at once: the tensors of the lists,
    `lr`, `weight_decay` and each of `betas` may be stacked, one a model. `state_steps` may be stacked or shared.

    Args:
        params: the parameters.
        grads: their gradients, of the same shapes, as all lists that follow.
        exp_avgs: m of each parameter.
        exp_avg_sqs: v of each parameter.
        max_exp_avg_sqs: the maxima of v with `amsgrad`; otherwise empty.
        grad_vars: s of each parameter: of its shape for `reduction="per_param"`, 0-dim for `"per_tensor"`, a vector
            with an entry a row for `"per_row"`; empty for `mask="none"`.
        state_steps: 0-dim tensors that count the steps before this one.
        exp_avg_signals: a of each parameter with `signal_beta`; otherwise empty.
        **hyperparameters: the arguments of [`PRM`], with its defaults. With `relative_eps` these are all tensors that
            are trained.

    Raises:
        TypeError: an argument that [`PRM`] does not have.
        ValueError: as [`PRM`]; or `foreach=True` under vmap.
    """
    h = Hyperparameters(**normalize(hyperparameters))
    if not params:
        return
    batched = any(map(is_batched, (*params, h.lr, h.weight_decay, *h.betas)))
    if batched:
        h = _under_vmap(h, params[0].device)
        for step in state_steps:
            step.add_(1)
    else:
        torch._foreach_add_(state_steps, 1)
    lr, eps = h.lr * h.step_length, h.adam_eps(sum(p.numel() for p in params))
    states = {
        "exp_avg": exp_avgs,
        "exp_avg_sq": exp_avg_sqs,
        "max_exp_avg_sq": max_exp_avg_sqs,
        "grad_var": grad_vars,
        "exp_avg_signal": exp_avg_signals,
    }
    if batched or not uses_foreach(params, h, lr):
        for i, (param, grad, step) in enumerate(zip(params, grads, state_steps, strict=True)):
            state = {name: tensors[i] for name, tensors in states.items() if tensors}
            reference_step(param, grad, state, masks.step_scalars(_age(step, h), h, param.numel()), h, lr, eps)
        return
    lists = (params, grads, *states.values())
    for index in buckets(exp_avgs):
        own = TensorLists(*([tensors[i] for i in index] if tensors else [] for tensors in lists))
        _foreach_step(own, [state_steps[i] for i in index], h, lr, eps)


def mean_mask(
    exp_avgs: list[Tensor],
    grad_vars: list[Tensor],
    state_steps: list[Tensor],
    exp_avg_signals: list[Tensor] = (),
    **hyperparameters: Any,
) -> Tensor:
    """The mask of the last step of [`prm`] in the mean over all scalar parameters, 0-dim; also under vmap.

    Args:
        exp_avgs, grad_vars, state_steps, exp_avg_signals: as that step left them.
        **hyperparameters: those of the step.
    """
    h = Hyperparameters(**normalize(hyperparameters))
    if not h.masked:
        return torch.ones((), dtype=masks.statistics_dtype(exp_avgs[0].device), device=exp_avgs[0].device)
    if any(map(is_batched, (*exp_avgs, *h.betas))):
        h = _under_vmap(h, exp_avgs[0].device)
    total = 0.0
    for i, (m, s, step) in enumerate(zip(exp_avgs, grad_vars, state_steps, strict=True)):
        average = m if h.signal_beta is None else exp_avg_signals[i]
        q = decide_mask(average, s, masks.step_scalars(_age(step, h), h, m.numel()), h)
        total = total + q.to(masks.statistics_dtype(q.device)).mean() * m.numel()
    return total / sum(m.numel() for m in exp_avgs)


def _under_vmap(h: Hyperparameters, device: torch.device) -> Hyperparameters:
    """The hyperparameters with betas as precise as the numbers that they stand for."""
    if h.foreach:
        raise ValueError("Invalid foreach=True: vmap has no rules for lists of tensors; leave foreach=None.")
    dtype = masks.statistics_dtype(device)
    return replace(h, betas=tuple(beta.to(dtype) if isinstance(beta, Tensor) else beta for beta in h.betas))


def _foreach_step(lists: TensorLists, steps: list[Tensor], h: Hyperparameters, lr: float | Tensor, eps: float) -> None:
    ages = [masks.step_scalars(_age(step, h), h, p.numel()) for step, p in zip(steps, lists.params, strict=True)]
    c = masks.StepScalars(*map(list, zip(*ages, strict=True)))
    if not h.masked or h.reduction != "per_tensor":
        ForeachStep(lists, h, halves=False, one_by_one=False).update(c, lr, eps)
        return
    step = ForeachStep(lists._replace(grad_vars=[]), h, halves=True, one_by_one=False)
    sums = step.sums(c)
    numels = torch.tensor([max(p.numel(), 1) for p in lists.params], dtype=sums.dtype).to(sums.device)
    means, grad_vars = sums / numels.unsqueeze(1), lists.grad_vars
    q, variances = masks.advance_units(means, torch.stack(grad_vars), c.tensors(sums.device), h)
    torch._foreach_copy_(grad_vars, list(variances.unbind()))
    step.update(c, lr, eps, q)


def _age(step: Tensor, h: Hyperparameters) -> float | Tensor:
    stays = h.capturable or is_batched(step)
    return step.to(masks.statistics_dtype(step.device)) if stays else step.item()


def buckets(tensors: list[Tensor]) -> list[list[int]]:
    """The positions of the tensors of each device and dtype: what one multi-tensor kernel can take."""
    positions = {}
    for i, tensor in enumerate(tensors):
        positions.setdefault((tensor.device, tensor.dtype), []).append(i)
    return list(positions.values())
