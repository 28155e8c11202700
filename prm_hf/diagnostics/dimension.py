"""How many directions of a model's parameters the data determine: the effective dimension of a curvature matrix."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import nn

from .checks import check_choice, check_count, check_positive
from .curvature import Curvature, Kind, Reduction
from .spectrum import Spectrum, exact_spectrum, exact_spectrum_of_rows, lanczos_spectrum, slq_spectrum


Method = Literal["lanczos", "slq", "exact"]
DEFAULT_K = 50


@dataclass(frozen=True)
class EffectiveDimension:
    """What [`effective_dimension`] returns.

    Attributes:
        value: Σ λ/(λ+α) over the positive eigenvalues. With `"exact"` it is the sum, with `"lanczos"` the middle of
            the interval, with `"slq"` the estimate.
        lower: the lower end of the interval.
        upper: its upper end.
        eigenvalues: the eigenvalues that were computed, falling, float64 `(k,)`, with their signs.
        residuals: ‖Hv − λv‖ of each, float64 `(k,)`. An eigenvalue of the matrix lies that close.
        trace: the sum of all eigenvalues; an estimate, unless `"exact"`.
        n_negative: how many eigenvalues are negative beyond rounding: with `"exact"` of all, with `"lanczos"` of the
            computed ones, with `"slq"` an estimate of all. They add nothing to `value`.
        n_params: parameters that the matrix is about.
        n_terms: terms of the loss: tokens, rows or pairs.
        alpha: α, in units of the eigenvalues.
        kind: which matrix.
        reduction: `"mean"` or `"sum"` over the terms.
        method: how the eigenvalues were computed.
        loss: the loss of the model on the data, with the same reduction.
        spectrum: all that is known of the eigenvalues, with the eigenvectors.
    """

    value: float
    lower: float
    upper: float
    eigenvalues: np.ndarray
    residuals: np.ndarray
    trace: float
    n_negative: int
    n_params: int
    n_terms: int
    alpha: float
    kind: str
    reduction: str
    method: str
    loss: float
    spectrum: Spectrum = field(repr=False)

    @property
    def eigenvectors(self) -> torch.Tensor:
        """The eigenvectors, `(n_params, k)`, in the order of the model's parameters, those of the largest first.

        They are as many as `eigenvalues`, or where `"exact"` took one gradient a term as many as are not 0.
        """
        return torch.from_numpy(np.ascontiguousarray(self.spectrum.vectors()))

    def at(self, alpha: float) -> EffectiveDimension:
        """The same for another α, from the same eigenvalues."""
        check_positive("alpha", alpha)
        value, lower, upper = self.spectrum.dimension(alpha)
        return dataclasses.replace(self, alpha=alpha, value=value, lower=lower, upper=upper)

    def to_dict(self) -> dict[str, Any]:
        """All numbers but the eigenvectors, ready for JSON."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "spectrum"}
        return {name: x.tolist() if isinstance(x, np.ndarray) else x for name, x in values.items()}


