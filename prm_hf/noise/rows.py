"""How a function of (rows, row indices) is applied to a dataset or a stream, whatever its format and sharding."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, concatenate_datasets


def pinned(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The dataset itself; a stream as one whose rows keep their indices and whose features are known.

    A mapped stream counts its rows anew in each data-loader worker and after `set_epoch`. Concatenation along the
    columns, here of one dataset alone, makes a stream that is never sharded or reordered below this point.
    """
    return dataset if isinstance(dataset, Dataset) else concatenate_datasets([dataset], axis=1)


def check_new(dataset: Dataset | IterableDataset, column: str, doing: str) -> None:
    """Raises `ValueError` if `column` is there already, or if there are no rows."""
    if column in (dataset.features or ()):
        raise ValueError(
            f"`dataset` has a column {column!r} already, and {doing} twice would hide which rows are clean. Start "
            "from the clean dataset, or rename the column."
        )
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("`dataset` has no rows: pass one with at least one row.")


def originals(features: Features, names: Sequence[str]) -> dict[str, str]:
    """The names of the columns that keep those in `names` as they were before, with those names."""
    copies = {f"original_{name}": name for name in names}
    for copy in copies:
        if copy in features:
            raise ValueError(f"`keep_original` would overwrite the column {copy!r}: rename it first.")
    return copies


def map_rows(
    dataset: Dataset | IterableDataset,
    function: Callable[..., dict[str, list]],
    features: Features,
    num_proc: int | None,
    desc: str,
    fn_kwargs: dict[str, Any],
) -> Dataset | IterableDataset:
    """`dataset.map` in batches with indices, of a `pinned` dataset; `features` are those of the result.

    A user's format is kept, and not applied to the rows that `function` is given.
    """
    if num_proc is not None and not (isinstance(num_proc, int) and num_proc >= 1):
        raise ValueError(f"`num_proc` must be None or an integer of at least 1, got {num_proc!r}.")
    arguments = {"with_indices": True, "batched": True, "features": features, "fn_kwargs": fn_kwargs}
    if isinstance(dataset, IterableDataset):
        return dataset.map(function, **arguments)
    result = dataset.with_format(None).map(function, num_proc=num_proc, desc=desc, **arguments)
    style = dataset.format
    columns = None
    if set(style["columns"]) != set(dataset.column_names):
        columns = [*style["columns"], *(name for name in features if name not in dataset.features)]
    return result.with_format(
        style["type"], columns=columns, output_all_columns=style["output_all_columns"], **style["format_kwargs"]
    )


class RowNoise:
    """Noise of a batch whose rows are changed one by one, by the `change_row` of a subclass."""

    def __call__(self, rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        changed = [
            self.change_row(dict(zip(rows, values, strict=True)), index)
            for index, *values in zip(indices, *rows.values(), strict=True)
        ]
        return {name: [row[name] for row in changed] for name in rows}


def same_value(a: Any, b: Any) -> bool:
    """Whether two values of a column are equal: text, messages, numbers, arrays and images; NaN equals itself."""
    if isinstance(a, (str, int, dict)) or isinstance(a, list) and a and isinstance(a[0], (str, dict)):
        return a == b
    a, b = np.asarray(a), np.asarray(b)
    return np.array_equal(a, b, equal_nan=np.issubdtype(a.dtype, np.inexact) and np.issubdtype(b.dtype, np.inexact))


def check_plain(rows: Any, doing: str) -> None:
    """Raises `TypeError` for the rows of a stream with a table format, which come as a table."""
    if not isinstance(rows, Mapping):
        raise TypeError(f"`dataset` is a stream with a table format: call `.with_format(None)` before {doing}.")


def map_splits(
    dataset: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    splits: str | Sequence[str] | None,
    default: Sequence[str],
    function: Callable[[Dataset | IterableDataset, str], Dataset | IterableDataset],
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """`function(split, name)` for each of `splits`, which are `default` if None; a single dataset is `"train"`."""
    if isinstance(dataset, (Dataset, IterableDataset)):
        if splits is not None:
            raise ValueError(
                f"`splits={splits!r}` is for a DatasetDict, but `dataset` is a single {type(dataset).__name__}. "
                "Leave `splits` out."
            )
        return function(dataset, "train")
    if not isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        raise TypeError(
            "`dataset` must be a datasets.Dataset, IterableDataset, DatasetDict or IterableDatasetDict, got "
            f"{type(dataset).__name__}. A list of rows becomes one with `Dataset.from_list`."
        )
    names = list(default) if splits is None else [splits] if isinstance(splits, str) else list(splits)
    unknown = [name for name in names if name not in dataset]
    if unknown and splits is None:
        raise ValueError(f"`dataset` has no split {unknown[0]!r}: name some of {list(dataset)} in `splits`.")
    if unknown or not names:
        raise ValueError(f"`splits={splits!r}` must name splits of `dataset`, which has {list(dataset)}.")
    return type(dataset)({**dataset, **{name: function(dataset[name], name) for name in names}})
