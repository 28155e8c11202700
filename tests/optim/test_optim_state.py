"""The optimizer's state in checkpoints, pickles and copies."""

import copy
import itertools
import pickle

import pytest
import torch

from prm_hf.optim import PRM

from .optimizer_runs import MEASURED, SIGNAL, make_params, train


@pytest.mark.parametrize("state_dtype", ["float32", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
def test_resume_is_bit_exact(dtype, foreach, state_dtype):
    for measured, amsgrad in itertools.product(MEASURED, [False, True]):
        settings = {**measured, "amsgrad": amsgrad, "foreach": foreach, "state_dtype": state_dtype}
        whole = make_params(dtype)
        train(PRM(whole, **settings), whole, steps=12)

        params = make_params(dtype)
        optimizer = PRM(params, **settings)
        train(optimizer, params, steps=7)
        saved = copy.deepcopy(optimizer.state_dict())
        resumed = [p.detach().clone().requires_grad_() for p in params]
        fresh = PRM(resumed, **settings)
        fresh.load_state_dict(saved)
        for old, new in zip(params, resumed, strict=True):
            for key, value in optimizer.state[old].items():
                assert fresh.state[new][key].dtype == value.dtype and torch.equal(fresh.state[new][key], value)
                assert fresh.state[new][key] is not value
        train(fresh, resumed, steps=12, start=7)
        for p, q in zip(whole, resumed, strict=True):
            assert torch.equal(p, q)


def test_old_checkpoints_without_newer_keys_load():
    params = make_params()
    optimizer = PRM(params, softness=0.5)
    train(optimizer, params, steps=2)
    saved = optimizer.state_dict()
    for key in ("estimator", "signal_beta", "mask_eps", "alpha", "fused", "capturable"):
        del saved["param_groups"][0][key]
    for state in saved["state"].values():
        state["step"] = float(state["step"])  # torch kept a number here once
    fresh = PRM(params, estimator="debiased")
    fresh.load_state_dict(saved)
    assert fresh.param_groups[0]["softness"] == 0.5 and fresh.param_groups[0]["mask_eps"] is None
    assert all(torch.is_tensor(state["step"]) for state in fresh.state.values())
    train(fresh, params, steps=1)


def test_checkpoint_of_the_other_reduction_is_refused():
    params = make_params()
    optimizer = PRM(params, reduction="per_param")
    train(optimizer, params, steps=1)
    with pytest.raises(ValueError, match=r"group 0 was trained with reduction='per_param'.*'per_tensor'"):
        PRM(params, reduction="per_tensor").load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"group 0 was trained with reduction='per_param'.*'per_row'"):
        PRM(params, reduction="per_row").load_state_dict(optimizer.state_dict())


def test_checkpoint_with_and_without_a_signal_average_are_told_apart():
    params = make_params()
    for theirs, ours in ((None, 0.98), (0.98, None)):
        optimizer = PRM(params, **{**SIGNAL, "signal_beta": theirs})
        train(optimizer, params, steps=1)
        other = PRM(params, **{**SIGNAL, "signal_beta": ours})
        with pytest.raises(ValueError, match=rf"signal_beta={theirs}, .*signal_beta={ours}: .*`exp_avg_signal`"):
            other.load_state_dict(optimizer.state_dict())
        optimizer.param_groups[0]["signal_beta"] = ours
        with pytest.raises(ValueError, match=rf"signal_beta={ours}, .*signal_beta={theirs}: .*`exp_avg_signal`"):
            optimizer.step()


def test_an_optimizer_pickled_before_a_setting_was_there_goes_on():
    params = make_params()
    optimizer = PRM(params)
    train(optimizer, params, steps=2)
    for settings in (optimizer.defaults, *optimizer.param_groups):
        del settings["signal_beta"]
    old = pickle.loads(pickle.dumps(optimizer))
    copies = old.param_groups[0]["params"]
    train(old, copies, steps=2)
    assert old.param_groups[0]["signal_beta"] is None and old.state[copies[0]]["step"] == 4


@pytest.mark.parametrize("measured", [{"reduction": "per_tensor"}, SIGNAL], ids=["per_tensor", "signal"])
def test_pickle_deepcopy_and_added_groups(measured):
    params = make_params()
    optimizer = PRM(params[:3], **measured)
    optimizer.add_param_group({"params": params[3:], "mask": "none", "lr": 1e-4})
    train(optimizer, params, steps=4)
    for clone in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer)):
        assert clone.get_mask_stats() == optimizer.get_mask_stats()
        copies = [p for group in clone.param_groups for p in group["params"]]
        train(clone, copies, steps=3, seed=5)
        mine = [p.detach().clone().requires_grad_() for p in params]
        again = PRM([{"params": mine[:3]}, {"params": mine[3:], "mask": "none"}], **measured)
        again.load_state_dict(optimizer.state_dict())
        train(again, mine, steps=3, seed=5)
        for p, q in zip(copies, mine, strict=True):
            assert torch.equal(p, q)
