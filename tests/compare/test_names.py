"""Names come out as they are typed, wherever they are shown."""

import html
import json
import re

import matplotlib.pyplot as plt
import pytest

from prm_hf.compare import compare_runs, format_comparison, plots
from prm_hf.compare.report import as_html, fit
from prm_hf.runs.methods import parse_method
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


def two_stages():
    stages = ("adamw", "adamw_eps:10", "adamw_eps:3", "prm_rows", "prm_rows_eps:10", "prm_noisy_labels")
    of_two = [f"{a}+{b}" for a in stages for b in stages if a != b]
    return [f"{how}:{stage}" for how in ("filter", "relabel", "soft") for stage in (*stages, *of_two)]


@pytest.mark.parametrize("width", [8, 16, 25, 33])
def test_cells_that_would_look_alike_are_whole(width):
    names = [parse_method(name).label for name in two_stages()]
    names += [f"{name} at {rate}" for name in names for rate in ("1e-3", "3e-3 (its best)")] + ["x" * 40, "x" * 41]
    cells = fit([*names, "alone " * 9, names[0]], width)
    assert cells[-2] == [("alone " * 9)[: width - 1] + "…"] and cells[-1] == cells[0]
    assert (
        len(set(map(tuple, cells))) == len(names) + 1 and max(len(line) for lines in cells for line in lines) <= width
    )
    for name, lines in zip(names, cells, strict=False):
        if len(lines) > 1:
            assert "".join(lines).replace(" ", "") == name.replace(" ", "")


def test_rows_of_two_stages_differ_in_every_table(tmp_path):
    names = two_stages()[::11]
    assert len(names) > 8
    for method in ("adamw", "adamw_clean", "prm_rows", *names):
        for lr, kl in ((1e-3, 0.4), (1e-2, 1.6)):
            write_run(tmp_path, method, lr, 0, 0.7, kl)
    text = format_comparison(compare_runs(tmp_path))
    tables = [part.splitlines()[2:] for part in text.split("\n\n") if "\n---" in part]
    assert len(tables) == 3
    for lines in tables:
        assert len(set(lines)) == len(lines) and max(map(len, lines)) <= 120
    width, of_rows = next(line for line in text.splitlines() if line.startswith("method")).index("lr") - 3, []
    for line in tables[0]:
        if line[width:].strip():
            of_rows.append("")
        of_rows[-1] += line[:width].strip()
    assert len(of_rows) == 2 * len(set(of_rows)) == 2 * (len(names) + 3)


def test_what_is_printable_stays():
    text = "Grüße, 模型 – ½ ‘q’ 🙂"
    assert printable(text) == text
