"""The name "prm" in transformers, taken back: other tests of the process do not know it."""

import transformers.trainer
from transformers.training_args import OptimizerNames

from prm_hf.integrations.transformers import NAME, OptimCallback


def forget_the_name() -> None:
    if (member := OptimizerNames._value2member_map_.pop(NAME, None)) is not None:
        del OptimizerNames._member_map_[member.name]
        OptimizerNames._member_names_.remove(member.name)
        delattr(OptimizerNames, member.name)
        del transformers.trainer._OPTIMIZER_HANDLERS[member]
    if OptimCallback in transformers.trainer.DEFAULT_CALLBACKS:
        transformers.trainer.DEFAULT_CALLBACKS.remove(OptimCallback)
