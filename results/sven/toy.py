"""The regression of the authors' notebook: exp(-10x²) sin(2x) by a network of 593 parameters, Sven beside Adam.

python results/sven/toy.py results/sven/toy.json

Where Sven ends depends on rounding: its error from one start differs by a factor of six between two processors. So
there are five starts.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from prm_hf.sven import PolyakSGD, Sven


BATCH, ROWS, SEEDS = 128, 10_000, range(42, 47)  # 42 is the authors'
NAMES = {"adam": "Adam", "polyak": "SGD, Polyak's step", "sven": "Sven, κ = 2", "sven_kappa1": "Sven, κ = 1"}


def make_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, heldout = (2 * torch.rand(ROWS, 1, generator=generator) - 1 for _ in range(2))
    return x, target(x), heldout, target(heldout)


def target(x: Tensor) -> Tensor:
    return torch.exp(-10 * x**2) * torch.sin(2 * x)


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [layer for i, o in ((1, 16), (16, 16), (16, 16)) for layer in (nn.Linear(i, o), nn.GELU())]
    return nn.Sequential(*layers, nn.Linear(16, 1))


def squared_errors(predictions: Tensor, y: Tensor) -> Tensor:
    return (predictions - y).square().mean(1)


def step_of(method: str, model: nn.Module) -> Callable[[Tensor, Tensor], None]:
    """A function that makes one step on a batch."""
    if method.startswith("sven"):
        kappa = 1.0 if method.endswith("kappa1") else 2.0
        sven = Sven(model, squared_errors, lr=0.1, k=64, rtol=1e-3, kappa=kappa)
        return lambda x, y: sven.step((x, y))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3) if method == "adam" else PolyakSGD(model.parameters())

    def step(x: Tensor, y: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = squared_errors(model(x), y).mean()
            loss.backward()
            return loss

        optimizer.step(closure)

    return step


def train(method: str, seed: int, epochs: int = 20) -> list[dict[str, float]]:
    """By epoch the held-out mean squared error, and the seconds of training so far."""
    x, y, heldout_x, heldout_y = make_data()
    model, history, seconds = make_model(seed), [], 0.0
    step = step_of(method, model)
    for epoch in range(1, epochs + 1):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        started = time.perf_counter()
        for rows in order.split(BATCH):
            step(x[rows], y[rows])
        seconds += time.perf_counter() - started
        with torch.no_grad():
            error = squared_errors(model(heldout_x), heldout_y).mean().item()
        history.append({"epoch": epoch, "heldout_mse": error, "seconds": round(seconds, 2)})
    return history


def medians(histories: list[list[dict[str, float]]]) -> list[float]:
    """The median over starts of the held-out error, by epoch."""
    return [statistics.median(row["heldout_mse"] for row in rows) for rows in zip(*histories, strict=True)]


def plot(found: dict[str, list[list[dict[str, float]]]], path: Path) -> None:
    """The held-out error over the epochs: the median of the starts, and between the smallest and the largest."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, histories in found.items():
        epochs = [row["epoch"] for row in histories[0]]
        errors = [[row["heldout_mse"] for row in rows] for rows in zip(*histories, strict=True)]
        axes.semilogy(epochs, medians(histories), label=NAMES[method])
        axes.fill_between(epochs, [min(x) for x in errors], [max(x) for x in errors], alpha=0.2)
    axes.set_xlabel("epoch")
    axes.set_ylabel("held-out mean squared error")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    found = {method: [train(method, seed) for seed in SEEDS] for method in NAMES}
    for method, histories in found.items():
        errors = medians(histories)
        last = sorted(history[-1]["heldout_mse"] for history in histories)
        print(
            method, *(f"epoch {i}: {errors[i - 1]:.2g}" for i in (5, 10, 20)), f"from {last[0]:.2g} to {last[-1]:.2g}"
        )
    about = {"torch": torch.__version__, "batch": BATCH, "rows": ROWS, "seeds": [*SEEDS]}
    file = Path(sys.argv[1])
    plot(found, file.with_suffix(".png"))
    file.write_text(json.dumps({"about": about, "methods": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
