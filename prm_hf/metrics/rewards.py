"""Implicit rewards of preference pairs: β·(log π - log π_ref), as in DPO (Rafailov et al., 2023, eq. 5)."""

import torch

from .evaluation import PairEvaluation


def reward_margins(pairs: PairEvaluation, beta: float) -> torch.Tensor:
    """β·(log-ratio of the chosen - log-ratio of the rejected completion). Shape `(n,)`, float64."""
    return beta * (pairs.chosen.logratio - pairs.rejected.logratio)


def preference_scores(margins: torch.Tensor) -> torch.Tensor:
    """1 where the chosen completion has the greater reward, 0 where the rejected one has, ½ where they tie.

    A tie is a margin of exactly 0: always before training, and often of bf16 weights that have hardly moved. It says
    nothing, so it counts as a guess does. NaN stays NaN, since a model that diverged has no accuracy.

    Args:
        margins: from [`reward_margins`], shape `(n,)`.

    Returns:
        Shape `(n,)`, float64.
    """
    margins = margins.double()
    return torch.where(margins.isnan(), margins, 0.5 * (margins.sign() + 1))


def reward_accuracy(pairs: PairEvaluation, beta: float) -> float:
    """Mean of the [`preference_scores`]: the share of pairs whose chosen completion has the greater reward."""
    return preference_scores(reward_margins(pairs, beta)).mean().item()


def reward_metrics(pairs: PairEvaluation, beta: float) -> dict[str, float]:
    """Exact means over the pairs, by TRL's names; rewards in units of β, `logps` in nats a completion.

    Unlike TRL's, `rewards/accuracies` counts a tie as ½; `rewards/ties` is the share of ties.
    """
    margins = reward_margins(pairs, beta)
    return {
        "rewards/accuracies": preference_scores(margins).mean().item(),
        "rewards/ties": (margins == 0).double().mean().item(),
        "rewards/margins": margins.mean().item(),
        "rewards/chosen": beta * pairs.chosen.logratio.mean().item(),
        "rewards/rejected": beta * pairs.rejected.logratio.mean().item(),
        "logps/chosen": pairs.chosen.logps.mean().item(),
        "logps/rejected": pairs.rejected.logps.mean().item(),
    }
