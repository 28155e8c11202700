"""The properties that torch's own tests ask of every optimizer (`test/test_optim.py`), of PRM beside AdamW.

PRM is registered as torch's are, by an `OptimizerInfo`, in its variants; AdamW is the control, which shows that a
property is one that torch's optimizers have.
"""

import copy
import functools
import io
import itertools
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import LinearLR, ReduceLROnPlateau, StepLR
from torch.optim.swa_utils import AveragedModel

from prm_hf.optim import PRM
from prm_hf.sharding import is_fake


pytest.importorskip("expecttest", reason="torch's own tests import it: pip install expecttest")
common = pytest.importorskip(
    "torch.testing._internal.common_optimizers", reason="this build of torch has no tables of its optimizers' tests"
)

MEASURED = {
    "per_param-ema": {"reduction": "per_param", "estimator": "ema"},
    "per_param-debiased": {"reduction": "per_param"},
    "per_tensor-ema": {"reduction": "per_tensor", "estimator": "ema"},
    "per_tensor-debiased": {"reduction": "per_tensor"},
    "per_row-ema": {"estimator": "ema"},
    "per_row-debiased": {},
    "per_row-signal": {"signal_beta": 0.98},
}
VARIANTS = {
    f"{name}-{implementation}": {**measured, "foreach": foreach}
    for (name, measured), (implementation, foreach) in itertools.product(
        MEASURED.items(), {"reference": False, "foreach": True}.items()
    )
}
VARIANTS |= {
    "soft": {"mask": "soft"},
    "hard": {"mask": "hard"},
    "none": {"mask": "none"},
    "coupled": {"decoupled_weight_decay": False},
    "warmup": {"mask_warmup_steps": 3},
    "relative_eps": {"relative_eps": 1.0},
    "bf16_state": {"state_dtype": "bf16"},
}


SCHEDULERS = (
    [lambda optimizer: StepLR(optimizer, 3, 0.9)],
    [lambda optimizer: LinearLR(optimizer), lambda optimizer: ReduceLROnPlateau(optimizer, patience=0)],
)


def inputs(device, dtype=None):
    """What torch's tests vary of AdamW, and what PRM has alone."""
    own = [("no bias correction", {"bias_correction": False}), ("wide", {"mask_min_elements": 0})]
    return [*common.optim_inputs_func_adamw(device, dtype), *(common.OptimizerInput(None, k, d) for d, k in own)]


def info_of(settings: dict) -> "common.OptimizerInfo":
    """PRM in one variant, as torch lists its optimizers."""
    return common.OptimizerInfo(
        functools.partial(PRM, **settings),
        optim_inputs_func=inputs,
        scheduler_inputs=SCHEDULERS,
        supported_impls=("foreach", "differentiable"),
        has_capturable_arg=True,
        supports_complex=False,
    )


INFOS = {name: info_of(settings) for name, settings in VARIANTS.items()}
INFOS["adamw"] = next(info for info in common.optim_db if info.optim_cls is torch.optim.AdamW)
# The others are among the slow tests: they say little that these do not.
QUICK = {"adamw", "per_param-debiased-foreach", "per_tensor-debiased-foreach", "per_row-signal-foreach", "soft"}
QUICK |= {"per_row-debiased-reference", "per_row-debiased-foreach", "per_tensor-ema-reference"}
every_optimizer = pytest.mark.parametrize(
    "info",
    [pytest.param(info, id=name, marks=[] if name in QUICK else pytest.mark.slow) for name, info in INFOS.items()],
)
every_input = pytest.mark.parametrize("number", range(5))


def input_of(info, number: int) -> dict:
    return dict(info.optim_inputs_func("cpu")[number].kwargs)


