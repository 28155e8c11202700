"""What has to happen when training begins and ends."""

from typing import TYPE_CHECKING

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


if TYPE_CHECKING:
    from .mixin import PRMTrainerMixin


class PRMCallback(TrainerCallback):
    """Checks at the beginning of training that PRM is the optimizer in effect, and evaluates once more at its end.

    Args:
        trainer: The trainer that it belongs to.
    """

    def __init__(self, trainer: "PRMTrainerMixin"):
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if self.trainer.trains_with_prm and self.trainer.find_prm() is None:
            raise RuntimeError(
                "The run is to train with PRM, but the optimizer in effect is "
                f"{type(self.trainer.innermost_optimizer()).__name__}: something on the way took PRM's place. With "
                "DeepSpeed's CPU offload, accelerate does unless the DeepSpeed configuration has "
                '`"zero_force_ds_cpu_optimizer": false`.'
            )

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.drift_metrics and self.trainer.eval_dataset is not None and not self.trainer.weights_are_evaluated():
            self.trainer.evaluate()
