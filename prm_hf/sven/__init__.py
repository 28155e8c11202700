"""Sven: the step that lowers every sample's loss at once, as an optimizer and for the Hugging Face trainers."""

from .polyak import PolyakSGD
from .step import SvenStep
from .sven import Sven


__all__ = ["PolyakSGD", "Sven", "SvenStep"]
