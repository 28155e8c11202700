"""The mask q in [0, 1] from the moments of the gradient: signal S, noise N, boundary alpha, and nothing else.

Everything here is a pure function. `mean_sq` and `var` are either tensors of the parameter's shape
(`reduction="per_param"`: m² and s of each scalar parameter) or vectors: with one entry a tensor
(`reduction="per_tensor"`: their means over the tensor) or one a row (`reduction="per_row"`: their means over the row,
with `signal_beta` of the average that the signal is estimated from), so that all reductions share one definition.
"""

from typing import NamedTuple

import torch
from torch import Tensor


MASKS = ("snr", "soft", "hard", "none")
REDUCTIONS = ("per_param", "per_tensor", "per_row")
# What a step calls "per_row" where rows may lie in several processes, so that sums must be added up before the masks.
ROWS_IN_PARTS = "per_row in parts"
ESTIMATORS = ("ema", "debiased")
BOUNDARIES = ("batch", "empirical")

# Keeps 0/0 out of the mask and changes nothing else: the smallest normal float32. Language-model gradients have
# m² far below Adam's eps of 1e-8, so a mask that shares that eps is closed by it and not by the noise.
SCALE_FREE_EPS = torch.finfo(torch.float32).tiny


def statistics_dtype(device: torch.device) -> torch.dtype:
    """float64, in which sums over a tensor and per-tensor masks are computed; Apple's GPUs have float32 alone."""
    return torch.float32 if device.type == "mps" else torch.float64


def as_rows(x: Tensor) -> Tensor:
    """The rows of `reduction="per_row"`, (rows, elements): dimension 0; a tensor of 0 or 1 dimension is one row."""
    return x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)


def n_rows(x: Tensor) -> int:
    return x.shape[0] if x.dim() > 1 else 1


def over_rows(q: Tensor, x: Tensor) -> Tensor:
    """One value a row, (rows,), so that it can be multiplied with `x`, in its dtype."""
    return q.to(x.dtype).view([-1] * (x.dim() > 0) + [1] * (x.dim() - 1))


def boundary_alpha(boundary: str, alpha: float | None, batch_size: int | None, n_dataset: int | None) -> float:
    """The factor alpha between a signal that counts and the noise of the batch mean.

    1 for fresh batches (`"batch"`), b/(n-b) for batches of b drawn from n examples (`"empirical"`); a number given as
    `alpha` overrides both. Source: Litman & Guo, arXiv 2605.01172, eq. 245.
    """
    if alpha is not None:
        return alpha
    return batch_size / (n_dataset - batch_size) if boundary == "empirical" else 1.0


def averaging_variance(beta1: float, t: float | Tensor) -> float | Tensor:
    """kappa_t: the variance of the bias-corrected EMA of t independent gradients, relative to that of one of them.

    kappa_1 = 1 and kappa_inf = (1-beta1)/(1+beta1), 1/19 at beta1 = 0.9.
    """
    return (1 - beta1) / (1 + beta1) * (1 + beta1**t) / (1 - beta1**t)


class StepScalars(NamedTuple):
    """What step t contributes to the formulas: one entry a parameter tensor, floats or 0-dim tensors."""

    bias1: list | Tensor  # m_hat = m / bias1
    bias2: list | Tensor  # v_hat = v / bias2
    center: list | Tensor  # the variance is taken around center * m_prev ...
    weight: list | Tensor  # ... and enters s with this weight
    signal: list | Tensor  # m_hat^2 = signal * m^2, or of the average that the signal is estimated from
    noise: list | Tensor  # N = noise * s
    floor: list | Tensor  # "debiased": S is what m_hat^2 has above floor * N, its own noise
    first: list | Tensor  # t = 1
    open: list | Tensor  # still in `warmup_steps`: q = 1

    def select(self, index: int) -> "StepScalars":
        """The entries of one parameter tensor."""
        return StepScalars(*(field[index] for field in self))

    def take(self, positions: list[int]) -> "StepScalars":
        """The entries of several parameter tensors."""
        return StepScalars(*([field[i] for i in positions] for field in self))


