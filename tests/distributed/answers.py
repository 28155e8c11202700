"""A checker of the built-in task's answers, for the processes that tests start."""

import re


def same_digits(completion: str, answer: str) -> bool:
    """Whether the last answer of a completion has the digits of the last one of another, in their order."""
    found = [re.findall(r"answer ([0-9 ]*)", text)[-1:] for text in (completion, answer)]
    completed, expected = (" ".join(digits).split() for digits in found)
    return completed == expected
