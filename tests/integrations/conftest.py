"""The name is registered for one test, and forgotten after it: other tests of the process do not know it."""

import pytest
import transformers.trainer
from transformers.training_args import OptimizerNames

from prm_hf.integrations.transformers import NAME, OptimCallback


@pytest.fixture(autouse=True)
def forget_the_name():
    yield
    if (member := OptimizerNames._value2member_map_.pop(NAME, None)) is not None:
        del OptimizerNames._member_map_[member.name]
        OptimizerNames._member_names_.remove(member.name)
        delattr(OptimizerNames, member.name)
        del transformers.trainer._OPTIMIZER_HANDLERS[member]
        transformers.trainer.DEFAULT_CALLBACKS.remove(OptimCallback)
