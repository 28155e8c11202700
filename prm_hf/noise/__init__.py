"""Reproducible noise in the rows of a dataset, kept apart from the clean labels.

A bool column says which rows are noisy. `flipped`, of `flip_preferences`, is about the label of a preference pair;
`corrupted`, of `corrupt`, about anything in a row. `corrupt` gives preferences with noisy labels both. What measures
memorization on any task reads either, `corrupted` first; [`PRMDPOTrainer`] reads `flipped`.
"""

from .._extras import require


require("prm_hf.noise", "datasets")

from .corrupt import corrupt
from .preferences import flip_preferences


__all__ = ["corrupt", "flip_preferences"]
