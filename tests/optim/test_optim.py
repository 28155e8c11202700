"""The optimizer's step against an independent float64 reference, torch's AdamW, and the statistics it claims to
estimate."""

import itertools

import numpy as np
import pytest
import torch

from prm_hf.optim import PRM, masks, prm
from prm_hf.optim import foreach as multi_tensor
from prm_hf.optim.hyperparameters import ESTIMATORS, MASKS, REDUCTIONS
from prm_hf.optim.reductions import sums_of_squares

from .optimizer_runs import (
    COMBINATIONS,
    MEASURED,
    SIGNAL,
    VARIANTS,
    assert_close,
    last_masks,
    make_params,
    name_of,
    random_gradient,
    schedule,
    train,
)
from .reference_prm import ReferenceTensor


@pytest.mark.parametrize("foreach", [False, True], ids=["reference", "foreach"])
@pytest.mark.parametrize(
    ("variant", "combination"),
    [(v, c) for v in VARIANTS for c in COMBINATIONS if v == "plain" or "boundary" not in c],
    ids=lambda x: x if isinstance(x, str) else name_of(x),
)
def test_equals_float64_reference(variant, combination, foreach):
    settings = combination | {"weight_decay": 0.1} | VARIANTS[variant]
    params = make_params()
    references = [ReferenceTensor(p.detach().numpy()) for p in params]
    optimizer = PRM(params, foreach=foreach, **settings)
    train(optimizer, params, steps=25, references=references, **settings)
    for p, reference in zip(params, references, strict=True):
        assert_close(p, reference.w, 1e-6)


@pytest.mark.parametrize("foreach", [False, True], ids=["reference", "foreach"])
@pytest.mark.parametrize("settings", COMBINATIONS, ids=name_of)
def test_float64_parameters_equal_reference_to_rounding(settings, foreach):
    params = make_params(torch.float64)
    references = [ReferenceTensor(p.detach().numpy()) for p in params]
    train(PRM(params, foreach=foreach, **settings), params, references=references, **settings)
    for p, reference in zip(params, references, strict=True):
        assert_close(p, reference.w, 1e-12)


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.0}],
    ids=lambda s: next(iter(s), "plain"),
)
def test_no_mask_is_adamw_bit_for_bit(settings, foreach):
    ours, theirs = make_params(), make_params()
    train(PRM(ours, mask="none", foreach=foreach, **settings), ours)
    train(torch.optim.AdamW(theirs, foreach=foreach, **settings), theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=name_of)
def test_blocks_of_tensors_change_nothing(combination, monkeypatch):
    """On a CPU the multi-tensor implementation takes large tensors apart, so that temporaries stay in the cache."""
    monkeypatch.setattr(multi_tensor, "CPU_BLOCK", 8)
    settings = combination | {"amsgrad": True}
    params = make_params()
    params[-1].data = params[-1].data.transpose(0, 2).contiguous().transpose(0, 2)  # cannot be taken apart
    references = [ReferenceTensor(p.detach().numpy()) for p in params]
    train(PRM(params, foreach=True, **settings), params, steps=20, references=references, **settings)
    for p, reference in zip(params, references, strict=True):
        assert_close(p, reference.w, 1e-6)


def test_coupled_weight_decay_without_mask_is_adam():
    ours, theirs = make_params(), make_params()
    train(PRM(ours, mask="none", weight_decay=0.1, decoupled_weight_decay=False), ours)
    train(torch.optim.Adam(theirs, weight_decay=0.1), theirs)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(p, q)


