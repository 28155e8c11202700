"""Pictures of this room, in the look of all pictures of the package."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..compare.plots import house_style, new_figure, to_png
from .dimension import EffectiveDimension
from .directions import LossSurface, Perturbation
from .linear import DoubleDescent


if TYPE_CHECKING:
    from matplotlib.figure import Figure


BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#333333"
WIDTH = 0.02  # of the Gaussians that a density is made of, as a share of the range of the eigenvalues


def spectral_density(found: EffectiveDimension, points: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """The density of all eigenvalues, as a sum of Gaussians of a width of 2 % of their range.

    Returns:
        A grid of `points` eigenvalues and the density there, with an integral of 1; float64.

    Raises:
        ValueError: `found` has some eigenvalues alone, as `"lanczos"` does.
    """
    if found.method == "lanczos":
        raise ValueError("`method` was 'lanczos', which knows some eigenvalues alone: use 'slq' or 'exact'.")
    rule = found.spectrum.quadrature
    if rule is None:
        nodes = np.zeros(found.n_params)  # `exact` leaves out zeros where there are fewer terms than parameters
        nodes[: len(found.eigenvalues)] = found.eigenvalues
        weights = np.full(found.n_params, 1 / found.n_params)
    else:
        nodes = np.concatenate([nodes for nodes, _ in rule.gauss])
        weights = np.concatenate([weights for _, weights in rule.gauss]) / len(rule.gauss)
    low, high = nodes.min(), nodes.max()
    width = WIDTH * (high - low) or 1.0
    grid = np.linspace(low - 4 * width, high + 4 * width, points)
    bumps = np.exp(-(((grid[:, None] - nodes) / width) ** 2) / 2) / (width * np.sqrt(2 * np.pi))
    return grid, bumps @ weights


def plot_spectral_density(found: EffectiveDimension) -> Figure:
    """The density of the eigenvalues, on a logarithmic axis, and α."""
    grid, density = spectral_density(found)
    with house_style():
        figure, [[axes]] = new_figure(6.0, 3.6)
        axes.semilogy(grid, density, color=BLUE)
        axes.axvline(found.alpha, color=GREY, linestyle="--", linewidth=1.2, label=f"α = {found.alpha:g}")
        axes.set_ylim(density.max() * 1e-6, density.max() * 2)
        axes.set_xlabel(f"eigenvalue of the {found.kind}, {found.reduction} over {found.n_terms:,} terms")
        axes.set_ylabel("density")
        axes.legend()
    return figure


def plot_double_descent(found: DoubleDescent, n: int) -> Figure:
    """Test error and undetermined directions over the width, each with an axis of its own."""
    with house_style():
        figure, [[left, right]] = new_figure(9.0, 3.4, 2)
        left.semilogy(found.widths, found.test_error, "o-", color=BLUE, markersize=3)
        left.set_ylabel("test error ‖ŷ − y‖ / ‖y‖")
        right.plot(found.widths, found.undetermined, "o-", color=ORANGE, markersize=3)
        right.set_ylabel("min(n, d) − effective dimension")
        for axes in (left, right):
            axes.axvline(n, color=GREY, linestyle="--", linewidth=1.2)
            axes.set_xlabel(f"features d, for n = {n} rows")
    return figure


def plot_perturbation(found: Perturbation) -> Figure:
    """Share of changed predictions over the length of a step; bands are the range of the trials."""
    with house_style():
        figure, [[axes]] = new_figure(6.0, 3.6)
        for values, colour, label in (
            (found.changed_along, ORANGE, "in the span of the eigenvectors"),
            (found.changed_orthogonal, BLUE, "orthogonal to it"),
        ):
            axes.fill_between(found.scales, values.min(1), values.max(1), color=colour, alpha=0.15, linewidth=0)
            axes.semilogx(found.scales, values.mean(1), "o-", color=colour, label=label)
        axes.set_xlabel("length of the step")
        axes.set_ylabel("share of changed predictions")
        axes.legend()
    return figure


def plot_loss_surface(found: LossSurface) -> Figure:
    """The loss on a plane, as lines of equal loss."""
    with house_style():
        figure, [[axes]] = new_figure(5.0, 4.2)
        filled = axes.contourf(found.steps, found.steps, found.losses.T, levels=20, cmap="viridis")
        axes.plot([0], [0], "o", color="white")
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        figure.colorbar(filled, label="loss")
    return figure


__all__ = [
    "plot_double_descent",
    "plot_loss_surface",
    "plot_perturbation",
    "plot_spectral_density",
    "spectral_density",
    "to_png",
]
