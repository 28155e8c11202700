"""Callbacks of a trainer: checks of PRM, early stopping, and the evaluation at the end."""

import logging
import math
import sys
from numbers import Real
from typing import Any

from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import has_length

from .._names import warn_renamed
from ..optim import PRM
from ..optim.hyperparameters import NAMES, Hyperparameters
from ..sharding.deepspeed import check_config
from .digests import start_digest


logger = logging.getLogger(__name__)
notes = logging.getLogger("prm_hf.notes")  # what PRM is set to: at a level that is shown by default


def innermost_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer inside accelerate's and DeepSpeed's wrappers; PRM if it is in there."""
    while not isinstance(optimizer, PRM) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def find_prm(optimizer: Optimizer | None) -> PRM | None:
    """The PRM inside accelerate's and DeepSpeed's wrappers, or None if another optimizer is."""
    optimizer = innermost_optimizer(optimizer)
    return optimizer if isinstance(optimizer, PRM) else None


class PRMCallback(TrainerCallback):
    """Checks that PRM is the optimizer in effect, when training begins and at each step, and that its masks are exact.

    After the first step it says so, with how PRM found the tensors and which of its hyperparameters are not the
    defaults. Logs of training steps get the `mask/*` statistics, which every tracker of `report_to` then shows. The
    trainers of this package have it; add it to any other, by `callbacks=[PRMCallback()]` or `add_callback`.

    Raises:
        RuntimeError: another optimizer is in the place of PRM.
        ValueError: DeepSpeed's configuration is one under which masks would not be exact.
    """

    def __init__(self) -> None:
        self._has_told = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        _put_first(self)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs
    ) -> None:
        _put_first(self)  # also where it was added to a finished trainer
        if args.deepspeed_plugin is not None:
            check_config(args.deepspeed_plugin.deepspeed_config)
        _check_in_effect(optimizer)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs
    ) -> None:
        prm = _check_in_effect(optimizer)
        if self._has_told:
            return
        # Not yet after a step that was skipped for the overflow of its gradients
        self._has_told = tell_in_effect(prm, args.world_size, is_main=state.is_world_process_zero)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs,
    ) -> None:
        # Only the logs of training steps have "loss". Our own trainers have added the statistics before.
        prm = find_prm(optimizer)
        if prm is not None and logs is not None and "loss" in logs and "mask/mean_q" not in logs:
            statistics = {f"mask/{name}": value for name, value in prm.get_mask_stats().items()}
            logs.update(statistics)
            state.log_history[-1].update(statistics)


def _put_first(callback: TrainerCallback) -> None:
    """Moves a callback before those of trackers, which a Trainer makes first, so that they see what it adds to logs.

    Called in one of its events. A callback is given neither the trainer nor the handler that calls it: the handler is
    found on the stack. The handler's loop over the list goes on with the callback that it would have come to.
    """
    frame = sys._getframe(1)
    while frame is not None and not isinstance(frame.f_locals.get("self"), CallbackHandler):
        frame = frame.f_back
    if frame is not None:
        callbacks = frame.f_locals["self"].callbacks
        callbacks.insert(0, callbacks.pop(callbacks.index(callback)))


def _check_in_effect(optimizer: Optimizer | None) -> PRM:
    """The PRM inside of an optimizer; RuntimeError if another one is."""
    prm = find_prm(optimizer)
    if prm is None:
        found = type(innermost_optimizer(optimizer)).__name__
        raise RuntimeError(
            f"The run is to train with PRM, but the optimizer in effect is {found}. With DeepSpeed's CPU offload, set "
            '`"zero_force_ds_cpu_optimizer": false`, or accelerate puts its own in the place. `UnslothTrainer` makes '
            "another one where `q_galore_config` is set, and before 2026.10 where `embedding_learning_rate` is: unset "
            "it."
        )
    return prm


def tell_in_effect(prm: PRM, n_processes: int, is_main: bool) -> bool:
    """Logs that PRM trains, which tensors and with which settings; False before its first step, when it cannot know.

    Settings are the learning rate, and the hyperparameters of the first group that are not the defaults.
    """
    path = prm.describe_sharding()
    if path is None:
        return False
    if is_main:
        group = prm.param_groups[0]
        chosen = [name for name in NAMES if name != "lr" and group[name] != getattr(Hyperparameters, name)]
        settings = {"lr": prm.defaults["lr"], **{name: group[name] for name in chosen}}
        text = ", ".join(f"{name}={value!r}" for name, value in settings.items())
        processes = "1 process" if n_processes == 1 else f"{n_processes} processes"
        notes.warning("PRM trains %s on %s. It has %s.", path, processes, text)
    return True


class PopulationRiskStoppingCallback(TrainerCallback):
    """
    Ends training when what is left in the gradients is mostly noise: a criterion that needs no labels.

    For the trainers of this package, with PRM as their optimizer. When an epoch ends in which the mean of the logged
    `mask/snr`, the signal-to-noise ratio pooled over all masked parameters, is below `threshold`, training stops. The
    learning rate's warm-up does not count. A mean of few values decides by chance, so let `logging_steps` be a tenth
    of an epoch or less. Use `prm_estimator="debiased"`, whose ratio goes to 0 where no signal is left; with `"ema"`
    pure noise keeps it at about 1/20. With `prm_reduction="per_row"` the ratio is larger, the more so the shorter the
    rows: look at your logs before you choose `threshold`. A resumed run stops at the same epoch.

    Args:
        threshold (`float`, *optional*, defaults to `0.4`):
            Signal-to-noise ratio, above 0. The default is what served best on the built-in task with
            `prm_reduction="per_tensor"`. In DPO of a model of 0.5 B parameters the ratio of the first epoch was .04 to
            .09 with 30 % of the labels flipped, and .17 to .43 with 10 %: most runs ended there.

    Raises:
        ValueError: `threshold` is not a positive number. When training begins: PRM is not the optimizer or masks
            nothing; the trainer does not log `mask/snr`, or not in every epoch.

    Example:

    ```python
    >>> trainer = PRMDPOTrainer(model, args=args, train_dataset=train, callbacks=[PopulationRiskStoppingCallback()])
    ```
    """

    def __init__(self, threshold: float = 0.4):
        valid = isinstance(threshold, Real) and not isinstance(threshold, bool) and 0 < threshold < math.inf
        if not valid:
            raise ValueError(f"`threshold` is a signal-to-noise ratio and must be above 0, got {threshold!r}.")
        self.threshold = threshold
        self.trainer_logs_ratios = False  # which the trainers of this package set

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs,
    ) -> None:
        prm = find_prm(optimizer)
        if prm is None:
            found = type(innermost_optimizer(optimizer)).__name__
            problem = f"the optimizer is {found}: train with `optim='prm'`, or drop the callback"
        elif all(group["mask"] == "none" for group in prm.param_groups):
            problem = "`mask` is 'none': choose another"
        elif args.logging_strategy != "steps":
            found = args.logging_strategy.value
            problem = f"`logging_strategy` is {found!r}: set it to 'steps', and `logging_steps` to several an epoch"
        elif not self.trainer_logs_ratios:
            problem = "this trainer does not log them: use `PRMDPOTrainer`, `PRMSFTTrainer`, or `PRMTrainerMixin`"
        elif (steps := _steps_an_epoch(args, train_dataloader)) is not None and state.logging_steps > steps:
            problem = (
                f"`logging_steps` is {state.logging_steps} and an epoch has {steps} steps: log several times an epoch"
            )
        else:
            return
        raise ValueError(f"`PopulationRiskStoppingCallback` goes by the logged ratios of PRM's mask, and {problem}.")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        entries = [entry for entry in state.log_history if state.epoch - 1 < entry["epoch"] <= state.epoch]
        logged = [(entry["step"], entry["mask/snr"]) for entry in entries if "mask/snr" in entry]
        # The averages of signal and noise form while the learning rate rises. The debiased estimator has neither in
        # the first step.
        warmup = args.get_warmup_steps(state.max_steps)
        logged = [ratio for step, ratio in logged if step > warmup and math.isfinite(ratio)]
        if logged and (mean := sum(logged) / len(logged)) < self.threshold:
            text = "Training stops after %.3g epochs: the gradients' signal-to-noise ratio was %.3g in the last one."
            logger.warning(text, state.epoch, mean)
            control.should_training_stop = True


def _steps_an_epoch(args: TrainingArguments, train_dataloader: Any) -> int | None:
    """Optimizer steps in an epoch; None of a stream."""
    return (
        math.ceil(len(train_dataloader) / args.gradient_accumulation_steps) if has_length(train_dataloader) else None
    )


class PopulationRiskStopping(PopulationRiskStoppingCallback):
    """The old name of [`PopulationRiskStoppingCallback`]."""

    def __init__(self, threshold: float = 0.4):
        warn_renamed("PopulationRiskStopping", "PopulationRiskStoppingCallback")
        super().__init__(threshold)


class DriftStart(TrainerCallback, ExportableState):
    """Keeps in each checkpoint which weights `drift/params_rel` is measured from, as their digest."""

    def __init__(self, start: str | None = None) -> None:
        self.start = start

    def state(self) -> dict[str, Any]:
        return {"args": {"start": self.start}, "attributes": {}}


class DriftCallback(TrainerCallback):
    """With `drift_metrics`, checks that a resumed run measures drift from where training started, and evaluates at its
    end, unless the weights have just been evaluated.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # A checkpoint from before there was such a state lacks it, and transformers asks for it when it saves
        saved = state.stateful_callbacks.setdefault(DriftStart.__name__, DriftStart().state())["args"]["start"]
        drift = self.trainer.parameter_drift
        if drift is None or (start := start_digest(drift)) is None:
            return
        types = start.split(":")[0]
        if saved is not None and saved.split(":")[0] == types and saved != start:
            raise ValueError(
                "`model` is not the one that training started from, so drift would be measured from other weights. "
                "Pass the model as it was at the start: `resume_from_checkpoint` brings the weights of the "
                "checkpoint. Or set `drift_metrics=False`."
            )
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, DriftStart):
                callback.start = saved or start
                state.stateful_callbacks[DriftStart.__name__] = callback.state()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.drift_metrics and self.trainer.eval_dataset is not None and not self.trainer.weights_are_evaluated():
            self.trainer.evaluate()
