"""The methods that recipes compare: what each changes in the configuration, and the optimizers of the controls.

A method's name may end in a value, as in `adamw_eps:0.3`. A control is bound to a PRM run, from which it takes
something; it has a row of its own beside that run's, and no grid.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from .. import PRM
from ..compare.comparison import baseline_of


# What a method changes in the configuration. A recipe may know more methods, as losses.
_ADAMW = {"optim": "adamw_torch_fused"}
_ROWS = {"prm_reduction": "per_row", "prm_estimator": "debiased", "prm_signal_beta": 0.98}
OPTIMIZERS = {
    "adamw": _ADAMW,
    "adamw_eps": _ADAMW,
    "adamw_embedding": _ADAMW,
    "cautious": _ADAMW,
    "msvag": _ADAMW,
    "prm_per_tensor": {"prm_reduction": "per_tensor", "prm_estimator": "ema"},
    "prm_per_param": {"prm_reduction": "per_param", "prm_estimator": "ema"},
    "prm_debiased": {"prm_reduction": "per_tensor", "prm_estimator": "debiased"},
    "prm_debiased_eps": {"prm_reduction": "per_tensor", "prm_estimator": "debiased"},
    "prm_rows": _ROWS,
    "prm_rows_eps": _ROWS,
    "prm_debiased_per_param": {"prm_reduction": "per_param", "prm_estimator": "debiased"},
    "prm_stopping": {"prm_reduction": "per_tensor", "prm_estimator": "debiased", "logging_steps": 1},
}
# prm_debiased that ends when an epoch's gradients were mostly noise: no run of it has controls, which would end later.
STOPPING = "prm_stopping"
# Methods with an eps that is large relative to the gradient.
WITH_EPS = ("adamw_eps", "prm_debiased_eps", "prm_rows_eps")
# Methods whose name ends in a value, and what the value is.
VALUES = {
    "adamw_eps": "eps, relative to the gradient's scale, as in `adamw_eps:0.3`",
    "prm_debiased_eps": "eps, relative to the gradient's scale, as in `prm_debiased_eps:10`",
    "prm_rows_eps": "eps, relative to the gradient's scale, as in `prm_rows_eps:10`",
    "adamw_embedding": "the factor of the embedding's learning rate, as in `adamw_embedding:3`",
}
# The controls of a PRM run. Is it the selection, or the smaller step: AdamW at η·q̄, q̄ the run's mean mask; AdamW at
# the learning rate that drifts as far. Is it which tensor is slowed, and when: the run with its mask permuted over
# tensors at each step; AdamW with each tensor slowed as in the run of another seed. AdamW is here the one that the run
# adds its mask to, `baseline_of` its method: with the same eps, or a control would measure the eps.
CONSTANT_Q, ADAMW_MATCHED, SHUFFLED_Q, FIXED_Q = "constant_q", "adamw_matched", "shuffled_q", "fixed_q"
CONTROLS = (CONSTANT_Q, ADAMW_MATCHED, SHUFFLED_Q, FIXED_Q)
OF_TENSORS = (SHUFFLED_Q, FIXED_Q)

MASKS_FILE = "masks.jsonl"


def is_prm(method: str) -> bool:
    """Whether a mask shrinks its step, so that it gets the grid of PRM; those of a search are `search_prm_…`."""
    return method.startswith(("prm_", "search_prm_"))


def has_controls(method: str) -> bool:
    return method.startswith("prm_") and method != STOPPING


def split_method(method: str) -> tuple[str, float | None]:
    """`adamw_eps:0.3` → (`adamw_eps`, 0.3); `adamw` → (`adamw`, None).

    Raises:
        ValueError: a value is missing, not wanted or not a positive number.
    """
    name, separator, text = method.partition(":")
    if name not in VALUES:
        if separator:
            raise ValueError(f"`methods`: {name!r} takes no value, got {method!r}.")
        return name, None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 0 < value < float("inf"):
        raise ValueError(
            f"`methods`: {name!r} needs a positive number behind a colon: {VALUES[name]}; got {method!r}."
        )
    return name, value


def check_methods(methods: list[str], known: list[str], seeds: list[int], max_grad_norm: float) -> None:
    """Raises ValueError for methods that are not known or lack what they need."""
    names = [split_method(method)[0] for method in methods]
    unknown = sorted(set(names) - {*known, *CONTROLS})
    if unknown:
        raise ValueError(f"`methods`: {', '.join(unknown)} unknown. Known are {', '.join([*known, *CONTROLS])}.")
    for control in (name for name in names if name in CONTROLS):
        if not any(has_controls(name) for name in names):
            raise ValueError(f"`{control}` takes something from a PRM run: add a PRM method to `methods`.")
        if control in OF_TENSORS and not any(map(has_tensor_masks, methods)):
            raise ValueError(
                f"`{control}` is about the masks of tensors: add a method to `methods` that has them, as prm_debiased."
            )
        if control == ADAMW_MATCHED:
            for method in filter(has_controls, methods):
                if baseline_of(method) not in methods:
                    raise ValueError(
                        f"`adamw_matched` of `{method}` lies between runs of AdamW with the same eps: add "
                        f"`{baseline_of(method)}` to `methods`."
                    )
        if control == FIXED_Q and len(seeds) < 2:
            raise ValueError(f"`fixed_q` takes the masks of another seed: give two `seeds` or more, got {seeds}.")
    for name in (*WITH_EPS, "msvag"):
        if name in names and not max_grad_norm:
            raise ValueError(f"`{name}` is scaled by the clipped gradient: set `max_grad_norm` above 0.")


def has_tensor_masks(method: str) -> bool:
    return has_controls(method) and OPTIMIZERS.get(split_method(method)[0], {}).get("prm_reduction") == "per_tensor"


class ShuffledPRM(PRM):
    """PRM whose masks of a step are dealt out to the tensors anew, at random: as many are as open, but others.

    The order depends on `seed` and the step alone, so that all processes and a resumed run have the same.

    Args:
        groups: the parameter groups of a PRM with `reduction="per_tensor"`, whose settings they carry.
        seed: of the permutations.
    """

    def __init__(self, groups: list[dict[str, Any]], seed: int) -> None:
        self.seed = seed
        # The fused kernel decides on the masks of whole tensors by itself.
        super().__init__([{**group, "fused": False} for group in groups])

    def _tensor_masks(self, parts, sums):
        masks = super()._tensor_masks(parts, sums)
        known = [q for q in masks if q is not None]
        if not known:
            return masks
        step = int(max(part.counters[0].item() for part in parts))
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        order = torch.randperm(sum(map(len, known)), generator=generator)
        shuffled = iter(torch.cat(known)[order.to(known[0].device)].split([len(q) for q in known]))
        return [None if q is None else next(shuffled) for q in masks]


def is_sharded(trainer: Trainer) -> bool:
    return trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled


def gradient_scale(trainer: Trainer) -> float:
    """c/√d: the root mean square of the d trained parameters' gradients when they are clipped to the norm c."""
    return trainer.args.max_grad_norm / sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) ** 0.5


