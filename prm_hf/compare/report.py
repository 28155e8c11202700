"""From run folders to a report: a plain-text table, markdown, JSON, and `report.html` with its pictures."""

from __future__ import annotations

import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ..runs.read import load_runs
from ..runs.run import DIVERGED, FAILED, UNREADABLE
from ..runs.schema import CLEAN_FIT, KL, VERSION
from ..runs.text import printable
from . import page, plots
from .comparison import Comparison, build_comparison, build_comparisons
from .contrasts import SAME_LR, Contrast
from .findings import LOST, judge
from .rows import Row, best, format_rate
from .statistics import Interval, finite


WIDTH = 120
CONTRAST_HEADER = ["accuracy of", "minus that of", "difference [95 % interval]", "p (Holm)", "so the first is"]


Paths = str | os.PathLike | Iterable[str | os.PathLike]


def compare_runs(paths: Paths) -> Comparison:
    """Reads the runs of one experiment and compares them; print the comparison with `format_comparison`.

    Args:
        paths: run folders, or folders that hold run folders (see `load_runs`).

    Raises:
        FileNotFoundError, ValueError: as `load_runs`; also if no run is finished, or the runs differ in more than
            method, learning rate and seed.
    """
    return _judged(build_comparison(load_runs(paths)))


def compare_experiments(paths: Paths) -> list[Comparison]:
    """As `compare_runs`, of one or several experiments, each with a comparison of its own."""
    return list(map(_judged, build_comparisons(load_runs(paths))))


def _judged(comparison: Comparison) -> Comparison:
    (comparison.answer, comparison.verdict), comparison.findings = judge(comparison)
    return comparison


def write_report(comparison: Comparison, output_dir: str | os.PathLike) -> None:
    """Writes `comparison.json`, `frontier.png` (if any run has accuracy and KL) and `report.html` into `output_dir`.

    Raises:
        ImportError: matplotlib is not installed. `comparison.json` is then already written.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "comparison.json").write_text(as_json([comparison]), encoding="utf-8")
    pictures = plots.draw(comparison)
    if "frontier" in pictures:
        (output_dir / "frontier.png").write_bytes(pictures["frontier"])
    (output_dir / "report.html").write_text(as_html([comparison], pictures), encoding="utf-8")


def format_comparison(
    comparison: Comparison | Sequence[Comparison], format: str = "table", verbose: bool = False
) -> str:
    """The comparison as text.

    Args:
        comparison: one, or those of several experiments, which are written one below the other.
        format: `"table"` (plain text of at most 120 columns), `"json"`, `"markdown"` or `"html"` (one self-contained
            page; needs matplotlib).
        verbose: whether the plain text has the caveats that apply. The other formats have them always.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}.")
    comparisons = [comparison] if isinstance(comparison, Comparison) else [*comparison]
    return plain_text(comparisons, verbose) if format == "table" else FORMATS[format](comparisons)


# ---- Cells ----


def _header(comparison: Comparison) -> list[str]:
    names = comparison.measures
    fits = [names.noise_label, "clean fit"]
    return ["method", "lr", "seeds", "accuracy", *fits, "drift/kl", names.extra_label, "mean q", "wall s"]


def _share(value: float) -> str:
    return f"{value:.3f}" if finite(value) else "-"


def _number(value: float) -> str:
    """Three significant digits, for what spans orders of magnitude; `-` if it was not measured."""
    if not finite(value):
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _row_cells(row: Row) -> list[str]:
    names, (error, over) = row.measures, row.accuracy_error()
    shares = [_share(row.mean(name)[0]) for name in (names.accuracy, names.noise_fit, CLEAN_FIT)]
    if over:
        shares[0] += f" ± {error:.3f}" + ("*" if over == "examples" else "")
    numbers = [_number(row.mean(name)[0]) for name in (KL, names.extra, "mean_q", "wall_seconds")]
    seeds = f"{len(row.runs)}, {len(row.diverged)} diverged" if row.diverged else str(len(row.runs))
    return [row.name, format_rate(row.learning_rate), seeds, *shares, *numbers]


def _contrast_cells(contrast: Contrast) -> list[str]:
    p = "<0.001" if contrast.p_holm < 0.001 else _share(contrast.p_holm)
    return [contrast.judged, contrast.against, contrast.text, p, contrast.verdict]


