"""How well scores tell noisy rows: against scikit-learn, and counted by hand."""

import math

import numpy as np
import pytest

from prm_hf.metrics import suspect_metrics


@pytest.mark.parametrize("digits", [1, 6], ids=["many ties", "no ties"])
def test_the_metrics_are_those_of_scikit_learn(digits):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    noisy = rng.random(200) < 0.3
    scores = np.round(rng.normal(size=200) + noisy, digits)
    assert suspect_metrics(scores, noisy) == pytest.approx(
        {
            "suspects/auc": metrics.roc_auc_score(noisy, scores),
            "suspects/average_precision": metrics.average_precision_score(noisy, scores),
        }
    )


def test_counted_by_hand():
    """Of the four pairs of a noisy and another row one is tied, and none is in order."""
    found = suspect_metrics([3.0, 2.0, 2.0, 1.0], [False, True, False, True])
    assert found == {
        "suspects/auc": pytest.approx(0.5 / 4),
        "suspects/average_precision": pytest.approx((1 / 3 + 1 / 2) / 2),
    }
    assert suspect_metrics([0.0] * 4, [True, False, False, True])["suspects/auc"] == 0.5


def test_where_there_is_nothing_to_tell():
    assert suspect_metrics([1.0, 2.0], [True, True]) == suspect_metrics([1.0, 2.0], [False, False]) == {}
    assert all(map(math.isnan, suspect_metrics([1.0, math.nan], [True, False]).values()))
    with pytest.raises(ValueError, match=r"one entry a row, got shapes \(2,\), \(3,\)"):
        suspect_metrics([1.0, 2.0], [True, False, False])
