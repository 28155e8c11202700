"""`report.html`: one page without external resources, its pictures embedded, readable on light and dark screens."""

from __future__ import annotations

import base64
import json
from html import escape
from typing import Any

from .comparison import SAME_LR, Comparison, Contrast, best, display_name
from .plots import method_styles
from .tables import CONTRAST_HEADER, contrast_cells, footnote, header, row_cells


_CAPTIONS = {
    "frontier": "Held-out accuracy against drift from the reference policy, a curve a method through its learning "
    "rates. At one learning rate a mask below 1 always drifts less; methods differ where their curves do.",
    "curves": "Over the steps of training; lines are means over seeds, bands the range of the seeds.",
    "mask": "The mean of the mask over the steps.",
}
_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #62676e; --page: #fff; --card: #f5f6f8; --line: #dfe2e6;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --quiet: #9aa1a9; --page: #15171a; --card: #1e2126;
  --line: #33383f; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.5rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p, li { max-width: 82ch; }
li { margin: .35rem 0; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; max-width: none; }
.summary { margin: 1.4rem 0 0; padding: 1rem 1.2rem; background: var(--card); border-left: 4px solid var(--accent);
  border-radius: 4px; max-width: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; border-bottom-width: 2px; }
th.left, td.left { text-align: left; }
td.left:last-child { white-space: normal; }
tr.best td { font-weight: 650; }
tr.first td { border-top: 2px solid var(--line); }
tbody tr:hover { background: var(--card); }
.chip { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 2px;
  outline: 1px solid var(--line); }
figure { margin: 1rem 0 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; padding: .6rem; border-radius: 6px;
  border: 1px solid var(--line); }
