"""The Triton kernel, interpreted on the CPU: the same numbers as the definition and as the float64 reference.

The kernel itself runs on the GPU (test_gpu.py); here its arithmetic, its tables and the order of its items are
tested, with chunks so small that every tensor has whole and partial ones.
"""

import copy
import dataclasses
import itertools
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch


fused = pytest.importorskip("prm_hf.optim.triton.launch", reason="needs triton")

from prm_hf.optim import PRM, masks, plan  # noqa: E402
from prm_hf.optim.foreach import ForeachStep, TensorLists  # noqa: E402
from prm_hf.optim.hyperparameters import ESTIMATORS, NAMES, REDUCTIONS, Hyperparameters  # noqa: E402
from prm_hf.optim.quantized import MOMENTS  # noqa: E402
from prm_hf.sharding import Layout, Segment, ShardingPath  # noqa: E402
from prm_hf.sharding.deepspeed import LifeCycle  # noqa: E402

from .optimizer_runs import COMBINATIONS, SIGNAL, VARIANTS, assert_close, make_params, train  # noqa: E402
from .reference_prm import ReferenceTensor  # noqa: E402


# The reduction, the estimator and the signal's own average
IN_PARTS = [*itertools.product(REDUCTIONS, ESTIMATORS, (None,)), ("per_row", "debiased", 0.98)]
pytestmark = pytest.mark.skipif(
    not fused.INTERPRETED, reason="on a machine with a GPU tests/test_gpu.py runs it there"
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    large = fused.Sizes(32, 4, 0, ((4, 4), (2, 8), (1, 8)), 4)
    monkeypatch.setattr(fused, "LARGE_SIZES", large)
    monkeypatch.setattr(fused, "SMALL_SIZES", dataclasses.replace(large, chunk=16, programs=1))
    monkeypatch.setattr(fused, "SMALL", 64)
    monkeypatch.setattr(fused, "LAG", 2)


# The interpreter takes about a millisecond an item, so only the variants that change the kernel's code or its scalars.
VARIANTS_HERE = ("amsgrad", "coupled_weight_decay", "maximize", "warmup", "alpha")


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS_HERE)
def test_equals_float64_reference(variant):
    for combination in COMBINATIONS:
        # The second variant changes the gradient alone, for which one mask is enough
        if "boundary" in combination or (variant == "coupled_weight_decay" and combination["mask"] != "snr"):
            continue
        settings = combination | {"weight_decay": 0.1} | VARIANTS[variant]
        params = make_params()
        references = [ReferenceTensor(p.detach().numpy()) for p in params]
        train(PRM(params, fused=True, **settings), params, steps=3, references=references, **settings)
        for p, reference in zip(params, references, strict=True):
            assert_close(p, reference.w, 1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_plan_is_used_and_follows_changes(reduction, monkeypatch):
    """Steps alike go through the plan; one that is not alike, or a changed setting, gives the right numbers too."""
    params, shadows = make_params()[:3], make_params()[:3]
    optimizers = [
        PRM([{"params": ps[:1], "weight_decay": 0.0}, {"params": ps[1:]}], reduction=reduction, fused=f)
        for ps, f in ((params, True), (shadows, False))
    ]
    planned = []
    original = plan.StepPlan.holds
    monkeypatch.setattr(plan.StepPlan, "holds", lambda *a: planned.append(original(*a)) or planned[-1])
    generator = torch.Generator().manual_seed(0)
    for t in range(12):
        for p, shadow in zip(params, shadows, strict=True):
            p.grad = torch.randn(p.shape, generator=generator)
            shadow.grad = p.grad.clone()
        if t == 5:
            params[1].grad = shadows[1].grad = None
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = 1e-2 / (t + 1)
            if t == 8:
                optimizer.load_state_dict(optimizer.state_dict())
            if t == 9:
                optimizer.param_groups[1]["amsgrad"] = False
                optimizer.param_groups[1]["softness"] = 0.5
            optimizer.step()
        for p, shadow in zip(params, shadows, strict=True):
            torch.testing.assert_close(p, shadow, rtol=1e-6, atol=1e-7)
            assert optimizers[0].state[p]["step"] == optimizers[1].state[shadow]["step"]
    # No gradient at 5, one again at 6; the state is loaded at 8
    assert planned[::2] == planned[1::2] == [True] * 4 + [False, False, True, True, True, True]


def replace_state(optimizer, params):
    for p in params:
        optimizer.state[p] |= {key: x.clone() for key, x in optimizer.state[p].items()}


def replace_one_moment(optimizer, params):
    optimizer.state[params[1]]["exp_avg"] = optimizer.state[params[1]]["exp_avg"].clone()


def replace_first_step(optimizer, params):
    optimizer.state[params[0]]["step"] = optimizer.state[params[0]]["step"] + 10


def replace_list_of_parameters(optimizer, params):
    optimizer.param_groups[1]["params"] = params[1:]


def remove_a_parameter(optimizer, params):
    optimizer.param_groups[1]["params"].pop()


def replace_weights(optimizer, params):
    params[1].data = params[1].data.clone()


def lose_a_gradient(optimizer, params):
    params[1].grad = None


def transpose_a_gradient(optimizer, params):
    params[0].grad = params[0].grad.t().contiguous().t()


def transpose_a_gradient_in_place(optimizer, params):
    grad = params[0].grad
    grad.set_(grad.untyped_storage(), 0, grad.shape, (1, len(grad)))  # the same tensor at the same address


def make_a_gradient_of_another_class(optimizer, params):
    params[0].grad = params[0].grad.as_subclass(type("Marked", (torch.Tensor,), {}))


def halve_a_gradient(optimizer, params):
    halves = params[0].grad.half()
    params[0].grad.data = halves if optimizer.param_groups[0]["fused"] else halves.float()


def add_a_group(optimizer, params):
    params.append(torch.ones(3, requires_grad=True))
    params[-1].grad = torch.tensor([1.0, -1.0, 0.5])
    optimizer.add_param_group({"params": params[-1:]})


def set_to(**settings):
    return lambda optimizer, params: optimizer.param_groups[1].update(settings)


def change_betas_in_place(optimizer, params):
    optimizer.param_groups[1]["betas"][0] = 0.5


def change_lr_in_place(optimizer, params):
    optimizer.param_groups[1]["lr"].fill_(0.02)


# Whether the plan can take the step after the change by itself.
CHANGES = {
    "state": (replace_state, False),
    "one_moment": (replace_one_moment, False),
    "first_step": (replace_first_step, False),
    "list_of_parameters": (replace_list_of_parameters, True),
    "one_parameter_less": (remove_a_parameter, False),
    "weights": (replace_weights, False),
    "no_gradient": (lose_a_gradient, False),
    "noncontiguous_gradient": (transpose_a_gradient, True),
    "noncontiguous_gradient_in_place": (transpose_a_gradient_in_place, True),
    "class_of_gradient": (make_a_gradient_of_another_class, True),
    "dtype_of_gradient": (halve_a_gradient, False),
    "new_group": (add_a_group, False),
    "lr": (set_to(lr=0.02), True),
    "lr_in_place": (change_lr_in_place, True),
    "betas": (set_to(betas=(0.5, 0.9)), True),
    "betas_in_place": (change_betas_in_place, True),
    "softness": (set_to(softness=3.0), True),
    "decoupled_weight_decay": (set_to(weight_decay=0.5), True),
    "alpha": (set_to(alpha=0.1), True),
    "mask_warmup_steps": (set_to(mask_warmup_steps=10), True),
    "estimator": (set_to(estimator="ema"), False),
    "maximize": (set_to(maximize=True), False),
    "coupled_weight_decay": (set_to(decoupled_weight_decay=False), False),
}


@pytest.mark.slow
@pytest.mark.parametrize("new_gradients", [True, False], ids=["new_gradients", "kept_gradients"])
@pytest.mark.parametrize("name", CHANGES)
def test_plan_sees_what_has_changed(name, new_gradients, monkeypatch):
    change, planned_then = CHANGES[name]
    taken, planned = [], []
    original = plan.StepPlan.holds
    monkeypatch.setattr(plan.StepPlan, "holds", lambda *a: taken.append(original(*a)) or taken[-1])
    results = []
    for f in (True, False):
        params = make_params()[:2]
        lr = torch.tensor(0.01) if name == "lr_in_place" else 0.01
        groups = [{"params": params[:1]}, {"params": params[1:], "betas": [0.9, 0.99], "lr": lr}]
        optimizer = PRM(groups, lr=0.01, weight_decay=0.1, reduction="per_tensor", fused=f)
        generator = torch.Generator().manual_seed(0)
        for p in params:
            p.grad = torch.zeros_like(p)
        for t in range(6):
            for p in params:
                g = torch.randn(p.shape, generator=generator)
                if new_gradients or p.grad is None or p.grad.dtype != g.dtype:
                    p.grad = None
                    p.grad = g
                else:
                    p.grad.copy_(g)
            if t == 3:
                change(optimizer, params)
            taken.clear()
            optimizer.step()
            planned.append(taken == [True])
        results.append(params + [optimizer.state[p][key] for p in params for key in ("step", "exp_avg", "grad_var")])
    assert planned[:4] == [False, True, True, planned_then]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"softness": -1.0}, "softness=-1.0"),
        ({"betas": [0.9, 1.0]}, r"betas\[1\]=1.0"),
    ],
    ids=["lr", "nan", "softness", "betas"],
)
def test_plan_refuses_what_is_invalid_until_it_is_valid(settings, message):
    params = make_params()[:2]
    optimizer = PRM(params, fused=True, reduction="per_tensor")
    train(optimizer, params, steps=2)
    (group,) = optimizer.param_groups
    before, weights = dict(group), [p.detach().clone() for p in params]
    group.update(settings)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            optimizer.step()
    assert all(map(torch.equal, params, weights))
    group.update(before)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in params] == [3.0, 3.0]


