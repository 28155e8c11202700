"""Per-sample gradients of layers beside a backward pass for each sample."""

import pytest
import torch
from torch import nn

from prm_hf.sven import Sven, capture
from prm_hf.sven.capture import Capture
from prm_hf.sven.jacobian import Outer, Rows, inner_products

from .models import (
    Borrowed,
    Experts,
    Raw,
    Tied,
    gpt2,
    jacobian_of,
    llama,
    padded_batch,
    seeded,
    token_losses,
    true_rows,
)


IDS = torch.randint(0, 7, (4, 5), generator=torch.Generator().manual_seed(0))


def image_model() -> nn.Module:
    layers = nn.Conv2d(2, 3, 3), nn.GroupNorm(3, 3), nn.GELU(), nn.Flatten(), nn.Linear(3 * 16, 2)
    return nn.Sequential(*layers)


def squares(model, *args, **kwargs):
    return lambda: model(*args, **kwargs).square().flatten(1).mean(1)


def language(model, batch):
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return lambda: token_losses(model(**inputs).logits, batch["labels"])


def both_sides(model, batch):
    """A loss of pairs, whose two rows lie apart in the batch, as TRL's DPO has them."""
    losses = language(model, batch)

    def difference():
        first, second = losses().chunk(2)
        return nn.functional.softplus(second - first)

    return difference


def cases() -> dict:
    dense = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2, bias=False))
    random = torch.Generator().manual_seed(1)
    x, image = torch.randn(4, 3, generator=random), torch.randn(4, 2, 6, 6, generator=random)
    sequences = torch.randn(4, 6, 3, generator=random)
    models = {
        "dense": (dense, squares(dense, x)),
        "sequences": (dense, squares(dense, sequences)),
        "tied": (tied := seeded(Tied), squares(tied, IDS)),
        "image": (conv := seeded(image_model), squares(conv, image)),
        "raw": (raw := seeded(Raw), squares(raw, x[:, :2])),
        "lstm": (lstm := seeded(nn.LSTM, 3, 2, batch_first=True), lambda: lstm(sequences)[0].square().mean((1, 2))),
        "llama": (model := llama(), language(model, padded_batch())),
        "tied_llama": (model := llama(tie_word_embeddings=True), language(model, padded_batch())),
        "gpt2": (model := gpt2(), language(model, padded_batch())),
        "pairs": (model := llama(), both_sides(model, padded_batch(6))),
    }
    return {name: (model.double(), losses) for name, (model, losses) in models.items()}


