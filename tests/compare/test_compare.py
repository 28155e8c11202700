"""Comparison of finished runs: known differences, and words that never claim more than the numbers hold."""

import json
import re
import sys

import numpy as np
import pytest

from prm_hf.compare import compare_runs, format_comparison, plots, statistics, write_report
from prm_hf.compare.comparison import (
    BEST_LR,
    CONTROLLED,
    EQUAL_KL,
    EQUAL_KL_MEAN,
    FRONTIER,
    SAME_LR,
    display_name,
    format_rate,
)
from prm_hf.runs.methods import find_method

from .compared_runs import ACCURACY, KL, PAIRS, contrast, write_grid, write_run


# rows and differences


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
    text = format_comparison(compare_runs(tmp_path))
    assert "The frontier's area" in text and "+0.050" in text


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
    # Holm's correction is over all contrasts, and the statements say how many differences are left
    known = [c for c in comparison.contrasts if c.interval and c.interval.known]
    adjusted = statistics.holm([c.interval.p_value for c in known])
    assert [c.p_holm for c in known] == adjusted
    kept = sum(p < 0.05 for p in adjusted)
    assert any(f"and {kept} still after Holm's correction" in words for words in comparison.statements)
    assert any(c.kind == BEST_LR and c.right.method == "adamw_eps:0.1" for c in comparison.contrasts)


def test_controls_with_an_eps_are_no_points_of_adamws_curve(tmp_path):
    """constant q of PRM with a larger eps is AdamW with that eps: AdamW's curve stays as it is without it."""
    write_grid(tmp_path, seeds=(0, 1), prm=("prm_debiased_eps:10",), constant=0.9)
    comparison = compare_runs(tmp_path)
    area = contrast(comparison, FRONTIER, "prm_debiased_eps:10")
    assert area.interval.mean == pytest.approx(0.0, abs=0.004)
    assert contrast(comparison, CONTROLLED, "prm_debiased_eps:10").against.startswith("constant q (AdamW eps 10 at ")
    assert "against AdamW eps 10 with PRM's mean step" in comparison.statements[0]


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


