"""Width, depth and effective dimension: small classifiers of scikit-learn's digits, trained to one training loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .._extras import require
from .checks import check_choice
from .dimension import effective_dimension


MODELS = ("mlp", "vit")
N_TRAIN = 1000  # of the 1,797 digits; the others are held out


@dataclass(frozen=True)
class Classifier:
    """One trained classifier of a [`width_depth_grid`].

    Attributes:
        model: `"mlp"` or `"vit"`.
        width: units of a layer.
        depth: hidden layers, or blocks.
        seed: of the initial weights.
        n_params: parameters.
        steps: full-batch steps of Adam until the training loss was reached.
        train_loss: cross entropy, nats.
        test_loss: cross entropy of the held-out digits, nats.
        test_accuracy: share of them that is right.
        alphas: α's.
        dimensions: effective dimension at each.
        lowers: lower ends of their intervals.
        uppers: upper ends.
    """

    model: str
    width: int
    depth: int
    seed: int
    n_params: int
    steps: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    alphas: list[float]
    dimensions: list[float]
    lowers: list[float]
    uppers: list[float]


def width_depth_grid(
    model: str = "mlp",
    widths: Sequence[int] = (8, 16, 32),
    depths: Sequence[int] = (1, 2, 3),
    seeds: Sequence[int] = (0,),
    train_loss: float = 0.01,
    alphas: Sequence[float] = (1.0, 10.0, 100.0, 1000.0),
    max_steps: int = 5000,
    tell: Callable[[Classifier], None] | None = None,
) -> list[Classifier]:
    """Trains classifiers of all widths and depths to the same training loss, and measures each.

    The effective dimension is that of the GGN summed over the training rows, so that α is the precision of a Gaussian
    prior of the weights.

    Args:
        model: `"mlp"`, with tanh units, or `"vit"`, transformers' ViT with patches of 4 × 4 pixels.
        widths: units of a layer; of a ViT a multiple of 4.
        depths: hidden layers, or blocks.
        seeds: of the initial weights.
        train_loss: where training stops, nats.
        alphas: α's of the effective dimension.
        max_steps: of a classifier that does not get there.
        tell: is called with each classifier when it is done.

    Raises:
        ValueError: `model` is not known, or a classifier does not reach the training loss.
    """
    check_choice("model", model, MODELS)
    _, test = _digits()
    found = []
    for depth, width, seed in itertools.product(depths, widths, seeds):
        network, steps, loss = train_classifier(model, width, depth, seed, train_loss, max_steps)
        with torch.no_grad():
            logits = _logits(network, test[0])
        of_test = nn.functional.cross_entropy(logits, test[1]).item()
        accuracy = (logits.argmax(-1) == test[1]).double().mean().item()
        measured = effective_dimension(
            network,
            training_rows(),
            alphas[0],
            reduction="sum",
            method="exact",
            loss="classification",
            seed=seed,
        )
        curve = [(x.alpha, x.value, x.lower, x.upper) for x in map(measured.at, alphas)]
        columns = map(list, zip(*curve, strict=True))
        done = Classifier(model, width, depth, seed, measured.n_params, steps, loss, of_test, accuracy, *columns)
        found.append(done)
        if tell is not None:
            tell(done)
    return found


def train_classifier(
    model: str, width: int, depth: int, seed: int = 0, train_loss: float = 0.01, max_steps: int = 5000
) -> tuple[nn.Module, int, float]:
    """A classifier of digits that was trained to a training loss; the steps that it took, and the loss.

    Raises:
        ValueError: it does not get there.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = (_mlp if model == "mlp" else _vit)(width, depth)
    return network, *_fit(network, _digits()[0], train_loss, max_steps)


def training_rows() -> DataLoader:
    """The training rows in one batch."""
    return DataLoader(TensorDataset(*_digits()[0]), batch_size=N_TRAIN)


def rank_correlations(found: Sequence[Classifier]) -> dict[str, float]:
    """Spearman's correlation of the test loss with the effective dimension at each α, and with the parameters."""
    losses = [each.test_loss for each in found]
    columns = {f"α = {alpha:g}": [each.dimensions[i] for each in found] for i, alpha in enumerate(found[0].alphas)}
    columns["parameters"] = [each.n_params for each in found]
    return {name: float(spearmanr(column, losses).statistic) for name, column in columns.items()}


def _digits() -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Training and held-out rows: pixels float32 `(rows, 1, 8, 8)` in [−1, 1], and classes int64 `(rows,)`."""
    require("prm_hf.diagnostics.digits", "sklearn", extra="diagnostics")
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    pixels = torch.tensor(digits.images[order] / 8 - 1, dtype=torch.float32)[:, None]
    classes = torch.tensor(digits.target[order])
    return (pixels[:N_TRAIN], classes[:N_TRAIN]), (pixels[N_TRAIN:], classes[N_TRAIN:])


def _mlp(width: int, depth: int) -> nn.Module:
    sizes = [64, *[width] * depth]
    hidden = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(width, 10))


def _vit(width: int, depth: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=depth,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=10,
    )
    return ViTForImageClassification(config)


def _logits(network: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    output = network(pixels)
    return getattr(output, "logits", output)


def _fit(
    network: nn.Module, train: tuple[torch.Tensor, torch.Tensor], target: float, max_steps: int
) -> tuple[int, float]:
    """Full-batch Adam until the training loss is below the target: the steps, and the loss."""
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for step in range(max_steps):
        loss = nn.functional.cross_entropy(_logits(network, train[0]), train[1])
        if loss.item() <= target:
            return step, loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise ValueError(
        f"After `max_steps={max_steps}` the training loss is {loss.item():.3g}, above `train_loss={target}`: raise "
        "one of the two, or leave out the narrowest width."
    )
