"""What answers label noise without a mask, against formulas that are written otherwise."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

from prm_hf.demo import build_demo
from prm_hf.experiments.baselines import (
    Interpolation,
    check_pair_loss,
    drdpo_loss,
    pair_votes,
    set_pair_loss,
    trimmed_loss,
    votes,
)
from prm_hf.experiments.checks import check_data, check_experiment
from prm_hf.experiments.controls import _third_party_optimizer
from prm_hf.experiments.data import Data
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.sft import SFTExperiment
from prm_hf.runs.methods import METHODS, find_method, parse_method

from .comparisons import ON_CPU, folder_of, read, run_dpo_on_files


LOSSES = torch.tensor([0.2, 3.0, 0.7, 0.1, 1.5, 0.9, 0.4, 2.0, 0.3, 0.6], dtype=torch.float64)


@pytest.mark.parametrize(("share", "left_out"), [(0.1, [3.0]), (0.3, [3.0, 2.0, 1.5]), (0.99, sorted(LOSSES)[1:])])
def test_the_largest_losses_are_left_out(share, left_out):
    losses = LOSSES.clone().requires_grad_()
    loss = trimmed_loss(losses, share)
    kept = [x for x in LOSSES.tolist() if x not in [float(y) for y in left_out]]
    assert loss.item() == pytest.approx(np.mean(kept))
    loss.backward()
    assert losses.grad.tolist() == pytest.approx([(x in kept) / len(kept) for x in LOSSES.tolist()])


@pytest.mark.parametrize("b", [0.5, 1.0, 1e4])
def test_dr_dpo(b):
    """Its gradient weighs the pairs by exp(-L/b); with a large b they count alike."""
    losses = LOSSES.clone().requires_grad_()
    loss = drdpo_loss(losses, b)
    assert loss.item() == pytest.approx(-b * math.log(np.mean(np.exp(-LOSSES.numpy() / b))))
    loss.backward()
    weights = np.exp(-LOSSES.numpy() / b)
    assert losses.grad.tolist() == pytest.approx((weights / weights.sum()).tolist())
    assert (abs(loss.item() - LOSSES.mean().item()) < 1e-3) == (b > 100)


def test_losses_are_trimmed_after_the_warm_up():
    args = SimpleNamespace(get_warmup_steps=lambda steps: steps // 5)
    trainer = SimpleNamespace(state=SimpleNamespace(global_step=0, max_steps=10), args=args, pair_loss=None)
    set_pair_loss(trainer, parse_method("trimmed:0.1"))
    found = []
    for trainer.state.global_step in (0, 1, 2, 9):
        found.append(trainer.pair_loss(LOSSES).item())
    assert found == pytest.approx([LOSSES.mean().item()] * 2 + [trimmed_loss(LOSSES, 0.1).item()] * 2)
    trainer.pair_loss = None
    set_pair_loss(trainer, parse_method("adamw"))
    assert trainer.pair_loss is None


@pytest.mark.parametrize(
    ("method", "n", "message"),
    [
        ("trimmed:0.1", 4, "trims none of the 4 pairs of a batch: raise `per_device_train_batch_size`, or the share"),
        ("drdpo:1", 1, "`per_device_train_batch_size` is 1: raise it"),
    ],
)
def test_batches_that_are_too_small(method, n, message):
    experiment = DPOExperiment.parse(["--methods", method, "--per_device_train_batch_size", str(n)])
    with pytest.raises(ValueError, match=f"`{method}` of `methods`: .*{message}"):
        check_experiment(experiment)
    check_pair_loss(parse_method(method), SimpleNamespace(per_device_train_batch_size=16))


@pytest.mark.parametrize("method", ["trimmed:0.2", "drdpo:1", "soft:adamw"])
def test_another_divergence_has_no_such_loss(method):
    arguments = ["--methods", method, "--f_divergence_type", "js_divergence"]
    with pytest.raises(ValueError, match="`f_divergence_type=.*both change the loss of a pair: .*out of `methods`"):
        check_experiment(DPOExperiment.parse(arguments))


def test_a_part_of_the_way():
    model = torch.nn.Linear(3, 2).to(torch.bfloat16)
    model.bias.requires_grad_(False)
    start = {name: p.detach().float().clone() for name, p in model.named_parameters()}
    callback = Interpolation(SimpleNamespace(model=model))
    with torch.no_grad():
        model.weight.add_(1.0)
    end = model.weight.detach().float().clone()
    for factor in (0.25, 3.0, 0.25):  # each of the whole way, and not of the move before
        callback.move(factor)
        expected = ((1 - factor) * start["weight"] + factor * end).to(torch.bfloat16)
        assert torch.equal(model.weight, expected) and torch.equal(model.bias.float(), start["bias"])


@pytest.mark.slow
def test_the_saved_model_is_the_one_that_was_moved(pairs, tmp_path, no_pictures):
    assert run_dpo_on_files(pairs, tmp_path, "--methods", "adamw", "interpolate:0.5") == 0
    folders = [folder_of(tmp_path, f"{name}_lr0.001_seed0") for name in ("adamw", "interpolate0.5")]
    start, whole, half = (load_file(Path(x) / "model.safetensors") for x in (build_demo().model_path, *folders))
    assert any(not torch.equal(start[name], whole[name]) for name in start)
    for name, weight in half.items():
        torch.testing.assert_close(weight, (start[name] + whole[name]) / 2, atol=1e-6, rtol=1e-4)
    assert (folders[0] / "checkpoint-4").is_dir() and not list(folders[1].glob("checkpoint-*"))  # it trained nothing
    adamw, part = (read(folder / "metrics.json") for folder in folders)
    assert part["drift/params_rel"] == pytest.approx(adamw["drift/params_rel"] / 2, rel=1e-3)
    assert part["wall_seconds"] < adamw["wall_seconds"] < part["cost_seconds"] and part["steps"] == adamw["steps"]
    # By a later command the checkpoint of the last step gives another one
    assert run_dpo_on_files(pairs, tmp_path, "--methods", "adamw", "interpolate:2") == 0
    folder = folder_of(tmp_path, "interpolate2_lr0.001_seed0")
    for name, weight in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(weight, 2 * whole[name] - start[name], atol=1e-6, rtol=1e-4)
    assert not list(folder.glob("checkpoint-*")) and read(folder / "metrics.json")["steps"] == adamw["steps"]
    margins = [read(folder / "margins.json") for folder in folders]
    assert margins[0].keys() == margins[1].keys() and margins[0]["heldout"] != margins[1]["heldout"]


def test_lora_has_no_part_of_the_way():
    with pytest.raises(ValueError, match="`interpolate` moves the trained weights back, .* without `use_peft`"):
        DPOExperiment.parse(
            ["--methods", "interpolate:1", "--use_peft", "--dataset_name", "x", "--model_name_or_path", "m", *ON_CPU]
        )


# Of the prompt p a beats b and c, b beats c, and one label says that c beats a; q has nothing to vote on.
ROWS = [("p", "a", "b"), ("p", "a", "c"), ("p", "b", "c"), ("p", "c", "a"), ("q", "c", "a"), ("p", "b", "a")]


def rows_of(triples):
    return Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in triples])


def test_labels_by_vote():
    """Points: a 2 - 2, b 2 - 1, c 1 - 2 in p."""
    groups = [0 if row[0] == "p" else 1 for row in ROWS]
    assert votes(rows_of(ROWS), groups) == [True, False, False, True, False, False]


def test_a_text_of_another_prompt_has_no_vote():
    """A column `group` may hold prompts together."""
    rows = rows_of([("p", "yes", "no"), ("p", "yes", "maybe"), ("q", "no", "yes")])
    assert pair_votes(rows, [0, 0, 0]).tolist() == [1.0, 1.0, 0.0]


def test_there_is_no_vote_on_pairs_by_themselves():
    rows = rows_of([("p", "a", "b"), ("p", "c", "d"), ("q", "a", "b")])
    experiment = DPOExperiment.parse(["--methods", "vote"])
    data = Data("m", "m", "d", rows, rows, {}, train_groups=[0, 0, 1])
    with pytest.raises(ValueError, match="`vote` needs prompts with several pairs .*: leave it out of `methods`"):
        check_data(experiment, data)


def test_casmo():
    """AdamW's step times the share of signal, the mean over a group of m² / v, at least c_min, before calibration."""
    casmo = pytest.importorskip("casmo")
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter(torch.randn(30, generator=generator))
    adamw = torch.optim.AdamW([{"params": [p], "weight_decay": 0.1}], lr=0.01)
    args = SimpleNamespace(adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8, weight_decay=0.1)
    trainer = SimpleNamespace(
        args=args,
        optimizer=adamw,
        get_train_dataloader=lambda: None,
        set_initial_training_values=lambda args, loader: (0, 0, 0, 0, 0, 0, 1000),
    )
    optimizer = _third_party_optimizer(trainer, "casmo")
    assert isinstance(optimizer, casmo.CASMO) and optimizer.param_groups[0]["tau_init_steps"] == 200
    m = v = torch.zeros(30)
    for t in range(1, 4):
        before, p.grad = p.detach().clone(), torch.randn(30, generator=generator) + 1
        m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
        optimizer.step()
        small, large = m.abs().mean() * 10, v.mean() * 10
        signal = m.clamp(-small, small) ** 2
        share = (signal / (signal + (v.clamp(max=large) - signal).clamp(min=1e-8) + 1e-8)).mean().clamp(0.1, 1)
        step = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        torch.testing.assert_close(p.detach(), before * (1 - 0.01 * 0.1) - 0.01 * share * step, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("steps", [10, 400, 100_000])
def test_casmo_is_calibrated_within_a_run(steps):
    pytest.importorskip("casmo")
    adamw = torch.optim.AdamW([torch.zeros(2, requires_grad=True)])
    trainer = SimpleNamespace(
        args=SimpleNamespace(adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-8),
        optimizer=adamw,
        get_train_dataloader=lambda: None,
        set_initial_training_values=lambda args, loader: (0, 0, 0, 0, 0, 0, steps),
    )
    found = _third_party_optimizer(trainer, "casmo").param_groups[0]["tau_init_steps"]
    assert found == {10: 50, 400: 80, 100_000: 500}[steps]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("trimmed:1", r"'trimmed' needs a positive number below 1 behind a colon: the share .* got 'trimmed:1'"),
        ("beta", "'beta' needs a positive number behind a colon: DPO's β, as in `beta:0.3`; got 'beta'"),
        ("vote:2", "'vote' takes no value"),
    ],
)
def test_wrong_names(name, message):
    with pytest.raises(ValueError, match=message):
        parse_method(name)


def test_their_settings():
    adamw = {"optim": "adamw_torch_fused"}
    assert parse_method("beta:0.3").changes() == {**adamw, "beta": 0.3}
    assert parse_method("beta:0.3").own_settings == find_method("beta:0.3").own_settings == {"optim", "beta"}
    assert (
        parse_method("trimmed:0.2").changes()
        == parse_method("drdpo:1").changes()
        == {**adamw, "loss_type": ["sigmoid"]}
    )
    robust = {"prm_preset": "noisy_labels", "loss_type": ["robust"], "label_smoothing": 0.2}
    assert parse_method("prm_robust").changes(0.2) == robust and parse_method("prm_robust").changes(0.0) is None
    assert parse_method("prm_robust").has_mask and not parse_method("prm_robust").has_controls
    of_pairs = {"beta", "trimmed", "drdpo", "prm_robust", "relabel", "soft", "vote"}
    assert of_pairs <= METHODS.keys() and not of_pairs & {*SFTExperiment.known_methods()}
    assert {"filter", "interpolate", "casmo"} <= {*SFTExperiment.known_methods()}
