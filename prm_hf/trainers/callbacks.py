"""What has to happen when training begins and ends."""

import logging
from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


if TYPE_CHECKING:
    from .mixin import PRMTrainerMixin


logger = logging.getLogger(__name__)


class PRMCallback(TrainerCallback):
    """Checks when training begins that PRM is the optimizer in effect, and evaluates once more at its end.

    After the first step, when it is known, it says in one line how PRM found the tensors.

    Args:
        trainer: The trainer that it belongs to.
    """

    def __init__(self, trainer: "PRMTrainerMixin"):
        self.trainer = trainer
        self._has_told = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.trainer.trains_with_prm and self.trainer.find_prm() is None:
            raise RuntimeError(
                "The run is to train with PRM, but the optimizer in effect is "
                f"{type(self.trainer.innermost_optimizer()).__name__}: something on the way took PRM's place. With "
                "DeepSpeed's CPU offload, accelerate does unless the DeepSpeed configuration has "
                '`"zero_force_ds_cpu_optimizer": false`.'
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self._has_told or (prm := self.trainer.find_prm()) is None:
            return
        path = prm.describe_sharding()
        if path is not None:  # not yet after a step that was skipped for the overflow of its gradients
            self._has_told = True
            if state.is_world_process_zero:
                processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
                logger.warning("PRM trains %s on %s.", path, processes)  # a level that is shown by default

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.drift_metrics and self.trainer.eval_dataset is not None and not self.trainer.weights_are_evaluated():
            self.trainer.evaluate()
