"""Which labels of a dataset are probably wrong: margins of models that were not trained on a row, and what is made of
them.
"""

from .._extras import require


require("prm_hf.suspects", "transformers", "accelerate", "datasets", "scipy")

from .files import Suspects, judge_rows
from .find import find_wrong_labels, fold_of_rows
from .margins import MarginRecorder, row_margins


__all__ = ["MarginRecorder", "Suspects", "find_wrong_labels", "fold_of_rows", "judge_rows", "row_margins"]
