"""How a function of (rows, row indices) is applied to a dataset or a stream, whatever its format and sharding."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, concatenate_datasets


def pinned(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The dataset itself; a stream as one whose rows keep their indices and whose features are known.

    A mapped stream counts its rows anew in each data-loader worker and node, and in another order after `set_epoch`.
    Concatenation along the columns, here of one dataset alone, makes a stream that is never sharded or reordered below
    this point.
    """
    return dataset if isinstance(dataset, Dataset) else concatenate_datasets([dataset], axis=1)


def map_rows(
    dataset: Dataset | IterableDataset,
    function: Callable[..., dict[str, list]],
    features: Features,
    num_proc: int | None,
    desc: str,
    fn_kwargs: dict[str, Any],
) -> Dataset | IterableDataset:
    """`dataset.map` in batches with indices, of a `pinned` dataset. A user's format is kept, and not applied to rows.

    `features` are those of the result; columns of the dataset that are not among them are removed.
    """
    removed = [name for name in dataset.features if name not in features]
    arguments = {"with_indices": True, "batched": True, "features": features, "fn_kwargs": fn_kwargs}
    if isinstance(dataset, IterableDataset):
        return dataset.map(function, remove_columns=removed or None, **arguments)
    result = dataset.with_format(None).map(
        function, remove_columns=removed or None, num_proc=num_proc, desc=desc, **arguments
    )
    style = dataset.format
    columns = None
    if set(style["columns"]) != set(dataset.column_names):
        new = [name for name in features if name not in dataset.features]
        columns = [*(name for name in style["columns"] if name in features), *new]
    return result.with_format(
        style["type"], columns=columns, output_all_columns=style["output_all_columns"], **style["format_kwargs"]
    )


def check_plain(rows: Any, doing: str) -> None:
    """Raises `TypeError` for the rows of a stream with a table format, which come as a table."""
    if not isinstance(rows, Mapping):
        raise TypeError(
            f"`dataset` is a stream with a table format; call `.with_format(None)` before {doing} and set it after."
        )


def check_dataset(dataset: Any, splits: Any) -> None:
    """Raises for what is neither a dataset nor a dict of some, and for `splits` of what is one dataset."""
    if not isinstance(dataset, (Dataset, IterableDataset)):
        raise TypeError(
            "`dataset` must be a datasets.Dataset, IterableDataset, DatasetDict or IterableDatasetDict, got "
            f"{type(dataset).__name__}. A list of rows becomes one with `Dataset.from_list`."
        )
    if splits is not None:
        raise ValueError(
            f"`splits={splits!r}` names splits of a DatasetDict, but `dataset` is a single {type(dataset).__name__}. "
            "Leave `splits` out."
        )


def named_splits(
    dataset: DatasetDict | IterableDatasetDict, splits: str | Sequence[str] | None, default: Sequence[str]
) -> list[str]:
    """The names in `splits`, or `default`, all of which must be splits of `dataset`."""
    names = list(default) if splits is None else [splits] if isinstance(splits, str) else list(splits)
    unknown = [name for name in names if name not in dataset]
    if unknown and splits is None:
        raise ValueError(
            f"`dataset` has no split {unknown[0]!r}; its splits are {list(dataset)}. Name those to change in `splits`."
        )
    if unknown or not names:
        raise ValueError(f"`splits={splits!r}` must name splits of `dataset`, which has {list(dataset)}.")
    return names