def _footnote(comparison: Comparison) -> str:
    """What the columns mean, and what the ± of the accuracies is."""
    over, names = {row.accuracy_error()[1] for row in comparison.rows}, comparison.measures
    notes = ["±: standard error over seeds"] if "seeds" in over else []
    notes += [f"±…*: one seed, standard error over {names.examples}"] if "examples" in over else []
    fits = names.noise_label.removesuffix(" fit")
    extra = "" if names.extra == names.extra_label else f" {names.extra_label}: {names.extra};"
    words = (
        f"Means over seeds. accuracy: {names.accuracy}, {names.examples}; {fits}, clean fit: memorization/*; "
        f"drift/kl: nats a token;{extra} mean q: mean of the mask over the run; -: not measured."
    )
    return f"{words} {'; '.join(notes)}." if notes else words


# ---- Plain text, markdown and JSON ----


def align(heads: list[str], rows: list[list[str]], left: set[int]) -> str:
    """Lines of at most `WIDTH` columns; where they would be longer, the widest left-aligned column is cut with `…`."""
    table = [[printable(cell) for cell in cells] for cells in (heads, *rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(heads))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widest = max(left, key=lambda i: widths[i])
        widths[widest] -= 1
    lines = []
    for cells in table:
        cut = [c if len(c) <= w else c[: w - 1] + "…" for c, w in zip(cells, widths, strict=True)]
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cut, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def wrap(text: str, first: str = "", rest: str = "") -> str:
    """`text` in lines of at most `WIDTH` columns, the first one after `first`, the others after `rest`."""
    text = printable(text)
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _parts(comparison: Comparison, table: Callable[[list[str], list[list[str]], set[int]], str]) -> tuple[str, str]:
    """The table of rows and that of contrasts, which may be empty, as `table` writes heads, cells and left columns."""
    contrasts = list(map(_contrast_cells, comparison.contrasts))
    rows = table(_header(comparison), list(map(_row_cells, comparison.rows)), {0})
    return rows, table(CONTRAST_HEADER, contrasts, {0, 1, 4}) if contrasts else ""


def _apart(comparisons: list[Comparison], i: int) -> tuple[str, str]:
    """Of several experiments the title of one, and in what its settings differ from those of the first."""
    if len(comparisons) == 1:
        return "", ""
    folders = dict.fromkeys(str(run.path.parent) for run in comparisons[i].runs)
    differences = comparisons[i].apart
    more = f"; and in {len(differences) - 5} more settings" if len(differences) > 5 else ""
    words = "; ".join(map(str, differences[:5]))
    text = f"It has a table of its own, as its settings differ from those of the first: {words}{more}." if i else ""
    return f"Experiment {i + 1} of {len(comparisons)}: {', '.join(folders)}", text


def plain_text(comparisons: list[Comparison], verbose: bool = False) -> str:
    texts = []
    for i, comparison in enumerate(comparisons):
        rows, contrasts = _parts(comparison, align)
        lost, caveats = _lost_and_caveats(comparison)
        if caveats and not verbose:
            caveats = [f"{len(caveats)} caveats apply: `prm-hf compare --verbose` lists them."]
        title = map(wrap, filter(None, _apart(comparisons, i)))
        verdict = "\n".join(map(printable, comparison.verdict))  # not wrapped: a command is to be copied
        remarks = "\n".join(wrap(text, "- ", "  ") for text in (*lost, *caveats))
        parts = *title, verdict, rows, wrap(_footnote(comparison)), contrasts, remarks
        texts.append("\n\n".join(filter(None, parts)))
    return "\n\n\n".join(texts) + "\n"


def _lost_and_caveats(comparison: Comparison) -> tuple[list[str], list[str]]:
    """What is said of runs without numbers, and the caveats that apply."""
    keys = {case.key for case in LOST}
    lost = [text for key, text in comparison.findings.items() if key in keys]
    return lost, [text for key, text in comparison.findings.items() if key not in keys]


def markdown(comparisons: list[Comparison]) -> str:
    def table(heads: list[str], rows: list[list[str]], left: set[int]) -> str:
        escaped = [list(map(_as_typed, cells)) for cells in (heads, *rows)]
        rule = [":--" if i in left else "--:" for i in range(len(heads))]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (escaped[0], rule, *escaped[1:]))

    parts = []
    for i, comparison in enumerate(comparisons):
        rows, contrasts = _parts(comparison, table)
        lost, caveats = _lost_and_caveats(comparison)
        title, apart = map(_as_typed, _apart(comparisons, i))
        parts += [
            f"## {title}" if title else "",
            apart,
            *_verdict_in_markdown(comparison),
            rows,
            _as_typed(_footnote(comparison)),
        ]
        parts += [contrasts, "\n".join(f"- {_as_typed(text)}" for text in (*lost, *caveats))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _verdict_in_markdown(comparison: Comparison) -> list[str]:
    answer, *others = map(_as_typed, comparison.verdict)
    return [f"**{answer}**", *others]


def _as_typed(text: str) -> str:
    """Text for markdown, in which no character is markup."""
    return re.sub(r"[\\`*|<>\[\]~$&#]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", printable(text))


def as_json(comparisons: list[Comparison]) -> str:
    """The text of `comparison.json`. A missing number is null or an absent key; one that is not finite is a string."""
    found = [_comparison_as_dict(comparison) for comparison in comparisons]
    result = found[0] if len(found) == 1 else {"schema": VERSION, "experiments": found}
    text = json.dumps(_strict(result), indent=1, allow_nan=False, ensure_ascii=False)
    return re.sub(r"[^\n -~]", lambda c: c[0] if c[0].isprintable() else json.dumps(c[0])[1:-1], text) + "\n"


def _comparison_as_dict(comparison: Comparison) -> dict[str, Any]:
    keys = ("name", "method", "learning_rate", "seed", "source", "metrics")
    apart = [f"{difference}" for difference in comparison.apart]
    return {
        "schema": VERSION,
        **({"differs_from_the_first": apart} if apart else {}),
        "rows": list(map(_row_as_dict, comparison.rows)),
        "contrasts": list(map(_contrast_as_dict, comparison.contrasts)),
        "runs": [
            {key: getattr(run, key) for key in keys} | ({} if run.finished else {"diverged": run.problem})
            for run in (*comparison.runs, *comparison.ended(DIVERGED))
        ],
        "unfinished": [run.name for run in comparison.unfinished],
        **{end: {run.name: run.problem for run in comparison.ended(end)} for end in (FAILED, UNREADABLE)},
        "answer": comparison.answer,
        "verdict": comparison.verdict,
        "statements": comparison.statements,
    }


def _row_as_dict(row: Row) -> dict[str, Any]:
    names = sorted({name for run in row.runs for name in run.metrics})
    names += ["mean_q"] if row.mean("mean_q")[2] else []
    error, over = row.accuracy_error()
    return {
        "method": row.method,
        "group": row.group,
        "name": row.label,
        "learning_rate": row.learning_rate,
        "seeds": [run.seed for run in row.runs],
        **({"diverged_seeds": [run.seed for run in row.diverged]} if row.diverged else {}),
        "runs": [run.name for run in row.runs],
        "accuracy_standard_error": {"value": error, "over": over} if over else None,
        "metrics": {
            name: {"mean": mean, "standard_error": error if n > 1 else None, "n": n}
            for name in names
            for mean, error, n in [row.mean(name)]
        },
    }


def _contrast_as_dict(contrast: Contrast) -> dict[str, Any]:
    interval = contrast.interval or Interval(math.nan, math.nan, math.nan, 0, 0)
    numbers = {"difference": interval.mean, "low": interval.low, "high": interval.high, "seeds": interval.seeds}
    numbers |= {"p_value": interval.p_value, "p_holm": contrast.p_holm}
    return {
        "kind": contrast.kind,
        "left": contrast.left.label,
        "right": contrast.against,
        **{name: value if finite(value) else None for name, value in numbers.items()},
        "verdict": contrast.verdict,
        "note": contrast.note,
    }


def _strict(value: Any) -> Any:
    """NaN and infinities as strings: JSON has none, and readers outside Python refuse them."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


# ---- HTML ----


def as_html(comparisons: list[Comparison], pictures: dict[str, bytes] | None = None) -> str:
    """One page without external resources; needs matplotlib for the pictures, unless they are given."""
    sections, titles = [], []
    for i, comparison in enumerate(comparisons):
        title, its = _html_sections(comparison, plots.draw(comparison) if pictures is None else pictures)
        heading, apart = _apart(comparisons, i)
        sections += [page.tag("h1", heading or title), page.quiet(apart) if apart else "", *its]
        titles.append(title)
    return page.document(titles[0] if len(titles) == 1 else f"{len(titles)} comparisons", sections)


def _html_sections(comparison: Comparison, pictures: dict[str, bytes]) -> tuple[str, list[str]]:
    """The title of a comparison and the HTML below it."""
    figures = {name: page.figure(png, plots.CAPTIONS[name], narrow=name == "mask") for name, png in pictures.items()}
    names = [rows[0].kind.label for rows in comparison.methods().values()]
    title = "Comparison of " + (", ".join(names) if len(names) < 5 else f"{len(names)} methods")
    others = [*comparison.findings.values()]
    contrasts = _contrast_table(comparison) if comparison.contrasts else ""
    return title, [
        page.quiet(_subtitle(comparison)),
        *(page.tag("p", line, "summary") for line in comparison.verdict),
        page.section("Results", _row_table(comparison), figures.get("frontier", "")),
        page.section("Paired differences in accuracy", contrasts),
        page.bullets("What this shows, and what it does not", others),
        page.section("Over the steps", figures.get("curves", ""), figures.get("mask", "")),
        page.section("Runs", *_run_details(comparison)),
    ]


def _subtitle(comparison: Comparison) -> str:
    info = next((run.info for run in comparison.runs if run.info.get("model")), {})
    parts = [f"{len(comparison.runs)} runs, {len(comparison.rows)} settings"]
    parts += [f"{key.replace('_', ' ')}: {info[key]}" for key in ("model", "dataset", "noise_rate") if key in info]
    examples = next((len(run.heldout) for run in comparison.runs if run.heldout is not None), None)
    parts += [f"{examples} {comparison.measures.examples}"] if examples else []
    return " · ".join(parts)


def _row_table(comparison: Comparison) -> str:
    styles = plots.method_styles(list(comparison.methods()))
    rows = []
    for method, members in comparison.methods().items():
        top = best(members)
        for row in members:
            cells = [page.escape(cell) for cell in _row_cells(row)]
            cells[0] = f'<span class="chip" style="background:{styles[method][0]}"></span>{cells[0]}'
            kinds = [name for name, holds in (("best", row is top), ("first", row is members[0])) if holds]
            rows.append((" ".join(kinds), cells))
    note = page.quiet(f"{_footnote(comparison)} Bold: the most accurate learning rate of each method.")
    return page.table(_header(comparison), {0}, rows) + note


def _contrast_table(comparison: Comparison) -> str:
    intervals = [c.interval for c in comparison.contrasts if c.interval]
    ends = [abs(end) for i in intervals for end in ((i.low, i.high) if i.known else (i.mean,))]
    reach, rows, previous = max([*ends, 0.01]), [], comparison.contrasts[0].left.method
    for contrast in comparison.contrasts:
        *cells, last = [page.escape(cell) for cell in _contrast_cells(contrast)]
        kind = "first" if contrast.left.method != previous else ""
        rows.append((kind, [*cells, _interval_picture(contrast, reach), last]))
        previous = contrast.left.method
    table = page.table([*CONTRAST_HEADER[:-1], "", CONTRAST_HEADER[-1]], {0, 1, 4, 5}, rows)
    return table + page.quiet("The line in the middle is a difference of 0; right of it the first is better.")


def _interval_picture(contrast: Contrast, reach: float) -> str:
    """A small inline drawing of the interval, 0 in the middle."""
    interval = contrast.interval
    if interval is None:
        return ""
    # A difference at the same learning rate proves nothing, however clear, and gets no colour.
    colour = "var(--accent)" if contrast.clear and contrast.kind != SAME_LR else "var(--quiet)"
    low, mean, high = (80 + 76 * value / reach for value in (interval.low, interval.mean, interval.high))
    ends = f'<line x1="{low:.1f}" x2="{high:.1f}" y1="9" y2="9" stroke="{colour}" stroke-width="2.5"/>'
    return (
        f'<svg width="160" height="18" role="img" aria-label="{interval.mean:+.3f}">'
        f'<line x1="80" x2="80" y1="0" y2="18" stroke="var(--quiet)" stroke-opacity="0.5" stroke-width="1.5"/>'
        f'{ends if interval.known else ""}<circle cx="{mean:.1f}" cy="9" r="4" fill="{colour}"/></svg>'
    )


def _run_details(comparison: Comparison) -> list[str]:
    """Folded away: the settings that all runs share, the names of those that differ, and where each run was made."""
    recorded = [run.settings for run in comparison.runs if run.settings]
    keys = sorted({key for settings in recorded for key in settings})
    shared = {k: recorded[0][k] for k in keys if all(k in s and s[k] == recorded[0].get(k) for s in recorded)}
    made = {run.name: {k: run.info[k] for k in ("hardware", "versions") if k in run.info} for run in comparison.runs}
    differing = ", ".join(key for key in keys if key not in shared)
    return [
        page.folded("Settings that all runs share", shared) if shared else "",
        page.quiet(f"Differ between runs: {differing}.") if differing else "",
        page.folded("Folders, hardware and versions", made),
    ]


FORMATS = {"table": plain_text, "json": as_json, "markdown": markdown, "html": as_html}
