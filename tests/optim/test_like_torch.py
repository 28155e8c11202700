"""What torch's own optimizers take, PRM takes: groups in any order, hooks, schedules' numbers, default devices."""

import copy

import numpy as np
import pytest
import torch

from prm_hf.optim import PRM

from .optimizer_runs import MEASURED, make_params, name_of, train


def two_groups(params, **settings):
    return PRM([{"params": params[:2], "lr": 0.1}, {"params": params[2:], "lr": 0.4}], **settings)


def step(optimizer, params):
    generator = torch.Generator().manual_seed(0)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


@pytest.mark.parametrize("settings", MEASURED, ids=name_of)
def test_the_order_of_groups_does_not_matter(settings):
    ours, theirs = make_params(), make_params()
    optimizers = [two_groups(params, **settings) for params in (ours, theirs)]
    for t in range(3):
        for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
            step(optimizer, params)
        if t == 0:
            optimizers[0].param_groups.reverse()
            assert [group["lr"] for group in optimizers[0].param_groups] == [0.4, 0.1]
    assert all(map(torch.equal, ours, theirs))


def test_a_checkpoint_of_groups_with_other_numbers():
    """Saved after a group was removed: what is loaded belongs to the groups that are there."""
    params = make_params()
    optimizer = two_groups(params)
    step(optimizer, params)
    del optimizer.param_groups[0]
    for p in params[:2]:
        del optimizer.state[p]
    saved = copy.deepcopy(optimizer.state_dict())
    copies = [p.detach().clone().requires_grad_() for p in params[2:]]
    other = PRM(copies, lr=0.9)
    other.load_state_dict(saved)
    assert other.param_groups[0]["lr"] == 0.4
    step(other, copies)
    rest = params[2:]
    step(optimizer, rest)
    assert all(map(torch.equal, copies, rest))


def test_hooks_of_load_state_dict_see_and_change_what_is_loaded():
    params = make_params()
    saved = PRM(params, lr=0.1)
    step(saved, params)
    state_dict = copy.deepcopy(saved.state_dict())

    def drop(optimizer, state_dict):
        state_dict = copy.copy(state_dict)
        state_dict["state"] = {k: v for k, v in state_dict["state"].items() if k != 0}
        return state_dict

    def reset(optimizer):
        optimizer.state[params[1]]["exp_avg"].fill_(7.0)

    loaded = PRM(params, lr=0.1)
    loaded.register_load_state_dict_pre_hook(drop)
    loaded.register_load_state_dict_post_hook(reset)
    loaded.load_state_dict(state_dict)
    assert params[0] not in loaded.state
    assert (loaded.state[params[1]]["exp_avg"] == 7.0).all()
    assert torch.equal(loaded.state[params[3]]["exp_avg"], saved.state[params[3]]["exp_avg"])
    assert torch.equal(saved.state[params[1]]["exp_avg"], state_dict["state"][1]["exp_avg"])


def test_a_checkpoint_of_adamw_is_refused_when_it_is_loaded():
    params = make_params()
    adamw = torch.optim.AdamW(params)
    step(adamw, params)
    with pytest.raises(ValueError, match="group 0 has no `grad_var`: it was written by another optimizer"):
        PRM(params).load_state_dict(adamw.state_dict())
    PRM(params, mask="none").load_state_dict(adamw.state_dict())


@pytest.mark.parametrize("lr", [np.float32(1e-2), np.float64(1e-2), torch.tensor([1e-2]), torch.tensor([[1e-2]])])
def test_a_learning_rate_as_schedules_return_it(lr):
    ours, theirs = make_params(), make_params()
    for params, value in ((ours, lr), (theirs, 1e-2)):
        optimizer = PRM(params)
        optimizer.param_groups[0]["lr"] = value
        step(optimizer, params)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("foreach", [False, True], ids=["reference", "foreach"])
@pytest.mark.parametrize("settings", MEASURED, ids=name_of)
def test_a_default_device_is_not_that_of_the_parameters(settings, foreach):
    params = make_params()
    optimizer = PRM(params, foreach=foreach, **settings)
    expected = make_params()
    train(PRM(expected, foreach=foreach, **settings), expected, steps=3)
    step = optimizer.step

    def step_elsewhere():
        with torch.device("meta"):
            step()
            assert optimizer.get_mask_stats()["parameter_count"] > 0

    optimizer.step = step_elsewhere
    train(optimizer, params, steps=3)
    assert all(map(torch.equal, params, expected))