def test_plan_refuses_sparse_gradients():
    params = make_params()[:2]
    optimizer = PRM(params, fused=True, reduction="per_tensor")
    train(optimizer, params, steps=2)
    params[0].grad = params[0].grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        optimizer.step()


def test_plan_gives_way_when_the_kernel_is_switched_off():
    params = make_params()[:2]
    optimizer = PRM(params, fused=True, reduction="per_tensor")
    train(optimizer, params, steps=2)
    optimizer.param_groups[0]["fused"] = False
    train(optimizer, params, steps=2)
    assert {type(x).__name__ for p in optimizer._plans.values() for x in p._lists} == {"ReferenceList"}


def test_plan_knows_every_setting_and_holds_no_gradient():
    params = make_params()[:2]
    optimizer = PRM(params, fused=True, reduction="per_tensor")
    assert set(NAMES) == set(optimizer.defaults)
    train(optimizer, params, steps=3)
    assert optimizer._plans
    gradient = weakref.ref(params[0].grad)
    optimizer.zero_grad()
    assert gradient() is None


def test_no_mask_is_adamw():
    ours, theirs = make_params(), make_params()
    train(PRM(ours, mask="none", fused=True), ours, steps=20)
    train(torch.optim.AdamW(theirs), theirs, steps=20)
    for p, q in zip(ours, theirs, strict=True):
        assert_close(p, q.detach().double().numpy(), 1e-7)