def enlarge_eps(groups: list[dict[str, Any]], eps: float, scale: float) -> None:
    """Makes eps `eps` times `scale`, and the learning rate 1 + `eps` times what it was, so that a step is as long."""
    for group in groups:
        group["eps"], group["lr"] = eps * scale, group["lr"] * (1 + eps)


def set_up_optimizer(
    trainer: Trainer,
    method: str,
    seed: int,
    multipliers: dict[str, float] | None = None,
    configured_as: str | None = None,
) -> None:
    """Gives the trainer the optimizer of a method that the configuration alone cannot express.

    The learning rates of methods with an eps and of `msvag` are scaled so that a step is about as long as AdamW's at
    the rate of the configuration. Eps is relative to c/√d, see `gradient_scale`: Adam's step is then η/(1+eps), and
    M-SVAG's η·c/√d.

    Args:
        trainer: before training.
        multipliers: of `fixed_q`, the factor of each tensor's learning rate by the tensor's name.
        configured_as: of a control, the method that it has eps from.

    Raises:
        ValueError: the model is sharded, or what the method needs is not there.
        ImportError: pytorch-optimizer is not installed.
    """
    name, value = split_method(method)
    based_on, eps = split_method(configured_as or method)
    if based_on not in WITH_EPS:
        eps = None
    if eps is None and name not in ("adamw_embedding", "cautious", "msvag", *OF_TENSORS):
        return
    if is_sharded(trainer):
        raise ValueError(f"`{method}` runs on whole tensors: launch it on one GPU, or several without sharding.")
    optimizer = trainer.create_optimizer()
    args, named, scale = trainer.args, dict(trainer.model.named_parameters()), gradient_scale(trainer)
    groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
    if eps is not None:
        enlarge_eps(optimizer.param_groups, eps, scale)
    if name == "adamw_embedding":
        scale_embedding(trainer, method, value)
    elif name == "fixed_q":
        missing = sorted(name for name, p in named.items() if p.requires_grad and name not in multipliers)
        if missing:
            raise ValueError(f"`fixed_q` has no multiplier of {missing[0]!r}: the masks are of another model.")
        scale_learning_rates(optimizer, {named[name]: factor for name, factor in multipliers.items()})
    elif name == "shuffled_q":
        trainer.optimizer = ShuffledPRM(optimizer.param_groups, seed)
    elif name == "cautious":
        # Without its projection (delta=0) AdamP is AdamW
        betas = (args.adam_beta1, args.adam_beta2)
        trainer.optimizer = _pytorch_optimizer(method).AdamP(
            groups, betas=betas, eps=args.adam_epsilon, delta=0.0, cautious=True, foreach=True
        )
    elif name == "msvag":
        if args.weight_decay:
            raise ValueError(f"`msvag` has no weight decay, and `weight_decay` is {args.weight_decay}: set it to 0.")
        groups = [{"params": group["params"], "lr": group["lr"] / scale} for group in groups]
        trainer.optimizer = _pytorch_optimizer(method).MSVAG(groups, beta=args.adam_beta1)


