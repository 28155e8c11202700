"""Two processes with gloo make the steps of one: the rows of a step are those of both."""

import pytest
import torch

from ..distributed.launch import accelerate_launch
from .launched import runs
from .trainer_runs import assert_near


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tmp_path):
    accelerate_launch("ddp", ["tests.sven.launched", str(tmp_path)], tmp_path / "log", 2)
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in range(2)]
    assert [rank["world_size"] for rank in ranks] == [2, 2]
    for name, expected in runs(tmp_path / "alone", 1).items():
        assert torch.equal(ranks[0]["runs"][name], ranks[1]["runs"][name]), name
        assert_near(ranks[0]["runs"][name], expected)
