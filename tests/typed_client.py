"""The public interface as a program uses it that is checked by `mypy --strict`: every name has a type, and which.

Nothing here is run.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TypeAlias

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from transformers import PreTrainedModel
from typing_extensions import assert_type

from prm_hf import PRM, PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer, flip_preferences
from prm_hf.compare import Comparison, compare_runs, format_comparison, load_runs, write_report
from prm_hf.demo import Demo, build_demo
from prm_hf.metrics import PairEvaluation, drift_metrics, reward_metrics
from prm_hf.noise import corrupt
from prm_hf.optim import prm
from prm_hf.runs.read import Run
from prm_hf.trainers import MemorizationCallback, PopulationRiskStoppingCallback


AnyDataset: TypeAlias = Dataset | DatasetDict | IterableDataset | IterableDatasetDict


def optimize(model: torch.nn.Module, groups: Iterable[dict[str, object]]) -> None:
    optimizer: torch.optim.Optimizer = PRM(model.parameters(), lr=1e-3, betas=(0.9, 0.99), reduction="per_tensor")
    optimizer = PRM([{"params": list(model.parameters()), "lr": 1e-3}], state_dtype="bf16", signal_beta=0.98)
    optimizer.step()
    masked = PRM(model.parameters())
    assert_type(masked.get_mask_stats(), dict[str, float] | list[dict[str, float]])
    masked.load_state_dict(masked.state_dict())
    torch.optim.lr_scheduler.LambdaLR(masked, lambda step: 1.0)
    masked.reduction = "per_row"  # type: ignore[attr-defined]
    PRM(model.parameters(), reduction="per_column")  # type: ignore[arg-type]
    PRM(model.parameters(), lr="fast")  # type: ignore[arg-type]
    PRM(model.parameters(), weight_decy=0.1)  # type: ignore[call-arg]
    assert callable(prm)


def train(model: PreTrainedModel, folder: Path) -> None:
    demo = build_demo()
    assert_type(demo, Demo)
    noisy = flip_preferences(demo.train, 0.3, seed=1)
    assert_type(noisy, AnyDataset)
    assert_type(corrupt(demo.train, "random_labels"), AnyDataset)
    args = PRMDPOConfig(str(folder), learning_rate=1e-3, prm_reduction="per_row", relative_eps=10.0)
    trainer = PRMDPOTrainer(demo.model_path, args=args, train_dataset=demo.train, eval_dataset=demo.test)
    trainer.train(resume_from_checkpoint=True)
    pairs = trainer.evaluate_pairs()
    assert_type(pairs, PairEvaluation)
    assert_type({**reward_metrics(pairs, 0.1), **drift_metrics(pairs, 0.1)}, dict[str, float])
    sft = PRMSFTTrainer(model, PRMSFTConfig(str(folder)), train_dataset=demo.train, ref_model=model)
    sft.add_callback(PopulationRiskStoppingCallback())
    assert callable(MemorizationCallback)


def compare(folders: list[Path]) -> str:
    runs = load_runs(folders)
    assert_type(runs, list[Run])
    comparison = compare_runs(folders)
    assert_type(comparison, Comparison)
    write_report(comparison, folders[0])
    return format_comparison(comparison, "markdown")
