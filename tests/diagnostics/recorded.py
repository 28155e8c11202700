"""What the original program and exact computations gave on small inputs; the files say what was run."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn


FOLDER = Path(__file__).parent / "recorded"


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def recorded_mlp() -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]], dict]:
    """The network 4-6-2 in float64 after training, its 60 rows, and what was recorded."""
    recorded = read("effdim")["mlp"]
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    model.load_state_dict({name: torch.tensor(v, dtype=torch.float64) for name, v in recorded["params"].items()})
    inputs, labels = torch.tensor(recorded["X"], dtype=torch.float64), torch.tensor(recorded["Y"])
    return model, list(zip(inputs, labels, strict=True)), recorded


def falling(values: list[float]) -> np.ndarray:
    return np.sort(np.array(values))[::-1]
