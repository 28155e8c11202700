"""Twenty kills by SIGKILL, at steps and inside saving: the run that goes on ends with the weights of one without."""

import json
import random

import pytest
import torch

from ..distributed.launch import accelerate_launch


pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# By name of the file in `accelerate_configs/`: processes, and kills in each of two chains of attempts.
PATHS = {"single": (1, 4), "ddp": (2, 3), "zero2": (2, 3)}
WRITES = 12  # files that the first process writes for two checkpoints, at least


def draw_kill(rng: random.Random, world_size: int) -> dict:
    """At a step, in the middle of a file, right after one, or while an old checkpoint is removed."""
    event = rng.choice(["step", "write", "write", "write", "remove"])
    if event == "remove":
        return {"event": event, "count": rng.randint(1, 6)}
    rank = rng.randrange(world_size)
    if event == "step":
        return {"event": event, "count": rng.randint(1, 4), "rank": rank}
    count = rng.randint(1, WRITES if rank == 0 else 2)
    return {"event": event, "count": count, "rank": rank, "written": rng.choice([0, rng.random(), 1])}


def test_there_are_twenty_kills():
    assert sum(2 * kills for _, kills in PATHS.values()) == 20


@pytest.mark.parametrize("path", PATHS)
def test_a_killed_run_ends_like_one_that_was_not(path, tmp_path):
    world_size, n_kills = PATHS[path]
    rng = random.Random(f"kills of {path}")
    chains = {"whole": [None]}
    chains |= {f"chain{i}": [*(draw_kill(rng, world_size) for _ in range(n_kills)), None] for i in range(2)}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"world_size": world_size, "folder": str(tmp_path), "chains": chains}))
    accelerate_launch(path, ["tests.faults.worker", str(plan)], tmp_path / "log", world_size)
    print((tmp_path / "log").read_text())
    for rank in range(world_size):
        whole = torch.load(tmp_path / "whole" / f"weights{rank}.pt", weights_only=True)
        for chain in ("chain0", "chain1"):
            weights = torch.load(tmp_path / chain / f"weights{rank}.pt", weights_only=True)
            assert weights.keys() == whole.keys()
            assert all(torch.equal(weights[name], whole[name]) for name in whole), chain
    for chain in ("chain0", "chain1"):
        assert len([*(tmp_path / chain).glob("ended*.killed*")]) == n_kills
        starts = [int(line) for line in (tmp_path / chain / "starts").read_text().split()]
        assert len(starts) == n_kills + 1 and starts == sorted(starts) and starts[-1] > 0
