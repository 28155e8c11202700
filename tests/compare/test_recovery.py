"""Recovery: of what wrong labels cost AdamW, the share that a method gives back."""

import json

import numpy as np
import pytest

from prm_hf.compare import compare_runs, format_comparison
from prm_hf.compare.contrasts import BEST_LR, FRONTIER
from prm_hf.compare.statistics import bootstrap_interval, ratio_interval

from .compared_runs import write_grid, write_run
from .test_findings import write_method


def simulated(rng, ratio, seeds=4, groups=50):
    """Differences of a method and of clean labels from AdamW, [seeds, examples], and the groups of examples."""
    group = np.repeat(np.arange(groups), rng.geometric(1 / 4, groups))

    def noise(scale):
        of_rows = rng.normal(0, 4 * scale, (seeds, group.size))
        return rng.normal(0, scale / 4, (seeds, 1)) + rng.normal(0, 2 * scale, groups)[group] + of_rows

    shared = noise(0.05)  # that of AdamW is in both
    return ratio * 0.2 + shared + noise(0.05), 0.2 + shared + noise(0.05), group


@pytest.mark.slow
def test_the_interval_of_a_ratio_covers_what_it_says():
    rng, misses, repeats = np.random.default_rng(0), 0, 250
    for repeat in range(repeats):
        found = ratio_interval(*simulated(rng, 0.6), seed=repeat)
        assert found.low < found.mean < found.high
        misses += not found.low <= 0.6 <= found.high
    assert 0.015 <= misses / repeats <= 0.09


def test_the_interval_of_a_ratio_meets_0_and_1_where_those_of_the_differences_do():
    rng, outcomes = np.random.default_rng(1), set()
    for ratio in np.linspace(-0.3, 1.3, 25):
        gain, cost, groups = simulated(rng, ratio)
        found = ratio_interval(gain, cost, groups)
        for at in (0, 1):
            difference = bootstrap_interval(gain - at * cost, groups)
            assert (found.low > at, found.high < at) == (difference.low > 0, difference.high < 0)
            outcomes.add((at, found.low > at, found.high < at))
    assert len(outcomes) >= 4


def test_a_ratio_of_equal_numbers_and_of_a_multiple():
    cost = np.random.default_rng(2).normal(1, 0.5, (3, 80))
    assert ratio_interval(cost, cost).mean == pytest.approx(1)
    half = ratio_interval(-0.5 * cost, -cost)
    assert (half.mean, half.low, half.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-5)
    turned = ratio_interval(-0.5 * cost, cost)
    assert turned.mean == pytest.approx(-0.5)
    shifted = ratio_interval(cost + 0.25, cost)  # what is left over at 1 is a constant
    assert shifted.low < shifted.mean == pytest.approx(1 + 0.25 / cost.mean()) and np.isfinite(shifted.high)
    pairs = np.array([[1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]])
    whole = ratio_interval(pairs, pairs)
    assert (whole.low, whole.mean, whole.high) == (1, 1, 1)


def test_there_is_no_ratio_to_what_may_be_nothing():
    cost = np.random.default_rng(3).normal(0, 1, (3, 80))
    with pytest.raises(ValueError, match="`denominator` must be known not to be 0"):
        ratio_interval(np.ones((3, 80)), cost)


def write_experiment(root, clean=(0.1, 0.1, 0.1)):
    """Three seeds; PRM gains .06 beside AdamW, AdamW with a larger eps .02, and clean labels this in each seed."""
    write_grid(root, seeds=(0, 1, 2), prm_gain=0.06)
    write_method(root, "adamw_eps:10", 0.02, seeds=(0, 1, 2))
    for seed, gain in enumerate(clean):
        write_method(root, "adamw_clean", gain, seeds=(seed,))


