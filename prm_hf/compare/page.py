"""The parts of an HTML page without external resources, readable on light and dark screens."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from typing import Any

from ..runs.text import printable


_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --quiet: #62676e; --page: #fff; --card: #f5f6f8; --line: #dfe2e6;
  --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --text: #e6e8eb; --quiet: #9aa1a9; --page: #15171a; --card: #1e2126;
  --line: #33383f; --accent: #56b4e9; } }
body { margin: 0 auto; max-width: 1120px; padding: 2.5rem 1.5rem 4rem; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, sans-serif; }
h1 { font-size: 1.6rem; }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; }
p, li { max-width: 82ch; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; max-width: none; }
.summary { padding: 1rem 1.2rem; background: var(--card); border-left: 4px solid var(--accent); max-width: none; }
.scroll, pre { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); }
.left { text-align: left; }
td.left:last-child { white-space: normal; }
tr.best td { font-weight: 650; }
tr.first td { border-top: 2px solid var(--line); }
.chip { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 2px; }
figure { margin: 1rem 0 0; }
figure img { display: block; width: 100%; height: auto; background: #fff; }
figure.narrow img { max-width: 820px; }
summary { cursor: pointer; font-weight: 600; }
"""


def escape(text: str) -> str:
    """Text as HTML that shows it as it was typed."""
    return html.escape(printable(text))


def document(title: str, sections: Iterable[str]) -> str:
    """A whole page of sections that are HTML already; empty ones are left out."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, sections))
        + "\n</body>\n</html>\n"
    )


def tag(name: str, text: str, kind: str = "") -> str:
    """An element that holds a text."""
    return f"<{name}{f' class={kind!r}' if kind else ''}>{escape(text)}</{name}>"


def quiet(text: str) -> str:
    """A note in small print."""
    return tag("p", text, "quiet")


def section(title: str, *contents: str) -> str:
    """A headline and HTML below it; empty without any."""
    return "\n".join([tag("h2", title), *filter(None, contents)]) if any(contents) else ""


def bullets(title: str, texts: list[str]) -> str:
    """A section of one list; empty without texts."""
    return section(title, f"<ul>{''.join(tag('li', text) for text in texts)}</ul>" if texts else "")


def folded(title: str, value: Any) -> str:
    """A value as JSON, shown on a click."""
    text = json.dumps(value, indent=1, default=str, ensure_ascii=False)
    lines = "\n".join(map(escape, text.split("\n")))
    return f"<details>{tag('summary', title)}<pre>{lines}</pre></details>"


def table(header: list[str], left: set[int], rows: list[tuple[str, list[str]]]) -> str:
    """`rows` are (class of the row, cells as HTML); the columns `left` are aligned to the left."""

    def cells(name: str, values: list[str]) -> str:
        return "".join(f"<{name}{' class=left' if i in left else ''}>{v}</{name}>" for i, v in enumerate(values))

    body = "".join(f"<tr{f' class={kind!r}' if kind else ''}>{cells('td', values)}</tr>\n" for kind, values in rows)
    head = f"<thead><tr>{cells('th', [escape(name) for name in header])}</tr></thead>"
    return f'<div class="scroll"><table>{head}\n<tbody>\n{body}</tbody></table></div>'


def figure(png: bytes, caption: str, narrow: bool = False) -> str:
    """A picture, embedded, and the text under it."""
    data, caption = base64.b64encode(png).decode("ascii"), escape(caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
    return f"<figure{' class=narrow' if narrow else ''}>{image}<figcaption>{caption}</figcaption></figure>"