def test_kl_outside_the_range_is_not_extrapolated(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    write_run(tmp_path, "adamw", 1e-2, 0, 0.6, 1.6)
    write_run(tmp_path, "prm_per_tensor", 1e-3, 0, 0.75, 0.02)
    comparison = compare_runs(tmp_path)
    matched = contrast(comparison, EQUAL_KL)
    assert matched.interval is None and matched.missing == "no AdamW drifts so little"
    assert "nothing is extrapolated" in " ".join(comparison.statements)
    assert "unknown against AdamW at the same KL" in comparison.statements[0]


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
    assert "more accurate" not in " ".join(comparison.statements)


def test_only_shared_seeds_are_compared(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "adamw", 1e-3, seed, 0.7, 0.4)
    write_run(tmp_path, "prm_per_tensor", 1e-3, 1, 0.7, 0.4)
    write_run(tmp_path, "cdpo", 1e-3, 5, 0.7, 0.4)
    comparison = compare_runs(tmp_path)
    assert contrast(comparison, BEST_LR).interval.seeds == 1
    assert any("over the 1 seed(s) that both have" in words for words in comparison.statements)
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


def test_names():
    assert [format_rate(rate) for rate in (3e-3, 2.5e-7, 1.0, None)] == ["3e-3", "2.5e-7", "1e0", "?"]
    groups = {
        "adamw": "baseline",
        "run2-adamw-big": "baseline",
        "prm_debiased": "PRM",
        "constant_q": "control",
        "shuffled_q": "control",
        "fixed_q": "control",
        "adamw_matched": "control",
        "prm_debiased_eps:10": "PRM",
        "early_stopping_clean": "loss-side",
        "adamw_eps:0.1": "baseline",
        "cdpo": "loss-side",
        "early_stopping": "loss-side",
        "my thing": "other",
    }
    assert {method: find_method(method).group for method in groups} == groups
    assert display_name("adamw_eps:0.1") == "AdamW eps 0.1" and display_name("my thing") == "my thing"


# words


def headline(tmp_path, **grid):
    write_grid(tmp_path, **grid)
    return compare_runs(tmp_path).statements[0]


def test_words_for_no_difference(tmp_path):
    words = headline(tmp_path, seeds=(0, 1, 2), prm_gain=0.0)
    assert (
        "within noise" in words and "neither that PRM is more accurate than AdamW nor that the two are equal" in words
    )
    assert "ahead" not in words and "more accurate)" not in words


def test_words_for_a_loss(tmp_path):
    assert "so PRM loses to AdamW here" in headline(tmp_path, seeds=(0, 1, 2), prm_gain=-0.1)


def test_words_for_a_gain_without_its_control(tmp_path):
    words = headline(tmp_path, seeds=(0, 1, 2), prm_gain=0.1)
    assert "ahead of AdamW here, but constant q was not run" in words and "does not show that the mask" in words


def test_words_for_a_gain_that_a_constant_has_too(tmp_path):
    words = headline(tmp_path, seeds=(0, 1, 2), prm_gain=0.1, constant=0.85)
    assert "does not show" in words and "more than a smaller step explains" not in words


def test_words_for_a_gain_beyond_the_control(tmp_path):
    words = headline(tmp_path, seeds=(0, 1, 2), prm_gain=0.1, constant=0.75)
    assert (
        "ahead here by more than a smaller step explains" in words and "does not show that it holds elsewhere" in words
    )
    assert "seed" not in words


def test_words_for_a_gain_that_another_method_has_too(tmp_path):
    for seed in (0, 1, 2):
        for lr, kl, accuracy in ((1e-4, 0.1, 0.80), (1e-3, 0.4, 0.85), (1e-2, 1.6, 0.75)):
            write_run(tmp_path, "adamw_eps:0.1", lr, seed, accuracy, kl)
    words = headline(tmp_path, seeds=(0, 1, 2), prm_gain=0.1, constant=0.75)
    assert "but AdamW eps 0.1 is not known to do worse at equal KL" in words


def test_words_for_a_gain_from_more_tries(tmp_path):
    words = headline(tmp_path, seeds=(0, 1), prm_gain=0.1, prm=("prm_per_tensor", "prm_debiased"), constant=0.75)
    assert "it had 6 tries and AdamW 3" in words
    statements = " ".join(compare_runs(tmp_path).statements)
    assert "The baseline had the smaller grid: 6 PRM settings (2 methods) against 3 learning rates" in statements


def test_words_for_one_seed(tmp_path):
    words = headline(tmp_path, prm_gain=0.1)
    assert "for this one seed; the spread over seeds is not measured" in words
    assert any(words.startswith("One seed: ") for words in compare_runs(tmp_path).statements)


def test_words_that_every_comparison_needs(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), prm_gain=0.02, constant=0.75)
    write_run(tmp_path, "cdpo", 1e-3, 0, 0.6, 0.3)
    comparison = compare_runs(tmp_path)
    words = " ".join(comparison.statements)
    known = sum(1 for c in comparison.contrasts if c.interval and c.interval.known)
    assert "proves nothing about the mask" in words and "each the best of 3" in words
    assert "picked on the same held-out pairs" in words and f"There are {known} intervals" in words
    assert "cDPO at 1e-3 +" in words and "which puts cDPO at a disadvantage" in words
    assert "1 to 2 seeds a row" in words


