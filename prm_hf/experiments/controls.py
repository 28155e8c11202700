"""The optimizers of methods that the configuration alone cannot express: controls, and those of another library."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerState

from .. import PRM
from ..runs.methods import Method
from ..runs.schema import MASKS_FILE
from .baselines import INTERPOLATE
from .sven import SVEN, rate_factor


THIRD_PARTY = {
    **dict.fromkeys(("cautious", "msvag", "grokfast"), "pytorch_optimizer"),
    "casmo": "casmo",
    "grokadamw": "grokadamw",
}
# These read, scale or move whole tensors
WHOLE_TENSORS = (*THIRD_PARTY, SVEN, "adamw_embedding", INTERPOLATE, "shuffled_q", "fixed_q")
PACKAGES = {"pytorch_optimizer": "pytorch-optimizer", "casmo": "casmo-optimizer", "grokadamw": "grokadamw"}


class ShuffledPRM(PRM):
    """PRM, of the groups of a per_tensor PRM, that gives the masks of each step to the tensors in a random order.

    The order depends on `seed` and the step alone, so that all processes and a resumed run have the same one.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int) -> None:
        self.seed = seed
        super().__init__(groups)

    def transform_unit_masks(self, q: Tensor) -> Tensor:
        """The masks of a step in another order: `q` float64, `[tensors]`."""
        step = max(int(state["step"]) for state in self.state.values() if "step" in state)
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        return q[torch.randperm(len(q), generator=generator).to(q.device)]


def is_sharded(trainer: Trainer) -> bool:
    return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled


def set_up_optimizer(trainer: Trainer, method: Method, seed: int, multipliers: dict[str, float] | None = None) -> None:
    """Gives the trainer the optimizer of a method that the configuration alone cannot express.

    `multipliers` are of `fixed_q`: the factor of each tensor's learning rate, by the tensor's name.

    Raises:
        ValueError: the model is sharded, or what the method needs is not there.
        ImportError: the library of the optimizer is not installed.
    """
    if method.key not in WHOLE_TENSORS:
        return
    if is_sharded(trainer):
        raise ValueError(f"`{method.name}` runs on whole tensors: launch it on one GPU, or several without sharding.")
    if method.key == INTERPOLATE:
        return
    optimizer = trainer.create_optimizer()
    if method.key == SVEN:
        factor = rate_factor(trainer)
        params = (p for group in optimizer.param_groups for p in group["params"])
        scale_learning_rates(optimizer, dict.fromkeys(params, factor))
    elif method.key == "adamw_embedding":
        scale_embedding(trainer, method.name, method.value)
    elif method.key == "fixed_q":
        named = dict(trainer.model.named_parameters())
        missing = sorted(name for name, p in named.items() if p.requires_grad and name not in multipliers)
        if missing:
            raise ValueError(f"`fixed_q` has no multiplier of {missing[0]!r}: the masks are of another model.")
        scale_learning_rates(optimizer, {named[name]: factor for name, factor in multipliers.items()})
    elif method.key == "shuffled_q":
        trainer.optimizer = ShuffledPRM(optimizer.param_groups, seed)
    else:
        trainer.optimizer = _third_party_optimizer(trainer, method.key)


def _third_party_optimizer(trainer: Trainer, method: str) -> Optimizer:
    """The optimizer of a method of `THIRD_PARTY`, with the parameter groups of the trainer's AdamW."""
    name = THIRD_PARTY[method]
    try:
        library = importlib.import_module(name)
    except ImportError as error:
        package = PACKAGES[name]
        raise ImportError(f'`{method}` needs {package}: pip install "prm-hf[controls]"') from error
    args, groups = trainer.args, trainer.optimizer.param_groups
    groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
    settings = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    if method == "casmo":
        *_, steps = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
        # Its own rule, but 50 steps at least, without which it raises an error
        return library.CASMO(groups, **settings, tau_init_steps=max(50, min(500, steps // 5)))
    if method == "grokfast":  # as published, its learning rate is AdamW's
        return library.GrokFastAdamW(groups, **settings, normalize_lr=False)
    if method == "grokadamw":
        return library.GrokAdamW(groups, **settings)
    if method == "cautious":
        # Without its projection (delta=0) AdamP is AdamW.
        return library.AdamP(groups, **settings, delta=0.0, cautious=True, foreach=True)
    if args.weight_decay:
        raise ValueError(f"`msvag` has no weight decay, and `weight_decay` is {args.weight_decay}: set it to 0.")
    # M-SVAG steps in proportion to the gradient. The d trained parameters' clipped gradients have the root mean square
    # c/√d, so divided by that a step is about as long as AdamW's.
    d = sum(p.numel() for group in groups for p in group["params"])
    scale = args.max_grad_norm / d**0.5
    groups = [{"params": group["params"], "lr": group["lr"] / scale} for group in groups]
    return library.MSVAG(groups, beta=args.adam_beta1)


def scale_embedding(trainer: Trainer, method: str, factor: float) -> None:
    """Multiplies the embedding's learning rate in the trainer's optimizer; a ValueError where it is not trained."""
    embedding = trainer.model.get_input_embeddings().weight
    if not embedding.requires_grad:
        raise ValueError(f"`{method}` changes the embedding's learning rate, and the embedding is not trained.")
    scale_learning_rates(trainer.optimizer, {embedding: factor})


def scale_learning_rates(optimizer: Optimizer, factors: dict[Tensor, float]) -> None:
    """Multiplies the learning rate of tensors, before the first step; their decay stays lr·weight_decay as it was."""
    groups = []
    for group in optimizer.param_groups:
        by_factor: dict[float, list[Tensor]] = {}
        for p in group["params"]:
            by_factor.setdefault(factors.get(p, 1.0), []).append(p)
        for factor, params in by_factor.items():
            decay = group["weight_decay"] / factor if factor else 0.0
            groups.append({**group, "params": params, "lr": group["lr"] * factor, "weight_decay": decay})
    optimizer.param_groups[:] = groups


class MaskRecorder(TrainerCallback):
    """Writes the mask of each tensor at each log into `masks.jsonl`, for `fixed_q`.

    For whole tensors. Where there was no log, it is that of the last step. A line is `{"step": …, "q": {name: …}}`. A
    resumed run repeats the lines after its checkpoint.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer = trainer
        self.file = folder / MASKS_FILE
        self.names = {p: name for name, p in trainer.model.named_parameters()}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 0:
            self.file.unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "mask/mean_q" in (logs or {}):
            self._record(state)

    def on_train_end(self, args, state, control, **kwargs):
        if not self.file.exists():
            self._record(state)

    def _record(self, state: TrainerState) -> None:
        prm, q = self.trainer.find_prm(), {}
        for group, masks in zip(prm.param_groups, prm.get_tensor_masks(), strict=True):
            stepped = [p for p in group["params"] if prm.state.get(p)]
            q |= {self.names[p]: round(mask, 6) for p, mask in zip(stepped, masks, strict=True)}
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "q": q}) + "\n")


def mean_masks(folder: Path) -> dict[str, float]:
    """The mean over a run of the mask of each tensor, by its name; a ValueError where the run recorded none."""
    file = folder / MASKS_FILE
    if not file.is_file():
        raise ValueError(
            f"`fixed_q` takes the masks of {folder}, which has no {MASKS_FILE}: remove it to run it again."
        )
    steps = {line["step"]: line["q"] for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    return {name: sum(q[name] for q in steps.values()) / len(steps) for name in next(iter(steps.values()))}
