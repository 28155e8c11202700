"""Short runs of the optimizer, beside its reference, which several files of tests share."""

import itertools

import numpy as np
import torch

from prm_hf.optim import masks
from prm_hf.optim.hyperparameters import ESTIMATORS, MASKS, REDUCTIONS, Hyperparameters
from prm_hf.optim.reductions import row_mean_squares


SHAPES = [(7, 5), (), (0,), (13,), (3, 4, 2)]
SKIPS_STEPS = 3  # position of the parameter that has no gradient in some steps
EMPIRICAL = {"boundary": "empirical", "batch_size": 8, "n_dataset": 100}
# With a size from which on tensors have a mask that only the smallest of `SHAPES` are under.
SIGNAL = {"reduction": "per_row", "estimator": "debiased", "signal_beta": 0.98, "mask_min_elements": 8}
# How signal and noise are measured, and what goes with any other setting.
MEASURED = [
    {"reduction": r, "estimator": e, "mask_min_elements": 8} for r, e in itertools.product(REDUCTIONS, ESTIMATORS)
]
MEASURED.append(SIGNAL)
COMBINATIONS = [
    {"mask": mask, **measured, **boundary}
    for mask, measured, boundary in itertools.product(MASKS, MEASURED, [{}, EMPIRICAL])
]


def name_of(settings):
    """The id of a test of such settings."""
    unnamed = ("batch_size", "n_dataset", "mask_min_elements")
    return "-".join(str(value) for key, value in settings.items() if key not in unnamed) or "plain"


VARIANTS = {
    "plain": {},
    "amsgrad": {"amsgrad": True},
    "coupled_weight_decay": {"decoupled_weight_decay": False},
    "no_bias_correction": {"bias_correction": False},
    "maximize": {"maximize": True},
    "warmup": {"mask_warmup_steps": 3},
    "alpha": {"alpha": 0.05, "softness": 0.5},
    "published_eps": {"mask_eps": 1e-8},
    "betas_rho": {"betas": (0.0, 0.9), "variance_beta": 0.5},
}


def schedule(t, steps=50):
    """Warm-up, a plateau, a jump and a cosine: what a scheduler may do to lr."""
    if t < 5:
        return 1e-2 * (t + 1) / 5
    return 1e-2 if t < 20 else 5e-3 * (1 + np.cos(np.pi * t / steps)) * (2 if t == 30 else 1)


def random_gradient(shape, i, generator):
    return torch.randn(shape, generator=generator) * 0.3 + 0.1 * (i + 1)


def train(optimizer, params, steps=50, references=None, seed=1, start=0, before_step=None, **reference_settings):
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule(t)
        for i, p in enumerate(params):
            g = random_gradient(p.shape, i, generator).to(p.dtype)
            p.grad = None if i == SKIPS_STEPS and t % 3 == 1 else g
        if t < start:  # only draw: a resumed run sees the gradients of its own steps
            continue
        if before_step is not None:
            before_step(t)
        if references is not None:
            for p, reference in zip(params, references, strict=True):
                if p.grad is not None:
                    reference.step(p.grad.double().numpy(), lr=schedule(t), **reference_settings)
        optimizer.step()


def last_masks(optimizer, p, group=0):
    """q, S and N of the last step from the state: for `per_param` one an element, for `per_row` one a row."""
    h, state = Hyperparameters.of_group(optimizer.param_groups[group]), optimizer.state[p]
    average = state["exp_avg_signal" if h.signal_beta is not None else "exp_avg"].float()
    c = masks.step_scalars(state["step"].to(masks.statistics_dtype(average.device), copy=True), h, p.numel())
    squares = average.square() if h.reduction == "per_param" else row_mean_squares([average])[0]
    return masks.compute_mask(squares, state["grad_var"], c, h)


def make_params(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def assert_close(p, expected, tolerance):
    expected = np.asarray(expected)
    actual = p.detach().double().numpy()
    assert actual.shape == expected.shape
    if expected.size:
        scale = max(np.abs(expected).max(), 1.0)  # the weights start at order one, some end near zero
        assert np.abs(actual - expected).max() <= tolerance * scale, (actual, expected)
