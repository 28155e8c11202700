"""How the gradients of a batch's samples lie to each other: their Gram matrix, its numbers and its picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._extras import require
from .capture import Capture, JacobianMethod
from .jacobian import Jacobian
from .step import call_model, check_jacobian


@dataclass(frozen=True)
class SampleGram:
    """The inner products of the gradients of n samples.

    Attributes:
        gram: `(n, n)`, float64: G = J Jᵀ, with the gradient of a sample's loss in each row of J.
        losses: `(n,)`, without a graph.
    """

    gram: Tensor
    losses: Tensor

    @property
    def singular_values(self) -> Tensor:
        """Those of J, `(n,)`, float64, in descending order: the square roots of G's eigenvalues."""
        return torch.linalg.eigvalsh(self.gram).flip(0).clamp(min=0).sqrt()

    @property
    def condition(self) -> float:
        """The largest singular value over the smallest; infinite where one is 0. Sven's `rtol` cuts at its inverse."""
        s = self.singular_values
        return (s[0] / s[-1]).item() if s[-1] > 0 else float("inf")

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the eigenvalues' shares (Roy and Vetterli, 2007), from 1 to n; 0 where G is 0."""
        eigenvalues = self.singular_values.square()
        total = eigenvalues.sum()
        return torch.special.entr(eigenvalues / total).sum().exp().item() if total > 0 else 0.0

    @property
    def cosines(self) -> Tensor:
        """The cosines between the gradients, `(n, n)`, float64; 0 for gradients that are 0."""
        norms = self.gram.diagonal().clamp(min=0).sqrt()
        scale = torch.where(norms > 0, 1 / norms, 0.0)
        return scale.unsqueeze(1) * self.gram * scale

    @property
    def agreement(self) -> float:
        """‖mean gradient‖² over the mean of ‖gradient‖²: 1 where all are equal, 1/n where all are orthogonal.

        It is the inverse of n times the gradient diversity of Yin et al. (arXiv 1706.05699).
        """
        squares = self.gram.trace()
        return (self.gram.sum() / len(self.gram) / squares).item() if squares > 0 else 0.0

    @property
    def agreement_of_samples(self) -> Tensor:
        """Of each sample the mean cosine with the others, `(n,)`, float64. Steps for these harm it where it is < 0."""
        n = len(self.gram)
        return (self.cosines.sum(1) - self.cosines.diagonal()) / max(n - 1, 1)

    def plot(self, path: str | Path, labels: list[str] | None = None) -> None:
        """Writes a picture of the cosines, and of the singular values with the condition and effective rank.

        Args:
            path: the file, whose ending says the format.
            labels: a name for each sample, beside its row.

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: there are not as many labels as samples.
        """
        require("SampleGram.plot", "matplotlib", extra="report")
        from matplotlib.figure import Figure

        n = len(self.gram)
        if labels is not None and len(labels) != n:
            raise ValueError(f"`labels` must have one name for each of the {n} samples, got {len(labels)}.")
        figure = Figure(figsize=(9, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        picture = left.imshow(self.cosines.cpu(), cmap="RdBu_r", vmin=-1, vmax=1)
        figure.colorbar(picture, ax=left, shrink=0.8)
        left.set_title(f"cosines of gradients, agreement {self.agreement:.2f}")
        left.set_xlabel("sample")
        if labels is None:
            left.set_ylabel("sample")
        else:
            left.set_yticks(range(n), labels, fontsize=7)
        right.semilogy(range(1, n + 1), self.singular_values.cpu().clamp(min=1e-12), "o-", markersize=3)
        right.set_title(f"condition {self.condition:.3g}, effective rank {self.effective_rank:.1f} of {n}")
        right.set_xlabel("number")
        right.set_ylabel("singular value")
        figure.savefig(path, dpi=150)


def per_sample_gram(
    model: nn.Module,
    loss_fn: Callable[..., Tensor],
    batch: tuple[Any, ...],
    jacobian: JacobianMethod = "layers",
) -> SampleGram:
    """The Gram matrix of the gradients of a batch's samples, by one forward and one backward pass, without training.

    Args:
        model: any model whose samples do not depend on each other, in the mode that it is in.
        loss_fn: from what the model returns and the rest of the batch to the loss of each sample, `(B,)`.
        batch: `(x, *rest)`, as of [`Sven.step`].
        jacobian: as of [`Sven`].

    Raises:
        ValueError: the losses have another shape, or the model is none that `jacobian="layers"` can see.
    """
    with torch.enable_grad():
        with Capture(model, jacobian) as capture:
            losses = loss_fn(call_model(model, batch[0]), *batch[1:])
        found = capture.differentiate(losses)
        check_jacobian(found, losses, found.params)
    return gram_of(found, losses)


def gram_of(jacobian: Jacobian, losses: Tensor) -> SampleGram:
    return SampleGram(jacobian.gram().double(), losses.detach())
