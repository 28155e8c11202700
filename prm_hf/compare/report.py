"""From run folders to a report: a plain-text table, markdown, JSON, and `report.html` with its pictures."""

from __future__ import annotations

import collections
import itertools
import json
import math
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .._files import write_whole
from ..runs.read import load_runs
from ..runs.run import DIVERGED, FAILED, UNREADABLE
from ..runs.schema import SOLVED_BEFORE, VERSION
from ..runs.text import printable
from . import plots
from .cells import apart_from_command, footnote, lost_and_caveats, tables, told_apart
from .comparison import Comparison, build_comparison, build_comparisons
from .contrasts import Contrast
from .recovery import Recovery
from .rows import Row
from .sections import as_html
from .simplicity import SimplicityContrast
from .solved import best_solvers, share_solved
from .statistics import Interval, finite
from .verdict import judge


WIDTH = 120


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
    write_whole(output_dir / "comparison.json", [as_json([comparison])])
    pictures = plots.draw(comparison)
    if "frontier" in pictures:
        (output_dir / "frontier.png").write_bytes(pictures["frontier"])
    write_whole(output_dir / "report.html", [as_html([comparison], pictures)])


def format_comparison(
    comparison: Comparison | Sequence[Comparison], format: str = "table", verbose: bool = False
) -> str:
    """The comparison as text.

    Args:
        comparison: one, or those of several experiments, which are written one below the other.
        format: `"table"` (plain text of at most 120 columns), `"json"`, `"markdown"` or `"html"` (one self-contained
            page; needs matplotlib).
        verbose: whether the plain text has the caveats that apply, and the columns that only some runs have. The other
            formats have them always.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}.")
    comparisons = [comparison] if isinstance(comparison, Comparison) else [*comparison]
    return plain_text(comparisons, verbose) if format == "table" else FORMATS[format](comparisons)


# ---- Plain text, markdown and JSON ----


def align(heads: list[str], rows: list[list[str]], left: set[int]) -> str:
    """Lines of at most `WIDTH` columns; where they would be longer, the widest left-aligned column is narrowed."""
    table = [[printable(cell) for cell in cells] for cells in (heads, *rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(heads))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widest = max(left, key=lambda i: widths[i])
        if widths[widest] <= 8:  # numbers of very many digits are not cut
            break
        widths[widest] -= 1
    columns = [fit([cells[i] for cells in table], width) for i, width in enumerate(widths)]
    lines = []
    for cells in zip(*columns, strict=True):
        for parts in itertools.zip_longest(*cells, fillvalue=""):
            padded = [
                p.ljust(w) if i in left else p.rjust(w) for i, (p, w) in enumerate(zip(parts, widths, strict=True))
            ]
            lines.append("  ".join(padded).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def fit(cells: list[str], width: int) -> list[list[str]]:
    """The lines of each cell of a column: one, cut with `…`, or as many as it takes where others would look alike."""
    short = {cell: cell if len(cell) <= width else cell[: width - 1] + "…" for cell in cells}
    looks = collections.Counter(short.values())
    return [
        [short[cell]] if looks[short[cell]] == 1 or len(cell) <= width else textwrap.wrap(cell, width)
        for cell in cells
    ]


def wrap(text: str, first: str = "", rest: str = "") -> str:
    """`text` in lines of at most `WIDTH` columns, the first one after `first`, the others after `rest`."""
    text = printable(text)
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def _parts(comparison: Comparison, table: Callable[[list[str], list[list[str]], set[int]], str]) -> list[str]:
    """The `tables` as `table` writes heads, cells and left columns; empty where one has no row."""
    return [table(*found) if found.rows else "" for found in tables(comparison)]


def plain_text(comparisons: list[Comparison], verbose: bool = False) -> str:
    texts = []
    for i, comparison in enumerate(comparisons):
        rows, extra, *others = _parts(comparison, align)
        lost, caveats = lost_and_caveats(comparison)
        if caveats and not verbose:
            caveats = [f"{len(caveats)} caveats apply: `prm-hf compare --verbose` lists them."]
        title = map(wrap, filter(None, told_apart(comparisons, i)))
        lines, command = apart_from_command(comparison)
        verdict = "\n".join(map(wrap, lines)), printable(command)  # which is to be copied, and is not wrapped
        remarks = "\n".join(wrap(text, "- ", "  ") for text in (*lost, *caveats))
        notes = wrap(footnote(comparison)), extra if verbose else ""
        parts = *title, *verdict, rows, *notes, *others, remarks
        texts.append("\n\n".join(filter(None, parts)))
    return "\n\n\n".join(texts) + "\n"


def markdown(comparisons: list[Comparison]) -> str:
    def table(heads: list[str], rows: list[list[str]], left: set[int]) -> str:
        escaped = [list(map(_as_typed, cells)) for cells in (heads, *rows)]
        rule = [":--" if i in left else "--:" for i in range(len(heads))]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (escaped[0], rule, *escaped[1:]))

    parts = []
    for i, comparison in enumerate(comparisons):
        rows, *others = _parts(comparison, table)
        lost, caveats = lost_and_caveats(comparison)
        title, apart = map(_as_typed, told_apart(comparisons, i))
        parts += [
            f"## {title}" if title else "",
            apart,
            *_verdict_in_markdown(comparison),
            rows,
            _as_typed(footnote(comparison)),
        ]
        parts += [*others, "\n".join(f"- {_as_typed(text)}" for text in (*lost, *caveats))]
    return "\n\n".join(filter(None, parts)) + "\n"


def _verdict_in_markdown(comparison: Comparison) -> list[str]:
    lines, command = apart_from_command(comparison)
    answer, *others = map(_as_typed, lines)
    return [f"**{answer}**", *others, f"    {printable(command)}" if command else ""]


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
        **({"recoveries": list(map(_recovery_as_dict, comparison.recoveries))} if comparison.recoveries else {}),
        **({"solved": list(map(_solved_as_dict, best_solvers(comparison)))} if best_solvers(comparison) else {}),
        **({"solved_contrasts": list(map(_contrast_as_dict, comparison.solved))} if comparison.solved else {}),
        **({"simplicity": list(map(_simplicity_as_dict, comparison.simplicity))} if comparison.simplicity else {}),
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
    numbers |= {"examples": interval.examples, "groups": interval.groups}
    numbers |= {"p_value": interval.p_value, "p_holm": contrast.p_holm}
    return {
        "kind": contrast.kind,
        "left": contrast.left.label,
        "right": contrast.against,
        **{name: value if finite(value) else None for name, value in numbers.items()},
        "verdict": contrast.verdict,
        "note": contrast.note,
    }


def _simplicity_as_dict(contrast: SimplicityContrast) -> dict[str, Any]:
    found = _contrast_as_dict(contrast)
    found["verdict"] = contrast.missing
    return {"measure": contrast.measure, **found}


def _recovery_as_dict(recovery: Recovery) -> dict[str, Any]:
    measure = "problems solved" if recovery.in_solved else "accuracy"
    found = {"kind": recovery.kind, "measure": measure, "method": recovery.row.method, "name": recovery.row.name}
    found |= {name: _interval_as_dict(getattr(recovery, name)) for name in ("ratio", "gain", "cost")}
    return {**found, "kl": recovery.span, "missing": recovery.missing}


def _solved_as_dict(row: Row) -> dict[str, Any]:
    """A method at the learning rate at which it solves the most problems."""
    found = {"method": row.method, "name": row.label, "learning_rate": row.learning_rate}
    before = row.mean(SOLVED_BEFORE)[0]
    return {**found, "share": _interval_as_dict(share_solved(row)), "before": before if finite(before) else None}


def _interval_as_dict(interval: Interval | None) -> dict[str, Any] | None:
    if interval is None:
        return None
    ends = {key: getattr(interval, key) for key in ("mean", "low", "high", "seeds", "groups")}
    return {key: value if finite(value) else None for key, value in ends.items()}


def _strict(value: Any) -> Any:
    """NaN and infinities as strings: JSON has none, and readers outside Python refuse them."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


FORMATS = {"table": plain_text, "json": as_json, "markdown": markdown, "html": as_html}
