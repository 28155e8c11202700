"""The labels of one rater: which sides are swapped, and what is refused."""

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from prm_hf.noise.raters import label_by_rater


VOTES = st.lists(st.lists(st.sampled_from([1, -1]), min_size=3, max_size=3), min_size=1, max_size=6)


def pairs(votes):
    return Dataset.from_list(
        [
            {
                "prompt": f"p{i}",
                "chosen": f"good {i}",
                "rejected": f"bad {i}",
                "votes": found,
                "score_chosen": i + 1,
                "score_rejected": i,
                "margin": 1.0 + i,
            }
            for i, found in enumerate(votes)
        ]
    )


@given(VOTES, st.integers(0, 2))
def test_a_vote_against_the_majority_swaps_the_sides(votes, rater):
    rows = pairs(votes)
    made = label_by_rater(rows, "votes", rater)
    assert made["flipped"][:] == [found[rater] == -1 for found in votes]
    assert "votes" not in made.column_names
    for row, old in zip(made, rows, strict=True):
        sides = ("rejected", "chosen") if row["flipped"] else ("chosen", "rejected")
        assert (row["chosen"], row["rejected"]) == tuple(old[side] for side in sides)
        assert (row["score_chosen"], row["score_rejected"]) == tuple(old[f"score_{side}"] for side in sides)
        assert row["margin"] == (-1 if row["flipped"] else 1) * old["margin"] and row["prompt"] == old["prompt"]


def test_two_equal_sides_have_no_label():
    rows = pairs([[-1, -1, 1]]).map(lambda row: {"rejected": row["chosen"]})
    assert label_by_rater(rows, "votes", 0)["flipped"][:] == [False]


@pytest.mark.parametrize(
    ("votes", "rater", "message"),
    [
        (
            [[1, 1]],
            2,
            r"with one of rater 2 .*, and 1 of 1 rows have none: rows 0 .* first is \[1, 1\]",
        ),
        ([[1], [0], [1], [2]], 0, r"2 of 4 rows have none: rows 1, 3 .*another rater"),
        ([[1], None], 0, "1 of 2 rows have none: rows 1 "),
    ],
    ids=["rater", "vote", "null"],
)
def test_votes_that_say_nothing_are_named(votes, rater, message):
    with pytest.raises(ValueError, match=message):
        label_by_rater(pairs(votes), "votes", rater)


def test_columns_that_are_wrong_are_named():
    with pytest.raises(ValueError, match="no column 'raters' of votes; the columns are .*'votes'"):
        label_by_rater(pairs([[1]]), "raters", 0)
    with pytest.raises(ValueError, match="must hold a list of votes"):
        label_by_rater(pairs([[1]]), "margin", 0)
    with pytest.raises(ValueError, match="has a column 'flipped' already"):
        label_by_rater(pairs([[1]]).add_column("flipped", [False]), "votes", 0)
