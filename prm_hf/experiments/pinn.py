"""A physics-informed network of u_t + β·u_x = 0 whose start is observed with noise.

`prm-hf pinn`, and recipes/pinn.py, which has the commands. x is periodic in [0, 2π], t in [0, 1], and u(x, 0) = sin x,
so that u(x, t) = sin(x − βt).
"""

from dataclasses import dataclass
from math import ceil, isfinite, pi
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ..runs.schema import Threshold
from ..trainers.config import with_help
from . import interruptible
from .arguments import check_ranges
from .problems import Problem
from .thresholds import ThresholdArguments, ThresholdTask
from .thresholds_grid import run_thresholds


PERIOD, END = 2 * pi, 1.0  # x is in [0, PERIOD], t in [0, END]
GRID = (40, 21)  # places and times at which the solution is compared with the exact one
ERROR = "relative_l2"


@with_help
@dataclass
class PINNArguments(ThresholdArguments):
    """
    Arguments of `prm-hf pinn`.

    Parameters:
        beta (`float`):
            β, the speed at which the solution moves.
        noise (`float`):
            Standard deviation of the normal noise of the observed values, whose own is 0.71. The published one is not
            known.
        observations (`int`):
            Observed values of u(x, 0), at places that are drawn uniformly.
        collocation (`str`):
            Whether the points of the equation and of the period are `resampled` at each step or `fixed`, which is
            drawn once for each observed value.
        collocation_points (`int`):
            Points at which the equation is to hold, for each observed value of a batch.
        boundary_points (`int`):
            Times at which the two ends of the period are to agree, for each observed value of a batch.
        hidden_layers (`int`):
            Layers of the network with a tanh behind them.
        hidden_size (`int`):
            Their width.
    """

    beta: float = 5.0
    noise: float = 2.0
    observations: int = 1024
    collocation: Literal["resampled", "fixed"] = "resampled"
    collocation_points: int = 4
    boundary_points: int = 1
    hidden_layers: int = 4
    hidden_size: int = 50


def exact_solution(points: Tensor, beta: float) -> Tensor:
    """sin(x − βt) at points (x, t): of `(..., 2)` `(..., 1)`."""
    return torch.sin(points[..., :1] - beta * points[..., 1:])


class PINN(nn.Module):
    """A network u(x, t) whose loss is on observed values, on the equation and on the ends of the period.

    Args:
        beta: the equation's β.
        hidden_layers, hidden_size: how many layers have a tanh behind them, and their width.
    """

    def __init__(self, beta: float = 5.0, hidden_layers: int = 4, hidden_size: int = 50) -> None:
        super().__init__()
        self.beta = beta
        layers, width = [], 2
        for _ in range(hidden_layers):
            layers += [nn.Linear(width, hidden_size), nn.Tanh()]
            width = hidden_size
        self.network = nn.Sequential(*layers, nn.Linear(width, 1))
        for layer in self.network[::2]:
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self, points: Tensor, values: Tensor, inside: Tensor | None = None, times: Tensor | None = None
    ) -> dict[str, Tensor]:
        """u at the points, `(n, 1)`, and the loss.

        That is the mean squared error there, plus, where such points are given, the mean squares of the residual of
        the equation and of the gap between the ends of the period.

        Args:
            points: (x, t) at which values are known, `(n, 2)`.
            values: these values, `(n, 1)`.
            inside: (x, t) at which the equation is to hold, `(..., 2)`.
            times: t at which the ends of the period are to agree, `(..., 1)`.
        """
        u = self.network(points)
        loss = mse_loss(u, values)
        if inside is not None:
            loss = loss + self.residual(inside).square().mean()
        if times is not None:
            loss = loss + self.gap(times).square().mean()
        return {"loss": loss, "u": u}

    def residual(self, points: Tensor) -> Tensor:
        """u_t + β·u_x, `(..., 1)`: the derivative of u in the direction (β, 1)."""
        direction = torch.stack((torch.full_like(points[..., 0], self.beta), torch.ones_like(points[..., 1])), -1)
        return torch.func.jvp(self.network, (points,), (direction,))[1]

    def gap(self, times: Tensor) -> Tensor:
        """u(0, t) − u(2π, t), `(..., 1)`."""
        start = torch.zeros_like(times)
        return self.network(torch.cat((start, times), -1)) - self.network(torch.cat((start + PERIOD, times), -1))


