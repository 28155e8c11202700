"""Which rows of its datasets a comparison takes, and whose labels it trains on."""

from collections import Counter
from collections.abc import Sequence

from datasets import Dataset

from ..noise import flip_preferences, label_by_rater
from ..noise.raters import check_votes
from ..runs.write import RunSpec
from .arguments import ComparisonArguments
from .rows import Columns, prompts_of


SETTINGS = ("pairs_per_prompt", "heldout_filter_column", "label_votes_column", "label_rater")


def selection_settings(args: ComparisonArguments) -> dict[str, object]:
    """What `run.json` says of the selection: the arguments that are given."""
    return {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}


def select_rows(
    args: ComparisonArguments, name: str, train: Dataset, heldout: Dataset, columns: Columns
) -> tuple[Dataset, Dataset, list[str]]:
    """Training and held-out rows of the dataset `name`, as the arguments choose them, and lines that say so.

    Raises:
        ValueError: a column is missing or of the wrong kind, or no row is left.
    """
    lines = []
    if args.label_votes_column is not None:
        _check_rater(args, name, train)
    if args.heldout_filter_column is not None:
        n = len(heldout)
        heldout = _filtered(heldout, args.heldout_filter_column, name)
        lines.append(f"{len(heldout)} of {n} held-out rows of {name} are kept, by {args.heldout_filter_column!r}.")
    if args.pairs_per_prompt is not None:
        counts = [f"{len(train)} training", f"{len(heldout)} held-out"]
        train, heldout = (first_of_each(rows, args.pairs_per_prompt, columns) for rows in (train, heldout))
        kept = zip((train, heldout), counts, strict=True)
        shown = " and ".join(f"{len(rows)} of {count}" for rows, count in kept)
        lines.append(f"{shown} rows of {name} are kept, the first {args.pairs_per_prompt} of each prompt.")
    return train, heldout, lines


def _check_rater(args: ComparisonArguments, name: str, train: Dataset) -> None:
    try:
        check_votes(train, args.label_votes_column, args.label_rater)
    except ValueError as error:
        raise ValueError(f"`label_votes_column`, the training rows of {name}: {error}") from error


def _filtered(rows: Dataset, column: str, name: str) -> Dataset:
    """The rows in whose column there is True."""
    if column not in rows.column_names:
        raise ValueError(
            f"`heldout_filter_column` is {column!r}, and the held-out rows of {name} have the columns "
            f"{rows.column_names}: name one of them."
        )
    values = rows.with_format(None)[column][:]
    wrong = [i for i, value in enumerate(values) if not isinstance(value, bool)]
    if wrong:
        raise ValueError(
            f"`heldout_filter_column` is {column!r}, which must hold true or false, and held-out row {wrong[0]} of "
            f"{name} (from 0) has {values[wrong[0]]!r}."
        )
    if not any(values):
        raise ValueError(f"`heldout_filter_column` is {column!r}, which is true in no held-out row of {name}.")
    return rows.select([i for i, value in enumerate(values) if value])


def first_of_each(rows: Dataset, n: int, columns: Columns) -> Dataset:
    """The first `n` rows of each prompt, in their order."""
    return rows.select(_first(prompts_of(rows, columns), n))


def _first(prompts: Sequence[str], n: int) -> list[int]:
    seen: Counter[str] = Counter()
    kept = []
    for i, prompt in enumerate(prompts):
        seen[prompt] += 1
        if seen[prompt] <= n:
            kept.append(i)
    return kept


def mislabelled(pairs: Dataset, spec: RunSpec) -> Dataset:
    """The training pairs of a run: with its rater's labels, or with its share of them flipped; a column `flipped`."""
    if spec.settings.get("label_rater") is not None:
        return label_by_rater(pairs, spec.settings["label_votes_column"], spec.settings["label_rater"])
    return flip_preferences(pairs, spec.settings["noise_rate"], seed=spec.seed)
