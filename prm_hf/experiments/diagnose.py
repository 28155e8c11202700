"""How simple a trained model is: `prm-hf diagnose RUN --dataset … --effective-dimension --bound`."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from ..demo import build_demo, completion_rows
from ..diagnostics import effective_dimension
from ..diagnostics.checks import check_choice
from ..diagnostics.compression import LEVELS
from ..diagnostics.run_bound import bound_of_run
from ..runs.read import read_json
from ..runs.schema import RUN_FILE
from ..runs.write import write_json
from ..trainers.config import with_help
from . import interruptible
from .arguments import check_ranges
from .command_line import CommandLine
from .console import messages_shown
from .data import check_split, load_split
from .simplicity import DIAGNOSTICS_FILE


DESCRIPTION = (
    "Measures how simple trained models are, by the curvature of their loss and by how far they can be compressed. "
    "`diagnostics.json` in their folders gets the numbers. A run of `prm-hf dpo` or `sft` keeps its model with "
    "`--save_strategy epoch`."
)
TASKS = {"preferences": "dpo", "sft": "causal_lm"}  # and their losses
BUILT_IN = "built-in"


@with_help
@dataclass
class DiagnoseArguments:
    """
    Arguments of `prm-hf diagnose`.

    Parameters:
        runs (`list[str]`):
            Folders of trained models: run folders, or folders of `save_pretrained` with their tokenizer. They stand
            before all flags without the name.
        dataset (`str`, *optional*):
            Rows to measure on: a dataset on the hub, a local folder, or a .json, .jsonl, .csv or .parquet file, as of
            `prm-hf dpo` or `sft`. A run of the built-in task has its own training prompts, with clean labels.
        dataset_config (`str`, *optional*):
            Configuration of the dataset, if it has several.
        dataset_split (`str`):
            Split, slices included (`train[:1000]`).
        task (`str`, *optional*):
            `preferences` or `sft`. Default: what `run.json` says.
        max_rows (`int`):
            At most so many rows, the first ones.
        max_length (`int`):
            Longest sequence in tokens.
        batch_size (`int`):
            Rows in a batch.
        beta (`float`, *optional*):
            Beta of DPO. Default: what `run.json` says.
        ref_model (`str`, *optional*):
            Reference policy of a model without an adapter. Default: the model that the run started from.
        effective_dimension (`bool`):
            Measures the effective dimension.
        alpha (`list[float]`):
            Its alpha, one or several.
        kind (`str`):
            Curvature matrix: `ggn`, `hessian` or `fisher`.
        reduction (`str`):
            `mean` or `sum` over pairs or tokens.
        method (`str`):
            `lanczos`, `slq` or `exact`.
        k (`int`, *optional*):
            Eigenvalues of `lanczos`, or steps of `slq`. Default: 50.
        bound (`bool`):
            Compresses what was trained, and bounds the share of new pairs that is ranked wrongly, or bits a token.
            The rows must be those of training, or rows that nothing was trained on.
        levels (`list[int]`, *optional*):
            How many values the compressed weights may have; each number is tried. Default: 3 5 7 11 17.
        qat_steps (`int`):
            Steps of quantisation-aware fine-tuning.
        delta (`float`):
            The probability that the bound fails.
        seed (`int`):
            Seed of random vectors, and of the batches of fine-tuning.
    """

    runs: list[str] | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    task: Literal["preferences", "sft"] | None = None
    max_rows: int = 256
    max_length: int = 1024
    batch_size: int = 8
    beta: float | None = None
    ref_model: str | None = None
    effective_dimension: bool = False
    alpha: list[float] | None = None
    kind: Literal["ggn", "hessian", "fisher"] = "ggn"
    reduction: Literal["mean", "sum"] = "mean"
    method: Literal["lanczos", "slq", "exact"] = "lanczos"
    k: int | None = None
    bound: bool = False
    levels: list[int] | None = None
    qat_steps: int = 0
    delta: float = 0.05
    seed: int = 0

    def check(self) -> None:
        """Raises ValueError for what cannot be done."""
        if not self.runs:
            raise ValueError("`runs` is missing: name a folder, as in `prm-hf diagnose runs/dpo_noisy/adamw_…`.")
        if not any(getattr(self, name) for name in DIAGNOSES):
            flags = ", ".join(f"`--{name.replace('_', '-')}`" for name in DIAGNOSES)
            raise ValueError(f"Nothing is to be measured: add {flags}.")
        ranges = [(name, lambda x: x >= 1, "at least 1") for name in ("max_rows", "max_length", "batch_size")]
        check_ranges(self, *ranges, ("seed", lambda x: 0 <= x < 2**32, "an integer in [0, 2**32)"))
        for run in self.runs:
            if not any((Path(run) / name).is_file() for name in ("config.json", "adapter_config.json")):
                raise ValueError(
                    f"`runs` has {run!r}, which holds no model: a run keeps its own with `--save_strategy epoch`."
                )


@dataclass(frozen=True)
class Trained:
    """A trained model, with the rows that it is measured on.

    Attributes:
        run: its folder.
        model: on the device that it is measured on, float32.
        ref_model: the reference policy; None for SFT, and for an adapter, which is its own.
        batches: dataloader of the tokenized rows, in their order; its `dataset` has the rows.
        loss: `"dpo"` or `"causal_lm"`.
        beta: of DPO.
    """

    run: Path
    model: torch.nn.Module
    ref_model: torch.nn.Module | None
    batches: DataLoader
    loss: str
    beta: float


def _measure_dimension(trained: Trained, args: DiagnoseArguments) -> dict[str, Any]:
    alphas = args.alpha or [1.0]
    found = effective_dimension(
        trained.model,
        trained.batches,
        alphas[0],
        kind=args.kind,
        reduction=args.reduction,
        k=args.k,
        method=args.method,
        loss=trained.loss,
        seed=args.seed,
        ref_model=trained.ref_model,
        beta=trained.beta,
    )
    at = [found.at(alpha) for alpha in alphas]
    for each in at:
        print(
            f"  effective dimension at α = {each.alpha:g}: {each.value:.4g} [{each.lower:.4g}, {each.upper:.4g}] of "
            f"{each.n_params:,} parameters"
        )
    largest = ", ".join(f"{x:.3g}" for x in found.eigenvalues[:5])
    print(f"  {found.kind}, {found.reduction} over {found.n_terms:,} terms: loss {found.loss:.4g}, largest {largest}")
    curve = [{name: getattr(each, name) for name in ("alpha", "value", "lower", "upper")} for each in at]
    return {**found.to_dict(), "by_alpha": curve}


def _measure_bound(trained: Trained, args: DiagnoseArguments) -> dict[str, Any]:
    base = trained.ref_model
    if base is None and not hasattr(trained.model, "peft_config"):  # of SFT, whose loss has no reference
        name = _reference(read_json(trained.run / RUN_FILE) or {}, args)
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(trained.model.device)
    found = bound_of_run(
        trained.run,
        trained.batches.dataset,
        model=trained.model,
        base=base,
        task={"dpo": "preference", "causal_lm": "lm"}[trained.loss],
        beta=trained.beta,
        data_collator=trained.batches.collate_fn,
        levels=args.levels or LEVELS,
        qat_steps=args.qat_steps,
        delta=args.delta,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    print("  " + str(found).replace("\n", "\n  "))
    return dataclasses.asdict(found)


# What can be measured: by the name of its flag a function of a trained model and the arguments.
DIAGNOSES = {"effective_dimension": _measure_dimension, "bound": _measure_bound}


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--runs", *arguments]
    (args,) = CommandLine("diagnose", DESCRIPTION, [DiagnoseArguments]).parse(arguments, lambda given: {})
    args.check()
    with messages_shown():
        for run in args.runs:
            diagnose(Path(run), args)
    return 0


def diagnose(run: Path, args: DiagnoseArguments) -> dict[str, Any]:
    """Measures one model, and adds the numbers to `diagnostics.json` in its folder.

    Raises:
        ValueError: the model, its rows or its reference cannot be told from the arguments and `run.json`.
    """
    print(f"{run}:", flush=True)
    trained = load_trained(run, args)
    asked = {"dataset": args.dataset or BUILT_IN, "split": args.dataset_split, "max_rows": args.max_rows}
    measured = {name: {**asked, **f(trained, args)} for name, f in DIAGNOSES.items() if getattr(args, name)}
    file = run / DIAGNOSTICS_FILE
    write_json(file, {**(read_json(file) or {}), **measured})
    return measured


def load_trained(run: Path, args: DiagnoseArguments) -> Trained:
    """The model of a folder, and the rows by the tokenization of TRL's trainers.

    Raises:
        ValueError: the task, rows or reference cannot be told.
    """
    info = read_json(run / RUN_FILE) or {}
    task = args.task or info.get("task")
    if task is None:
        raise ValueError(f"{run} has no {RUN_FILE}: say with `--task` whether it is of preferences or sft.")
    check_choice("task", task, tuple(TASKS))
    settings = info.get("settings", {})
    beta = settings.get("beta", 0.1) if args.beta is None else args.beta
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    is_adapter = (run / "adapter_config.json").is_file()
    reference = _reference(info, args) if task == "preferences" and not is_adapter else None
    rows = _rows(info, task, args)
    if is_adapter:
        model = AutoPeftModelForCausalLM.from_pretrained(run, dtype=torch.float32, is_trainable=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)
    if reference is not None:
        reference = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32).to(device)
    rows = rows.select(range(min(len(rows), args.max_rows)))
    batches = _tokenized(model, reference, rows, run, task, args)
    return Trained(run, model.to(device), reference, batches, TASKS[task], beta)


def _rows(info: dict[str, Any], task: str, args: DiagnoseArguments) -> Dataset:
    if args.dataset is not None:
        check_split(args.dataset, args.dataset_split, "dataset_split")
        return load_split(args.dataset, args.dataset_config, args.dataset_split)
    if info.get("dataset") != BUILT_IN:
        raise ValueError("`dataset` is missing: name the rows to measure on; the run is not of the built-in task.")
    rows = _demo(info).train
    return rows if task == "preferences" else completion_rows(rows)


def _reference(info: dict[str, Any], args: DiagnoseArguments) -> str:
    """Name or path of the model that a run without adapters started from."""
    if args.ref_model is not None:
        return args.ref_model
    if info.get("model") == BUILT_IN:
        return _demo(info).model_path
    if "model" not in info:
        raise ValueError("`ref_model` is missing: name the model that the run started from, the reference of DPO.")
    return info["model"]


def _demo(info: dict[str, Any]) -> Any:
    return build_demo(info.get("settings", {}).get("task_seed", 0))


def _tokenized(
    model: torch.nn.Module,
    reference: torch.nn.Module | None,
    rows: Dataset,
    run: Path,
    task: str,
    args: DiagnoseArguments,
) -> DataLoader:
    """The rows as TRL's trainers tokenize, truncate and pad them."""
    config_class, trainer_class = {"preferences": (DPOConfig, DPOTrainer), "sft": (SFTConfig, SFTTrainer)}[task]
    more = {"ref_model": reference} if task == "preferences" else {}
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder,
            max_length=args.max_length,
            report_to="none",
            bf16=False,
            gradient_checkpointing=False,
            disable_tqdm=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(run)
        trainer = trainer_class(model, args=config, train_dataset=rows, processing_class=tokenizer, **more)
    if "ref" in getattr(model, "peft_config", ()):
        model.delete_adapter("ref")  # TRL's copy of this trained adapter, a reference for more training
    return DataLoader(trainer.train_dataset, batch_size=args.batch_size, collate_fn=trainer.data_collator)
