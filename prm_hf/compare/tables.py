"""The comparison as a plain-text table, markdown and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from typing import Any

from .comparison import EQUAL_KL_MEAN, FRONTIER, Comparison, Contrast, Row, format_rate
from .runs import CLEAN_FIT, KL, SCHEMA, finite
from .statements import format_interval, verdict


WIDTH = 120
CONTRAST_HEADER = ["accuracy of", "minus that of", "difference [95 % interval]", "p (Holm)", "so the first is"]


def header(comparison: Comparison) -> list[str]:
    names = comparison.measures
    fits = [names.noise_label, "clean fit"]
    return ["method", "lr", "seeds", "accuracy", *fits, "drift/kl", names.extra_label, "mean q", "wall s"]


def _number(value: float, digits: int = 3) -> str:
    """Fixed digits for shares; for what spans orders of magnitude, `digits` significant ones. Unmeasured: `-`."""
    if not finite(value):
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def row_cells(row: Row) -> list[str]:
    def share(name: str) -> str:
        value = row.mean(name)[0]
        return f"{value:.3f}" if finite(value) else "-"

    names = row.measures
    accuracy = share(names.accuracy)
    error, over = row.accuracy_error()
    if over:
        accuracy += f" ± {error:.3f}" + ("*" if over == "examples" else "")
    return [
        row.name,
        format_rate(row.learning_rate),
        str(len(row.runs)),
        accuracy,
        share(names.noise_fit),
        share(CLEAN_FIT),
        _number(row.mean(KL)[0]),
        _number(row.mean(names.extra)[0]),
        _number(row.mean("mean_q")[0]),
        _number(row.mean("wall_seconds")[0]),
    ]


def contrast_cells(contrast: Contrast) -> list[str]:
    left = contrast.left.name if contrast.kind in (EQUAL_KL_MEAN, FRONTIER) else contrast.left.label
    p = contrast.p_holm
    p = "-" if not finite(p) else f"{p:.3f}" if p >= 0.001 else "<0.001"
    return [left, contrast.against, format_interval(contrast), p, verdict(contrast)]


def footnote(comparison: Comparison) -> str:
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


def _align(heads: list[str], rows: list[list[str]], left: set[int]) -> list[str]:
    """Lines of at most `WIDTH` columns; where they would be longer, the widest left-aligned column is cut with `…`."""
    table = [heads, *rows]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(heads))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widest = max(left, key=lambda i: widths[i])
        widths[widest] -= 1
    lines = []
    for cells in table:
        cut = [c if len(c) <= w else c[: w - 1] + "…" for c, w in zip(cells, widths, strict=True)]
        padded = [c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cut, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return [lines[0], "-" * max(map(len, lines)), *lines[1:]]


def _wrap(text: str, first: str = "", rest: str = "") -> str:
    return textwrap.fill(text, WIDTH, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)


def plain_text(comparison: Comparison) -> str:
    parts = ["\n".join(_align(header(comparison), [row_cells(row) for row in comparison.rows], left={0}))]
    parts.append(_wrap(footnote(comparison)))
    summary, *others = comparison.statements
    parts.append(_wrap(summary))
    if comparison.contrasts:
        cells = [contrast_cells(contrast) for contrast in comparison.contrasts]
        parts.append("\n".join(_align(CONTRAST_HEADER, cells, left={0, 1, 4})))
    parts.append("\n".join(_wrap(statement, "- ", "  ") for statement in others))
    return "\n\n".join(filter(None, parts)) + "\n"


def markdown(comparison: Comparison) -> str:
    def table(heads: list[str], rows: list[list[str]], left: set[int]) -> str:
        escaped = [[cell.replace("|", "\\|") for cell in cells] for cells in (heads, *rows)]
        rule = [":--" if i in left else "--:" for i in range(len(heads))]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (escaped[0], rule, *escaped[1:]))

    summary, *others = comparison.statements
    parts = [f"**{summary}**", table(header(comparison), [row_cells(row) for row in comparison.rows], {0})]
    parts.append(footnote(comparison).replace("*", "\\*").replace("|", "\\|"))
    if comparison.contrasts:
        cells = [contrast_cells(contrast) for contrast in comparison.contrasts]
        parts.append(table(CONTRAST_HEADER, cells, {0, 1, 4}))
    parts.append("\n".join(f"- {statement}" for statement in others))
    return "\n\n".join(filter(None, parts)) + "\n"


def as_json(comparison: Comparison) -> str:
    """The text of `comparison.json`."""
    return json.dumps(_strict(_as_dict(comparison)), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _as_dict(comparison: Comparison) -> dict[str, Any]:
    """A missing number is null or an absent key; a number that is not finite is a string."""

    def row_as_dict(row: Row) -> dict[str, Any]:
        names = sorted({name for run in row.runs for name in run.metrics})
        if row.mean("mean_q")[2]:
            names.append("mean_q")
        error, over = row.accuracy_error()
        return {
            "method": row.method,
            "group": row.group,
            "name": row.label,
            "learning_rate": row.learning_rate,
            "seeds": row.seeds,
            "runs": [run.name for run in row.runs],
            "accuracy_standard_error": {"value": error, "over": over} if over else None,
            "metrics": {
                name: {"mean": mean, "standard_error": error if n > 1 else None, "n": n}
                for name in names
                for mean, error, n in [row.mean(name)]
            },
        }

    def contrast_as_dict(contrast: Contrast) -> dict[str, Any]:
        interval = contrast.interval
        return {
            "kind": contrast.kind,
            "left": contrast.left.label,
            "right": contrast.against,
            "difference": interval.mean if interval else None,
            "low": interval.low if interval and interval.known else None,
            "high": interval.high if interval and interval.known else None,
            "seeds": interval.seeds if interval else 0,
            "p_value": interval.p_value if interval and interval.known else None,
            "p_holm": contrast.p_holm if finite(contrast.p_holm) else None,
            "verdict": verdict(contrast),
            "note": contrast.note,
        }

    return {
        "schema": SCHEMA,
        "rows": [row_as_dict(row) for row in comparison.rows],
        "contrasts": [contrast_as_dict(contrast) for contrast in comparison.contrasts],
        "runs": [
            {
                "name": run.name,
                "method": run.method,
                "learning_rate": run.learning_rate,
                "seed": run.seed,
                "source": run.source,
                "metrics": run.metrics,
            }
            for run in comparison.runs
        ],
        "unfinished": [run.name for run in comparison.unfinished],
        "statements": comparison.statements,
    }


def _strict(value: Any) -> Any:
    """NaN and infinities as strings: JSON has none, and readers outside Python refuse them."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
