"""Classifiers of digits: trained to one loss and measured; the recipe that does so."""

import json

import pytest
import torch

from prm_hf.diagnostics import digits
from prm_hf.experiments.dimension_curves import main


@pytest.fixture
def few(monkeypatch):
    """Sixty digits to train on."""
    (pixels, classes), test = digits._digits()
    monkeypatch.setattr(digits, "_digits", lambda: ((pixels[:60], classes[:60]), test))


def test_digits_are_held_out():
    (pixels, classes), (others, _) = digits._digits()
    assert pixels.shape == (1000, 1, 8, 8) and others.shape == (797, 1, 8, 8)
    assert pixels.min() == -1 and pixels.max() == 1 and classes.unique().tolist() == list(range(10))


@pytest.mark.parametrize("model", ["mlp", pytest.param("vit", marks=pytest.mark.slow)])
def test_a_grid_has_one_training_loss(few, model):
    state = torch.get_rng_state()
    found = digits.width_depth_grid(model, widths=[4, 8], depths=[1], train_loss=0.3, alphas=[1, 100])
    assert torch.equal(state, torch.get_rng_state())
    assert [(each.width, each.depth) for each in found] == [(4, 1), (8, 1)]
    for each in found:
        assert 0.2 < each.train_loss <= 0.3 and each.steps > 5
        assert each.lowers[0] <= each.dimensions[0] <= each.uppers[0] <= min(each.n_params, 60 * 9)
        assert each.dimensions[0] > each.dimensions[1]
    correlations = digits.rank_correlations(found)
    assert {*correlations} == {"α = 1", "α = 100", "parameters"} and {
        round(abs(c), 6) for c in correlations.values()
    } == {1}


def test_a_grid_says_what_does_not_train(few):
    with pytest.raises(ValueError, match="After `max_steps=3` the training loss is .*, above `train_loss=0.01`"):
        digits.width_depth_grid(widths=[4], depths=[1], max_steps=3)
    with pytest.raises(ValueError, match="`model` is 'cnn': it must be one of mlp, vit"):
        digits.width_depth_grid("cnn")


@pytest.mark.slow
def test_the_recipe_writes_its_numbers(few, tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--widths", "4", "8", "--depths", "1", "--train_loss", "0.3"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "The test error is largest at 200 features" in shown and "Rank correlation" in shown
    assert (tmp_path / "double_descent.png").stat().st_size > 1000
    found = json.loads((tmp_path / "double_descent.json").read_text())
    assert found["widths"][found["test_error"].index(max(found["test_error"]))] == 200
    assert len(json.loads((tmp_path / "grid_mlp.json").read_text())["classifiers"]) == 2
    assert {*json.loads((tmp_path / "contraction.json").read_text())} == {"sizes", "contraction", "dimension"}
