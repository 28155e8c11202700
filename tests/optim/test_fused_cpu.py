"""The step on a CPU by torch's fused AdamW: where it is taken, and that it is PRM's.

All tests of `foreach=True` on whole blocks go through it; these are the cases that only this path has.
"""

import itertools

import pytest
import torch

from prm_hf.optim import PRM
from prm_hf.optim.lists import ForeachList
from prm_hf.optim.reductions import inner_products

from .optimizer_runs import COMBINATIONS, SIGNAL, VARIANTS, assert_close, make_params, name_of, train
from .reference_prm import ReferenceTensor


def is_taken(optimizer):
    lists = [x for plan in optimizer._plans.values() for x in plan._lists]
    assert lists and all(isinstance(x, ForeachList) for x in lists)
    return {x._step._by_adamw for x in lists}


SLOW = [pytest.param(v, marks=pytest.mark.slow) for v in ("amsgrad", "maximize", "no_bias_correction", "warmup")]


@pytest.mark.parametrize("variant", ["plain", *SLOW])
def test_equals_float64_reference(variant):
    for settings in COMBINATIONS[::2]:  # the other half differs in alpha
        settings = settings | {"weight_decay": 0.1} | VARIANTS[variant]
        params = make_params()
        references = [ReferenceTensor(p.detach().numpy()) for p in params]
        optimizer = PRM(params, foreach=True, **settings)
        train(optimizer, params, steps=6, references=references, **settings)
        assert is_taken(optimizer) == {settings["mask"] != "none"}, name_of(settings)
        for p, reference in zip(params, references, strict=True):
            assert_close(p, reference.w, 1e-6)


@pytest.mark.parametrize("lr", [0.0, 0.1])
def test_weights_of_a_closed_mask_decay_all_the_same(lr):
    p = torch.ones(40, 3, requires_grad=True)
    optimizer = PRM([p], lr=lr, weight_decay=0.5, reduction="per_tensor", foreach=True)
    p.grad = torch.randn(40, 3)
    optimizer.step()  # q = 0 at the first step
    assert is_taken(optimizer) == {True}
    torch.testing.assert_close(p, torch.full_like(p, 1 - lr * 0.5))
    assert optimizer.state[p]["exp_avg"].abs().max() > 0


@pytest.mark.parametrize(
    "settings", [{"capturable": True}, {"decoupled_weight_decay": False}, {"mask": "none"}], ids=str
)
def test_other_settings_take_the_other_path(settings):
    params = [torch.randn(5, 4, requires_grad=True)]
    optimizer = PRM(params, foreach=True, **settings)
    train(optimizer, params, steps=2)
    assert is_taken(optimizer) == {False}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_precise_over_many_elements(dtype):
    """One of float32 over a million elements would be wrong by 1e-5."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2**20, 7, 40_001, 0, 2**15, 2**17 + 256)
    xs, ys = ([torch.randn(n, generator=generator).abs().to(dtype) for n in sizes] for _ in range(2))
    pairs = zip(xs, ys, strict=True)
    exact = torch.stack(
        [
            torch.stack([a.dot(b) for a, b in ((x, x), (x, y), (y, y))])
            for x, y in ((x.double(), y.double()) for x, y in pairs)
        ]
    )
    tolerance = torch.tensor([1e-7, 1e-6, 1e-7, 0, 1e-7, 1e-7]).unsqueeze(1)
    assert torch.all((inner_products(xs, ys) - exact).abs() <= tolerance * exact)
    # As precise where all products have one sign and the mean is all there is
    torch.testing.assert_close(inner_products(xs[:1], [-xs[0]])[0, 1], -exact[0, 0], rtol=1e-7, atol=0)


def test_sums_over_a_tensor_are_those_of_its_definition():
    """From three products, also where the gradient is nearly all signal and they nearly cancel."""
    for settings, noise in itertools.product(({"reduction": "per_tensor"}, SIGNAL), (1.0, 1e-2)):
        generator = torch.Generator().manual_seed(0)
        p = torch.zeros(300, 50, requires_grad=True)
        exact = torch.zeros(300, 50, dtype=torch.float64, requires_grad=True)
        ours, theirs = PRM([p], foreach=True, **settings), PRM([exact], foreach=False, **settings)
        for _ in range(5):
            p.grad = 1 + noise * torch.randn(p.shape, generator=generator)
            exact.grad = p.grad.double()
            ours.step(), theirs.step()
        if ours.param_groups[0]["reduction"] == "per_tensor":  # the mask that was stepped with
            used = next(iter(next(iter(ours._plans.values()))._masks.values())).q
            torch.testing.assert_close(used.item(), theirs.get_tensor_masks()[0][0], rtol=0, atol=1e-7)
        variances = ours.state[p]["grad_var"], theirs.state[exact]["grad_var"]
        torch.testing.assert_close(*variances, rtol=1e-6 if noise == 1 else 3e-3, atol=0)
        torch.testing.assert_close(p.double(), exact, rtol=1e-5, atol=1e-8)
