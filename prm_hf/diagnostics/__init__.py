"""What a trained model's loss says about how simple a solution it is: effective dimension and compression bounds."""

import importlib
from typing import TYPE_CHECKING

from .._extras import require


require("prm_hf.diagnostics", "scipy", "numpy", extra="diagnostics")

__all__ = [
    "CompressionBound",
    "Curvature",
    "EffectiveDimension",
    "compression_bound",
    "effective_dimension",
]

# Each half of the room is loaded when it is first used: it has its own libraries.
_LAZY = {
    "CompressionBound": "compression",
    "Curvature": "curvature",
    "EffectiveDimension": "dimension",
    "compression_bound": "compression",
    "effective_dimension": "dimension",
}

if TYPE_CHECKING:
    from .compression import CompressionBound, compression_bound
    from .curvature import Curvature
    from .dimension import EffectiveDimension, effective_dimension


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
