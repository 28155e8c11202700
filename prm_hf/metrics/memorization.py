"""How far a model has learnt its training labels by heart, corrupted ones and others apart."""

import torch

from .evaluation import ClassEvaluation, PairEvaluation, SequenceEvaluation
from .rewards import preference_scores, reward_margins


def memorization_rows(n: int, memorization_max_rows: int | None) -> list[int]:
    """The training rows on which memorization is measured: all `n`, or so many that are spread evenly over them."""
    if memorization_max_rows is None or n <= memorization_max_rows:
        return list(range(n))
    return [i * n // memorization_max_rows for i in range(memorization_max_rows)]


def memorization_metrics(pairs: PairEvaluation, flipped: torch.Tensor, beta: float) -> dict[str, float]:
    """The `corrupted_fit` of [`fit_metrics`] as `memorization/flipped_fit`, and `memorization/clean_fit`.

    `flipped`, bool of shape `(n,)`, says whether the label of each of the `n` training pairs was flipped.
    """
    fits = fit_metrics(row_fit(pairs, beta), _checked("flipped", flipped, len(pairs), "pairs"))
    wanted = ("corrupted_fit", "clean_fit")
    return {name.replace("corrupted", "flipped"): fits[name] for name in fits if name.endswith(wanted)}


def completion_metrics(sequences: SequenceEvaluation) -> dict[str, float]:
    """Means over rows: `exact_match`, the share of the completions that greedy decoding would give, and
    `token_accuracy`, the share of a completion's tokens. A completion without tokens counts as wrong."""
    fit, _ = row_fit(sequences)
    exact = (sequences.correct == sequences.tokens) & (sequences.tokens > 0)
    return {"exact_match": exact.double().mean().item(), "token_accuracy": fit.mean().item()}


def row_fit(
    table: ClassEvaluation | SequenceEvaluation | PairEvaluation, beta: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """How well a model fits each of `n` rows as they are labelled.

    Returns:
        Fit and loss, shape `(n,)`, float64. Of classes, whether the class is right, and the cross-entropy. Of
        completions, the share of tokens that are right, and the mean loss a token (0 of a completion without tokens).
        Of pairs, the [`~prm_hf.metrics.rewards.preference_scores`], and DPO's loss -log σ(margin), `beta` its β.
    """
    if isinstance(table, ClassEvaluation):
        return table.correct.double(), table.loss
    if isinstance(table, SequenceEvaluation):
        tokens = table.tokens.clamp(min=1)
        return table.correct / tokens.double(), -table.logps / tokens
    margins = reward_margins(table, beta)
    return preference_scores(margins), -torch.nn.functional.logsigmoid(margins)


def fit_metrics(
    train: tuple[torch.Tensor, torch.Tensor],
    corrupted: torch.Tensor,
    heldout: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> dict[str, float]:
    """Fit of training rows, corrupted and clean apart, and of held-out rows.

    Args:
        train: fit and loss of `n` training rows, as from `row_fit`.
        corrupted: which of the training rows are corrupted. Shape `(n,)`, bool.
        heldout: fit and loss of the held-out rows.

    Returns:
        `memorization/corrupted_fit` (1: the noise is learnt by heart), `memorization/clean_fit`, each also as `…_loss`
        and each only if there is such a row; `memorization/train_fit` over both; `memorization/heldout_fit` and
        `…_loss`, and `memorization/gap`, the train fit minus the held-out fit.
    """
    corrupted = _checked("corrupted", corrupted, len(train[0]), "rows")
    kinds = {"corrupted": [x[corrupted] for x in train], "clean": [x[~corrupted] for x in train]}
    kinds |= {"train": train[:1]} | ({} if heldout is None else {"heldout": heldout})
    metrics = {}
    for name, values in kinds.items():
        if len(values[0]):
            pairs = zip(("fit", "loss"), values, strict=False)
            metrics |= {f"memorization/{name}_{what}": value.mean().item() for what, value in pairs}
    if heldout is not None:
        metrics["memorization/gap"] = metrics["memorization/train_fit"] - metrics["memorization/heldout_fit"]
    return metrics


def _checked(name: str, flags: torch.Tensor, n: int, what: str) -> torch.Tensor:
    """The flags of `n` rows or pairs, as a bool tensor."""
    flags = torch.as_tensor(flags, dtype=torch.bool)
    if flags.shape != (n,):
        raise ValueError(
            f"`{name}` must have one entry for each of the {n} {what}, got shape {tuple(flags.shape)}: pass that "
            "column of the evaluated rows."
        )
    return flags
