"""Numbers that say how accurate a policy is, how far it drifted, and what noise it learnt by heart."""

from .drift import ParameterDrift, drift_metrics
from .evaluation import PairEvaluation, SequenceEvaluation, evaluate_pairs, evaluate_sequences
from .memorization import memorization_metrics, memorization_rows
from .rewards import reward_accuracy, reward_margins, reward_metrics


__all__ = [
    "PairEvaluation",
    "ParameterDrift",
    "SequenceEvaluation",
    "drift_metrics",
    "evaluate_pairs",
    "evaluate_sequences",
    "memorization_metrics",
    "memorization_rows",
    "reward_accuracy",
    "reward_margins",
    "reward_metrics",
]
