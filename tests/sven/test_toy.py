"""The authors' toy regression: Sven's held-out error is at most a tenth of Adam's."""

import runpy
from pathlib import Path

import pytest


TOY = Path(__file__).parents[2] / "results" / "sven" / "toy.py"


@pytest.mark.slow
def test_sven_is_ahead_of_adam():
    train = runpy.run_path(str(TOY))["train"]
    adam, sven, kappa1 = (train(method)[-1]["heldout_mse"] for method in ("adam", "sven", "sven_kappa1"))
    assert sven <= adam / 10 and kappa1 <= adam / 10
    assert sven < 3.8e-6  # of the authors' implementation
