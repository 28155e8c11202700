"""Rows and contrasts of finished runs whose differences are known."""

import json

import numpy as np
import pytest

from prm_hf.compare import compare_runs, format_comparison, statistics
from prm_hf.compare.contrasts import (
    BEST_LR,
    CONTROLLED,
    EQUAL_KL,
    EQUAL_KL_MEAN,
    FRONTIER,
    SAME_LR,
)
from prm_hf.compare.rows import format_rate

from .compared_runs import ACCURACY, PAIRS, contrast, write_grid, write_run


def test_rows_are_methods_at_learning_rates(tmp_path):
    write_grid(tmp_path, seeds=(0, 1, 2), constant=0.74)
    comparison = compare_runs(tmp_path)
    assert [(row.method, len(row.runs)) for row in comparison.rows] == [
        *[("adamw", 3)] * 3,
        *[("prm_per_tensor", 3)] * 3,
        ("constant_q", 3),  # one row, though each seed has its own learning rate
    ]
    constant = comparison.rows[-1]
    assert constant.source.learning_rate == 1e-2 and constant.source.method == "prm_per_tensor"
    assert constant.learning_rate == pytest.approx(1e-2 * 0.051)
    assert constant.mean("mean_q")[0] == pytest.approx(0.051)
    assert comparison.rows[0].accuracy_error()[1] == "seeds"


def test_differences_have_their_known_values(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), prm_gain=0.05, constant=0.76)
    comparison = compare_runs(tmp_path)
    assert contrast(comparison, SAME_LR).interval.mean == pytest.approx(0.80 - 0.65)
    assert contrast(comparison, BEST_LR).interval.mean == pytest.approx(0.80 - 0.75)
    assert contrast(comparison, EQUAL_KL).interval.mean == pytest.approx(0.80 - 0.75)
    assert contrast(comparison, CONTROLLED).interval.mean == pytest.approx(0.80 - 0.76)
    # KL 0.2 lies half way (in log) between AdamW at 0.1 and constant q... which is AdamW at KL 0.3
    at_02 = 0.70 + 0.06 * np.log(2) / np.log(3)
    mean = np.mean([0.775 - at_02, 0.80 - 0.75, 0.75 - 0.70])
    assert contrast(comparison, EQUAL_KL_MEAN).interval.mean == pytest.approx(mean)
    assert all(c.interval.seeds == 2 and c.interval.examples == PAIRS for c in comparison.contrasts)


def test_frontier_area_has_its_known_value(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), prm_gain=0.05)
    (area,) = [c for c in compare_runs(tmp_path).contrasts if c.kind == FRONTIER]
    assert area.left.method == "prm_per_tensor" and area.against == "AdamW, frontier area, KL 0.2-0.8"
    # both at .725 + .05, .75 + .05, .70 + .05 and, on the straight lines, .725, .75, .70
    assert area.interval.mean == pytest.approx(0.05) and (area.interval.seeds, area.interval.examples) == (2, PAIRS)
    assert "+0.050" in format_comparison(compare_runs(tmp_path))


def test_frontier_area_against_the_strongest_rival(tmp_path):
    write_grid(tmp_path, seeds=(0, 1))
    for method, gain in (("adamw_eps:0.1", 0.03), ("cdpo", -0.02)):
        for seed in (0, 1):
            for lr, kl, accuracy in ((1e-4, 0.1, 0.70), (1e-3, 0.4, 0.75), (1e-2, 1.6, 0.65)):
                write_run(tmp_path, method, lr, seed, accuracy + gain, kl)
    comparison = compare_runs(tmp_path)
    assert [row.method for row in comparison.baseline] == ["adamw"] * 3
    areas = {(c.left.method, c.against.split(",")[0]): c for c in comparison.contrasts if c.kind == FRONTIER}
    means = {key: round(c.interval.mean, 6) for key, c in areas.items()}
    assert means == {
        ("prm_per_tensor", "AdamW"): 0,
        ("adamw_eps:0.1", "AdamW"): 0.03,
        ("cdpo", "AdamW"): -0.02,
        ("prm_per_tensor", "AdamW eps 0.1"): -0.03,
    }
    # Holm's correction is over all contrasts, and the findings say how many differences are left
    known = [c for c in comparison.contrasts if c.interval and c.interval.known]
    adjusted = statistics.holm([c.interval.p_value for c in known])
    assert [c.p_holm for c in known] == adjusted
    kept = sum(p < 0.05 for p in adjusted)
    assert f" {kept} still" in comparison.findings["many_intervals"]
    assert any(c.kind == BEST_LR and c.right.method == "adamw_eps:0.1" for c in comparison.contrasts)


