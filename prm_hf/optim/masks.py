r"""The mask q in [0, 1] from the moments of the gradient: signal S, noise N, boundary alpha, and nothing else.

============  ==========================================================  =================================
`estimator`   S                                                           N
============  ==========================================================  =================================
`"ema"`       :math:`\hat m^2`                                            :math:`\hat s`
`"debiased"`  :math:`\max(\hat m^2 - \kappa_t \hat s, 0)`                 :math:`\kappa_t \hat s`
============  ==========================================================  =================================

============  ==========================================================================================
`mask`        q
============  ==========================================================================================
`"snr"`       :math:`S / (S + \lambda \alpha N + \epsilon_q)`
`"soft"`      :math:`(S - \alpha N)_+ / ((S - \alpha N)_+ + \lambda N + \epsilon_q)`
`"hard"`      1 if :math:`S > \alpha N` else 0
`"none"`      1: plain AdamW
============  ==========================================================================================

:math:`\kappa_t` is the variance of :math:`\hat m` relative to that of one batch. With `"debiased"`,
:math:`s` is centred on the bias-corrected mean from the second step on; at the first step nothing is known and
q = 0. With `"ema"` pure noise has S/N = (1-β1)/(1+β1)·…, about 1/20, so q never falls much under 0.048.

With `signal_beta` :math:`\beta_S`, the signal has a gradient average of its own,

.. math::
    a \leftarrow \beta_S a + (1-\beta_S) g, \quad
    S = \max(\overline{\hat a^2} - \kappa^S_t \overline{\hat s}, 0), \quad
    N = \kappa_t \overline{\hat s}

where bars are means over the row and :math:`\kappa^S_t` is :math:`\kappa_t` of :math:`\beta_S`: a slower average
sees smaller signals, and the mask weighs them against the noise of the average that is stepped with.

Everything here is a pure function. `mean_sq` and `var` are m² and s of each scalar parameter, of its tensor's shape
(`reduction="per_param"`), or vectors of their means over each tensor (`"per_tensor"`) or row (`"per_row"`, with
`signal_beta` of the average that the signal is estimated from), so that all reductions share one definition.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .hyperparameters import Hyperparameters


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


def averaging_variance(beta1: float, t: float | Tensor) -> float | Tensor:
    """kappa_t: the variance of the bias-corrected EMA of t independent gradients, relative to that of one of them.

    kappa_1 = 1 and kappa_inf = (1-beta1)/(1+beta1), 1/19 at beta1 = 0.9.
    """
    return (1 - beta1) / (1 + beta1) * (1 + beta1**t) / (1 - beta1**t)


class StepScalars(NamedTuple):
    """What step t contributes to the formulas: one entry a parameter tensor, floats or 0-dim tensors."""

    step: list | Tensor  # t
    bias1: list | Tensor  # m_hat = m / bias1
    bias2: list | Tensor  # v_hat = v / bias2
    center: list | Tensor  # the variance is taken around center * m_prev ...
    weight: list | Tensor  # ... and enters s with this weight
    signal: list | Tensor  # m_hat^2 = signal * m^2, or of the average that the signal is estimated from
    noise: list | Tensor  # N = noise * s
    floor: list | Tensor  # "debiased": S is what m_hat^2 has above floor * N, its own noise
    first: list | Tensor  # t = 1
    open: list | Tensor  # still in `mask_warmup_steps`, or a tensor of a few elements: q = 1

    def select(self, index: int | Tensor) -> "StepScalars":
        """The entries of one parameter tensor, or of vectors those of several."""
        return StepScalars(*(field[index] for field in self))

    def take(self, positions: list[int]) -> "StepScalars":
        """The entries of several parameter tensors."""
        return StepScalars(*([field[i] for i in positions] for field in self))

    def tensors(self, device: torch.device) -> "StepScalars":
        """Lists of numbers as vectors on a device; lists of 0-dim tensors as vectors where they are."""

        def vector(values: list) -> Tensor:
            if isinstance(values[0], Tensor):
                return torch.stack(values)
            dtype = torch.bool if isinstance(values[0], bool) else statistics_dtype(device)
            return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)

        return StepScalars(*map(vector, self))


def step_scalars(t: float | Tensor, h: Hyperparameters, numel: float | Tensor = math.inf) -> StepScalars:
    """The scalars of step `t`, counted from 1, of a tensor of `numel` elements; or of several, as tensors."""
    beta1, beta2, rho, signal_beta = h.beta1, h.beta2, h.variance_beta, h.signal_beta
    bias1 = 1 - beta1**t
    one = bias1 * 0 + 1  # as many as there are steps
    seen = t > 1
    floor = one
    if h.estimator == "debiased":
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
        noise = 1 / (1 - rho**t) if h.bias_correction else one
        signal = 1 / bias1**2 if h.bias_correction else one
    return StepScalars(
        step=t,
        bias1=bias1 if h.bias_correction else one,
        bias2=1 - beta2**t if h.bias_correction else one,
        center=center,
        weight=weight,
        signal=signal,
        noise=noise,
        floor=floor,
        first=t == 1,
        open=(t <= h.mask_warmup_steps) | h.is_open(numel),
    )


def first_noise_ratio(h: Hyperparameters) -> float | Tensor:
    """N/S of the `"ema"` estimator at t = 1, where both come from the one gradient seen: 1 when bias-corrected.

    Without the correction it is (1-rho)/(1-beta1)², which the defaults also make 1: rounded, so that a tie stays one
    and floating point does not decide a hard mask.
    """
    if h.bias_correction:
        return 1.0
    ratio = (1 - h.variance_beta) / (1 - h.beta1) ** 2
    return torch.round(ratio, decimals=12) if isinstance(ratio, Tensor) else round(ratio, 12)


def _where(condition, yes, no):
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else (yes if condition else no)


def signal_and_noise(mean_sq: Tensor, var: Tensor, c: StepScalars, h: Hyperparameters) -> tuple[Tensor, Tensor]:
    """S and N from m² and s, or from their means over units."""
    signal, noise = mean_sq * c.signal, var * c.noise
    if h.estimator == "debiased":
        return (signal - c.floor * noise).clamp(min=0), noise
    return signal, _where(c.first, signal * first_noise_ratio(h), noise)


def mask_values(signal: Tensor, noise: Tensor, h: Hyperparameters) -> Tensor:
    """q from S and N. Source: Litman & Guo, arXiv 2605.01172, eqs. 241-243 (`hard`, `soft`, `snr`)."""
    if h.mask == "snr":
        return signal / (signal + h.softness * h.noise_weight * noise + h.mask_epsilon)
    excess = signal - h.noise_weight * noise
    if h.mask == "hard":
        return (excess > 0).to(signal.dtype)
    excess = excess.clamp(min=0)
    return excess / (excess + h.softness * noise + h.mask_epsilon)


def compute_mask(mean_sq: Tensor, var: Tensor, c: StepScalars, h: Hyperparameters) -> tuple[Tensor, Tensor, Tensor]:
    """q, S and N at one step, each of the shape of `mean_sq`."""
    signal, noise = signal_and_noise(mean_sq, var, c, h)
    q = mask_values(signal, noise, h)
    return _where(c.open, torch.ones_like(q), q), signal, noise


def advance_units(means: Tensor, var: Tensor, c: StepScalars, h: Hyperparameters) -> tuple[Tensor, Tensor]:
    """q and the next `grad_var` of units, each (n,), from their means of (g - center)² and m², (n, 2).

    The mean over a unit commutes with the moving average, so `grad_var` of a unit is the average of the means.
    """
    var = h.variance_beta * var + c.weight * means[:, 0]
    return compute_mask(means[:, 1], var, c, h)[0], var
