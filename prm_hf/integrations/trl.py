"""`prm-hf trl dpo --config dpo.yaml`: TRL's own training scripts with `optim="prm"`.

`trl dpo` starts the script in a process of its own, where nobody has registered the name. Here the script runs in this
process, so it is launched as any other: `accelerate launch -m prm_hf trl dpo …`.
"""

import importlib
from collections.abc import Sequence

from transformers import TrainingArguments

from .._extras import require
from ..trainers.trackers import check_trackers
from .optim_args import optimizer_cls_and_kwargs
from .transformers import NAME, register


require("prm_hf.integrations.trl", "trl")

SCRIPTS = ("distillation", "dpo", "grpo", "kto", "reward", "rloo", "sft")


def main(argv: Sequence[str]) -> None:
    """Runs the script of TRL that `argv` begins with, by its own parser, with PRM where no other optimizer is named.

    Args:
        argv (`Sequence[str]`): the script's name, as `"dpo"` or `"sft"`, and its arguments.

    Raises:
        ValueError: TRL has no such script, the script does not know an argument, PRM would refuse one, or a tracker of
            `report_to` has no login.
        ImportError: such a tracker is not installed.
    """
    if not argv or argv[0] not in SCRIPTS:
        given = repr(argv[0]) if argv else "nothing"
        raise ValueError(f"`prm-hf trl` got {given}: name a training script of TRL, one of {', '.join(SCRIPTS)}.")
    if "--accelerate_config" in argv:
        raise ValueError(
            "`--accelerate_config` is for `trl`, which launches: write `accelerate launch --config_file FILE "
            f"-m prm_hf trl {argv[0]} …`."
        )
    register()
    script = importlib.import_module(f"trl.scripts.{argv[0]}")
    parser = script.make_parser(prog=f"prm-hf trl {argv[0]}")
    parser.set_defaults(optim=NAME)
    try:
        arguments = parser.parse_args_and_config(list(argv[1:]))
    except (ValueError, ImportError) as error:  # of transformers and TRL
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(" ".join(str(error).split())) from error
    for args in arguments:  # what is wrong with them is said before the model is loaded
        if isinstance(args, TrainingArguments):
            check_trackers(args.report_to, args.trackio_space_id)
            if args.optim == NAME:
                optimizer_cls_and_kwargs(args)
    script.main(*arguments)
