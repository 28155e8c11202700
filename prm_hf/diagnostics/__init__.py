"""What a trained model's loss says about how simple a solution it is: effective dimension and compression bounds."""

from typing import TYPE_CHECKING

from .._extras import load_late, require


require("prm_hf.diagnostics", "scipy", "numpy", extra="diagnostics")

__all__ = [
    "CompressionBound",
    "Contraction",
    "Curvature",
    "DoubleDescent",
    "EffectiveDimension",
    "LossSurface",
    "Perturbation",
    "compression_bound",
    "effective_dimension",
    "loss_surface",
    "perturb",
    "plot_double_descent",
    "plot_loss_surface",
    "plot_perturbation",
    "plot_spectral_density",
    "posterior_contraction",
    "random_features",
    "spectral_density",
]

# Each half of the room is loaded when it is first used: it has its own libraries.
_LAZY = {
    "CompressionBound": "compression",
    "Contraction": "linear",
    "Curvature": "curvature",
    "DoubleDescent": "linear",
    "EffectiveDimension": "dimension",
    "LossSurface": "directions",
    "Perturbation": "directions",
    "compression_bound": "compression",
    "effective_dimension": "dimension",
    "loss_surface": "directions",
    "perturb": "directions",
    "plot_double_descent": "plots",
    "plot_loss_surface": "plots",
    "plot_perturbation": "plots",
    "plot_spectral_density": "plots",
    "posterior_contraction": "linear",
    "random_features": "linear",
    "spectral_density": "plots",
}

if TYPE_CHECKING:
    from .compression import CompressionBound, compression_bound
    from .curvature import Curvature
    from .dimension import EffectiveDimension, effective_dimension
    from .directions import LossSurface, Perturbation, loss_surface, perturb
    from .linear import Contraction, DoubleDescent, posterior_contraction, random_features
    from .plots import (
        plot_double_descent,
        plot_loss_surface,
        plot_perturbation,
        plot_spectral_density,
        spectral_density,
    )


__getattr__, __dir__ = load_late(__name__, _LAZY)