def test_recovery_of_every_method_but_adamw(tmp_path):
    write_experiment(tmp_path)
    comparison = compare_runs(tmp_path)
    found = {(r.kind, r.row.method): r for r in comparison.recoveries}
    methods = ("adamw_eps:10", "prm_per_tensor")
    assert set(found) == {(kind, method) for kind in (BEST_LR, FRONTIER) for method in methods}
    best = found[BEST_LR, "prm_per_tensor"]
    assert best.ratio.mean == pytest.approx(0.6) and best.ratio.low < 0.6 < best.ratio.high
    assert (best.gain.mean, best.cost.mean) == (pytest.approx(0.06), pytest.approx(0.1))
    assert found[BEST_LR, "adamw_eps:10"].ratio.mean == pytest.approx(0.2)
    at_kl = found[FRONTIER, "prm_per_tensor"]
    assert at_kl.span == pytest.approx((0.2, 0.8))  # of all three curves
    assert at_kl.ratio.mean == pytest.approx(at_kl.gain.mean / at_kl.cost.mean)
    assert comparison.recovery(BEST_LR, best.row) is best


@pytest.mark.slow
def test_recovery_in_the_reports(tmp_path):
    write_experiment(tmp_path)
    comparison = compare_runs(tmp_path)
    points = comparison.verdict[1]
    assert "gives back 6.0 of the 10.0 points" in points and points.endswith("AdamW eps 10 2.0.")
    table = format_comparison(comparison)
    (line,) = [x for x in table.splitlines() if x.startswith("PRM per_tensor  0.60 [")]
    assert ", KL 0.2-0.8" in line and "recovery of" in table and max(map(len, table.splitlines())) <= 400
    assert "  recovery" not in table and "  recovery" in format_comparison(comparison, verbose=True)
    for format in ("markdown", "html"):
        assert "recovery of" in format_comparison(comparison, format)
    data = json.loads(format_comparison(comparison, "json"))["recoveries"]
    (prm,) = [x for x in data if (x["kind"], x["method"]) == (BEST_LR, "prm_per_tensor")]
    assert prm["ratio"]["mean"] == pytest.approx(0.6) and prm["cost"]["mean"] == pytest.approx(0.1)
    assert prm["missing"] == "" and prm["kl"] is None


@pytest.mark.parametrize("clean", [(0, 0, 0), (0.05, -0.02, 0.03), (-0.1, -0.1, -0.1)])
def test_no_recovery_of_nothing(tmp_path, clean):
    write_experiment(tmp_path, clean=clean)
    comparison = compare_runs(tmp_path)
    assert comparison.recoveries and all(r.ratio is None for r in comparison.recoveries)
    best = comparison.recovery(BEST_LR, comparison.methods("PRM")["prm_per_tensor"][0])
    assert "wrong labels are not known to cost AdamW anything" in best.text or "no interval" in best.text
    assert best.gain.mean == pytest.approx(0.06) and best.cost.mean == pytest.approx(np.mean(clean))


def test_why_there_is_no_recovery(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), prm_gain=0.06)
    assert not compare_runs(tmp_path).recoveries
    assert "recovery of" not in format_comparison(compare_runs(tmp_path), "markdown")
    write_run(tmp_path, "adamw_clean", 1e-3, 7, 0.9, 0.4)
    for recovery in compare_runs(tmp_path).recoveries:
        assert recovery.missing in ("no shared seed", "no seed with two runs of all 3")
        assert recovery.text.startswith("unknown: ")


def test_columns_of_what_some_runs_have(tmp_path):
    write_grid(tmp_path, seeds=(0, 1))
    assert "suspects" not in format_comparison(compare_runs(tmp_path), verbose=True)
    for folder in tmp_path.iterdir():
        metrics = json.loads((folder / "metrics.json").read_text())
        metrics |= {"suspects/auc": 0.82, "suspects/average_precision": 0.61}
        metrics |= {"cost_seconds": 36.0} if folder.name.startswith("prm") else {}
        (folder / "metrics.json").write_text(json.dumps(metrics))
    comparison = compare_runs(tmp_path)
    assert "suspects" not in format_comparison(comparison)
    lines = format_comparison(comparison, verbose=True).splitlines()
    start = next(i for i, line in enumerate(lines) if "suspects AUC" in line)
    assert lines[start].split() == ["method", "lr", "suspects", "AUC", "suspects", "AP", "cost", "s"]
    assert lines[start + 2].split() == ["AdamW", "1e-4", "0.820", "0.610", "12.0"]  # by default its wall time
    assert lines[start + 5].split()[-1] == "36.0"
    for format in ("markdown", "html"):
        assert "suspects AUC" in format_comparison(comparison, format)