@pytest.fixture(autouse=True)
def float64():
    """Inputs that the cases make are float64 too."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


NAMES = ["dense", "sequences", "tied", "image", "raw", "lstm", "llama", "tied_llama", "gpt2", "pairs"]


@pytest.mark.parametrize("method", ["layers", pytest.param("loop", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_gram(name, method):
    model, losses = cases()[name]
    rows = true_rows(model, losses)
    jacobian = jacobian_of(model, losses, method)
    # transformers computes some norms and attention weights in float32
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-7} if "llama" in name or name in ("gpt2", "pairs") else {"rtol": 1e-9, "atol": 1e-12}
    )
    torch.testing.assert_close(jacobian.rows(), rows, **tolerance)
    torch.testing.assert_close(jacobian.gram(), rows @ rows.T, **tolerance)
    torch.testing.assert_close(jacobian.compact().gram(), rows @ rows.T, **tolerance)
    weights = {
        p: torch.rand(p.shape, generator=torch.Generator().manual_seed(i)) for i, p in enumerate(jacobian.params)
    }
    h = torch.cat([weights[p].flatten() for p in jacobian.params])
    torch.testing.assert_close(jacobian.gram(weights=weights), (rows * h) @ rows.T, **tolerance)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["dense", "tied", "llama", "gpt2"])
def test_most_parameters_need_no_loop(name, monkeypatch):
    model, losses = cases()[name]
    looped = []
    monkeypatch.setattr(capture, "_by_loop", lambda losses, params: looped.extend(params) or {})
    jacobian_of(model, losses)
    assert not looped


@pytest.mark.parametrize("one_hot", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("n", [(3, 4), (1, 2)])
def test_outer_products(one_hot, n):
    """Factored and multiplied out, of uses of one matrix that differ in rows, lengths and form."""
    generator = torch.Generator().manual_seed(0)

    def use(rows, length, is_one_hot):
        left = torch.randint(0, 5, (rows, length), generator=generator)
        if not is_one_hot:
            left = torch.randn(rows, length, 5, generator=generator)
        return Outer(left, torch.randn(rows, length, 6, generator=generator), 5)

    a, b = (use(rows, length, flag) for rows, length, flag in zip(n, (2, 7), one_hot, strict=True))
    expected = a.rows().flatten(1) @ b.rows().flatten(1).T
    torch.testing.assert_close(inner_products([a], [b]), expected)
    torch.testing.assert_close(inner_products([Rows(a.rows())], [b]), expected)
    torch.testing.assert_close(inner_products([a, a], [b]), 2 * expected)


def test_factors_keep_the_dtype_of_autocast_and_are_multiplied_in_float32():
    model = seeded(lambda: nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30))).float()
    x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16), Capture(model) as calls:
        losses = model(x).float().square().mean((1, 2))
    jacobian = calls.differentiate(losses)
    factors = [use.left for uses in jacobian.uses.values() for use in uses if isinstance(use, Outer)]
    assert [factor.dtype for factor in factors] == [torch.bfloat16] * 2  # gradients of outputs
    rows = jacobian.rows()
    assert rows.dtype == jacobian.gram().dtype == torch.float32
    torch.testing.assert_close(jacobian.gram(), rows @ rows.T)
    torch.testing.assert_close(
        rows.sum(0),
        torch.cat([g.flatten() for g in torch.autograd.grad(losses.sum(), model.parameters())]),
        rtol=0.02,
        atol=0.02,
    )


def test_large_products_are_made_in_blocks(monkeypatch):
    a = Outer(torch.randn(5, 3, 50), torch.randn(5, 3, 40), 50)
    whole = inner_products([a], [a])
    monkeypatch.setattr("prm_hf.sven.jacobian._BLOCK", 2 * 3 * 5 * 3)
    torch.testing.assert_close(inner_products([a], [a]), whole)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), "`1` is batch normalization in training mode"),
        (Borrowed, "do not add up to the model's gradient"),
    ],
)
def test_what_layers_cannot_see_is_refused(make, words):
    model, x = seeded(make), torch.randn(4, 3)

    def losses(outputs):
        return outputs.square().mean(1)

    with pytest.raises(ValueError, match=words) as error:
        Sven(model, losses).step((x,))
    assert 'jacobian="loop"' in str(error.value)
    rows = true_rows(model, squares(model, x))
    torch.testing.assert_close(jacobian_of(model, squares(model, x), "loop").rows(), rows)
    Sven(model, losses, jacobian="loop").step((x,))


def test_experts_that_get_as_many_tokens_as_there_are_samples():
    """In the second batch a token of each of two samples, the later one's first."""
    model, generator = seeded(Experts), torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 4, 3, generator=generator) for _ in range(2))
    first[..., 0] = torch.tensor([[1.0, 1, 1, -1], [1, -1, -1, -1]])
    second[..., 0] = torch.tensor([[-1.0, -1, -1, -1], [1, 1, -1, -1]])
    looped: set[nn.Parameter] = set()
    for x in (first, second):
        with Capture(model, looped=looped) as found:
            losses = squares(model, x)()
        torch.testing.assert_close(found.differentiate(losses).rows(), true_rows(model, squares(model, x)))
    assert looped == {*model.expert.parameters()}


def test_samples_that_depend_on_each_other_are_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            y = self.layer(x)
            return y - y.mean(0)

    model = seeded(Centred)
    with pytest.raises(ValueError, match="samples depend on each other"):
        Sven(model, lambda outputs: outputs.square().mean(1)).step((torch.randn(4, 3),))
