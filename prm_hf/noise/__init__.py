"""Reproducible noise in the rows of a dataset, kept apart from the clean labels.

A bool column says which rows are noisy: `flipped`, of `flip_preferences`, is about the label of a preference pair;
`corrupted`, of `corrupt`, about anything in a row.
"""

from .._extras import require


require("prm_hf.noise", "datasets")

from .corrupt import corrupt
from .preferences import flip_preferences
from .raters import label_by_rater


__all__ = ["corrupt", "flip_preferences", "label_by_rater"]
