"""The runs of tests/test_invariants.py: the same training and evaluation, split in other ways.

As a module for `accelerate launch` it makes one of them and writes what was logged: arguments are the task, the
settings that differ, as JSON, the number of processes, and the file.
"""

import json
import os
import sys
import tempfile

from datasets import Dataset

from prm_hf.noise import corrupt
from prm_hf.trainers import MemorizationCallback, PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer

from ..tiny import make_model, make_tokenizer, preference_dataset
from .trainer_runs import settings


# 16 rows in steps of 4, so that a step holds as many rows however it is split; no count of held-out rows is even
TRAIN = preference_dataset(16)
HELDOUT = {"a": preference_dataset(7, 1, flipped=False), "b": preference_dataset(5, 2, flipped=False)}
SETTINGS = {"max_steps": 4, "learning_rate": 3e-3, "adam_epsilon": 1e-4, "memorization_max_rows": None}
TIMINGS = ("_runtime", "_per_second", "_time", "total_flos")


def completions(rows: Dataset) -> Dataset:
    return rows.select_columns(["prompt", "chosen"]).rename_column("chosen", "completion")


def make_trainer(task: str, output_dir: str, *, cached_reference: bool = False, **changes):
    if task == "sft":
        own = {name: value for name, value in SETTINGS.items() if name != "memorization_max_rows"}
        own["max_length"] = None  # which TRL asks for where `padding_free` is set
        trainer = PRMSFTTrainer(
            make_model(),
            PRMSFTConfig(**settings(output_dir, **{**own, **changes})),
            train_dataset=corrupt(completions(TRAIN), "partial_labels", 0.4),
            eval_dataset={name: completions(rows) for name, rows in HELDOUT.items()},
            ref_model=make_model(),
            processing_class=make_tokenizer(),
        )
        trainer.add_callback(MemorizationCallback(trainer, eval_dataset=trainer.eval_dataset["a"]))
        return trainer

    def dpo(train, heldout, **more):
        return PRMDPOTrainer(
            make_model(),
            make_model(),
            PRMDPOConfig(**settings(output_dir, **{**SETTINGS, **changes, **more})),
            train_dataset=train,
            eval_dataset=heldout,
            processing_class=make_tokenizer(),
        )

    if not cached_reference:
        return dpo(TRAIN, HELDOUT)
    made = dpo(TRAIN, HELDOUT, precompute_ref_log_probs=True)
    return dpo(made.train_dataset, made.eval_dataset)


def logged(task: str, world_size: int = 1, **changes) -> dict[str, float]:
    """Every number that training and evaluation log or return, by step and name, but for times."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(task, folder, **changes)
        assert trainer.args.world_size == trainer.accelerator.num_processes == world_size
        trainer.evaluate()
        trainer.train()
        numbers = {f"returned {name}": value for name, value in trainer.last_eval_metrics.items()}
        for i, entry in enumerate(trainer.state.log_history):
            numbers |= {f"entry {i}, step {entry['step']}: {name}": value for name, value in entry.items()}
        return {name: value for name, value in numbers.items() if not name.endswith(TIMINGS)}


if __name__ == "__main__":
    task, changes, world_size, file = sys.argv[1:]
    found = logged(task, int(world_size), **json.loads(changes))
    if os.environ["RANK"] == "0":
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(found, stream)
