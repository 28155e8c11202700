"""Steps of Sven beside recorded ones of the original implementation, and beside numpy's pseudo-inverse."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from prm_hf.sven import PolyakSGD, Sven, sven
from prm_hf.sven.step import draw_masks

from .models import flat, gpt2, llama, padded_batch, seeded, token_losses, true_rows


RECORDED = json.loads((Path(__file__).parent / "recorded_steps.json").read_text(encoding="utf-8"))
X, Y = (torch.tensor(RECORDED[name], dtype=torch.float64) for name in "xy")
TOLERANCE = {"svd": 1e-10, "randomized": 1e-10, "gram": 1e-6}


def make_model() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    nn.utils.vector_to_parameters(torch.linspace(-1, 1, 13, dtype=torch.float64), model.parameters())
    return model


def squared_errors(predictions, y):
    return (predictions - y).square().mean(1)


def make_sven(model=None, loss_fn=squared_errors, **settings) -> Sven:
    return Sven(model or make_model(), loss_fn, **settings)


def change(optimizer: Sven, batch=(X, Y)) -> torch.Tensor:
    before = flat(optimizer.model)
    optimizer.step(batch)
    return flat(optimizer.model) - before


def rows_and_residuals(model, kappa: float, batch=(X, Y), microbatch_size: int = 1):
    """M and R by autograd of R itself."""

    def residuals():
        groups = squared_errors(model(batch[0]), batch[1]).split(microbatch_size)
        return torch.stack([group.mean() for group in groups]) ** (kappa / 2)

    return true_rows(model, residuals).numpy(), residuals().detach().numpy()


@pytest.mark.parametrize("svd", TOLERANCE)
@pytest.mark.parametrize("case", RECORDED["steps"], ids=lambda c: f"{c['kappa']:g}-{c['mode']}-{c['k']}-{c['rtol']}")
def test_recorded_steps(case, svd):
    optimizer = make_sven(svd=svd, **{name: case[name] for name in ("kappa", "k", "rtol", "lr")})
    np.testing.assert_allclose(change(optimizer), case["delta"], atol=TOLERANCE[svd], rtol=0)
    # the original keeps those above `rtol` alone
    found = optimizer.last_step.singular_values[: optimizer.last_step.rank]
    np.testing.assert_allclose(found, case["singular_values"], atol=TOLERANCE[svd], rtol=0)


OPTIONS = {
    "microbatch2": {"microbatch_size": 2},
    "variable_k": {"variable_k": True},
    "rmsprop_post": {"rmsprop": "after", "momentum": 0.9},
    "param_fraction": {"param_fraction": 0.5},
    "param_fraction_block": {"param_fraction": 0.5, "mask_by_block": True},
}


@pytest.mark.parametrize("svd", TOLERANCE)
@pytest.mark.parametrize("name", OPTIONS)
def test_recorded_options(name, svd, monkeypatch):
    case = RECORDED["options"][name]
    if "mask" in case:

        def recorded_masks(params, *rest):
            parts = torch.tensor(case["mask"]).double().split([p.numel() for p in params])
            return {p: mask.view(p.shape) for p, mask in zip(params, parts, strict=True)}

        monkeypatch.setattr(sven, "draw_masks", recorded_masks)
    optimizer = make_sven(svd=svd, **{key: case[key] for key in ("k", "rtol", "lr")}, **OPTIONS[name])
    np.testing.assert_allclose(change(optimizer), case["delta"], atol=TOLERANCE[svd], rtol=0)


@pytest.mark.parametrize("svd", TOLERANCE)
def test_rmsprop_before_solves_the_equations(svd):
    """The original leaves out the last division by the scale, so that its step solves nothing."""
    case = RECORDED["options"]["rmsprop_pre"]
    optimizer = make_sven(svd=svd, rmsprop="before", **{key: case[key] for key in ("k", "rtol", "lr")})
    moved = change(optimizer)
    scale = torch.cat([optimizer.state[p]["square_avg"].sqrt().flatten() + 1e-8 for p in optimizer.model.parameters()])
    np.testing.assert_allclose(moved * scale, case["delta"], atol=TOLERANCE[svd], rtol=0)
    rows, residuals = rows_and_residuals(make_model(), 2.0)
    np.testing.assert_allclose(rows @ moved.numpy(), -case["lr"] * residuals, atol=1e-7)


@pytest.mark.parametrize("kappa", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("rtol", [1e-3, 0.2])
@pytest.mark.parametrize("microbatch_size", [1, 2, 4])
def test_step_is_that_of_numpy(kappa, rtol, microbatch_size):
    """4 leaves a last row of two samples."""
    settings = {"kappa": kappa, "rtol": rtol, "microbatch_size": microbatch_size}
    moved = change(make_sven(k=6, lr=0.3, **settings))
    rows, residuals = rows_and_residuals(make_model(), kappa, microbatch_size=microbatch_size)
    np.testing.assert_allclose(moved, -0.3 * np.linalg.pinv(rows, rcond=rtol) @ residuals, atol=1e-9)


@pytest.mark.parametrize("make", [llama, gpt2, lambda: llama(tie_word_embeddings=True)], ids=["llama", "gpt2", "tied"])
def test_language_models(make):
    """With padded rows; GPT-2 and the last Llama have one matrix as embedding and as output layer."""
    model, batch = make().double(), padded_batch()
    labels = batch.pop("labels")
    rows = true_rows(model, lambda: token_losses(model(**batch).logits, labels)).numpy()
    losses = token_losses(model(**batch).logits, labels).detach().numpy()
    optimizer = make_sven(model, lambda outputs, y: token_losses(outputs.logits, y), lr=0.1, k=5)
    before = flat(model)
    returned = optimizer.step((batch, labels))
    np.testing.assert_allclose(returned, losses, rtol=1e-12)
    expected = -0.1 * np.linalg.pinv(rows, rcond=1e-3) @ losses
    np.testing.assert_allclose(flat(model) - before, expected, atol=1e-6)


def test_backward_serves_any_optimizer():
    """`p.grad` is the step, so that SGD makes Sven's."""
    expected = change(make_sven(lr=0.1, k=4))
    optimizer = make_sven(k=4)
    before = flat(optimizer.model)
    optimizer.backward((X, Y))
    assert torch.equal(flat(optimizer.model), before)
    torch.optim.SGD(optimizer.model.parameters(), lr=0.1).step()
    torch.testing.assert_close(flat(optimizer.model) - before, expected, rtol=0, atol=0)


