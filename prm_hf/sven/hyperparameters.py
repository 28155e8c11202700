"""The settings of a Sven step, their ranges, and which of them exclude each other."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor

from .capture import JacobianMethod
from .pseudoinverse import SVD, Residuals, residuals_of


@dataclass(frozen=True)
class SvenSettings:
    """See [`Sven`] for what each of them is."""

    k: int | None = None
    rtol: float = 1e-3
    kappa: float = 2.0
    svd: SVD = "gram"
    power_iterations: int = 1
    microbatch_size: int = 1
    param_fraction: float = 1.0
    mask_by_block: bool = False
    variable_k: bool = False
    rmsprop: str | None = None
    rmsprop_alpha: float = 0.99
    rmsprop_eps: float = 1e-8
    momentum: float = 0.0
    max_norm: float | None = None
    jacobian: JacobianMethod = "layers"
    seed: int = 0

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]

    def check(self) -> None:
        """Raises ValueError where a setting is out of its range or contradicts another."""
        whole, infinity = (int,), float("inf")
        ranges = (
            ("k", self.k is None or (isinstance(self.k, whole) and self.k >= 1), "a whole number from 1, or None"),
            ("rtol", 0 <= self.rtol < 1, "in [0, 1)"),
            ("kappa", 0 < self.kappa < infinity, "above 0"),
            ("svd", self.svd in ("gram", "svd", "randomized"), "'gram', 'svd' or 'randomized'"),
            ("power_iterations", self.power_iterations >= 0, "at least 0"),
            (
                "microbatch_size",
                isinstance(self.microbatch_size, whole) and self.microbatch_size >= 1,
                "a whole number from 1",
            ),
            ("param_fraction", 0 < self.param_fraction <= 1, "in (0, 1]"),
            ("rmsprop", self.rmsprop in (None, "before", "after"), "'before', 'after' or None"),
            ("rmsprop_alpha", 0 <= self.rmsprop_alpha < 1, "in [0, 1)"),
            ("rmsprop_eps", 0 < self.rmsprop_eps < infinity, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "in [0, 1)"),
            ("max_norm", self.max_norm is None or 0 < self.max_norm < infinity, "above 0, or None"),
            ("jacobian", self.jacobian in ("layers", "loop"), "'layers' or 'loop'"),
        )
        for name, is_right, wanted in ranges:
            if not is_right:
                raise ValueError(f"`{name}` must be {wanted}, got {getattr(self, name)!r}.")
        if self.momentum and self.rmsprop != "after":
            raise ValueError(f"`momentum={self.momentum:g}` is that of RMSprop: set `rmsprop='after'`, or leave it 0.")
        if self.mask_by_block and self.param_fraction == 1:
            raise ValueError("`mask_by_block` needs a `param_fraction` below 1: set one, or leave it out.")
        if self.variable_k and self.rmsprop == "after":
            raise ValueError("`variable_k` tries the step that `rmsprop='after'` then changes: choose one of them.")
        if self.variable_k and self.max_norm is not None:
            raise ValueError("`variable_k` tries the step that `max_norm` then shortens: choose one of them.")

    def residuals(self, losses: Tensor) -> Residuals:
        return residuals_of(losses, self.kappa, self.microbatch_size)

    def most_components(self, rows: int) -> int:
        """k, of a batch with that many rows."""
        return min(self.k, rows) if self.k is not None else max(1, rows // 2)