@pytest.mark.slow
def test_low_precision_parameters_and_gradients():
    dtype = torch.float16  # the interpreter cuts bfloat16 off instead of rounding it
    for reduction in REDUCTIONS:
        ours, theirs = make_params(dtype), make_params(dtype)
        train(PRM(ours, reduction=reduction, fused=True), ours, steps=5)
        train(PRM(theirs, reduction=reduction, foreach=True), theirs, steps=5)
        for p, q in zip(ours, theirs, strict=True):
            assert_close(p, q.detach().double().numpy(), torch.finfo(dtype).eps)


@pytest.mark.parametrize("settings", [*({"reduction": r} for r in REDUCTIONS), SIGNAL], ids=[*REDUCTIONS, "signal"])
def test_moments_in_bfloat16(settings):
    ours, theirs = make_params(), make_params()
    optimizers = [
        PRM(ours, **settings, state_dtype="bf16", fused=True),
        PRM(theirs, **settings, state_dtype="bf16", foreach=True),
    ]
    for t in range(3):
        if t:  # the interpreter cuts bfloat16 off instead of rounding it: each step from the same state
            for p, q in zip(ours, theirs, strict=True):
                p.data.copy_(q)
                for key, value in optimizers[1].state[q].items():
                    optimizers[0].state[p][key].copy_(value)
        for optimizer, params in zip(optimizers, (ours, theirs), strict=True):
            train(optimizer, params, steps=t + 1, start=t)
        for p, q in zip(ours, theirs, strict=True):
            assert_close(p, q.detach().double().numpy(), 1e-6)
            state, expected = optimizers[0].state[p], optimizers[1].state[q]
            assert {x.dtype for key, x in state.items() if key in MOMENTS} == {torch.bfloat16}
            assert torch.equal(state["exp_avg_sq"], expected["exp_avg_sq"])  # rounded stochastically
            torch.testing.assert_close(state["exp_avg"], expected["exp_avg"], rtol=2**-7, atol=0)


