"""The data of a comparison: datasets, splits, files, and the built-in task."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset, disable_progress_bars, load_dataset, load_from_disk
from transformers.utils import cached_file, logging
from transformers.utils.hub import extract_commit_hash
from trl import ModelConfig

from ..demo import build_demo
from .arguments import ComparisonArguments
from .files import FILE_FORMATS, checked_source
from .rows import Columns, check_rows, groups_of, overlapping, prompts_of
from .selection import select_rows, selection_settings


BUILT_IN_WAIT = "Built-in task: the reference policy is trained now, for about 30 s, unless it is cached."
HELDOUT_SHARE = 0.2  # of the prompts of a file that is to be split
_MODEL_FILES = (".safetensors", ".bin", ".json", ".jinja", ".txt", ".model")


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
    digests: dict[str, str] = dataclasses.field(default_factory=dict)  # hashes of the rows and of the model
    heldout_groups: Sequence[int] = ()  # one a held-out row, equal where rows belong together
    train_groups: Sequence[int] = ()  # the same of the training rows
    given: Dataset | None = None  # the training rows with the labels that a run is given, if it has its own

    @property
    def model_key(self) -> str:
        """What tells the model from others."""
        return self.digests.get("model_digest", self.model)


def load_data(
    args: ComparisonArguments,
    model_args: ModelConfig,
    built_in_rows: Callable[[Dataset], Dataset],
    columns: Columns,
) -> Iterator[Data]:
    """The data of each comparison.

    Args:
        built_in_rows: makes the rows of a task of the built-in preference pairs.
        columns: those that the task reads.

    Raises:
        ValueError: a dataset, file or split cannot be read, rows lack what the task reads or their selection needs, or
            held-out rows are among the training rows.
    """
    logging.set_verbosity_error()
    if args.dataset_name is None:
        logging.disable_progress_bar()  # many short bars for a tiny model and a tiny dataset
        disable_progress_bars()
        _tell(BUILT_IN_WAIT)
        demo = build_demo(args.task_seed)
        source = {"task_seed": args.task_seed} if args.task_seed else {}
        train, heldout = built_in_rows(demo.train), built_in_rows(demo.test)
        groups = groups_of(heldout, columns)
        of_train = groups_of(train, columns)
        data = Data(demo.model_path, "built-in", "built-in", train, heldout, source, heldout_groups=groups)
        yield dataclasses.replace(data, train_groups=of_train)
        return
    model = model_args.model_name_or_path
    of_model = model_digest(model, model_args.model_revision)
    for name, other in zip(args.dataset_name, args.eval_dataset_name or args.dataset_name, strict=True):
        train, heldout, splits = _load_rows(args, name, other, columns)
        train, heldout, lines = select_rows(args, local_name(name), train, heldout, columns)
        for line in lines:
            _tell(line)
        files = {"train_file": _digest_of_file(name), "test_file": _digest_of_file(other)}
        digests = {f"{key}_digest": digest(rows, columns) for key, rows in (("train", train), ("heldout", heldout))}
        yield Data(
            model=model,
            model_name=local_name(model),
            dataset_name=local_name(name),
            train=train,
            heldout=heldout,
            source={**splits, **files, **selection_settings(args)},
            digests={**digests, **({"model_digest": of_model} if of_model else {})},
            heldout_groups=groups_of(heldout, columns),
            train_groups=groups_of(train, columns),
        )


def _load_rows(
    args: ComparisonArguments, name: str, other: str, columns: Columns
) -> tuple[Dataset, Dataset, dict[str, str]]:
    """Training rows, held-out rows, and what `run.json` says of the splits."""
    splits = {"train_split": args.dataset_train_split, "test_split": args.dataset_test_split}
    is_one_file = args.eval_dataset_name is None and Path(name).is_file()
    config = args.dataset_config
    if is_one_file and splits == {"train_split": "train", "test_split": "test"}:
        rows = load_split(name, config, "train")
        check_rows(rows, f"The rows of {name}", columns)
        train, heldout = split_by_prompt(rows, columns)
        _tell(
            f"{name} is split by prompt, since no held-out rows are named: {len(train)} rows to train on, and "
            f"{len(heldout)}, of {HELDOUT_SHARE:.0%} of the prompts, held out."
        )
        return train, heldout, dict.fromkeys(splits, f"by prompt, {HELDOUT_SHARE:.0%} held out")
    check_split(name, splits["train_split"], "dataset_train_split")
    # The default, `test`, is all of a file of held-out rows.
    check_split(other, splits["test_split"], "dataset_test_split", ("train",) if is_one_file else ("train", "test"))
    train = load_split(name, config, splits["train_split"])
    heldout = load_split(other, config if other == name else None, splits["test_split"])
    check_rows(train, f"The training rows, {splits['train_split']!r} of {name},", columns)
    check_rows(heldout, f"The held-out rows, {splits['test_split']!r} of {other},", columns)
    found = overlapping(train, heldout, columns)
    if found and not args.drop_overlap:
        numbers = ", ".join(map(str, found[:5])) + (", …" if len(found) > 5 else "")
        raise ValueError(
            f"{len(found)} of the {len(heldout)} held-out rows have a prompt or a text of the training rows of {name} "
            f"(held-out rows {numbers}), so the held-out accuracy would be that of rows that were trained on. Name "
            "others with `eval_dataset_name` or `dataset_test_split`, or leave these out with `--drop_overlap`."
        )
    if found:
        left_out = set(found)
        heldout = heldout.select([i for i in range(len(heldout)) if i not in left_out])
        _tell(f"{len(found)} held-out rows with a prompt or a text of the training rows of {name} are left out.")
        if not len(heldout):
            raise ValueError(f"All held-out rows have a prompt or a text of the training rows of {name}: name others.")
    return train, heldout, splits


def _tell(line: str) -> None:
    if PartialState().is_main_process:
        print(line, flush=True)


def local_name(name: str) -> str:
    """The name of a local file or folder without its path, so that a run is the same wherever it lies."""
    return Path(name).name if Path(name).exists() else name


def _digest_of_file(name: str) -> str:
    """A hash of a local file's contents; of a dataset on the hub or in a folder its name."""
    path = Path(name)
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else local_name(name)


