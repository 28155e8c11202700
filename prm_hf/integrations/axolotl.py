"""`optimizer: prm` in axolotl, with `plugins: [prm_hf.integrations.axolotl.PRMPlugin]` in the same file."""

from typing import Any

from axolotl.integrations.base import BasePlugin
from transformers import Trainer

from .transformers import NAME, register


class PRMPlugin(BasePlugin):
    """Registers the optimizer before the configuration becomes training arguments.

    Raises:
        ValueError: when the trainer is made: the configuration has another `optimizer`.
    """

    def register(self, cfg: Any) -> None:
        register()

    def post_trainer_create(self, cfg: Any, trainer: Trainer) -> None:
        if trainer.args.optim != NAME or trainer.optimizer_cls_and_kwargs is not None:
            raise ValueError(
                f"The plugin PRMPlugin is listed, and `optimizer` is {cfg.optimizer!r}: set `optimizer: prm`, or "
                "remove the plugin."
            )
