"""`prm-hf llamafactory train config.yaml`: LLaMA-Factory with `optim: prm`; its version 1 with `optim_config`.

`llamafactory-cli` has no hook for code of others, so its entry points are called here, in this process, after PRM is
registered. For several GPUs: `torchrun --nproc_per_node 2 -m prm_hf llamafactory train config.yaml`.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from ..optim import PRM
from ..trainers.callbacks import tell_in_effect
from ..trainers.trackers import check_trackers
from .transformers import NAME, register


# By version, the commands of `llamafactory-cli` that train.
COMMANDS = {0: ("train",), 1: ("train", "sft", "rm")}


def main(argv: Sequence[str]) -> None:
    """Runs a command of `llamafactory-cli` that trains, with PRM where no other optimizer is named.

    Args:
        argv (`Sequence[str]`): the command, and what `llamafactory-cli` takes after it: a YAML file, and changes to it
            as `learning_rate=1e-5`. The environment variable `USE_V1=1` chooses LLaMA-Factory's version 1.

    Raises:
        ImportError: LLaMA-Factory is not installed, or a tracker of `report_to` in the YAML file.
        ValueError: the command does not train, PRM would refuse an argument, or such a tracker has no login.
    """
    if importlib.util.find_spec("llamafactory") is None:
        raise ImportError("`prm-hf llamafactory` needs LLaMA-Factory: pip install llamafactory")
    version = int(importlib.import_module("llamafactory.extras.misc").is_env_enabled("USE_V1"))
    if not argv or argv[0] not in COMMANDS[version]:
        given = repr(argv[0]) if argv else "nothing"
        raise ValueError(f"`prm-hf llamafactory` got {given}: name one of {', '.join(COMMANDS[version])}.")
    if version == 1:
        register_v1()
        sys.argv = ["llamafactory-cli", *argv]
        importlib.import_module("llamafactory.v1.launcher").main()
        return
    register()
    sys.argv = ["llamafactory-cli", *argv[1:]]
    args = importlib.import_module("llamafactory.hparams").read_args()
    if isinstance(args, dict):
        args.setdefault("optim", NAME)
        check_trackers(args.get("report_to"), args.get("trackio_space_id"))
    elif "--optim" not in args:
        args += ["--optim", NAME]
    importlib.import_module("llamafactory.train.tuner").run_exp(args)


def register_v1() -> None:
    """Lets `optim_config` of LLaMA-Factory's version 1 have the name `prm`."""
    plugin = importlib.import_module("llamafactory.v1.plugins.trainer_plugins.optimizer").OptimizerPlugin
    plugin(NAME).register()(make_optimizer)


def make_optimizer(model: nn.Module, config: dict[str, Any]) -> PRM:
    """[`PRM`] with the hyperparameters in `optim_config`, beside its `name`.

    Raises:
        ValueError: `lr` is not among them, or PRM refuses one.
    """
    settings = {name: value for name, value in config.items() if name != "name"}
    if "lr" not in settings:
        raise ValueError(
            "`optim_config` has no `lr`: set it there, because LLaMA-Factory gives no `learning_rate` to the "
            "optimizers in it."
        )
    optimizer = PRM([p for p in model.parameters() if p.requires_grad], **settings)

    def tell(stepped: PRM, args: tuple, kwargs: dict[str, Any]) -> None:
        n_processes = dist.get_world_size() if dist.is_initialized() else 1
        if tell_in_effect(stepped, n_processes, is_main=n_processes == 1 or dist.get_rank() == 0):
            told.remove()

    told = optimizer.register_step_post_hook(tell)
    return optimizer
