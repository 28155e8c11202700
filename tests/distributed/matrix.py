"""Prints the table of results/sharding_tables.md, measured anew: `python -m tests.distributed.matrix`."""

import tempfile
from pathlib import Path

from .conftest import Recorded
from .plans import PATHS, plan
from .records import compare_runs, replay


TITLES = {
    "single": "one process",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
    "zero0": "ZeRO-0",
    "zero1": "ZeRO-1",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero2_offload": "ZeRO-2, optimizer on the CPU",
    "zero3_offload": "ZeRO-3, optimizer and parameters on the CPU",
}
COLUMNS = {
    "per_tensor": "full, fp32",
    "per_param": "full, fp32, per_param",
    "per_row": "full, fp32, per_row",
    "lora": "LoRA, fp32",
    "bf16": "full, bf16",
    "lora_bf16": "LoRA, bf16",
    "bf16_fp32": "full, bf16, fp32 accumulation",
}


def number(x: float) -> str:
    return f"{x:.0e}".replace("e-0", "e-")


def cell(recorded: Recorded, path: str, name: str) -> str:
    """Masks and weights against the reference, masks against one process where that makes sense, and the resume."""
    if name not in plan(path):
        return "refused by DeepSpeed" if path == "zero0" else "–"
    ranks, prm = recorded.run(path, name), plan(path)[name]["prm"]
    mask, weight = replay(ranks, prm)
    text = f"{number(mask)} / {number(weight)}"
    if "bf16" not in name and path != "single" and prm["reduction"] == "per_tensor":
        text += f" / {number(compare_runs(ranks, recorded.run('single', name), prm)[0])}"
    resumed = compare_runs(recorded.run(path, f"{name}_resumed"), ranks, prm)
    return f"{text}, {'exact' if resumed == (0, 0) else number(max(resumed))}"


def main(root: Path) -> None:
    recorded = Recorded(root)
    print(f"| path | {' | '.join(COLUMNS.values())} |\n{'|---' * (len(COLUMNS) + 1)}|")
    for path in PATHS:
        print(f"| {TITLES[path]} | " + " | ".join(cell(recorded, path, name) for name in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(Path(folder))
