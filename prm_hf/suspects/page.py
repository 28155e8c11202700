"""`suspects.html`: the most suspect rows on one page, to be kept, flipped or dropped by hand. Opens offline."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._files import write_whole
from .._page import STYLE, whole_page
from ..noise.columns import LABELS
from .cards import KEYS, Card, shown_percent, typical_margins
from .decisions import DECISIONS, DROP, FLIP, KEEP
from .files import SUMMARY_FILE, SUSPECTS_FILE
from .relabel import is_labelled
from .texts import shown


PAGE_FILE = "suspects.html"
MOST_CARDS = 100
_HERE = Path(__file__).parent
_WHAT = {"preference": "pairs", "completion": "completions", "label": "labels"}


def write_page(folder: str | Path) -> Path:
    """Writes `suspects.html` of the `suspects.jsonl` and `suspects_summary.json` in a folder, whole or not at all.

    Returns:
        The file.

    Raises:
        OSError: one of the two files cannot be read.
        ValueError: one is not what `prm-hf suspects` wrote.
    """
    folder = Path(folder)
    try:
        with (folder / SUSPECTS_FILE).open(encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))
        text = page_html(lines, summary)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"The suspects in {folder} cannot be shown ({type(error).__name__}: {error}): find them again."
        ) from error
    write_whole(folder / PAGE_FILE, [text])
    return folder / PAGE_FILE


def page_html(lines: Sequence[dict[str, Any]], summary: dict[str, Any]) -> str:
    """The text of the page.

    Args:
        lines: the objects of `suspects.jsonl`, all of them. The first hundred that nobody has decided are shown, and
            then those that are decided, so that the page exports all decisions.
        summary: what `suspects_summary.json` says.
    """
    kind = summary["kind"]
    card = Card(kind, tuple(_decisions(kind, lines)), typical_margins(lines))
    open_lines, decided = ([x for x in lines if ("decided" in x) is is_decided] for is_decided in (False, True))
    listed = open_lines[:MOST_CARDS] + decided
    style = STYLE + (_HERE / "page.css").read_text(encoding="utf-8")
    script = (_HERE / "page.js").read_text(encoding="utf-8")
    what = _WHAT[kind]
    sections = [
        f"<h1>Which {what if kind == 'label' else f'labels of {len(lines):,} {what}'} are wrong?</h1>",
        f'<div class="screen"><section>{_verdict(summary, lines, len(decided))}{_help(card)}</section>',
        f"<section>{_histogram([float(line['probability_wrong']) for line in lines])}</section></div>",
        _toolbar(len(listed)),
        f'<ol class="suspects" data-key="{_digest(lines)}">\n' + "\n".join(map(card.html, listed)) + "\n</ol>",
    ]
    policy = (
        f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
    body = "\n".join(sections)
    return whole_page("Suspects", style, body, head=head, scripts=f"<script>{script}</script>")


def _decisions(kind: str, lines: Sequence[dict[str, Any]]) -> list[str]:
    """The decisions that a row of this kind allows: a completion has no other one, and a class one other of two."""
    if kind == "label":
        labels = {
            json.dumps(label)
            for line in lines
            for label in [next((line["data"][name] for name in LABELS if name in line["data"]), None)]
            if is_labelled(label)
        }
        return list(DECISIONS) if len(labels) == 2 else [KEEP, DROP]
    return list(DECISIONS) if kind == "preference" else [KEEP, DROP]


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}"


def _digest(lines: Sequence[dict[str, Any]]) -> str:
    """Tells the rows of this page from those of another, whose decisions the browser may keep too."""
    rows = sorted((line["row"], json.dumps(line["data"], sort_keys=True, default=str)) for line in lines)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _verdict(summary: dict[str, Any], lines: Sequence[dict[str, Any]], n_decided: int) -> str:
    low, high = summary.get("share_low"), summary.get("share_high")
    said = f"Of {len(lines):,} labels about {shown_percent(summary['share_wrong'])} are wrong"
    if low is not None and high is not None:
        said += f", with 95\xa0% confidence between {shown_percent(low)} and {shown_percent(high)}"
    models = {
        "out of fold": "Each row is judged by models that were not trained on it.",
        "in sample": "Each row is judged by a model that was trained on it.",
    }.get(summary["how"], "")
    n_open = min(len(lines) - n_decided, MOST_CARDS)
    shown_rows = f"The {n_open} most suspect rows are below, the most suspect one first."
    if n_decided:
        shown_rows = (
            f"{n_decided} are decided by hand. Of the others the {n_open} most suspect rows are below, the most "
            "suspect one first, and then those that are decided."
        )
    return f'<div class="verdict"><p><strong>{shown(said)}.</strong></p><p>{shown(models)} {shown_rows}</p></div>'


def _help(card: Card) -> str:
    flip = {
        "preference": "the two answers change places",
        "label": "the label becomes the other one",
    }.get(card.kind, "")
    meanings = {KEEP: "the label is right", FLIP: flip, DROP: "the row is left out"}
    rows = [(f"<kbd>{KEYS[word]}</kbd>", f"{word}: {meanings[word]}") for word in card.decisions]
    rows += [
        ("<kbd>J</kbd> <kbd>K</kbd> or <kbd>→</kbd> <kbd>←</kbd>", "next, previous row"),
        ("<kbd>0</kbd>", "take a decision back"),
        ("<kbd>U</kbd>", "undo the last change"),
        ("<kbd>E</kbd>", "show all of a long text"),
    ]
    entries = "".join(f"<div><dt>{keys}</dt><dd>{meaning}</dd></div>" for keys, meaning in rows)
    margin = {
        "preference": "A margin above 0 is a model’s preference for the chosen answer.",
        "completion": "The margin is the mean log-probability of a token after the prompt, minus that after another.",
        "label": "A margin above 0 is a model’s preference for the label.",
    }[card.kind]
    series = zip(
        (
            '<span class="unseen">out of fold</span>, of a model that was not trained on the row',
            '<span class="seen">in sample</span>, of a model that was trained on it',
        ),
        card.typical,
        strict=True,
    )
    curves = "; ".join(words for words, typical in series if math.isfinite(typical))
    return (
        '<details class="how" open><summary>Keys, and how to read the rows</summary>'
        f'<dl class="keys">{entries}</dl>'
        '<p class="switch"><label><input type="checkbox" id="shortcuts" checked> Keys decide and move</label></p>'
        f'<p class="quiet">{margin} A small curve has it after each epoch: {curves}. '
        "The export is a file of decisions: give the command again with <code>--decisions decisions.jsonl</code>, "
        "and the suspects and the repaired rows follow it.</p></details>"
    )


def _toolbar(n: int) -> str:
    return (
        '<section class="bar" aria-label="Decisions">'
        f'<p id="count" role="status" aria-live="polite" data-rows="{n}">0 of {n} decided</p>'
        '<button type="button" id="undo" disabled aria-keyshortcuts="u">Undo</button>'
        '<button type="button" id="export" disabled>Export decisions.jsonl</button>'
        '<p id="storage" class="quiet" role="status" hidden>This browser keeps no decisions: export them before you '
        "close the page.</p></section>"
        '<noscript><p class="quiet">Without scripts the suspects can be read, and not decided on.</p></noscript>'
    )


def _histogram(probabilities: Sequence[float]) -> str:
    """How many rows have which probability, in steps of 5 %."""
    counts = [0] * 20
    for p in probabilities:
        if math.isfinite(p):
            counts[min(int(20 * p), 19)] += 1
    top = max(counts) or 1
    width, height, left, right, bottom = 520, 200, 44, 26, 36
    step, scale = (width - left - right) / 20, (height - bottom - 12) / top
    base = height - bottom
    bars = "".join(
        f'<rect x="{left + i * step + 1:.1f}" y="{base - count * scale:.1f}" width="{step - 2:.1f}" '
        f'height="{count * scale:.1f}" class="{"over" if i >= 10 else "under"}"><title>{5 * i} to {5 * i + 5} %: '
        f"{count} rows</title></rect>"
        for i, count in enumerate(counts)
        if count
    )
    ticks = "".join(
        f'<text x="{left + 4 * i * step:.1f}" y="{base + 16}" text-anchor="middle">{20 * i} %</text>' for i in range(6)
    )
    middle = left + 10 * step
    n_over = sum(p > 0.5 for p in probabilities)
    label = f"{n_over:,} of {len(probabilities):,} rows have a label that is wrong with a probability above 50\xa0%."
    return (
        f'<figure class="histogram"><svg viewBox="0 0 {width} {height}" role="img" aria-label="Rows by the '
        f'probability that their label is wrong. {label}">'
        f'<line class="axis" x1="{left}" x2="{width - right}" y1="{base}" y2="{base}"/>{bars}'
        f'<line class="zero" x1="{middle:.1f}" x2="{middle:.1f}" y1="4" y2="{base}"/>{ticks}'
        f'<text x="{left - 6}" y="18" text-anchor="end">{top:,}</text>'
        f'<text x="{left - 6}" y="{base}" text-anchor="end">0</text>'
        f'<text x="{middle:.0f}" y="{height - 4}" text-anchor="middle">probability that the label is wrong</text>'
        f'<text transform="translate(12 {base / 2:.0f}) rotate(-90)" text-anchor="middle">rows</text></svg>'
        f"<figcaption>{label}</figcaption></figure>"
    )
