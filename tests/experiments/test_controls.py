"""The optimizers of the controls and of other methods, against their definitions."""

import sys

import pytest
import torch

from prm_hf import PRM
from prm_hf.experiments.controls import ShuffledPRM, _third_party_optimizer, mean_masks, scale_learning_rates


def tensors(seed=0, shapes=((3, 4), (5,), (2, 2), (7,))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def feed(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator) + i  # so that tensors differ in their signal


def test_shuffled_masks_are_the_same_masks_elsewhere():
    params = tensors()
    groups = PRM([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}], lr=0.1, reduction="per_tensor")
    shuffled = ShuffledPRM(groups.param_groups, seed=3)
    plain = PRM([p.detach().clone().requires_grad_() for p in params], lr=0.1, reduction="per_tensor")
    assert [g["weight_decay"] for g in shuffled.param_groups] == [0.01, 0.0]
    orders = set()
    for step in range(1, 6):
        before = [p.detach().clone() for p in params]
        decay = [0.01, 0.01, 0.0, 0.0]
        feed(params, step)
        for p, q in zip(params, plain.param_groups[0]["params"], strict=True):
            q.grad = p.grad.clone()  # the same gradients, so the same state and the same masks before they are dealt
        shuffled.step()
        plain.step()
        masks = [q for group in plain.get_tensor_masks() for q in group]
        dealt = []
        for p, old, wd in zip(params, before, decay, strict=True):
            state = shuffled.state[p]
            adam = state["exp_avg"] / (1 - 0.9**step) / ((state["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8)
            ratio = (old * (1 - 0.1 * wd) - p.detach()) / (0.1 * adam)
            assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-3)
            dealt.append(ratio.median().item())
        assert sorted(dealt) == pytest.approx(sorted(masks), rel=1e-3)
        orders.add(tuple(sorted(range(4), key=dealt.__getitem__)))
        tables = [q for group in shuffled.get_tensor_masks() for q in group]
        assert tables == pytest.approx(masks)  # the state's, as they were before they were dealt
    assert len(orders) > 1


def test_shuffling_goes_on_where_it_stopped():
    """The order is that of the step, not of the calls: a resumed run shuffles as an uninterrupted one."""
    ends = []
    for interrupted in (False, True):
        params = tensors()
        optimizer = ShuffledPRM(PRM(params, lr=0.1, reduction="per_tensor").param_groups, seed=1)
        for step in range(1, 7):
            if interrupted and step == 4:
                saved = optimizer.state_dict()
                optimizer = ShuffledPRM(PRM(params, lr=0.1, reduction="per_tensor").param_groups, seed=1)
                optimizer.load_state_dict(saved)
            feed(params, step)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(*ends)


def test_tensor_masks_are_those_of_the_statistics():
    for reduction in ("per_tensor", "per_param"):
        params = tensors()
        optimizer = PRM([{"params": params[:1]}, {"params": params[1:]}], reduction=reduction, estimator="debiased")
        assert optimizer.get_tensor_masks() == [[], []]
        for step in range(3):
            feed(params, step)
            params[3].grad = None
            optimizer.step()
        masks = optimizer.get_tensor_masks()
        assert [len(group) for group in masks] == [1, 2]
        sizes = [12, 5, 4]
        mean = sum(q * n for q, n in zip(masks[0] + masks[1], sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(optimizer.get_mask_stats()["mean_q"])


def test_scaled_learning_rates_leave_the_decay():
    params = tensors()
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    scale_learning_rates(optimizer, {params[0]: 0.5, params[3]: 0.0})
    found = {id(p): (g["lr"], g["lr"] * g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = [(0.005, 0.001), (0.01, 0.001), (0.01, 0.0), (0.0, 0.0)]
    assert [found[id(p)] for p in params] == [pytest.approx(pair) for pair in expected]


@pytest.mark.parametrize("steps", [1, 5])
def test_cautious_is_adamw_where_update_and_gradient_agree(steps):
    """Liang et al., arXiv 2411.16085: the update's entries that go against the gradient are dropped."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    (p,), settings = tensors(shapes=((20,),)), {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = pytorch_optimizer.AdamP([p], delta=0.0, cautious=True, foreach=True, weight_decay=0.0, **settings)
    m = v = torch.zeros(20)
    for t in range(1, steps + 1):
        old = p.detach().clone()
        feed([p], t)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
        agree = (m * p.grad > 0).float()
        update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) * agree * 20 / (agree.sum() + 1)
        assert torch.allclose(old - p.detach(), 0.1 * update, rtol=1e-3, atol=1e-6)


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r'`cautious` needs pytorch-optimizer: pip install "prm-hf\[controls\]"'):
        _third_party_optimizer(None, "cautious")


def test_masks_that_were_not_recorded_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no masks.jsonl"):
        mean_masks(tmp_path)
