"""Writes `tests/distributed/recorded/`: checkpoints of version 0.1.0 under FSDP2 and ZeRO-2.

Later versions have to read them. The script was run once with that version, by `python -m
tests.distributed.record_checkpoints`, and is kept to show what the files hold: the checkpoint of a run after three of
six steps, and the weights at the end of the run.
"""

import tarfile
import tempfile
from pathlib import Path

import torch

from .launch import launch_runs
from .plans import PER_ROW, SAVED
from .records import assemble


FOLDER = Path(__file__).parent / "recorded"
OPTIONS = {
    "prm": PER_ROW | {"warmup_steps": 1},
    "model": {"hidden_size": 8, "intermediate_size": 9, "num_attention_heads": 2},
    **SAVED,
}
# What `Trainer` and DeepSpeed write and nothing reads to resume
UNREAD = ("training_args.bin", "zero_to_fp32.py", "zero_to_torch.py", "generation_config.json")


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for path in ("fsdp2", "zero2"):
        with tempfile.TemporaryDirectory() as folder:
            (ranks,) = launch_runs(path, {"recorded": OPTIONS}, Path(folder)).values()
            assert ranks[0]["error"] is None, ranks[0]["error"]
            checkpoint = Path(folder, "recorded", "checkpoint-3")
            torch.save(assemble(ranks, -1, "after"), checkpoint / "expected.pt")
            with tarfile.open(FOLDER / f"{path}.tar.xz", "w:xz") as file:
                for item in sorted(x for x in checkpoint.rglob("*") if x.is_file() and x.name not in UNREAD):
                    file.add(item, Path("checkpoint-3", item.relative_to(checkpoint)), filter=_anonymous)


def _anonymous(item: tarfile.TarInfo) -> tarfile.TarInfo:
    item.uid = item.gid = item.mtime = 0
    item.uname = item.gname = ""
    return item


if __name__ == "__main__":
    main()
