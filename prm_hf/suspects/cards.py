"""One suspect as HTML: how suspect it is, why, and what its label says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..noise.columns import LABELS
from .decisions import DROP, FLIP, KEEP
from .relabel import Kind
from .texts import Part, as_json, differences, parts_of, shown, texts_html


_NAMES = {KEEP: "Keep", FLIP: "Flip", DROP: "Drop"}
KEYS = {KEEP: "1", FLIP: "2", DROP: "3"}
_WIDTH, _HEIGHT, _EDGE = 230, 48, 6  # of the line of margins


@dataclass(frozen=True)
class Card:
    """What the cards of a page share.

    Attributes:
        decisions: those that there are for this kind of label.
        typical: the median of the last margins out of fold, and in sample.
    """

    kind: Kind
    decisions: tuple[str, ...]
    typical: tuple[float, float]

    def html(self, line: dict[str, Any]) -> str:
        """`line` is an object of `suspects.jsonl`."""
        row, p = int(line["row"]), float(line["probability_wrong"])
        buttons = "".join(
            f'<button type="button" data-decision="{word}" aria-pressed="false" aria-keyshortcuts="{KEYS[word]}">'
            f"<kbd>{KEYS[word]}</kbd>{_NAMES[word]}</button>"
            for word in self.decisions
        )
        decided = f' data-decided="{line["decided"]}"' if line.get("decided") in self.decisions else ""
        body = self._body(dict(line["data"]))
        is_long = 'class="texts long"' in body
        more = '<button type="button" class="more" aria-expanded="false" hidden>Show all</button>' if is_long else ""
        return (
            f'<li><article class="card" id="row-{row}" data-row="{row}"{decided} tabindex="-1" '
            f'aria-labelledby="name-{row}">\n'
            f'<header><h2 id="name-{row}"><span class="rank">{int(line["rank"])}</span> '
            f'<span class="quiet">row {row}</span></h2>\n{_probability(p)}\n'
            f'<p class="why">{shown(self.why(line))}</p>\n{_sparkline(*_margins(line))}</header>\n{body}\n'
            f'<footer><div class="decide" role="group" aria-label="Decision on row {row}">{buttons}</div>{more}'
            "</footer></article></li>"
        )

    def why(self, line: dict[str, Any]) -> str:
        """In one sentence, what speaks against the label."""
        unseen, seen = (_last(values) for values in _margins(line))
        what = "pair" if self.kind == "preference" else "row"
        margin, typical = (unseen, self.typical[0]) if unseen is not None else (seen, self.typical[1])
        if margin is None:
            return f"No model says anything of this {what}, whose label means nothing, as with two equal sides."
        text = f"A model that was {'trained' if unseen is None else 'not trained'} on this {what} {self._says(margin)}"
        if 0 <= margin < typical:
            return f"{text}, but less than {'it does' if self.kind == 'completion' else 'in'} most {what}s."
        if unseen is not None and seen is not None:
            is_same = (unseen < 0) == (seen < 0)
            other = "and so does" if is_same else "but"
            text += f", {other} one that was trained on it{'' if is_same else ' ' + self._says(seen)}"
        return f"{text}."

    def _says(self, margin: float) -> str:
        words = {
            "preference": ("prefers the rejected answer", "prefers the chosen answer"),
            "completion": (
                "finds the completion less likely after its prompt than after another one",
                "finds the completion more likely after its prompt than after another one",
            ),
            "label": ("prefers another label", "prefers this label"),
        }
        return words[self.kind][margin >= 0]

    def _body(self, data: dict[str, Any]) -> str:
        if self.kind == "preference":
            prompt, chosen, rejected = _conversation(data)
            marks = differences(chosen, rejected)
            sides = _side("Chosen", "chosen", texts_html(chosen, marks[0]))
            sides += _side("Rejected", "rejected", texts_html(rejected, marks[1]))
            body = _side("Prompt", "prompt", texts_html(prompt)) if prompt else ""
            body += f'<div class="sides">{sides}</div>'
            used = {"prompt", "chosen", "rejected"}
        elif self.kind == "completion":
            body = "".join(
                _side(name.capitalize(), name, texts_html(parts_of(data[name])))
                for name in ("prompt", "completion")
                if name in data
            )
            used = {"prompt", "completion"}
        else:
            label = next((name for name in LABELS if name in data), "label")
            body = _side("Text", "prompt", texts_html(parts_of(data["text"]))) if "text" in data else ""
            value = data.get(label)
            body += _side(
                "Label", "label", texts_html([Part(None, value if isinstance(value, str) else as_json(value))])
            )
            used = {"text", label}
            if "text" not in data:  # the columns of a table are what the label is about
                return _columns(data, used) + body
        others = _columns(data, used)
        return body + (f"<details><summary>Other columns</summary>{others}</details>" if others else "")


def _side(title: str, kind: str, content: str) -> str:
    return f'<section class="side {kind}"><h3>{title}</h3>{content}</section>'


def _columns(data: dict[str, Any], left_out: set[str]) -> str:
    entries = "".join(
        f'<dt>{shown(name)}</dt><dd dir="auto">{shown(value if isinstance(value, str) else as_json(value))}</dd>'
        for name, value in data.items()
        if name not in left_out
    )
    return f'<dl class="columns">{entries}</dl>' if entries else ""


def _conversation(data: dict[str, Any]) -> tuple[list[Part], list[Part], list[Part]]:
    """Prompt, chosen and rejected; messages that both sides begin with are the prompt where there is none."""
    chosen, rejected = parts_of(data.get("chosen")), parts_of(data.get("rejected"))
    if data.get("prompt") is not None:
        return parts_of(data["prompt"]), chosen, rejected
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _probability(p: float) -> str:
    return (
        f'<p class="probability"><strong>{shown(shown_percent(p))}</strong> <span class="quiet">likely wrong</span>'
        f'<svg viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="all" width="100" height="4"/>'
        f'<rect class="part" width="{100 * min(max(p, 0.0), 1.0):.1f}" height="4"/></svg></p>'
    )


def shown_percent(p: float) -> str:
    """A share in percent, which is 0 or 100 only where it is."""
    if not math.isfinite(p):
        return "?"
    percent = round(100 * p)
    return "< 1\xa0%" if percent == 0 < p else "> 99\xa0%" if percent == 100 and p < 1 else f"{percent}\xa0%"


# --- margins over the epochs ---


def _margins(line: dict[str, Any]) -> tuple[list[float], list[float]]:
    """Out of fold, and in sample."""
    return _finite(line.get("margins")), _finite(line.get("in_sample_margins"))


def _finite(values: Sequence[float | None] | None) -> list[float]:
    return [float(x) for x in values or () if x is not None and math.isfinite(x)]


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def typical_margins(lines: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """The medians of the last margins, out of fold and in sample; NaN where there are none."""
    found = []
    for series in zip(*map(_margins, lines), strict=True):
        last = sorted(values[-1] for values in series if values)
        found.append(last[len(last) // 2] if last else math.nan)
    return found[0], found[1]


def _sparkline(unseen: list[float], seen: list[float]) -> str:
    if not unseen and not seen:
        return ""
    known = [0.0, *unseen, *seen]
    low, high = min(known), max(known)
    scale = (_HEIGHT - 2 * _EDGE) / ((high - low) or 1.0)

    def place(i: int, x: float, n: int) -> tuple[float, float]:
        across = (_WIDTH - 2 * _EDGE) * (i / (n - 1) if n > 1 else 0.5)
        return _EDGE + across, _EDGE + (high - x) * scale

    drawn, words = [], []
    for name, kind, values in (("out of fold", "unseen", unseen), ("in sample", "seen", seen)):
        if not values:
            continue
        points = [place(i, x, len(values)) for i, x in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        x, y = points[-1]
        mark = f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"/>' if kind == "seen" else ""
        mark = mark or f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5"/>'
        drawn.append(f'<g class="{kind}"><polyline points="{path}"/>{mark}</g>')
        words.append(f'<span class="{kind}">{name} {_signed(values[-1])}</span>')
    zero = place(0, 0.0, 1)[1]
    told = "; ".join(
        f"{name}: {', '.join(map(_signed, values))}"
        for name, values in (("out of fold", unseen), ("in sample", seen))
        if values
    )
    return (
        f'<figure class="spark"><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="Margin after each epoch, '
        f'{told}"><title>Margin after each epoch, {told}</title>'
        f'<line class="zero" x1="0" x2="{_WIDTH}" y1="{zero:.1f}" y2="{zero:.1f}"/>{"".join(drawn)}</svg>'
        f"<figcaption>{' '.join(words)}</figcaption></figure>"
    )


def _signed(x: float) -> str:
    text = f"{x:+.2f}" if abs(x) >= 0.1 or x == 0 else f"{x:+.1g}"
    return text.replace("-", "\u2212")
