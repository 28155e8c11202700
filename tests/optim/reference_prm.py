"""PRM written a second time, from the formulas alone: NumPy, float64, one scalar recursion a tensor, no torch.

It shares no code with the package, so that agreement with it is evidence. It follows the definition literally: where
the package keeps one scalar of variance for a tensor (`per_tensor`) or a row (`per_row`), this keeps all of them and
takes the mean.
"""

import numpy as np


TINY = float(np.finfo(np.float32).tiny)


def mask_of(signal, noise, mask, alpha, softness, eps):
    with np.errstate(invalid="ignore", divide="ignore"):
        if mask == "snr":
            return signal / (signal + softness * alpha * noise + eps)
        if mask == "soft":
            excess = np.maximum(signal - alpha * noise, 0.0)
            return excess / (excess + softness * noise + eps)
        if mask == "hard":
            return (signal > alpha * noise).astype(np.float64)
    raise ValueError(mask)


class ReferenceTensor:
    """The state of one parameter tensor and its step."""

    def __init__(self, w, **settings):
        self.w = np.array(w, dtype=np.float64)
        self.m = np.zeros_like(self.w)
        self.v = np.zeros_like(self.w)
        self.v_max = np.zeros_like(self.w)
        self.s = np.zeros_like(self.w)
        self.a = np.zeros_like(self.w)
        self.t = 0
        self.q = None
        self.signal = self.noise = None
        self.settings = settings

    def step(
        self,
        g,
        *,
        lr=1e-3,
        betas=(0.9, 0.999),
        variance_beta=0.99,
        eps=1e-8,
        weight_decay=0.01,
        softness=1.0,
        batch_size=None,
        boundary="batch",
        n_dataset=None,
        mask="snr",
        reduction="per_row",
        mask_warmup_steps=0,
        mask_min_elements=32,
        amsgrad=False,
        bias_correction=True,
        decoupled_weight_decay=True,
        alpha=None,
        estimator="debiased",
        signal_beta=None,
        mask_eps=None,
        maximize=False,
    ):
        b1, b2 = betas
        g = np.array(g, dtype=np.float64)
        if maximize:
            g = -g
        if decoupled_weight_decay:
            self.w = self.w - lr * weight_decay * self.w
        else:
            g = g + weight_decay * self.w
        if alpha is None:
            alpha = 1.0 if boundary == "batch" else batch_size / (n_dataset - batch_size)
        eps_q = TINY if mask_eps is None else mask_eps

        self.t += 1
        t = self.t

        def kappa(k, b=b1):
            return (1 - b) / (1 + b) * (1 + b**k) / (1 - b**k)

        if estimator == "ema":
            self.s = variance_beta * self.s + (1 - variance_beta) * (g - self.m) ** 2
        elif t >= 2:
            centre = self.m / (1 - b1 ** (t - 1))
            self.s = variance_beta * self.s + (1 - variance_beta) * (g - centre) ** 2 / (1 + kappa(t - 1))
        self.m = b1 * self.m + (1 - b1) * g
        self.v = b2 * self.v + (1 - b2) * g**2
        if signal_beta is not None:
            self.a = signal_beta * self.a + (1 - signal_beta) * g
        self.v_max = np.maximum(self.v_max, self.v)

        m_hat = self.m / (1 - b1**t) if bias_correction else self.m
        v_used = self.v_max if amsgrad else self.v
        v_hat = v_used / (1 - b2**t) if bias_correction else v_used

        def mean(x):
            if reduction == "per_param" or x.size == 0:
                return x
            if reduction == "per_row" and x.ndim > 1:
                return np.stack([np.full_like(row, row.mean()) for row in x])
            return np.full_like(x, x.mean())

        if estimator == "ema":
            s_hat = self.s / (1 - variance_beta**t) if bias_correction else self.s
            signal, noise = mean(m_hat**2), mean(s_hat)
            if t == 1:  # equal but for rounding
                np.testing.assert_allclose(
                    signal, noise * ((1 - b1) ** 2 / (1 - variance_beta) if not bias_correction else 1)
                )
                noise = signal * (1.0 if bias_correction else round((1 - variance_beta) / (1 - b1) ** 2, 9))
        elif t == 1:
            signal = noise = np.zeros_like(self.w)
        else:
            noise = kappa(t) * mean(self.s) / (1 - variance_beta ** (t - 1))
            signal = np.maximum(mean((self.m / (1 - b1**t)) ** 2) - noise, 0.0)
            if signal_beta is not None:
                floor = kappa(t, signal_beta) * mean(self.s) / (1 - variance_beta ** (t - 1))
                signal = np.maximum(mean((self.a / (1 - signal_beta**t)) ** 2) - floor, 0.0)
        is_tiny = estimator == "debiased" and reduction != "per_param" and self.w.size < mask_min_elements
        if mask == "none" or t <= mask_warmup_steps or is_tiny:
            q = np.ones_like(self.w)
        else:
            q = mask_of(signal, noise, mask, alpha, softness, eps_q)
        self.q, self.signal, self.noise = q, signal, noise
        self.w = self.w - lr * q * m_hat / (np.sqrt(v_hat) + eps)