def test_best_at_the_edge_of_its_grid_is_said(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    write_run(tmp_path, "adamw", 1e-2, 0, 0.6, 1.6)
    write_run(tmp_path, "prm_per_tensor", 1e-3, 0, 0.7, 0.5)
    assert any("edge of its grid" in w and "AdamW (smallest, 1e-3)" in w for w in compare_runs(tmp_path).statements)


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
    assert ("ahead" in comparison.statements[0]) == ahead


def test_leftovers_of_another_experiment_are_said(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4, settings={"max_steps": 10})
    write_run(tmp_path, "adamw", 1e-2, 0, 0.7, 0.4, settings={"max_steps": 20})
    assert any("also in max_steps" in words for words in compare_runs(tmp_path).statements)


def test_accuracy_that_contradicts_its_margins_is_said(tmp_path):
    name = write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    (tmp_path / name / "metrics.json").write_text(json.dumps({ACCURACY: 0.9}))
    assert any("0.900, its margins.json 0.700" in words for words in compare_runs(tmp_path).statements)


def test_comparisons_without_prm_or_adamw(tmp_path):
    write_run(tmp_path, "cdpo", 1e-3, 0, 0.7, 0.4)
    assert "without a run of PRM" in compare_runs(tmp_path).statements[0]
    write_run(tmp_path, "hoelder", 1e-3, 0, 0.8, 0.4)
    comparison = compare_runs(tmp_path)
    assert contrast(comparison, BEST_LR, "hoelder").interval.mean == pytest.approx(0.1)
    write_run(tmp_path, "prm_debiased", 1e-3, 0, 0.7, 0.4)
    assert "without a run of AdamW" in compare_runs(tmp_path).statements[0]


def test_runs_without_accuracy(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4, margins=False, drop=(ACCURACY,))
    comparison = compare_runs(tmp_path)
    assert comparison.statements[0] == "No run has rewards/accuracies: there is nothing to compare."
    assert plots.plot_frontier(comparison) is None


# formats and pictures


def test_table_is_aligned_and_narrow(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), constant=0.74)
    write_run(tmp_path, "a_method_with_a_name_that_is_much_too_long_for_any_table", 1e-3, 0, 0.7, 0.4, drop=(KL,))
    text = format_comparison(compare_runs(tmp_path), "table")
    assert max(map(len, text.splitlines())) <= 120
    header, rule, *rows = text.split("\n\n")[0].splitlines()
    assert header.split()[:3] == ["method", "lr", "seeds"] and set(rule) == {"-"} and len(rows) == 8
    assert len({len(row) for row in rows}) == 1 and "…" in text
    (long,) = [row for row in rows if "…" in row]
    assert long.split()[-4] == "-"  # the KL that was not measured


def test_markdown_has_whole_rows(tmp_path):
    write_grid(tmp_path)
    text = format_comparison(compare_runs(tmp_path), "markdown")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {11, 6}
    assert text.startswith("**PRM per_tensor") and "\\|reward\\|" in text


