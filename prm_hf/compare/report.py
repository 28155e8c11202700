"""From run folders to a report: reads, compares, and writes `comparison.json`, `frontier.png` and `report.html`."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .comparison import Comparison, build_comparison
from .page import html_page
from .runs import load_runs
from .statements import write_statements
from .tables import as_json, markdown, plain_text


FORMATS = ("table", "json", "markdown", "html")


def compare_runs(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> Comparison:
    """Reads finished runs and compares them.

    Args:
        paths: run folders, or folders that hold run folders (see `load_runs`).

    Returns:
        The comparison: `rows`, `contrasts`, `statements`, `runs`, `unfinished`. Print it with `format_comparison`,
        write it with `write_report`.

    Raises:
        FileNotFoundError, ValueError: as `load_runs`; also if no run is finished or the runs cannot be compared.
    """
    comparison = build_comparison(load_runs(paths))
    comparison.statements = write_statements(comparison)
    return comparison


def write_report(comparison: Comparison, output_dir: str | os.PathLike) -> None:
    """Writes `comparison.json`, `frontier.png` (if any run has accuracy and KL) and `report.html` into `output_dir`.

    Raises:
        ImportError: matplotlib is not installed. `comparison.json` is then already written.
    """
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "comparison.json").write_text(format_comparison(comparison, "json"), encoding="utf-8")
    pictures = _pictures(comparison)
    if "frontier" in pictures:
        (output_dir / "frontier.png").write_bytes(pictures["frontier"])
    (output_dir / "report.html").write_text(html_page(comparison, pictures), encoding="utf-8")


def format_comparison(comparison: Comparison, format: str = "table") -> str:
    """The comparison as text.

    Args:
        comparison: what `compare_runs` returned.
        format: `"table"` (plain text of at most 120 columns), `"json"`, `"markdown"` or `"html"` (one self-contained
            page; needs matplotlib).
    """
    if format == "table":
        return plain_text(comparison)
    if format == "json":
        return as_json(comparison)
    if format == "markdown":
        return markdown(comparison)
    if format == "html":
        return html_page(comparison, _pictures(comparison))
    raise ValueError(f"`format` must be one of {', '.join(FORMATS)}, got {format!r}.")


def _pictures(comparison: Comparison) -> dict[str, bytes]:
    from . import plots

    drawn = {
        "frontier": plots.plot_frontier(comparison),
        "curves": plots.plot_curves(comparison),
        "mask": plots.plot_mask(comparison),
    }
    return {name: plots.to_png(figure) for name, figure in drawn.items() if figure is not None}
