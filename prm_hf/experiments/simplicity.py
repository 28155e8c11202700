"""How simple the models of a comparison are: `--effective_dimension`, `--bound`, and adapters of one short vector.

They are measured on a run's own training rows after its last step, so a run without them is another run.
"""

import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peft
import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from trl import ModelConfig, get_peft_config

from .._extras import require
from ..metrics import memorization_rows
from ..runs.methods import Method
from ..runs.write import write_json
from .arguments import ComparisonArguments
from .rows import GROUP


if TYPE_CHECKING:
    from .experiment import Experiment


ROWS = 256  # of training, spread evenly, that the effective dimension is of
MOST_NUMBERS = 2**31  # in the table of gradients or eigenvectors: 8 GiB
EIGENVALUES = 50
DIAGNOSTICS_FILE = "diagnostics.json"
SETTINGS = ("effective_dimension", "bound", "unilora_dim")


def simplicity_settings(args: ComparisonArguments) -> dict[str, Any]:
    """What `run.json` says of these arguments: those that are given."""
    return {name: value for name in SETTINGS if (value := getattr(args, name))}


def unilora(rank: int, dim: int, start: float = 0.02, modules: Any = "all-linear", dropout: float = 0.0) -> Any:
    """The configuration of a UniLora adapter, whose vector of `dim` values starts between ± `start`.

    Raises:
        ImportError: this PEFT has no `UniLoraConfig`.
    """
    if not hasattr(peft, "UniLoraConfig"):
        raise ImportError(f'peft {peft.__version__} has no UniLoraConfig: pip install "peft>=0.21".', name="peft")
    return peft.UniLoraConfig(
        r=rank,
        theta_d_length=dim,
        target_modules=modules,
        unilora_dropout=dropout,
        init_theta_d_bound=start,
        task_type="CAUSAL_LM",
    )


def adapter_of(args: ComparisonArguments, model_args: ModelConfig) -> Any:
    """The adapter that is trained: LoRA, UniLora, or None."""
    if args.unilora_dim is None:
        return get_peft_config(model_args)
    modules = model_args.lora_target_modules or "all-linear"
    # Each value stands in many places, divided by the root of their number: a short vector needs large values
    return unilora(model_args.lora_r, args.unilora_dim, 1.0, modules, model_args.lora_dropout)


# ---- Before anything is trained ----


def check_simplicity(experiment: "Experiment") -> None:
    """Raises ValueError or ImportError for what could not be measured once a model has been trained."""
    args, of_model = experiment.script_args, experiment.model_args
    if args.unilora_dim is not None:
        if not of_model.use_peft:
            raise ValueError(f"`unilora_dim` is {args.unilora_dim}, the size of an adapter: add `--use_peft`.")
        adapter_of(args, of_model)
    asked = [name for name in ("effective_dimension", "bound") if getattr(args, name)]
    if not asked:
        return
    name = asked[0]
    _check_machine(experiment, name)
    require(f"--{name}", "scipy", "numpy", *(["constriction", "kmeans1d"] if args.bound else []), extra="diagnostics")
    if args.effective_dimension and of_model.attn_implementation not in (None, "eager", "sdpa"):
        raise ValueError(
            f"`attn_implementation` is {of_model.attn_implementation!r}, which torch cannot differentiate forwards as "
            "`effective_dimension` does: set it to 'sdpa' or 'eager'."
        )
    if args.bound and not of_model.use_peft:
        raise ValueError(
            "`bound` compresses an adapter, since a file of all weights says more than the rows can tell: add "
            "`--use_peft`, best with a small `--unilora_dim`."
        )
    experiment.check_simplicity(asked)
    for method in args.compared:
        _check_method(method, asked)


def _check_machine(experiment: "Experiment", name: str) -> None:
    config, of_model = experiment.training_args, experiment.model_args
    is_sharded = config.deepspeed_plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false") == "true"
    if config.world_size > 1 or is_sharded:
        raise ValueError(
            f"`{name}` is measured in one process with whole weights, and {config.world_size} were launched"
            f"{', with sharding' if is_sharded else ''}: launch one, or `prm-hf sweep` for one a GPU."
        )
    if of_model.load_in_4bit or of_model.load_in_8bit or of_model.dtype != "float32":
        what = "a quantized model" if of_model.load_in_4bit or of_model.load_in_8bit else f"`dtype` {of_model.dtype!r}"
        raise ValueError(f"`{name}` is measured in float32, and there is {what}: leave it out. `bf16` may stay.")


