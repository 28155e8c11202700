"""The bound of a trained run: `prm-hf diagnose RUN --bound`."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn

from ..runs.read import read_json
from ..runs.schema import RUN_FILE
from .compression import CompressionBound, compression_bound
from .risk import Collate


BOUND_FOLDER = "bound"  # in the folder of the run
_TASKS = {"preferences": "preference", "sft": "lm"}  # of `run.json`
ADAPTER_FILE, MODEL_FILE = "adapter_config.json", "config.json"


def bound_of_run(
    run_folder: str | Path,
    dataset: Dataset,
    *,
    model: nn.Module | None = None,
    base: nn.Module | None = None,
    task: str | None = None,
    beta: float | None = None,
    data_collator: Collate | None = None,
    **options: Any,
) -> CompressionBound:
    """The [`compression_bound`] of a run whose folder has its trained model (`--save_strategy epoch`).

    Of a run with an adapter the adapter is compressed, of any other the differences from `base`. The files lie in
    `bound/` of the run's folder, and what was tried for this run is counted there.

    Args:
        run_folder: A run folder, or any folder of `save_pretrained`.
        dataset: The run's training rows with the labels that it was trained on, tokenized, as a trainer's
            `train_dataset` has them. Rows with other labels than those of training are allowed, too, but the bound
            says something about rows with such labels.
        model: The run's model with its adapter trainable, if it is loaded already.
        base: The model that a run without an adapter started from, DPO's reference.
        task: `"preference"` or `"lm"`. Default: what `run.json` says.
        beta: DPO's β. Default: what `run.json` says.
        data_collator: The trainer's. Default: the usual one of the task.
        options: Further arguments of [`compression_bound`].

    Raises:
        ValueError: the task or the start of training is unknown; all that [`compression_bound`] refuses.
        FileNotFoundError: the folder has no model.
    """
    folder = Path(run_folder)
    info = read_json(folder / RUN_FILE)
    task = task or (None if info is None else _TASKS.get(info.get("task", "preferences")))
    if task is None:
        raise ValueError(f"{folder} has no {RUN_FILE} with a task: pass `task='preference'` or `task='lm'`.")
    if model is None:
        model = load_model(folder)
    is_adapter = hasattr(model, "peft_config")
    if not is_adapter and base is None:
        raise ValueError(f"`base` is missing: {folder} has no adapter, so pass the model that training started from.")
    if beta is None:
        beta = (info or {}).get("settings", {}).get("beta", 0.1)
    options = {"output_dir": folder / BOUND_FOLDER, **options}
    if not is_adapter:
        options |= {"base": base, "ref_model": base if task == "preference" else None}
    return compression_bound(model, dataset, task, beta=beta, data_collator=data_collator, **options)


def load_model(folder: Path) -> nn.Module:
    """The model of a folder in float32, on the device where rows are evaluated; an adapter as it was trained."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    if (folder / ADAPTER_FILE).is_file():
        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32, is_trainable=True)
    elif (folder / MODEL_FILE).is_file():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        raise FileNotFoundError(f"{folder} holds no model: a run keeps its own with `--save_strategy epoch`.")
    return model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
