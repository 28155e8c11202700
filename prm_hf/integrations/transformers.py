"""`optim="prm"` in every Trainer of transformers, with `optim_args` as `"reduction=per_row,relative_eps=10"`.

transformers has no public way to add an optimizer. What is extended here are the two places where it keeps its own.
"""

import transformers
import transformers.trainer
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.training_args import OptimizerNames

from ..trainers.callbacks import PRMCallback
from .optim_args import optimizer_cls_and_kwargs


NAME = "prm"


class OptimCallback(PRMCallback):
    """[`PRMCallback`] for all Trainers of a process: it does nothing where `optim` is not the name registered here."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if _is_asked_for(args):
            optimizer_cls_and_kwargs(args)  # raises where PRM would refuse one

    def on_train_begin(self, args: TrainingArguments, *others, **kwargs) -> None:
        if _is_asked_for(args):
            super().on_train_begin(args, *others, **kwargs)

    def on_step_end(self, args: TrainingArguments, *others, **kwargs) -> None:
        if _is_asked_for(args):
            super().on_step_end(args, *others, **kwargs)

    def on_log(self, args: TrainingArguments, *others, **kwargs) -> None:
        if _is_asked_for(args):
            super().on_log(args, *others, **kwargs)


def register() -> None:
    """Lets `TrainingArguments`, `HfArgumentParser` and every Trainer of this process know the optimizer `"prm"`.

    Call it before arguments are parsed. Each Trainer with `optim="prm"` then has [`OptimCallback`] too. A second call
    changes nothing.

    Raises:
        ImportError: this version of transformers keeps its optimizers elsewhere.
    """
    handlers = getattr(transformers.trainer, "_OPTIMIZER_HANDLERS", None)
    callbacks = getattr(transformers.trainer, "DEFAULT_CALLBACKS", None)
    if handlers is None or callbacks is None:
        raise ImportError(
            f'`optim="prm"` cannot be registered in transformers {transformers.__version__}, which keeps its '
            "optimizers or callbacks in other places than 5.6 to 5.23. Pass PRM as "
            "`Trainer(optimizer_cls_and_kwargs=(PRM, {...}))`, or use `PRMDPOTrainer` and `PRMSFTTrainer`."
        )
    if NAME not in OptimizerNames._value2member_map_:
        handlers[_new_member()] = lambda context: optimizer_cls_and_kwargs(context.args)
    if OptimCallback not in callbacks:
        callbacks.append(OptimCallback)


def _new_member() -> OptimizerNames:
    """Adds `OptimizerNames.PRM`. An enum has no way to do that; these are the tables that its metaclass fills."""
    member = str.__new__(OptimizerNames, NAME)
    member._name_, member._value_ = NAME.upper(), NAME
    member.__objclass__, member._sort_order_ = OptimizerNames, len(OptimizerNames)
    # A process that has not registered the name learns it when it loads the pickle, as a worker or `training_args.bin`
    member.__reduce_ex__ = lambda protocol: (_member, ())
    setattr(OptimizerNames, member._name_, member)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[NAME] = member
    return member


def _member() -> OptimizerNames:
    register()
    return OptimizerNames(NAME)


def _is_asked_for(args: TrainingArguments) -> bool:
    """Whether `optim` is the name registered here. Our own configurations have it as plain text, and other checks."""
    return isinstance(args.optim, OptimizerNames) and args.optim == NAME