def make_model(dtype=torch.float32) -> nn.Module:
    """A matrix of more elements than tensors without a mask have, a vector and a number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 1, dtype=dtype))


def gradients(model: nn.Module, t: int = 0) -> None:
    generator = torch.Generator().manual_seed(t)
    for p in model.parameters():
        p.grad = (torch.randn(p.shape, generator=generator, dtype=torch.float32) + 0.5).to(p.dtype)


def train(optimizer, model, steps=4, start=0) -> list[torch.Tensor]:
    for t in range(start, start + steps):
        gradients(model, t)
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def clone_state(state_dict):
    return copy.deepcopy(state_dict)


def assert_same_state(one, other):
    flat_one, spec_one = torch.utils._pytree.tree_flatten(one)
    flat_other, spec_other = torch.utils._pytree.tree_flatten(other)
    assert spec_one == spec_other
    for x, y in zip(flat_one, flat_other, strict=True):
        assert torch.equal(x, y) if torch.is_tensor(x) else x == y


# ---- Steps ----


@every_input
@every_optimizer
def test_it_goes_in_the_right_direction(info, number):
    kwargs = {"lr": 1e-2, **input_of(info, number)}
    model, x = make_model(), torch.linspace(-1, 1, 24).view(4, 6)
    optimizer = info.optim_cls(model.parameters(), **kwargs)

    def closure():
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] > losses[0] if kwargs.get("maximize") else losses[-1] < losses[0]


@pytest.mark.parametrize("makers", SCHEDULERS, ids=["one", "two"])
@every_optimizer
def test_learning_rate_schedulers(info, makers):
    model = make_model()
    optimizer = info.optim_cls(model.parameters(), lr=1e-2)
    schedulers = [make(optimizer) for make in makers]
    for t in range(4):
        train(optimizer, model, 1, t)
        for scheduler in schedulers:
            scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    assert 0 < optimizer.param_groups[0]["lr"] < 1e-2
    assert all(p.isfinite().all() for p in model.parameters())


@every_input
@every_optimizer
def test_multi_tensor_matches_one_by_one(info, number):
    kwargs, results = input_of(info, number), []
    for foreach in (False, True):
        model = make_model(torch.float64)
        results.append(train(info.optim_cls(model.parameters(), **{**kwargs, "foreach": foreach}), model))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@every_optimizer
def test_tensor_learning_rate(info):
    results = []
    for lr in (1e-2, torch.tensor(1e-2), torch.tensor([1e-2])):
        model = make_model()
        results.append(train(info.optim_cls(model.parameters(), lr=lr, foreach=False), model))
    for other in results[1:]:
        for p, q in zip(results[0], other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@every_optimizer
def test_tensor_betas_and_weight_decay(info):
    kwargs = {"betas": (0.5, 0.75), "weight_decay": 0.5}
    tensors = {"betas": (torch.tensor(0.5), torch.tensor([0.75])), "weight_decay": torch.tensor(0.5)}
    results = []
    for settings in (kwargs, tensors):
        model = make_model()
        results.append(train(info.optim_cls(model.parameters(), **settings, foreach=False), model))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@every_optimizer
def test_parameters_without_a_gradient_stay(info):
    model = make_model()
    optimizer = info.optim_cls(model.parameters(), weight_decay=0.5)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(optimizer.state.values())


@every_optimizer
def test_zero_gradients_do_nothing(info):
    model = make_model()
    optimizer = info.optim_cls(model.parameters(), weight_decay=0.0)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@every_optimizer
def test_empty_tensors_and_groups(info):
    empty, full = nn.Parameter(torch.empty(0)), nn.Parameter(torch.ones(4, 9))
    optimizer = info.optim_cls([{"params": [empty]}, {"params": []}, {"params": [full], "lr": 0.5}])
    for _ in range(3):
        empty.grad, full.grad = torch.empty(0), torch.ones(4, 9)
        optimizer.step()
    assert not torch.equal(full, torch.ones(4, 9))
    optimizer.load_state_dict(clone_state(optimizer.state_dict()))
    optimizer.step()


@every_optimizer
def test_mixed_dtypes(info):
    params = [torch.ones(4, 9, dtype=d, requires_grad=True) for d in (torch.float32, torch.bfloat16, torch.float64)]
    optimizer = info.optim_cls(params, lr=0.1)
    for t in range(3):
        for p in params:
            p.grad = torch.full_like(p, 1.0 + t)
        optimizer.step()
    for p in params:
        assert p.dtype == p.grad.dtype and p.isfinite().all() and (p < 1).any()


@every_optimizer
def test_default_dtype_changes_nothing(info):
    results = []
    for dtype in (torch.float32, torch.float64):
        model = make_model()
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            results.append(train(info.optim_cls(model.parameters()), model))
        finally:
            torch.set_default_dtype(before)
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@every_optimizer
def test_sparse_gradients_are_a_runtime_error(info):
    embedding = nn.Embedding(6, 7, sparse=True)
    optimizer = info.optim_cls(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


@every_optimizer
def test_noncontiguous_parameters_and_gradients(info):
    results = []
    for transposed in (False, True):
        value = torch.linspace(-1, 1, 40).view(5, 8)
        p = nn.Parameter(value.t().contiguous().t() if transposed else value.clone())
        optimizer = info.optim_cls([p], lr=0.1)
        for t in range(3):
            p.grad = torch.linspace(0, 1 + t, 40).view(5, 8)
            optimizer.step()
        results.append(p.detach().contiguous())
    torch.testing.assert_close(*results)


@every_optimizer
def test_fake_tensors(info):
    """In `FakeTensorMode` tools estimate what a training step needs."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        model = make_model()
        optimizer = info.optim_cls(model.parameters())
        for _ in range(3):
            model(torch.randn(2, 6)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(is_fake(p) for p in model.parameters())
        assert all(is_fake(state["exp_avg"]) for state in optimizer.state.values())


@every_optimizer
def test_parameters_without_storage(info):
    model = make_model().to("meta")
    optimizer = info.optim_cls(model.parameters())
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert all(state["exp_avg"].is_meta for state in optimizer.state.values())


# ---- Groups, hooks, printing ----


@every_optimizer
def test_groups_and_what_is_added(info):
    model = make_model()
    first, *others = model.parameters()
    optimizer = info.optim_cls([{"params": [first], "lr": 1e-2}], lr=1e-3)
    optimizer.add_param_group({"params": others, "weight_decay": 0.0})
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 1e-3]
    before = [p.detach().clone() for p in model.parameters()]
    train(optimizer, model)
    assert not any(map(torch.equal, before, model.parameters()))
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [first]})


