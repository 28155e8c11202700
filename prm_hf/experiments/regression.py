"""Noisy regression: does an optimizer follow the signal, or the labels that are wrong?

`prm-hf regression`, and recipes/regression.py, which has the commands.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..runs.schema import CLEAN_FIT, CORRUPTED_FIT, Threshold
from ..trainers.config import with_help
from . import interruptible
from .arguments import check_ranges
from .problems import Problem
from .thresholds import ThresholdArguments, ThresholdTask
from .thresholds_grid import run_thresholds


ERROR = "heldout_error"


@with_help
@dataclass
class RegressionArguments(ThresholdArguments):
    """
    Arguments of `prm-hf regression`.

    Parameters:
        model (`str`):
            `mlp`, with one hidden layer, or `linear`.
        hidden (`int`):
            Width of the hidden layer.
        features (`int`):
            Inputs of a row, of which a tenth matter.
        rows (`int`):
            Training rows.
        heldout_rows (`int`):
            Held-out rows, all of them with their true labels.
        noise_rate (`float`):
            Share of the training labels that are replaced by random numbers.
        noise_scale (`float`):
            Standard deviation of these, where that of true labels is 1.
    """

    model: Literal["mlp", "linear"] = "mlp"
    hidden: int = 64
    features: int = 32
    rows: int = 1024
    heldout_rows: int = 1024
    noise_rate: float = 0.3
    noise_scale: float = 3.0


class Regressor(nn.Module):
    """A linear model or a network of one hidden layer, whose loss is the mean squared error."""

    def __init__(self, features: int, hidden: int | None) -> None:
        super().__init__()
        layers = [nn.Linear(features, 1)]
        if hidden is not None:
            layers = [nn.Linear(features, hidden), nn.GELU(), nn.Linear(hidden, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """`x` is `(rows, features)`, `y` `(rows,)`."""
        predictions = self.layers(x).squeeze(-1)
        return {"loss": (predictions - y).square().mean(), "predictions": predictions}


class Regression(ThresholdTask):
    """Labels y = f(x), f linear or smooth in a few of the features; a share of the training labels is random.

    The held-out error is the mean squared error on true labels, where predicting their mean gives 1. A fit is 1 minus
    that of training rows on their labels as given: of corrupted rows it rises only where they are learnt by heart.
    """

    command = "regression"
    description = __doc__.splitlines()[0]
    threshold = Threshold(ERROR, 0.35, larger_is_better=False, label="held-out error")
    arguments_class = RegressionArguments
    row_losses = staticmethod(lambda outputs, rows: (outputs["predictions"] - rows["y"]).square())
    curves: ClassVar = {CORRUPTED_FIT: "corrupted fit", CLEAN_FIT: "clean fit"}
    presets: ClassVar = {
        "cpu": {
            "max_steps": 400,
            "eval_steps": 5,
            "per_device_train_batch_size": 32,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "learning_rates": [1e-3, 3e-3, 1e-2, 3e-2],
            "prm_learning_rates": [3e-3, 1e-2, 3e-2, 1e-1],  # a mask shrinks the step
            "weight_decays": [0.0, 0.3, 1.0],
            "stop_at_threshold": False,
            "models_at_once": 60,
            "use_cpu": True,
        },
        "full": {
            "max_steps": 4000,
            "eval_steps": 10,
            "per_device_train_batch_size": 32,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "learning_rates": [3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1],
            "prm_learning_rates": [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1],
            "weight_decays": [0.0, 0.01, 0.1, 1.0],
            "seeds": list(range(10)),
            "stop_at_threshold": False,
            "models_at_once": 240,
        },
    }

    def check(self) -> None:
        check_ranges(
            self.args,
            *((name, lambda x: x >= 1, "at least 1") for name in ("hidden", "features", "rows", "heldout_rows")),
            ("noise_rate", lambda x: 0 <= x < 1, "in [0, 1)"),
            ("noise_scale", lambda x: 0 < x < float("inf"), "above 0"),
        )
        n, batch = self.args.rows, self.training_args.per_device_train_batch_size
        if batch >= n and self.training_args.prm_boundary == "empirical":
            raise ValueError(f"`prm_boundary='empirical'` needs more `rows` than a batch has, got {n} and {batch}.")

    def problem(self, seed: int) -> Problem:
        args, generator = self.args, torch.Generator().manual_seed(seed)
        n = args.rows + args.heldout_rows
        x = torch.randn(n, args.features, generator=generator)
        true = self._labels(x, generator)
        true = (true - true.mean()) / true.std()
        y, heldout = true[: args.rows].clone(), slice(args.rows, n)
        corrupted = torch.randperm(args.rows, generator=generator)[: round(args.noise_rate * args.rows)]
        y[corrupted] = args.noise_scale * torch.randn(len(corrupted), generator=generator)
        is_corrupted = torch.zeros(args.rows)
        is_corrupted[corrupted] = 1.0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = Regressor(args.features, args.hidden if args.model == "mlp" else None)
        data = {"x": x[heldout], "y": true[heldout], "train_x": x[: args.rows], "train_y": y}
        return Problem(model, {"x": x[: args.rows], "y": y}, {**data, "corrupted": is_corrupted}, measure)

    def _labels(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """True labels: of few features a sum, for the network with the sine of another sum of them."""
        used = max(1, self.args.features // 10)
        weights = nn.functional.normalize(torch.randn(2, used, generator=generator), dim=1)
        first, second = (x[:, :used] @ weights.T).unbind(1)
        return first if self.args.model == "linear" else first + torch.sin(second)


def measure(call: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The held-out error, and the fit of the training rows by whether their label is corrupted."""
    heldout = call(x=data["x"], y=data["y"])["loss"] / data["y"].var(correction=0)
    residuals = (call(x=data["train_x"], y=data["train_y"])["predictions"] - data["train_y"]).square()

    def fit(weights: Tensor) -> Tensor:
        n = weights.sum().clamp(min=1.0)
        mean = (data["train_y"] * weights).sum() / n
        variance = ((data["train_y"] - mean).square() * weights).sum() / n
        return torch.where(weights.sum() > 0, 1 - (residuals * weights).sum() / n / variance.clamp(min=1e-12), 0.0)

    return {ERROR: heldout, CLEAN_FIT: fit(1 - data["corrupted"]), CORRUPTED_FIT: fit(data["corrupted"])}


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of [`Runner.run`]."""
    return run_thresholds(Regression, arguments)
