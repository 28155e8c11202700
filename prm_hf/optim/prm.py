"""PRM, Population Risk Minimization: AdamW whose update is scaled by how far the signal stands above the noise.

The class validates, holds the state and dispatches. The mathematics is in `masks.py` and `step.py`; where the parts of
a tensor live, in `prm_hf.sharding`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable

from ..sharding import Locator, RowSpan
from . import masks
from .parts import Part, hyperparameters, use_fused
from .quantized import is_quantized, quantized_zeros, read, write
from .statistics import group_table, mask_summary, mean_masks
from .step import LOW_PRECISION, ListStep, tensor_masks
from .tables import Tables
from .validation import check_held_in_parts, check_reduction, check_signal_beta, validate_group


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
    "signal_beta": None,
    "mask_eps": None,
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
    "state_dtype": "float32",
}
_STATE_KEYS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad_var", "exp_avg_signal")
# Keys of ours in parameter groups, which wrappers and checkpoints carry along: the number that the group was created
# with, and in checkpoints of flat partitions `grad_var` of all tensors or of all of their rows (DeepSpeed drops or
# trims it in the state).
_NUMBER = "prm_group"
_VARIANCES = {"per_tensor": "prm_grad_var", "per_row": "prm_row_grad_var"}


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

    With `reduction="per_tensor"` and `"per_row"` S and N are formed from the means of :math:`m^2` and :math:`s` over
    the tensor or the row. With `signal_beta` :math:`\beta_S`, the signal has a gradient average of its own,

    .. math::
        a \leftarrow \beta_S a + (1-\beta_S) g, \quad
        S = \max(\overline{\hat a^2} - \kappa^S_t \overline{\hat s}, 0), \quad
        N = \kappa_t \overline{\hat s}

    where bars are means over the row and :math:`\kappa^S_t` is :math:`\kappa_t` of :math:`\beta_S`: a slower average
    sees smaller signals, and the mask weighs them against the noise of the average that is stepped with.

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
            the means of S and N over it, with a single scalar of state beyond AdamW's; or `"per_row"`, one q a row
            (dimension 0) of tensors of two dimensions and more and one of any other tensor, with as many numbers of
            state.
        warmup_steps (`int`): the first steps of each parameter that are plain AdamW (q = 1) while `grad_var` forms.
        amsgrad (`bool`): use the maximum of `exp_avg_sq` so far.
        bias_correction (`bool`): correct m, v and s for their start at zero.
        decoupled_weight_decay (`bool`): `False` adds λ_wd·w to the gradient, as in Adam.
        alpha (`float`, *optional*): α as a number; overrides `boundary`.
        estimator (`str`): `"ema"` (the paper) or `"debiased"`.
        signal_beta (`float`, *optional*): β_S, decay rate in [0, 1) of a gradient average from which S is estimated,
            at 4 bytes a parameter; for `reduction="per_row"` with `estimator="debiased"`. By default S is estimated
            from `exp_avg`.
        mask_eps (`float`, *optional*): ε_q. The default is scale-free (the smallest normal float32); `1e-8` is the
            published behaviour, which closes the mask on the small gradients of language models.
        maximize (`bool`): ascend.
        foreach (`bool`, *optional*): multi-tensor implementation; by default wherever `torch.optim.AdamW` uses it.
        fused (`bool`, *optional*): one Triton kernel for all tensors; by default on CUDA where Triton is installed,
            unless `foreach` or `differentiable` is set.
        capturable (`bool`): keep `step` on the device and let no value decide control flow, for CUDA graphs.
        differentiable (`bool`): let autograd run through the step.
        state_dtype (`str`): how the moments are kept: `"float32"`; `"bf16"`, `exp_avg` in bfloat16; or `"8bit"`,
            `exp_avg` and `exp_avg_sq` in torchao's 8-bit blocks (tensors of at least 4096 elements that are multiples
            of 256). The step is computed in float32 and what is kept is rounded to the nearest once, at its end:
            changes of `exp_avg` below 2^-9 of it are lost in bfloat16. `"bf16"` is not for DeepSpeed ZeRO and FSDP1,
            `"8bit"` for whole tensors alone (one process, DDP).

    Any of `mask`, `reduction`, `softness`, `alpha`, `estimator`, `signal_beta`, `rho`, `mask_eps`, `warmup_steps` and
    the arguments of AdamW may differ between parameter groups.

    State of a parameter: `step` (0-dim float32), `exp_avg`, `exp_avg_sq`, with `amsgrad` `max_exp_avg_sq` (the
    parameter's shape; float32 for bfloat16 and float16 parameters, or as `state_dtype` says) and, unless
    `mask="none"`, `grad_var` (the parameter's shape for `per_param`, one 0-dim float64 for `per_tensor`, float64
    `(rows,)` for `per_row`) and with `signal_beta` `exp_avg_signal` (as `exp_avg`, but never in bfloat16). `grad_var`
    estimates the variance of the gradient of the batch *mean*: with per-example gradients at hand its long-run mean is
    their population variance over b - 1.

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
        signal_beta: float | None = None,
        mask_eps: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        state_dtype: str = "float32",
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
            "signal_beta": signal_beta,
            "mask_eps": mask_eps,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "differentiable": differentiable,
            "state_dtype": state_dtype,
        }
        self._start_unlocated()
        super().__init__(params, defaults)

    def _start_unlocated(self) -> None:
        self._locator = Locator()
        self._created: list[dict[str, Any]] = []  # the settings of each group as they were given
        self._tables = Tables(self._locator)
        self._started = False
        self._fused_tables: dict[tuple, Any] = {}  # of `fused.FusedStep`
        self._plans: dict[tuple[int, ...], Any] = {}  # `plan.FusedPlan`, of what groups show at a step

    def _register_group(self, group: dict[str, Any]) -> None:
        group[_NUMBER] = self._locator.register(group["params"])
        self._created.append({key: value for key, value in group.items() if key != "params"})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        validate_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not torch.is_floating_point(p):
                self.param_groups.pop()
                raise ValueError(
                    f"Invalid parameter of dtype {p.dtype}: PRM takes real floating-point parameters; pass complex "
                    "ones as `torch.view_as_real(p)` and leave the others out."
                )
        self._register_group(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_locator" not in self.__dict__:  # a pickled or copied optimizer
            self._start_unlocated()
            for group in self.param_groups:
                self._register_group(group)
        self._plans, self._fused_tables = {}, {}  # of state that is no more
        for number, group in enumerate(self.param_groups):
            group.setdefault(_NUMBER, number)
            for key, value in _GROUP_DEFAULTS.items():
                group.setdefault(key, self.defaults.get(key, value))
            for p in group["params"]:
                p_state = self.state.get(p, {})
                if p_state and not torch.is_tensor(p_state["step"]):
                    device = p.device if group["capturable"] else "cpu"
                    p_state["step"] = torch.tensor(float(p_state["step"]), dtype=torch.float32, device=device)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer. Under DeepSpeed ZeRO the variances of all tensors or rows go with each group."""
        self._absorb_loaded()
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            for reduction, key in _VARIANCES.items():
                if (table := self._tables.saved(reduction, group[_NUMBER])) is not None:
                    group[key] = table
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict. The state keeps the precision that it was saved in, or gets our `state_dtype`.

        Raises:
            ValueError: a group of the checkpoint was trained with another `reduction`; its `grad_var` has another
                shape and meaning, so that moving it would be neither. Or one of the two has a `signal_beta` and the
                other has none.
        """
        if state_dict["state"]:
            for number, (ours, theirs) in enumerate(zip(self.param_groups, state_dict["param_groups"], strict=False)):
                check_reduction(number, ours["reduction"], theirs.get("reduction", ours["reduction"]))
                check_signal_beta(number, ours["signal_beta"], theirs.get("signal_beta"))
        state_dtypes = [group["state_dtype"] for group in self.param_groups]
        super().load_state_dict(state_dict)
        # torch casts floating-point state to the parameter's dtype: bfloat16 for state that we keep in float32, and
        # float32 for the float64 `grad_var`. Take the saved values again in the precision that they were saved in.
        # Copies, so that two optimizers never share the tensors that their steps change in place.
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [(p, group) for group in self.param_groups for p in group["params"]]
        for group, state_dtype in zip(self.param_groups, state_dtypes, strict=True):
            group["state_dtype"] = state_dtype
        for saved_id, (p, group) in zip(saved_ids, params, strict=True):
            if p in self.state:
                # torch moves it to the device for any optimizer with `fused`, where ours would have to wait for it.
                device = p.device if group["capturable"] else "cpu"
                self.state[p]["step"] = self.state[p]["step"].clone().to(device)
            for key in _STATE_KEYS:
                saved = state_dict["state"].get(saved_id, {}).get(key)
                if saved is None:
                    continue
                dtype = torch.promote_types(saved.dtype, _state_dtype(p))
                if key != "grad_var" and (group["state_dtype"] != "float32" or is_quantized(saved)):
                    self.state[p][key] = _new_moment(p, key, group["state_dtype"])
                    write(self.state[p][key], saved if is_quantized(self.state[p][key]) else read(saved, dtype))
                else:
                    self.state[p][key] = saved.detach().clone().to(device=p.device, dtype=dtype)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a single optimization step.

        Args:
            closure (`Callable`, *optional*): reevaluates the model and returns the loss.

        Raises:
            ValueError: a gradient is sparse, a group's settings were changed to something invalid, or at the first
                step the parameters are sharded and a group's `reduction` or `state_dtype` is not for that.
            RuntimeError: at the first step, if the parameters are sharded in a way that PRM does not know.
        """
        # torch renamed the check, and deprecated its old name, after 2.9.
        name = "_accelerator_graph_capture_health_check"
        getattr(self, name if hasattr(self, name) else "_cuda_graph_capture_health_check")()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step()
        return loss

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler may leave it to the step to unscale gradients and to do nothing where they overflowed.

        It then hands over `grad_scale` and `found_inf`, and need not wait for the device. Not where a step counts on
        the host, which would have to wait to know whether it was one; and not for tensors that are held in parts.
        """
        if not all(group["fused"] and group["capturable"] for group in self.param_groups):
            return False
        self._locate()  # GradScaler asks before the first step
        return self._locator.layout is None

    # Traced into one graph, the step would be compiled anew whenever one of its scalars changes.
    @torch._disable_dynamo
    def _step(self) -> None:
        self._absorb_loaded()  # which changes settings
        # DeepSpeed shows one group, or one part of a group, at a time
        shown = tuple(id(group["params"][0]) for group in self.param_groups if group["params"])
        if shown in self._plans:
            if self._plans[shown].step(self.param_groups, self.state, self._tables.only()):
                return
            del self._plans[shown]
        self._locate()
        parts = [part for group in self.param_groups for part in self._parts(group)]
        if self._is_initialization(parts):
            return
        counters = {id(step): step for part in parts for step in part.counters}
        if counters:
            torch._foreach_add_(list(counters.values()), 1)
        halves = [(part, self._list_step(part) if part else None) for part in parts]
        if self._locator.layout is None:
            # No other process has a part of these tensors, so that a fused step needs no pause between its halves.
            found_inf = getattr(self, "found_inf", None)
            for part, step in halves:
                if part.fused:
                    step.whole(None if found_inf is None else found_inf.to(part.device, non_blocking=True))
            if found_inf is not None:  # 1 where the step was skipped
                torch._foreach_sub_(list(counters.values()), [found_inf] * len(counters))
            halves = [(part, step) for part, step in halves if not part.fused]
        sums = [step and step.moments() for _, step in halves]
        for (_, step), q in zip(halves, self._tensor_masks([part for part, _ in halves], sums), strict=True):
            if step:
                step.update(q)
        self._make_plan(shown, parts)

    def _list_step(self, part: Part) -> Any:
        if part.fused:
            from .fused import FusedStep

            lists = part.lists
            if part.tensors and self._locator.layout is None:  # the kernel itself advances `grad_var`
                lists = lists | {"grad_vars": [grad_var for _, grad_var, _ in part.tensors.values()]}
            return FusedStep(lists, part.hyper, self._fused_tables, getattr(self, "grad_scale", None))
        return ListStep(**part.lists, hyper=part.hyper, foreach=part.foreach)

    def _make_plan(self, shown: tuple[int, ...], parts: list[Part]) -> None:
        """Prepares the next steps of the groups that are shown, if they can be expected to be just like this one."""
        if not self._locator.flat:
            self._plans.clear()
        if not parts or not all(part.fused and not part.hyper["capturable"] for part in parts):
            return
        if len(self._tables.variances) > 1:
            return
        if any(step.device.type != "cpu" for part in parts for step in part.counters):
            return
        if self._locator.layout is not None and len({part.device for part in parts}) > 1:
            return
        groups = [group for group in self.param_groups if group["params"]]
        if any(p.grad is None for group in groups for p in group["params"]):
            return
        if not all(type(grad) is Tensor and grad.is_contiguous() for part in parts for grad in part.lists["grads"]):
            return
        if any(len({self.state[p]["step"].item() for p in group["params"]}) > 1 for group in groups):
            return
        from .plan import FusedPlan

        self._plans[shown] = FusedPlan(groups, self.state, self._locator, self._tables.only())
        self._fused_tables.clear()

    def _tensor_masks(self, parts: list[Part], sums: list[Tensor | None]) -> list[Tensor | None]:
        """q of each slice of each part, or of each of its rows; None for parts that decide on their masks."""
        if self._locator.layout is not None:
            return self._tables.decide(parts, sums)
        return [
            tensor_masks(x, *map(list, zip(*part.tensors.values(), strict=True)), part.hyper) if part.tensors else None
            for part, x in zip(parts, sums, strict=True)
        ]

    def _locate(self) -> None:
        self._absorb_loaded()
        self._locator.locate([(group[_NUMBER], group["params"]) for group in self.param_groups])
        if self._locator.layout is not None:
            for group in self.param_groups:
                check_held_in_parts(group["reduction"], group["state_dtype"], self._locator.layout.path)
                if self._tables.in_rows(group):
                    self._tables.check_rows(self._locator.numbers(group[_NUMBER]))
        if self._locator.flat:
            self._unshare_steps()
        masked = [group for group in self.param_groups if group["mask"] != "none"]
        for reduction in _VARIANCES:
            groups = [group for group in masked if group["reduction"] == reduction]
            if self._locator.flat and groups:
                if self._tables.is_new(reduction):
                    self._check_is_fresh(groups, reduction)
                self._tables.place(reduction)

    def _check_is_fresh(self, groups: list[dict[str, Any]], reduction: str) -> None:
        """Raises if a checkpoint gave these groups a state and no table of variances."""
        tensors = (p for group in groups for p in self._locator.local_tensors(group[_NUMBER], group["params"]))
        if any(self.state[p]["step"] > 0 for p in tensors if self.state.get(p)):
            raise ValueError(
                f"The checkpoint has no `grad_var` of reduction={reduction!r} for DeepSpeed ZeRO: it was not "
                "written by PRM, or with another reduction. Start from the weights alone with a fresh optimizer."
            )

    def _absorb_loaded(self) -> None:
        """Takes over what a checkpoint put into the parameter groups, however DeepSpeed put it there."""
        for group in self.param_groups:
            created = self._created[group[_NUMBER]]
            check_reduction(group[_NUMBER], created["reduction"], group["reduction"])
            check_signal_beta(group[_NUMBER], created.get("signal_beta"), group["signal_beta"])
        numbers = [group[_NUMBER] for group in self.param_groups]
        if len(numbers) == len(self._created) > 1 and numbers != list(range(len(numbers))):
            # DeepSpeed's stage-3 universal load copies the settings of the first group to every other. The learning
            # rate is a schedule's: keep its progress.
            first, created_lr = self.param_groups[0], self._created[0]["lr"]
            progress = {key: first[key] / created_lr for key in ("lr", "initial_lr") if key in first and created_lr}
            for group, created in zip(self.param_groups, self._created, strict=True):
                group.update(created)
                group.update({key: created["lr"] * value for key, value in progress.items()})
        for group in self.param_groups:
            for reduction, key in _VARIANCES.items():
                if key in group:
                    self._tables.load(reduction, group[_NUMBER], group.pop(key))

    def _unshare_steps(self) -> None:
        """DeepSpeed's stage-3 universal load gives all sub-groups the same `step`, which each would then advance."""
        seen = set()
        for state in filter(None, self.state.values()):
            if id(state["step"]) in seen:
                state["step"] = state["step"].clone()
            seen.add(id(state["step"]))

    def _is_initialization(self, parts: list[Part]) -> bool:
        """Whether this step is DeepSpeed's stage 0 in half precision allocating the state with zero gradients.

        It steps on clones of the parameters, which is how it is told from a user's step.
        """
        if not self._locator.replaced or self._started:
            return False
        self._started = any(grad.any() for part in parts for grad in part.lists["grads"])
        return not self._started

    def _parts(self, group: dict[str, Any]) -> list[Part]:
        """The tensors of a group that have a gradient, in slices that each lie in one original tensor."""
        hyper = hyperparameters(group)
        per_tensor = group["mask"] != "none" and group["reduction"] == "per_tensor"
        in_rows = self._tables.in_rows(group)
        if in_rows:
            hyper["reduction"] = masks.ROWS_IN_PARTS
        split = (per_tensor or in_rows) and self._locator.flat
        parts: dict[tuple, Part] = {}
        for p in group["params"]:
            grad = p.grad
            if grad is None:
                # FSDP1 gives no gradient to a process that holds nothing of a tensor, but its sums must add up.
                if self._locator.layout is None or p.numel() > 0:
                    continue
                grad = torch.zeros_like(p)
            if grad.is_sparse:
                raise ValueError(
                    "PRM does not support sparse gradients, and a parameter of shape "
                    f"{tuple(p.shape)} has one: create its embedding with `sparse=False`."
                )
            state = self._init_state(p, group, split)
            tensors = {"params": p, "exp_avgs": state["exp_avg"], "exp_avg_sqs": state["exp_avg_sq"]}
            if group["amsgrad"]:
                tensors["max_exp_avg_sqs"] = state["max_exp_avg_sq"]
            if group["mask"] != "none" and not per_tensor:
                if not in_rows:
                    tensors["grad_vars"] = state["grad_var"]
                if group["signal_beta"] is not None:
                    tensors["exp_avg_signals"] = state["exp_avg_signal"]
            key = (p.device, state["exp_avg"].dtype, state["exp_avg_sq"].dtype, p.dtype, grad.dtype)
            if key not in parts:
                parts[key] = Part(hyper, group["foreach"], p.device)
            part = parts[key]
            part.counters.append(state["step"])
            if in_rows:
                spans, lists = self._locator.row_slices(p, tensors | {"grads": grad.contiguous()})
                part.extend([span.tensor for span in spans], lists, state["step"])
                part.spans += spans
                part.tensors |= self._tables.advancing(p, state, in_rows=True)
                continue
            numbers, lists = self._locator.slices(p, tensors | {"grads": grad}, split)
            part.extend(numbers, lists, state["step"])
            if per_tensor and self._locator.layout is None:
                part.tensors[part.owners[-1]] = (p.numel(), state["grad_var"], state["step"])
            elif per_tensor:
                part.spans += [RowSpan(number, 0, 1) for number in numbers]
                part.tensors |= self._tables.advancing(p, state, in_rows=False)
        for part in parts.values():
            part.fused = bool(part) and use_fused(group, part.lists)
        return list(parts.values())

    def _init_state(self, p: Tensor, group: dict[str, Any], split: bool) -> dict[str, Tensor]:
        state = self.state[p]
        masked = group["mask"] != "none"
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device if group["capturable"] else "cpu")
            for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2]:
                state[key] = _new_moment(p, key, group["state_dtype"])
            if masked and group["reduction"] == "per_param":
                state["grad_var"] = torch.zeros_like(p, dtype=_state_dtype(p), memory_format=torch.preserve_format)
            elif masked and not split:
                shape = (masks.n_rows(p),) if group["reduction"] == "per_row" else ()
                state["grad_var"] = torch.zeros(shape, dtype=masks.statistics_dtype(p.device), device=p.device)
            if masked and group["signal_beta"] is not None:
                state["exp_avg_signal"] = _new_moment(p, "exp_avg_signal", group["state_dtype"])
        elif self._locator.flat and group["amsgrad"] and "max_exp_avg_sq" not in state:
            raise ValueError(
                "The checkpoint has no `max_exp_avg_sq`, which DeepSpeed's universal checkpoints do not keep: resume "
                "the original one on as many processes as wrote it, or train with amsgrad=False."
            )
        elif self._locator.flat and group["signal_beta"] is not None and masked and "exp_avg_signal" not in state:
            raise ValueError(
                "The checkpoint has no `exp_avg_signal` of signal_beta, which DeepSpeed's universal checkpoints do "
                "not keep: resume the original one on as many processes as wrote it, or train with signal_beta=None."
            )
        elif masked and not split and "grad_var" not in state:
            raise ValueError(
                "The checkpoint has no `grad_var` of reduction='per_param', which DeepSpeed's universal checkpoints "
                "do not keep: resume the original one on as many processes as wrote it, or train with "
                "reduction='per_tensor', whose `grad_var` they keep."
                if self._locator.flat
                else f"mask={group['mask']!r} is set on a group whose state has no `grad_var`. To start with plain "
                "AdamW set `warmup_steps` instead of mask='none'."
            )
        return state

    @torch.no_grad()
    def get_mask_stats(self, per_group: bool = False) -> dict[str, float] | list[dict[str, float]]:
        """What the mask of the last step was, recomputed from the state: it costs nothing until it is called.

        (With a `state_dtype` of less than float32, from the state as it was rounded after the step.)

        Collective under FSDP and DeepSpeed ZeRO, and the same on every process.

        Args:
            per_group (`bool`): return one dict for each parameter group instead of one for all.

        Returns:
            `mean_q`, `min_q`, `max_q` over scalar parameters; `active_fraction`, the share of them with q > 0;
            `parameter_count`, the scalar parameters that have been trained; `signal_sq` and `noise_scale`, the means
            of S and N over the masked ones (squared gradient units), and `snr`, their ratio; `nonfinite_count`, the
            scalar parameters that an infinite or NaN gradient has reached. Before the first step, and for S and N
            where every mask is `"none"`, the means are NaN.
        """
        self._locate()
        tables = self._mask_tables()
        return [mask_summary([table]) for table in tables] if per_group else mask_summary(tables)

    @torch.no_grad()
    def get_tensor_masks(self) -> list[list[float]]:
        """The mask of each tensor in the last step, its mean over the tensor; one list for each parameter group.

        Recomputed from the state and collective, as `get_mask_stats`. In the order of the group's tensors, of which
        those that were never stepped are left out.
        """
        self._locate()
        return [mean_masks(table) for table, _ in self._mask_tables()]

    def _mask_tables(self) -> list[tuple[Tensor, bool]]:
        groups = [(group, self._locator.local_tensors(group[_NUMBER], group["params"])) for group in self.param_groups]
        return [group_table(group, params, self.state, self._locator, self._tables) for group, params in groups]

    def describe_sharding(self) -> str | None:
        """How many tensors are trained, with which masks, and how they are held; None before the first step.

        For example "290 tensors with per_tensor masks under DeepSpeed ZeRO-3".
        """
        if not any(self.state.values()):
            return None
        layout = self._locator.layout
        reductions = sorted({group["reduction"] if group["mask"] != "none" else "no" for group in self.param_groups})
        if layout is None:
            number, path = sum(map(bool, self.state.values())), "as whole tensors"
        else:
            number = len({number for members in layout.members.values() for number in members})
            path = f"under {layout.path}"
        return f"{number} tensors with {' and '.join(reductions)} masks {path}"


def _state_dtype(param: Tensor) -> torch.dtype:
    return torch.float32 if param.dtype in LOW_PRECISION else param.dtype


def _new_moment(param: Tensor, key: str, state_dtype: str) -> Tensor:
    """Zeros for a state of a parameter's shape, as `state_dtype` says that it is kept."""
    if state_dtype == "8bit" and param.dtype != torch.float64:
        return quantized_zeros(param, signed=key == "exp_avg")
    dtype = torch.bfloat16 if state_dtype == "bf16" and key == "exp_avg" else _state_dtype(param)
    return torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
