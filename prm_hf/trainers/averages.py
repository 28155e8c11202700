"""Exact means of what a trainer computes batch by batch: each row, or each token, counts once."""

from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler


class Step(NamedTuple):
    """A step of an evaluation: the rows of this process, the number of all, and on how many processes each row is."""

    indices: list[int]
    n_rows: int
    copies: int


def even_steps(n: int, batch_size: int, world: int, rank: int) -> list[Step]:
    """The steps of process `rank` through `n` rows, in their order.

    In each step all processes have equally many rows, as collective operations need them. accelerate fills the last
    step with rows that then count twice. Here the last `n % world` rows are evaluated by every process instead, so
    that the mean over processes is that over these rows.
    """
    steps, start = [], 0
    while (left := n - start) > 0:
        if left >= world:
            size = min(batch_size, left // world)
            steps.append(Step(list(range(start + rank * size, start + (rank + 1) * size)), size * world, 1))
        else:
            size = min(batch_size, left)
            steps.append(Step(list(range(start, start + size)), size, world))
        start += steps[-1].n_rows
    return steps


def even_dataloader(
    dataloader: DataLoader, steps: list[Step], accelerator: Accelerator, num_workers: int
) -> DataLoaderShard:
    """A dataloader through the rows of another one, by [`even_steps`]."""
    return DataLoaderShard(
        dataloader.dataset,
        device=accelerator.device,
        batch_sampler=[step.indices for step in steps],
        collate_fn=dataloader.collate_fn,
        num_workers=num_workers,
    )


def goes_through_all_rows(dataloader: DataLoader) -> bool:
    """Whether a dataloader of a trainer yields all rows of its dataset, in their order."""
    batches = dataloader.batch_sampler
    while hasattr(batches, "batch_sampler"):  # one for each process is inside
        batches = batches.batch_sampler
    return isinstance(getattr(batches, "sampler", None), SequentialSampler) and not batches.drop_last


class Weights:
    """What each value of a metric stands for: one dict a batch, from names of metrics to numbers of rows or tokens.

    The entry `""` is for the metrics that have none of their own.
    """

    def __init__(self) -> None:
        self._batches: list[dict[str, Tensor]] = []

    def add(self, batch: dict[str, Tensor], accelerator: Accelerator, copies: int = 1) -> None:
        """Adds the numbers of this process' batch, which are summed over the processes. Collective."""
        numbers = accelerator.gather(torch.stack([number.float() for number in batch.values()])[None]).sum(0) / copies
        self._batches.append(dict(zip(batch, numbers, strict=True)))

    def average(self, metrics: dict[str, list[float]]) -> None:
        """Puts the weighted mean in the place of the values of each metric that has one a batch, and starts anew."""
        batches, self._batches = self._batches, []
        for name, values in metrics.items():
            if len(values) == len(batches):
                weights = torch.stack([batch.get(name, batch[""]) for batch in batches]).cpu().double()
                if (total := weights.sum()) > 0:
                    values[:] = [(torch.tensor(values, dtype=torch.float64) @ weights / total).item()]