def test_misaligned_views_and_noncontiguous_gradients():
    storage = torch.randn(101)
    ours = [storage[1:34].clone()[1:].requires_grad_(), torch.randn(6, 4).requires_grad_()]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    optimizers = [PRM(ours, fused=True, reduction="per_tensor"), PRM(theirs, foreach=True, reduction="per_tensor")]
    for _ in range(4):
        for p, q in zip(ours, theirs, strict=True):
            g = torch.randn(p.shape[::-1]).t() if p.dim() == 2 else torch.randn(p.shape)
            p.grad, q.grad = g, g.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_capturable(reduction):
    results = []
    for f in (True, False):
        params = make_params()
        settings = {"reduction": reduction, "estimator": "debiased", "mask_warmup_steps": 2, "capturable": True}
        train(PRM(params, fused=f, **settings), params, steps=6)
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert_close(p, q.detach().double().numpy(), 1e-6)


def test_groups_of_two_dtypes_keep_their_own_scalars_with_capturable():
    """A list has tensors of one dtype from both groups, and so not all of the first group's."""
    results = []
    for f in (True, False):
        dtypes = (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 6).to(dtype)) for dtype in dtypes]
        groups = [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "lr": 0.01}]
        train(PRM(groups, mask="none", fused=f, capturable=True), params, steps=3)
        results.append(params[3])
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("unscaled_before", [False, True], ids=["scaled", "unscaled_for_clipping"])
def test_grad_scaler_leaves_unscaling_and_skipping_to_the_kernel(reduction, unscaled_before):
    """The step equals that of an optimizer for which GradScaler does both, also after an overflow."""
    results = []
    for fused_flag in (True, False):
        params = make_params()[:2]
        optimizer = PRM(params, reduction=reduction, fused=fused_flag, capturable=True)
        assert optimizer._step_supports_amp_scaling is fused_flag
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        generator = torch.Generator().manual_seed(0)
        for t in range(6):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator) * scaler.get_scale()
            scaler.scale(torch.zeros(()))
            if t == 3:
                params[0].grad[2, 1] = float("inf")
            if unscaled_before:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0, error_if_nonfinite=False)
            before = [p.detach().clone() for p in params]
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(before[0], params[0]) is (t == 3)
        assert [optimizer.state[p]["step"].item() for p in params] == [5.0] * 2
        results.append(params + [optimizer.state[p]["grad_var"] for p in params])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


