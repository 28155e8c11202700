"""Reproducible noise in the rows of a dataset, kept apart from the clean labels."""

from .corrupt import corrupt
from .expressivity import fit_any_labels
from .preferences import flip_preferences


__all__ = ["corrupt", "fit_any_labels", "flip_preferences"]
