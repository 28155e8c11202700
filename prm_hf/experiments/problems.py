"""A small problem of tensors alone: a model, its training rows and its measures, for a Trainer and for a stack."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainingArguments


@dataclass
class Problem:
    """What a run trains and how it is measured; of another seed the same in other numbers.

    Attributes:
        model: its forward takes the columns of some rows as keyword arguments and returns a dict with `loss`, their
            mean. It draws no random numbers.
        rows: the training rows by column, `(n, ...)` each.
        data: what `measure` needs besides the model: tensors by name.
        measure: metrics, 0-dim tensors by their names in the history of a run, of a function that is called as the
            model is and of `data`. It must not read values on the host, as `torch.func.vmap` goes through it.
    """

    model: nn.Module
    rows: dict[str, Tensor]
    data: dict[str, Tensor]
    measure: Callable[[Callable[..., dict[str, Tensor]], dict[str, Tensor]], dict[str, Tensor]]

    @property
    def n_rows(self) -> int:
        return len(next(iter(self.rows.values())))


def order_of_rows(n: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch: a permutation of n that depends on nothing else."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + epoch))


class RowOrder(Sampler[int]):
    """[`order_of_rows`] of each epoch, so that a model sees the same batches alone and in a stack."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(order_of_rows(self.n, self.seed, self.epoch).tolist())


class Rows(Dataset):
    """Columns of tensors, from which a batch is taken at once."""

    def __init__(self, columns: dict[str, Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {name: column[indices] for name, column in self.columns.items()}


def _as_it_is(batch: Any) -> Any:
    return batch


class ProblemTrainer(Trainer):
    """A transformers Trainer of a [`Problem`]: its evaluation is the problem's `measure`."""

    def __init__(self, problem: Problem, args: TrainingArguments) -> None:
        self.problem = problem
        rows, args = Rows(problem.rows), copy.copy(args)
        args.remove_unused_columns = False  # a batch is made at once, and not of rows with columns
        super().__init__(problem.model, args, data_collator=_as_it_is, train_dataset=rows, eval_dataset=rows)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        return RowOrder(self.problem.n_rows, self.args.seed)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        started = time.perf_counter()
        self.model.eval()
        data = {name: x.to(self.args.device) for name, x in self.problem.data.items()}
        with torch.no_grad():
            found = self.problem.measure(self.model, data)
        metrics = {f"{metric_key_prefix}_{name}": value.item() for name, value in found.items()}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
