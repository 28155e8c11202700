"""Checkers of answers: whether a completion ends in the answer that is expected."""

import importlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from datasets import Dataset

from .._names import did_you_mean
from .rows import Columns, check_rows


_NUMBER = re.compile(
    r"(?<![\d.])(?P<sign>(?<!\w)[-+\u2212])?(?:[$€£]\s?)?(?P<minus>(?<!\w)[-\u2212])?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?P<power>[eE][-+]?\d{1,2}(?!\d))?"
)
_MARK = "####"  # of GSM8K; what follows it is the answer
_CHOICE = re.compile(r"\(([A-Ja-j])\)|(?i:answer(?:\s+is)?|####|\\boxed\{)[\s:*(]*([A-Ja-j])(?![A-Za-z])")
_ONLY_CHOICE = re.compile(r"[\s(*]*([A-Ja-j])[\s).:*]*")


@dataclass(frozen=True)
class Checker:
    """How an answer is found in a text, and when a completion is right.

    Attributes:
        name: as in the argument `answer_checker`.
        read: the answer in a text, in one spelling; None where there is none.
        judge: whether a completion is right, by the expected answer. Default: what is read in both is equal.
    """

    name: str
    read: Callable[[str], str | None]
    judge: Callable[[str, str], bool] | None = None

    def is_right(self, completion: str, answer: str) -> bool:
        if self.judge is not None:
            return bool(self.judge(completion, answer))
        found = self.read(completion)
        return found is not None and found == self.read(answer)


def read_number(text: str) -> str | None:
    """The last number of a text, or the one behind its last `####`: `1,234.50`, `$1234.5` and `1234.5%` are one."""
    _, mark, end = text.rpartition(_MARK)
    found = list(_NUMBER.finditer(end if mark else text))
    if not found:
        return None
    match = found[0 if mark else -1]
    sign = "-" if ({match["sign"], match["minus"]} & {"-", "\u2212"}) else ""
    value = Decimal(sign + match["digits"].replace(",", "") + (match["power"] or ""))
    return format(value.normalize() + 0, "f")  # 0 is added since there is a -0


def read_choice(text: str) -> str | None:
    """The last letter from A to J in brackets, behind `answer is`, `####` or in a box; or that is the whole text."""
    if only := _ONLY_CHOICE.fullmatch(text):
        return only[1].upper()
    found = _CHOICE.findall(text)
    return "".join(found[-1]).upper() if found else None


def read_text(text: str) -> str | None:
    """The whole text, with one space between words."""
    return " ".join(text.split()) or None


CHECKERS = {"number": read_number, "exact": read_text, "choice": read_choice}


def pattern_checker(pattern: str) -> Checker:
    """The answer is the last match of a regular expression with one group, without surrounding space."""

    def read(text: str) -> str | None:
        found = re.findall(pattern, text)
        return found[-1].strip() if found else None

    return Checker(pattern, read)


def find_checker(name: str, argument: str = "answer_checker") -> Checker:
    """The checker of a name of the table, or of `module:function`, a function of a completion and an answer.

    Raises:
        ValueError: there is none of this name.
        TypeError: what has the name is no function.
    """
    if name in CHECKERS:
        return Checker(name, CHECKERS[name])
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(
            f"`{argument}` is {name!r}: it must be {', '.join(CHECKERS)}, or a function of a completion and an "
            f"answer, as my_module:is_right.{did_you_mean(name, CHECKERS)}"
        )
    try:
        judge = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise ValueError(
            f"`{argument}` is {name!r}, which cannot be imported ({error}): put the module's folder on PYTHONPATH."
        ) from error
    if not callable(judge):
        raise TypeError(f"`{argument}` is {name!r}, which is no function of a completion and an answer: name one.")
    return Checker(name, read_text, judge)


def checkable_rows(
    rows: Dataset, name: str, args: Any, flags: tuple[str, str], checker: Checker
) -> tuple[list[Any], list[str]]:
    """The prompts of a dataset, and their answers as texts.

    Args:
        name: of the dataset.
        args, flags: the arguments, and the names of those that name the column of the prompts and of the answers.

    Raises:
        ValueError: there is no row, no such column, no text in it, or no answer that the checker reads.
    """
    prompt, answer = (getattr(args, flag) for flag in flags)
    advice = f"Name yours with `--{flags[0]}` and `--{flags[1]}`."
    check_rows(rows, f"The rows of {name}", Columns(prompt, (), needs_prompt=True, advice=advice))
    if answer not in rows.column_names:
        raise ValueError(f"The rows of {name} have no column {answer!r}; they have {rows.column_names}. {advice}")
    return rows[prompt][:], expected_answers(rows[answer][:], checker, f"`{flags[1]}` {answer!r} of {name}")


def expected_answers(values: Sequence[Any], checker: Checker, place: str) -> list[str]:
    """The answers of a column as texts, of messages the last one.

    Args:
        place: words for the column, with which a sentence begins.

    Raises:
        ValueError: the checker reads no answer in some; their numbers are given.
    """
    texts = [_text(value) for value in values]
    wrong = [i for i, text in enumerate(texts) if checker.read(text) is None]
    if wrong:
        numbers = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
        raise ValueError(
            f"{place}: no answer is found by {checker.name!r} in {len(wrong)} of {len(texts)} rows: {numbers} (from "
            f"0). The first is {texts[wrong[0]][-80:]!r}. Correct them, or name another checker or column."
        )
    return texts


def _text(value: Any) -> str:
    if isinstance(value, list):
        value = value[-1].get("content") if value and isinstance(value[-1], dict) else None
    return "" if value is None else str(value)
