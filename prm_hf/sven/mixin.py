"""What Sven adds to a Hugging Face trainer: gradients that are Sven's step, over accumulated batches and processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from .arguments import SvenArguments, settings_of
from .capture import Capture
from .checks import check_trainer
from .diagnostics import SampleGram, gram_of
from .distributed import concatenate, gather_jacobians, gather_rows
from .hyperparameters import SvenSettings
from .jacobian import Jacobian
from .pseudoinverse import Residuals
from .step import (
    SvenStep,
    check_jacobian,
    draw_masks,
    solve,
    solve_samples,
    weighted_gradients,
    without_worse_components,
)


@dataclass
class _Pass:
    """A batch of a step: what it was computed from, to compute it again, and its per-sample gradients.

    `losses` has its graph as long as no other batch follows.
    """

    inputs: dict[str, Any]
    random: tuple[Tensor, Tensor | None]
    losses: Tensor
    jacobian: Jacobian


class SvenMixin:
    """Mixin for trainers, to be listed before the trainer in a class' bases.

    In `training_step` it sets `p.grad` to Sven's step, over all rows of the accumulated batches and of all processes
    at once, so that the optimizer of the run makes it: with `optim="sgd"` exactly the step. Each log of a training
    step carries `sven/rank`, the singular values that the last step used, `sven/largest_singular_value` and
    `sven/condition`, the largest over the smallest that was used.

    A subclass has `per_sample_losses`. The settings are those of `args`, if these are [`SvenArguments`], or the
    attribute `sven_settings`.

    Attributes:
        last_step (`SvenStep`, *optional*):
            The residuals, singular values and coefficients of the last step.
    """

    sven_settings: SvenSettings | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.args, SvenArguments):
            self.sven_settings = settings_of(self.args)
        elif self.sven_settings is None:
            self.sven_settings = SvenSettings(seed=self.args.seed)
        check_trainer(self)
        self.last_step: SvenStep | None = None
        self._passes: list[_Pass] = []
        self._is_checked = False
        self._looped: set[nn.Parameter] = set()

    def per_sample_losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The loss of each row of a batch, `(B,)`, at least 0, with its graph."""
        raise TypeError(f"{type(self).__name__} lacks `per_sample_losses`: define it, or use SvenTrainer.")

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Sets the gradients at the last batch of a step, and returns the mean loss of this batch for the log."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):  # of schedule-free optimizers
            self.optimizer.train()
        # The gradients of all processes are summed here, so that DDP's own hooks have nothing to do
        module = self.accelerator.unwrap_model(model)
        one = self._first_pass(module, self._prepare_inputs(inputs))
        self._passes.append(one)
        is_last = self.accelerator.sync_gradients
        if not is_last or len(self._passes) > 1:
            one.jacobian = one.jacobian.compact()
        reported = one.losses.detach().mean() / self.current_gradient_accumulation_steps
        if not is_last:
            one.losses = one.losses.detach()
            return reported
        try:
            self._set_gradients(module)
        finally:
            self._passes = []
        return reported

    def per_sample_gram(self, inputs: dict[str, Any]) -> SampleGram:
        """The Gram matrix of the gradients of a batch's rows on this process, without training.

        Args:
            inputs: the batch, as the trainer's dataloader gives it.
        """
        one = self._first_pass(self.accelerator.unwrap_model(self.model), self._prepare_inputs(inputs))
        return gram_of(one.jacobian, one.losses)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds `sven/*` to the logs of training steps."""
        if "loss" in logs and self.last_step is not None:
            s, rank = self.last_step.singular_values, self.last_step.rank
            logs["sven/rank"] = rank
            if rank:
                logs["sven/largest_singular_value"] = s[0].item()
                logs["sven/condition"] = (s[0] / s[rank - 1]).item()
        super().log(logs, start_time)

    # ---- The step ----

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        with self.compute_loss_context_manager():
            return self.per_sample_losses(model, dict(inputs))

    def _first_pass(self, model: nn.Module, inputs: dict[str, Any]) -> _Pass:
        random = _random_state(self.args.device)
        with Capture(model, self.sven_settings.jacobian, self._looped) as capture:
            losses = self._losses(model, inputs)
        jacobian = capture.differentiate(losses)
        if not self._is_checked:
            is_rounded = self.accelerator.mixed_precision != "no"
            check_jacobian(jacobian, losses, jacobian.params, is_rounded)
            self._is_checked = True
        return _Pass(inputs, random, losses, jacobian)

    def _set_gradients(self, model: nn.Module) -> None:
        passes, settings, params = self._passes, self.sven_settings, self._passes[-1].jacobian.params
        local = torch.cat([one.losses.detach().float() for one in passes])
        parts = gather_rows(local) if _is_distributed() else [local]
        residuals = settings.residuals(torch.cat(parts))
        start = sum(map(len, parts[: self.args.process_index]))
        mine = slice(start, start + len(local))
        masks = None
        if settings.param_fraction < 1:
            key = (settings.seed, self.state.global_step)
            masks = draw_masks(params, settings.param_fraction, settings.mask_by_block, key)

        def direction(coefficients: Tensor) -> dict[nn.Parameter, Tensor]:
            of_samples = (residuals.factors.T @ coefficients)[mine]
            grads = self._weighted_gradients(model, of_samples, params)
            return {p: g if masks is None else g * masks[p] for p, g in zip(params, grads, strict=True)}

        step = self._solve(residuals, masks)
        if settings.variable_k:
            mean = torch.cat(parts).mean()
            step = without_worse_components(step, direction, lambda update: self._mean_loss(model, update), mean)
        for p, grad in direction(step.coefficients).items():
            p.grad = grad
        self.last_step = step

    def _solve(self, residuals: Residuals, masks: dict[nn.Parameter, Tensor] | None) -> SvenStep:
        """The coefficients of the rows of all batches and processes, the same on all processes."""
        settings = self.sven_settings
        local = concatenate([one.jacobian for one in self._passes])
        for one in self._passes:
            one.jacobian = None
        if not _is_distributed():
            return solve(local, residuals, settings, masks, self.state.global_step)
        whole = concatenate(gather_jacobians(local.compact()))
        if settings.svd == "gram":
            gram = torch.cat(gather_rows(local.gram(whole, masks)))
            step = solve_samples((gram + gram.T) / 2, residuals, settings)
        else:
            step = solve(whole, residuals, settings, masks, self.state.global_step)
        return _of_the_first_process(step)

    def _weighted_gradients(self, model: nn.Module, weights: Tensor, params: list[nn.Parameter]) -> list[Tensor]:
        """Σ weights·∇losses over the rows of all processes; batches without a graph are computed again."""
        total: list[Tensor] = []
        start = 0
        for one in self._passes:
            losses = one.losses
            if not losses.requires_grad:
                with _replayed(one.random, self.args.device):
                    losses = self._losses(model, one.inputs)
            grads = weighted_gradients(losses, weights[start : start + len(losses)], params)
            total = [a + b for a, b in zip(total, grads, strict=True)] if total else grads
            start += len(losses)
        if _is_distributed():
            for grad in total:
                dist.all_reduce(grad)
        return total

    @torch.no_grad()
    def _mean_loss(self, model: nn.Module, update: dict[nn.Parameter, Tensor]) -> Tensor:
        """The mean loss over the rows of all processes after an SGD step with this gradient, which is not made."""
        rate, kept = self._get_learning_rate(), {p: p.detach().clone() for p in update}
        try:
            for p, grad in update.items():
                p.data.sub_(grad, alpha=rate)
            found = []
            for one in self._passes:
                with _replayed(one.random, self.args.device):
                    found.append(self._losses(model, one.inputs).float())
        finally:
            for p, value in kept.items():
                p.data.copy_(value)
        losses = torch.cat(found)
        return torch.cat(gather_rows(losses) if _is_distributed() else [losses]).mean()


def _is_distributed() -> bool:
    return PartialState().num_processes > 1


def _of_the_first_process(step: SvenStep) -> SvenStep:
    """The step as the first process found it: devices may round differently."""
    found = [step]
    dist.broadcast_object_list(found, src=0)
    device = step.residuals.device
    return SvenStep(*(x.to(device) for x in (found[0].components, found[0].singular_values, found[0].residuals)))


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


class _replayed:
    """Random numbers, as those of dropout, from an earlier state on; afterwards they go on as if it had not been."""

    def __init__(self, state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
        self.state, self.device = state, device

    def __enter__(self) -> None:
        self.before = _random_state(self.device)
        self._set(self.state)

    def __exit__(self, *exception: object) -> None:
        self._set(self.before)

    def _set(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.device)
