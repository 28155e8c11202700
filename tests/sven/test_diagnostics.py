"""The numbers of the Gram matrix on gradients that are known."""

import pytest
import torch
from torch import nn

from prm_hf.sven import SampleGram, per_sample_gram

from .models import jacobian_of, seeded
from .trainer_runs import collate, trainer_of


def linear(rows: list[list[float]]) -> SampleGram:
    """Of a linear function of one output, whose gradients are the inputs."""
    model = nn.Linear(len(rows[0]), 1, bias=False).double()
    return per_sample_gram(model, lambda outputs: outputs[:, 0] + 10, (torch.tensor(rows, dtype=torch.float64),))


def test_orthogonal_gradients():
    found = linear([[3.0, 0, 0], [0, 2, 0], [0, 0, 1]])
    assert found.singular_values.tolist() == pytest.approx([3, 2, 1])
    assert found.condition == pytest.approx(3) and found.agreement == pytest.approx(1 / 3)
    torch.testing.assert_close(found.cosines, torch.eye(3, dtype=torch.float64))
    p = torch.tensor([9.0, 4, 1]) / 14
    assert found.effective_rank == pytest.approx((-(p * p.log()).sum()).exp().item())


def test_equal_opposite_and_zero_gradients():
    equal = linear([[1.0, 2]] * 3)
    assert equal.agreement == pytest.approx(1) and equal.effective_rank == pytest.approx(1, abs=1e-6)
    opposed = linear([[1.0, 0], [1, 0], [-1, 0]])
    assert opposed.agreement_of_samples.tolist() == pytest.approx([0, 0, -1])
    nothing = linear([[0.0, 0], [0, 0]])
    assert (nothing.agreement, nothing.effective_rank, nothing.condition) == (0, 0, float("inf"))
    assert not nothing.cosines.any()


def test_model_is_left_as_it_was():
    model = seeded(nn.Linear, 3, 2)
    found = per_sample_gram(model, lambda outputs: outputs.square().sum(1), (torch.randn(4, 3),))
    assert found.gram.shape == (4, 4) and not found.losses.requires_grad
    assert all(p.grad is None for p in model.parameters()) and not model._forward_hooks


def test_trainers_batch(tmp_path):
    trainer = trainer_of(tmp_path)
    batch = collate([trainer.train_dataset[i] for i in range(4)])
    found = trainer.per_sample_gram(dict(batch))
    losses = trainer.per_sample_losses(trainer.model, dict(batch))
    rows = jacobian_of(trainer.model, lambda: trainer.per_sample_losses(trainer.model, dict(batch)), "loop").rows()
    torch.testing.assert_close(found.gram, (rows @ rows.T).double(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.losses, losses.detach())


def test_plot(tmp_path):
    found = linear([[3.0, 0, 0], [0, 2, 0], [1, 1, 1]])
    found.plot(tmp_path / "gram.png")
    found.plot(tmp_path / "named.svg", labels=["right", "right", "wrong"])
    assert (tmp_path / "gram.png").stat().st_size > 5000
    picture = (tmp_path / "named.svg").read_text()
    assert "<svg" in picture
    with pytest.raises(ValueError, match="one name for each of the 3 samples"):
        found.plot(tmp_path / "wrong.png", labels=["right"])