def test_groups_keep_their_own_settings():
    """A router or a norm can be left at mask="none" beside masked groups; each group follows its own reference."""
    per_group = [
        {"mask": "none"},
        {"mask": "hard", "alpha": 0.1, "variance_beta": 0.9},
        {"estimator": "debiased", "reduction": "per_tensor", "softness": 0.3},
        {"mask": "soft", "mask_eps": 1e-4, "mask_warmup_steps": 2},
        {"reduction": "per_tensor", "boundary": "empirical", "batch_size": 4, "n_dataset": 64},
    ]
    params = make_params()
    references = [ReferenceTensor(p.detach().numpy()) for p in params]
    optimizer = PRM([{"params": [p], **settings} for p, settings in zip(params, per_group, strict=True)])
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        for i, (p, reference) in enumerate(zip(params, references, strict=True)):
            p.grad = random_gradient(p.shape, i, generator)
            reference.step(p.grad.numpy(), **per_group[i])
        optimizer.step()
    for p, reference in zip(params, references, strict=True):
        assert_close(p, reference.w, 1e-6)


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_low_precision_parameters(dtype, foreach):
    """The state is float32 and the update is computed in float32: each step is the float32 step, rounded once."""
    for measured in MEASURED:
        params = make_params(dtype)
        optimizer = PRM(params, foreach=foreach, **measured)
        shadows = [p.detach().float().requires_grad_() for p in params]
        shadow_optimizer = PRM(shadows, foreach=foreach, **measured)

        def step_shadow(t, params=params, shadows=shadows, shadow_optimizer=shadow_optimizer):
            for p, shadow in zip(params, shadows, strict=True):
                shadow.data.copy_(p.data.float())
                shadow.grad = None if p.grad is None else p.grad.float()
            shadow_optimizer.param_groups[0]["lr"] = schedule(t)
            shadow_optimizer.step()

        train(optimizer, params, steps=20, before_step=step_shadow)
        for p, shadow in zip(params, shadows, strict=True):
            assert torch.equal(p, shadow.to(dtype))
            state = {k: v for k, v in optimizer.state[p].items() if k.startswith("exp_avg")}
            assert {v.dtype for v in state.values()} == {torch.float32}


def test_per_tensor_state_is_adamw_plus_a_scalar():
    params = make_params()
    optimizer, adamw = PRM(params, reduction="per_tensor"), torch.optim.AdamW(params)
    train(optimizer, params, steps=1)
    adamw.step()
    for p in params:
        ours, theirs = optimizer.state[p], adamw.state[p]
        extra = sum(v.nbytes for v in ours.values()) - sum(v.nbytes for v in theirs.values())
        assert ours["grad_var"].shape == () and extra <= 16
        assert set(ours) == {*theirs, "grad_var"}


def test_per_row_state_is_a_number_a_row_and_the_signal():
    for signal_beta, more in ((None, {"grad_var"}), (0.98, {"grad_var", "exp_avg_signal"})):
        params = make_params(torch.bfloat16)
        optimizer = PRM(params, reduction="per_row", estimator="debiased", signal_beta=signal_beta, state_dtype="bf16")
        train(optimizer, params, steps=1)
        for p, rows in zip(params, (7, 1, 1, 1, 3), strict=True):
            state = optimizer.state[p]
            assert set(state) == {"step", "exp_avg", "exp_avg_sq", *more}
            assert state["grad_var"].shape == (rows,) and state["grad_var"].dtype == torch.float64
            if signal_beta is not None:
                assert state["exp_avg_signal"].shape == p.shape and state["exp_avg_signal"].dtype == torch.bfloat16


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
def test_rows_are_as_tensors_of_their_own(foreach, monkeypatch):
    """So are the rows of a tensor that is taken apart, which may only be cut between rows, whatever its layout."""
    monkeypatch.setattr(multi_tensor, "CPU_BLOCK", 300)  # two rows and a part of one
    for estimator in ESTIMATORS:
        settings = {"estimator": estimator, "foreach": foreach}
        generator = torch.Generator().manual_seed(0)
        whole = [torch.randn(7, 128, generator=generator), torch.randn(128, 7, generator=generator).t()]
        whole.append(torch.randn(4, 500, generator=generator))  # rows longer than a block
        rows = [[row.clone().requires_grad_() for row in p] for p in whole]
        whole = [p.requires_grad_() for p in whole]
        ours = PRM(whole, reduction="per_row", **settings)
        theirs = PRM([row for some in rows for row in some], reduction="per_tensor", **settings)
        for _ in range(6):
            for p, some in zip(whole, rows, strict=True):
                p.grad = torch.randn(p.shape, generator=generator) + torch.linspace(0, 2, len(p)).unsqueeze(1)
                for row, grad in zip(some, p.grad, strict=True):
                    row.grad = grad.clone()
            ours.step(), theirs.step()
        for p, some in zip(whole, rows, strict=True):
            torch.testing.assert_close(p, torch.stack(some), rtol=1e-6, atol=1e-7)
            variances = torch.stack([theirs.state[row]["grad_var"] for row in some])
            torch.testing.assert_close(ours.state[p]["grad_var"], variances, rtol=1e-6, atol=0)