def test_controls_with_an_eps_are_no_points_of_adamws_curve(tmp_path):
    """constant q of PRM with a larger eps is AdamW with that eps: AdamW's curve stays as it is without it."""
    write_grid(tmp_path, seeds=(0, 1), prm=("prm_debiased_eps:10",), constant=0.9)
    comparison = compare_runs(tmp_path)
    area = contrast(comparison, FRONTIER, "prm_debiased_eps:10")
    assert area.interval.mean == pytest.approx(0.0, abs=0.004)
    assert contrast(comparison, CONTROLLED, "prm_debiased_eps:10").against.startswith("constant q (AdamW eps 10 at ")
    assert (
        comparison.verdict[0].startswith("No sign of it") and "level with AdamW at equal KL" in comparison.verdict[0]
    )


def test_frontier_area_that_cannot_be_had(tmp_path):
    for lr, kl in ((1e-3, 0.4), (1e-2, 1.6)):
        write_run(tmp_path, "adamw", lr, 0, 0.7, kl)
        write_run(tmp_path, "prm_per_tensor", lr, 0, 0.7, kl / 100)
        write_run(tmp_path, "cdpo", lr, 3, 0.7, kl)
    areas = {c.left.method: c.missing for c in compare_runs(tmp_path).contrasts if c.kind == FRONTIER}
    assert areas == {
        "prm_per_tensor": "no drift/kl range that both cover",
        "cdpo": "no seed with two runs of both",
    }


@pytest.mark.parametrize(("factor", "known"), [(1.0, None), (1.001, False), (1.9, False), (2.1, True)])
def test_an_area_over_hardly_any_range_of_kl_decides_nothing(tmp_path, factor, known):
    """Both curves share KLs from 1 to `factor`: below 2 there is no p-value, however large the difference."""
    for seed in (0, 1, 2):
        for lr, kl in ((1e-3, 0.1), (1e-2, factor)):
            write_run(tmp_path, "adamw", lr, seed, 0.6, kl)
        for lr, kl in ((1e-3, 1.0), (1e-2, 10.0)):
            write_run(tmp_path, "prm_per_tensor", lr, seed, 0.8, kl)
    area = contrast(compare_runs(tmp_path), FRONTIER)
    if known:
        assert area.known and area.interval.p_value < 0.05 and area.p_holm < 0.05 and area.clear
    elif known is None:
        assert area.interval is None and area.missing == "no drift/kl range that both cover"
    else:
        assert area.interval.mean == pytest.approx(0.2) and not area.known and not area.clear
        assert np.isnan([area.interval.p_value, area.p_holm]).all()
        assert area.verdict == f"KLs up to {factor:.2f}-fold apart, too few"


def test_the_best_adamw_is_a_rival_beside_a_stronger_loss(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), prm_gain=0.1)
    for method, gain in (("adamw_eps:10", 0.05), ("cdpo", 0.2), ("adamw_eps:3", 0.01)):
        for seed in (0, 1):
            for lr, kl, accuracy in ((1e-4, 0.1, 0.70), (1e-3, 0.4, 0.75), (1e-2, 1.6, 0.65)):
                write_run(tmp_path, method, lr, seed, accuracy + gain, kl)
    areas = [c for c in compare_runs(tmp_path).contrasts if c.kind == FRONTIER and c.left.method == "prm_per_tensor"]
    found = [(c.right and c.right.method, round(c.interval.mean, 6)) for c in areas]
    assert found == [(None, 0.1), ("cdpo", -0.1), ("adamw_eps:10", 0.05)]