def halves_of(lists, h, age):
    """The kernel's tables of lists without `grad_vars`, and a function that runs one of their halves."""
    settings = SimpleNamespace(h=h, lr=h.lr, eps=h.eps)
    tables = fused.KernelTables(lists, fused.code_of(h))
    scalars = np.array([fused.scalar_row(masks.step_scalars(age, h), settings)])
    rows = np.zeros(len(lists.params), dtype=np.int32)
    addresses = [g.data_ptr() for g in lists.grads]
    return tables, lambda phase: tables.run(addresses, torch.float32, scalars, rows, phase=phase)


def test_halves_write_all_that_is_read():
    """The sums and the update by themselves, as under FSDP and DeepSpeed, with poisoned buffers between them."""
    shapes, age = [(7, 5), (8,), (1,), (40,)], 3.0
    h = Hyperparameters(reduction="per_tensor")
    copies = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        params, grads, exp_avgs = ([torch.randn(s, generator=generator) for s in shapes] for _ in range(3))
        exp_avg_sqs = [torch.rand(s, generator=generator) for s in shapes]
        copies.append(TensorLists(params, grads, exp_avgs, exp_avg_sqs, [], [], []))
    ours, theirs = copies
    tables, run = halves_of(ours, h, age)
    for buffer in (tables._partials, tables.sums, tables.q):
        buffer.fill_(float("nan"))
    run(phase=1)
    step = ForeachStep(theirs, h, halves=True, one_by_one=False)
    c = masks.StepScalars(*([x] * len(shapes) for x in masks.step_scalars(age, h)))
    torch.testing.assert_close(tables.sums, step.sums(c), rtol=1e-6, atol=0)
    q = torch.linspace(0.1, 1, len(shapes), dtype=torch.float64)
    tables.q.copy_(q)
    run(phase=2)
    step.update(c, h.lr, h.eps, q)
    for name in ("params", "exp_avgs", "exp_avg_sqs"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("reduction", "estimator", "signal_beta"), IN_PARTS)
def test_flat_partition_by_its_segments(reduction, estimator, signal_beta):
    """As under DeepSpeed ZeRO: all tensors end to end in one buffer, at odd addresses, and padding behind them.

    Each is in two parts, cut within a row, as it is where another process begins.
    """
    settings = {"reduction": reduction, "estimator": estimator, "signal_beta": signal_beta, "weight_decay": 0.1}
    whole = make_params()
    theirs = PRM(whole, foreach=True, **settings)
    originals = make_params()
    ours = PRM(originals, fused=True, **settings)
    padding = torch.full((3,), 7.0)
    flat = torch.cat([p.detach().flatten() for p in originals] + [padding]).requires_grad_()
    numels = [p.numel() for p in originals]
    starts = [sum(numels[:i]) for i in range(len(numels))]
    rows = [masks.n_rows(p) for p in originals]
    layout = Layout(path=ShardingPath.ZERO_12, flat=True, numels=numels, rows=rows, process_groups=[()] * len(numels))
    segments = []
    for i, (start, n) in enumerate(zip(starts, numels, strict=True)):
        cut = n // 3
        parts = [Segment(i, start, cut, 0), Segment(i, start + cut, n - cut, cut)]
        segments += [segment for segment in parts if segment.length]
    layout.add(flat, segments, list(range(len(numels))))
    ours._locator.layout, ours._locator._known = layout, {id(flat): flat}
    ours.param_groups[0]["params"] = [flat]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for p in whole:
            p.grad = torch.randn(p.shape, generator=generator)
        flat.grad = torch.cat([p.grad.flatten() for p in whole] + [torch.zeros(3)])
        ours.step()
        theirs.step()
    for p, start, n in zip(whole, starts, numels, strict=True):
        torch.testing.assert_close(flat[start : start + n], p.flatten(), rtol=1e-6, atol=1e-7)
    if reduction != "per_param":
        assert torch.equal(flat[-3:], padding)
        variances = torch.cat([theirs.state[p]["grad_var"].view(-1) for p in whole])
        (group,) = ours.state_dict()["param_groups"]
        torch.testing.assert_close(group[LifeCycle.VARIANCES[reduction]], variances, rtol=1e-6, atol=0)
    assert len(ours._kernel_tables) == 1  # by the kernel


