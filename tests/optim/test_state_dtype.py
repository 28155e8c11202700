"""`state_dtype`: moments in bfloat16 and in 8 bits. The step is exact, and what is kept is rounded once."""

import importlib.util
import io
import itertools
import warnings

import numpy as np
import pytest
import torch

from prm_hf.optim import PRM
from prm_hf.optim.hyperparameters import MASKS
from prm_hf.optim.quantized import MOMENTS, SIGNED, moment_of, quantized_zeros, random_bits, read, write
from prm_hf.sharding import ShardingPath

from . import reference_quantized
from .optimizer_runs import MEASURED, SIGNAL, SKIPS_STEPS, assert_close, make_params, random_gradient, schedule, train
from .quantized_runs import SHAPES_8BIT, check_steps_from_what_is_kept, large_params, wide_gradient
from .reference_prm import ReferenceTensor


needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


@pytest.mark.parametrize("variant", [{}, {"amsgrad": True}, {"decoupled_weight_decay": False, "maximize": True}])
@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
def test_bf16_equals_a_reference_that_rounds_after_each_step(foreach, variant):
    """In float64, so that no rounding but that of the moments is seen."""
    for mask, measured in itertools.product(MASKS, MEASURED):
        settings = {"mask": mask, **measured, **variant}
        params = make_params(torch.float64)
        references = [ReferenceTensor(p.detach().numpy()) for p in params]
        optimizer = PRM(params, state_dtype="bf16", foreach=foreach, **settings)
        generator = torch.Generator().manual_seed(1)
        for t in range(20):
            optimizer.param_groups[0]["lr"] = schedule(t)
            for i, (p, reference) in enumerate(zip(params, references, strict=True)):
                g = random_gradient(p.shape, i, generator).double()
                p.grad = None if i == SKIPS_STEPS and t % 3 == 1 else g
                if p.grad is not None:
                    reference.step(g.numpy(), lr=schedule(t), **settings)
                    for moment in "ma":
                        rounded = torch.as_tensor(getattr(reference, moment)).to(torch.bfloat16)
                        setattr(reference, moment, rounded.double().numpy())
                    reference.v = reference_quantized.bf16_stochastic(reference.v, reference.t)
            optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert {optimizer.state[p][key].dtype for key in MOMENTS if key in optimizer.state[p]} == {torch.bfloat16}
            assert_close(p, reference.w, 1e-12)


@pytest.mark.parametrize("key", MOMENTS)
def test_8bit_rounds_as_it_is_defined(key):
    generator = torch.Generator().manual_seed(0)
    for shape, start in itertools.product(SHAPES_8BIT, (0, 2**31 + 7)):
        values = wide_gradient(shape, generator)
        values = values if key in SIGNED else values.square()
        state = quantized_zeros(values, key)
        noise = None if key in SIGNED else random_bits(values, start, 3)
        write(moment_of(state, key), values, noise)
        codes, scales = reference_quantized.quantize(
            values.numpy(), key in SIGNED, None if noise is None else noise.numpy().astype(np.int64)
        )
        assert np.array_equal(state[key].numpy(), codes)
        assert np.array_equal(state[f"{key}_scale"].numpy(), scales)
        read_again = read(moment_of(state, key), torch.float32)
        np.testing.assert_allclose(
            read_again.numpy(), reference_quantized.dequantize(codes, scales, key in SIGNED), rtol=1e-6, atol=0
        )
        large = values.abs() > values.abs().max() * 2.0**-14
        assert ((read_again - values).abs() <= values.abs() * (0.0626 if noise is None else 0.126))[large].all()


def test_random_bits_are_those_of_their_definition_and_evenly_spread():
    values = torch.zeros(3, 1000)
    bits = random_bits(values, 0, 17)
    assert np.array_equal(bits.numpy().astype(np.int64).ravel() % 2**32, reference_quantized.random_bits(3000, 17))
    assert torch.equal(random_bits(values[1:], 1000, torch.tensor(17.0)), bits[1:])
    assert abs((bits & 0xFFFF).double().mean() / 2**15 - 1) < 0.05
    assert (random_bits(values, 0, 18) == bits).sum() < 3


