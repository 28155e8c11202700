"""What a comparison is found to show: which cases hold, and the numbers in them, but not their words."""

import json

import pytest

from prm_hf.compare import compare_runs, format_comparison, plots
from prm_hf.compare.contrasts import BEST_LR, EQUAL_KL
from prm_hf.compare.findings import CONCLUSIONS, REMARKS

from .compared_runs import ACCURACY, contrast, write_grid, write_run


MANY = (0, 1, 2)


def conclusion(folder):
    """The key of the case that sums up, and its sentence."""
    return next(iter(compare_runs(folder).findings.items()))


@pytest.mark.parametrize(
    ("expected", "grid"),
    [
        ("level", {"seeds": MANY, "prm_gain": 0.0}),
        ("loses", {"seeds": MANY, "prm_gain": -0.1}),
        ("mean_step", {"seeds": MANY, "prm_gain": 0.1}),  # without its control
        ("mean_step", {"seeds": MANY, "prm_gain": 0.1, "constant": 0.85}),  # which is as good
        ("ahead", {"seeds": MANY, "prm_gain": 0.1, "constant": 0.75}),
        (
            "more_tries",
            {"seeds": (0, 1), "prm_gain": 0.1, "prm": ("prm_per_tensor", "prm_debiased"), "constant": 0.75},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_conclusions(tmp_path, expected, grid):
    write_grid(tmp_path, **grid)
    key, sentence = conclusion(tmp_path)
    assert key == expected and sentence.startswith("PRM per_tensor at 1e-2")
    accuracy = 0.75 + grid["prm_gain"]
    assert f"{accuracy:.3f}" in sentence and f"{grid['prm_gain']:+.3f} [" in sentence
    assert ("against constant q" in sentence) == ("constant" in grid)


def test_a_rival_that_is_as_good(tmp_path):
    for seed in MANY:
        for lr, kl, accuracy in ((1e-4, 0.1, 0.80), (1e-3, 0.4, 0.85), (1e-2, 1.6, 0.75)):
            write_run(tmp_path, "adamw_eps:0.1", lr, seed, accuracy, kl)
    write_grid(tmp_path, seeds=MANY, prm_gain=0.1, constant=0.75)
    key, sentence = conclusion(tmp_path)
    assert key == "rival" and "AdamW eps 0.1" in sentence


def write_method(root, method, gain, seeds=MANY):
    """At the KLs of AdamW in `write_grid`, more accurate by `gain`."""
    for seed in seeds:
        for lr, kl, accuracy in ((1e-4, 0.1, 0.70), (1e-3, 0.4, 0.75), (1e-2, 1.6, 0.65)):
            write_run(root, method, lr, seed, accuracy + gain, kl)


@pytest.mark.parametrize(
    ("rivals", "expected"),
    [
        ({"adamw_eps:10": 0.1}, "ahead of AdamW, level with AdamW eps 10"),
        ({"adamw_eps:10": 0.2}, "ahead of AdamW, behind AdamW eps 10"),
        ({"adamw_eps:10": 0.0}, "ahead of AdamW and AdamW eps 10"),
        (
            {"adamw_eps:10": 0.1, "cdpo": 0.0, "robust": 0.2},
            "ahead of AdamW and cDPO, level with AdamW eps 10, behind rDPO (robust)",
        ),
    ],
)
def test_every_opponent_is_named(tmp_path, rivals, expected):
    write_grid(tmp_path, seeds=MANY, prm_gain=0.1, constant=0.75)
    for method, gain in rivals.items():
        write_method(tmp_path, method, gain)
    key, sentence = conclusion(tmp_path)
    assert f"PRM is {expected}" in sentence and key == ("ahead" if list(rivals.values()) == [0.0] else "rival")


def test_an_opponent_without_a_shared_seed_is_named_too(tmp_path):
    write_grid(tmp_path, seeds=MANY, prm_gain=0.1, constant=0.75)
    write_method(tmp_path, "adamw_eps:10", 0.0, seeds=(7,))
    assert "ahead of AdamW, not known to be ahead of AdamW eps 10" in conclusion(tmp_path)[1]


def test_ahead_in_one_of_the_two_comparisons(tmp_path):
    """PRM is ahead of AdamW's best rate and has no point on AdamW's curve."""
    write_run(tmp_path, "adamw", 1e-3, 0, 0.6, 0.4)
    write_run(tmp_path, "prm_per_tensor", 1e-3, 0, 0.8, 0.02)
    assert conclusion(tmp_path)[0] == "not_shown"


def test_every_case_has_a_key_of_its_own():
    keys = [case.key for case in (*CONCLUSIONS, *REMARKS)]
    assert len(set(keys)) == len(keys)


def test_remarks_that_every_comparison_needs(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), prm_gain=0.02, constant=0.75)
    write_run(tmp_path, "cdpo", 1e-3, 0, 0.6, 0.3)
    comparison = compare_runs(tmp_path)
    found = comparison.findings
    expected = {"same_rate", "equal_kl", "picked", "unequal_grids", "seeds"}
    assert expected <= set(found) and "one_seed" not in found
    known = sum(1 for c in comparison.contrasts if c.known)
    assert f" {known} intervals" in found["many_intervals"]
    assert "4.0 times" in found["same_rate"]  # of the KL: 1.6 against 0.4
    assert "3 of PRM per_tensor against 1 of cDPO" in found["unequal_grids"]
    assert found["seeds"].startswith("1 to 2 seeds")


def test_one_seed(tmp_path):
    write_grid(tmp_path, prm_gain=0.1)
    found = compare_runs(tmp_path).findings
    assert "one_seed" in found and "seeds" not in found


def test_more_methods_than_the_baseline_has_rates(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), prm_gain=0.1, prm=("prm_per_tensor", "prm_debiased"), constant=0.75)
    sentence = conclusion(tmp_path)[1]
    assert "of 6" in sentence and "6 tries and AdamW 3" in sentence


def test_best_at_the_edge_of_its_grid(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    write_run(tmp_path, "adamw", 1e-2, 0, 0.6, 1.6)
    write_run(tmp_path, "prm_per_tensor", 1e-3, 0, 0.7, 0.5)
    found = compare_runs(tmp_path).findings
    assert "AdamW (smallest, 1e-3)" in found["edge"] and "PRM" not in found["edge"]


@pytest.mark.parametrize("gain", [-0.1, -0.02, -0.01, 0.0, 0.01, 0.02, 0.1])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_no_winner_without_an_interval_off_zero(tmp_path, gain, seeds):
    write_grid(tmp_path, seeds=seeds, prm_gain=gain)
    comparison = compare_runs(tmp_path)
    for c in comparison.contrasts:
        low, high = c.interval.low, c.interval.high
        word = "more accurate" if low > 0 else "less accurate" if high < 0 else "within noise"
        cells = [cells for cells in format_comparison(comparison).splitlines() if cells.startswith(c.left.name)]
        assert any(line.endswith(word) and f"[{low:+.3f}, {high:+.3f}]" in line for line in cells)
    lead = [contrast(comparison, kind) for kind in (BEST_LR, EQUAL_KL)]
    ahead = all(c.interval.low > 0 for c in lead)
    assert (conclusion(tmp_path)[0] in ("more_tries", "mean_step", "rival", "ahead")) == ahead


def test_accuracy_that_contradicts_its_margins(tmp_path):
    name = write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    (tmp_path / name / "metrics.json").write_text(json.dumps({ACCURACY: 0.9}))
    assert "0.900, its margins.json 0.700" in compare_runs(tmp_path).findings["run_notes"]


def test_comparisons_without_prm_or_adamw(tmp_path):
    write_run(tmp_path, "cdpo", 1e-3, 0, 0.7, 0.4)
    assert conclusion(tmp_path)[0] == "without" and "PRM" in conclusion(tmp_path)[1]
    write_run(tmp_path, "hoelder", 1e-3, 0, 0.8, 0.4)
    comparison = compare_runs(tmp_path)
    assert contrast(comparison, BEST_LR, "hoelder").interval.mean == pytest.approx(0.1)
    write_run(tmp_path, "prm_debiased", 1e-3, 0, 0.7, 0.4)
    assert conclusion(tmp_path)[0] == "without" and "AdamW" in conclusion(tmp_path)[1]


def test_runs_without_accuracy(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4, margins=False, drop=(ACCURACY,))
    comparison = compare_runs(tmp_path)
    assert next(iter(comparison.findings)) == "no_accuracy" and ACCURACY in comparison.statements[0]
    assert plots.plot_frontier(comparison) is None
