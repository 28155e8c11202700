"""Real label noise: pairs labelled as one of several raters labelled them."""

from datasets import Dataset, Features, Value

from .preferences import side_pairs, swap_sides
from .rows import check_new, map_rows, same_value
from .sides import side_changes


def label_by_rater(dataset: Dataset, votes_column: str, rater: int) -> Dataset:
    """Gives each pair the label of one rater: where the rater's vote is -1, the two sides are swapped.

    Args:
        dataset: pairs whose `chosen` is what most raters prefer.
        votes_column: a list for each row of every rater's vote: 1 for `chosen`, -1 for `rejected`.
        rater: the place of the rater in that list, from 0.

    Returns:
        The dataset without the votes, which were for the sides as they were, and with the bool column `flipped`:
        whether the rater's label is not that of the majority.

    Raises:
        ValueError: there is no such column or rater, or a vote is neither 1 nor -1; or as `flip_preferences` does.
    """
    check_votes(dataset, votes_column, rater)
    check_new(dataset, "flipped", "flipping")
    kept = Features({name: feature for name, feature in dataset.features.items() if name != votes_column})
    pairs = side_pairs(kept)
    changes = side_changes(dataset, [name for name in kept if not any(name in pair for pair in pairs)])

    def label(rows: dict[str, list], indices: list[int]) -> dict[str, list]:
        sides = zip(rows[votes_column], rows["chosen"], rows["rejected"], strict=True)
        flipped = [votes[rater] == -1 and not same_value(chosen, rejected) for votes, chosen, rejected in sides]
        return {"flipped": flipped, **swap_sides(rows, flipped, pairs, changes)}

    features = Features({**dataset.features, "flipped": Value("bool")})
    return map_rows(dataset, label, features, None, "Labels of one rater", {}).remove_columns(votes_column)


def check_votes(dataset: Dataset, votes_column: str, rater: int) -> None:
    """Raises ValueError unless each row of a column has a vote of the rater, 1 or -1."""
    if votes_column not in dataset.column_names:
        raise ValueError(f"There is no column {votes_column!r} of votes; the columns are {dataset.column_names}.")

    def is_vote(votes: object) -> bool:
        return isinstance(votes, list) and 0 <= rater < len(votes) and votes[rater] in (1, -1)

    votes = dataset.with_format(None)[votes_column][:]
    wrong = [i for i, found in enumerate(votes) if not is_vote(found)]
    if wrong:
        numbers = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
        raise ValueError(
            f"The column {votes_column!r} must hold a list of votes, 1 for `chosen` and -1 for `rejected`, with one "
            f"of rater {rater} (from 0), and {len(wrong)} of {len(votes)} rows have none: rows {numbers} (from 0). "
            f"The first is {votes[wrong[0]]!r}. Leave these rows out, or name another rater."
        )
