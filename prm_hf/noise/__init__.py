"""Reproducible noise in the rows of a dataset, kept apart from the clean labels.

A bool column says which rows are noisy: `flipped`, of `flip_preferences`, is about the label of a preference pair;
`corrupted`, of `corrupt`, about anything in a row.
"""

import importlib
from typing import Any

from .._extras import require


require("prm_hf.noise", "datasets")

from .corrupt import corrupt
from .preferences import flip_preferences
from .raters import label_by_rater


__all__ = ["corrupt", "find_wrong_labels", "flip_preferences", "label_by_rater"]


def __getattr__(name: str) -> Any:
    """`find_wrong_labels` is loaded when it is first used: it needs trainers, which noise does not."""
    if name == "find_wrong_labels":
        return importlib.import_module("..suspects", __name__).find_wrong_labels
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
