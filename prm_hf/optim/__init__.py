"""The optimizer. This room knows the mathematics."""

# The module `prm` is imported first, for the function `prm` is to have the name.
from .prm import PRM  # isort: skip
from .functional import prm


__all__ = ["PRM", "prm"]
