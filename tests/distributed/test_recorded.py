"""Checkpoints that version 0.1.0 wrote under FSDP2 and ZeRO-2 are resumed from, and end where its own runs ended."""

import tarfile

import pytest
import torch

from .launch import launch_runs
from .record_checkpoints import FOLDER, OPTIONS
from .records import assemble


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.mark.parametrize("path", ["fsdp2", "zero2"])
def test_a_recorded_checkpoint(path, tmp_path):
    with tarfile.open(FOLDER / f"{path}.tar.xz") as file:
        file.extractall(tmp_path, filter="data")
    expected = torch.load(tmp_path / "checkpoint-3" / "expected.pt", weights_only=True)
    resume = {"resume": str(tmp_path / "checkpoint-3")}
    (ranks,) = launch_runs(path, {"resumed": OPTIONS | resume}, tmp_path).values()
    assert ranks[0]["error"] is None, ranks[0]["error"]
    assert [step["step"] for step in ranks[0]["steps"]] == [4, 5, 6]
    weights = assemble(ranks, -1, "after")
    assert weights.keys() == expected.keys()
    for number, value in expected.items():
        # The same bit for bit on the machine that wrote the files; elsewhere the gradients are rounded otherwise.
        torch.testing.assert_close(weights[number], value, rtol=1e-6, atol=1e-6)
