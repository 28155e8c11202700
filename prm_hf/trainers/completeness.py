"""Which checkpoints of a `Trainer` are complete: all files of their layout are there, and none is cut off."""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed.checkpoint as dcp
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME

from .._files import problem_with, problems_in
from ..sharding.checkpoint import SHARDED_MODEL, SHARDED_OPTIMIZER


WEIGHTS = ("model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "adapter_model.bin")
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
FSDP_WEIGHTS = "pytorch_model_fsdp.bin"  # of FULL_STATE_DICT
OPTIMIZERS = ("optimizer.pt", "optimizer.bin")


def last_complete_checkpoint(folder: str | os.PathLike, tell: Callable[[str], None] | None = None) -> Path | None:
    """The complete checkpoint of the most steps among the `checkpoint-<step>` in a folder; None where there is none.

    Args:
        tell: is given a line for each later checkpoint that is not complete: its name and what is wrong with it.
    """
    for checkpoint in checkpoints_of(folder):
        problems = problems_of(checkpoint)
        if not problems:
            return checkpoint
        if tell is not None:
            tell(f"{checkpoint} is not complete and is left out: {described(problems)}.")
    return None


def checkpoints_of(folder: str | os.PathLike) -> list[Path]:
    """The folders `checkpoint-<step>` in a folder, the one of the most steps first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: -int(path.name.rpartition("-")[2]))


def described(problems: list[str]) -> str:
    """The first problems, in one line."""
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def problems_of(checkpoint: str | os.PathLike) -> list[str]:
    """What a checkpoint lacks to be resumed from, whichever way of sharding wrote it. Empty: it is complete.

    No tensor is read, but for the sizes that the files tell.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        return ["the folder does not exist"]
    try:
        return [*problems_in(folder), *_missing(folder)]
    except OSError as error:
        return [f"the folder cannot be read ({error})"]


def deepspeed_folder(checkpoint: Path) -> Path | None:
    """The folder of DeepSpeed's files in a checkpoint, which may not be there; None if another way wrote it."""
    for name in ("latest", "latest_universal"):
        if (checkpoint / name).is_file():
            return checkpoint / ((checkpoint / name).read_text(encoding="utf-8", errors="replace").strip() or "latest")
    started = sorted(path for path in checkpoint.glob("global_step*") if path.is_dir())
    return checkpoint / "latest" if started else None  # the file that names the folder is written after it


def _missing(folder: Path) -> Iterator[str]:
    deepspeed = deepspeed_folder(folder)
    if deepspeed is not None:
        yield from _missing_of_deepspeed(folder, deepspeed)
    else:
        yield from _missing_weights(folder)
        if (folder / SHARDED_OPTIMIZER).is_dir():
            yield from _missing_shards(folder, SHARDED_OPTIMIZER)
        elif not any((folder / name).is_file() for name in OPTIMIZERS):
            yield f"{OPTIMIZERS[0]} is missing"
        if not (folder / SCHEDULER_NAME).is_file():
            yield f"{SCHEDULER_NAME} is missing"
    yield from _missing_random_states(folder)
    if not (folder / TRAINER_STATE_NAME).is_file():
        yield f"{TRAINER_STATE_NAME} is missing"
    elif problem_with(folder / TRAINER_STATE_NAME) is None:
        state = json.loads((folder / TRAINER_STATE_NAME).read_bytes())
        if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
            yield f"{TRAINER_STATE_NAME} is not the state of a Trainer"


def _missing_weights(folder: Path) -> Iterator[str]:
    if (folder / SHARDED_MODEL).is_dir():
        yield from _missing_shards(folder, SHARDED_MODEL)
        return
    for index in INDEXES:
        if (folder / index).is_file() and problem_with(folder / index) is None:
            held = json.loads((folder / index).read_bytes())
            files = held.get("weight_map") if isinstance(held, dict) else None
            if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
                yield f"{index} names no files of weights"
                return
            yield from (f"{name} is missing" for name in sorted({*files.values()}) if not (folder / name).is_file())
            return
    # Several adapters lie in folders of their own
    if not any(any(folder.glob(pattern)) for name in (*WEIGHTS, FSDP_WEIGHTS) for pattern in (name, f"*/{name}")):
        yield f"{WEIGHTS[0]} is missing"


def _missing_shards(folder: Path, name: str) -> Iterator[str]:
    """Of what torch.distributed.checkpoint wrote into a folder: its metadata tell how long each file is."""
    try:
        pieces = dcp.FileSystemReader(folder / name).read_metadata().storage_data.values()
        ends: dict[str, int] = {}
        for piece in pieces:
            ends[piece.relative_path] = max(ends.get(piece.relative_path, 0), piece.offset + piece.length)
    except Exception as error:  # noqa: BLE001 - a pickle that is cut off may raise anything
        yield f"{name}/.metadata is missing or cannot be read ({type(error).__name__})"
        return
    for file, end in sorted(ends.items()):
        path = folder / name / file
        if not path.is_file():
            yield f"{name}/{file} is missing"
        elif path.stat().st_size < end:
            yield f"{name}/{file} has {path.stat().st_size:,} bytes in place of {end:,}"


def _missing_of_deepspeed(folder: Path, deepspeed: Path) -> Iterator[str]:
    name = deepspeed.name
    if not deepspeed.is_dir():
        yield f"{name} is missing"
        return
    if any(deepspeed.glob("zero/*")) or deepspeed.name.endswith("_universal"):
        return
    if not any(deepspeed.glob("*model_states.pt")):
        yield f"{name}/mp_rank_00_model_states.pt is missing"
    names = " ".join(path.name for path in deepspeed.glob("*zero_pp_rank_*_optim_states.pt"))
    ranks = {int(rank) for rank in re.findall(r"zero_pp_rank_(\d+)", names)}
    written = max(len(_random_ranks(folder)), max(ranks, default=-1) + 1) if ranks else 0
    yield from (
        f"{name}/zero_pp_rank_{i}_mp_rank_00_optim_states.pt is missing" for i in range(written) if i not in ranks
    )


def _random_ranks(folder: Path) -> set[int]:
    found = (re.fullmatch(r"rng_state_(\d+)\.pth", path.name) for path in folder.glob("rng_state_*.pth"))
    return {int(match[1]) for match in found if match}


def _missing_random_states(folder: Path) -> Iterator[str]:
    """One process writes `rng_state.pth`, several write `rng_state_<process>.pth`."""
    ranks = _random_ranks(folder)
    if not ranks and not (folder / "rng_state.pth").is_file():
        yield "rng_state.pth is missing"
    elif ranks:
        expected = range(max(2, max(ranks) + 1))
        yield from (f"rng_state_{i}.pth is missing" for i in expected if i not in ranks)