def digest(rows: Dataset, columns: Columns) -> str:
    """A hash of what the rows have in these columns, in their order."""
    found = hashlib.sha256()
    for row in rows.select_columns(columns.of(rows)):
        found.update(json.dumps(row, sort_keys=True, default=str).encode())
    return found.hexdigest()[:16]


def model_digest(model: str, revision: str = "main") -> str | None:
    """A hash of the files of a model in a local folder; of one on the hub its commit, None where that is not known."""
    folder = Path(model)
    if not folder.is_dir():
        try:
            return extract_commit_hash(cached_file(model, "config.json", revision=revision), None)
        except OSError:  # loading it will say what is wrong
            return None
    found = hashlib.sha256()
    for file in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES and path.is_file()):
        found.update(file.name.encode())
        with file.open("rb") as stream:
            found.update(hashlib.file_digest(stream, "sha256").digest())
    return found.hexdigest()[:16]


def check_split(name: str, split: str, argument: str, known: Sequence[str] = ("train",)) -> None:
    """Raises ValueError if a local file, whose rows may be called as in `known`, is asked for another split."""
    if Path(name).is_file() and split.split("[")[0] not in known:
        raise ValueError(
            f"`{argument}` is {split!r}, and {name} has one split, 'train'. Name a slice of it, as `train[:80%]` to "
            "train on and `train[80%:]` to hold out, or another file with `eval_dataset_name`."
        )


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


def split_by_prompt(rows: Dataset, columns: Columns, seed: int = 0) -> tuple[Dataset, Dataset]:
    """Rows to train on and rows to hold out, of other prompts.

    Held-out rows whose text is nevertheless among the training rows, under another prompt, are left out.
    """
    prompts = prompts_of(rows, columns)
    distinct = list(dict.fromkeys(prompts))
    chosen = set(random.Random(seed).sample(distinct, max(1, round(HELDOUT_SHARE * len(distinct)))))
    train = rows.select([i for i, prompt in enumerate(prompts) if prompt not in chosen])
    heldout = rows.select([i for i, prompt in enumerate(prompts) if prompt in chosen])
    left_out = set(overlapping(train, heldout, columns))
    heldout = heldout.select([i for i in range(len(heldout)) if i not in left_out])
    if not len(train) or not len(heldout):
        raise ValueError(
            f"The rows cannot be split by prompt, for they have {len(distinct)} prompts, and none of {len(chosen)} is "
            "without a text of the others: name held-out rows with `eval_dataset_name`, or slices with "
            "`dataset_train_split` and `dataset_test_split`."
        )
    return train, heldout
