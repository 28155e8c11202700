"""PRM, Population Risk Minimization: AdamW whose update is scaled by how far the signal stands above the noise.

The class holds the state and dispatches. The algorithm is in `reference.py`, the engine of its steps in `plan.py`, the
checks of its arguments in `hyperparameters.py`; where shards of a tensor live, `prm_hf.sharding` knows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, _use_grad_for_differentiable
from typing_extensions import Unpack

from ..sharding import Locator
from ..sharding.deepspeed import LifeCycle
from .hyperparameters import Hyperparameters, Options, check_checkpoint_group, normalize, signature, with_defaults
from .mask_stats import group_table, mask_summary, mean_masks
from .masks import statistics_dtype
from .plan import StepPlan
from .state import check_state, check_variances, complete, convert, load_state, new_state


class PRM(Optimizer):
    r"""Implements Population Risk Minimization (PRM).

    With $g$ the gradient of the batch mean, one step of one scalar parameter is

    $$\begin{split} m &\leftarrow \beta_1 m + (1-\beta_1) g, \quad v \leftarrow \beta_2 v + (1-\beta_2) g^2, \quad
    s \leftarrow \rho s + (1-\rho)(g - m_{prev})^2 \\
    w &\leftarrow w - \eta \lambda_{wd} w - \eta\, q\, \hat m / (\sqrt{\hat v} + \epsilon) \end{split}$$

    where hats are bias corrections. The mask $q \in [0, 1]$ compares the squared signal S with the noise N of its
    estimate, by default $q = S / (S + \lambda \alpha N + \epsilon_q)$; `masks.py` has all formulas.

    With `reduction="per_tensor"` and `"per_row"` S and N are formed from means over the tensor or the row. With
    `signal_beta` the signal has a slower gradient average of its own.

    Args:
        params (iterable): parameters, `(name, parameter)` pairs, or dicts that define parameter groups.
        lr (`float` or `Tensor`): learning rate η.
        betas (`tuple[float, float]`): decay rates β1, β2 of `exp_avg` and `exp_avg_sq`, each in [0, 1).
        eps (`float`): ε in the denominator of Adam.
        weight_decay (`float`): λ_wd. It is not masked.
        mask (`str`): `"snr"`, `"soft"`, `"hard"` or `"none"`.
        reduction (`str`): how many mask values there are. `"per_row"`: one a row (dimension 0) of tensors of two
            dimensions and more and one of any other tensor, from the means of S and N over it, with as many numbers
            of state beyond AdamW's. `"per_tensor"`: one a parameter tensor. `"per_param"`: one a scalar parameter,
            with a state of the parameter's shape. The paper has `"per_param"`.
        estimator (`str`): `"debiased"`, or `"ema"` (the paper).
        variance_beta (`float`): decay rate ρ of `grad_var`, in [0, 1).
        signal_beta (`float`, *optional*): β_S, decay rate in [0, 1) of a gradient average from which S is estimated,
            at 4 bytes a parameter; for `reduction="per_row"` with `estimator="debiased"`. By default S is estimated
            from `exp_avg`.
        softness (`float`): λ, how strongly noise closes the mask.
        boundary (`str`): α: `"batch"` → 1, `"empirical"` → b/(n-b).
        alpha (`float`, *optional*): α as a number; overrides `boundary`.
        batch_size (`int`, *optional*): b, examples an optimizer step sees over all processes and accumulation steps.
            Needed by `boundary="empirical"`.
        n_dataset (`int`, *optional*): n, examples in the training set. Needed by `boundary="empirical"`.
        mask_eps (`float`, *optional*): ε_q. The default is scale-free (the smallest normal float32); `1e-8` is the
            published behaviour, which closes the mask on the small gradients of language models.
        mask_warmup_steps (`int`): the first steps of each parameter that are plain AdamW (q = 1) while `grad_var`
            forms.
        mask_min_elements (`int`): tensors of fewer elements have q = 1, with the debiased estimator and one mask a row
            or a tensor.
        relative_eps (`float`, *optional*): ε in units of the clipped gradient's root mean square, in place of `eps`:
            ε is `relative_eps` times `max_grad_norm`/√d, with d the scalar parameters of all groups over all
            processes. A step is then 1 + `relative_eps` times as long as with this learning rate, so that it is about
            as long as AdamW's.
        max_grad_norm (`float`): the norm that gradients are clipped to; for `relative_eps` alone.
        amsgrad (`bool`): use the maximum of `exp_avg_sq` so far.
        bias_correction (`bool`): correct m, v and s for their start at zero.
        decoupled_weight_decay (`bool`): `False` adds λ_wd·w to the gradient, as in Adam.
        maximize (`bool`): ascend.
        foreach (`bool`, *optional*): multi-tensor implementation; by default wherever `torch.optim.AdamW` uses it.
        fused (`bool`, *optional*): one Triton kernel for all tensors; by default on CUDA where Triton is installed,
            unless `foreach` or `differentiable` is set.
        capturable (`bool`): keep `step` on the device and let no value decide control flow, for CUDA graphs.
        differentiable (`bool`): let autograd run through the step.
        state_dtype (`str` or `torch.dtype`): how `exp_avg`, `exp_avg_sq` and `exp_avg_signal` are kept: `"float32"`;
            `"bf16"`; or `"8bit"`, codes of 8 bits with a scale for each 256 of them, but in float32 tensors of fewer
            than 4096 elements or with rows of fewer than 64. The step is computed in float32, and what is kept is
            rounded once. FSDP1 takes float32 alone, and `"8bit"` is not for tensors that are sharded by columns.

    All arguments may differ between parameter groups.

    What is kept of a parameter is said in `state.py`.

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
        lr: float | Tensor = Hyperparameters.lr,
        betas: tuple[float, float] = Hyperparameters.betas,
        **hyperparameters: Unpack[Options],
    ) -> None:
        self._forget()
        super().__init__(params, with_defaults(normalize({"lr": lr, "betas": betas, **hyperparameters})))

    def _forget(self) -> None:
        """Starts with no groups, of which it is not known where they live."""
        self._locator = Locator()
        self._deepspeed = LifeCycle(self._locator)
        self._kernel_tables: dict[tuple, Any] = {}
        self._plans: dict[tuple[int, ...], StepPlan] = {}  # by what groups show at a step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        Hyperparameters.of_group({**self.defaults, **normalize(param_group)})
        super().add_param_group(param_group)
        for p in self.param_groups[-1]["params"]:
            if not torch.is_floating_point(p):
                self.param_groups.pop()
                raise ValueError(
                    f"Invalid parameter of dtype {p.dtype}: PRM takes real floating-point parameters; pass complex "
                    "ones as `torch.view_as_real(p)` and leave the others out."
                )
        self._deepspeed.register(self.param_groups[-1])

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_locator" not in self.__dict__:  # a pickled or copied optimizer
            self._forget()
            for group in self.param_groups:
                self._deepspeed.register(group)
        self._plans, self._kernel_tables = {}, {}  # of state that is no more
        normalize(self.defaults, warn=False)
        for number, group in enumerate(self.param_groups):
            normalize(group, warn=False)
            group.setdefault(LifeCycle.NUMBER, number)
            complete(group, self.state, self.defaults)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer. Under DeepSpeed ZeRO `grad_var` goes with the groups, on the first process that of all.

        That is collective there, from the first step on: every process must call it.
        """
        self._absorb_loaded()
        state_dict = super().state_dict()
        self._deepspeed.add_variances(state_dict["param_groups"])
        self._deepspeed.mark_codes(state_dict["param_groups"], self.state.values())
        return state_dict

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state dict. The state keeps the precision that it was saved in, or gets our `state_dtype`.

        Raises:
            ValueError: a group of the checkpoint was trained with another `reduction`; its `grad_var` has another
                shape and meaning, so that moving it would be neither. Or one of the two has a `signal_beta` and the
                other has none. Or it was not trained by PRM.
        """
        own = [{key: group[key] for key in (LifeCycle.NUMBER, "state_dtype")} for group in self.param_groups]
        replaced = [self._locator.has_replaced(g[LifeCycle.NUMBER], g["params"]) for g in self.param_groups]
        given: dict[str, Any] = {}

        def before(_, state_dict: dict[str, Any]) -> None:
            given.update(state_dict)
            pairs = zip(self.param_groups, state_dict["param_groups"], strict=False) if state_dict["state"] else ()
            for number, (ours, theirs) in enumerate(pairs):
                check_checkpoint_group(number, ours, theirs)
                if not self._deepspeed.has_variances(theirs):
                    check_variances(number, ours, [state_dict["state"].get(i) for i in theirs["params"]])

        def after(_) -> None:
            for group, kept in zip(self.param_groups, own, strict=True):
                group.update(kept)
                group.pop(LifeCycle.CODES, None)
            load_state(self.param_groups, self.state, given, replaced)

        # Among the hooks of others: what those before have changed is loaded, what those after change stays.
        with (
            self.register_load_state_dict_pre_hook(before),
            self.register_load_state_dict_post_hook(after, prepend=True),
        ):
            super().load_state_dict(state_dict)

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs a single optimization step.

        Args:
            closure (`Callable`, *optional*): reevaluates the model and returns the loss.

        Raises:
            ValueError: a group's settings were changed to something invalid, or at the first step the parameters are
                sharded and a group's `reduction` or `state_dtype` is not for that.
            RuntimeError: a gradient is sparse; or at the first step the parameters are sharded in a way that PRM does
                not know, or they took the place of others whose state was loaded.
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

    # Traced into one graph, the step would be compiled anew whenever one of its scalars changes.
    @torch._disable_dynamo
    def _step(self) -> None:
        self._absorb_loaded()
        groups = [group for group in self.param_groups if group["params"]]
        # DeepSpeed shows one group, or one part of a group, at a time
        shown = tuple(id(group["params"][0]) for group in groups)
        plan = self._plans.get(shown)
        if plan is None or not plan.holds(groups, self.state):
            plan = self._make_plan(groups, shown)
        if self._deepspeed.is_initialization(groups):
            plan.drop_gradients()
            return
        plan.run(getattr(self, "grad_scale", None), getattr(self, "found_inf", None))

    def _make_plan(self, groups: list[dict[str, Any]], shown: tuple[int, ...]) -> StepPlan:
        self._plans.pop(shown, None)
        self._locate()
        if not self._locator.flat:
            self._plans.clear()
        changes_masks = type(self).transform_unit_masks is not PRM.transform_unit_masks
        if changes_masks and any(g["mask"] != "none" and g["reduction"] == "per_param" for g in groups):
            raise ValueError(
                "Invalid reduction='per_param': `transform_unit_masks` is given masks of tensors or rows. Use "
                "reduction='per_tensor' or 'per_row'."
            )
        transform = self.transform_unit_masks if changes_masks else None
        variances, tables = self._deepspeed.variances, self._kernel_tables
        with torch.device("cpu"):  # whatever the default device, tables are made on the host
            plan = StepPlan(groups, self.state, self._init_state, self._locator, variances, tables, transform)
        self._plans[shown] = plan
        return plan

    def _init_state(self, p: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state, flat = self.state[p], self._locator.buffer(p)
        if not state:
            state.update(new_state(p, group, flat))
        else:
            check_state(state, group, flat)
            convert(p, state, group["state_dtype"], flat)
        return state

    def transform_unit_masks(self, q: Tensor) -> Tensor:
        """Changes the masks of a step; a hook for subclasses, which study what a mask does.

        Called once a step, before the update, with the masks of all tensors (`per_tensor`) or rows (`per_row`) that
        are stepped. A subclass that overrides it steps with the multi-tensor implementation, and not with `per_param`.

        Args:
            q: the masks, float64 `(units,)`, in the order of the tensors; under sharding those of all processes.

        Returns:
            The masks to be used, of the same shape.
        """
        return q

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether GradScaler may leave it to the step to unscale gradients and to do nothing where they overflowed.

        It then hands over `grad_scale` and `found_inf`, and need not wait for the device. Not where a step counts on
        the host, which would have to wait to know whether it was one; and not for sharded tensors.
        """
        if not all(group["fused"] and group["capturable"] for group in self.param_groups):
            return False
        self._locate()  # GradScaler asks before the first step
        return not self._locator.sharded

    def _locate(self) -> None:
        self._absorb_loaded()
        groups = self.param_groups
        self._deepspeed.notice(groups, self.state)
        self._locator.locate([(group[LifeCycle.NUMBER], group["params"]) for group in groups])
        layout = self._locator.layout
        for group in groups if self._locator.sharded else ():
            layout.path.check(group["reduction"], group["state_dtype"])
            if group["mask"] != "none" and group["reduction"] == "per_row":
                layout.check_rows(self._locator.numbers(group[LifeCycle.NUMBER]))
        if layout.flat:
            self._deepspeed.prepare(groups, self.state, statistics_dtype(layout.locals[0].device))

    def _absorb_loaded(self) -> None:
        """Takes over what a checkpoint put into the parameter groups."""
        for group in self.param_groups:
            normalize(group, warn=False)
            if LifeCycle.NUMBER not in group:  # put there without `add_param_group`
                self._deepspeed.register(group)
            check_checkpoint_group(group[LifeCycle.NUMBER], self._deepspeed.settings(group), group)
        self._deepspeed.absorb(self.param_groups)

    @torch.no_grad()
    def get_mask_stats(self, per_group: bool = False) -> dict[str, float] | list[dict[str, float]]:
        """What the mask of the last step was, recomputed from the state as it is kept.

        Collective under FSDP and DeepSpeed ZeRO, and the same on every process.

        Args:
            per_group (`bool`): return one dict for each parameter group instead of one for all.

        Returns:
            `mean_q`, `min_q`, `max_q`, `active_fraction`, `parameter_count`, `signal_sq`, `noise_sq`, `snr` and
            `nonfinite_count`, as [`mask_summary`] defines them.
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
        tables, variances = [], self._deepspeed.variances
        with torch.device("cpu"):
            for group in self.param_groups:
                params = self._locator.local_tensors(group[LifeCycle.NUMBER], group["params"])
                tables.append(group_table(group, params, self.state, self._locator, variances))
        return tables

    def describe_sharding(self) -> str | None:
        """How many tensors are trained, with which masks, and how they are held; None before the first step.

        For example "290 tensors with per_tensor masks under DeepSpeed ZeRO-3".
        """
        if not any(self.state.values()):
            return None
        reductions = sorted({group["reduction"] if group["mask"] != "none" else "no" for group in self.param_groups})
        number, where = self._locator.describe(sum(map(bool, self.state.values())))
        return f"{number} tensors with {' and '.join(reductions)} masks {where}"


PRM.__signature__ = signature()
