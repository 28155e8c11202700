"""What any Trainer can be given to be sure of PRM: a check when training begins, and a line on what is stepped."""

import logging

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
