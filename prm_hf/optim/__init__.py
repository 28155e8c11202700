"""The optimizer. This room knows the mathematics."""

from .prm import PRM
from .step import prm


__all__ = ["PRM", "prm"]