def _pytorch_optimizer(method: str) -> Any:
    try:
        import pytorch_optimizer
    except ImportError as error:
        raise ImportError(f'`{method}` needs pytorch-optimizer: pip install "prm-hf[controls]"') from error
    return pytorch_optimizer


def scale_embedding(trainer: Trainer, method: str, factor: float) -> None:
    """Multiplies the embedding's learning rate in the trainer's optimizer, as [`scale_learning_rates`].

    Raises:
        ValueError: the embedding is not trained.
    """
    embedding = trainer.model.get_input_embeddings().weight
    if not embedding.requires_grad:
        raise ValueError(f"`{method}` changes the embedding's learning rate, and the embedding is not trained.")
    scale_learning_rates(trainer.optimizer, {embedding: factor})


def scale_learning_rates(optimizer: torch.optim.Optimizer, factors: dict[Tensor, float]) -> None:
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

    For whole tensors. A line is `{"step": …, "q": {name: …}}`; a resumed run writes those again that an earlier one
    wrote after its checkpoint.
    """

    def __init__(self, trainer: Trainer, folder: Path) -> None:
        self.trainer = trainer
        self.file = folder / MASKS_FILE
        self.names = {p: name for name, p in trainer.model.named_parameters()}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero and state.global_step == 0:
            self.file.unlink(missing_ok=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "mask/mean_q" not in (logs or {}):
            return
        prm, q = self.trainer.find_prm(), {}
        for group, masks in zip(prm.param_groups, prm.get_tensor_masks(), strict=True):
            stepped = [p for p in group["params"] if prm.state.get(p)]
            q |= {self.names[p]: round(mask, 6) for p, mask in zip(stepped, masks, strict=True)}
        if state.is_world_process_zero:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, "q": q}) + "\n")


def mean_masks(folder: Path) -> dict[str, float]:
    """The mean over a run of the mask of each tensor, by its name.

    Raises:
        ValueError: the run recorded none.
    """
    file = folder / MASKS_FILE
    if not file.is_file():
        raise ValueError(
            f"`fixed_q` takes the masks of {folder}, which has no {MASKS_FILE}: remove it to run it again."
        )
    steps = {line["step"]: line["q"] for line in map(json.loads, file.read_text(encoding="utf-8").splitlines())}
    return {name: sum(q[name] for q in steps.values()) / len(steps) for name in next(iter(steps.values()))}