@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
def test_exp_avg_sq_is_right_in_the_mean_where_each_change_is_less_than_a_code(state_dtype):
    """Rounded to the nearest it would never change: a step changes it by a thousandth at most."""
    p = torch.zeros(16, 256, requires_grad=True)
    optimizer = PRM([p], lr=0.0, state_dtype=state_dtype, mask="none", betas=(0.9, 0.999))
    scale = torch.ones(16, 256)
    for t in range(300):
        scale[:, 1:128] = 1.0 if t < 100 else 0.3  # within blocks whose largest value stays
        p.grad = scale.clone()
        optimizer.step()
    v = read(moment_of(optimizer.state[p], "exp_avg_sq"), torch.float32)
    expected = (1 - 0.999**100) * 0.999**200 + 0.09 * (1 - 0.999**200)
    assert v[:, 1:128].mean() == pytest.approx(expected, rel=0.02)
    assert v[:, 128:].mean() == pytest.approx(1 - 0.999**300, rel=0.02)


COUPLED = {"amsgrad": True, "decoupled_weight_decay": False}
EXTRA = [{"mask": "none"}, {"mask": "soft"}, {"mask": "hard", "reduction": "per_tensor"}, SIGNAL | {"mask": "soft"}]


@pytest.mark.parametrize(
    "foreach, variant",
    [
        (False, {}),
        (True, COUPLED),
        pytest.param(False, COUPLED, marks=pytest.mark.slow),
        pytest.param(True, {}, marks=pytest.mark.slow),
    ],
)
def test_8bit_is_the_float64_step_from_what_is_kept(foreach, variant, monkeypatch):
    """Each step beside one in float64 on the values kept, whose results the definition then rounds to 8 bits."""
    monkeypatch.setattr("prm_hf.optim.foreach.CPU_BLOCK", 1024)
    for settings in (*MEASURED, *EXTRA):
        check_steps_from_what_is_kept(large_params(), {**settings, **variant}, foreach=foreach)


