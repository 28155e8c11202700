"""The benchmark of Sven's step: all ways compute the same step, and Sven's is faster than the whole Jacobian's."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.sven import VOCAB, make_model, peak_memory, steps


def test_all_ways_make_the_same_step():
    model = make_model(8)
    ids = torch.randint(VOCAB, (4, 6), generator=torch.Generator().manual_seed(0))
    found = {name: step() for name, step in steps(model, ids).items() if name != "backward"}
    assert {"gram", "svd", "jacrev"} <= found.keys()
    for step in found.values():
        torch.testing.assert_close(step, found["svd"], rtol=1e-2, atol=1e-3 * found["svd"].norm().item())


def test_peak_memory_is_that_of_the_tensors():
    assert 7.9 < peak_memory(lambda: torch.zeros(2 << 20, dtype=torch.float32).add_(1)) < 8.5


@pytest.mark.slow
def test_gram_takes_a_quarter_of_the_jacobians_time(tmp_path):
    """Of a Llama with 115,008 parameters and 32 rows."""
    file = tmp_path / "speed.json"
    command = [sys.executable, "-m", "benchmarks.sven", "--widths", "64", "--batches", "32", "--repeats", "1"]
    subprocess.run([*command, "--output", str(file)], cwd=Path(__file__).parents[2], check=True, capture_output=True)
    seconds = {row["name"]: row["seconds"] for row in json.loads(file.read_text())["rows"]}
    assert seconds["gram"] <= 0.25 * seconds["jacrev"]