figure.narrow img { max-width: 820px; }
figcaption { margin-top: .5rem; }
details { margin-top: 1rem; } summary { cursor: pointer; font-weight: 600; }
code { font: .85em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
"""


def html_page(comparison: Comparison, pictures: dict[str, bytes]) -> str:
    """The page. `pictures` maps `"frontier"`, `"curves"` and `"mask"` to PNG bytes; one that is absent is left out."""
    summary, *others = comparison.statements
    sections = [
        f"<h1>{escape(_title(comparison))}</h1>",
        f'<p class="quiet">{escape(_subtitle(comparison))}</p>',
        f'<p class="summary">{escape(summary)}</p>',
        "<h2>Results</h2>",
        _row_table(comparison),
        f'<p class="quiet">{escape(footnote(comparison))} Bold: the most accurate learning rate of each method.</p>',
        _picture(pictures, "frontier"),
    ]
    if comparison.contrasts:
        sections += ["<h2>Paired differences in accuracy</h2>", _contrast_table(comparison)]
    if others:
        items = "".join(f"<li>{escape(statement)}</li>" for statement in others)
        sections += ["<h2>What this shows, and what it does not</h2>", f"<ul>{items}</ul>"]
    if "curves" in pictures or "mask" in pictures:
        sections += ["<h2>Over the steps</h2>", _picture(pictures, "curves"), _picture(pictures, "mask")]
    sections += ["<h2>Runs</h2>", _settings(comparison), _run_list(comparison)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(_title(comparison))}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def _title(comparison: Comparison) -> str:
    names = [display_name(method) for method in comparison.methods()]
    return "Comparison of " + (", ".join(names) if len(names) < 5 else f"{len(names)} methods")


def _subtitle(comparison: Comparison) -> str:
    info = next((run.info for run in comparison.runs if run.info.get("model")), {})
    parts = [f"{len(comparison.runs)} runs, {len(comparison.rows)} settings"]
    parts += [f"{key.replace('_', ' ')}: {info[key]}" for key in ("model", "dataset", "noise_rate") if key in info]
    examples = next((len(run.heldout) for run in comparison.runs if run.heldout is not None), None)
    parts += [f"{examples} {comparison.measures.examples}"] if examples else []
    return " · ".join(parts)


def _table(header: list[str], left: set[int], rows: list[tuple[str, list[str]]]) -> str:
    """`rows` are (class of the row, cells as HTML)."""

    def cells(tag: str, values: list[str]) -> str:
        return "".join(f"<{tag}{' class=left' if i in left else ''}>{v}</{tag}>" for i, v in enumerate(values))

    body = "".join(f"<tr{f' class={kind!r}' if kind else ''}>{cells('td', values)}</tr>\n" for kind, values in rows)
    head = f"<thead><tr>{cells('th', [escape(name) for name in header])}</tr></thead>"
    return f'<div class="scroll"><table>{head}\n<tbody>\n{body}</tbody></table></div>'


def _row_table(comparison: Comparison) -> str:
    styles = method_styles(list(comparison.methods()))
    rows = []
    for method, members in comparison.methods().items():
        top = best(members)
        for row in members:
            cells = [escape(cell) for cell in row_cells(row)]
            cells[0] = f'<span class="chip" style="background:{styles[method][0]}"></span>{cells[0]}'
            kinds = [name for name, holds in (("best", row is top), ("first", row is members[0])) if holds]
            rows.append((" ".join(kinds), cells))
    return _table(header(comparison), {0}, rows)


def _contrast_table(comparison: Comparison) -> str:
    known = [c.interval for c in comparison.contrasts if c.interval]
    ends = [abs(end) for i in known for end in ((i.low, i.high) if i.known else (i.mean,))]
    reach = max([*ends, 0.01])
    rows = []
    previous = None
    for contrast in comparison.contrasts:
        *cells, last = [escape(cell) for cell in contrast_cells(contrast)]
        kind = "first" if previous is not None and contrast.left.method != previous else ""
        previous = contrast.left.method
        rows.append((kind, [*cells, _interval_picture(contrast, reach), last]))
    heads = [*CONTRAST_HEADER[:-1], "", CONTRAST_HEADER[-1]]
    table = _table(heads, {0, 1, 4, 5}, rows)
    return table + '<p class="quiet">The line in the middle is a difference of 0; right of it the first is better.</p>'


def _interval_picture(contrast: Contrast, reach: float) -> str:
    """A small inline drawing of the interval, 0 in the middle."""
    interval = contrast.interval
    if interval is None:
        return ""

    def x(value: float) -> float:
        return 80 + 76 * value / reach

    # A difference at the same learning rate proves nothing, however clear, and gets no colour.
    clear = interval.verdict in ("higher", "lower") and contrast.kind != SAME_LR
    colour = "var(--accent)" if clear else "var(--quiet)"
    bar = ""
    if interval.known:
        ends = f'x1="{x(interval.low):.1f}" x2="{x(interval.high):.1f}"'
        bar = f'<line {ends} y1="9" y2="9" stroke="{colour}" stroke-width="2.5" stroke-linecap="round"/>'
    return (
        f'<svg width="160" height="18" role="img" aria-label="{interval.mean:+.3f}">'
        f'<line x1="80" x2="80" y1="0" y2="18" stroke="var(--quiet)" stroke-opacity="0.5" stroke-width="1.5"/>{bar}'
        f'<circle cx="{x(interval.mean):.1f}" cy="9" r="4" fill="{colour}"/></svg>'
    )


def _picture(pictures: dict[str, bytes], name: str) -> str:
    if name not in pictures:
        return ""
    data = base64.b64encode(pictures[name]).decode("ascii")
    caption = escape(_CAPTIONS[name])
    narrow = ' class="narrow"' if name == "mask" else ""
    return (
        f'<figure{narrow}><img src="data:image/png;base64,{data}" alt="{caption}"><figcaption>{caption}</figcaption>'
        "</figure>"
    )


def _settings(comparison: Comparison) -> str:
    """What all runs share, folded away; what differs is in the tables above."""
    recorded = [run.settings for run in comparison.runs if run.settings]
    if not recorded:
        return ""
    shared = {
        key: value
        for key, value in recorded[0].items()
        if all(key in other and other[key] == value for other in recorded)
    }
    differing = sorted({key for settings in recorded for key in settings} - set(shared))
    rows = [("", [escape(key), f"<code>{escape(_text(value))}</code>"]) for key, value in sorted(shared.items())]
    note = f'<p class="quiet">Differ between runs: {escape(", ".join(differing))}.</p>' if differing else ""
    table = _table(["setting", "value"], {0, 1}, rows)
    return f"<details><summary>Settings that all runs share</summary>{table}{note}</details>"


def _run_list(comparison: Comparison) -> str:
    rows = []
    for run in comparison.runs:
        described = {key: run.info[key] for key in ("hardware", "versions") if key in run.info}
        facts = [f"{key} {_text(value)}" for part in described.values() for key, value in part.items()]
        rows.append(("", [f"<code>{escape(run.name)}</code>", escape(", ".join(facts))]))
    return (
        "<details><summary>Folders, hardware and versions</summary>"
        f"{_table(['run', 'hardware and versions'], {0, 1}, rows)}</details>"
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