def test_a_slower_signal_average_sees_smaller_signals():
    """Rows of 512 gradients of mean .05 and deviation 1, beside rows of nothing but noise.

    The true q is .0025 / (.0025 + 1/19) whatever `signal_beta`, as the noise is that of `exp_avg`. But from `exp_avg`
    S is known to ± .0033, more than itself, and at β_S = .98 to ± .0008.
    """
    generator = torch.Generator().manual_seed(0)
    spread, closed = {}, {}
    for beta in (None, 0.98):
        p = torch.zeros(64, 512, requires_grad=True)
        optimizer = PRM([p], lr=0.0, reduction="per_row", estimator="debiased", signal_beta=beta)
        for _ in range(400):
            p.grad = torch.randn(p.shape, generator=generator)
            p.grad[:32] += 0.05
            optimizer.step()
        q = last_masks(optimizer, p)[0]
        spread[beta], closed[beta] = q[:32].std(), q[32:].mean()
    assert spread[0.98] < 0.5 * spread[None]
    assert closed[0.98] < 0.5 * closed[None]
    assert q[:32].mean().item() == pytest.approx(0.0025 / (0.0025 + 1 / 19), rel=0.15)


def test_grad_var_is_the_variance_of_the_batch_mean():
    """s estimates Var(batch mean) = Σ_B/(b-1) by itself: dividing it by (b-1) once more would be wrong.

    Linear models at fixed weights, whose per-example gradients are all known: batches of b drawn with replacement.
    Σ_B, the population variance within a batch, has mean σ²(b-1)/b, so Σ_B/(b-1) has mean σ²/b = Var(batch mean).
    """
    rng = np.random.default_rng(0)
    n, models, d, b, steps = 512, 8, 6, 8, 1200
    x, y, w = rng.normal(size=(n, models, d)), rng.normal(size=(n, models)), rng.normal(size=(models, d))
    per_example = 2 * ((x * w).sum(-1) - y)[..., None] * x
    groups = [
        {"params": [torch.zeros(models, d, requires_grad=True, dtype=torch.float64)], "estimator": e, "reduction": r}
        for e, r in itertools.product(ESTIMATORS, REDUCTIONS)
    ]
    optimizer = PRM(groups, lr=0.0, variance_beta=0.99)
    seen, within = [], []
    for t in range(steps):
        batch = per_example[rng.integers(n, size=b)]
        within.append(batch.var(axis=0) / (b - 1))
        for group in groups:
            group["params"][0].grad = torch.from_numpy(batch.mean(axis=0))
        optimizer.step()
        if t >= 400:
            seen.append([optimizer.state[g["params"][0]]["grad_var"].numpy().copy() for g in groups])
    expected = np.mean(within, axis=0)
    expected = {"per_param": expected, "per_row": expected.mean(1), "per_tensor": expected.mean()}
    for group, values in zip(groups, zip(*seen, strict=True), strict=True):
        # E[(g - m)²] exceeds Var(g) by the variance of m, a factor 1 + κ that the debiased estimator divides out.
        factor = 1.0 if group["estimator"] == "debiased" else 1 + 0.1 / 1.9
        found, target = np.mean(values, axis=0).squeeze(), factor * expected[group["reduction"]]
        np.testing.assert_allclose(found, target, rtol=0.25)  # sampling error of one parameter about 5 %
        np.testing.assert_allclose(found.mean(), target.mean(), rtol=0.02)  # of the mean over all below 1 %


