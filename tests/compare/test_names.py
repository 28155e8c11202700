"""Names come out as they are typed, wherever they are shown."""

import html
import json
import re

import matplotlib.pyplot as plt
import pytest

from prm_hf.compare import compare_runs, format_comparison, plots
from prm_hf.compare.report import as_html
from prm_hf.runs.text import printable

from .compared_runs import write_run


NAMES = [
    "$x^2$",
    "one $ only",
    r"\$a\$",
    r"\frac{1}{2}",
    "a|b",
    "*bold* **b**",
    "`code`",
    "_under_",
    "[link](x)",
    "<b>&amp;</b>",
    "# head",
    "~~no~~",
    "über–µ",
    "{braces} %d %s {0}",
]
ESCAPED = {
    "\x1b[31mred": r"\x1b[31mred",
    "two\nlines": r"two\nlines",
    "a\tb": r"a\tb",
    "bell\x07": r"bell\x07",
    "\x9b31m": r"\x9b31m",
    "\u202eabc": r"\u202eabc",
    "\ud800": r"\ud800",
    "\x00": r"\x00",
}


def unescape_markdown(text):
    """What a renderer shows of a text in which every markup character has a backslash."""
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*|<>\[\]~$&#]", text)
    return re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", text)


@pytest.mark.parametrize("name", [*NAMES, *ESCAPED], ids=ascii)
def test_names_come_out_as_typed(tmp_path, name):
    shown = ESCAPED.get(name, name)
    write_run(tmp_path, name, 1e-3, 0, 0.7, 0.4, name="one")
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    comparison = compare_runs(tmp_path)
    row = next(row for row in comparison.rows if row.method == name)
    text = format_comparison(comparison)
    assert shown in text and all(c.isprintable() or c == "\n" for c in text)
    assert shown in html.unescape(as_html([comparison], {}))
    lines = [line for line in format_comparison(comparison, "markdown").splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)((?:\\\\)*)\|", line)[2].strip() for line in lines]
    assert shown in [unescape_markdown(cell) for cell in cells]
    assert name.encode("utf-8", "replace") in [
        run["method"].encode("utf-8", "replace") for run in json.loads(format_comparison(comparison, "json"))["runs"]
    ]
    legend = plots.plot_frontier(comparison).axes[0].get_legend().get_texts()
    texts = [entry.get_text() for entry in legend]
    assert plots.as_typed(row.kind.label) in texts
    assert drawn(plots.as_typed(shown)) == drawn(shown, parse_math=False)


def drawn(text, **how):
    """The pixels of a text."""
    figure = plt.figure(figsize=(3, 0.5))
    figure.text(0, 0.3, text, **how)
    figure.canvas.draw()
    pixels = bytes(figure.canvas.buffer_rgba())
    plt.close(figure)
    return pixels


def test_what_is_printable_stays():
    text = "Grüße, 模型 – ½ ‘q’ 🙂"
    assert printable(text) == text