@every_optimizer
def test_hooks_of_a_step(info):
    model, calls = make_model(), []
    optimizer = info.optim_cls(model.parameters())
    before = optimizer.register_step_pre_hook(lambda o, args, kwargs: calls.append("before"))
    after = optimizer.register_step_post_hook(lambda o, args, kwargs: calls.append("after"))
    train(optimizer, model, 1)
    before.remove()
    train(optimizer, model, 1)
    after.remove()
    train(optimizer, model, 1)
    assert calls == ["before", "after", "after"]


@every_optimizer
def test_hooks_of_state_dicts(info):
    model, calls = make_model(), []
    optimizer = info.optim_cls(model.parameters(), lr=0.5)
    train(optimizer, model, 1)
    optimizer.register_state_dict_pre_hook(lambda o: calls.append("saving"))
    optimizer.register_state_dict_post_hook(lambda o, s: {**s, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, s: {**s, "param_groups": change_lr(s["param_groups"], 0.25)})
    optimizer.register_load_state_dict_post_hook(lambda o: calls.append(o.param_groups[0]["lr"]))
    saved = optimizer.state_dict()
    assert saved.pop("extra") == 1
    optimizer.load_state_dict(saved)
    assert calls == ["saving", 0.25] and optimizer.param_groups[0]["lr"] == 0.25


def change_lr(groups, lr):
    return [{**group, "lr": lr} for group in groups]


@every_optimizer
def test_printing(info):
    text = repr(info.optim_cls(make_model().parameters(), lr=0.125))
    assert "lr: 0.125" in text and "Parameter Group 0" in text


# ---- Copies and checkpoints ----


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@every_optimizer
def test_a_copy_of_optimizer_and_model_goes_on_alike(info, copied):
    model = make_model()
    optimizer = info.optim_cls(model.parameters())
    train(optimizer, model)
    other = copied(optimizer)
    public = {name for name in vars(optimizer) if not name.startswith("_")}
    assert {name for name in vars(other) if not name.startswith("_")} == public
    params = [p for group in other.param_groups for p in group["params"]]
    for t in range(4, 7):
        gradients(model, t)
        for p, q in zip(params, model.parameters(), strict=True):
            p.grad = q.grad.clone()
        optimizer.step()
        other.step()
    assert all(map(torch.equal, params, model.parameters()))


@every_input
@every_optimizer
def test_a_loaded_checkpoint_goes_on_alike(info, number):
    """With `weights_only`; the state dict that is loaded is left alone."""
    kwargs = input_of(info, number)
    model = make_model()
    optimizer = info.optim_cls(model.parameters(), **kwargs)
    train(optimizer, model)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert_same_state(loaded, optimizer.state_dict())
    resumed = copy.deepcopy(model)
    again = info.optim_cls(resumed.parameters(), **kwargs)
    untouched = clone_state(loaded)
    again.load_state_dict(loaded)
    assert_same_state(loaded, untouched)
    whole, after = train(optimizer, model, 3, 4), train(again, resumed, 3, 4)
    assert all(map(torch.equal, whole, after))
    assert_same_state(optimizer.state_dict(), again.state_dict())


@every_optimizer
def test_a_state_dict_shares_the_tensors(info):
    model = make_model()
    optimizer = info.optim_cls(model.parameters())
    train(optimizer, model)
    saved = optimizer.state_dict()
    for number, p in enumerate(model.parameters()):
        for name, value in optimizer.state[p].items():
            assert saved["state"][number][name] is value


@pytest.mark.parametrize("flag", ["foreach", "differentiable", "maximize", "capturable"])
@every_optimizer
def test_checkpoints_from_before_a_flag(info, flag):
    model = make_model()
    optimizer = info.optim_cls(model.parameters())
    train(optimizer, model)
    saved = clone_state(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group[flag]
    optimizer.load_state_dict(saved)
    assert flag in optimizer.param_groups[0]
    train(optimizer, model)


@every_optimizer
def test_steps_that_are_numbers(info):
    model = make_model()
    optimizer = info.optim_cls(model.parameters())
    train(optimizer, model)
    saved = clone_state(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    other = copy.deepcopy(model)
    resumed = info.optim_cls(other.parameters())
    resumed.load_state_dict(saved)
    assert all(map(torch.equal, train(optimizer, model, 2, 4), train(resumed, other, 2, 4)))


@pytest.mark.skipif(
    not hasattr(torch.optim.Optimizer, "_process_value_according_to_param_policy"), reason="an older torch"
)
@pytest.mark.parametrize("named", [False, True], ids=["to_named", "from_named"])
@every_optimizer
def test_named_parameters(info, named):
    model = make_model()
    ways = [lambda m: m.parameters(), lambda m: m.named_parameters()]
    optimizer = info.optim_cls(ways[named](model))
    train(optimizer, model)
    other = copy.deepcopy(model)
    resumed = info.optim_cls(ways[not named](other))
    resumed.load_state_dict(clone_state(optimizer.state_dict()))
    assert all(map(torch.equal, train(optimizer, model, 2, 4), train(resumed, other, 2, 4)))


@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@every_optimizer
def test_distributed_checkpoints_by_name(info, flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model = make_model()
    optimizer = info.optim_cls(model.parameters())
    train(optimizer, model)
    saved = clone_state(get_optimizer_state_dict(model, optimizer, options=options))
    other = copy.deepcopy(model)
    resumed = info.optim_cls(other.parameters(), lr=0.5)
    set_optimizer_state_dict(other, resumed, saved, options=options)
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert all(map(torch.equal, train(optimizer, model, 2, 4), train(resumed, other, 2, 4)))


# ---- Beside other parts of torch and accelerate ----


@every_optimizer
def test_weight_averaging(info):
    model = make_model()
    optimizer = info.optim_cls(model.parameters(), lr=0.1)
    averaged = AveragedModel(model)
    seen = []
    for t in range(3):
        seen.append(train(optimizer, model, 1, t))
        averaged.update_parameters(model)
    for p, *values in zip(averaged.module.parameters(), *seen, strict=True):
        torch.testing.assert_close(p.detach(), torch.stack(values).mean(0))


@pytest.mark.parametrize("name", ["per_param-ema-reference", "per_row-debiased-foreach", "adamw"])
def test_a_compiled_training_step(name):
    """The step is not traced, and takes place once in each call of the compiled function."""
    info = INFOS[name]
    model, results = make_model(), []
    for compiled in (False, True):
        own = copy.deepcopy(model)
        optimizer = info.optim_cls(own.parameters(), lr=0.1)

        def training_step(x, own=own, optimizer=optimizer):
            own(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        torch._dynamo.reset()
        call = torch.compile(training_step, backend="eager") if compiled else training_step
        for t in range(3):
            call(torch.linspace(-1, 1 + t, 12).view(2, 6))
        results.append([p.detach() for p in own.parameters()])
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q)


@every_optimizer
def test_accelerate(info, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    results = []
    for prepared in (False, True):
        model = make_model()
        optimizer = info.optim_cls(model.parameters(), lr=0.1)
        if prepared:
            accelerator = accelerate.Accelerator(cpu=True)
            model, optimizer = accelerator.prepare(model, optimizer)
        train(optimizer, model)
        if prepared:
            accelerator.save_state(str(tmp_path))
            train(optimizer, model, 2, 7)
            accelerator.load_state(str(tmp_path))
        results.append(train(optimizer, model, 2, 4))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("name", [name for name in INFOS if name != "bf16_state"])
def test_gradients_run_through_the_step(name):
    start = torch.linspace(-1, 1, 40, dtype=torch.float64).view(4, 10).requires_grad_()

    def after(start, *grads):
        p = start.clone()
        optimizer = INFOS[name].optim_cls([p], lr=0.1, differentiable=True, foreach=False)
        for g in grads:
            p.grad = g
            optimizer.step()
        return p.sum()

    grads = [torch.linspace(0.1, 1 + t, 40, dtype=torch.float64).view(4, 10).requires_grad_() for t in range(3)]
    found = torch.autograd.grad(after(start, *grads), [start, *grads])
    assert all(g.isfinite().all() for g in found)
    direction = torch.linspace(-1, 1, 40, dtype=torch.float64).view(4, 10)
    step = 1e-6
    ends = [after(start, *grads[:2], grads[2] + sign * step * direction) for sign in (1, -1)]
    expected = (ends[0] - ends[1]) / (2 * step)
    torch.testing.assert_close((found[3] * direction).sum(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS)
def test_capturable_on_a_cpu_is_the_same_step(settings):
    """(torch's AdamW refuses it there.)"""
    results = []
    for capturable in (False, True):
        model = make_model(torch.float64)
        results.append(train(PRM(model.parameters(), capturable=capturable, **settings), model))
    for p, q in zip(*results, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
