"""Effective dimension on small tasks: double descent, posteriors, perturbations, and a grid of widths and depths.

recipes/effective_dimension.py has the commands.
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..diagnostics.curvature import Curvature
from ..diagnostics.digits import MODELS, rank_correlations, train_classifier, training_rows, width_depth_grid
from ..diagnostics.dimension import effective_dimension
from ..diagnostics.directions import loss_surface, perturb
from ..diagnostics.linear import posterior_contraction, random_features
from ..diagnostics.plots import (
    plot_double_descent,
    plot_loss_surface,
    plot_perturbation,
    plot_spectral_density,
    to_png,
)


ROWS = 200  # of the double descent
FEATURES = [5, 25, 50, 100, 150, 175, 185, 190, 195, 199, 200, 201, 205, 210, 225, 250, 300, 399]
TOP = 100  # eigenvectors along which parameters are moved
STEPS = [0.1, 0.3, 1.0, 3.0]
SIZES = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]


def double_descent(args: argparse.Namespace) -> dict:
    found = random_features(FEATURES, ROWS)
    (args.output / "double_descent.png").write_bytes(to_png(plot_double_descent(found, ROWS)))
    print(f"{'features':>8} {'test error':>10} {'dimension':>9} {'undetermined':>12}")
    for row in zip(found.widths, found.test_error, found.dimension, found.undetermined, strict=True):
        print("{:8d} {:10.3f} {:9.1f} {:12.2f}".format(*row))
    print(f"The test error is largest at {found.widths[found.test_error.argmax()]} features, for {ROWS} rows.")
    return asdict(found)


def contraction(args: argparse.Namespace) -> dict:
    found = posterior_contraction(SIZES)
    print(f"{'rows':>6} {'tr(prior) − tr(posterior)':>26} {'effective dimension':>20}")
    for row in zip(found.sizes, found.contraction, found.dimension, strict=True):
        print("{:6d} {:26.6f} {:20.6f}".format(*row))
    return asdict(found)


def perturbation(args: argparse.Namespace) -> dict:
    network, _, _ = train_classifier("mlp", 16, 1, train_loss=args.train_loss)
    options = {"loss": "classification", "reduction": "sum"}
    found = effective_dimension(network, training_rows(), method="exact", **options)
    curvature = Curvature(network, training_rows(), **options)
    moved = perturb(curvature, found.eigenvectors[:, :TOP], STEPS)
    surface = loss_surface(curvature, found.eigenvectors[:, :2], radius=1.0, points=21)
    figures = {
        "spectral_density": plot_spectral_density(found),
        "perturbation": plot_perturbation(moved),
        "loss_surface": plot_loss_surface(surface),
    }
    for name, figure in figures.items():
        (args.output / f"{name}.png").write_bytes(to_png(figure))
    print(f"{found.n_params} parameters, effective dimension {found.value:.1f} at α = 1, {TOP} eigenvectors")
    print(f"{'step':>5} {'changed along':>14} {'orthogonal':>11} {'loss along':>11} {'orthogonal':>11}")
    columns = (moved.changed_along, moved.changed_orthogonal, moved.loss_along, moved.loss_orthogonal)
    for step, *row in zip(moved.scales, *(x.mean(1) for x in columns), strict=True):
        print(f"{step:5.1f} {row[0]:14.3f} {row[1]:11.3f} {row[2]:11.1f} {row[3]:11.1f}")
    return {"eigenvalues": found.eigenvalues, "dimension": found.value, "surface": asdict(surface), **asdict(moved)}


def grid(args: argparse.Namespace) -> dict:
    alphas = "".join(f"{f'N at α={alpha:g}':>14}" for alpha in args.alphas)
    print(f"{'width':>5} {'depth':>5} {'seed':>4} {'parameters':>10} {'test loss':>9} {'accuracy':>8}{alphas}")

    def tell(c):
        dimensions = "".join(f"{x:14.1f}" for x in c.dimensions)
        row = f"{c.width:5d} {c.depth:5d} {c.seed:4d} {c.n_params:10,d} {c.test_loss:9.3f} {c.test_accuracy:8.3f}"
        print(row + dimensions, flush=True)

    names = ("model", "widths", "depths", "seeds", "train_loss", "alphas")
    found = width_depth_grid(**{name: getattr(args, name) for name in names}, tell=tell)
    correlations = rank_correlations(found)
    print("Rank correlation of the test loss with: " + ", ".join(f"{k} {v:+.2f}" for k, v in correlations.items()))
    return {"classifiers": [asdict(each) for each in found], "rank_correlations": correlations}


EXPERIMENTS = {
    "double_descent": double_descent,
    "contraction": contraction,
    "perturbation": perturbation,
    "grid": grid,
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effective_dimension.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "experiments", nargs="*", default=[*EXPERIMENTS], metavar="EXPERIMENT", help=", ".join(EXPERIMENTS)
    )
    parser.add_argument("--output", type=Path, default=Path("runs/effective_dimension"), help="%(default)s")
    parser.add_argument("--model", choices=MODELS, default="mlp", help="of the grid: %(default)s")
    parser.add_argument("--widths", type=int, nargs="+", default=[8, 16, 32], help="of the grid: %(default)s")
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 2, 3], help="of the grid: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the grid: %(default)s")
    parser.add_argument("--train_loss", type=float, default=0.01, help="where training stops: %(default)s")
    parser.add_argument("--alphas", type=float, nargs="+", default=[1, 10, 100, 1000], help="%(default)s")
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command line; returns 0."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if unknown := {*args.experiments} - {*EXPERIMENTS}:
        parser.error(f"{', '.join(sorted(unknown))}: the experiments are {', '.join(EXPERIMENTS)}")
    args.output.mkdir(parents=True, exist_ok=True)
    for name in args.experiments:
        print(f"\n{name.replace('_', ' ')}")
        found = EXPERIMENTS[name](args)
        file = args.output / (f"{name}_{args.model}.json" if name == "grid" else f"{name}.json")
        file.write_text(json.dumps(found, indent=1, default=np.ndarray.tolist) + "\n", encoding="utf-8")
    return 0
