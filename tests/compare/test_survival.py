"""Steps to a threshold: times that are known, times that are not, and the settings that are chosen by them."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.stats import logrank

from prm_hf.compare import plots, survival_report
from prm_hf.compare.survival import Median, Times, build_survival, log_rank, ratio_of_medians, time_of
from prm_hf.runs.run import DIVERGED, Run
from prm_hf.runs.schema import SECONDS, STEPS_TO_THRESHOLD, Threshold, measures_of


THRESHOLD = Threshold("accuracy", 0.95, larger_is_better=True, label="accuracy")
FALLING = Threshold("error", 0.4, larger_is_better=False, label="error")
END = 100


def times(*values):
    """Times of runs that had `END` steps: None is of one that does not get there."""
    return Times(np.array([END if x is None else x for x in values], float), np.array([x is not None for x in values]))


def make_run(tmp_path, method, reached_at, seed=0, rate=1e-3, decay=0.0, every=10, threshold=THRESHOLD, **more):
    """A run of `END` steps, whose metric passes the threshold at `reached_at` and not if that is None."""
    good, bad = (1.0, 0.1) if threshold.larger_is_better else (0.1, 1.0)

    def value(step):
        return good if reached_at is not None and step >= reached_at else bad

    history = [{"step": s, threshold.metric: value(s), SECONDS: s / 10} for s in range(0, END + 1, every)]
    info = {"task": STEPS_TO_THRESHOLD, "threshold": vars(threshold)}
    info["settings"] = {"weight_decay": decay, "max_steps": END, **more.pop("settings", {})}
    name = f"{method}_{rate}_{decay}_{seed}"
    return Run(tmp_path / name, name, method, rate, seed, "prm_hf", history=history, info=info, **more)


def make_runs(tmp_path, method, reached, **more):
    return [make_run(tmp_path, method, at, seed=seed, **more) for seed, at in enumerate(reached)]


# ---- Medians ----


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ((10, 20, 30, 40, 50), 30),
        ((10, 20, 30, None, None), 30),  # the two that are missing are longer, whatever they are
        ((10, 20, None, None, None), math.inf),
        ((None, None, None), math.inf),
        ((70,), 70),
        ((10, 20), 10),
    ],
)
def test_the_median_of_runs_that_had_as_many_steps(values, median):
    assert times(*values).median().value == median


def test_a_censored_run_counts_until_it_is_lost():
    """Two of four are there at 20 and 60; one was lost at 40: of the two left then, one is there at 60."""
    found = Times(np.array([20.0, 40, 60, 100]), np.array([True, False, True, False]))
    steps, shares = found.curve()
    assert dict(zip(steps, shares, strict=True))[60] == pytest.approx(0.75 * 0.5)
    assert found.median().value == 60


def test_the_interval_of_a_median():
    many = times(*range(1, 100))
    found = many.median()
    assert found.value == 50 and 38 <= found.low <= 42 and 58 <= found.high <= 62
    # Below six runs no interval of an exact 95 % ends above
    assert math.isinf(times(10, 20, 30).median().high)
    none = times(None, None).median()
    assert math.isnan(none.low) and math.isinf(none.high)


def test_intervals_of_medians_cover():
    rng, hits = np.random.default_rng(0), 0
    for _ in range(200):
        drawn = rng.exponential(40 / math.log(2), 20)  # of the median 40
        found = Times(np.minimum(drawn, 60), drawn < 60).median()
        hits += found.low <= 40 <= found.high
    assert 180 <= hits <= 199


def test_times_need_one_flag_each():
    with pytest.raises(ValueError, match="must be `\\(n,\\)` and not empty"):
        Times(np.zeros(2), np.ones(3, bool))
    with pytest.raises(ValueError, match="not empty"):
        times()


# ---- Ratios and tests ----


def test_a_ratio_of_medians_that_are_known():
    found = ratio_of_medians(times(10, 20, 30), times(40, 40, 40))
    assert found.least == found.most == 0.5 and (found.low, found.high) == (0.25, 0.75)


def test_seeds_are_drawn_together():
    """Of seeds that differ by much more than the methods, the ratio is known just as well."""
    slow = np.array([10, 20, 50, 80, 90])
    found = ratio_of_medians(times(*(slow / 2)), times(*slow))
    assert found.low == found.most == found.high == 0.5


@pytest.mark.parametrize(
    ("ours", "theirs", "least", "most"),
    [
        ((20, 20, 20), (None, None, None), 0.0, 0.2),  # at most 20 of more than 100
        ((None, None, None), (20, 20, 20), 5.0, math.inf),
        ((None, None, None), (None, None, None), 0.0, math.inf),
        ((0, 0, 0), (0, 0, 0), 1.0, 1.0),
        ((0, 0, 0), (20, 20, 20), 0.0, 0.0),
    ],
)
def test_what_a_ratio_can_be_where_a_median_is_not_reached(ours, theirs, least, most):
    found = ratio_of_medians(times(*ours), times(*theirs))
    assert (found.least, found.most, found.low, found.high) == (least, most, least, most)


def test_one_seed_has_no_interval():
    found = ratio_of_medians(times(20), times(40))
    assert found.most == 0.5 and math.isnan(found.low) and math.isnan(found.high)
    with pytest.raises(ValueError, match="need the same seeds"):
        ratio_of_medians(times(20), times(40, 50))


def test_the_log_rank_test_is_of_all_runs():
    fast, slow = times(10, 20, 30, 40, 50), times(80, 90, 90, None, None)
    statistic, p = log_rank(fast, slow)
    assert p == pytest.approx(logrank(fast.censored, slow.censored).pvalue) and p < 0.01
    assert statistic > 0 > log_rank(slow, fast)[0]
    assert log_rank(fast, fast)[1] == pytest.approx(1)
    assert all(map(math.isnan, log_rank(times(None, None), times(None))))


# ---- Runs ----


@pytest.mark.parametrize("threshold", [THRESHOLD, FALLING])
def test_the_time_of_a_run(tmp_path, threshold):
    assert time_of(make_run(tmp_path, "adamw", 30, threshold=threshold), threshold) == (30, 3.0, True)
    assert time_of(make_run(tmp_path, "adamw", None, threshold=threshold), threshold) == (END, 10.0, False)


def test_a_run_that_diverged_does_not_get_there(tmp_path):
    run = make_run(tmp_path, "adamw", None, end=DIVERGED)
    run.history = run.history[:3]  # up to step 20
    assert time_of(run, THRESHOLD) == (END, 10.0, False)
    run.history[-1]["accuracy"] = math.nan
    assert not time_of(run, THRESHOLD)[2]


def test_the_first_time_counts(tmp_path):
    run = make_run(tmp_path, "adamw", 30)
    run.history[5]["accuracy"] = 0.2
    assert time_of(run, THRESHOLD)[0] == 30


def test_the_setting_with_the_fewest_median_steps_is_chosen(tmp_path):
    runs = [
        *make_runs(tmp_path, "adamw", (10, None, None), rate=1e-2),  # once very fast
        *make_runs(tmp_path, "adamw", (60, 70, 80), rate=3e-3),
        *make_runs(tmp_path, "adamw", (80, 80, 80), rate=1e-3),
        *make_runs(tmp_path, "prm_rows", (20, 30), rate=1e-2),  # of fewer seeds
        *make_runs(tmp_path, "prm_rows", (30, 40, 50), rate=3e-3, decay=0.1),
    ]
    found = build_survival(runs, THRESHOLD)
    assert found.baseline.learning_rate == 3e-3 and found.baseline.median.value == 70
    (contrast,) = found.contrasts
    assert (contrast.row.learning_rate, contrast.row.weight_decay) == (3e-3, 0.1)
    assert contrast.ratio.most == pytest.approx(40 / 70) and contrast.p_holm == contrast.p_value < 0.05
    assert contrast.seconds.most == pytest.approx(40 / 70)
    assert found.every == 10


def test_where_no_run_gets_there_the_metric_decides(tmp_path):
    runs = make_runs(tmp_path, "adamw", (None, None)) + make_runs(tmp_path, "adamw", (None, None), rate=3e-3)
    for run in runs[2:]:
        run.history[-1]["accuracy"] = 0.9
    assert build_survival(runs, THRESHOLD).baseline.learning_rate == 3e-3


def test_ends_of_grids_are_said(tmp_path):
    runs = [
        *make_runs(tmp_path, "adamw", (50, 50), rate=1e-3),
        *make_runs(tmp_path, "adamw", (30, 30), rate=3e-3, decay=0.1),
        *make_runs(tmp_path, "adamw", (40, 40), rate=1e-2),
    ]
    found = build_survival(runs, THRESHOLD)
    assert found.at_end(found.baseline) == ["largest weight decay"]
    assert found.at_end(found.rows[2]) == ["largest learning rate"]  # its decay is 0, below which there is none
    only = build_survival(runs[:2], THRESHOLD)
    assert only.at_end(only.baseline) == []


def test_the_control_of_each_seed_is_in_one_row(tmp_path):
    runs = [*make_runs(tmp_path, "adamw", (50, 50)), *make_runs(tmp_path, "prm_rows", (20, 20))]
    for seed, rate in enumerate((1e-4, 3e-4)):
        control = {"constant_q": {"of": runs[2 + seed].name, "mean_q": 0.1}}
        runs.append(make_run(tmp_path, "constant_q", 70, seed=seed, rate=rate, decay=0.1 * rate, settings=control))
    found = build_survival(runs, THRESHOLD)
    assert [len(row.runs) for row in found.rows] == [2, 2, 2]
    assert found.rows[2].learning_rate == pytest.approx(2e-4)


def test_no_run_is_an_error():
    with pytest.raises(ValueError, match="No finished run"):
        build_survival([], THRESHOLD)


# ---- The report ----


@pytest.mark.parametrize(
    ("median", "text"),
    [
        (Median(5950, 5100, 7000), "5,950 [5,100, 7,000]"),
        (Median(20, 10, math.inf), "20 [10, ?]"),
        (Median(math.inf, 40, math.inf), ">100"),
    ],
)
def test_texts_of_medians(median, text):
    assert survival_report.median_text(median, END) == text


def test_texts_of_ratios():
    pairs = [((10, 20, 30), (40, 40, 40)), ((20,), (None,)), ((None,), (20,)), ((None,), (None,))]
    # Bounds that every ratio has are none, and a small number is not shown as 0
    pairs += [((20, 30, None), (40, 50, None)), ((None, None), (None, None)), ((0, 0), (20, 20)), ((1, 1), (99, 99))]
    texts = [survival_report.ratio_text(ratio_of_medians(times(*a), times(*b))) for a, b in pairs]
    assert texts[:4] == ["0.50 [0.25, 0.75]", "<0.20", ">5.00", "?"]
    assert texts[4:] == ["0.60 [?, ?]", "? [?, ?]", "0.00 [0.00, 0.00]", "0.01 [0.01, 0.01]"]


@pytest.mark.parametrize(
    ("ours", "theirs", "answer"),
    [
        ((20, 20, 30, 30, 40), (80, 80, 90, 90, 90), "is faster than AdamW (p 0.002; 0.33 [0.25, 0.44] of AdamW's"),
        ((80, 80, 90, 90, 90), (20, 20, 30, 30, 40), "is slower than AdamW (p 0.002; 3.00 [2.25, 4.00] of AdamW's"),
        # The test tells them apart, and medians that are not reached bound no ratio
        (
            (None,) * 5,
            (20, 30, 50, 90, None),
            "slower than AdamW (p 0.013; >2.00 [?, ?] of AdamW's steps; the seeds do",
        ),
        ((20, 30, 50, 90, None), (20, 30, 60, None, 80), "no difference between PRM per_row and AdamW is shown (p "),
        ((40, 50, 60), (50, 60, 90), "is shown (p 0.257; 0.83 [0.67, 0.83] of AdamW's steps, whose interval is not"),
        ((None, None), (None, None), "neither PRM per_row nor AdamW has a run that reaches the threshold"),
    ],
)
def test_the_test_decides_what_is_said(tmp_path, ours, theirs, answer):
    runs = [*make_runs(tmp_path, "adamw", theirs), *make_runs(tmp_path, "prm_rows", ours)]
    (found,) = survival_report._answers(build_survival(runs, THRESHOLD))
    assert answer in found, found


def test_a_report(tmp_path, capsys):
    runs = [
        *make_runs(tmp_path, "adamw", (80, 80, 90, None, None, 90), rate=3e-3),
        *make_runs(tmp_path, "adamw", (90, None, None, None, None, 90), rate=1e-3),
        *make_runs(tmp_path, "prm_rows", (20, 20, 30, 30, 40, 40), rate=3e-3),
    ]
    published = {"AdamW": 29450, "PRM": 5950}
    survival_report.report(build_survival(runs, THRESHOLD), tmp_path, published, "From the paper.", {"accuracy": "a"})
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert any(line.startswith("AdamW 3e-3 0 4/6 90 [") for line in lines)
    assert any(line.startswith("PRM per_row 3e-3 0 6/6 30 [") and "0.33 [" in line for line in lines)
    assert "PRM, published 5,950 0.20" in lines and "- From the paper." in lines
    text = " ".join(lines)
    assert "PRM per_row is faster than AdamW" in text and "AdamW (largest learning rate)" in text
    found = json.loads((tmp_path / "survival.json").read_text())  # strict: no NaN and no infinity
    assert [row["is_best"] for row in found["rows"]] == [True, False, True]
    assert found["rows"][1]["median"]["value"] is None and found["rows"][1]["reached"].count(True) == 2
    page = (tmp_path / "report.html").read_text()
    assert all(word in page for word in ("29,450", "All settings", "data:image/png;base64,", "PRM per_row"))


def test_extremes(tmp_path):
    run = make_run(tmp_path, "adamw", 50)
    for row in run.history:
        row["fit"] = row["step"] / END
    run.history[-1]["accuracy"] = 0.3
    row = build_survival([run], THRESHOLD).rows[0]
    assert survival_report.extremes(row, "accuracy", True, ["fit"]) == [1.0, 0.5, 0.3, 1.0]


def test_run_json_has_the_threshold():
    info = {"task": STEPS_TO_THRESHOLD, "threshold": vars(FALLING)}
    assert measures_of(info).threshold == FALLING and measures_of(info).accuracy == "error"
    for wrong in ({}, {"threshold": {"metric": "error"}}, {"threshold": {**vars(FALLING), "more": 1}}):
        with pytest.raises(ValueError, match="whose `threshold` needs metric, value, larger_is_better, label"):
            measures_of({"task": STEPS_TO_THRESHOLD, **wrong})


@pytest.mark.parametrize("first", [20, 600])  # with which the second axis spans decades, or less than one
def test_steps_of_long_runs_can_be_read(first, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "to_png", lambda figure, **options: figures.append(figure) or b"")
    monkeypatch.setitem(globals(), "END", 4000)
    survival_report.draw(build_survival(make_runs(tmp_path, "adamw", [first, 2000, 3900], every=20), THRESHOLD), {})
    figures[0].draw_without_rendering()
    for axes in figures[0].axes:
        low, high = axes.get_xlim()
        shown = [
            label
            for label in axes.get_xticklabels(which="both")
            if label.get_text() and low <= label.get_position()[0] <= high
        ]
        ends = sorted((label.get_window_extent().x0, label.get_window_extent().x1) for label in shown)
        assert len(shown) >= 2 and all(label.get_text().replace(",", "").isdigit() for label in shown)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))
