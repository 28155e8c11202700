"""Numbers that say how accurate a policy is, how far it drifted, and what noise it learnt by heart."""

from .._extras import require


require("prm_hf.metrics", "accelerate", "transformers")

from .drift import ParameterDrift, drift_metrics
from .evaluation import (
    ClassEvaluation,
    PairEvaluation,
    SequenceEvaluation,
    evaluate_classes,
    evaluate_pairs,
    evaluate_sequences,
)
from .memorization import completion_metrics, fit_metrics, memorization_metrics, memorization_rows, row_fit
from .rewards import preference_scores, reward_accuracy, reward_margins, reward_metrics
from .suspects import suspect_metrics


__all__ = [
    "ClassEvaluation",
    "PairEvaluation",
    "ParameterDrift",
    "SequenceEvaluation",
    "completion_metrics",
    "drift_metrics",
    "evaluate_classes",
    "evaluate_pairs",
    "evaluate_sequences",
    "fit_metrics",
    "memorization_metrics",
    "memorization_rows",
    "preference_scores",
    "reward_accuracy",
    "reward_margins",
    "reward_metrics",
    "row_fit",
    "suspect_metrics",
]