@pytest.mark.parametrize("svd", ["gram", "svd", "randomized"])
@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize(
    "what, message", [("loss", "The loss of a sample is nan"), ("gradient", "per-sample gradients? is nan")]
)
def test_what_is_not_finite_is_named(svd, steps_before, what, message):
    """At the first step too, which checks the per-sample gradients against the model's."""
    optimizer = make_sven(k=4, svd=svd, loss_fn=lambda outputs, y: (outputs - y).square().sum(-1).sqrt())
    for _ in range(steps_before):
        optimizer.step((X, Y))
    before, y = flat(optimizer.model), Y.clone()
    y[2] = torch.nan if what == "loss" else optimizer.model(X)[2].detach()  # the root of 0 has no gradient
    with pytest.raises(ValueError, match=message):
        optimizer.step((X, y))
    assert torch.equal(flat(optimizer.model), before)


@pytest.mark.parametrize("kappa", [0.5, 1.0, 2.0])
def test_zero_losses_ask_for_nothing(kappa):
    model = make_model()
    y = Y.clone()
    y[2] = model(X)[2].detach()
    optimizer = make_sven(model, kappa=kappa, k=6)
    moved = change(optimizer, (X, y))
    others = [0, 1, 3, 4, 5]
    without = change(make_sven(kappa=kappa, k=6), (X[others], y[others]))
    assert torch.isfinite(moved).all() and moved.norm() > 0
    if kappa < 2:
        torch.testing.assert_close(moved, without)


@pytest.mark.parametrize("svd", TOLERANCE)
def test_zero_jacobian_makes_no_step(svd):
    optimizer = make_sven(loss_fn=lambda p, y: 1 + 0 * p.sum(1), svd=svd)
    assert change(optimizer).abs().max() == 0 and optimizer.last_step.rank == 0


def test_frozen_parameters_stay():
    model = make_model()
    model[0].requires_grad_(False)
    moved = change(make_sven(model, k=6))
    assert not moved[:9].any() and moved[9:].all()
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]


def test_half_of_the_rows_are_the_default():
    assert change(make_sven()).equal(change(make_sven(k=3)))
    optimizer = make_sven()
    optimizer.step((X[:1], Y[:1]))
    assert optimizer.last_step.rank == 1


def test_variable_k_stops_before_the_mean_loss_rises():
    optimizer = make_sven(lr=4.0, k=6, variable_k=True)
    before = squared_errors(optimizer.model(X), Y).mean()
    optimizer.step((X, Y))
    rank = optimizer.last_step.rank
    assert 0 < rank < 6
    assert squared_errors(optimizer.model(X), Y).mean() <= before
    worse = make_sven(lr=4.0, k=rank + 1)
    worse.step((X, Y))
    assert squared_errors(worse.model(X), Y).mean() > before