def observe(observations: int, noise: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Points (x, 0), `(n, 2)`, and sin x with normal noise, `(n, 1)`."""
    x = PERIOD * torch.rand(observations, 1, generator=generator)
    values = torch.sin(x) + noise * torch.randn(observations, 1, generator=generator)
    return {"points": torch.cat((x, torch.zeros_like(x)), 1), "values": values}


def draw_points(rows: int, inside: int, boundary: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Points in the domain, `(rows, inside, 2)`, and times, `(rows, boundary, 1)`, uniformly."""
    domain = torch.tensor([PERIOD, END])
    return {
        "inside": domain * torch.rand(rows, inside, 2, generator=generator),
        "times": END * torch.rand(rows, boundary, 1, generator=generator),
    }


def grid_of_points() -> Tensor:
    """(x, t) of the grid on which the error is measured, `(840, 2)`; the end of the period is its start."""
    x = torch.arange(GRID[0]) * (PERIOD / GRID[0])
    return torch.cartesian_prod(x, torch.linspace(0, END, GRID[1]))


class PINNTask(ThresholdTask):
    """A row of the data is an observed value, with the points of the equation and of the period that go with it.

    Where points are resampled, each observed value has a row for every time that it is drawn, with other points.
    """

    command = "pinn"
    description = __doc__.splitlines()[0]
    threshold = Threshold(ERROR, 0.40, larger_is_better=False, label="relative ℓ2 error")
    published: ClassVar = {"AdamW": 3300, "PRM": 1400}
    published_source = "Published: β = 5, AdamW at its best learning rate; the noise is not public."
    arguments_class = PINNArguments
    presets: ClassVar = {
        "cpu": {
            "max_steps": 1500,
            "eval_steps": 20,
            "per_device_train_batch_size": 16,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "learning_rates": [6e-4, 2e-3, 6e-3],
            "prm_learning_rates": [3e-3, 1e-2, 3e-2],
            "weight_decays": [0.0, 0.1],
            "models_at_once": 30,
            "use_cpu": True,
        },
        "full": {
            "max_steps": 6000,
            "eval_steps": 20,
            "per_device_train_batch_size": 16,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "learning_rates": [2e-4, 6e-4, 1e-3, 2e-3, 3.5e-3, 6e-3],
            "prm_learning_rates": [3e-3, 6e-3, 1e-2, 2e-2, 4e-2, 8e-2],
            "weight_decays": [0.0, 1e-3, 1e-2, 1e-1],
            "seeds": list(range(10)),
            "models_at_once": 240,
        },
    }

    @property
    def values_a_step(self) -> int:
        return self.training_args.train_batch_size * self.training_args.gradient_accumulation_steps

    def check(self) -> None:
        args, config, batch = self.args, self.training_args, self.values_a_step
        counts = ("observations", "collocation_points", "boundary_points", "hidden_layers", "hidden_size")
        check_ranges(
            args,
            ("beta", isfinite, "a finite number"),
            ("noise", lambda x: 0 <= x < float("inf"), "at least 0 and finite"),
            *((name, lambda x: x >= 1, "at least 1") for name in counts),
        )
        n = args.observations
        if batch > n:
            raise ValueError(
                f"A step has {batch} rows by `per_device_train_batch_size`, and there are {n} `observations`."
            )
        if config.prm_boundary == "empirical" and config.prm_alpha is None:
            if batch == n:
                raise ValueError(f"`prm_boundary='empirical'` needs more `observations` than a step has, {batch}.")
            config.prm_alpha = batch / (n - batch)  # of the observed values, not of their rows

    def problem(self, seed: int) -> Problem:
        args, generator = self.args, torch.Generator().manual_seed(seed)
        rows = observe(args.observations, args.noise, generator)
        if args.collocation == "resampled":
            times_each = ceil(self.training_args.max_steps * self.values_a_step / args.observations)
            rows = {name: column.repeat(times_each, 1) for name, column in rows.items()}
        n = len(rows["points"])
        rows |= draw_points(n, args.collocation_points, args.boundary_points, generator)
        grid = grid_of_points()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = PINN(args.beta, args.hidden_layers, args.hidden_size)
        return Problem(model, rows, {"points": grid, "values": exact_solution(grid, args.beta)}, measure)


def measure(call: Any, data: dict[str, Tensor]) -> dict[str, Tensor]:
    """‖u − exact‖ / ‖exact‖ on the grid."""
    u = call(points=data["points"], values=data["values"])["u"]
    return {ERROR: torch.linalg.vector_norm(u - data["values"]) / torch.linalg.vector_norm(data["values"])}


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of [`Runner.run`]."""
    return run_thresholds(PINNTask, arguments)