def _check_method(method: Method, asked: list[str]) -> None:
    if method.name.startswith("early_stopping"):
        raise ValueError(
            f"`{method.name}` reports on weights that it does not keep, which `{asked[0]}` would need: leave one out."
        )
    if "bound" in asked and method.repair is not None:
        raise ValueError(
            f"`{method.name}` repairs labels by models of the same rows, which are then not independent as `bound` "
            "needs them: leave one of the two out."
        )


def check_units(args: ComparisonArguments, groups: Any, has_units: bool) -> None:
    """Raises ValueError for training rows that are not independent of each other where `bound` takes them to be.

    Args:
        groups: of each row the number of the group that it belongs to.
        has_units: whether the rows of a group are counted as one, as pairs of a prompt are.
    """
    count = len(set(groups))
    if args.bound and (count < 2 or not has_units and count < len(groups)):
        raise ValueError(
            f"`bound` needs independent rows, and the {len(groups)} training rows are of {count} prompts: keep one of "
            "each by `--pairs_per_prompt 1`."
        )


def check_size(trainer: Trainer, args: ComparisonArguments) -> None:
    """Raises ValueError if a trainer's model has too many trained parameters for the effective dimension."""
    if not args.effective_dimension:
        return
    n = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    rows = min(len(trainer.train_dataset), ROWS) if hasattr(trainer, "beta") else 2 * EIGENVALUES
    if n * rows > MOST_NUMBERS:
        raise ValueError(
            f"`effective_dimension` of {n:,} trained parameters takes {n * rows * 4 / 2**30:.0f} GiB: train an "
            "adapter, by `--use_peft`."
        )


# ---- After training ----


def measure_simplicity(trainer: Trainer, args: ComparisonArguments) -> dict[str, float]:
    """The metrics of a trained model; `diagnostics.json` and `bound/` in its folder have all that they are made of.

    Nothing for weights that are not finite, whose run has diverged.
    """
    if not (args.effective_dimension or args.bound):
        return {}
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if not all(torch.isfinite(p).all() for p in model.parameters()):
        return {}
    model.disable_input_require_grads()  # hooks of gradient checkpointing, which no forward derivative goes through
    metrics, whole = {}, {}
    if args.effective_dimension:
        found, whole["effective_dimension"] = _dimension(trainer, model, args.effective_dimension)
        metrics |= {f"effective_dimension/{name}": float(value) for name, value in found.items()}
    if args.bound:
        found, whole["bound"] = _bound(trainer, model)
        metrics |= {f"bound/{name}": float(value) for name, value in found.items()}
    write_json(Path(trainer.args.output_dir) / DIAGNOSTICS_FILE, whole)
    return metrics


def _dimension(trainer: Trainer, model: torch.nn.Module, alpha: float) -> tuple[dict[str, float], dict[str, Any]]:
    from ..diagnostics.dimension import effective_dimension

    rows, is_dpo = trainer.train_dataset, hasattr(trainer, "beta")
    taken = rows.select(memorization_rows(len(rows), ROWS))
    size = 2 if is_dpo else trainer.args.per_device_eval_batch_size  # each gradient of a pair goes through its batch
    options: dict[str, Any] = {"loss": "causal_lm", "k": None}  # 50, or as many as there are
    if is_dpo:
        options = {"loss": "dpo", "method": "exact", "beta": trainer.beta, "ref_model": trainer.ref_model}
    found = effective_dimension(
        model,
        DataLoader(taken, batch_size=size, collate_fn=trainer.data_collator),
        alpha,
        reduction="sum",
        **options,
    )
    values = {name: getattr(found, name) for name in ("value", "lower", "upper", "trace", "loss", "n_params")}
    values["loss"] /= found.n_terms
    return {**values, "largest": found.eigenvalues[0]}, {**found.to_dict(), "rows": len(taken)}


def _bound(trainer: Trainer, model: torch.nn.Module) -> tuple[dict[str, float], dict[str, Any]]:
    from ..diagnostics.compression import compression_bound
    from ..diagnostics.run_bound import BOUND_FOLDER

    is_dpo, rows = hasattr(trainer, "beta"), trainer.train_dataset
    found = compression_bound(
        model,
        rows,
        "preference" if is_dpo else "lm",
        unit=GROUP if GROUP in rows.column_names else None,
        beta=trainer.beta if is_dpo else 0.1,
        data_collator=trainer.data_collator,
        batch_size=trainer.args.per_device_eval_batch_size,
        output_dir=Path(trainer.args.output_dir) / BOUND_FOLDER,
    )
    values = {"value": found.bound, **{name: getattr(found, name) for name in ("empirical_risk", "guess", "n")}}
    values["bits"] = found.kl_nats / math.log(2)
    return values | ({"certified_accuracy": found.certified_accuracy} if is_dpo else {}), asdict(found)
