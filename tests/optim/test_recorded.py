"""Checkpoints that version 0.1.0 wrote are read, and training goes on as it would have gone on then.

The files are in `recorded/`; `record_checkpoints.py` wrote them.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist

from .record_checkpoints import CASES, FLAT_CASES, FOLDER, FlatModel, WholeModel


def load(name: str, model_class: type[WholeModel]) -> tuple[dict, WholeModel]:
    """A file, and a model that has loaded its checkpoint."""
    saved = torch.load(FOLDER / f"{name}.pt", weights_only=True)
    with warnings.catch_warnings():  # arguments have their old names
        warnings.simplefilter("ignore", DeprecationWarning)
        model = model_class(saved["params"], saved["groups"])
    model.optimizer.load_state_dict(copy.deepcopy(saved["state_dict"]))
    return saved, model


def goes_on_as_recorded(saved: dict, model: WholeModel, rtol: float = 1e-6, atol: float = 1e-7) -> None:
    for gradients in saved["gradients"]:
        model.step(gradients)
    for value, expected in zip(model.values(), saved["expected"], strict=True):
        # On the machine that wrote the files the values are the same bit for bit; others round sums otherwise.
        torch.testing.assert_close(value, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", sorted({*CASES} - {"bf16_state"}))
def test_whole_tensors(name):
    saved, model = load(name, WholeModel)
    loaded = model.optimizer.state_dict()["state"]
    for number, state in saved["state_dict"]["state"].items():
        assert loaded[number].keys() == state.keys()
        for key, value in state.items():
            assert loaded[number][key].dtype == value.dtype and torch.equal(loaded[number][key], value), key
    goes_on_as_recorded(saved, model)


def test_moments_of_bf16_state_that_were_float32_are_converted():
    """Version 0.1.0 kept `exp_avg` alone in bfloat16."""
    with pytest.warns(UserWarning, match="keeps in float32 are kept in bfloat16 by this optimizer"):
        saved, model = load("bf16_state", WholeModel)
    loaded = model.optimizer.state_dict()["state"]
    for number, state in saved["state_dict"]["state"].items():
        for key, value in state.items():
            is_moment = key in ("exp_avg", "exp_avg_sq", "exp_avg_signal")
            assert loaded[number][key].dtype == (torch.bfloat16 if is_moment else value.dtype)
            assert torch.equal(loaded[number][key], value.to(loaded[number][key].dtype))
    goes_on_as_recorded(saved, model, rtol=0, atol=3e-2 * 2**-7)  # three steps of at most 0.01


@pytest.fixture
def process_group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", FLAT_CASES)
def test_flat_buffers_of_deepspeed(name, process_group):
    saved, model = load(name, FlatModel)
    goes_on_as_recorded(saved, model)
