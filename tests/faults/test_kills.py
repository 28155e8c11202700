"""Twenty kills by SIGKILL, at steps and inside saving: the run that goes on ends with the weights of one without."""

import json
import random
from pathlib import Path

import pytest
import torch

from prm_hf.trainers.completeness import problems_of

from ..distributed.launch import accelerate_launch


pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# By name of the file in `accelerate_configs/`: processes, and kills in each of two chains of attempts.
PATHS = {"single": (1, 4), "ddp": (2, 3), "zero2": (2, 3)}
WRITES = 12  # files that the first process writes for two checkpoints, at least
# What a checkpoint holds besides that a run does not need to go on. (DeepSpeed has the weights in its own files, and
# whether it needs scheduler.pt is told by its configuration.)
NEEDLESS = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training_args.bin"}
NEEDLESS_TO = {"single": NEEDLESS, "ddp": NEEDLESS}
NEEDLESS_TO["zero2"] = NEEDLESS | {"model.safetensors", "scheduler.pt", "zero_to_fp32.py", "zero_to_torch.py"}


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
    assert files_not_missed(tmp_path / "whole" / "run" / "checkpoint-20") == NEEDLESS_TO[path]


def files_not_missed(checkpoint: Path) -> set[str]:
    """The names of the files without which a checkpoint counts as complete, after a look at each."""
    needless = set()
    for file in [path for path in checkpoint.rglob("*") if path.is_file()]:
        content = file.read_bytes()
        file.write_bytes(content[: len(content) // 2])
        cut_off = problems_of(checkpoint)
        assert cut_off or file.suffix not in (".pt", ".pth", ".bin", ".json", ".safetensors"), file
        file.unlink()
        if not problems_of(checkpoint):
            needless.add(file.name)
        file.write_bytes(content)
    assert problems_of(checkpoint) == []
    return needless
