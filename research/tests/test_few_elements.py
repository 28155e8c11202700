"""The simulation of results/few_elements.md has the shares that the page has."""

import pytest

from research.few_elements import SETTLED, closed_masks


@pytest.mark.parametrize(("n", "snr", "share"), [(1, 0.1, 0.45), (8, 0.1, 0.05), (8, 0.01, 0.43), (32, 0.0, 0.53)])
def test_masks_are_closed_as_often_as_the_page_says(n, snr, share):
    closed = closed_masks(n, snr, tensors=1000)
    assert closed.shape == (200, 1000) and closed[0].all()  # at the first step nothing is known
    assert closed[SETTLED:].double().mean().item() == pytest.approx(share, abs=0.03)
