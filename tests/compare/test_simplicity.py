"""Effective dimension and certified accuracy in the tables of a comparison."""

import json

import numpy as np
import pytest

from prm_hf.compare import compare_runs, format_comparison
from prm_hf.compare.contrasts import BEST_LR
from prm_hf.compare.simplicity import EQUAL_ACCURACY, EQUAL_LOSS, mean_of
from prm_hf.compare.statistics import bootstrap_interval
from prm_hf.runs.schema import BOUND, CERTIFIED, EFFECTIVE_DIMENSION, FITTED_LOSS

from .compared_runs import write_run


SEEDS = (0, 1, 2)
SPREAD = {"adamw": 1, "adamw_eps:10": 2, "prm_noisy_labels": 4}  # of the seeds
# By method at each learning rate: accuracy, loss of training, effective dimension
CURVES = {
    "adamw": [(1e-4, 0.60, 0.60, 100.0), (1e-3, 0.70, 0.50, 200.0), (1e-2, 0.65, 0.40, 900.0)],
    "adamw_eps:10": [(1e-4, 0.60, 0.60, 90.0), (1e-3, 0.74, 0.50, 180.0), (1e-2, 0.65, 0.40, 900.0)],
    "prm_noisy_labels": [(1e-3, 0.62, 0.60, 50.0), (1e-2, 0.72, 0.45, 150.0), (1e-1, 0.60, 0.30, 700.0)],
}


@pytest.fixture
def write(tmp_path):
    def of(curves=CURVES, seeds=SEEDS, certified=None, without=()):
        for method, points in curves.items():
            for seed in seeds:
                for lr, accuracy, loss, dimension in points:
                    name = write_run(tmp_path, method, lr, seed, accuracy, lr)
                    numbers = {EFFECTIVE_DIMENSION: dimension + SPREAD[method] * (seed - 1), FITTED_LOSS: loss}
                    if certified is not None:
                        numbers |= {CERTIFIED: certified + accuracy / 10, BOUND: 1 - certified - accuracy / 10}
                    file = tmp_path / name / "metrics.json"
                    known = json.loads(file.read_text()) | (numbers if method not in without else {})
                    file.write_text(json.dumps(known))
        return compare_runs(tmp_path)

    return of


def found(comparison, measure=EFFECTIVE_DIMENSION):
    return {(c.left.method, c.right.method, c.kind): c for c in comparison.simplicity if c.measure == measure}


def test_differences_are_at_the_best_rates_and_at_levels_that_both_reach(write):
    comparison = write()
    contrasts = found(comparison)
    assert {key[:2] for key in contrasts} == {
        ("adamw_eps:10", "adamw"),
        ("prm_noisy_labels", "adamw"),
        ("prm_noisy_labels", "adamw_eps:10"),  # the most accurate AdamW
    }
    expected = {
        ("adamw", BEST_LR): 150 - 200,
        # At .70, the most that AdamW reaches; PRM is between .62 and .72 there
        ("adamw", EQUAL_ACCURACY): (50 + 100 * 0.8) - 200,
        # At a loss of .40, the least that AdamW reaches; PRM is a third of the way from .45 to .30
        ("adamw", EQUAL_LOSS): (150 + 550 / 3) - 900,
        ("adamw_eps:10", BEST_LR): 150 - 180,
        ("adamw_eps:10", EQUAL_ACCURACY): 150 - (90 + 90 * 12 / 14),  # at .72
    }
    for (rival, kind), difference in expected.items():
        c = contrasts["prm_noisy_labels", rival, kind]
        assert c.interval.mean == pytest.approx(difference) and c.interval.seeds == 3 and not c.missing
        assert c.p_holm >= c.interval.p_value
    top = next(row for row in comparison.rows if row.method == "adamw" and row.learning_rate == 1e-3)
    assert mean_of(top, EFFECTIVE_DIMENSION) == bootstrap_interval(np.array([[199.0], [200.0], [201.0]]))


def test_nothing_is_extrapolated_and_nothing_made_up(write):
    far = {"adamw": [(1e-3, 0.7, 0.5, 200.0)], "prm_noisy_labels": [(1e-3, 0.8, 0.3, 150.0)]}
    contrasts = found(write({**far, "adamw_eps:10": [(1e-3, 0.6, 0.5, 1.0)]}, without=["adamw_eps:10"]))
    assert {key[:2] for key in contrasts} == {("prm_noisy_labels", "adamw")}
    for kind in (EQUAL_ACCURACY, EQUAL_LOSS):
        c = contrasts["prm_noisy_labels", "adamw", kind]
        assert c.interval is None and c.missing == "no level that both reach" and np.isnan(c.p_holm)


def test_runs_without_such_numbers_have_no_such_columns(write):
    comparison = write(without=[*CURVES])
    assert comparison.simplicity == []
    texts = [format_comparison(comparison, form, verbose=True) for form in ("table", "json")]
    assert not any(word in text for text in texts for word in ("eff. dim.", "certified", "simplicity"))


def test_every_format_has_them(write):
    comparison = write(certified=0.45)
    assert {c.measure for c in comparison.simplicity} == {EFFECTIVE_DIMENSION, CERTIFIED}
    for form in ("table", "markdown", "html"):
        text = " ".join(format_comparison(comparison, form, verbose=True).replace("\\", "").split())
        for words in ("eff. dim.", "certified", "equal accuracy", "-50 [-57.5, -42.5]", "labelled as in training"):
            assert words in text, (form, words)
    entry = next(e for e in json.loads(format_comparison(comparison, "json"))["simplicity"] if e["kind"] == BEST_LR)
    assert entry["measure"] == EFFECTIVE_DIMENSION and entry["left"].startswith("AdamW eps") and entry["seeds"] == 3
