"""Random subspaces: each projector is a linear map with its own transpose; training in one is pactl's training."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.func import functional_call
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from prm_hf.diagnostics.projectors import KroneckerProjector, hadamard, make_projector
from prm_hf.diagnostics.subspace import Subspace, TrainedVector


RECORDED = json.loads((Path(__file__).parent / "pacbayes_quant.json").read_text())["projectors"]
KINDS = ("dense", "sparse", "fastfood", "kronecker")
SIZES = [(100, 9), (110, 10), (1000, 37), (257, 256)]


def matrix(projector) -> torch.Tensor:
    return torch.stack([projector.project(row) for row in torch.eye(projector.dim)], dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("n", "dim"), SIZES[:3])
def test_pull_back_is_the_transpose_and_the_gradient(kind, n, dim):
    projector = make_projector(kind, n, dim, seed=3)
    p = matrix(projector)
    assert p.shape == (n, dim)
    w, g = torch.randn(dim, requires_grad=True), torch.randn(n)
    torch.testing.assert_close(projector(w), p @ w)
    torch.testing.assert_close(projector.pull_back(g), p.T @ g)
    projector(w).backward(g)
    torch.testing.assert_close(w.grad, p.T @ g)


@pytest.mark.parametrize("kind", KINDS)
def test_columns_have_length_one_and_the_seed_gives_them(kind):
    p = matrix(make_projector(kind, 2000, 50, seed=1))
    lengths = p.norm(dim=0)
    assert lengths.mean().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(p, matrix(make_projector(kind, 2000, 50, seed=1)))
    assert not torch.equal(p, matrix(make_projector(kind, 2000, 50, seed=2)))
    if kind == "kronecker":
        torch.testing.assert_close(p.T @ p, torch.eye(50), rtol=0, atol=1e-5)


def test_kronecker_columns_are_orthonormal_for_all_sizes():
    for n, dim in ((110, 10), (6058, 101), (50, 49), (7, 2), (5, 1)):
        p = matrix(make_projector("kronecker", n, dim, seed=0))
        torch.testing.assert_close(p.T @ p, torch.eye(dim), rtol=0, atol=1e-5)
        assert (p == 0).all(1).sum() < math.sqrt(n) + 1


def test_hadamard_is_the_matrix():
    h = torch.ones(1, 1)
    for _ in range(3):
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    x = torch.randn(4, 8)
    torch.testing.assert_close(hadamard(x), x @ h / math.sqrt(8))


@pytest.mark.parametrize("case", [c for c in RECORDED if c["mode"] == "dense"], ids=lambda c: str(c["D"]))
def test_dense_entries_are_the_recorded_ones(case):
    found = make_projector("dense", case["D"], case["d"], case["seed"]).project(torch.linspace(-1, 1, case["d"]))
    assert found[:6].tolist() == pytest.approx(case["Pv_first6"], abs=1e-6)
    assert found.norm().item() == pytest.approx(case["Pv_norm"], abs=1e-6)


def test_kronecker_is_pactls_with_its_random_numbers():
    """pactl draws a seed, the two factors with a seed after each, and last the order of the rows."""
    case = next(c for c in RECORDED if c["mode"] == "rdkronqr" and c["D"] == 100)
    generator = torch.Generator().manual_seed(case["seed"])

    def draw_seed():
        torch.randint(high=2**31, size=(1,), generator=generator)

    draw_seed()
    factors = []
    for _ in range(2):
        factors.append(torch.linalg.qr(torch.randn(10, 3, generator=generator))[0])
        draw_seed()
    projector = KroneckerProjector(*factors, torch.randperm(100, generator=generator), 9)
    found = projector.project(torch.linspace(-1, 1, 9))
    assert found[:6].tolist() == pytest.approx(case["Pv_first6"], abs=1e-6)
    assert found.norm().item() == pytest.approx(case["Pv_norm"], abs=1e-6)


def test_sizes_that_do_not_fit_are_refused():
    for dim in (0, 11):
        with pytest.raises(ValueError, match="`dim=.*from 1 to the number of parameters"):
            make_projector("dense", 10, dim)
    with pytest.raises(ValueError, match="too near"):
        make_projector("kronecker", 10, 10)
    with pytest.raises(ValueError, match="`projector='qr'` is not among dense, sparse"):
        make_projector("qr", 10, 2)


def lora_model() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj", "o_proj"]))


def test_training_by_pulled_back_gradients_is_training_of_the_vector():
    """Twenty Adam steps of LoRA through a random subspace, as in SubLoRA, against θ₀ + P w by `functional_call`."""
    ids = torch.randint(0, 37, (8, 10), generator=torch.Generator().manual_seed(1))
    model, twin = lora_model(), lora_model()
    subspace = Subspace(model, 25, seed=137)
    optimizer = subspace.attach(torch.optim.Adam([subspace.vector], lr=0.1))

    names = [name for name, p in twin.named_parameters() if p.requires_grad]
    start = [p.detach().clone() for p in twin.parameters() if p.requires_grad]
    w = torch.zeros(25, requires_grad=True)
    twin_optimizer = torch.optim.Adam([w], lr=0.1)
    for _ in range(20):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()

        moved = subspace.projector(w).split([p.numel() for p in start])
        values = {n: s + m.view_as(s) for n, s, m in zip(names, start, moved, strict=True)}
        twin_loss = functional_call(twin, values, (), {"input_ids": ids, "labels": ids}).loss
        twin_optimizer.zero_grad()
        twin_loss.backward()
        twin_optimizer.step()
        assert loss.item() == pytest.approx(twin_loss.item(), abs=1e-6)
    torch.testing.assert_close(subspace.vector.detach(), w.detach(), rtol=0, atol=2e-6)
    assert loss.item() < 3.61
    subspace.check()


def test_a_subspace_is_trained_by_a_trainer(tmp_path, quiet):
    model = lora_model()
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    subspace = Subspace(model, 25)
    optimizer = subspace.attach(torch.optim.Adam([subspace.vector], lr=0.3))
    ids = [[i % 5] * 6 for i in range(16)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=8, use_cpu=True, report_to="none", save_strategy="no", logging_steps=1
    )
    rows = [{"input_ids": torch.tensor(row), "labels": torch.tensor(row)} for row in ids]
    trainer = Trainer(model, args=args, train_dataset=rows, optimizers=(optimizer, None))
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 8 and losses[-1] < losses[0]
    assert subspace.vector.abs().min() > 0
    subspace.check()
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_a_model_that_was_trained_outside_is_refused():
    model = nn.Linear(20, 5)
    subspace = Subspace(model, 10)
    subspace.write(torch.randn(10))
    subspace.check()
    with torch.no_grad():
        model.weight[0, 0] += 0.1
    with pytest.raises(ValueError, match=r"trained outside of it\. Train by `subspace.attach"):
        subspace.check()
    with pytest.raises(ValueError, match="must have `\\[subspace.vector\\]`"):
        subspace.attach(torch.optim.Adam(model.parameters()))


def test_what_no_file_would_hold_is_refused():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="running statistics of its data in 1 "):
        TrainedVector(network)
    with pytest.raises(ValueError, match="is_trainable=True"):
        TrainedVector(nn.Linear(2, 2).requires_grad_(False))
    network[1].requires_grad_(False)
    assert TrainedVector(network).dim == 20
