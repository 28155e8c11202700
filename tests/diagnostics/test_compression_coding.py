"""The file gives back what it was made of, it is as short as entropy allows, and its levels are the best there are."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prm_hf.diagnostics.coding import Quantized, decode, encode, prefix_bits
from prm_hf.diagnostics.quantize import StraightThrough, fine_tune, nearest, quantize


RECORDED = json.loads((Path(__file__).parent / "pacbayes_quant.json").read_text())
VECTORS = {name: torch.tensor(values, dtype=torch.float64) for name, values in RECORDED["vectors"].items()}


def entropy_bits(symbols: np.ndarray) -> float:
    counts = np.bincount(symbols)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / len(symbols))).sum())


def payload_bits(quantized: Quantized) -> int:
    return 8 * len(encode(quantized)) - 8 - 16 * len(quantized.codebook)


def check_roundtrip(symbols: np.ndarray, levels: int) -> None:
    quantized = Quantized(np.linspace(-2, 3, levels).astype(np.float16), symbols.astype(np.int32))
    found = decode(encode(quantized), len(symbols))
    assert np.array_equal(found.symbols, symbols)
    assert np.array_equal(found.codebook, quantized.codebook)
    assert np.array_equal(found.values, quantized.values)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_file_gives_back_its_vector(data):
    levels = data.draw(st.integers(1, 255))
    check_roundtrip(np.array(data.draw(st.lists(st.integers(0, levels - 1), min_size=1, max_size=60))), levels)


@pytest.mark.parametrize("n", [1, 255, 4096, 4097, 20_000])
def test_a_long_file_is_as_short_as_the_entropy_allows(n):
    symbols = np.random.default_rng(n).choice(7, n, p=[0.4, 0.2, 0.1, 0.1, 0.1, 0.05, 0.05])
    check_roundtrip(symbols, 7)
    # The frequencies are learnt on the way: (levels - 1) / 2 · log2 n bits (Krichevsky & Trofimov), and 2 bytes to end
    quantized = Quantized(np.arange(7).astype(np.float16), symbols.astype(np.int32))
    assert payload_bits(quantized) <= entropy_bits(symbols) + 3 * math.log2(n) + 7 + 16


def test_the_recorded_symbols_that_pactl_cannot_decode():
    for case in RECORDED["arith"]:
        symbols = np.array(case["symbols"])
        assert entropy_bits(symbols) == pytest.approx(case["ideal"], abs=1e-6)
        check_roundtrip(symbols, case["levels"])


@pytest.mark.parametrize("case", RECORDED["quantize_vector"], ids=lambda c: f"{c['vec']}-{c['levels']}")
def test_levels_are_the_best_there_are(case):
    vector = VECTORS[case["vec"]]
    quantized = quantize(vector, case["levels"])
    error = np.square(quantized.values.astype(np.float64) - vector.numpy()).mean()
    assert error == pytest.approx(case["kmeans1d_optimal_mse"], abs=5e-7)  # levels are rounded to float16
    assert error <= case["mse"] + 5e-7


# scikit-learn's levels, the other half of the cases, were not recorded
BINS = [case for case in RECORDED["quantize_vector"] if not case["use_kmeans"]]


@pytest.mark.parametrize("case", BINS, ids=lambda c: f"{c['vec']}-{c['levels']}")
def test_a_file_is_not_much_longer_than_pactls_message(case):
    """With pactl's own levels; its message has a table of frequencies and no end."""
    vector, levels = VECTORS[case["vec"]], case["levels"]
    most = vector.abs().max().item() + 1e-6
    edges = np.linspace(-most, most, levels + 1)
    symbols = (np.digitize(vector.numpy(), edges) - 1).astype(np.int32)
    quantized = Quantized(edges[:-1].astype(np.float16), symbols)
    assert entropy_bits(quantized.symbols) == pytest.approx(case["ideal_bits"], abs=1e-6)
    assert 8 * len(encode(quantized)) <= case["message_len"] + 32
    assert prefix_bits(int(case["message_len"])) + case["message_len"] == pytest.approx(case["prefix_message_len"])


def test_straight_through_gradients_are_the_recorded_ones():
    case = RECORDED["quantize_ste"]
    values = torch.tensor(case["params"], requires_grad=True)
    codebook = torch.tensor(case["centroids"], requires_grad=True)
    found = StraightThrough.apply(values, codebook)
    found.backward(torch.tensor(case["upstream_grad"]))
    assert found.tolist() == case["q"]
    assert values.grad.tolist() == case["grad_params"]
    assert codebook.grad.tolist() == case["grad_centroids"]


def test_fine_tuning_lowers_the_loss_at_as_many_levels():
    generator = torch.Generator().manual_seed(0)
    curvature = torch.randn(12, 60, generator=generator)
    best = torch.randn(60, generator=generator)

    def loss(values):
        return (curvature @ (torch.as_tensor(values) - best)).square().sum().item()

    before = quantize(best, 5)
    after = fine_tune(best, before, lambda v, _: 2 * curvature.T @ (curvature @ (v - best)), 300, 0.01)
    assert len(after.codebook) == 5
    assert loss(after.values) < 0.5 * loss(before.values)


def test_few_values_need_few_levels():
    assert len(quantize(torch.tensor([1.0, 1.0, 2.0]), 7).codebook) == 2
    assert quantize(torch.zeros(5), 3).values.tolist() == [0.0] * 5


def test_what_is_no_file_is_refused():
    data = encode(quantize(torch.randn(300, generator=torch.Generator().manual_seed(0)), 9))
    for wrong in (b"", b"\x00", data[:10]):
        with pytest.raises(ValueError, match="not the file"):
            decode(wrong, 300)
    with pytest.raises(ValueError, match="not finite"):
        quantize(torch.tensor([1.0, math.nan]), 3)
    with pytest.raises(ValueError, match="float16 ends at 65504"):
        encode(quantize(torch.tensor([1.0, 1e6]), 2))


def test_nearest_is_the_nearest():
    values, levels = torch.randn(200), torch.tensor([0.5, -1.0, 0.1])
    assert torch.equal(nearest(values, levels), (values[:, None] - levels).abs().argmin(1))
