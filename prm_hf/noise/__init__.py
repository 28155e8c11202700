"""Reproducible noise in the rows of a dataset, kept apart from the clean labels."""

from .preferences import flip_preferences


__all__ = ["flip_preferences"]
