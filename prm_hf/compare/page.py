"""The parts of an HTML page without external resources, readable on light and dark screens."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable
from typing import Any

from .._page import STYLE, whole_page
from ..runs.text import printable


# Beside what all pages have
_STYLE = """
.command { display: flex; gap: .5rem; align-items: start; max-width: none; }
.command code { flex: 1; min-width: 0; overflow-x: auto; white-space: nowrap; padding: .25rem .5rem;
  font-size: .8125rem; background: var(--page); border: 1px solid var(--line); border-radius: 4px; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .3rem; }
th, td { padding: .35rem .5rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--quiet); }
.left { text-align: left; }
th, td.left { white-space: normal; }
td.left { overflow-wrap: anywhere; }
tr.best td { font-weight: 650; }
tr.first td { border-top: 2px solid var(--line); }
.chip { display: inline-block; width: .7em; height: .7em; margin-right: .5em; border-radius: 2px;
  background: var(--light); }
@media (prefers-color-scheme: dark) { .chip { background: var(--dark); } }
figure { margin: 1rem 0 0; }
figure img { display: block; width: 100%; max-width: 1100px; height: auto; background: #fff; }
@media (max-width: 760px) {
  table.compact { font-size: .75rem; }
  table.compact th, table.compact td { padding: .2rem .15rem; }
  table.compact td.left { min-width: 6.6em; }
  table:not(.compact) thead { position: absolute; clip-path: inset(50%); width: 1px; height: 1px; overflow: hidden; }
  table:not(.compact), table:not(.compact) tbody, table:not(.compact) tr { display: block; }
  table:not(.compact) caption { display: block; }
  table:not(.compact) tr { border-top: 2px solid var(--line); padding: .3rem 0; }
  table:not(.compact) td { white-space: normal; overflow-wrap: anywhere; }
  table:not(.compact) td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  table:not(.compact) td::before { content: attr(data-head); color: var(--quiet); font-weight: 400; flex: none;
    max-width: 45%; text-align: left; }
}
"""


def escape(text: str) -> str:
    """Text as HTML that shows it as it was typed."""
    return html.escape(printable(text))


def document(title: str, sections: Iterable[str], scripts: str = "") -> str:
    """A whole page of sections that are HTML already; empty ones are left out. The scripts come last."""
    body = "\n".join(filter(None, sections))
    return whole_page(escape(title), STYLE + _STYLE, body, scripts=scripts)


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


def details(title: str, *contents: str) -> str:
    """HTML that is shown on a click; empty without any."""
    found = "\n".join(filter(None, contents))
    return f"<details>{tag('summary', title)}\n{found}\n</details>" if found else ""


def json_block(value: Any) -> str:
    """A value as JSON."""
    text = json.dumps(value, indent=1, default=str, ensure_ascii=False)
    return "<pre>" + "\n".join(map(escape, text.split("\n"))) + "</pre>"


def copy_button(text: str, label: str = "Copy the command") -> str:
    """A button that copies a text; empty without one."""
    return (
        f'<button type="button" data-copy="{escape(text)}" aria-label="{escape(label)}">Copy</button>' if text else ""
    )


def command(text: str) -> str:
    """A command, and a button that copies it."""
    code = f'<code tabindex="0">{escape(text)}</code>'
    return f'<div class="command">{code}{copy_button(text)}</div>'


def table(
    header: list[str], left: set[int], rows: list[tuple[str, list[str]]], caption: str = "", kind: str = ""
) -> str:
    """`rows` are (class of the row, cells as HTML); the columns `left` are aligned to the left.

    On a narrow screen each row becomes a list of its cells, with the heads of their columns, unless `kind` is
    `"compact"`. The roles tell a screen reader that it is a table still.
    """
    heads = list(map(escape, header))

    def cells(values: list[str]) -> str:
        return "".join(
            f'<td role="cell" data-head="{head}"{" class=left" if i in left else ""}>{value}</td>'
            for i, (head, value) in enumerate(zip(heads, values, strict=True))
        )

    body = "".join(
        f'<tr role="row"{f" class={name!r}" if name else ""}>{cells(values)}</tr>\n' for name, values in rows
    )
    head = "".join(
        f'<th role="columnheader" scope="col"{" class=left" if i in left else ""}>{name}</th>'
        for i, name in enumerate(heads)
    )
    shown = tag("caption", caption) if caption else ""
    return (
        f'<table role="table"{f" class={kind!r}" if kind else ""}>{shown}<thead role="rowgroup"><tr role="row">{head}'
        f'</tr></thead>\n<tbody role="rowgroup">\n{body}</tbody></table>'
    )


def figure(png: bytes, caption: str) -> str:
    """A picture, embedded, and the text under it."""
    data, caption = base64.b64encode(png).decode("ascii"), escape(caption)
    image = f'<img src="data:image/png;base64,{data}" alt="{caption}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"