def test_noise_floor_and_what_debiasing_does_to_it():
    """Pure noise: "ema" has S/N near 1/20 whatever happens; the debiased S - noise has mean zero."""
    generator = torch.Generator().manual_seed(0)
    p = torch.zeros(20_000, requires_grad=True)
    q = torch.zeros(20_000, requires_grad=True)
    ema, debiased = (PRM([x], lr=0.0, reduction="per_tensor", estimator=e) for x, e in ((p, "ema"), (q, "debiased")))
    excess = []
    for t in range(400):
        p.grad = torch.randn(p.shape, generator=generator)
        q.grad = p.grad.clone()
        ema.step(), debiased.step()
        if t >= 200:
            m, s, steps = (debiased.state[q][k].double() for k in ("exp_avg", "grad_var", "step"))
            kappa = masks.averaging_variance(0.9, steps)
            excess.append((m.square().mean() / (1 - 0.9**steps) ** 2 - kappa * s / (1 - 0.99 ** (steps - 1))).item())
    assert ema.get_mask_stats()["mean_q"] == pytest.approx(0.05 / 1.05, rel=0.02)
    assert abs(np.mean(excess)) < 3e-4  # 0.05 without the correction; the sampling error is about 1e-4
    assert debiased.get_mask_stats()["mean_q"] < 0.02


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
@pytest.mark.parametrize("bias_correction", [True, False])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_rounding_does_not_decide_the_first_mask(reduction, bias_correction, foreach):
    """At t = 1 with "ema" S = N in exact arithmetic: hard is 1 if α < 1, else 0, for every gradient."""
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(10_000, generator=generator) * 10 ** torch.empty(10_000).uniform_(-6, 3)
    for alpha, moves in ((0.999, True), (1.0, False), (1.5, False)):
        p = torch.zeros(10_000, requires_grad=True)
        p.grad = gradient.clone()
        arguments = {"mask": "hard", "alpha": alpha, "reduction": reduction, "foreach": foreach, "estimator": "ema"}
        optimizer = PRM([p], bias_correction=bias_correction, **arguments)
        optimizer.step()
        assert bool((p != 0).all()) is moves and bool((p == 0).all()) is not moves
        assert optimizer.get_mask_stats()["mean_q"] == float(moves)


@pytest.mark.parametrize("foreach", [False, True], ids=["single", "foreach"])
def test_no_signal_and_no_noise_closes_the_mask(foreach):
    for mask, reduction, estimator in itertools.product(["snr", "soft", "hard"], REDUCTIONS, ESTIMATORS):
        p = torch.ones(5, requires_grad=True)
        settings = {"mask": mask, "reduction": reduction, "estimator": estimator, "mask_min_elements": 0}
        optimizer = PRM([p], weight_decay=0.0, foreach=foreach, **settings)
        for _ in range(3):
            p.grad = torch.zeros(5)
            optimizer.step()
        assert torch.equal(p.detach(), torch.ones(5))
        assert optimizer.get_mask_stats()["max_q"] == 0.0


def test_tiny_gradients_are_masked_by_noise_and_not_by_eps():
    """The default ε_q is scale-free: the mask of gradients scaled by 1e-6 is the mask of the gradients."""
    means = {}
    for scale, mask_eps in itertools.product((1.0, 1e-6), (None, 1e-8)):
        params = make_params()
        optimizer = PRM(params, reduction="per_tensor", estimator="ema", mask_eps=mask_eps)
        train(optimizer, params, before_step=lambda t, params=params, scale=scale: scale_gradients(params, scale))
        means[scale, mask_eps] = optimizer.get_mask_stats()["mean_q"]
    assert means[1e-6, None] == pytest.approx(means[1.0, None], rel=1e-4)
    assert means[1e-6, 1e-8] < 0.01 * means[1.0, 1e-8]


def scale_gradients(params, scale):
    for p in params:
        if p.grad is not None:
            p.grad.mul_(scale)


