"""Held-out rows that belong together, such as pairs of one prompt, are resampled together."""

import json

import numpy as np
import pytest
from scipy import stats

from prm_hf.compare import compare_runs, format_comparison, statistics
from prm_hf.compare.statistics import bootstrap_interval
from prm_hf.runs.comparable import group_comparable
from prm_hf.runs.read import load_runs

from .compared_runs import PAIRS, contrast, write_grid, write_run


def share_of_misses(repeats, seeds, groups=60):
    """Of simulated differences whose truth is 0, the share of 95 % intervals that leave it out: by groups, and not.

    Rows of a group share an effect, groups differ in size, and seeds have an effect and one of each group.
    """
    rng, misses = np.random.default_rng(100 * seeds), np.zeros(2)
    for repeat in range(repeats):
        group = np.repeat(np.arange(groups), rng.geometric(1 / 5, groups))
        shared = rng.normal(0, 0.3, groups)[group] + rng.normal(0, 0.15, (seeds, groups))[:, group]
        values = rng.normal(0, 0.01, (seeds, 1)) + shared + rng.normal(0, 0.5, (seeds, group.size))
        for i, known in enumerate((group, None)):
            interval = bootstrap_interval(values, known, resamples=300, seed=repeat)
            misses[i] += not interval.low <= 0 <= interval.high
    return misses / repeats


@pytest.mark.parametrize("seeds", [1, 3, 8])
def test_intervals_by_groups_miss_in_five_percent(seeds):
    by_groups, by_rows = share_of_misses(600, seeds)
    assert 0.03 <= by_groups <= 0.08
    assert by_rows > 0.2  # so many, where rows that belong together are taken for independent


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [1, 2, 3, 5, 8])
def test_intervals_by_groups_miss_in_five_percent_of_many(seeds):
    assert 0.035 <= share_of_misses(3000, seeds)[0] <= 0.075


def test_rows_of_a_group_that_agree_are_no_more_evidence_than_one():
    one = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=(1, 200))
    repeated, groups = np.repeat(one, 5, axis=1), np.repeat(np.arange(200), 5)
    by_groups, single = bootstrap_interval(repeated, groups), bootstrap_interval(one)
    assert (by_groups.low, by_groups.high) == pytest.approx((single.low, single.high))
    assert (by_groups.examples, by_groups.groups, single.groups) == (1000, 200, 200)
    assert bootstrap_interval(repeated).high < by_groups.high - 0.03


def test_groups_of_one_row_change_nothing():
    values = np.random.default_rng(1).normal(0.1, 1, (3, 90))
    alone = bootstrap_interval(values, np.random.default_rng(2).permutation(90))
    assert (alone.low, alone.high) == pytest.approx(
        (bootstrap_interval(values).low, bootstrap_interval(values).high), abs=0.02
    )
    assert statistics.group_error(values[0]) == pytest.approx(stats.sem(values[0]))


def test_the_mean_is_that_of_rows_not_of_groups():
    values, groups = np.array([[1.0, 1.0, 1.0, 1.0, -1.0, -1.0]]), np.array([7, 7, 7, 7, 3, 5])
    found = bootstrap_interval(values, groups)
    assert found.mean == pytest.approx(1 / 3) and found.groups == 3
    # The standard error of a ratio of sums, by hand: residuals of each group, over the mean size
    residuals = np.array([4 - 4 / 3, -1 - 1 / 3, -1 - 1 / 3]) / 2
    assert statistics.group_error(values[0], groups) == pytest.approx(residuals.std(ddof=1) / np.sqrt(3))


def test_one_group_alone_gives_no_interval():
    values, groups = np.random.default_rng(3).normal(1, 1, (2, 50)), np.zeros(50, int)
    assert np.isnan(statistics.group_error(values[0], groups))
    assert not bootstrap_interval(values[:1], groups).known
    over_seeds = bootstrap_interval(values, groups)  # that of the seeds is left
    ends = stats.t.interval(0.95, 1, loc=values.mean(), scale=stats.sem(values.mean(axis=1)))
    assert (over_seeds.low, over_seeds.high) == pytest.approx(ends, rel=1e-5)


