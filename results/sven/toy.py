"""The regression of the authors' notebook: exp(-10x²) sin(2x) by a network of 593 parameters, Sven beside Adam.

python results/sven/toy.py results/sven/toy.json
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from prm_hf.sven import PolyakSGD, Sven


BATCH, ROWS = 128, 10_000
NAMES = {"adam": "Adam", "polyak": "SGD, Polyak's step", "sven": "Sven, κ = 2", "sven_kappa1": "Sven, κ = 1"}


def make_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, heldout = (2 * torch.rand(ROWS, 1, generator=generator) - 1 for _ in range(2))
    return x, target(x), heldout, target(heldout)


def target(x: Tensor) -> Tensor:
    return torch.exp(-10 * x**2) * torch.sin(2 * x)


def make_model() -> nn.Module:
    torch.manual_seed(42)
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


def train(method: str, epochs: int = 20) -> list[dict[str, float]]:
    """By epoch the held-out mean squared error, and the seconds of training so far."""
    x, y, heldout_x, heldout_y = make_data()
    model, history, seconds = make_model(), [], 0.0
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


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """The held-out error over the epochs."""
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for method, history in found.items():
        axes.semilogy([row["epoch"] for row in history], [row["heldout_mse"] for row in history], label=NAMES[method])
    axes.set_xlabel("epoch")
    axes.set_ylabel("held-out mean squared error")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    torch.set_num_threads(1)
    found = {method: train(method) for method in NAMES}
    for method, history in found.items():
        print(method, *(f"epoch {history[i]['epoch']}: {history[i]['heldout_mse']:.3g}" for i in (4, 9, 19)))
    about = {"torch": torch.__version__, "batch": BATCH, "rows": ROWS}
    file = Path(sys.argv[1])
    plot(found, file.with_suffix(".png"))
    file.write_text(json.dumps({"about": about, "methods": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
