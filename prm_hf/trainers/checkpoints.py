"""Resuming from a checkpoint that was written under another way of sharding, or that must not be resumed from."""

import os

import torch
from torch import nn
from transformers.trainer import SCHEDULER_NAME

from ..optim import PRM, masks
from ..optim.hyperparameters import check_checkpoint_group
from ..sharding.checkpoint import is_sharded, load_model, load_optimizer, saved_variance_shapes
from .callbacks import find_prm, innermost_optimizer


class CheckpointMixin:
    """Mixin for a `Trainer` with PRM, to be listed before it in a class' bases.

    `train(resume_from_checkpoint=…)` under FSDP2 then also takes a checkpoint of one process or DDP, and these take
    one of FSDP2 (as `SHARDED_STATE_DICT`). A checkpoint of another `reduction` raises an error that says so.
    """

    def find_prm(self) -> PRM | None:
        """[`callbacks.find_prm`] of the trainer's optimizer."""
        return find_prm(self.optimizer)

    def innermost_optimizer(self) -> torch.optim.Optimizer | None:
        """[`callbacks.innermost_optimizer`] of the trainer's optimizer."""
        return innermost_optimizer(self.optimizer)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._was_written_elsewhere(resume_from_checkpoint):
            load_model(self.model if model is None else model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        prm = self.find_prm()
        if checkpoint is None or self.is_deepspeed_enabled or prm is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if is_sharded(checkpoint):
            if plugin is not None and plugin.fsdp_version == 1:
                raise ValueError(
                    "accelerate loads no optimizer state from an FSDP1 checkpoint of `SHARDED_STATE_DICT`, so the "
                    "optimizer would start anew. Use `fsdp_state_dict_type: FULL_STATE_DICT`, or FSDP2 "
                    "(`fsdp_version: 2`)."
                )
            self._check_sharded_reduction(prm, checkpoint)
        if self._was_written_elsewhere(checkpoint) or is_sharded(checkpoint):
            load_optimizer(self.model, prm, checkpoint)
            path = os.path.join(checkpoint, SCHEDULER_NAME)
            self.lr_scheduler.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        else:
            super()._load_optimizer_and_scheduler(checkpoint)

    def _was_written_elsewhere(self, checkpoint: str) -> bool:
        """Whether FSDP2 is to read the checkpoint of whole tensors, or whole tensors are to read FSDP2's."""
        if self.is_fsdp_enabled:
            whole = os.path.isfile(os.path.join(checkpoint, "optimizer.pt"))
            return whole and self.accelerator.state.fsdp_plugin.fsdp_version == 2
        return is_sharded(checkpoint)

    def _check_sharded_reduction(self, prm: PRM, checkpoint: str) -> None:
        # torch would only say that two shapes differ
        shapes = saved_variance_shapes(checkpoint)
        names = {p: name for name, p in self.model.named_parameters()}
        for number, group in enumerate(prm.param_groups):
            for p in group["params"]:
                if group["mask"] != "none" and p.dim() > 0 and names.get(p) in shapes:
                    shape, rows = shapes[names[p]], (masks.n_rows(p),)
                    theirs = "per_row" if shape == rows else "per_param" if shape else "per_tensor"
                    if shape != rows or p.shape != rows:  # a single element is a row of its own
                        check_checkpoint_group(number, group, {**group, "reduction": theirs})
