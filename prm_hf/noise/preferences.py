"""Label noise in preference pairs: chosen and rejected swapped in a known share of the rows."""

import math
from collections.abc import Sequence

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value

from .._names import renamed_arguments
from .rng import check_noise_rate, check_seed, row_uniforms
from .rows import check_dataset, check_plain, map_rows, named_splits, pinned


_STREAM = "flip_preferences"


@renamed_arguments(rate="noise_rate")
def flip_preferences(
    dataset: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
    noise_rate: float,
    seed: int = 0,
    exact: bool = False,
    splits: str | Sequence[str] | None = None,
    num_proc: int | None = None,
) -> Dataset | DatasetDict | IterableDataset | IterableDatasetDict:
    """Swap the preferred and the dispreferred completion of each row with probability `noise_rate`.

    Works on every preference format of TRL (standard or conversational, with or without a `prompt` column). Every
    column whose name holds `chosen` is swapped with the column whose name holds `rejected` in the same place:
    `chosen` with `rejected`, `score_chosen` with `score_rejected`, `chosen-model` with `rejected-model`,
    `ref_chosen_logps` with `ref_rejected_logps`. Other columns stay as they are, also those that describe the pair
    under another name (a `margin`, or a copy of the chosen conversation such as `messages` in
    `ultrafeedback_binarized`).

    Whether a row is flipped depends on `seed` and on its index in `dataset` as given, and on nothing else: not on
    `num_proc`, on later sharding, or on the number of processes. A row flipped at one rate is flipped at every
    higher rate under the same seed. Flip first and shuffle, shard or split by node afterwards; the index of a stream
    shuffled before is not that of its source.

    Args:
        dataset: `Dataset`, `IterableDataset`, or a dict of either. It is not changed. An `IterableDataset` comes back
            as one shard, because a row's index in a stream read in several places at once is not known; so one
            data-loader worker reads it.
        noise_rate: probability of a flip, in [0, 1].
        seed: non-negative integer.
        exact: flip exactly `round(noise_rate * len(dataset))` rows instead (Python's rounding). Not for an
            `IterableDataset`, whose length is not known.
        splits: the split or splits to flip of a dict of datasets; the others come back untouched, without a
            `flipped` column. Default: `train`, so that evaluation stays clean.
        num_proc: processes for `Dataset.map`; streams do not use it.

    Returns:
        The same type as `dataset`, with the bool column `flipped`: whether the label is not what it was.

    Raises:
        TypeError: `dataset` is none of the four types, or a stream with a table format.
        ValueError: `noise_rate` is not a number in [0, 1]; `seed` is not a non-negative integer; a named split, or the
            column `chosen` or `rejected`, is missing; a column has no partner, or one of another type; there is a
            column `flipped` already; the dataset has no rows; `exact` for a stream; `splits` for a single dataset.
    """
    check_noise_rate(noise_rate)
    check_seed(seed)
    if isinstance(dataset, (DatasetDict, IterableDatasetDict)):
        flipped = {
            name: flip_preferences(dataset[name], noise_rate, seed, exact, num_proc=num_proc)
            for name in named_splits(dataset, splits, default=["train"])
        }
        return type(dataset)({**dataset, **flipped})
    check_dataset(dataset, splits)
    noise_rate = float(noise_rate)
    if isinstance(dataset, IterableDataset) and exact:
        raise ValueError(
            "`exact=True` needs the number of rows, which an IterableDataset does not know. Use `exact=False`, or "
            "load the dataset without streaming."
        )
    dataset = pinned(dataset)
    pairs, features = _pairs_and_features(dataset.features)
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError("`dataset` has no rows, so there is nothing to flip.")
    return map_rows(
        dataset,
        _swap,
        features,
        num_proc=num_proc,
        desc="Flipping preferences",
        fn_kwargs={
            "pairs": pairs,
            "seed": int(seed),
            "threshold": _exact_threshold(noise_rate, int(seed), len(dataset)) if exact else noise_rate,
        },
    )


def _swap(rows: dict[str, list], indices: list[int], pairs: list[list[str]], seed: int, threshold: float) -> dict:
    check_plain(rows, "flipping")
    flipped = row_uniforms(seed, indices, _STREAM) < threshold
    result = {"flipped": flipped.tolist()}
    for a, b in pairs:
        result[a] = [y if flip else x for flip, x, y in zip(flipped, rows[a], rows[b], strict=True)]
        result[b] = [x if flip else y for flip, x, y in zip(flipped, rows[a], rows[b], strict=True)]
    return result


def _exact_threshold(noise_rate: float, seed: int, n_rows: int) -> float:
    """The number that exactly round(noise_rate * n_rows) of the rows' uniforms lie under."""
    n_flips = round(noise_rate * n_rows)
    if n_flips == n_rows:
        return math.inf
    return float(np.sort(row_uniforms(seed, np.arange(n_rows), _STREAM))[n_flips])


def _pairs_and_features(features: Features | None) -> tuple[list[list[str]], Features]:
    """The pairs of columns that belong together, and the features of the result."""
    features = features or Features()
    missing = [name for name in ("chosen", "rejected") if name not in features]
    if missing:
        raise ValueError(
            f"`dataset` has no column {' and no column '.join(map(repr, missing))}; its columns are {list(features)}. "
            "A preference dataset needs both: rename yours with `dataset.rename_columns`."
        )
    if "flipped" in features:
        raise ValueError(
            "`dataset` has a column 'flipped' already: flipping twice would hide which labels are clean. Start from "
            "the clean dataset, or rename the column if it means something else."
        )
    pairs = []
    for name in features:
        if "chosen" not in name and "rejected" not in name:
            continue
        partner = _partner(name)
        if partner not in features:
            raise ValueError(
                f"Column {name!r} of `dataset` has no partner {partner!r} to be swapped with, so it would describe "
                f"the wrong completion in flipped rows. Remove it with `dataset.remove_columns({name!r})`, or rename "
                "it if it does not depend on the label."
            )
        if features[name] != features[partner]:
            raise ValueError(
                f"Columns {name!r} ({features[name]}) and {partner!r} ({features[partner]}) of `dataset` have "
                "different types, so they cannot be swapped. Cast one with `dataset.cast_column`."
            )
        if [partner, name] not in pairs:
            pairs.append([name, partner])
    return pairs, Features({**features, "flipped": Value("bool")})


def _partner(name: str) -> str:
    """`name` with the words chosen and rejected exchanged."""
    return "chosen".join(part.replace("chosen", "rejected") for part in name.split("rejected"))
