"""What a Trainer can be given to be sure of PRM when training begins, and to end when it has nothing left to learn."""

import logging
import math

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..optim import PRM
from ..sharding.deepspeed import check_config


logger = logging.getLogger(__name__)


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
    """Checks when training begins that PRM is the optimizer in effect, and that its masks will be exact.

    After the first step, when it is known, it says in one line how PRM found the tensors. Our trainers have it; to any
    other one that trains with PRM it can be added: `Trainer(…, callbacks=[PRMCallback()])`.
    """

    def __init__(self) -> None:
        self._has_told = False

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs,
    ) -> None:
        if args.deepspeed_plugin is not None:
            check_config(args.deepspeed_plugin.deepspeed_config)
        if find_prm(optimizer) is None:
            raise RuntimeError(
                "The run is to train with PRM, but the optimizer in effect is "
                f"{type(innermost_optimizer(optimizer)).__name__}: something on the way took PRM's place. With "
                "DeepSpeed's CPU offload, accelerate does unless the DeepSpeed configuration has "
                '`"zero_force_ds_cpu_optimizer": false`.'
            )

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs,
    ) -> None:
        prm = find_prm(optimizer)
        if self._has_told or prm is None:
            return
        path = prm.describe_sharding()
        if path is not None:  # not yet after a step that was skipped for the overflow of its gradients
            self._has_told = True
            if state.is_world_process_zero:
                processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
                logger.warning("PRM trains %s on %s.", path, processes)  # a level that is shown by default


class PopulationRiskStopping(TrainerCallback):
    """
    Ends training when what is left in the gradients is mostly noise: a criterion that needs no labels.

    For the trainers of this package, with PRM as their optimizer. When an epoch ends in which the mean of the logged
    `mask/snr`, the signal-to-noise ratio pooled over all masked parameters, is below `threshold`, training stops. The
    learning rate's warm-up does not count, and an epoch without another logged value decides nothing; a mean of few
    values decides by chance, so let `logging_steps` be a tenth of an epoch or less. It is meant for
    `prm_estimator="debiased"`, whose ratio goes to 0 where no signal is left; with `"ema"` pure noise keeps it at
    about 1/20. With `prm_reduction="per_row"` the ratio is larger, the more so the shorter the rows, as what is below
    0 in a row is not weighed against what is above 0 in others: look at your logs before you choose `threshold`.

    All that it knows is in the logs, which checkpoints carry, so a resumed run stops where it would have.

    Args:
        threshold (`float`, *optional*, defaults to `0.4`):
            Signal-to-noise ratio, above 0. The default is what served best on the built-in task with
            `prm_reduction="per_tensor"`. In DPO of a model of 0.5 B parameters the ratio of the first epoch was .04 to
            .09 with 30 % of the labels flipped, and .17 to .43 with 10 %, the more the smaller the learning rate: most
            runs ended there.

    Raises:
        ValueError: `threshold` is not a positive number; when training begins, PRM is not the optimizer, masks
            nothing, or nothing is logged within an epoch (`logging_strategy`); at the end of an epoch, `mask/snr` is
            not among what is logged.

    Example:

    ```python
    >>> trainer = PRMDPOTrainer(model, args=args, train_dataset=train, callbacks=[PopulationRiskStopping()])
    ```
    """

    def __init__(self, threshold: float = 0.4):
        if isinstance(threshold, bool) or not 0 < threshold < math.inf:
            raise ValueError(f"`threshold` is a signal-to-noise ratio and must be above 0, got {threshold!r}.")
        self.threshold = threshold

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Optimizer | None = None,
        **kwargs,
    ) -> None:
        prm = find_prm(optimizer)
        if prm is None:
            raise ValueError(
                "`PopulationRiskStopping` goes by the statistics of PRM's mask, and the optimizer is "
                f"{type(innermost_optimizer(optimizer)).__name__}: train with `optimizer_name='prm'`, or drop the "
                "callback."
            )
        if all(group["mask"] == "none" for group in prm.param_groups):
            raise ValueError("`PopulationRiskStopping` goes by PRM's mask, and `mask` is 'none': choose another.")
        if args.logging_strategy != "steps":
            raise ValueError(
                f"`PopulationRiskStopping` goes by what is logged within an epoch, and `logging_strategy` is "
                f"{args.logging_strategy!r}: set it to 'steps', and `logging_steps` to several an epoch."
            )

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        entries = [entry for entry in state.log_history if state.epoch - 1 < entry["epoch"] <= state.epoch]
        logged = [(entry["step"], entry["mask/snr"]) for entry in entries if "mask/snr" in entry]
        if not logged and any("loss" in entry for entry in entries):
            raise ValueError(
                "`PopulationRiskStopping` goes by `mask/snr` in the logs, and this trainer does not log it: use "
                "`PRMDPOTrainer`, `PRMSFTTrainer`, or `PRMTrainerMixin` in a class of your own."
            )
        # While the learning rate rises, the averages of signal and noise form; in the first step of the debiased
        # estimator there is neither.
        warmup = args.get_warmup_steps(state.max_steps)
        logged = [ratio for step, ratio in logged if step > warmup and math.isfinite(ratio)]
        if logged and sum(logged) / len(logged) < self.threshold:
            logger.warning(
                "Training stops after %.3g epochs: the gradients' signal-to-noise ratio was %.3g in the last one.",
                state.epoch,
                sum(logged) / len(logged),
            )
            control.should_training_stop = True