def test_json_is_strict_and_complete(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), constant=0.74)
    name = write_run(tmp_path, "cdpo", 1e-3, 0, 0.7, 0.4)
    metrics = json.loads((tmp_path / name / "metrics.json").read_text()) | {KL: float("nan")}
    (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    comparison = compare_runs(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(format_comparison(comparison, "json"), parse_constant=refuse)
    assert data["schema"] == 1 and len(data["rows"]) == 8 and len(data["runs"]) == 15
    assert data["statements"] == comparison.statements and len(data["contrasts"]) == len(comparison.contrasts)
    row = data["rows"][0]
    assert row["metrics"][ACCURACY] == {"mean": pytest.approx(0.7), "standard_error": 0.0, "n": 2}
    assert row["seeds"] == [0, 1] and row["learning_rate"] == 1e-4
    assert next(run for run in data["runs"] if run["method"] == "cdpo")["metrics"][KL] == "nan"


def test_unknown_format(tmp_path):
    write_grid(tmp_path)
    with pytest.raises(ValueError, match="`format` must be one of table, json, markdown, html, got 'pdf'"):
        format_comparison(compare_runs(tmp_path), "pdf")


def test_report_is_self_contained(tmp_path):
    write_grid(tmp_path / "runs", seeds=(0, 1), constant=0.74)
    write_run(tmp_path / "runs", "<script>", 1e-3, 0, 0.7, 0.4, name="odd")
    comparison = compare_runs(tmp_path / "runs")
    write_report(comparison, tmp_path / "out")
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["statements"] == comparison.statements
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page and "<script" not in page and "<link" not in page and "src=" in page
    assert set(re.findall(r'(?:src|href)="([^,"]*)', page)) == {"data:image/png;base64"}
    assert "prefers-color-scheme: dark" in page and page.count("<svg") == sum(
        1 for c in comparison.contrasts if c.interval
    )


def test_pictures_of_one_run_and_of_missing_numbers(tmp_path):
    write_run(tmp_path / "one", "prm_per_tensor", 1e-3, 0, 0.7, 0.4, mean_q=0.05)
    one = compare_runs(tmp_path / "one")
    (axes,) = plots.plot_frontier(one).axes
    low, high = axes.get_xlim()
    assert low < 0.4 < high and high / low == pytest.approx(4)
    write_run(tmp_path / "some", "adamw", 1e-3, 0, 0.7, 0.4, drop=(KL,))
    write_run(tmp_path / "some", "prm_per_tensor", 1e-3, 0, 0.7, 0.4, drop=("memorization/flipped_fit",))
    some = compare_runs(tmp_path / "some")
    assert len(plots.plot_frontier(some).axes[0].get_legend().get_texts()) == 1
    assert plots.plot_mask(some) is None
    assert any("Not on the frontier, for lack of drift/kl: AdamW at 1e-3" in words for words in some.statements)


def test_frontier_shows_the_numbers(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), constant=0.74)
    (axes,) = plots.plot_frontier(compare_runs(tmp_path)).axes
    assert axes.get_xscale() == "log"
    curves = {tuple(line.get_xdata()): line.get_ydata() for line in axes.get_lines() if len(line.get_xdata()) == 3}
    adamw = next(values for kl, values in curves.items() if kl == pytest.approx((0.1, 0.4, 1.6)))
    assert list(adamw) == pytest.approx([0.70, 0.75, 0.65])
    assert {text.get_text() for text in axes.texts} == {"1e-4", "1e-3", "1e-2", "1e-1", "5.05e-4"}


def test_mask_picture_has_the_noise_floor_of_the_ema_estimator_only(tmp_path):
    settings = {"prm_estimator": "debiased", "prm_mask": "snr"}
    write_run(tmp_path, "prm_debiased", 1e-3, 0, 0.7, 0.4, mean_q=0.3, settings=settings)
    (legend,) = plots.plot_mask(compare_runs(tmp_path)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["PRM debiased"]
    settings = {"prm_estimator": "ema", "prm_mask": "snr", "prm_softness": 1.0, "prm_boundary": "batch"}
    write_run(tmp_path, "prm_per_tensor", 1e-3, 0, 0.7, 0.4, mean_q=0.05, settings=settings)
    figure = plots.plot_mask(compare_runs(tmp_path))
    assert "q = 0.048" in figure.legends[0].get_texts()[-1].get_text()
    assert any(line.get_ydata()[0] == pytest.approx(1 / 21) for line in figure.axes[0].get_lines())


def test_methods_keep_their_colours():
    styles = plots.method_styles(["prm_per_tensor", "zeta", "alpha", "adamw"])
    assert styles["adamw"] == plots.method_styles(["adamw"])["adamw"]
    many = plots.method_styles([*plots._STYLES, *(f"method{i}" for i in range(40))])
    assert len(set(many.values())) == len(many)
    assert styles["alpha"] != styles["zeta"]


def test_missing_matplotlib_is_said(tmp_path, monkeypatch):
    write_grid(tmp_path / "runs")
    comparison = compare_runs(tmp_path / "runs")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('pip install "prm-hf[report]"')):
        write_report(comparison, tmp_path / "out")
    assert (tmp_path / "out" / "comparison.json").is_file()
    assert format_comparison(comparison).startswith("method")


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
