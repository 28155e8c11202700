"""Statistics of the comparison, on data with a known answer."""

import numpy as np
import pytest
from scipy import stats

from prm_hf.compare import statistics
from prm_hf.compare.statistics import bootstrap_interval, interpolate_at_kl, mean_over_log_kl, noise_floor, rate_at_kl


def test_mean_and_standard_error():
    mean, error, n = statistics.mean_and_standard_error(np.array([0.7, 0.72, 0.77]))
    assert (mean, n) == (pytest.approx(0.73), 3)
    assert error == pytest.approx(stats.sem([0.7, 0.72, 0.77]))
    mean, error, n = statistics.mean_and_standard_error(np.array([0.7]))
    assert mean == 0.7 and np.isnan(error) and n == 1
    assert statistics.mean_and_standard_error(np.array([]))[2] == 0
    assert statistics.proportion_standard_error(0.7, 600) == pytest.approx(0.0187, abs=1e-4)


def test_p_value_agrees_with_the_interval():
    rng = np.random.default_rng(1)
    holds_zero = []
    for shift in np.linspace(0, 0.12, 25):
        interval = bootstrap_interval(shift + rng.normal(0, 0.5, (4, 100)), resamples=300)
        holds_zero.append(interval.low <= 0 <= interval.high)
        assert (interval.p_value < 0.05) != holds_zero[-1] and interval.high > 0
    assert set(holds_zero) == {True, False}
    values = np.array([[0.01], [0.03], [0.05]])
    assert bootstrap_interval(values).p_value == pytest.approx(stats.ttest_1samp(values[:, 0], 0).pvalue, rel=1e-5)
    assert bootstrap_interval(-values).p_value == bootstrap_interval(values).p_value
    assert bootstrap_interval(np.zeros((2, 50))).p_value == 1 and np.isnan(bootstrap_interval([[0.1]]).p_value)


def test_holm():
    adjusted = statistics.holm([0.01, np.nan, 0.04, 0.03, 0.005, 0.9])
    # ascending: .005·5, .01·4, .03·3, .04·2 raised to the one before, .9
    assert adjusted == pytest.approx([0.04, np.nan, 0.09, 0.09, 0.025, 0.9], nan_ok=True)
    assert statistics.holm([]) == [] and statistics.holm([0.7, 0.8]) == [1.0, 1.0]


def test_interval_of_one_seed_is_that_of_the_paired_examples():
    rng = np.random.default_rng(0)
    difference = rng.choice([-1.0, 0.0, 1.0], p=[0.1, 0.75, 0.15], size=(1, 600))
    interval = bootstrap_interval(difference)
    half = 1.96 * difference.std(ddof=1) / np.sqrt(600)
    assert interval.mean == pytest.approx(difference.mean())
    assert interval.low == pytest.approx(interval.mean - half, abs=0.1 * half)
    assert interval.high == pytest.approx(interval.mean + half, abs=0.1 * half)
    assert (interval.seeds, interval.examples) == (1, 600)
    assert interval == bootstrap_interval(difference)  # reproducible


@pytest.mark.parametrize("seeds", [1, 3, 8])
def test_interval_covers_what_it_says(seeds):
    """Simulated differences with an effect of examples and of seed x example, and of seeds where they can be seen."""
    rng = np.random.default_rng(seeds)
    repeats, truth, hits, widths = 300, 0.01, 0, []
    spread = (0.0, 0.3, 0.0) if seeds == 1 else (0.01, 0.2, 0.35)
    for repeat in range(repeats):
        of_seed, of_example, of_both = (
            scale * rng.standard_normal(shape)
            for scale, shape in zip(spread, [(seeds, 1), (1, 150), (seeds, 150)], strict=True)
        )
        interval = bootstrap_interval(truth + of_seed + of_example + of_both, resamples=400, seed=repeat)
        hits += interval.low <= truth <= interval.high
        widths.append(interval.high - interval.low)
    true_error = np.sqrt(spread[0] ** 2 / seeds + spread[1] ** 2 / 150 + spread[2] ** 2 / (seeds * 150))
    assert 0.92 <= hits / repeats <= 0.99
    assert 0.95 <= np.mean(widths) / (2 * 1.96 * true_error) <= 1.2  # and is no wider than it must be


def test_examples_are_shared_by_the_seeds():
    """Ten seeds that give the same differences are no more evidence about the examples than one."""
    one = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=(1, 300))
    single, repeated = bootstrap_interval(one), bootstrap_interval(np.repeat(one, 10, axis=0))
    assert repeated.high - repeated.low == pytest.approx(single.high - single.low, rel=0.1)


def test_interval_over_seeds_alone_is_students():
    values = np.array([[0.01], [0.03], [0.02]])
    interval = bootstrap_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values[:, 0]))
    assert (interval.low, interval.high) == (pytest.approx(low, rel=1e-5), pytest.approx(high, rel=1e-5))


def test_no_interval_where_no_spread_can_be_measured():
    for values in ([[0.02]], [[0.0]], [[0.02], [0.02]]):
        interval = bootstrap_interval(np.array(values))
        assert not interval.known and np.isnan([interval.low, interval.high]).all()
    nothing = bootstrap_interval(np.zeros((2, 50)))
    assert nothing.known and (nothing.low, nothing.high) == (0, 0)


@pytest.mark.parametrize("values", [np.ones(3), np.empty((0, 3)), np.array([[np.nan, 1.0]])])
def test_interval_refuses(values):
    with pytest.raises(ValueError, match="`values` must"):
        bootstrap_interval(values)


