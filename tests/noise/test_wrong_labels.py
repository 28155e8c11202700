"""The estimator of wrong labels on data drawn from its model, on its symmetries, and on degenerate input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import norm, rankdata

from prm_hf.noise.wrong_labels import estimate_wrong_labels, votes


def draw(n, share, accuracy, seed, copies=1):
    """Antisymmetric Gaussian margins, (n,), and which labels are wrong; rows come in groups of `copies` equal ones."""
    rng = np.random.default_rng(seed)
    margins = np.repeat(rng.normal(norm.ppf(accuracy), 1, n // copies), copies)
    wrong = np.repeat(rng.random(n // copies) < share, copies)
    return np.where(wrong, -margins, margins), wrong


def auc(scores, wrong):
    ranks, n_wrong = rankdata(scores), wrong.sum()
    return (ranks[wrong].sum() - n_wrong * (n_wrong + 1) / 2) / (n_wrong * (~wrong).sum())


def draw_prompts(prompts, share, accuracy, seed):
    """Pairs of right and wrong completions, 4 or 6 a prompt: groups, votes, Gaussian margins, wrong; (n,) each."""
    rng = np.random.default_rng(seed)
    sides = [[(2, 3), (1, 4), (4, 1)][i] for i in rng.integers(3, size=prompts)]
    pairs = [(group, i, -j - 1) for group, (a, b) in enumerate(sides) for i in range(a) for j in range(b)]
    groups, better, worse = np.array(pairs).T
    wrong = rng.random(len(groups)) < share
    margins = rng.normal(norm.ppf(accuracy), 1, len(groups)) * np.where(wrong, -1, 1)
    vote = votes(groups.tolist(), np.where(wrong, worse, better).tolist(), np.where(wrong, better, worse).tolist())
    return groups, vote, margins, wrong


@pytest.mark.parametrize("share", [0.05, 0.3])
@pytest.mark.parametrize("accuracy", [0.75, 0.9])
def test_interval_covers_the_share(share, accuracy):
    results = [estimate_wrong_labels(draw(400, share, accuracy, seed)[0]) for seed in range(40)]
    assert np.mean([x.share_low <= share <= x.share_high for x in results]) >= 0.86  # .95 less 2.5 standard errors
    assert all(0 <= x.share_low <= x.share_high <= 0.5 for x in results)


def test_interval_narrows_with_rows_and_excludes_other_shares():
    few, many = (estimate_wrong_labels(draw(n, 0.1, 0.9, 0)[0]) for n in (200, 5000))
    assert many.share_high - many.share_low < 0.7 * (few.share_high - few.share_low)
    assert many.share_low <= 0.1 <= many.share_high < 0.15 and abs(many.share - 0.1) < 0.05


@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_probabilities_are_calibrated(exponent):
    rng = np.random.default_rng(1)
    size = np.abs(rng.normal(0, 1, 20000))
    margins = np.where(rng.random(20000) < expit(2.5 * size**exponent), size, -size)
    wrong = rng.random(20000) < 0.15
    result = estimate_wrong_labels(np.where(wrong, -margins, margins))
    for rows in np.array_split(np.argsort(result.probabilities), 10):
        assert abs(result.probabilities[rows].mean() - wrong[rows].mean()) < 0.04


def test_area_is_what_the_accuracy_allows():
    margins, wrong = draw(20000, 0.3, 0.75, 2)
    expected = norm.cdf(2**0.5 * norm.ppf(0.75))
    assert abs(auc(estimate_wrong_labels(margins).scores, wrong) - expected) < 0.01


def test_a_group_counts_as_one_where_its_rows_are_the_same():
    margins, _ = draw(400, 0.1, 0.9, 3)
    once = estimate_wrong_labels(margins)
    copied = np.repeat(margins, 5)
    grouped = estimate_wrong_labels(copied, groups=np.repeat(np.arange(400), 5))
    ignored = estimate_wrong_labels(copied)
    width = [x.share_high - x.share_low for x in (once, grouped, ignored)]
    assert abs(width[0] - width[1]) <= 0.02 and width[2] < 0.7 * width[0]


def test_grouped_interval_covers():
    draws = [draw(600, 0.2, 0.85, seed, copies=3)[0] for seed in range(40)]
    groups = np.repeat(np.arange(200), 3)
    results = [estimate_wrong_labels(margins, groups=groups) for margins in draws]
    assert np.mean([x.share_low <= 0.2 <= x.share_high for x in results]) >= 0.86


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-50, 50).filter(lambda x: abs(x) > 1e-3), min_size=3, max_size=30),
    st.floats(1e-6, 1e6),
)
def test_scale_does_not_matter(margins, scale):
    first, second = (estimate_wrong_labels(np.array(margins) * c) for c in (1.0, scale))
    np.testing.assert_allclose(first.probabilities, second.probabilities, rtol=1e-6)
    np.testing.assert_allclose(first.share, second.share, rtol=1e-6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=30).filter(any))
def test_a_larger_margin_is_less_suspect(margins):
    order = np.argsort(margins, kind="stable")
    probabilities = estimate_wrong_labels(margins).probabilities
    assert (np.diff(probabilities[order]) <= 1e-12).all()


def test_turned_label_has_the_probability_of_the_turned_margin():
    """Row 0 and row 1 are one pair with its label either way: the evidence for either side is the same curve."""
    margins, _ = draw(3000, 0.3, 0.8, 4)
    margins[1] = -margins[0]
    result = estimate_wrong_labels(margins)
    # In (1) the log-odds of a label and of its opposite sum to twice the log-odds of the share
    share = np.log(result.share / (1 - result.share))
    assert abs(result.scores[0] + result.scores[1] - 2 * share) < 0.3


def test_ranks_begin_at_the_most_suspect():
    result = estimate_wrong_labels([3.0, -2.0, 0.5, -2.0])
    assert result.ranks.tolist() == [4, 1, 3, 2]
    assert result.probabilities.dtype == result.scores.dtype == np.float64


def test_evaluations_count_alike_whatever_their_scale():
    margins, _ = draw(300, 0.3, 0.8, 5)
    one, three = estimate_wrong_labels(margins), estimate_wrong_labels([margins, 10 * margins, 0 * margins])
    np.testing.assert_allclose(one.probabilities, three.probabilities, rtol=1e-9)


def test_margins_in_sample_add_to_the_ranking_and_a_shift_does_not_matter():
    margins, wrong = draw(3000, 0.3, 0.75, 6)
    noise = np.random.default_rng(0).normal(0, 0.7, 3000)
    inner = margins + noise + 3.0  # memorization raises the margins of all labels
    outer = margins + np.random.default_rng(1).normal(0, 0.7, 3000)
    alone, both = estimate_wrong_labels(outer), estimate_wrong_labels(outer, in_sample=inner)
    assert auc(both.scores, wrong) > auc(alone.scores, wrong) + 0.01
    assert (both.share_low, both.share_high) == (alone.share_low, alone.share_high)
    shifted = estimate_wrong_labels(outer, in_sample=inner + 5)
    np.testing.assert_allclose(shifted.probabilities, both.probabilities, rtol=1e-6)


def test_margins_in_sample_that_say_nothing_change_little():
    margins, wrong = draw(3000, 0.3, 0.8, 7)
    alone = estimate_wrong_labels(margins)
    both = estimate_wrong_labels(margins, in_sample=np.random.default_rng(0).normal(size=3000))
    assert auc(both.scores, wrong) > auc(alone.scores, wrong) - 0.005
    np.testing.assert_allclose(np.sort(both.probabilities), np.sort(alone.probabilities))


@pytest.mark.parametrize("is_in_sample", [False, True])
def test_two_components_that_are_apart(is_in_sample):
    rng = np.random.default_rng(8)
    wrong = rng.random(2000) < 0.2
    margins = rng.normal(np.where(wrong, -7.0, -2.0), 1)
    given = {"in_sample": margins} if is_in_sample else {"margins": margins, "antisymmetric": False}
    result = estimate_wrong_labels(**given)
    assert result.share_low <= wrong.mean() <= result.share_high and result.share_high - result.share_low < 0.06
    assert auc(result.scores, wrong) > 0.99


def test_two_components_that_cannot_be_told_apart_have_a_wide_interval():
    result = estimate_wrong_labels(np.random.default_rng(9).normal(size=400), antisymmetric=False)
    assert result.share_high - result.share_low > 0.4


def test_votes_are_points_of_the_other_pairs():
    pairs = [("p", "a", "b"), ("p", "a", "c"), ("p", "c", "a"), ("q", "a", "b"), ("q", "c", "d"), ("p", "b", "b")]
    assert votes(*zip(*pairs, strict=True)).tolist() == [0.0, -1.0, -3.0, 0.0, 0.0, 0.0]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(0, 2), st.integers(0, 3), st.integers(0, 3)]), min_size=1, max_size=12), st.data()
)
def test_a_vote_does_not_know_its_label(pairs, data):
    i = data.draw(st.integers(0, len(pairs) - 1))
    group, won, lost = pairs[i]
    turned = [*pairs[:i], (group, lost, won), *pairs[i + 1 :]]
    before, after = votes(*zip(*pairs, strict=True)), votes(*zip(*turned, strict=True))
    assert before.dtype == np.float64 and after[i] == -before[i]
    others = {x for j, pair in enumerate(pairs) if j != i and pair[0] == group for x in pair[1:]}
    assert before[i] == 0 or {won, lost} & others


@pytest.mark.parametrize("share", [0.1, 0.3])
def test_votes_and_margins_together_find_more_than_either(share):
    groups, vote, margins, wrong = draw_prompts(700, share, 0.75, 0)
    both = estimate_wrong_labels(margins, votes=vote, groups=groups)
    alone = [estimate_wrong_labels(x, groups=groups) for x in (margins, vote)]
    assert auc(both.scores, wrong) > max(auc(x.scores, wrong) for x in alone) + 0.003
    assert both.share_high - both.share_low < min(x.share_high - x.share_low for x in alone)
    for rows in np.array_split(np.argsort(both.probabilities), 5):
        assert abs(both.probabilities[rows].mean() - wrong[rows].mean()) < 0.06


def test_interval_covers_with_votes_which_depend_on_each_other():
    draws = [draw_prompts(60, 0.2, 0.8, seed)[:3] for seed in range(20)]
    results = [estimate_wrong_labels(margins, votes=vote, groups=groups) for groups, vote, margins in draws]
    assert np.mean([x.share_low <= 0.2 <= x.share_high for x in results]) >= 0.85


def test_votes_by_chance_change_little():
    groups, vote, margins, wrong = draw_prompts(300, 0.3, 0.8, 1)
    alone = estimate_wrong_labels(margins, groups=groups)
    chance = vote * np.random.default_rng(0).choice([-1, 1], len(vote))
    both = estimate_wrong_labels(margins, votes=chance, groups=groups)
    assert auc(both.scores, wrong) > auc(alone.scores, wrong) - 0.005
    assert both.share == pytest.approx(alone.share, abs=0.03)


def test_votes_of_labels_that_are_wrong_together_have_no_effect():
    """No vote is against its label, or some are and the share would contradict that of the margins."""
    groups, vote, margins, _ = draw_prompts(300, 0.3, 0.8, 1)
    alone = estimate_wrong_labels(margins, groups=groups)
    for together in (np.zeros(len(vote)), np.abs(vote), np.where(groups < 5, vote, np.abs(vote))):
        found = estimate_wrong_labels(margins, votes=together, groups=groups)
        np.testing.assert_array_equal(found.scores, alone.scores)
        assert found.share == alone.share


def test_votes_of_few_pairs_count_where_there_are_any():
    groups, vote, margins, wrong = draw_prompts(500, 0.2, 0.75, 2)
    has_any = groups < 50
    few = estimate_wrong_labels(margins, votes=np.where(has_any, vote, 0), groups=groups)
    alone = estimate_wrong_labels(margins, groups=groups)
    assert auc(few.scores[has_any], wrong[has_any]) > auc(alone.scores[has_any], wrong[has_any]) + 0.1
    assert auc(few.scores[~has_any], wrong[~has_any]) == pytest.approx(auc(alone.scores[~has_any], wrong[~has_any]))


def test_margins_in_sample_rank_beside_votes():
    groups, vote, margins, wrong = draw_prompts(500, 0.3, 0.75, 3)
    inner = margins + np.random.default_rng(0).normal(0, 0.7, len(margins)) + 3.0
    outer = margins + np.random.default_rng(1).normal(0, 0.7, len(margins))
    alone, all_three = (estimate_wrong_labels(outer, votes=vote, groups=groups, in_sample=x) for x in (None, inner))
    assert auc(all_three.scores, wrong) > auc(alone.scores, wrong) + 0.005
    np.testing.assert_allclose(np.sort(all_three.probabilities), np.sort(alone.probabilities))


def test_share_is_not_drawn_far_to_the_middle():
    """The mean over the same flat prior is .11 too low here."""
    errors = [estimate_wrong_labels(draw(256, 0.4, 0.85, seed)[0]).share - 0.4 for seed in range(30)]
    assert -0.09 < np.mean(errors) < 0.0


def test_labels_that_were_checked_tell_the_share():
    margins, wrong = draw(1000, 0.3, 0.75, 10)
    before = estimate_wrong_labels(margins)
    first = np.flatnonzero(before.ranks <= 200)
    checked = np.full(1000, np.nan)
    checked[first] = wrong[first]
    after = estimate_wrong_labels(margins, checked=checked)
    assert after.share_high - after.share_low < 0.5 * (before.share_high - before.share_low)
    assert after.share_low <= 0.3 <= after.share_high and abs(after.share - 0.3) < 0.05
    assert ((after.probabilities > 0.5) == wrong)[first].all()


@pytest.mark.parametrize("margins", [[0.7], [1.0, 1.0, 1.0, -1.0] * 50, np.ones(300)])
def test_without_spread_the_interval_says_so(margins):
    """How often signs agree bounds the share from above; below, nothing is known."""
    result = estimate_wrong_labels(margins)
    assert result.share_low <= 0.02 and np.isfinite(result.probabilities).all()
    assert result.share_high == pytest.approx(0.5) if len(margins) == 1 else result.share_high < 0.5


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0.0, 0.03), (0.49, 0.3, 0.5)])
def test_share_at_its_ends(share, low, high):
    result = estimate_wrong_labels(draw(2000, share, 0.9, 11)[0])
    assert low <= result.share <= high and result.share_low <= share <= result.share_high + 0.01
    assert np.isfinite(result.scores).all()


def test_chance_says_nothing_about_the_share():
    result = estimate_wrong_labels(np.random.default_rng(12).normal(size=1000))
    assert result.share_low < 0.1 and result.share_high == pytest.approx(0.5)
    assert 0.05 < result.probabilities.min() and result.probabilities.max() < 0.8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "nothing to estimate"),
        ({"margins": [1.0, np.nan]}, "`margins` has 1 rows that are not finite, as row 1"),
        ({"margins": [[1.0, 2.0], [1.0, np.inf]]}, "as row 1"),
        ({"margins": []}, r"`margins` has shape \(0,\)"),
        ({"margins": np.ones((2, 2, 2))}, r"shape \(2, 2, 2\)"),
        ({"margins": [0.0, 0.0]}, "`margins` are all 0"),
        ({"margins": [1.0, 1.0], "antisymmetric": False}, "`margins` are all equal"),
        ({"margins": [1.0, 2.0], "in_sample": [1.0, 1.0]}, "`in_sample` are all equal"),
        ({"margins": [1.0, 2.0], "in_sample": [1.0, 2.0, 3.0]}, "2 rows and `in_sample` of 3"),
        ({"margins": [1.0, 2.0], "groups": [0]}, r"`groups` has shape \(1,\)"),
        ({"margins": [1.0, 2.0], "checked": [1.0]}, r"`checked` has shape \(1,\)"),
        ({"margins": [1.0, 2.0], "checked": [0.5, 1.0]}, "`checked` has the value 0.5"),
        ({"in_sample": [1.0, 2.0], "checked": [0, 1]}, "`checked` needs antisymmetric"),
        ({"margins": [1.0, 2.0], "votes": [1.0, -1.0]}, "pass the prompts as `groups`"),
        ({"margins": [1.0, 2.0], "votes": [1.0], "groups": [0, 0]}, r"`votes` has shape \(1,\)"),
        (
            {"margins": [1.0, 2.0], "votes": [1.0, np.nan], "groups": [0, 0]},
            "`votes` has 1 values that are not finite",
        ),
        ({"in_sample": [1.0, 2.0], "votes": [1.0, -1.0], "groups": [0, 0]}, "`votes` need antisymmetric `margins`"),
        ({"margins": [1.0, 2.0], "antisymmetric": False, "votes": [1, -1], "groups": [0, 0]}, "`votes` need"),
    ],
)
def test_wrong_input_is_said(arguments, message):
    with pytest.raises(ValueError, match=message):
        estimate_wrong_labels(**arguments)
