"""`state_dtype`: moments in bfloat16 and in 8 bits. The step is exact, and what is kept is rounded once."""

import importlib.util
import io
import itertools

import pytest
import torch

from prm_hf.optim import PRM
from prm_hf.optim.hyperparameters import ESTIMATORS, MASKS
from prm_hf.sharding import ShardingPath

from .optimizer_runs import MEASURED, SKIPS_STEPS, assert_close, make_params, random_gradient, schedule, train
from .reference_prm import ReferenceTensor


needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")
MOMENTS = ("exp_avg", "exp_avg_sq")
REDUCTIONS = ("per_param", "per_tensor")  # that 8 bits are for


@pytest.mark.parametrize("variant", [{}, {"amsgrad": True}, {"decoupled_weight_decay": False, "maximize": True}])
@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
def test_bf16_equals_a_reference_that_rounds_after_each_step(foreach, variant):
    """In float64, so that no rounding but that of `exp_avg` is seen."""
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
                    reference.m = torch.as_tensor(reference.m).to(torch.bfloat16).double().numpy()
            optimizer.step()
        for p, reference in zip(params, references, strict=True):
            assert optimizer.state[p]["exp_avg"].dtype == torch.bfloat16
            assert optimizer.state[p]["exp_avg_sq"].dtype == torch.float64
            assert_close(p, reference.w, 1e-12)


def large_params(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = [(128, 64), (3, 4096), (4099,), (7,)]  # the last two are not kept in 8 bits
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@needs_torchao
@pytest.mark.parametrize("variant", [{}, {"amsgrad": True}], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
def test_8bit_is_the_float32_step_from_what_is_kept(foreach, variant, monkeypatch):
    """Each step beside one of float32 on the values kept, whose results torchao itself then rounds to 8 bits."""
    from torchao.optim.subclass_8bit import OptimState8bit

    monkeypatch.setattr("prm_hf.optim.foreach.CPU_BLOCK", 1024)
    for reduction, estimator in itertools.product(REDUCTIONS, ESTIMATORS):
        settings = {"reduction": reduction, "estimator": estimator, "foreach": foreach, **variant}
        params = large_params()
        twins = [p.detach().clone().requires_grad_() for p in params]
        ours, theirs = PRM(params, state_dtype="8bit", **settings), PRM(twins, **settings)
        generator = torch.Generator().manual_seed(1)
        for _ in range(5):
            for p, twin in zip(params, twins, strict=True):
                p.grad = torch.randn(p.shape, generator=generator) * torch.logspace(-6, 0, p.numel()).view(p.shape)
                twin.grad = p.grad.clone()
                twin.data.copy_(p.data)
                for key, value in ours.state[p].items():
                    is_8bit = isinstance(value, OptimState8bit)
                    theirs.state[twin][key] = value.dequantize() if is_8bit else value.clone()
            ours.step(), theirs.step()
            for p, twin in zip(params, twins, strict=True):
                torch.testing.assert_close(p, twin, rtol=1e-5, atol=1e-7)
                for key in (*MOMENTS, *(["max_exp_avg_sq"] if variant else [])):
                    kept, exact = ours.state[p][key], theirs.state[twin][key]
                    assert isinstance(kept, OptimState8bit) is (p.dim() == 2)
                    if p.dim() == 2:
                        rounded = OptimState8bit.zeros(exact.shape, key == "exp_avg")
                        rounded.copy_(exact)
                        assert (kept.codes != rounded.codes).float().mean() < 1e-3  # ties, within float32's rounding
                        torch.testing.assert_close(kept.scale, rounded.scale, rtol=1e-5, atol=0)
        stats, expected = ours.get_mask_stats(), theirs.get_mask_stats()
        assert stats["parameter_count"] == expected["parameter_count"]
        assert stats["snr"] == pytest.approx(expected["snr"], rel=0.1)


@needs_torchao
def test_8bit_resumes_bit_for_bit_through_a_file():
    for reduction in REDUCTIONS:
        results = []
        for interrupted in (False, True):
            params = large_params(torch.bfloat16)
            optimizer = PRM(params, state_dtype="8bit", reduction=reduction)
            train(optimizer, params, steps=3)
            if interrupted:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = PRM(params, state_dtype="8bit", reduction=reduction)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            train(optimizer, params, steps=6, start=3)
            results.append(params)
        for p, q in zip(*results, strict=True):
            assert torch.equal(p, q)


def kept_bytes(tensor):
    names = tensor.__tensor_flatten__()[0] if hasattr(tensor, "__tensor_flatten__") else None
    return tensor.nbytes if names is None else sum(getattr(tensor, name).nbytes for name in names)


@pytest.mark.parametrize(
    "state_dtype, size", [("float32", 8), ("bf16", 6), pytest.param("8bit", 2, marks=needs_torchao)]
)
def test_memory_a_parameter(state_dtype, size):
    p = torch.zeros(1024, 1024, requires_grad=True)
    p.grad = torch.ones_like(p)
    optimizer = PRM([p], state_dtype=state_dtype, reduction="per_tensor")
    optimizer.step()
    kept = sum(kept_bytes(x) for x in optimizer.state[p].values())
    assert size <= kept / p.numel() < size + 0.05


@pytest.mark.parametrize("theirs", ["float32", "bf16", pytest.param("8bit", marks=needs_torchao)])
@pytest.mark.parametrize("ours", ["float32", "bf16", pytest.param("8bit", marks=needs_torchao)])
def test_a_checkpoint_of_another_state_dtype_is_converted(ours, theirs):
    params = large_params()
    saved = PRM(params, state_dtype=theirs, reduction="per_tensor")
    train(saved, params, steps=3)
    loaded = PRM([p.detach().clone().requires_grad_() for p in params], state_dtype=ours, reduction="per_tensor")
    loaded.load_state_dict(saved.state_dict())
    assert loaded.param_groups[0]["state_dtype"] == ours
    copies = loaded.param_groups[0]["params"]
    fresh = PRM(copies, state_dtype=ours, reduction="per_tensor")
    train(fresh, copies, steps=1)
    for p, q in zip(params, copies, strict=True):
        for key in (*MOMENTS, "grad_var"):
            old, new = saved.state[p][key], loaded.state[q][key]
            assert type(new) is type(fresh.state[q][key]) and new.dtype == fresh.state[q][key].dtype
            old, new = ((x.dequantize() if kept_bytes(x) != x.nbytes else x).float() for x in (old, new))
            assert (old - new).abs().max() <= (0 if ours == theirs else 2**-5) * old.abs().max()


def test_where_tensors_are_held_in_parts_it_is_refused():
    for path in ShardingPath:
        path.check("per_tensor", "float32")
        with pytest.raises(ValueError, match="Invalid state_dtype='8bit'.*under " + path.value.split()[0]):
            path.check("per_tensor", "8bit")
    ShardingPath.FSDP2.check("per_tensor", "bf16")
    with pytest.raises(ValueError, match="Invalid state_dtype='bf16'.*under DeepSpeed ZeRO-3"):
        ShardingPath.ZERO_3.check("per_tensor", "bf16")


def test_8bit_without_what_it_needs_is_refused(monkeypatch):
    p = torch.zeros(2, requires_grad=True)
    with pytest.raises(ValueError, match="Invalid state_dtype='8bit'.*fused=None"):
        PRM([p], state_dtype="8bit", reduction="per_tensor", fused=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="Invalid state_dtype='8bit'.*prm-hf.torchao"):
        PRM([p], state_dtype="8bit", reduction="per_tensor")