def test_max_norm_shortens_the_step():
    whole = change(make_sven(lr=1.0, k=6))
    short = change(make_sven(lr=1.0, k=6, max_norm=0.1))
    torch.testing.assert_close(short, whole * 0.1 / whole.norm(), rtol=1e-5, atol=1e-9)


def test_rmsprop_after_is_that_of_torch():
    own = make_sven(lr=0.01, k=3, rmsprop="after", momentum=0.5)
    other = make_sven(k=3)
    of_torch = torch.optim.RMSprop(other.model.parameters(), 0.01, momentum=0.5)
    for _ in range(3):
        own.step((X, Y))
        other.backward((X, Y))
        of_torch.step()
    torch.testing.assert_close(flat(own.model), flat(other.model), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_block", [False, True])
def test_drawn_parameters(by_block):
    params = list(make_model().parameters())
    draws = [draw_masks(params, 0.5, by_block, (0, step)) for step in range(8)]
    flats = [torch.cat([mask.flatten() for mask in draw.values()]) for draw in draws]
    assert all(set(x.tolist()) == {0.0, 1.0} and x.sum() == 6 for x in flats)
    assert len({tuple(x.tolist()) for x in flats}) > 4
    again = draw_masks(params, 0.5, by_block, (0, 3))
    assert all(torch.equal(again[p], draws[3][p]) for p in params)
    if by_block:
        cut = [sum(0 < mask.sum() < mask.numel() for mask in draw.values()) for draw in draws]
        assert max(cut) <= 1


def test_state_and_schedule():
    """A run that is saved and loaded goes on as one that is not, with drawn parameters, RMSprop and a schedule."""
    settings = {"lr": 0.05, "rmsprop": "before", "param_fraction": 0.5, "k": 3}
    whole, first, second = make_sven(**settings), make_sven(**settings), make_sven(**settings)
    schedule = torch.optim.lr_scheduler.ExponentialLR(whole, 0.5)
    for _ in range(4):
        whole.step((X, Y))
        schedule.step()
    for _ in range(2):
        first.step((X, Y))
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.param_groups[0]["n_steps"] == 2
    first.step((X, Y))
    second.step((X, Y))
    assert flat(first.model).equal(flat(second.model))
    assert whole.param_groups[0]["lr"] == 0.05 / 16


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"k": 0}, "`k` must be a whole number from 1"),
        ({"rtol": 1.0}, r"`rtol` must be in \[0, 1\)"),
        ({"kappa": 0}, "`kappa` must be above 0"),
        ({"svd": "lobpcg"}, "`svd` must be"),
        ({"lr": -1}, "`lr` must be at least 0"),
        ({"microbatch_size": 0}, "`microbatch_size` must be"),
        ({"param_fraction": 0}, "`param_fraction` must be"),
        ({"mask_by_block": True}, "`mask_by_block` needs a `param_fraction`"),
        ({"momentum": 0.9}, "set `rmsprop='after'`"),
        ({"variable_k": True, "rmsprop": "after"}, "choose one of them"),
        ({"variable_k": True, "max_norm": 1.0}, "choose one of them"),
        ({"jacobian": "vmap"}, "`jacobian` must be"),
    ],
)
def test_wrong_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        make_sven(**settings)


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda p, y: (p - y).square().mean(), r"shape \(B,\)"),
        (lambda p, y: (p - y).sum(1), "not negative"),
        (lambda p, y: (p - y).sum(1).square() / 0, "lower the learning rate"),
        (lambda p, y: (y - y).sum(1), "do not depend on any parameter"),
    ],
)
def test_wrong_losses(loss_fn, words):
    optimizer = make_sven(loss_fn=loss_fn)
    before = flat(optimizer.model)
    with pytest.raises(ValueError, match=words):
        optimizer.step((X, Y))
    assert flat(optimizer.model).equal(before)


def test_unresolved_rtol_is_said():
    model = seeded(nn.Linear, 2, 1)
    with pytest.warns(UserWarning, match="`rtol=1e-06` keeps singular values"):
        Sven(model, squared_errors, rtol=1e-6).step((X.float(), Y.float()))


def test_polyak_reaches_the_loss_of_a_line():
    """On a linear function one step is enough."""
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = PolyakSGD([w], f_star=1.0, max_lr=10.0)

    def closure():
        optimizer.zero_grad()
        loss = w @ torch.tensor([1.0, 2.0], dtype=torch.float64)
        loss.backward()
        return loss

    assert optimizer.step(closure) == 11
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2.0)
    assert (w @ torch.tensor([1.0, 2.0], dtype=torch.float64)).item() == pytest.approx(1.0)
    optimizer.param_groups[0]["max_lr"] = 0.01
    w.data.fill_(5.0)
    optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.01
    with pytest.raises(ValueError, match="`max_lr` must be above 0"):
        PolyakSGD([w], max_lr=0)
