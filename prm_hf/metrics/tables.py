"""What the model of a trainer says about the rows of one of its dataloaders, whatever the task is."""

from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import Trainer

from .evaluation import (
    ClassEvaluation,
    PairEvaluation,
    SequenceEvaluation,
    evaluate_classes,
    evaluate_pairs,
    evaluate_sequences,
    rows_of,
)


def first_batch(dataloader: DataLoader) -> dict[str, torch.Tensor]:
    """The batch of the first row alone. Its shapes say what kind of task it is: classes, completions or pairs.

    Raises:
        ValueError: the task is none of the three.
    """
    batch = dataloader.collate_fn([dict(rows_of(dataloader)[0])])
    labels = batch.get("labels")
    if labels is not None and (labels.is_floating_point() or labels.dim() > 2):
        raise ValueError(
            "What is measured of each row is for classes, completions and pairs; the `labels` of this trainer are "
            f"{labels.dtype} of shape {tuple(labels.shape)}, a batch of one row. Leave it out."
        )
    return batch


def evaluate_rows(
    trainer: Trainer, dataloader: DataLoader, needs_drift: bool = True
) -> ClassEvaluation | SequenceEvaluation | PairEvaluation:
    """The table of all rows of a dataloader, in their order, under the policy and the trainer's reference. Collective.

    Completions need no reference, so without `needs_drift` a reference model is not run for them.
    """
    rows, order, batch = rows_of(dataloader), None, first_batch(dataloader)
    options: dict[str, Any] = {"batch_size": trainer.args.per_device_eval_batch_size}
    evaluate = evaluate_pairs
    if "labels" in batch:
        evaluate = evaluate_classes if batch["labels"].dim() == 1 else evaluate_sequences
    elif isinstance(rows, Dataset) and "prompt_ids" in rows.column_names:
        # Batches of pairs of about one length have little padding
        texts = zip(*(rows[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")), strict=True)
        lengths = [len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in texts]
        order = sorted(range(len(rows)), key=lengths.__getitem__)
        rows = rows.select(order)
    if evaluate is not evaluate_classes:
        options["ref_model"] = getattr(trainer, "ref_model", None)
    if evaluate is evaluate_sequences and getattr(trainer, "padding_free", False):
        options["batch_size"] = (
            1  # a padding-free batch is one long sequence: taken row by row, its sums are the row's
        )
    table = evaluate(trainer.model_wrapped, rows, dataloader.collate_fn, trainer.accelerator, **options)
    return table if order is None else table.select(torch.tensor(order).argsort())
