"""The authors' toy regression: Sven's held-out error is at most a tenth of Adam's, by the median of three starts."""

import runpy
from pathlib import Path

import pytest


TOY = Path(__file__).parents[2] / "results" / "sven" / "toy.py"


@pytest.mark.slow
def test_sven_is_ahead_of_adam():
    toy = runpy.run_path(str(TOY))
    adam, sven, kappa1 = (
        toy["medians"]([toy["train"](method, seed) for seed in (42, 43, 44)])[-1]
        for method in ("adam", "sven", "sven_kappa1")
    )
    assert sven <= adam / 10 and kappa1 <= adam / 10
    assert sven < 3.8e-6  # of the authors' implementation
