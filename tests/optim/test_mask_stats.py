"""What the optimizer tells of its masks."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prm_hf.optim import PRM, foreach
from prm_hf.optim.hyperparameters import MASKS

from .optimizer_runs import MEASURED, make_params, train
from .reference_prm import ReferenceTensor


@pytest.mark.parametrize("measured", MEASURED, ids=lambda m: "-".join(map(str, m.values())))
def test_mask_stats_equal_the_reference(measured):
    for mask in MASKS:
        settings = {"mask": mask, **measured}
        params = make_params()
        references = [ReferenceTensor(p.detach().numpy()) for p in params]
        optimizer = PRM(params, **settings)
        train(optimizer, params, references=references, steps=12, **settings)
        stats = optimizer.get_mask_stats()
        q, signal, noise = (
            np.concatenate([getattr(r, name).ravel() for r in references]) for name in ("q", "signal", "noise")
        )
        expected = {
            "mean_q": q.mean(),
            "active_fraction": (q > 0).mean(),
            "min_q": q.min(),
            "max_q": q.max(),
            "parameter_count": q.size,
            "nonfinite_count": 0,
        }
        if mask != "none":
            expected |= {
                "noise_sq": noise.mean(),
                "signal_sq": signal.mean(),
                "snr": signal.mean() / noise.mean(),
            }
        for key, value in expected.items():
            assert stats[key] == pytest.approx(value, rel=1e-5, abs=1e-12), key
        expected_means = [r.q.mean() for r in references if r.q is not None and r.q.size]
        means = [q for q, p in zip(optimizer.get_tensor_masks()[0], params, strict=True) if p.numel()]
        assert means == pytest.approx(expected_means, rel=1e-5, abs=1e-12)
        if mask == "none":
            assert np.isnan([stats[key] for key in ("noise_sq", "signal_sq", "snr")]).all()
        assert stats["noise_scale"] == pytest.approx(stats["noise_sq"], nan_ok=True)  # its earlier name


class CountCalls(TorchDispatchMode):
    """Counts what is called on tensors: on a device a launch each, or as many as the elements take."""

    calls = 0
    free = (torch.ops.aten.view.default, torch.ops.aten.promote_types.default)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function not in self.free
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{"reduction": "per_tensor"}, {"reduction": "per_param"}, {"mask": "none"}])
def test_mask_stats_of_many_tensors_take_no_more_calls(settings):
    calls = []
    for number in (3, 30):
        params = [torch.ones(5, 3, requires_grad=True) for _ in range(number)]
        optimizer = PRM(params, **settings)
        for p in params:
            p.grad = torch.ones(5, 3)
        optimizer.step()
        with CountCalls() as count:
            assert optimizer.get_mask_stats()["parameter_count"] == 15 * number
        calls.append(count.calls)
    assert calls[0] == calls[1]


def test_mask_stats_of_tensors_in_several_blocks_are_those_of_one(monkeypatch):
    params = make_params()
    optimizer = PRM(params, reduction="per_param")
    train(optimizer, params, steps=12)  # one of them skips steps
    whole, whole_masks = optimizer.get_mask_stats(), optimizer.get_tensor_masks()
    for size in (5, 20):
        monkeypatch.setattr(foreach, "CPU_BLOCK", size)
        assert optimizer.get_mask_stats() == pytest.approx(whole, rel=1e-12)
        assert optimizer.get_tensor_masks()[0] == pytest.approx(whole_masks[0], rel=1e-12)


def test_mask_stats_per_group_and_before_the_first_step():
    params = make_params()
    groups = [{"params": params[:2], "mask": "none"}, {"params": params[2:]}]
    optimizer = PRM(groups, reduction="per_tensor", mask_min_elements=0)
    empty = optimizer.get_mask_stats()
    assert empty["parameter_count"] == 0 and np.isnan(empty["mean_q"])
    train(optimizer, params, steps=3)
    groups = optimizer.get_mask_stats(per_group=True)
    assert [g["parameter_count"] for g in groups] == [36, 37]
    assert groups[0]["mean_q"] == 1.0 and 0 < groups[1]["mean_q"] < 1
    total = optimizer.get_mask_stats()
    assert total["mean_q"] == pytest.approx((36 * 1 + 37 * groups[1]["mean_q"]) / 73)