def test_interpolation_is_linear_in_log_kl():
    kl, values = np.array([1.0, 0.01, 0.1]), np.array([[0.6], [0.7], [0.8]])
    assert interpolate_at_kl(kl, values, 0.1)[0] == pytest.approx(0.8)
    assert interpolate_at_kl(kl, values, np.sqrt(0.1 * 0.01))[0] == pytest.approx(0.75)
    assert interpolate_at_kl(kl, values, 10**-0.25)[0] == pytest.approx(0.65)
    for outside in (0.009, 1.01, np.nan, 0.0):
        assert interpolate_at_kl(kl, values, outside) is None
    assert interpolate_at_kl(np.array([np.nan, 0.2]), np.array([[1.0], [0.5]]), 0.2)[0] == 0.5
    assert interpolate_at_kl(np.array([0.2, 0.2]), np.array([[1.0], [0.5]]), 0.2)[0] == 0.75
    with pytest.raises(ValueError, match="must be"):
        interpolate_at_kl(kl, values[:2], 0.1)
    assert statistics.bracket_ratio(kl, 0.03) == pytest.approx(10)
    assert statistics.bracket_ratio(kl, 0.1) == 1


def test_area_over_log_kl():
    kl = np.array([1.0, 0.01, 0.1])
    values = np.array([[0.6, 0.0], [0.7, 1.0], [0.8, 0.5]])
    # .7 to .8 to .6 over two decades: means .75 and .7 of equal width
    assert mean_over_log_kl(kl, values, 0.01, 1.0) == pytest.approx([0.725, 0.5])
    assert mean_over_log_kl(kl, values, 0.1, 1.0)[0] == pytest.approx(0.7)
    # from half-way up the first slope to half-way down the second
    assert mean_over_log_kl(kl, values, 10**-1.5, 10**-0.5)[0] == pytest.approx((0.775 + 0.75) / 2)
    fine = np.geomspace(0.02, 0.7, 2001)
    heights = [interpolate_at_kl(kl, values, at)[0] for at in fine]
    assert mean_over_log_kl(kl, values, 0.02, 0.7)[0] == pytest.approx(np.trapezoid(heights) / 2000, abs=1e-5)
    for low, high in ((0.009, 1.0), (0.01, 1.1), (0.1, 0.1)):
        assert mean_over_log_kl(kl, values, low, high) is None
    assert statistics.shared_range([kl, [0.02, 3.0], [np.nan, 0.001, 0.5]]) == (0.02, 0.5)
    assert statistics.shared_range([kl, [2.0, 3.0]]) is None and statistics.shared_range([kl, [np.nan]]) is None


def test_rate_at_kl_is_linear_in_the_logarithms():
    rates, kl = [1e-3, 1e-5, 1e-4], [1.0, 0.01, 0.25]
    assert rate_at_kl(rates, kl, 0.25) == pytest.approx(1e-4)
    assert rate_at_kl(rates, kl, 0.05) == pytest.approx(10**-4.5)
    assert rate_at_kl(rates, kl, 2.0) is None and rate_at_kl(rates, kl, 0.009) is None
    assert rate_at_kl([1e-4, 1e-3], [np.nan, 0.1], 0.1) is None
    assert rate_at_kl([1, 2, 3], [0.1, 0.3, 0.2], 0.3) == pytest.approx(2)  # the smallest rate that drifts so far


@pytest.mark.parametrize("gain", [0.0, 0.03])
def test_area_difference_is_covered(gain):
    """Simulated runs of two methods at other learning rates each, whose curves differ by `gain` at every KL."""
    rng = np.random.default_rng(5)
    seeds, examples, hits, found, repeats = 4, 120, 0, [], 200
    kl_a, kl_b = np.geomspace(0.02, 1, 4), np.geomspace(0.05, 2, 3)
    for repeat in range(repeats):
        ease = rng.normal(0, 0.25, examples)  # of an example, in all runs; and of each seed's data
        differences = []
        for _ in range(seeds):
            data = rng.normal(0, 0.15, examples)

            def run(kl, gain, data=data, ease=ease):
                height = 0.7 + 0.05 * np.log(kl)[:, None] + gain  # a straight line in log KL
                return height + ease + data + rng.normal(0, 0.2, (len(kl), examples))

            a, b = run(kl_a, gain), run(kl_b, 0.0)
            differences.append(mean_over_log_kl(kl_a, a, 0.05, 1) - mean_over_log_kl(kl_b, b, 0.05, 1))
        interval = bootstrap_interval(np.stack(differences), resamples=300, seed=repeat)
        hits += interval.low <= gain <= interval.high
        found.append(interval.mean)
    assert 0.90 <= hits / repeats <= 0.99
    assert np.mean(found) == pytest.approx(gain, abs=0.002)


def test_noise_floor_is_where_pure_noise_settles():
    assert noise_floor() == pytest.approx(1 / 21)
    rng = np.random.default_rng(0)
    for beta1, softness, alpha in ((0.9, 1.0, 1.0), (0.8, 0.5, 2.0)):
        m, s, size = np.zeros(4000), np.zeros(4000), 4000
        for _ in range(600):
            g = rng.standard_normal(size)
            s = 0.99 * s + 0.01 * (g - m) ** 2
            m = beta1 * m + (1 - beta1) * g
        signal, noise = np.mean(m**2), np.mean(s)
        assert noise_floor(beta1, softness, alpha) == pytest.approx(
            signal / (signal + softness * alpha * noise), rel=0.06
        )
