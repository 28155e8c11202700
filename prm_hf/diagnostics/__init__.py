"""Did a model learn something simple, or by heart? Bounds on its risk from the size of its compressed weights."""

import importlib
from typing import TYPE_CHECKING

from .._extras import require


require("prm_hf.diagnostics", "transformers", "accelerate", "datasets", "scipy")

__all__ = ["CompressionBound", "Subspace", "bound_of_run", "compression_bound", "load_compressed"]

_LAZY = {
    "CompressionBound": "compression",
    "compression_bound": "compression",
    "load_compressed": "compression",
    "Subspace": "subspace",
    "bound_of_run": "run_bound",
}

if TYPE_CHECKING:
    from .compression import CompressionBound, compression_bound, load_compressed
    from .run_bound import bound_of_run
    from .subspace import Subspace


def __getattr__(name: str):
    if name in _LAZY:
        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