def test_kappa():
    """κ_t against the variance of an average that is written out weight by weight."""
    for beta, t in itertools.product((0.0, 0.5, 0.9, 0.99), (1, 2, 5, 300)):
        weights = (1 - beta) * beta ** np.arange(t)
        expected = (weights**2).sum() / weights.sum() ** 2
        assert masks.averaging_variance(beta, torch.tensor(float(t), dtype=torch.float64)).item() == pytest.approx(
            expected, rel=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sums_of_squares_are_exact_whatever_the_shapes(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(300, 1024), (1000, 77), (77, 3), (0, 4), (1,), ()]
    xs = [torch.randn(shape, generator=generator).mul(1e-6).add(1e-6).to(dtype) for shape in shapes]
    xs.append(xs[0].t())
    expected = torch.stack([x.double().square().sum() for x in xs])
    torch.testing.assert_close(sums_of_squares(xs), expected, rtol=1e-7, atol=0)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nonfinite_gradients_follow_adamw_and_are_counted(bad, reduction):
    ours, theirs = torch.ones(6, requires_grad=True), torch.ones(6, requires_grad=True)
    other = torch.ones(4, requires_grad=True)
    optimizer, adamw = PRM([ours, other], reduction=reduction), torch.optim.AdamW([theirs])
    for _ in range(2):
        for p in (ours, theirs):
            p.grad = torch.linspace(1, 2, 6)
            p.grad[2] = bad
        other.grad = torch.ones(4)
        optimizer.step(), adamw.step()
    poisoned = ~torch.isfinite(ours)
    assert bool((poisoned >= ~torch.isfinite(theirs)).all())  # wherever AdamW shows it, PRM does
    assert optimizer.get_mask_stats()["nonfinite_count"] == 1
    assert torch.isfinite(other).all()  # and it stays in its tensor


def test_lr_schedulers_and_closure():
    p = torch.ones(3, requires_grad=True)
    optimizer = PRM([p], lr=0.1, mask_warmup_steps=1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    losses = []
    for _ in range(10):
        losses.append(optimizer.step(closure).item())
        scheduler.step()
    assert losses[-1] < losses[0]


def test_gradient_clipping_and_grad_scaler():
    """Under GradScaler the step sees unscaled, clipped gradients, and a step that overflowed changes nothing."""
    p, plain = (torch.ones(4, requires_grad=True) for _ in range(2))
    optimizer, plain_optimizer = PRM([p], reduction="per_tensor"), PRM([plain], reduction="per_tensor")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(6):
        x = torch.linspace(1, 2, 4) * (t + 1)
        optimizer.zero_grad(), plain_optimizer.zero_grad()
        scaler.scale((p * x).sum()).backward()
        if t == 3:
            p.grad[0] = float("inf")
        else:
            (plain * x).sum().backward()
            torch.nn.utils.clip_grad_norm_([plain], 1.0)
            plain_optimizer.step()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([p], 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert torch.equal(p, plain)
    assert optimizer.state[p]["step"] == 5


@pytest.mark.parametrize("measured", MEASURED, ids=lambda m: "-".join(map(str, m.values())))
def test_capturable_equals_the_ordinary_step(measured):
    for mask, foreach in itertools.product(MASKS, [False, True]):
        results = []
        for capturable in (False, True):
            params = make_params()
            settings = {"mask": mask, **measured, "mask_warmup_steps": 2}
            train(PRM(params, foreach=foreach, capturable=capturable, **settings), params, steps=10)
            results.append(params)
        for p, q in zip(*results, strict=True):
            assert_close(p, q.detach().double().numpy(), 1e-6)


def test_tensor_learning_rate():
    results = []
    for lr, foreach, capturable in (
        (1e-2, False, False),
        (torch.tensor(1e-2), None, False),
        (torch.tensor(1e-2), True, True),
    ):
        p = torch.linspace(-1, 1, 9).requires_grad_()
        optimizer = PRM([p], lr=lr, foreach=foreach, capturable=capturable, reduction="per_tensor")
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            p.grad = torch.randn(9, generator=generator)
            optimizer.step()
        results.append(p.detach())
    for p in results[1:]:
        torch.testing.assert_close(p, results[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("amsgrad", [False, True], ids=["plain", "amsgrad"])
@pytest.mark.parametrize("reduction", [*REDUCTIONS, "signal"])
def test_differentiable_step(reduction, amsgrad):
    """d(loss after two steps)/d(first gradient) by autograd equals finite differences."""
    measured = SIGNAL if reduction == "signal" else {"reduction": reduction, "estimator": "debiased"}

    def after(g):
        p = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.3, -0.4]], dtype=torch.float64, requires_grad=True)
        q = p.clone()
        optimizer = PRM([q], lr=0.1, differentiable=True, amsgrad=amsgrad, **measured)
        q.grad = g
        optimizer.step()
        q.grad = g * torch.tensor([[1.0, 2.0, 0.5], [1.2, 0.7, 1.0]], dtype=torch.float64)
        optimizer.step()
        return (q**2).sum()

    g = torch.tensor([[0.3, -0.2, 0.7], [0.5, 0.6, -0.1]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(after, (g,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_compiled_step_equals_the_eager_one(reduction):
    results = []
    for compiled in (False, True):
        params = make_params()
        optimizer = PRM(params, reduction=reduction)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend="aot_eager")
        train(optimizer, params, steps=5)
        results.append(params)
    for p, q in zip(*results, strict=True):
        assert_close(p, q.detach().double().numpy(), 1e-6)


def test_functional_form():
    p, g = torch.ones(3), torch.tensor([1.0, 2.0, 3.0])
    m, v, s, t = torch.zeros(3), torch.zeros(3), torch.zeros((), dtype=torch.float64), torch.zeros(())
    settings = {"lr": 0.1, "weight_decay": 0.0, "reduction": "per_tensor", "estimator": "ema", "mask_eps": 0.0}
    prm([p], [g], [m], [v], [], [s], [t], **settings)
    # t = 1: S = N, q = 1/2, and m̂/√v̂ = sign(g)
    torch.testing.assert_close(p, torch.full((3,), 1 - 0.1 * 0.5))
    assert t == 1 and s.item() == pytest.approx(0.01 * 14 / 3)
    with pytest.warns(DeprecationWarning, match="`beta1` and `beta2` are `betas` now"):
        prm([p], [g], [m], [v], [], [s], [t], beta1=0.9, beta2=0.999, **settings)
    with pytest.raises(TypeError, match="beta3"):
        prm([p], [g], [m], [v], [], [s], [t], beta3=0.9)


@pytest.mark.parametrize("foreach", [False, True], ids=["reference", "foreach"])
@pytest.mark.parametrize("settings", [{"mask": "none"}, {"amsgrad": True}, *MEASURED], ids=name_of)
def test_functional_form_equals_the_optimizer(settings, foreach):
    params, others = make_params(), make_params()
    optimizer, generator = PRM(params, foreach=foreach, **settings), torch.Generator().manual_seed(0)
    for t in range(4):
        for i, (p, q) in enumerate(zip(params, others, strict=True)):
            p.grad = random_gradient(p.shape, i, generator)
            q.grad = p.grad.clone()
        if t == 0:
            optimizer.step()
            with torch.no_grad():
                for p, q in zip(params, others, strict=True):
                    q.copy_(p)
            states = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in params]
            continue
        optimizer.step()
        names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "grad_var", "step", "exp_avg_signal")
        lists = [[s[name] for s in states if name in s] for name in names]
        with torch.no_grad():
            prm(others, [q.grad for q in others], *lists, foreach=foreach, **settings)
    assert all(map(torch.equal, params, others))


ERRORS = [
    ({"lr": -1.0}, r"Invalid lr=-1.0"),
    ({"lr": float("nan")}, r"Invalid lr=nan"),
    ({"lr": torch.tensor(-1.0)}, r"Invalid lr="),
    ({"lr": torch.tensor([1.0, 2.0])}, r"Invalid lr=.*one element"),
    ({"lr": torch.tensor(1e-3), "foreach": True}, r"capturable=True"),
    ({"betas": (1.0, 0.9)}, r"Invalid betas\[0\]=1.0"),
    ({"betas": (0.9, -0.1)}, r"Invalid betas\[1\]=-0.1"),
    ({"betas": 0.9}, r"Invalid betas=0.9"),
    ({"variance_beta": 1.0}, r"Invalid variance_beta=1.0.*\[0, 1\)"),
    ({"variance_beta": float("nan")}, r"Invalid variance_beta=nan"),
    ({"eps": -1e-8}, r"Invalid eps=-1e-08"),
    ({"eps": float("nan")}, r"Invalid eps=nan"),
    ({"weight_decay": -0.1}, r"Invalid weight_decay=-0.1"),
    ({"softness": -1.0}, r"Invalid softness=-1.0"),
    ({"alpha": -1.0}, r"Invalid alpha=-1.0"),
    ({"mask_eps": float("nan")}, r"Invalid mask_eps=nan"),
    ({"mask": "sharp"}, r"Invalid mask='sharp'.*'snr', 'soft', 'hard', 'none'"),
    ({"reduction": "per_column"}, r"Invalid reduction='per_column'.*'per_param', 'per_tensor', 'per_row'"),
    ({**SIGNAL, "signal_beta": 1.0}, r"Invalid signal_beta=1.0.*\[0, 1\)"),
    ({**SIGNAL, "signal_beta": float("nan")}, r"Invalid signal_beta=nan"),
    ({**SIGNAL, "signal_beta": True}, r"Invalid signal_beta=True"),
    (
        {"signal_beta": 0.98, "reduction": "per_param"},
        r"Invalid signal_beta=0.98: it needs reduction='per_row'.*'per_param'.*signal_beta=None",
    ),
    ({**SIGNAL, "estimator": "ema"}, r"Invalid signal_beta=0.98: .*estimator='debiased'.*'ema'"),
    ({"estimator": "map"}, r"Invalid estimator='map'.*'ema', 'debiased'"),
    ({"boundary": "finite"}, r"Invalid boundary='finite'.*'batch', 'empirical'"),
    ({"boundary": "empirical"}, r"Invalid batch_size=None.*boundary='empirical' needs it"),
    ({"boundary": "empirical", "batch_size": 8}, r"Invalid n_dataset=None"),
    ({"boundary": "empirical", "batch_size": 8, "n_dataset": 8}, r"Invalid n_dataset=8.*larger than batch_size=8"),
    ({"batch_size": 0}, r"Invalid batch_size=0"),
    ({"n_dataset": 2.5}, r"Invalid n_dataset=2.5"),
    ({"mask_warmup_steps": -1}, r"Invalid mask_warmup_steps=-1"),
    ({"mask_warmup_steps": 1.5}, r"Invalid mask_warmup_steps=1.5"),
    ({"state_dtype": torch.float16}, r"Invalid state_dtype=torch.float16.*'float32', 'bf16', '8bit'"),
    ({"relative_eps": 0.0}, r"Invalid relative_eps=0.0"),
    ({"relative_eps": 10, "max_grad_norm": 0.0}, r"Invalid max_grad_norm=0.0.*relative_eps needs"),
    ({"relative_eps": 10, "eps": 1e-6}, r"Invalid eps=1e-06: relative_eps sets it"),
    ({"state_dtype": "bf16", "differentiable": True}, r"Invalid state_dtype='bf16'.*autograd"),
    ({"fused": True, "differentiable": True}, r"Invalid fused=True.*autograd"),
    ({"fused": True, "foreach": True}, r"Invalid fused=True.*cannot both be True"),
    ({"foreach": True, "differentiable": True}, r"Invalid foreach=True.*autograd"),
]


@pytest.mark.parametrize("settings, message", ERRORS, ids=lambda x: ",".join(x) if isinstance(x, dict) else "")
def test_wrong_arguments_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PRM([torch.zeros(2, requires_grad=True)], **settings)
    with pytest.raises(ValueError, match=message):  # and for one group just the same
        PRM([{"params": [torch.zeros(2, requires_grad=True)], **settings}])


def test_settings_changed_while_training_are_checked():
    p = torch.zeros(2, requires_grad=True)
    p.grad = torch.ones(2)
    optimizer = PRM([p], mask="none")
    optimizer.step()
    optimizer.param_groups[0]["mask"] = "snr"
    with pytest.raises(ValueError, match="needs `grad_var`.*mask_warmup_steps"):
        optimizer.step()
    optimizer.param_groups[0]["mask"] = "nothing"
    with pytest.raises(ValueError, match="Invalid mask='nothing'"):
        optimizer.step()


def test_sparse_gradients_and_complex_parameters_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse"):
        PRM(embedding.parameters()).step()
    with pytest.raises(ValueError, match="complex64.*view_as_real"):
        PRM([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])


def test_step_without_gradients_or_parameters_is_a_no_op():
    """DeepSpeed ZeRO-3 steps with empty groups."""
    p = torch.ones(2, requires_grad=True)
    optimizer = PRM([p])
    optimizer.step()
    assert not optimizer.state
    optimizer.param_groups[0]["params"] = []
    optimizer.step()
