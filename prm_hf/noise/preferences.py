"""Label noise in preference pairs: chosen and rejected swapped in a known share of the rows."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, IterableDataset, IterableDatasetDict, Value

from .._names import renamed_arguments
from .rng import check_noise_rate, check_seed, check_switches, row_uniforms
from .rows import check_new, check_plain, map_rows, map_splits, originals, pinned, same_value
from .sides import side_changes


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

    Works on every preference format of TRL. Every column whose name holds `chosen` is swapped with the column whose
    name holds `rejected` in the same place, as `score_chosen` with `score_rejected`. A column that ends in `margin` is
    negated, and the two values of `winner`, `preference`, `label` and the like are exchanged. Other columns stay as
    they are; a warning names those that look as if they depended on the order (as `messages` in
    `ultrafeedback_binarized`).

    Whether a row is flipped depends on `seed` and on its index in `dataset` as given: flip first and shuffle or shard
    afterwards. A row flipped at one rate is flipped at every higher rate under the same seed. A row whose two sides
    are equal has no label to flip: it stays as it is and is not marked.

    Args:
        dataset: `Dataset`, `IterableDataset`, or a dict of either. It is not changed. A stream comes back as one
            shard, because a row's index in a stream read in several places at once is not known.
        noise_rate: probability of a flip, in [0, 1].
        seed: non-negative integer.
        exact: draw exactly `round(noise_rate * len(dataset))` rows instead (Python's rounding). Not for a stream.
        splits: the split or splits to flip of a dict; the others come back as they are. Default: `train`, so that
            evaluation stays clean.
        num_proc: processes for `Dataset.map`.

    Returns:
        The same type as `dataset`, with the bool column `flipped`: whether the label is not what it was.

    Raises:
        TypeError: `dataset` is none of the four types, or a stream with a table format.
        ValueError: an argument is out of its range; a split or a column is missing; a column has no partner, or one
            of another type; there is a column `flipped` already; there are no rows.
    """
    check_noise_rate(noise_rate)
    check_seed(seed)
    check_switches(exact=exact)
    return map_splits(
        dataset, splits, ["train"], lambda split, _: flip(split, float(noise_rate), int(seed), exact, num_proc)
    )


def flip(
    dataset: Dataset | IterableDataset,
    noise_rate: float,
    seed: int,
    exact: bool = False,
    num_proc: int | None = None,
    keep_original: bool = False,
    mark: str | None = None,
) -> Dataset | IterableDataset:
    """[`flip_preferences`] of one split; `keep_original` as in [`corrupt`], `mark` names a second column `flipped`."""
    if isinstance(dataset, IterableDataset) and exact:
        raise ValueError("`exact=True` needs the number of rows: load the dataset without streaming, or leave it out.")
    dataset = pinned(dataset)
    check_new(dataset, "flipped", "flipping")
    features = dataset.features or Features()
    pairs = side_pairs(features)
    changes = side_changes(dataset, [name for name in features if not any(name in pair for pair in pairs)])
    flag = Value("bool")
    copies = originals(features, ("chosen", "rejected")) if keep_original else {}
    kept = {copy: features[name] for copy, name in copies.items()}
    return map_rows(
        dataset,
        _swap,
        Features({**features, "flipped": flag, **kept, **({mark: flag} if mark else {})}),
        num_proc=num_proc,
        desc="Flipping preferences",
        fn_kwargs={
            "pairs": pairs,
            "changes": changes,
            "seed": seed,
            "threshold": _exact_threshold(noise_rate, seed, len(dataset)) if exact else noise_rate,
            "copies": copies,
            "flags": ["flipped", mark] if mark else ["flipped"],
        },
    )


def _swap(rows, indices, pairs, changes, seed, threshold, copies, flags) -> dict[str, list]:
    check_plain(rows, "flipping")
    drawn = row_uniforms(seed, indices, _STREAM) < threshold
    sides = zip(drawn.tolist(), rows["chosen"], rows["rejected"], strict=True)
    flipped = [is_drawn and not same_value(chosen, rejected) for is_drawn, chosen, rejected in sides]
    result = dict.fromkeys(flags, flipped) | {copy: rows[name] for copy, name in copies.items()}
    return result | swap_sides(rows, flipped, pairs, changes)


def swap_sides(
    rows: Mapping[str, list],
    flipped: Sequence[bool],
    pairs: Sequence[Sequence[str]],
    changes: Mapping[str, Callable[[Any], Any]],
) -> dict[str, list]:
    """The columns that depend on which side is `chosen`, with the sides of the rows `flipped` swapped.

    Args:
        rows: a list of values for each column.
        pairs: those of [`side_pairs`].
        changes: those of [`~prm_hf.noise.sides.side_changes`].
    """
    result = {}
    for a, b in pairs:
        result[a] = [y if flip else x for flip, x, y in zip(flipped, rows[a], rows[b], strict=True)]
        result[b] = [x if flip else y for flip, x, y in zip(flipped, rows[a], rows[b], strict=True)]
    for name, change in changes.items():
        result[name] = [change(x) if flip else x for flip, x in zip(flipped, rows[name], strict=True)]
    return result


def _exact_threshold(noise_rate: float, seed: int, n_rows: int) -> float:
    """The number that exactly round(noise_rate * n_rows) of the rows' uniforms lie under."""
    n_flips = round(noise_rate * n_rows)
    if n_flips == n_rows:
        return math.inf
    return float(np.sort(row_uniforms(seed, np.arange(n_rows), _STREAM))[n_flips])


def side_pairs(features: Mapping[str, Any]) -> list[list[str]]:
    """The pairs of columns that a flip swaps: `chosen` with `rejected`, and those whose names hold the two words."""
    missing = [name for name in ("chosen", "rejected") if name not in features]
    if missing:
        raise ValueError(
            f"`dataset` has no column {' and no column '.join(map(repr, missing))}; its columns are {list(features)}. "
            "Rename yours with `dataset.rename_columns`."
        )
    pairs = []
    for name in features:
        partner = _partner(name)
        if partner == name or [partner, name] in pairs:
            continue
        if partner not in features:
            raise ValueError(
                f"Column {name!r} of `dataset` has no partner {partner!r} to be swapped with. Remove it with "
                f"`dataset.remove_columns({name!r})`, or rename it if it does not depend on the label."
            )
        if features[name] != features[partner]:
            raise ValueError(
                f"Columns {name!r} ({features[name]}) and {partner!r} ({features[partner]}) of `dataset` have "
                "different types. Cast one with `dataset.cast_column`."
            )
        pairs.append([name, partner])
    return pairs


def _partner(name: str) -> str:
    """`name` with the words chosen and rejected exchanged."""
    return "chosen".join(part.replace("chosen", "rejected") for part in name.split("rejected"))
