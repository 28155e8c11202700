"""Reproducible noise in the rows of a dataset, kept apart from the clean labels.

A bool column says which rows are noisy: `flipped`, of `flip_preferences`, is about the label of a preference pair;
`corrupted`, of `corrupt`, about anything in a row.
"""

from .._extras import load_late, require


require("prm_hf.noise", "datasets")

from .corrupt import corrupt
from .preferences import flip_preferences
from .raters import label_by_rater


__all__ = ["corrupt", "find_wrong_labels", "flip_preferences", "label_by_rater"]


# It needs trainers, which noise does not.
__getattr__, __dir__ = load_late(__name__, {"find_wrong_labels": ".suspects"})
