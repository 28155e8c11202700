"""The loss of each row under a model, in [0, 1], for the three tasks; and the loss that fine-tuning goes down.

| task | loss of a row | range before it is scaled | risk of a guess |
|---|---|---|---|
| `"classification"` | 1 if another class has the largest logit | 1 | 1 - 1 / classes |
| `"preference"` | 1 if the rejected completion has the greater implicit reward, ½ for a tie | 1 | ½ |
| `"lm"` | mean over the tokens of -log2((1 - α) p + α / V) | log2(1 + (1 - α) V / α) bits | log2 V bits |

With prediction smoothing (Lotfi et al., 2023, arXiv 2312.17173, section 4.1) the loss of a token is bounded.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn
from transformers import default_data_collator

from ..metrics import evaluate_classes, evaluate_pairs, preference_scores, reward_margins
from ..metrics.forward import as_reference, evaluation_mode


Task = Literal["lm", "classification", "preference"]
TASKS = ("lm", "classification", "preference")
Collate = Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class RowLosses:
    """What a model's rows lose.

    Attributes:
        losses: Scaled to [0, 1]; one row of the table for each smoothing. Shape `(smoothings, n)`, float64.
        smallest: The loss that 0 stands for, of each smoothing, in the units of the task.
        scale: The length of the interval of the loss, of each smoothing.
        guess: What a guess loses, in the units of the task.
    """

    losses: np.ndarray
    smallest: tuple[float, ...]
    scale: tuple[float, ...]
    guess: float


@dataclass(frozen=True)
class RiskOf:
    """How rows are evaluated: the same for every candidate.

    `ref_model` and `beta` are DPO's; `alphas` are the smoothings of a language model.
    """

    task: Task
    collate: Collate
    batch_size: int
    alphas: tuple[float, ...]
    beta: float
    ref_model: nn.Module | None
    accelerator: Accelerator

    def rows(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> RowLosses:
        """The losses of all `rows`, in their order."""
        if self.task == "lm":
            return self._tokens(model, rows)
        if self.task == "classification":
            table = evaluate_classes(model, rows, self.collate, self.accelerator, batch_size=self.batch_size)
            wrong, guess = 1 - table.correct.double(), 1 - 1 / self._classes(model, rows[0])
        else:
            options = {"ref_model": self.ref_model, "batch_size": self.batch_size}
            pairs = evaluate_pairs(model, rows, self.collate, self.accelerator, **options)
            wrong, guess = 1 - preference_scores(reward_margins(pairs, self.beta)), 0.5
        return RowLosses(wrong.numpy()[None], (0.0,), (1.0,), guess)

    def _classes(self, model: nn.Module, row: dict[str, Any]) -> int:
        batch = self._batch([row])
        batch.pop("labels")
        with torch.no_grad(), evaluation_mode([model]):
            return model(**batch).logits.shape[-1]

    def _batch(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: value.to(self.accelerator.device) for key, value in self.collate(rows).items()}

    def _tokens(self, model: nn.Module, rows: Sequence[dict[str, Any]]) -> RowLosses:
        alphas = torch.tensor(self.alphas, dtype=torch.float64)[:, None]
        found, vocabulary = [], 0
        with torch.no_grad(), evaluation_mode([model]):
            for start in range(0, len(rows), self.batch_size):
                batch = self._batch([rows[i] for i in range(start, min(start + self.batch_size, len(rows)))])
                labels = batch.pop("labels")[:, 1:]
                places = (labels != -100).nonzero(as_tuple=True)
                logits = model(**batch).logits[:, :-1][places].float()
                vocabulary = logits.shape[-1]
                p = logits.log_softmax(-1).gather(-1, labels[places][:, None]).squeeze(1).exp().double().cpu()
                bits = -torch.log2((1 - alphas) * p + alphas / vocabulary)
                counts = (labels != -100).sum(1).cpu()
                if (counts == 0).any():
                    number = start + (counts == 0).nonzero()[0].item()
                    raise ValueError(f"Row {number} of `dataset` has no token with a label: leave it out.")
                totals = torch.zeros(len(alphas), len(labels), dtype=torch.float64)
                found.append(totals.index_add(1, places[0].cpu(), bits) / counts)
        smallest = [-math.log2(1 - a + a / vocabulary) for a in self.alphas]
        scale = [math.log2(1 + (1 - a) * vocabulary / a) for a in self.alphas]
        losses = (torch.cat(found, 1).numpy() - np.array(smallest)[:, None]) / np.array(scale)[:, None]
        return RowLosses(losses.clip(0, 1), tuple(smallest), tuple(scale), math.log2(vocabulary))

    def gradient_of(self, model: nn.Module, rows: list[dict[str, Any]]) -> None:
        """Adds the gradient of the training loss of some rows: the model's own, or DPO's for preferences."""
        batch = self._batch(rows)
        with evaluation_mode([model]), torch.enable_grad():
            loss = self._dpo_loss(model, batch) if self.task == "preference" else model(**batch).loss
            loss.backward()

    def _dpo_loss(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        mask = batch.pop("completion_mask")[:, 1:]
        known = [batch.pop(name, None) for name in ("ref_chosen_logps", "ref_rejected_logps")]

        def logps(policy: nn.Module) -> torch.Tensor:
            log_p = policy(**batch).logits[:, :-1].float().log_softmax(-1)
            return (log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1) * mask).sum(1)

        if known[0] is None:
            with torch.no_grad(), as_reference(model, self.ref_model, self.accelerator) as reference:
                reference_logps = logps(reference)
        else:
            reference_logps = torch.cat(known)
        chosen, rejected = (logps(model) - reference_logps).chunk(2)
        return -nn.functional.logsigmoid(self.beta * (chosen - rejected)).mean()


def collator_of(task: Task, data_collator: Collate | None, columns: Sequence[str]) -> Collate:
    """The collator that was passed, or the usual one of the task.

    Raises:
        ValueError: the rows do not have the columns that the usual one needs.
    """
    if data_collator is not None:
        return data_collator
    needed = {"lm": {"input_ids"}, "classification": {"labels"}, "preference": {"prompt_ids", "chosen_ids"}}[task]
    if missing := needed - {*columns}:
        raise ValueError(
            f"`dataset` has no column {min(missing)!r}, which `task={task!r}` needs; its columns are "
            f"{sorted(columns)}. Pass tokenized rows, as `train_dataset` of a trainer has them, or `data_collator`."
        )
    return {"lm": _pad, "classification": _tensors, "preference": _pairs}[task]


def _tensors(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    # Numbers, also in lists, which the default collator takes for the columns of a batch
    return default_data_collator([{k: v for k, v in row.items() if not isinstance(v, str)} for row in rows])


def _pad(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Token sequences padded on the right, whose padding is neither attended to nor evaluated."""
    longest = max(len(row["input_ids"]) for row in rows)

    def column(name: str, padding: int, default: Callable[[list[int]], list[int]]) -> torch.Tensor:
        values = [list(row.get(name) or default(row["input_ids"])) for row in rows]
        return torch.tensor([v + [padding] * (longest - len(v)) for v in values])

    return {
        "input_ids": column("input_ids", 0, list),
        "attention_mask": column("attention_mask", 0, lambda ids: [1] * len(ids)),
        "labels": column("labels", -100, list),
    }


def _pairs(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    return DataCollatorForPreference(pad_token_id=0)(rows)