def test_groups_must_be_one_an_example():
    with pytest.raises(ValueError, match=r"`groups` must be one an example, 3, got \(2,\)"):
        bootstrap_interval(np.ones((1, 3)), np.array([0, 1]))


# ---- In a comparison ----


def set_groups(root, groups, *names):
    """Writes groups of the held-out pairs into the folders of runs; all of them by default."""
    for folder in root.iterdir():
        if not names or folder.name in names:
            margins = json.loads((folder / "margins.json").read_text())
            (folder / "margins.json").write_text(json.dumps({**margins, "heldout_groups": groups}))


BY_TENS = [i // 10 for i in range(PAIRS)]


def test_every_number_of_a_comparison_is_by_groups(tmp_path):
    write_grid(tmp_path, seeds=(0, 1, 2), prm_gain=0.03, constant=0.74)
    before = compare_runs(tmp_path)
    set_groups(tmp_path, BY_TENS)
    after = compare_runs(tmp_path)
    known = [
        (a, b) for a, b in zip(before.contrasts, after.contrasts, strict=True) if a.known and a.interval.examples > 1
    ]
    assert len(known) > 4
    for a, b in known:
        assert b.interval.mean == pytest.approx(a.interval.mean)
        assert (a.interval.groups, b.interval.groups, b.interval.examples) == (PAIRS, PAIRS // 10, PAIRS)
    assert any(b.interval.high - b.interval.low > 1.2 * (a.interval.high - a.interval.low) for a, b in known)
    assert "ungrouped" in before.findings and "ungrouped" not in after.findings
    assert {c["groups"] for c in json.loads(format_comparison(after, "json"))["contrasts"]} == {PAIRS // 10}
    assert f"{PAIRS} held-out pairs in {PAIRS // 10} groups" in format_comparison(after, "html")


def test_the_error_of_one_seed_is_by_groups(tmp_path):
    write_grid(tmp_path)
    plain = compare_runs(tmp_path).rows[0].accuracy_error()
    assert plain == (pytest.approx(statistics.proportion_standard_error(0.7, PAIRS), rel=0.01), "examples")
    set_groups(tmp_path, BY_TENS)
    assert compare_runs(tmp_path).rows[0].accuracy_error()[0] > 1.5 * plain[0]


def test_what_one_run_has_on_record_holds_for_those_that_it_is_compared_with(tmp_path):
    write_grid(tmp_path, seeds=(0, 1))
    name = next(tmp_path.iterdir()).name
    set_groups(tmp_path, BY_TENS, name)
    comparison = compare_runs(tmp_path)
    assert contrast(comparison, "frontier area").interval.groups == PAIRS // 10
    assert "ungrouped" not in comparison.findings


def test_runs_with_other_groups_are_not_compared(tmp_path):
    name, other = write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4), write_run(tmp_path, "cdpo", 1e-3, 0, 0.7, 0.4)
    set_groups(tmp_path, BY_TENS, name)
    set_groups(tmp_path, [10 + group for group in BY_TENS], other)  # the same by other numbers
    assert len(group_comparable(load_runs(tmp_path))) == 1
    set_groups(tmp_path, [i // 20 for i in range(PAIRS)], other)
    with pytest.raises(ValueError, match="The runs differ in the groups of held-out pairs"):
        compare_runs(tmp_path)


@pytest.mark.parametrize(
    ("groups", "why"),
    [
        ([0, 1], "'heldout_groups' must be one for each of the 400 numbers of 'heldout', and are 2"),
        ([0.5] * PAIRS, "'heldout_groups' must be a list of whole numbers"),
        ({"a": 1}, "'heldout_groups' must be a list of whole numbers"),
    ],
)
def test_groups_that_cannot_be_read(tmp_path, groups, why):
    write_grid(tmp_path)
    name = write_run(tmp_path, "cdpo", 1e-3, 0, 0.7, 0.4)
    set_groups(tmp_path, groups, name)
    (run,) = compare_runs(tmp_path).ended("unreadable")
    assert run.name == name and why in run.problem