def step_scalars(
    t: float | Tensor,
    *,
    beta1: float,
    beta2: float,
    rho: float,
    estimator: str,
    bias_correction: bool,
    warmup_steps: int,
    signal_beta: float | None = None,
) -> StepScalars:
    """The scalars of step `t`, counted from 1: a number, or a tensor of the steps of several parameter tensors."""
    bias1 = 1 - beta1**t
    one = bias1 * 0 + 1  # as many as there are steps
    seen = t > 1
    floor = one
    if estimator == "debiased":
        # The estimate is bias-corrected by definition, whatever `bias_correction` says of the update. It starts at
        # t = 2, with the first gradient that has a mean to be compared with; until then S = N = 0, hence q = 0.
        before = _where(seen, t - 1, one)
        center = _where(seen, 1 / (1 - beta1**before), one)
        weight = _where(seen, (1 - rho) / (1 + averaging_variance(beta1, before)), 0 * one)
        noise = _where(seen, averaging_variance(beta1, t) / (1 - rho**before), 0 * one)
        signal = _where(seen, 1 / bias1**2, 0 * one)
        if signal_beta is not None:
            signal = _where(seen, 1 / (1 - signal_beta**t) ** 2, 0 * one)
            floor = averaging_variance(signal_beta, t) / averaging_variance(beta1, t)
    else:
        center = one
        weight = (1 - rho) * one
        noise = 1 / (1 - rho**t) if bias_correction else one
        signal = 1 / bias1**2 if bias_correction else one
    return StepScalars(
        bias1=bias1 if bias_correction else one,
        bias2=1 - beta2**t if bias_correction else one,
        center=center,
        weight=weight,
        signal=signal,
        noise=noise,
        floor=floor,
        first=t == 1,
        open=t <= warmup_steps,
    )


def first_noise_ratio(beta1: float, rho: float, bias_correction: bool) -> float:
    """N/S of the `"ema"` estimator at t = 1, where both come from the one gradient seen: 1 when bias-corrected.

    Without the correction it is (1-rho)/(1-beta1)², which the defaults also make 1: rounded, so that a tie stays one
    and floating point does not decide a hard mask.
    """
    return 1.0 if bias_correction else round((1 - rho) / (1 - beta1) ** 2, 12)


def _where(condition, yes, no):
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else (yes if condition else no)


def signal_and_noise(
    mean_sq: Tensor, var: Tensor, c: StepScalars, *, estimator: str, first_ratio: float
) -> tuple[Tensor, Tensor]:
    """S and N from m² and s (or their means over a tensor or a row)."""
    signal, noise = mean_sq * c.signal, var * c.noise
    if estimator == "debiased":
        return (signal - c.floor * noise).clamp(min=0), noise
    return signal, _where(c.first, signal * first_ratio, noise)


def mask_values(signal: Tensor, noise: Tensor, *, mask: str, alpha: float, softness: float, mask_eps: float) -> Tensor:
    """q from S and N. Source: Litman & Guo, arXiv 2605.01172, eqs. 241-243 (`hard`, `soft`, `snr`)."""
    if mask == "snr":
        return signal / (signal + softness * alpha * noise + mask_eps)
    excess = signal - alpha * noise
    if mask == "hard":
        return (excess > 0).to(signal.dtype)
    excess = excess.clamp(min=0)
    return excess / (excess + softness * noise + mask_eps)


def compute_mask(
    mean_sq: Tensor,
    var: Tensor,
    c: StepScalars,
    *,
    mask: str,
    estimator: str,
    alpha: float,
    softness: float,
    mask_eps: float,
    first_ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, S and N at one step, each of the shape of `mean_sq`."""
    signal, noise = signal_and_noise(mean_sq, var, c, estimator=estimator, first_ratio=first_ratio)
    q = mask_values(signal, noise, mask=mask, alpha=alpha, softness=softness, mask_eps=mask_eps)
    return _where(c.open, torch.ones_like(q), q), signal, noise
