"""The built-in task, ready to be trained on: reference policy from the cache, pairs made on the spot."""

import hashlib
import itertools
import json
import logging
import os
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from filelock import FileLock

from .._files import problems_in, set_aside
from . import model, task


SPLIT_SIZES = {"train": 256, "validation": 192, "test": 512}
DIGESTS = "digests.json"  # of all other files of the reference policy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Demo:
    """What [`build_demo`] returns.

    Attributes:
        model_path: folder of the reference policy and its tokenizer, for `from_pretrained` and TRL's trainers.
        train, validation, test: 256, 192 and 512 preference pairs with clean labels and disjoint prompts; columns as
            in [`preference_pairs`].
    """

    model_path: str
    train: Dataset
    validation: Dataset
    test: Dataset


def build_demo(seed: int = 0, cache_dir: str | os.PathLike | None = None) -> Demo:
    """Make the built-in task.

    The first call trains the reference policy (15 to 30 s on one core) and caches it under a hash of all that
    defines it. Of several processes, one trains and the others wait. A cached folder whose files are not those that
    were written is renamed to `*.corrupt`, with a warning, and made again.

    Args:
        seed: of the prompts, the pairs and the reference policy.
        cache_dir: folder of the cache. Default: the environment variable `PRM_HF_CACHE`, else `prm_hf` in
            `XDG_CACHE_HOME` or `~/.cache`.

    Raises:
        OSError: the folder of the cache can't be written.
    """
    pairs = task.preference_pairs(sum(SPLIT_SIZES.values()), seed)
    ends = itertools.accumulate(SPLIT_SIZES.values())
    splits = {k: pairs.select(range(end - SPLIT_SIZES[k], end)) for k, end in zip(SPLIT_SIZES, ends, strict=True)}
    # The reference policy has seen no prompt of the pairs, so train and test differ in nothing but their role.
    prompts = frozenset(messages[-1]["content"] for messages in pairs["prompt"])
    return Demo(model_path=str(_reference(seed, prompts, _cache_folder(cache_dir))), **splits)


def _reference(seed: int, prompts: frozenset[str], cache: Path) -> Path:
    definition = json.dumps(_definition(seed), sort_keys=True, indent=2)
    folder = cache / f"demo-{hashlib.sha256(definition.encode()).hexdigest()[:16]}"
    if folder.exists() and not _problems(folder):
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{folder}.lock")
        lock.acquire()
    except OSError as error:
        raise OSError(
            f"The cache folder {str(cache)!r} can't be written ({error}). Name another one in `cache_dir` or in the "
            "environment variable PRM_HF_CACHE."
        ) from error
    try:
        if folder.exists() and (problems := _problems(folder)):
            aside = set_aside(folder)
            logger.warning(
                f"The cached reference policy {folder} cannot be used ({'; '.join(problems)}). It lies in "
                f"{aside.name} now, and is trained again."
            )
        if not folder.exists():
            logger.info("Training the reference policy of the built-in task, once, into %s", folder)
            # A folder of this name is complete, because it gets the name last.
            with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as building:
                unfinished = Path(building) / folder.name
                model.train_reference(seed, prompts).save_pretrained(unfinished)
                model.make_tokenizer().save_pretrained(unfinished)
                (unfinished / "definition.json").write_text(definition)
                (unfinished / DIGESTS).write_text(json.dumps(_digests(unfinished), indent=2))
                unfinished.rename(folder)
    finally:
        lock.release()
    return folder


def _digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder but the one of the digests."""
    files = sorted(file for file in folder.iterdir() if file.name != DIGESTS)
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _problems(folder: Path) -> list[str]:
    """What is wrong with the files of a cached reference policy. Version 0.2.0 wrote no digests."""
    problems = problems_in(folder)
    if problems or not (folder / DIGESTS).is_file():
        return problems
    written, found = json.loads((folder / DIGESTS).read_text(encoding="utf-8")), _digests(folder)
    if not isinstance(written, dict):
        return [f"{DIGESTS} holds no digests"]
    return [
        f"{name} {'is not what was written' if name in found else 'is missing'}"
        for name, digest in written.items()
        if found.get(name) != digest
    ]


def _definition(seed: int) -> dict:
    """All that the reference policy depends on. The source stands for what is done, the constants for its settings."""
    return {
        "seed": int(seed),
        "source": [hashlib.sha256(Path(module.__file__).read_bytes()).hexdigest() for module in (task, model)],
        "constants": {
            f"{module.__name__.rpartition('.')[2]}.{name}": value
            for module in (task, model)
            for name, value in vars(module).items()
            if name.isupper()
        },
        "split_sizes": SPLIT_SIZES,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _cache_folder(cache_dir: str | os.PathLike | None) -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "prm_hf"
    return Path(os.environ.get("PRM_HF_CACHE", default) if cache_dir is None else cache_dir).expanduser().absolute()
