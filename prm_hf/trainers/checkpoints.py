"""Checkpoints of a trainer: written so that half of one is known, and resumed from another way of sharding."""

import os
import tempfile
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch import nn
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from ..optim import PRM, masks
from ..optim.hyperparameters import check_checkpoint_group
from ..sharding.checkpoint import is_sharded, load_model, load_optimizer, saved_variance_shapes
from ..sharding.fsdp import LOST_STATE
from .callbacks import find_prm, innermost_optimizer
from .completeness import (
    OPTIMIZERS,
    checkpoints_of,
    deepspeed_folder,
    described,
    last_complete_checkpoint,
    problems_of,
)


logger = get_logger(__name__)

# What `torch.save` says in its RuntimeError where a file cannot be written
_FAILED_WRITES = ("PytorchStreamWriter", "inline_container", "iostream")


class CheckpointMixin:
    """Mixin for a `Trainer` with PRM, to be listed before it in a class' bases.

    `train(resume_from_checkpoint=…)` under FSDP2 then also takes a checkpoint of one process or DDP, and these take
    one of FSDP2 (as `SHARDED_STATE_DICT`). A checkpoint of another `reduction` raises an error that says so.

    A checkpoint that is not complete is never resumed from: `resume_from_checkpoint=True` takes the last complete one
    and warns of those that it leaves out, or starts again where none is complete; a path raises an error.
    """

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs) -> TrainOutput:
        self._check_output_dir()
        if resume_from_checkpoint:
            resume_from_checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _run_epoch(self, *args, **kwargs) -> None:
        # Resumed at the last step, inside an epoch: transformers looks at `max_steps` only behind one more step
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # ---- Which checkpoint ----

    def _check_output_dir(self) -> None:
        if self.args.save_strategy == SaveStrategy.NO:
            return
        try:
            os.makedirs(self.args.output_dir, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.args.output_dir) as probe:
                probe.write(b"0")
        except OSError as error:
            raise OSError(
                f"`output_dir` is {self.args.output_dir!r}, in which checkpoints cannot be written ({error}). Name "
                "another folder, or set `save_strategy='no'`."
            ) from error

    def _checkpoint_to_resume(self, resume_from_checkpoint: str | bool) -> str | None:
        if resume_from_checkpoint is True:
            checkpoint = self._last_complete_checkpoint()
            if checkpoint is None:
                return None
        else:
            checkpoint = str(resume_from_checkpoint)
            problems = problems_of(checkpoint)
            if problems:
                raise ValueError(
                    f"`resume_from_checkpoint` is {checkpoint!r}, which is no complete checkpoint: "
                    f"{described(problems)}. Name another one, or pass True, which takes the last complete one. To "
                    "start from its weights with a fresh optimizer, load them as the model."
                )
        self._check_is_ours(Path(checkpoint))
        return checkpoint

    def _last_complete_checkpoint(self) -> str | None:
        """The last complete checkpoint in `output_dir`, or None where none of them is complete. Collective."""
        folder = self.args.output_dir
        if not checkpoints_of(folder):
            raise ValueError(
                f"`resume_from_checkpoint` is True, and `output_dir`, {folder!r}, has no checkpoint: name one, or "
                "leave it unset to start from the beginning."
            )
        found = [None]
        if self.is_world_process_zero():  # one process looks, so that all go the same way
            last = last_complete_checkpoint(folder, logger.warning)
            found = [None if last is None else str(last)]
        broadcast_object_list(found)
        if found[0] is None:
            logger.warning(f"No checkpoint in {folder} is complete: the run starts again from the beginning.")
        else:
            logger.info(f"The run goes on from {found[0]}.")
        return found[0]

    def _check_is_ours(self, checkpoint: Path) -> None:
        """Raises where a complete checkpoint has no optimizer state for the way that this run is sharded."""
        deepspeed = deepspeed_folder(checkpoint)
        problem = None
        if not self.is_deepspeed_enabled:
            whole = any((checkpoint / name).is_file() for name in OPTIMIZERS) or is_sharded(checkpoint)
            problem = None if whole else "was written under DeepSpeed, and this run is without"
        elif deepspeed is None:
            problem = "was not written under DeepSpeed, and this run is under it"
        else:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            universal = config.get("checkpoint", {}).get("load_universal", False)
            stage = config.get("zero_optimization", {}).get("stage", 0)
            if "scheduler" not in config and not (checkpoint / SCHEDULER_NAME).is_file():
                problem = f"lacks {SCHEDULER_NAME}"
            elif stage and not universal and not any(deepspeed.glob("*_optim_states.pt")):
                problem = f"has no optimizer state of ZeRO in {deepspeed.name}"
        if problem is not None:
            raise ValueError(
                f"The checkpoint {str(checkpoint)!r} {problem}, so the optimizer would start anew. Launch the run as "
                "it was launched, name another checkpoint, or load its weights as the model."
            )

    # ---- Writing ----

    def _save_checkpoint(self, *args, **kwargs) -> None:
        folder = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        # This file is written last. One of an earlier run would vouch for a mixture of its files and ours.
        if self.args.should_save:
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:
            is_written = (folder / TRAINER_STATE_NAME).is_file()
            is_torchs = isinstance(error, RuntimeError)
            if is_written or is_torchs and not any(word in str(error) for word in _FAILED_WRITES):
                raise
            raise OSError(
                f"The checkpoint {str(folder)!r} could not be written ({error}). Nothing reads what there is of it. "
                "When there is space on the disk, `train(resume_from_checkpoint=True)` goes on from the one before."
            ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # All files of all processes are there before the last one, and before an older checkpoint is removed.
        self.accelerator.wait_for_everyone()

    # ---- Loading ----

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
                raise ValueError(LOST_STATE)
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
