"""PRM, Population Risk Minimization: AdamW whose update is scaled by how far the signal stands above the noise.

The class validates, holds the state and dispatches. The mathematics is in `masks.py` and in `_single_tensor_*` below,
which are the definition; `foreach.py` computes the same faster.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _default_to_fused_or_foreach, _use_grad_for_differentiable

from . import masks
from .foreach import _multi_tensor_moments, _multi_tensor_update, sum_of_squares


# What `__setstate__` gives to a group of a checkpoint that is older than the key.
_GROUP_DEFAULTS = {
    "rho": 0.99,
    "softness": 1.0,
    "batch_size": None,
    "boundary": "batch",
    "n_dataset": None,
    "mask": "snr",
    "reduction": "per_param",
    "warmup_steps": 0,
    "amsgrad": False,
    "bias_correction": True,
    "decoupled_weight_decay": True,
    "alpha": None,
    "estimator": "ema",
    "mask_eps": None,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
}
_LOW_PRECISION = (torch.bfloat16, torch.float16)
_STATS = ("numel", "masked", "q", "active", "min_q", "max_q", "signal", "noise", "nonfinite")
_SUMMARY = (
    "mean_q",
    "active_fraction",
    "min_q",
    "max_q",
    "parameter_count",
    "noise_scale",
    "signal_sq",
    "snr",
    "nonfinite_count",
)
_STATE_KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad_var")


class PRM(Optimizer):
    r"""Implements Population Risk Minimization (PRM).

    With :math:`g` the gradient of the batch mean, one step of one scalar parameter is

    .. math::
        m &\leftarrow \beta_1 m + (1-\beta_1) g, \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
        s \leftarrow \rho s + (1-\rho)(g - m_{prev})^2 \\
        w &\leftarrow w - \eta \lambda_{wd} w - \eta\, q\, \hat m / (\sqrt{\hat v} + \epsilon)

    where hats are bias corrections. The mask :math:`q \in [0, 1]` compares the squared signal S with the noise N of
    its estimate:

    ============  ==========================================================  =================================
    `estimator`   S                                                           N
    ============  ==========================================================  =================================
    `"ema"`       :math:`\hat m^2`                                            :math:`\hat s`
    `"debiased"`  :math:`\max(\hat m^2 - \kappa_t \hat s, 0)`                 :math:`\kappa_t \hat s`
    ============  ==========================================================  =================================

    ============  ==========================================================================================
    `mask`        q
    ============  ==========================================================================================
    `"snr"`       :math:`S / (S + \lambda \alpha N + \epsilon_q)`
    `"soft"`      :math:`(S - \alpha N)_+ / ((S - \alpha N)_+ + \lambda N + \epsilon_q)`
    `"hard"`      1 if :math:`S > \alpha N` else 0
    `"none"`      1: plain AdamW
    ============  ==========================================================================================

    :math:`\kappa_t` is the variance of :math:`\hat m` relative to that of one batch. With `"debiased"`,
    :math:`s` is centred on the bias-corrected mean from the second step on; at the first step nothing is known and
    q = 0. With `"ema"` pure noise has S/N = (1-β1)/(1+β1)·…, about 1/20, so q never falls much under 0.048.

    Args:
        params (iterable): parameters, `(name, parameter)` pairs, or dicts that define parameter groups.
        lr (`float` or `Tensor`): learning rate η.
        betas (`tuple[float, float]`): decay rates β1, β2 of `exp_avg` and `exp_avg_sq`, each in [0, 1).
        rho (`float`): decay rate ρ of `grad_var`, in [0, 1).
        eps (`float`): ε in the denominator of Adam.
        weight_decay (`float`): λ_wd. It is not masked.
        softness (`float`): λ, how strongly noise closes the mask.
        batch_size (`int`, *optional*): b, examples an optimizer step sees over all processes and accumulation steps.
            Needed by `boundary="empirical"`.
        boundary (`str`): α: `"batch"` → 1, `"empirical"` → b/(n-b).
        n_dataset (`int`, *optional*): n, examples in the training set. Needed by `boundary="empirical"`.
        mask (`str`): `"snr"`, `"soft"`, `"hard"` or `"none"`.
        reduction (`str`): `"per_param"`, one q a scalar parameter; or `"per_tensor"`, one q a parameter tensor from
            the means of S and N over it, with a single scalar of state beyond AdamW's.
        warmup_steps (`int`): the first steps of each parameter that are plain AdamW (q = 1) while `grad_var` forms.
        amsgrad (`bool`): use the maximum of `exp_avg_sq` so far.
        bias_correction (`bool`): correct m, v and s for their start at zero.
        decoupled_weight_decay (`bool`): `False` adds λ_wd·w to the gradient, as in Adam.
        alpha (`float`, *optional*): α as a number; overrides `boundary`.
        estimator (`str`): `"ema"` (the paper) or `"debiased"`.
        mask_eps (`float`, *optional*): ε_q. The default is scale-free (the smallest normal float32); `1e-8` is the
            published behaviour, which closes the mask on the small gradients of language models.
        maximize (`bool`): ascend.
        foreach (`bool`, *optional*): multi-tensor implementation; by default wherever `torch.optim.AdamW` uses it.
        fused (`bool`, *optional*): not implemented yet; `True` raises.
        capturable (`bool`): keep `step` on the device and let no value decide control flow, for CUDA graphs.
        differentiable (`bool`): let autograd run through the step.

    Any of `mask`, `reduction`, `softness`, `alpha`, `estimator`, `rho`, `mask_eps`, `warmup_steps` and the arguments
    of AdamW may differ between parameter groups.

    State of a parameter: `step` (0-dim float32), `exp_avg`, `exp_avg_sq`, with `amsgrad` `max_exp_avg_sq` (the
    parameter's shape; float32 for bfloat16 and float16 parameters) and, unless `mask="none"`, `grad_var` (the
    parameter's shape for `per_param`, one 0-dim float64 for `per_tensor`). `grad_var` estimates the variance of the
    gradient of the batch *mean*: with per-example gradients at hand its long-run mean is their population variance
    over b - 1.

    Raises:
        ValueError: an argument is out of its range, or arguments contradict each other; the message names them.

    Source: Litman & Guo, *A Theory of Generalization in Deep Learning*, arXiv 2605.01172, Algorithm 1.

    Example:
        >>> optimizer = PRM(model.parameters(), lr=1e-5, reduction="per_tensor")
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()
        >>> optimizer.get_mask_stats()["mean_q"]
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        rho: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        softness: float = 1.0,
        batch_size: int | None = None,
        boundary: str = "batch",
        n_dataset: int | None = None,
        mask: str = "snr",
        reduction: str = "per_param",
        warmup_steps: int = 0,
        amsgrad: bool = False,
        bias_correction: bool = True,
        decoupled_weight_decay: bool = True,
        *,
        alpha: float | None = None,
        estimator: str = "ema",
        mask_eps: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "softness": softness,
            "batch_size": batch_size,
            "boundary": boundary,
            "n_dataset": n_dataset,
            "mask": mask,
            "reduction": reduction,
            "warmup_steps": warmup_steps,
            "amsgrad": amsgrad,
            "bias_correction": bias_correction,
            "decoupled_weight_decay": decoupled_weight_decay,
            "alpha": alpha,
            "estimator": estimator,
            "mask_eps": mask_eps,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        _validate({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not torch.is_floating_point(p):
                self.param_groups.pop()
                raise ValueError(
                    f"Invalid parameter of dtype {p.dtype}: PRM takes real floating-point parameters; pass complex "
                    "ones as `torch.view_as_real(p)` and leave the others out."
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key, value in _GROUP_DEFAULTS.items():
                group.setdefault(key, self.defaults.get(key, value))
            for p in group["params"]:
                p_state = self.state.get(p, {})
                if p_state and not torch.is_tensor(p_state["step"]):
                    device = p.device if group["capturable"] else "cpu"
                    p_state["step"] = torch.tensor(float(p_state["step"]), dtype=torch.float32, device=device)

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict, keeping the state in its own precision.

        Raises:
            ValueError: a group of the checkpoint was trained with another `reduction`; its `grad_var` has another
                shape and meaning, so that moving it would be neither.
        """
        for number, (ours, theirs) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
            theirs = theirs.get("reduction", ours["reduction"])
            if theirs != ours["reduction"] and state_dict["state"]:
                raise ValueError(
                    f"The checkpoint's parameter group {number} was trained with reduction={theirs!r}, this optimizer "
                    f"has reduction={ours['reduction']!r}: their `grad_var` cannot be converted. Create the optimizer "
                    f"with reduction={theirs!r}, or start from the weights alone with a fresh optimizer."
                )
        super().load_state_dict(state_dict)
        # torch casts floating-point state to the parameter's dtype: bfloat16 for state that we keep in float32, and
        # float32 for the float64 `grad_var`. Take the saved values again in the precision that they were saved in.
        # Copies, so that two optimizers never share the tensors that their steps change in place.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for saved_id, p in zip(saved_ids, params, strict=True):
            if p in self.state:
                self.state[p]["step"] = self.state[p]["step"].clone()
            for key in _STATE_KEYS:
                saved = state_dict["state"].get(saved_id, {}).get(key)
                if saved is not None:
                    dtype = torch.promote_types(saved.dtype, _state_dtype(p))
                    self.state[p][key] = saved.detach().clone().to(device=p.device, dtype=dtype)

    def _init_group(self, group: dict[str, Any]) -> dict[str, list[Tensor]]:
        lists = {k: [] for k in ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs", "grad_vars")}
        lists["state_steps"] = []
        masked = group["mask"] != "none"
        for p in group["params"]:
            if p.grad is None:
                continue
            if p.grad.is_sparse:
                raise ValueError(
                    "PRM does not support sparse gradients, and a parameter of shape "
                    f"{tuple(p.shape)} has one: create its embedding with `sparse=False`."
                )
            state = self.state[p]
            if not state:
                like = {"dtype": _state_dtype(p), "memory_format": torch.preserve_format}
                state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
                state["exp_avg"] = torch.zeros_like(p, **like)
                state["exp_avg_sq"] = torch.zeros_like(p, **like)
                if group["amsgrad"]:
                    state["max_exp_avg_sq"] = torch.zeros_like(p, **like)
                if masked and group["reduction"] == "per_tensor":
                    state["grad_var"] = torch.zeros((), dtype=masks.statistics_dtype(p.device), device=p.device)
                elif masked:
                    state["grad_var"] = torch.zeros_like(p, **like)
            elif masked and "grad_var" not in state:
                raise ValueError(
                    f"mask={group['mask']!r} was set on a group that has trained with mask='none' and so has no "
                    "`grad_var`. To start with plain AdamW set `warmup_steps` instead."
                )
            lists["params"].append(p)
            lists["grads"].append(p.grad)
            lists["exp_avgs"].append(state["exp_avg"])
            lists["exp_avg_sqs"].append(state["exp_avg_sq"])
            if group["amsgrad"]:
                lists["max_exp_avg_sqs"].append(state["max_exp_avg_sq"])
            if masked:
                lists["grad_vars"].append(state["grad_var"])
            lists["state_steps"].append(state["step"])
        return lists

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a single optimization step.

        Args:
            closure (`Callable`, *optional*): reevaluates the model and returns the loss.

        Raises:
            ValueError: a gradient is sparse, or a group's settings were changed to something invalid.
        """
        # torch renamed the check, and deprecated its old name, after 2.9.
        name = "_accelerator_graph_capture_health_check"
        getattr(self, name if hasattr(self, name) else "_cuda_graph_capture_health_check")()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._step_group(group)
        return loss

    # Traced into one graph, the step would be compiled anew whenever one of its scalars changes.
    @torch._disable_dynamo
    def _step_group(self, group: dict[str, Any]) -> None:
        hyper = _hyperparameters(group)
        prm(**self._init_group(group), **hyper, foreach=group["foreach"])

    @torch.no_grad()
    def get_mask_stats(self, per_group: bool = False) -> dict[str, float] | list[dict[str, float]]:
        """What the mask of the last step was, recomputed from the state: it costs nothing until it is called.

        Args:
            per_group (`bool`): return one dict for each parameter group instead of one for all.

        Returns:
            `mean_q`, `min_q`, `max_q` over scalar parameters; `active_fraction`, the share of them with q > 0;
            `parameter_count`, the scalar parameters that have been trained; `signal_sq` and `noise_scale`, the means
            of S and N over the masked ones (squared gradient units), and `snr`, their ratio; `nonfinite_count`, the
            scalar parameters that an infinite or NaN gradient has reached. Before the first step, and for S and N
            where every mask is `"none"`, the means are NaN.
        """
        tables = [self._group_stats(group) for group in self.param_groups]
        if per_group:
            return [_summary(table) for table in tables]
        return _summary(torch.cat(tables))

    def _group_stats(self, group: dict[str, Any]) -> Tensor:
        """A float64 row a trained tensor, in the order of `_STATS`."""
        sizes, rows = [], []
        hyper = _hyperparameters(group)
        masked = group["mask"] != "none"
        for p in group["params"]:
            state = self.state.get(p)
            if not state or p.numel() == 0:
                continue
            n, m, v = p.numel(), state["exp_avg"], state["exp_avg_sq"]
            dtype = masks.statistics_dtype(p.device)
            nonfinite = n - torch.isfinite(v).sum()
            if masked:
                t = state["step"].to(dtype=dtype, device=p.device)
                mean_sq = m.square() if group["reduction"] == "per_param" else sum_of_squares(m) / n
                q, signal, noise = masks.compute_mask(
                    mean_sq, state["grad_var"], _scalars_of(t, hyper), **_mask_arguments(hyper)
                )
                # Means, because the single q of a tensor stands for all its parameters.
                row = [
                    q.mean(dtype=dtype),
                    (q > 0).to(dtype).mean(),
                    q.min(),
                    q.max(),
                    signal.mean(dtype=dtype),
                    noise.mean(dtype=dtype),
                    nonfinite,
                ]
            else:
                one, zero = torch.ones_like(nonfinite), torch.zeros_like(nonfinite)
                row = [one, one, one, one, zero, zero, nonfinite]
            rows.append(torch.stack([x.to(dtype) for x in row]))
            sizes.append([n, n if masked else 0])
        if not rows:
            return torch.zeros(0, len(_STATS), dtype=torch.float64)
        devices = {row.device for row in rows}
        table = torch.stack(rows if len(devices) == 1 else [row.cpu() for row in rows]).cpu().double()
        return torch.cat([torch.tensor(sizes, dtype=torch.float64), table], dim=1)


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
    if not params:
        return
    if foreach is None:
        _, foreach = _default_to_fused_or_foreach(params, differentiable, use_fused=False)
        # As in torch.optim: a tensor lr needs capturable for the multi-tensor path.
        foreach = foreach and (capturable or not isinstance(lr, Tensor))
    hyper = {k: v for k, v in locals().items() if k in _HYPERPARAMETERS}
    moments = _multi_tensor_moments if foreach else _single_tensor_moments
    update = _multi_tensor_update if foreach else _single_tensor_update

    torch._foreach_add_(state_steps, 1)
    per_tensor = mask != "none" and reduction == "per_tensor"
    for (device, dtype), index in _buckets(exp_avgs).items():

        def take(tensors, index=index):
            return [tensors[i] for i in index] if tensors else []

        # The update of low-precision parameters is computed in the precision of their state and rounded once.
        masters = take(params)
        states = take(exp_avgs)
        working = [p if p.dtype == dtype else p.to(dtype) for p in masters]
        gradients = [g if g.dtype == dtype else g.to(dtype) for g in take(grads)]

        t = torch.stack(take(state_steps)).to(masks.statistics_dtype(device))
        vectors = _scalars_of(t, hyper)
        scalars = masks.StepScalars(*(list(x.unbind()) if capturable else x.tolist() for x in vectors))
        sums = moments(working, gradients, states, take(exp_avg_sqs), take(grad_vars), scalars, **hyper)
        q = None
        if per_tensor:
            numels = torch.tensor([p.numel() for p in masters], dtype=sums.dtype).to(device, non_blocking=True)
            vectors = masks.StepScalars(*(x.to(device, non_blocking=True) for x in vectors))
            q = _tensor_masks(sums, numels, take(grad_vars), vectors, hyper)
        update(
            working,
            states,
            take(exp_avg_sqs),
            take(max_exp_avg_sqs),
            [] if per_tensor else take(grad_vars),
            q,
            scalars,
            **hyper,
        )
        for p, w in zip(masters, working, strict=True):
            if w is not p:
                p.copy_(w)


def _tensor_masks(
    sums: Tensor, numels: Tensor, grad_vars: list[Tensor], c: masks.StepScalars, hyper: dict[str, Any]
) -> Tensor:
    """One q a tensor from the sums of squares over it, updating the scalars `grad_vars`.

    The mean over a tensor commutes with the moving average, so `grad_var` is the average of the means: one scalar.
    """
    means = sums / numels.clamp(min=1).unsqueeze(1)
    var = hyper["rho"] * torch.stack(grad_vars) + c.weight * means[:, 0]
    if hyper["differentiable"]:
        for grad_var, value in zip(grad_vars, var.unbind(), strict=True):
            grad_var.copy_(value)
    else:
        torch._foreach_copy_(grad_vars, list(var.unbind()))
    return masks.compute_mask(means[:, 1], var, c, **_mask_arguments(hyper))[0]


def _single_tensor_moments(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    grad_vars: list[Tensor],
    c: masks.StepScalars,
    *,
    lr: float | Tensor,
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
    """Weight decay, m, v and, for `per_param`, s. For `per_tensor` returns Σ(g - center)² and Σm², (tensors, 2)."""
    sums = []
    for i, param in enumerate(params):
        grad = -grads[i] if maximize else grads[i]
        if weight_decay != 0:
            if decoupled_weight_decay:
                param.mul_(1 - lr * weight_decay)
            else:
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
    mask: str,
    amsgrad: bool,
    differentiable: bool,
    **hyper,
) -> None:
    """w ← w - lr · q · m̂ / (√v̂ + eps), with `q` one a tensor, or from `grad_vars` for each scalar parameter."""
    for i, param in enumerate(params):
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
                mask_arguments = _mask_arguments({"mask": mask, **hyper})
                s = grad_vars[i].clone() if differentiable else grad_vars[i]
                update = m * masks.compute_mask(m.square(), s, c.select(i), **mask_arguments)[0]
        if isinstance(step_size, Tensor):
            param.addcdiv_(update * -step_size, denom)
        else:
            param.addcdiv_(update, denom, value=-step_size)


_HYPERPARAMETERS = frozenset(
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


def _hyperparameters(group: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of [`prm`] that a parameter group stands for."""
    _validate(group)  # schedulers and users change groups while training
    hyper = {key: group[key] for key in _HYPERPARAMETERS if key in group}
    hyper["beta1"], hyper["beta2"] = group["betas"]
    hyper["alpha"] = masks.boundary_alpha(group["boundary"], group["alpha"], group["batch_size"], group["n_dataset"])
    hyper["mask_eps"] = masks.SCALE_FREE_EPS if group["mask_eps"] is None else group["mask_eps"]
    return hyper


def _scalars_of(t: Tensor, hyper: dict[str, Any]) -> masks.StepScalars:
    keys = ("beta1", "beta2", "rho", "estimator", "bias_correction", "warmup_steps")
    return masks.step_scalars(t, **{key: hyper[key] for key in keys})


def _mask_arguments(hyper: dict[str, Any]) -> dict[str, Any]:
    arguments = {key: hyper[key] for key in ("mask", "estimator", "alpha", "softness", "mask_eps")}
    arguments["first_ratio"] = masks.first_noise_ratio(hyper["beta1"], hyper["rho"], hyper["bias_correction"])
    return arguments


def _buckets(tensors: list[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[int]]:
    """The positions of the tensors of each device and dtype: what one multi-tensor kernel can take."""
    buckets = {}
    for i, tensor in enumerate(tensors):
        buckets.setdefault((tensor.device, tensor.dtype), []).append(i)
    return buckets


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.float32 if param.dtype in _LOW_PRECISION else param.dtype


def _summary(table: Tensor) -> dict[str, float]:
    """[`PRM.get_mask_stats`] from the rows of `_group_stats`."""
    if len(table) == 0:
        return {key: 0 if key.endswith("_count") else float("nan") for key in _SUMMARY}
    column = dict(zip(_STATS, table.unbind(1), strict=True))
    n, masked = column["numel"], column["masked"]
    signal, noise = (column["signal"] * masked).sum(), (column["noise"] * masked).sum()
    values = (
        (column["q"] * n).sum() / n.sum(),
        (column["active"] * n).sum() / n.sum(),
        column["min_q"].min(),
        column["max_q"].max(),
        n.sum(),
        noise / masked.sum(),
        signal / masked.sum(),
        signal / noise,
        column["nonfinite"].sum(),
    )
    summary = {key: value.item() for key, value in zip(_SUMMARY, values, strict=True)}
    return {key: int(value) if key.endswith("_count") else value for key, value in summary.items()}


def _validate(group: dict[str, Any]) -> None:
    """Raises ValueError for a group's first invalid setting, naming argument, value and what is allowed."""

    def check(valid: bool, name: str, value: Any, allowed: str) -> None:
        if not valid:
            raise ValueError(f"Invalid {name}={value!r}: {allowed}.")

    def number(value: Any) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

    lr = group["lr"]
    if isinstance(lr, Tensor):
        check(lr.numel() == 1, "lr", lr, "a tensor learning rate must have one element")
        check(
            not group["foreach"] or group["capturable"],
            "lr",
            lr,
            "a tensor learning rate with foreach=True needs capturable=True",
        )
        # On an accelerator looking at the value would stop the step for it.
        check(lr.device.type != "cpu" or lr.item() >= 0, "lr", lr, "the learning rate must be at least 0")
    else:
        check(number(lr) and lr >= 0, "lr", lr, "the learning rate must be a finite number of at least 0")
    betas = group["betas"]
    check(isinstance(betas, (tuple, list)) and len(betas) == 2, "betas", betas, "it must be a pair of numbers")
    for i, beta in enumerate(betas):
        check(number(beta) and 0 <= beta < 1, f"betas[{i}]", beta, "it must be in [0, 1)")
    check(number(group["rho"]) and 0 <= group["rho"] < 1, "rho", group["rho"], "it must be in [0, 1)")
    for name in ("eps", "weight_decay", "softness"):
        check(number(group[name]) and group[name] >= 0, name, group[name], "it must be a finite number of at least 0")
    for name in ("alpha", "mask_eps"):
        value = group[name]
        check(
            value is None or (number(value) and value >= 0),
            name,
            value,
            "it must be None or a finite number of at least 0",
        )
    for name, allowed in (
        ("mask", masks.MASKS),
        ("reduction", masks.REDUCTIONS),
        ("estimator", masks.ESTIMATORS),
        ("boundary", masks.BOUNDARIES),
    ):
        check(group[name] in allowed, name, group[name], "it must be one of " + ", ".join(map(repr, allowed)))
    steps = group["warmup_steps"]
    check(number(steps) and steps >= 0 and steps == int(steps), "warmup_steps", steps, "it must be an integer ≥ 0")
    for name in ("batch_size", "n_dataset"):
        value = group[name]
        check(
            value is None or (number(value) and value >= 1 and value == int(value)),
            name,
            value,
            "it must be None or a positive integer",
        )
        if group["boundary"] == "empirical" and group["alpha"] is None:
            check(value is not None, name, value, "boundary='empirical' needs it for alpha = b/(n-b); or give `alpha`")
    if group["batch_size"] is not None and group["n_dataset"] is not None:
        check(
            group["n_dataset"] > group["batch_size"],
            "n_dataset",
            group["n_dataset"],
            f"it must be larger than batch_size={group['batch_size']}",
        )
    if group["fused"]:
        check(not group["foreach"], "fused", True, "`fused` and `foreach` cannot both be True")
        check(False, "fused", True, "there is no fused implementation yet; use fused=None, or foreach=True")
    if group["foreach"]:
        check(not group["differentiable"], "foreach", True, "autograd cannot run through it; use foreach=False")
