"""`--optimizer prm` in ms-swift: what a file for its `--external_plugins` imports."""

from typing import Any

from swift.optimizers import OptimizerCallback, optimizers_map
from transformers.training_args import OptimizerNames

from .transformers import NAME, register


class PRMOptimizerCallback(OptimizerCallback):
    """Sets `optim` to PRM, which swift's `optimizer` wins over, before the Trainer is made."""

    def __init__(self, args: Any, trainer: Any) -> None:
        args.optim = OptimizerNames(NAME)
        super().__init__(args, trainer)


register()
optimizers_map[NAME] = PRMOptimizerCallback
