"""The rows of a dataset as texts: which can be trained on, and which rows of two datasets are the same."""

import json
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from trl import extract_prompt

from ..runs.comparable import numbered


# Completions of fewer characters may be the answer to many prompts; of more they are the same row.
_LONG = 100
GROUP = "group"  # a column that says which rows belong together


@dataclass(frozen=True)
class Columns:
    """The columns that a task reads.

    Attributes:
        needs_prompt: whether there must be a column of prompts. If not, completions may begin with them.
        advice: what to do where a column has another name.
    """

    prompt: str
    completions: tuple[str, ...]
    needs_prompt: bool
    advice: str

    def of(self, rows: Dataset) -> list[str]:
        """Those that there are."""
        return [name for name in (self.prompt, *self.completions) if name in rows.column_names]


def check_rows(rows: Dataset, place: str, columns: Columns) -> None:
    """Raises ValueError unless there are rows, and each has text or messages in these columns, with their numbers.

    Args:
        place: words for the rows, with which a sentence begins.
    """
    if not len(rows):
        raise ValueError(f"{place} are none: the file or split is empty.")
    needed = (columns.prompt, *columns.completions) if columns.needs_prompt else columns.completions
    missing = [name for name in needed if name not in rows.column_names]
    if missing:
        raise ValueError(f"{place} have no column {missing[0]!r}; they have {rows.column_names}. {columns.advice}")
    for name in columns.of(rows):
        wrong = [i for i, value in enumerate(rows[name]) if not _is_text(value)]
        if wrong:
            numbers = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
            raise ValueError(
                f"{place} must have text or messages in the column {name!r}, and {len(wrong)} of {len(rows)} have "
                f"none: rows {numbers} (from 0). The first is {str(rows[wrong[0]][name])[:80]!r}. Correct them."
            )


def _is_text(value: Any) -> bool:
    """Whether it is a text, or a list of messages."""
    if isinstance(value, str):
        return True
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) and "role" in x for x in value)


def text_of(value: Any) -> str:
    """A text, or the contents of messages, with one space between words."""
    if isinstance(value, list):
        value = " ".join(text_of(x.get("content", x.get("text")) if isinstance(x, dict) else x) for x in value)
    return " ".join(str("" if value is None else value).split())


def _texts(rows: Dataset, columns: Columns) -> list[tuple[str, list[str]]]:
    """Of each row its prompt and its completions. Without a column of prompts completions begin with theirs."""
    found = []
    for row in rows.select_columns(columns.of(rows)):
        if columns.prompt not in row:
            row = extract_prompt(row)
        found.append((text_of(row[columns.prompt]), [text_of(row[name]) for name in columns.completions]))
    return found


def prompts_of(rows: Dataset, columns: Columns) -> list[str]:
    """The prompts of rows; of rows without any their whole text."""
    return [prompt or " ".join(completions) for prompt, completions in _texts(rows, columns)]


def groups_of(rows: Dataset, columns: Columns) -> list[int]:
    """A number for each row, equal where rows belong together: by a column `group` if there is one, else the prompt.

    Rows of one prompt share texts, so that they are no independent examples. A prompt that all rows have says nothing.
    """
    keys = rows[GROUP][:] if GROUP in rows.column_names else prompts_of(rows, columns)
    groups = numbered(json.dumps(key, sort_keys=True, default=str) for key in keys)
    is_said = GROUP in rows.column_names or len(set(groups)) > 1
    return groups if is_said else list(range(len(rows)))


def overlapping(train: Dataset, heldout: Dataset, columns: Columns) -> list[int]:
    """The numbers of held-out rows whose prompt or text is among the training rows.

    Spaces make no other text. A text is a prompt with one of its completions, or all completions of a row together
    unless they are short. A prompt that all training rows have says nothing.
    """
    known, held = _texts(train, columns), _texts(heldout, columns)
    prompts = {prompt for prompt, _ in known} - {""}
    if len(prompts) == 1 and len(known) > 1:
        prompts = set()
    texts = {text for row in known for text in _whole_texts(*row)}
    return [
        number
        for number, (prompt, completions) in enumerate(held)
        if prompt in prompts or any(text in texts for text in _whole_texts(prompt, completions))
    ]


def _whole_texts(prompt: str, completions: list[str]) -> list[str | frozenset[str]]:
    """What tells the text of a row from others."""
    found = [f"{prompt} {completion}".strip() for completion in completions]
    return [*found, *([frozenset(completions)] if sum(map(len, completions)) >= _LONG else [])]
