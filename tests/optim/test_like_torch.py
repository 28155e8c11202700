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


def append_a_tensor(cls, params):
    optimizer = cls(params[:2])
    step(optimizer, params)
    optimizer.param_groups[0]["params"].append(params[4])
    return optimizer


def append_a_copied_group(cls, params):
    optimizer = cls(params[:2])
    step(optimizer, params)
    optimizer.param_groups.append({**optimizer.param_groups[0], "params": [params[4]], "lr": 0.5})
    return optimizer


def insert_a_copied_group(cls, params):
    optimizer = cls(params[:2])
    step(optimizer, params)
    optimizer.param_groups.insert(0, {**optimizer.param_groups[0], "params": [params[4]], "lr": 0.5})
    return optimizer


def append_the_defaults(cls, params):
    optimizer = cls(params[:2])
    step(optimizer, params)
    optimizer.param_groups.append({**optimizer.defaults, "params": [params[4]]})
    return optimizer


def add_the_defaults(cls, params):
    optimizer = cls(params[:2])
    step(optimizer, params)
    optimizer.add_param_group({**optimizer.defaults, "params": [params[4]]})
    return optimizer


def add_a_copied_group(cls, params):
    optimizer = cls(params[:2])
    step(optimizer, params)
    optimizer.add_param_group({**optimizer.param_groups[0], "params": [params[4]]})
    return optimizer


def fill_an_empty_group(cls, params):
    optimizer = cls([{"params": params[:2]}, {"params": []}])
    step(optimizer, params)
    optimizer.param_groups[1]["params"].append(params[4])
    return optimizer


def put_a_group_in_the_place_of_another(cls, params):
    optimizer = cls([{"params": params[:1]}, {"params": params[1:2]}])
    step(optimizer, params)
    optimizer.param_groups[1] = {**optimizer.param_groups[0], "params": [params[4]], "lr": 0.5}
    del optimizer.state[params[1]]
    return optimizer


@pytest.mark.parametrize("cls", [torch.optim.AdamW, PRM])
@pytest.mark.parametrize(
    "change",
    [
        append_a_tensor,
        append_a_copied_group,
        insert_a_copied_group,
        append_the_defaults,
        add_the_defaults,
        add_a_copied_group,
        fill_an_empty_group,
        put_a_group_in_the_place_of_another,
    ],
)
def test_tensors_that_come_later(change, cls):
    """They are stepped from then on, with the settings of their group, and are saved."""
    params = make_params()
    optimizer = change(cls, params)
    lrs = [group["lr"] for group in optimizer.param_groups]
    before = params[4].clone()
    for _ in range(3):
        step(optimizer, params)
    assert not torch.equal(before, params[4])
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    step(optimizer, params)
    assert [group["lr"] for group in optimizer.param_groups] == lrs
    if cls is PRM:
        alive = [p for group in optimizer.param_groups for p in group["params"]]
        assert optimizer.get_mask_stats()["parameter_count"] == sum(p.numel() for p in alive)


def test_tensors_that_come_later_count_for_relative_eps():
    ours, theirs = make_params(), make_params()
    appended = append_a_tensor(lambda params: PRM(params, relative_eps=1.0, mask="none"), ours)
    whole = PRM([*theirs[:2], theirs[4]], relative_eps=1.0, mask="none")
    for optimizer, params in ((appended, ours), (whole, theirs)):
        step(optimizer, params)
    assert torch.equal(ours[4], theirs[4])


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"betas": (torch.tensor(0.5), torch.tensor([[0.75]]))}, {"betas": (0.5, 0.75)}),
        ({"weight_decay": torch.tensor(0.25)}, {"weight_decay": 0.25}),
        ({"betas": (np.float32(0.5), np.float64(0.75))}, {"betas": (0.5, 0.75)}),
        ({"eps": np.float32(0.5), "weight_decay": np.float64(0.25)}, {"eps": 0.5, "weight_decay": 0.25}),
        ({"variance_beta": np.array(0.5), "alpha": torch.tensor(0.5)}, {"variance_beta": 0.5, "alpha": 0.5}),
        ({"mask_warmup_steps": np.int64(2)}, {"mask_warmup_steps": 2}),
    ],
)
@pytest.mark.parametrize("given", ["constructor", "group", "later"])
def test_tensors_and_numpy_scalars_are_the_numbers_that_they_hold(settings, same, given, tmp_path):
    ours, theirs = make_params(), make_params()
    if given == "group":
        optimizer = PRM([{"params": ours, **settings}])
    else:
        optimizer = PRM(ours, **(settings if given == "constructor" else {}))
        optimizer.param_groups[0].update(settings)
    for _ in range(3):
        step(optimizer, ours)
    train_with = PRM(theirs, **same)
    for _ in range(3):
        step(train_with, theirs)
    assert all(map(torch.equal, ours, theirs))
    torch.save(optimizer.state_dict(), tmp_path / "state")
    loaded = torch.load(tmp_path / "state", weights_only=True)["param_groups"][0]
    assert {name: loaded[name] for name in same} == same


@pytest.mark.parametrize("name", ["betas", "weight_decay", "eps"])
def test_a_setting_that_requires_a_gradient_needs_differentiable(name):
    value = torch.tensor(0.5, requires_grad=True)
    with pytest.raises(ValueError, match=rf"Invalid {name}.*=tensor\(0.5"):
        PRM(make_params(), **{name: (value, value) if name == "betas" else value})


@pytest.mark.parametrize("settings", [*MEASURED, {"decoupled_weight_decay": False}, {"amsgrad": True}], ids=name_of)
def test_gradients_of_hyperparameters(settings):
    """Those of finite differences, through three steps."""
    gradients = [torch.rand(4, 3, dtype=torch.float64) for _ in range(3)]
    start = torch.rand(4, 3, dtype=torch.float64)

    def end(lr, beta1, beta2, weight_decay):
        p = start.clone().requires_grad_().clone()
        common = {"differentiable": True, "eps": 0.1, **settings}
        optimizer = PRM([p], lr=lr, betas=(beta1, beta2), weight_decay=weight_decay, **common)
        for g in gradients:
            p.grad = g.clone()
            optimizer.step()
        return p

    values = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.1, 0.8, 0.95, 0.2)]
    torch.autograd.gradcheck(end, values)
