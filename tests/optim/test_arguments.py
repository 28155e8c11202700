"""The optimizer's arguments: their names and order, what earlier versions called them, and relative_eps."""

import copy
import dataclasses
import inspect

import pytest
import torch

from prm_hf.optim import PRM
from prm_hf.optim.hyperparameters import NAMES, Hyperparameters, Options

from .optimizer_runs import SIGNAL, make_params, train


def test_names_stand_in_one_order_and_reach_the_groups():
    parameters = list(inspect.signature(PRM).parameters.values())
    assert [p.name for p in parameters] == ["params", *NAMES]
    assert all(p.kind is inspect.Parameter.KEYWORD_ONLY for p in parameters[3:])
    assert Options.__annotations__.keys() == {*NAMES} - {"lr", "betas"} | {"rho", "warmup_steps"}
    optimizer = PRM(make_params())
    defaults = {field.name: field.default for field in dataclasses.fields(Hyperparameters)}
    assert {name: optimizer.param_groups[0][name] for name in NAMES} == defaults
    for name in NAMES:
        assert f"        {name} (`" in PRM.__doc__


def test_everything_after_betas_needs_its_name():
    """torch's AdamW has eps where a positional argument once was rho."""
    with pytest.raises(TypeError, match="positional"):
        PRM(make_params(), 1e-3, (0.9, 0.999), 1e-8)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'. It knows lr, betas, eps"):
        PRM(make_params(), epsilon=1e-8)


def test_earlier_names_work_with_a_warning():
    with pytest.warns(DeprecationWarning, match="`rho` is `variance_beta` now"):
        optimizer = PRM(make_params(), rho=0.5)
    assert optimizer.param_groups[0]["variance_beta"] == 0.5 and "rho" not in optimizer.param_groups[0]
    with pytest.warns(DeprecationWarning, match="`warmup_steps` is `mask_warmup_steps` now"):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], "warmup_steps": 3})
    assert optimizer.param_groups[1]["mask_warmup_steps"] == 3
    # A setting of a group that is changed by its earlier name is not overlooked
    optimizer.param_groups[0]["rho"] = 0.25
    train(optimizer, optimizer.param_groups[0]["params"], steps=1)
    assert optimizer.param_groups[0]["variance_beta"] == 0.25


def test_torch_dtypes_name_a_state_dtype():
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bf16")):
        assert PRM(make_params(), state_dtype=dtype).param_groups[0]["state_dtype"] == name


@pytest.mark.parametrize("foreach", [False, True], ids=["reference", "foreach"])
@pytest.mark.parametrize("settings", [{"mask": "none"}, SIGNAL], ids=["none", "signal"])
def test_relative_eps_is_the_eps_and_the_longer_step_that_it_stands_for(settings, foreach):
    ours, theirs = make_params(), make_params()
    eps = 10 * 0.5 / sum(p.numel() for p in ours) ** 0.5
    common = {"foreach": foreach, **settings}
    # In two groups: what counts is the number of all parameters
    groups = [{"params": ours[:2]}, {"params": ours[2:]}]
    train(PRM(groups, relative_eps=10, max_grad_norm=0.5, weight_decay=0.11, **common), ours, steps=10)
    by_hand = PRM(theirs, eps=eps, weight_decay=0.01, **common)
    for group in by_hand.param_groups:
        group["lr"] = torch.nan  # `train` sets it
    step = by_hand.step

    def longer_step():
        for group in by_hand.param_groups:
            group["lr"] *= 11
        step()

    by_hand.step = longer_step
    train(by_hand, theirs, steps=10)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_relative_eps_leaves_the_learning_rate_alone():
    """A schedule and a log see the learning rate that was given."""
    params = make_params()
    optimizer = PRM(params, lr=1e-3, relative_eps=10)
    train(optimizer, params, steps=3)
    assert optimizer.param_groups[0]["eps"] == Hyperparameters.eps
    assert optimizer.param_groups[0]["lr"] <= 1e-2
    resumed = PRM(make_params(), lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.param_groups[0]["relative_eps"] == 10


class Opened(PRM):
    """All masks that are decided between the halves of a step are 1."""

    def transform_unit_masks(self, q):
        self.seen = q.clone()
        return torch.ones_like(q)


def test_a_subclass_that_changes_masks_has_none_of_elements():
    params = make_params()
    with pytest.raises(ValueError, match="Invalid reduction='per_param': `transform_unit_masks` is given masks of"):
        train(Opened(params, reduction="per_param"), params, steps=1)


@pytest.mark.parametrize("reduction", ["per_tensor", "per_row"])
def test_a_subclass_may_change_the_masks(reduction):
    ours, theirs = make_params(), make_params()
    optimizer = Opened(ours, reduction=reduction)
    train(optimizer, ours, steps=4)
    train(PRM(theirs, mask="none", foreach=True), theirs, steps=4)
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
    assert optimizer.seen.dtype == torch.float64 and 0 <= optimizer.seen.min() < optimizer.seen.max() <= 1