def test_sums_do_not_depend_on_where_a_small_tensor_is_cut(monkeypatch):
    monkeypatch.setattr(fused, "LARGE_SIZES", dataclasses.replace(fused.LARGE_SIZES, chunk=1024))
    torch.manual_seed(0)
    gradient, m = torch.randn(896), torch.randn(896)
    h = Hyperparameters(reduction="per_tensor")

    def sums(*sizes: int) -> torch.Tensor:
        zeros = ([torch.zeros(n) for n in sizes] for _ in range(2))
        params, exp_avg_sqs = zeros
        moments = [x.clone() for x in m.split(sizes)]
        tables, run = halves_of(TensorLists(params, gradient.split(sizes), moments, exp_avg_sqs, [], [], []), h, 1.0)
        run(phase=1)
        return tables.sums.sum(0)

    torch.testing.assert_close(sums(447, 449), sums(896), rtol=1e-14, atol=0)


@pytest.mark.parametrize(("reduction", "estimator", "signal_beta"), IN_PARTS)
def test_shards_of_fsdp2(reduction, estimator, signal_beta, tmp_path):
    """On one process, whose shards are the whole: but DTensors, and halves with an all-reduce between them."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        plain = torch.nn.Sequential(torch.nn.Linear(5, 9), torch.nn.Linear(9, 3))
        sharded = copy.deepcopy(plain)
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        settings = {"reduction": reduction, "estimator": estimator, "signal_beta": signal_beta}
        optimizers = [PRM(m.parameters(), fused=f, **settings) for m, f in ((plain, False), (sharded, True))]
        for _ in range(3):
            x = torch.randn(4, 5)
            for model, optimizer in zip((plain, sharded), optimizers, strict=True):
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()
        assert optimizers[1]._locator.layout.path is ShardingPath.FSDP2
        for p, q in zip(plain.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(q.full_tensor(), p, rtol=1e-5, atol=1e-6)
    finally:
        torch.distributed.destroy_process_group()


def test_schedule_never_waits_for_what_comes_later():
    for counts, lag in itertools.product(([1], [3, 1, 5], [2] * 7, [0, 4, 0]), (0, 1, 4, 100)):
        first = torch.tensor([0, *counts]).cumsum(0).numpy().astype("int32")
        tensors = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).numpy().astype("int32")
        fused_lag, fused.LAG = fused.LAG, lag
        try:
            items = fused._schedule(first, tensors).tolist()
        finally:
            fused.LAG = fused_lag
        assert sorted(items) == list(range(2 * sum(counts)))
        position = {item: i for i, item in enumerate(items)}
        for tensor in range(len(counts)):
            chunks = range(first[tensor], first[tensor + 1])
            for update, statistics in itertools.product(chunks, chunks):
                assert position[2 * update + 1] > position[2 * statistics]


def test_what_the_kernel_cannot_take_is_named():
    p = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    p.grad = torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match="Invalid fused=True: .* torch.float64 ones on cpu"):
        PRM([p], fused=True).step()
    p = torch.zeros(4, 3).t().requires_grad_()
    p.grad = torch.ones(3, 4)
    with pytest.raises(ValueError, match="contiguous"):
        PRM([p], fused=True).step()


@pytest.mark.slow
def test_the_kernels_compile_for_a_gpu(tmp_path):
    """What the interpreter takes and the compiler refuses, on a machine without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.optim.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = done.stdout.splitlines()
    assert sum("uint8" in line for line in compiled) >= 6 and len(compiled) >= 20
