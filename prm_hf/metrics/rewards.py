"""Implicit rewards of preference pairs: β·(log π - log π_ref), as in DPO (Rafailov et al., 2023, eq. 5)."""

import torch

from .evaluation import PairEvaluation


def reward_margins(pairs: PairEvaluation, beta: float) -> torch.Tensor:
    """β·(log-ratio of the chosen - log-ratio of the rejected completion). Shape `(n,)`, float64."""
    return beta * (pairs.chosen.logratio - pairs.rejected.logratio)


def reward_accuracy(pairs: PairEvaluation, beta: float) -> float:
    """Share of pairs whose chosen completion has the strictly greater reward; a tie counts as wrong."""
    return (beta * pairs.chosen.logratio > beta * pairs.rejected.logratio).double().mean().item()


def reward_metrics(pairs: PairEvaluation, beta: float) -> dict[str, float]:
    """Exact means over the pairs, by TRL's names; rewards in units of β, `logps` in nats a completion."""
    return {
        "rewards/accuracies": reward_accuracy(pairs, beta),
        "rewards/margins": reward_margins(pairs, beta).mean().item(),
        "rewards/chosen": beta * pairs.chosen.logratio.mean().item(),
        "rewards/rejected": beta * pairs.rejected.logratio.mean().item(),
        "logps/chosen": pairs.chosen.logps.mean().item(),
        "logps/rejected": pairs.rejected.logps.mean().item(),
    }