def test_kl_outside_the_range_is_not_extrapolated(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    write_run(tmp_path, "adamw", 1e-2, 0, 0.6, 1.6)
    write_run(tmp_path, "prm_per_tensor", 1e-3, 0, 0.75, 0.02)
    comparison = compare_runs(tmp_path)
    matched = contrast(comparison, EQUAL_KL)
    assert matched.interval is None and matched.missing == "no AdamW drifts so little"
    assert "AdamW lacks smaller rates" in matched.note and matched.note in comparison.findings["contrast_notes"]
    assert matched.text == "unknown" and comparison.answer == "no_area"


def test_without_margins_only_seeds_give_an_interval(tmp_path):
    for seed in (0, 1, 2):
        write_run(tmp_path / "many", "adamw", 1e-3, seed, 0.70 + 0.01 * seed, 0.4, margins=False)
        write_run(tmp_path / "many", "prm_per_tensor", 1e-3, seed, 0.72 + 0.02 * seed, 0.4)
    interval = contrast(compare_runs(tmp_path / "many"), BEST_LR).interval
    assert interval.mean == pytest.approx(0.03) and interval.examples == 1 and interval.known
    write_run(tmp_path / "one", "adamw", 1e-3, 0, 0.70, 0.4, margins=False)
    write_run(tmp_path / "one", "prm_per_tensor", 1e-3, 0, 0.80, 0.4, margins=False)
    comparison = compare_runs(tmp_path / "one")
    assert not contrast(comparison, BEST_LR).interval.known
    assert "more accurate" not in format_comparison(comparison) and comparison.answer == "no_area"


def test_only_shared_seeds_are_compared(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "adamw", 1e-3, seed, 0.7, 0.4)
    write_run(tmp_path, "prm_per_tensor", 1e-3, 1, 0.7, 0.4)
    write_run(tmp_path, "cdpo", 1e-3, 5, 0.7, 0.4)
    comparison = compare_runs(tmp_path)
    assert contrast(comparison, BEST_LR).interval.seeds == 1
    assert "over the 1 seed(s) that both have" in comparison.findings["contrast_notes"]
    assert next(c for c in comparison.contrasts if c.against.startswith("cDPO")).missing == "no shared seed"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise_rate": 0.2}, "`noise_rate`: 0.2 in .*, 0.3 in"),
        ({"dataset": "other"}, "`dataset`"),
        ({"name": "copy", "lr": 1e-3}, "are both 'adamw' at learning rate 1e-3 with seed 0"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, changes, message):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    write_run(tmp_path, "adamw", changes.pop("lr", 1e-2), 0, 0.7, 0.4, **changes)
    with pytest.raises(ValueError, match=message):
        compare_runs(tmp_path)


def test_other_heldout_pairs_are_refused(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    name = write_run(tmp_path, "adamw", 1e-2, 0, 0.7, 0.4)
    (tmp_path / name / "margins.json").write_text(json.dumps({"heldout": [1.0] * 7 + [-1.0] * 3}))
    with pytest.raises(ValueError, match="differ in the number of held-out pairs: 10 in .*, 400 in"):
        compare_runs(tmp_path)


def test_learning_rates_are_short():
    assert [format_rate(rate) for rate in (3e-3, 2.5e-7, 1.0, None)] == ["3e-3", "2.5e-7", "1e0", "?"]


def test_tasks_have_measures_of_their_own(tmp_path):
    write_grid(tmp_path)
    for folder in tmp_path.iterdir():
        info, metrics = (json.loads((folder / name).read_text()) for name in ("run.json", "metrics.json"))
        names = {ACCURACY: "exact_match", "memorization/flipped_fit": "memorization/corrupted_fit"}
        metrics = {names.get(key, key): value for key, value in metrics.items()} | {"loss": 0.321}
        (folder / "run.json").write_text(json.dumps(info | {"task": "sft"}))
        (folder / "metrics.json").write_text(json.dumps(metrics))
    comparison = compare_runs(tmp_path)
    assert comparison.rows[1].accuracy == pytest.approx(0.75)
    text = format_comparison(comparison)
    assert "0.321" in text and "corrupted fit" in text and "accuracy: exact_match, held-out rows" in text
    assert "pairs" not in text

    first = next(path for path in sorted(tmp_path.iterdir()) if path.is_dir())
    info = json.loads((first / "run.json").read_text())
    (first / "run.json").write_text(json.dumps(info | {"accuracy": "answer_match"}))
    with pytest.raises(ValueError, match="differ in what their accuracy is: 'answer_match' in .*, 'exact_match' in"):
        compare_runs(tmp_path)
    (first / "run.json").write_text(json.dumps(info | {"task": "vision"}))
    with pytest.raises(ValueError, match="has the task 'vision'; this version of prm_hf knows preferences, sft"):
        compare_runs(tmp_path)
