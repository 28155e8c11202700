"""The functional form under `torch.func.vmap`: each of the stacked models takes the step that it would take alone."""

import itertools

import pytest
import torch
from torch.func import vmap

from prm_hf.optim.functional import prm
from prm_hf.optim.hyperparameters import ESTIMATORS, MASKS, REDUCTIONS


SHAPES = ((6, 64), (5, 3, 2), (40,), (3,), ())  # rows that are summed in parts, rows, few elements, a scalar
MODELS, STEPS = 3, 4
LRS = torch.tensor([1e-2, 3e-3, 0.0])
DECAYS = torch.tensor([0.0, 0.1, 1.0])
BETAS = torch.tensor([0.9, 0.5, 0.99]), torch.tensor([0.999, 0.9, 0.95])


def new_state(shapes, reduction, stack=()):
    """The lists of a step: params, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, grad_vars, steps, exp_avg_signals."""

    def units(shape):
        return {"per_param": shape, "per_tensor": (), "per_row": (shape[0] if len(shape) > 1 else 1,)}[reduction]

    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(*stack, *shape, generator=generator) for shape in shapes]
    zeros = [[torch.zeros(*stack, *shape) for shape in shapes] for _ in range(4)]
    grad_vars = [torch.zeros(*stack, *units(shape), dtype=torch.float64) for shape in shapes]
    return [params, *zeros[:3], grad_vars, [torch.zeros(stack) for _ in shapes], zeros[3]]


def gradients(step):
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(MODELS, *shape, generator=generator) + 0.3 for shape in SHAPES]


def take(lists, grads, settings, **numbers):
    params, exp_avgs, exp_avg_sqs, maxima, grad_vars, steps, signals = lists
    grad_vars = [] if settings["mask"] == "none" else grad_vars
    maxima = maxima if settings.get("amsgrad") else []
    signals = signals if settings.get("signal_beta") else []
    prm(params, grads, exp_avgs, exp_avg_sqs, maxima, grad_vars, steps, signals, **settings, **numbers)
    return params[0].sum()


def stacked(settings, in_dims=0, shared_steps=False):
    """The stack after `STEPS` steps, the models along `in_dims` meanwhile."""
    lists = [[x.movedim(0, in_dims) for x in xs] for xs in new_state(SHAPES, settings["reduction"], (MODELS,))]
    dims = [in_dims] * len(lists)
    if shared_steps:
        lists[5], dims[5] = [torch.zeros(()) for _ in SHAPES], None

    def step(lists, grads, lr, decay, beta1, beta2):
        return take(lists, grads, settings, lr=lr, weight_decay=decay, betas=(beta1, beta2))

    for i in range(STEPS):
        grads = [x.movedim(0, in_dims) for x in gradients(i)]
        vmap(step, in_dims=(dims, in_dims, 0, 0, 0, 0))(lists, grads, LRS, DECAYS, *BETAS)
    return [[x if dim is None else x.movedim(dim, 0) for x in xs] for xs, dim in zip(lists, dims, strict=True)]


def one_by_one(settings):
    """The models of the stack after as many steps, each alone and with numbers."""
    lists = new_state(SHAPES, settings["reduction"], (MODELS,))
    for i, k in itertools.product(range(STEPS), range(MODELS)):
        numbers = {"lr": LRS[k].item(), "weight_decay": DECAYS[k].item(), "betas": (*(b[k].item() for b in BETAS),)}
        take([[x[k] for x in xs] for xs in lists], [g[k] for g in gradients(i)], settings, **numbers)
    return lists


def assert_same(found, wanted):
    for xs, ys in zip(found, wanted, strict=True):
        for x, y in zip(xs, ys, strict=True):
            torch.testing.assert_close(x, y.expand_as(x), rtol=2e-5, atol=1e-6, check_dtype=True)


COMBINATIONS = [
    {"reduction": reduction, "estimator": estimator, "mask": mask}
    for reduction, estimator, mask in itertools.product(REDUCTIONS, ESTIMATORS, MASKS)
]


def name_of(settings):
    return "-".join(f"{value}" for value in settings.values())


@pytest.mark.parametrize("settings", COMBINATIONS, ids=name_of)
def test_a_stack_is_its_models(settings):
    assert_same(stacked(settings), one_by_one(settings))


OTHERS = [
    {"signal_beta": 0.98},
    {"amsgrad": True},
    {"maximize": True, "decoupled_weight_decay": False},
    {"bias_correction": False, "estimator": "ema"},
    {"boundary": "empirical", "batch_size": 8, "n_dataset": 32},
    {"mask_warmup_steps": 2, "mask_min_elements": 0},
    {"relative_eps": 10.0},
    {"capturable": True},
]


@pytest.mark.parametrize("changed", OTHERS, ids=lambda changed: "-".join(changed))
def test_so_it_is_with_other_settings(changed):
    settings = {"reduction": "per_row", "estimator": "debiased", "mask": "snr", **changed}
    assert_same(stacked(settings), one_by_one(settings))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("how", [{"shared_steps": True}, {"in_dims": -1}], ids=["shared_steps", "last_dimension"])
def test_so_it_is_however_it_is_stacked(reduction, how):
    settings = {"reduction": reduction, "estimator": "debiased", "mask": "snr"}
    wanted = one_by_one(settings)
    if how.get("shared_steps"):
        wanted[5] = [x[0] for x in wanted[5]]
    assert_same(stacked(settings, **how), wanted)


def test_no_rule_is_missing(recwarn):
    """Without a batching rule vmap goes through the models one by one, and warns."""
    for reduction, beta in itertools.product(REDUCTIONS, (None, 0.98)):
        if beta is None or reduction == "per_row":
            stacked({"reduction": reduction, "estimator": "debiased", "mask": "soft", "signal_beta": beta})
    assert not [warning for warning in recwarn if "batching rule" in str(warning.message)]


def test_lists_are_refused():
    with pytest.raises(ValueError, match="foreach=True: vmap has no rules"):
        stacked({"reduction": "per_row", "estimator": "ema", "mask": "snr", "foreach": True, "capturable": True})


def test_a_number_for_each_model_is_one():
    x = [torch.ones(2, 3)]
    with pytest.raises(ValueError, match=r"(?s)lr=.*one element"):
        vmap(lambda lr: prm(x, x, x, x, [], x, [torch.zeros(())], lr=lr, mask="none"))(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"(?s)betas\[0\]=.*one element for each model"):
        vmap(lambda b: prm(x, x, x, x, [], x, [torch.zeros(())], betas=(b, 0.9)))(torch.ones(2, 2))
