"""Texts of a dataset as HTML: shown as they are, whatever they hold, and the words marked in which two differ."""

from __future__ import annotations

import difflib
import html
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple


LONG, MANY_LINES = 900, 14  # characters and lines of a text that is folded
# Words, and signs of writing without spaces one by one
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]|\w+|[^\w\s]")
_MOST_WORDS = 600  # more are not compared: that takes time with their square
_LEAST_ALIKE = 0.5  # of two texts that share less, all would be marked
_KEPT = {"\n", "\t", "\u200c", "\u200d"}  # the joiners of Persian, of Indic scripts and of emoji


class Part(NamedTuple):
    """A text and who says it; None outside of a conversation."""

    role: str | None
    text: str


def parts_of(value: Any) -> list[Part]:
    """What a column holds: a text, messages, or anything else as JSON."""
    if isinstance(value, str):
        return [Part(None, value)]
    if isinstance(value, list) and value and all(isinstance(x, dict) and "role" in x for x in value):
        return [Part(str(message["role"]), _content(message)) for message in value]
    return [Part(None, as_json(value))]


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1, default=str)


def _content(message: dict[str, Any]) -> str:
    """What a message says, and below it what else it has, as the calls of tools."""
    content = message.get("content")
    blocks = content if isinstance(content, list) else [content]
    texts = [block["text"] if isinstance(block, dict) and "text" in block else block for block in blocks]
    others = {name: value for name, value in message.items() if name not in ("role", "content") and value is not None}
    shown = [x if isinstance(x, str) else as_json(x) for x in texts if x is not None]
    return "\n".join([*shown, *([as_json(others)] if others else [])])


def shown(text: str) -> str:
    """A text as HTML that shows what it is, and the code of a character that one cannot see or that turns the line."""
    return "".join(map(_shown_character, text.replace("\r\n", "\n")))


def _shown_character(c: str) -> str:
    is_odd = unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") and c not in _KEPT
    return f'<bdi class="code">U+{ord(c):04X}</bdi>' if is_odd else html.escape(c)


def texts_html(parts: Sequence[Part], marks: Sequence[Sequence[tuple[int, int]]] | None = None) -> str:
    """Parts as HTML; `marks` are the places in each of them that are marked, as `(start, end)`."""
    found = []
    for part, places in zip(parts, marks or [()] * len(parts), strict=True):
        role = "" if part.role is None else f'<p class="role">{shown(part.role)}</p>'
        text = _marked(part.text, places) if part.text else '<span class="quiet">(empty)</span>'
        found.append(f'{role}<div class="text" dir="auto">{text}</div>')
    is_long = sum(len(part.text) for part in parts) > LONG or sum(p.text.count("\n") + 1 for p in parts) > MANY_LINES
    return f'<div class="texts{" long" if is_long else ""}">{"".join(found)}</div>'


def _marked(text: str, places: Sequence[tuple[int, int]]) -> str:
    found, end = [], 0
    for start, stop in places:
        found += [shown(text[end:start]), f"<mark>{shown(text[start:stop])}</mark>"]
        end = stop
    return "".join([*found, shown(text[end:])])


def differences(a: Sequence[Part], b: Sequence[Part]) -> tuple[Any, Any]:
    """The marks of the words in which two lists of parts differ; None for lists that have too little in common."""
    if len(a) != len(b):
        return None, None
    pairs = [_differing(x.text, y.text) for x, y in zip(a, b, strict=True)]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _differing(a: str, b: str) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    words = [list(_WORD.finditer(text)) for text in (a, b)]
    if max(map(len, words)) > _MOST_WORDS:
        return [], []
    left, right = ([word[0] for word in found] for found in words)
    matcher = difflib.SequenceMatcher(None, left, right, autojunk=False)
    if matcher.ratio() < _LEAST_ALIKE:
        return [], []
    changed = [codes[1:] for codes in matcher.get_opcodes() if codes[0] != "equal"]
    places = [[(i, j) for i, j, _, _ in changed], [(i, j) for _, _, i, j in changed]]
    of_a, of_b = (
        [(found[i].start(), found[j - 1].end()) for i, j in spans if j > i]
        for found, spans in zip(words, places, strict=True)
    )
    return of_a, of_b
