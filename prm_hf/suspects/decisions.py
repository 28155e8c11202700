"""What a person decided about suspects, row by row: `decisions.jsonl`, which `suspects.html` exports."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..runs.text import short


KEEP, FLIP, DROP = DECISIONS = ("keep", "flip", "drop")


def read_decisions(file: str | Path, n_rows: int) -> dict[int, str]:
    """The decisions of a file, whose lines are `{"row": 3, "decision": "flip"}`.

    Args:
        n_rows: number of rows that the decisions are about.

    Returns:
        `keep`, `flip` or `drop` by the number of the row, from 0.

    Raises:
        OSError: the file cannot be read.
        TypeError, ValueError: a line is no decision, about no row of these, or contradicts another; with its number.
    """
    found: dict[int, tuple[str, int]] = {}
    for number, line in enumerate(Path(file).read_bytes().split(b"\n"), start=1):
        place = f"{file}, line {number}"
        entry = _entry(line, place)
        if entry is None:
            continue
        row, decision = entry["row"], entry["decision"]
        check_decision(row, decision, n_rows, place)
        before, where = found.setdefault(row, (decision, number))
        if before != decision:
            raise ValueError(
                f"{place}: row {row} is to be decided with {decision!r}, and with {before!r} in line {where}: remove "
                "one of the two lines."
            )
    return {row: decision for row, (decision, _) in found.items()}


def check_decisions(decisions: Mapping[int, str] | None, n_rows: int) -> dict[int, str]:
    """The decisions as a dict; a ValueError or TypeError names the first that is wrong."""
    if decisions is None:
        return {}
    if not isinstance(decisions, Mapping):
        raise TypeError(
            "`decisions` must be a dict from the numbers of rows to `keep`, `flip` or `drop`, as `read_decisions` "
            f"returns, got {short(decisions)}."
        )
    for row, decision in decisions.items():
        check_decision(row, decision, n_rows, "`decisions`")
    return dict(decisions)


def check_decision(row: Any, decision: Any, n_rows: int, place: str) -> None:
    """Raises TypeError or ValueError unless `row` is one of `n_rows` rows and the word of `decision` is known."""
    if isinstance(row, bool) or not isinstance(row, int):
        raise TypeError(f"{place}: `row` is {short(row)}: it must be the number of a row, a whole number from 0.")
    if not 0 <= row < n_rows:
        raise ValueError(
            f"{place}: row {row} is none of the {n_rows} rows, which are 0 to {n_rows - 1}: pass the decisions about "
            "these rows and no other ones."
        )
    if decision not in DECISIONS:
        raise ValueError(f"{place}: `decision` of row {row} is {short(decision)}: it must be {_WORDS}.")


_WORDS = "'keep', 'flip' or 'drop'"


def _entry(line: bytes, place: str) -> dict[str, Any] | None:
    """The object in a line; None for an empty line."""
    try:
        text = line.decode("utf-8-sig").strip()
        entry = json.loads(text) if text else None
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 ({error}): export the decisions again.") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{place} is not JSON ({error}): is the file cut off? Export the decisions again.") from error
    if not text:
        return None
    if not isinstance(entry, dict) or not {"row", "decision"} <= {*entry}:
        raise ValueError(
            f'{place} is {short(text)}: a decision is an object as {{"row": 3, "decision": "flip"}}, with {_WORDS}.'
        )
    return entry
