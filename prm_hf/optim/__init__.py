"""The optimizer. This room knows the mathematics and imports torch alone."""

from .prm import PRM, prm


__all__ = ["PRM", "prm"]