def effective_dimension(
    model: nn.Module,
    data: Any,
    alpha: float = 1.0,
    kind: Kind = "ggn",
    reduction: Reduction = "mean",
    k: int | None = None,
    method: Method = "lanczos",
    params: Literal["trainable", "all"] | Sequence[str] = "trainable",
    loss: str | Callable = "causal_lm",
    max_batches: int | None = None,
    seed: int = 0,
    *,
    batch_size: int = 8,
    n_probes: int = 16,
    ref_model: nn.Module | None = None,
    beta: float = 0.1,
) -> EffectiveDimension:
    """The effective dimension N(H, α) = Σ λ/(λ+α) of a curvature matrix H (MacKay, 1992; Maddox, Benton, Wilson, 2020,
    arXiv 2003.02139).

    It counts the directions whose curvature is above α. With the sum over the terms as `reduction` and α the precision
    of a Gaussian prior, or N·weight decay, it is the number of parameters that the data determine; for linear
    regression it is the trace of the hat matrix of ridge regression.

    The generalized Gauss-Newton matrix is the default: it has no negative eigenvalues, while the Hessian of a LoRA
    adapter is indefinite near B = 0 whatever the data are.

    The interval. `"exact"` knows all eigenvalues, so that its ends are the value. `"lanczos"` knows the `k` of largest
    absolute value, and of the others their sum, estimated by random vectors to 99.9 %; the bounds follow from λ/(λ+α)
    being concave. `"slq"` estimates the sum itself, and its interval covers the random vectors to 99.9 %, and for a
    matrix without negative eigenvalues the error of the quadrature. Rounding of float32 is in none of them.

    Args:
        model: any `nn.Module`, as a `PreTrainedModel` or `PeftModel`, on one process; see [`Curvature`].
        data: a dataset, rows or a `DataLoader`; see [`Curvature`].
        alpha: α, above 0, in units of the eigenvalues: of `"sum"` they are n_terms times those of `"mean"`.
        kind: `"ggn"`, `"hessian"` or `"fisher"`, with targets drawn from the model.
        reduction: `"mean"` or `"sum"` over the terms of the loss.
        k: eigenvalues of `"lanczos"`, steps of `"slq"`. By default 50, or as many as there are. `"exact"` has all.
        method: `"lanczos"`, `"slq"` or `"exact"`. `"exact"` makes the whole matrix, of at most 20,000 parameters, or
            for `"dpo"` and `"fisher"` of at most 20,000 terms, which takes a backward pass for each batch of pairs,
            and of other losses one for each term.
        params: `"trainable"`, `"all"`, or names of parameters.
        loss: `"causal_lm"`, `"classification"`, `"dpo"`, or a function of predictions and targets that returns one
            loss a term.
        max_batches: reads no more batches.
        seed: of random vectors and drawn targets.
        batch_size: rows a batch, unless `data` is a `DataLoader`.
        n_probes: random vectors, at least 2.
        ref_model: the reference of `"dpo"`, by default the model without its adapter.
        beta: of `"dpo"`.

    Raises:
        ValueError: an argument or the data are not as above, or Lanczos' iteration does not converge.
    """
    check_positive("alpha", alpha)
    check_choice("method", method, get_args(Method))
    check_count("k", k)
    check_count("n_probes", n_probes)
    if n_probes < 2:
        raise ValueError("`n_probes` is 1: the spread of an estimate takes at least 2 random vectors.")
    curvature = Curvature(
        model,
        data,
        kind=kind,
        reduction=reduction,
        params=params,
        loss=loss,
        max_batches=max_batches,
        batch_size=batch_size,
        ref_model=ref_model,
        beta=beta,
        seed=seed,
    )
    spectrum = curvature_spectrum(curvature, k=k, method=method, n_probes=n_probes, seed=seed)
    value, lower, upper = spectrum.dimension(alpha)
    return EffectiveDimension(
        value=value,
        lower=lower,
        upper=upper,
        eigenvalues=spectrum.eigenvalues,
        residuals=spectrum.residuals,
        trace=spectrum.trace,
        n_negative=spectrum.n_negative,
        n_params=curvature.n_params,
        n_terms=curvature.n_terms,
        alpha=float(alpha),
        kind=kind,
        reduction=reduction,
        method=method,
        loss=curvature.loss,
        spectrum=spectrum,
    )


def curvature_spectrum(
    curvature: Curvature, k: int | None = None, method: Method = "lanczos", n_probes: int = 16, seed: int = 0
) -> Spectrum:
    """What [`effective_dimension`] knows of the eigenvalues, for a curvature that is already there.

    Raises:
        ValueError: `k` is too large, or Lanczos' iteration does not converge.
    """
    n, semidefinite = curvature.n_params, curvature.is_semidefinite
    eps = max(torch.finfo(tensor.dtype).eps for tensor in curvature.parameters.values())
    if method == "exact":
        if curvature.has_rows and curvature.n_terms < n:
            rows = curvature.rows()
            return exact_spectrum_of_rows(rows.numpy(), curvature.gram(rows).numpy(), eps)
        return exact_spectrum(curvature.matrix().numpy(), eps, semidefinite)

    def product(vector: np.ndarray) -> np.ndarray:
        return curvature.product(torch.from_numpy(vector)).numpy()

    if method == "slq":
        return slq_spectrum(product, n, k or DEFAULT_K, n_probes, eps, semidefinite, seed, curvature.vectors_at_once)
    k = k or min(DEFAULT_K, curvature.rank_bound, n - 1)
    if not 0 < k < n:
        raise ValueError(f"`k={k}` eigenvalues of {n} are too many for Lanczos' iteration: take `method='exact'`.")
    return lanczos_spectrum(product, n, k, n_probes, eps, curvature.rank_bound, semidefinite, seed)