@pytest.mark.parametrize("state_dtype", ["bf16", "8bit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_resumes_bit_for_bit_through_a_file(dtype, state_dtype):
    for measured in (MEASURED[0], MEASURED[3], SIGNAL):
        settings = {**measured, "state_dtype": state_dtype}
        results = []
        for interrupted in (False, True):
            params = large_params(dtype)
            optimizer = PRM(params, **settings)
            train(optimizer, params, steps=3)
            if interrupted:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = PRM(params, **settings)
                with warnings.catch_warnings(action="error"):
                    optimizer.load_state_dict(torch.load(file, weights_only=True))
            train(optimizer, params, steps=5, start=3)
            results.append([*params, *(x for p in params for x in optimizer.state[p].values())])
        for p, q in zip(*results, strict=True):
            assert p.dtype == q.dtype and torch.equal(p, q)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_run_is_repeated_bit_for_bit_however_its_tensors_are_cut(capturable, monkeypatch):
    results = []
    for block in (2**18, 700):
        monkeypatch.setattr("prm_hf.optim.foreach.CPU_BLOCK", block)
        params = large_params()
        settings = {"state_dtype": "8bit", "foreach": True, "capturable": capturable, "mask": "none"}
        train(PRM(params, **settings), params, steps=3)
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert torch.equal(p, q)


def test_8bit_keeps_what_is_not_finite_visible():
    p = torch.zeros(64, 128, requires_grad=True)
    optimizer = PRM([p], state_dtype="8bit")
    for bad in (0.0, torch.inf, 0.0):
        p.grad = torch.ones_like(p)
        p.grad[3, 5] += bad
        optimizer.step()
    stats = optimizer.get_mask_stats()
    assert 1 <= stats["nonfinite_count"] <= 128 and p[4:].isfinite().all()


@pytest.mark.parametrize("state_dtype, size", [("float32", 12), ("bf16", 6), ("8bit", 3)])
def test_memory_a_parameter(state_dtype, size):
    p = torch.zeros(1024, 1024, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = PRM([p], state_dtype=state_dtype, signal_beta=0.98)
    optimizer.step()
    kept_bytes = sum(x.nbytes for x in optimizer.state[p].values())
    assert size <= kept_bytes / p.numel() < size + 0.06


@pytest.mark.parametrize("theirs", ["float32", "bf16", "8bit"])
@pytest.mark.parametrize("ours", ["float32", "bf16", "8bit"])
def test_a_checkpoint_of_another_state_dtype_is_converted_with_a_warning(ours, theirs):
    params = large_params()
    saved = PRM(params, state_dtype=theirs, signal_beta=0.98)
    train(saved, params, steps=3)
    loaded = PRM([p.detach().clone().requires_grad_() for p in params], state_dtype=ours, signal_beta=0.98)
    with warnings.catch_warnings(record=True) as caught:
        loaded.load_state_dict(saved.state_dict())
    assert [str(x.message) for x in caught if "Moments that the checkpoint keeps" in str(x.message)] or ours == theirs
    assert not caught or ours != theirs
    check_is_converted(saved, loaded, ours, exact=ours == theirs)


def check_is_converted(saved, loaded, ours, exact):
    assert loaded.param_groups[0]["state_dtype"] == ours
    copies = loaded.param_groups[0]["params"]
    fresh = PRM([p.detach().clone().requires_grad_() for p in copies], state_dtype=ours, signal_beta=0.98)
    train(fresh, fresh.param_groups[0]["params"], steps=1)
    for p, q, r in zip(*(x.param_groups[0]["params"] for x in (saved, loaded, fresh)), strict=True):
        assert {k: x.dtype for k, x in loaded.state[q].items()} == {k: x.dtype for k, x in fresh.state[r].items()}
        for key in MOMENTS:
            old, new = (read(moment_of(x, key), torch.float32) for x in (saved.state[p], loaded.state[q]))
            assert (old - new).abs().max() <= (0 if exact else 0.04) * old.abs().max()
    train(loaded, copies, steps=1)


def test_a_state_dtype_that_is_changed_holds_from_the_next_step_on():
    params = large_params()
    optimizer = PRM(params, reduction="per_tensor")
    train(optimizer, params, steps=2)
    for state_dtype, dtype in (("8bit", torch.uint8), ("bf16", torch.bfloat16), ("float32", torch.float32)):
        optimizer.param_groups[0]["state_dtype"] = state_dtype
        train(optimizer, params, steps=2)
        assert optimizer.state[params[0]]["exp_avg_sq"].dtype == dtype
        assert ("exp_avg_scale" in optimizer.state[params[0]]) is (state_dtype == "8bit")


@needs_torchao
@pytest.mark.parametrize("ours", ["float32", "8bit"])
def test_a_checkpoint_of_torchaos_8_bits_is_converted_with_a_warning(ours):
    """What earlier versions kept."""
    from torchao.optim.subclass_8bit import OptimState8bit

    params = [torch.randn(64, 128, requires_grad=True)]
    optimizer = PRM(params, reduction="per_tensor")
    train(optimizer, params, steps=2)
    saved, exact = optimizer.state_dict(), {}
    saved["param_groups"][0]["state_dtype"] = "8bit"
    for key in ("exp_avg", "exp_avg_sq"):
        exact[key] = saved["state"][0][key]
        saved["state"][0][key] = OptimState8bit.zeros((64, 128), key == "exp_avg")
        saved["state"][0][key].copy_(exact[key])
    loaded = PRM(params, reduction="per_tensor", state_dtype=ours)
    with pytest.warns(UserWarning, match="keeps in torchao's 8 bits are kept in " + ours.replace("8bit", "8 bits")):
        loaded.load_state_dict(saved)
    for key, value in exact.items():
        difference = read(moment_of(loaded.state[params[0]], key), torch.float32) - value
        assert difference.abs().max() < 0.07 * value.abs().max()
    train(loaded, params, steps=1)


def test_fsdp1_takes_float32_alone():
    for path, state_dtype in itertools.product(ShardingPath, ("float32", "bf16", "8bit")):
        if path is not ShardingPath.FSDP1 or state_dtype == "float32":
            path.check("per_tensor", state_dtype)
            continue
        with pytest.raises(ValueError, match=f"Invalid state_dtype='{state_dtype}'.*under FSDP1"):
            path.check("per_tensor", state_dtype)
