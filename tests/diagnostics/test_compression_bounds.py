"""The bounds equal what pactl and SubLoRA gave, hold in simulation, and are monotone in all that they depend on."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prm_hf.diagnostics import bounds


RECORDED = json.loads((Path(__file__).parent / "pacbayes_bounds.json").read_text())
EXACT = {"rel": 0, "abs": 1e-9}


@pytest.mark.parametrize("case", RECORDED["pac_bayes_bound_opt"])
def test_catoni_and_kl_equal_the_recorded_values(case):
    arguments = case["train_error"], case["divergence"], case["n"], case["epsilon"]
    assert bounds.catoni_bound(*arguments) == pytest.approx(case["value"], **EXACT)
    assert bounds.kl_bound(*arguments) == pytest.approx(case["maurer_kl_inverse_ref"], **EXACT)


@pytest.mark.parametrize("case", RECORDED["catoni_sublora"])
def test_catoni_equals_sublora(case):
    arguments = case["train_error"], case["divergence"], case["sample_size"], case["epsilon"]
    assert bounds.catoni_bound(*arguments) == pytest.approx(case["value"], **EXACT)


@pytest.mark.parametrize("case", RECORDED["catoni_pactl"])
def test_pactls_other_catoni_bound_chooses_gamma_by_the_data_and_does_not_pay_for_it(case):
    risk, kl, n, delta = (case[key] for key in ("train_error", "divergence", "sample_size", "epsilon"))
    gammas = np.geomspace(n / 100, n * 100, 20001)
    least = min(bounds.catoni_at(gamma, risk, kl - math.log(delta), n) for gamma in gammas)
    assert least == pytest.approx(case["value"], abs=1e-6)
    assert bounds.catoni_bound(risk, kl, n, delta) > case["value"]


@pytest.mark.parametrize("name", ["mcallester", "convexity"])
def test_other_bounds_equal_the_recorded_values(name):
    function = getattr(bounds, f"{name}_bound")
    for case in RECORDED[name]:
        assert function(case["train_error"], case["div"], case["sample_size"]) == pytest.approx(case["value"], **EXACT)


def test_catoni_at_one_gamma_equals_the_recorded_values():
    for case in RECORDED["pac_bayes_bound"]:
        nats = case["divergence"] - math.log(0.05)
        found = bounds.catoni_at(math.exp(case["gamma"]), case["train_error"], nats, case["n"])
        assert found == pytest.approx(case["value"], **EXACT)


@pytest.mark.parametrize("case", RECORDED["llm_subsampling_bound"])
def test_subsampling_bound_equals_the_recorded_values(case):
    keys = ("train_error", "div", "data_size", "sample_size", "epsilon", "delta")
    assert bounds.subsampling_bound(*(case[key] for key in keys)) == pytest.approx(case["value"], **EXACT)


def test_small_language_models_have_the_recorded_bounds():
    """20,000 documents of 17 words, 2,000 of them evaluated; 5 bits for what was tried."""
    for case in json.loads((Path(__file__).parent / "sublora_mini.json").read_text())["results"]:
        kl = (case["message_len"] + 2 * math.log2(case["message_len"]) + 5) * math.log(2)
        scale = math.log2(1 + (1 - case["alpha"]) * 17 / case["alpha"])
        found = bounds.subsampling_bound(case["bpd_train"], kl, 20_000, 2_000, scale=scale)
        top_1 = bounds.subsampling_bound(case["top1_err"], kl, 20_000, 2_000)
        assert kl == pytest.approx(case["div_nats"], abs=1e-6)
        assert found == pytest.approx(case["bpd_bound"], abs=1e-6)
        assert top_1 == pytest.approx(case["top1_bound"], abs=1e-6)
        assert (found < math.log2(17)) == case["nonvacuous"]


def test_catoni_finds_the_minimum_where_pactl_stops_at_one():
    assert bounds.catoni_bound(0.8138, 60.9, 157_353) == pytest.approx(0.8265, abs=1e-4)
    rng = np.random.default_rng(0)
    for _ in range(40):
        risk, kl, n = rng.uniform(0.7, 0.99), rng.uniform(10, 300), int(rng.integers(20_000, 200_000))
        found = bounds.catoni_bound(risk, kl, n)
        assert risk < found <= 1
        assert found <= bounds.kl_bound(risk, kl, n) + 0.01


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.floats(0, 20))
def test_kl_inverse_is_the_inverse(risk, c):
    p = bounds.kl_inverse(risk, c)
    assert risk <= p <= 1
    if 1e-12 < risk < 1 - 1e-12 and p < 1 - 1e-6:  # there the digits of p say what c was
        kl = risk * math.log(risk / p) + (1 - risk) * math.log((1 - risk) / (1 - p))
        assert kl == pytest.approx(c, abs=1e-6)


KINDS = ("kl", "catoni", "subsampling")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(st.floats(0, 1), st.floats(1, 1e4), st.integers(10, 10**6), st.floats(1e-4, 0.5), st.floats(0.1, 1))
def test_a_bound_is_monotone_and_not_below_the_empirical_risk(kind, risk, kl, n, delta, share):
    evaluated = max(2, int(share * n))

    def bound(**changed):
        values = {"risk": risk, "kl": kl, "n": n, "n_evaluated": evaluated, "delta": delta} | changed
        return bounds.bound_of_units(kind, **values, scale=2.0, tried=3)

    found = bound()
    assert 2 * risk <= found + 1e-9 and found <= 2
    assert bound(kl=2 * kl) >= found - 1e-9
    assert bound(delta=delta / 2) >= found - 1e-9
    assert bound(n=4 * n, n_evaluated=4 * evaluated) <= found + 1e-9
    assert bound(risk=risk / 2) <= found + 1e-9


def violations(draw) -> float:
    """The share of 1,000 draws of the data in which the risk of the chosen hypothesis is above its bound."""
    rng = np.random.default_rng(0)
    return np.mean([draw(rng) for _ in range(1000)])


HYPOTHESES, N, DELTA = 256, 60, 0.1


def choice_of_the_best(kind, kl, n_evaluated=N, tried=HYPOTHESES):
    risks = np.linspace(0.3, 0.5, HYPOTHESES)

    def draw(rng):
        losses = rng.random((HYPOTHESES, N)) < risks[:, None]
        taken = losses[:, rng.permutation(N)[:n_evaluated]].mean(1)
        best = int(taken.argmin())
        args = (float(taken[best]), kl, N, n_evaluated, DELTA, 1.0, tried)
        return risks[best] > bounds.bound_of_units(kind, *args)

    return draw


@pytest.mark.parametrize("n_evaluated", [N, 20])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bound_fails_in_at_most_a_share_delta_of_the_draws(kind, n_evaluated):
    """The best of 256 hypotheses by the data, each with a message of 8 bits."""
    assert violations(choice_of_the_best(kind, math.log(HYPOTHESES), n_evaluated)) <= DELTA


def test_a_bound_fails_more_often_where_the_choice_is_not_paid_for():
    assert violations(choice_of_the_best("kl", -math.log(2 * math.sqrt(N)))) > 3 * DELTA
    # SubLoRA's does not pay for what the evaluated units choose among
    assert violations(choice_of_the_best("kl", math.log(HYPOTHESES), 20, tried=1)) > violations(
        choice_of_the_best("kl", math.log(HYPOTHESES), 20)
    )


def test_the_constant_of_the_kl_bound_holds_below_eight_units():
    for n in range(1, 9):
        moments = [math.comb(n, k) * (k / n) ** k * (1 - k / n) ** (n - k) for k in range(n + 1)]
        assert sum(moments) <= 2 * math.sqrt(n)
