"""The data of a comparison: datasets, splits, files, and the built-in task."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars, load_dataset, load_from_disk
from transformers.utils import logging

from ..demo import build_demo
from .arguments import ComparisonArguments
from .files import FILE_FORMATS, checked_source


BUILT_IN_WAIT = "Built-in task: the reference policy is trained now, for about 30 s, unless it is cached."


@dataclass(frozen=True)
class Data:
    """The model and the rows of one comparison."""

    model: str  # name or path
    model_name: str  # in `run.json`, as `dataset_name`
    dataset_name: str
    train: Dataset
    heldout: Dataset
    source: dict[str, Any]  # what else tells this data from other data: splits, and the contents of local files
    processing_class: Any = None  # the model's tokenizer, where it is loaded already


def load_data(
    args: ComparisonArguments, model: str | None, built_in_rows: Callable[[Dataset], Dataset]
) -> Iterator[Data]:
    """The data of each comparison; `built_in_rows` makes the rows of a task of the built-in preference pairs."""
    logging.set_verbosity_error()
    if args.dataset_name is None:
        logging.disable_progress_bar()  # many short bars for a tiny model and a tiny dataset
        disable_progress_bars()
        if PartialState().is_main_process:
            print(BUILT_IN_WAIT, flush=True)
        demo = build_demo(args.task_seed)
        source = {"task_seed": args.task_seed} if args.task_seed else {}
        train, heldout = built_in_rows(demo.train), built_in_rows(demo.test)
        yield Data(demo.model_path, "built-in", "built-in", train, heldout, source)
        return
    config = args.dataset_config
    splits = {"train_split": args.dataset_train_split, "test_split": args.dataset_test_split}
    for name, other in zip(args.dataset_name, args.eval_dataset_name or args.dataset_name, strict=True):
        yield Data(
            model=model,
            model_name=local_name(model),
            dataset_name=local_name(name),
            train=load_split(name, config, splits["train_split"]),
            heldout=load_split(other, config if other == name else None, splits["test_split"]),
            source={**splits, "train_file": _digest(name), "test_file": _digest(other)},
        )


def local_name(name: str) -> str:
    """The name of a local file or folder without its path, so that a run is the same wherever it lies."""
    return Path(name).name if Path(name).exists() else name


def _digest(name: str) -> str:
    """A hash of a local file's contents; of a dataset on the hub or in a folder its name."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else local_name(name)


@checked_source
def load_split(name: str, config: str | None, split: str) -> Dataset:
    """A split of a dataset on the hub, in a local folder (also of `save_to_disk`), or in a local file."""
    path = Path(name)
    if path.is_file():
        base = split.split("[")[0]
        return load_dataset(FILE_FORMATS[path.suffix], data_files={base: str(path)}, split=split)
    if (path / "dataset_dict.json").is_file():
        splits = load_from_disk(name)
        if split not in splits:
            raise ValueError(f"`{name}` has the splits {', '.join(splits)} and not {split!r}: name one of them.")
        return splits[split]
    return load_dataset(name, config, split=split)
