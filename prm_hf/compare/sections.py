"""The sections of `report.html`: the verdict, one picture and one table first, everything else folded below."""

from __future__ import annotations

import json

from ..runs.comparable import is_equal
from ..runs.methods import CONTROL
from ..runs.schema import SOLVED
from . import chart, page, plots
from .cells import (
    Table,
    apart_from_command,
    contrast_table,
    extra_cells,
    extra_header,
    footnote,
    lost_and_caveats,
    recovery_table,
    row_cells,
    row_header,
    share,
    simplicity_table,
    solved_table,
    told_apart,
)
from .command import command
from .comparison import Comparison
from .contrasts import SAME_LR, Contrast
from .rows import best, format_rate
from .solved import problems


def as_html(comparisons: list[Comparison], pictures: dict[str, bytes] | None = None) -> str:
    """One page without external resources; needs matplotlib for the pictures, unless they are given, and altair."""
    sections, titles = [], []
    for i, comparison in enumerate(comparisons):
        names = [rows[0].kind.label for rows in comparison.methods().values()]
        title, apart = told_apart(comparisons, i)
        title = title or "Comparison of " + (", ".join(names) if len(names) < 5 else f"{len(names)} methods")
        drawn = plots.draw(comparison) if pictures is None else pictures
        sections += [_first_screen(comparison, title, apart, drawn, f"frontier{i}"), *_details(comparison, drawn)]
        titles.append(title)
    title = titles[0] if len(titles) == 1 else f"{len(titles)} comparisons"
    return page.document(title, sections, chart.scripts())


def _first_screen(comparison: Comparison, title: str, apart: str, pictures: dict[str, bytes], name: str) -> str:
    fallback = page.figure(pictures["frontier"], plots.CAPTIONS["frontier"]) if "frontier" in pictures else ""
    lost = lost_and_caveats(comparison)[0]
    parts = [
        "<header>",
        page.tag("h1", title),
        page.quiet(apart) if apart else "",
        _verdict(comparison),
        *(page.tag("p", text, "quiet lost") for text in lost),
        "</header>",
        '<div class="screen">',
        f"<section>{chart.frontier(comparison, name, fallback)}</section>",
        f"<section>{_best_table(comparison)}</section>",
        "</div>",
        page.quiet(_subtitle(comparison)),
    ]
    return "\n".join(filter(None, parts))


def _verdict(comparison: Comparison) -> str:
    (answer, *others), code = apart_from_command(comparison)
    word, _, rest = answer.partition(": ")
    lines = [f"<p><strong>{page.escape(word)}.</strong> {page.escape(rest)}</p>" if rest else page.tag("p", answer)]
    lines += [*(page.tag("p", line) for line in others), page.command(code) if code else ""]
    return f'<div class="verdict {page.escape(comparison.answer)}" role="status">{"".join(lines)}</div>'


def _best_table(comparison: Comparison) -> str:
    """Each method at its most accurate learning rate. A phone has room for six columns."""
    names, has_problems = comparison.measures, bool(problems(comparison))
    rows = []
    for method, members in comparison.methods().items():
        top = best(members) or members[0]
        name, rate, seeds, accuracy, noise, _, kl, *_ = row_cells(top)
        numbers = [accuracy, share(top.mean(SOLVED)[0])] if has_problems else [seeds, accuracy]
        cells = [_with_chip(comparison, method, name), *map(page.escape, (rate, *numbers, noise, kl))]
        rows.append(("", cells))
    heads = ["method", "best lr", *(["accuracy", "solved"] if has_problems else ["seeds", "accuracy"])]
    caption = f"Each method at its most accurate learning rate. Accuracy: {names.examples}. KL: nats a token."
    return page.table([*heads, names.noise_label, "KL"], {0}, rows, caption=caption, kind="compact")


def _with_chip(comparison: Comparison, method: str, name: str) -> str:
    """A method's name behind its colour."""
    colour = plots.method_styles(list(comparison.methods()))[method][0]
    chip = f'<span class="chip" style="--light:{colour};--dark:{chart.on_dark(colour)}"></span>'
    return f"<span>{chip}{page.escape(name)}</span>"


def _details(comparison: Comparison, pictures: dict[str, bytes]) -> list[str]:
    figures = {name: page.figure(png, plots.CAPTIONS[name]) for name, png in pictures.items()}
    caveats = lost_and_caveats(comparison)[1]
    listed = "".join(page.tag("li", text) for text in caveats)
    whole = command(comparison)
    again = (
        page.tag("p", "All runs again; what is finished is not trained again:") + page.command(whole) if whole else ""
    )
    return [
        page.details(f"Caveats that apply ({len(caveats)})", f'<ul class="plain">{listed}</ul>' if caveats else ""),
        page.details("All learning rates", _row_table(comparison)),
        page.details("Paired differences in accuracy", _contrast_table(comparison) if comparison.contrasts else ""),
        page.details("Recovery of what wrong labels cost", _recovery_table(comparison)),
        page.details("Problems solved", _solved_table(comparison)),
        page.details("How simple the solutions are", _simplicity_table(comparison)),
        page.details("Over the steps of training", figures.get("curves", "")),
        page.details("The mask over the steps", figures.get("mask", "")),
        page.details("Runs, and the command that repeats each", again + _run_table(comparison)),
        page.details("Settings", *_settings(comparison)),
    ]


def _subtitle(comparison: Comparison) -> str:
    info = next((run.info for run in comparison.runs if run.info.get("model")), {})
    parts = [f"{len(comparison.runs)} runs, {len(comparison.rows)} settings"]
    parts += [f"{key.replace('_', ' ')}: {info[key]}" for key in ("model", "dataset", "noise_rate") if key in info]
    examples = next((len(run.heldout) for run in comparison.runs if run.heldout is not None), None)
    groups = next((run.heldout_groups for run in comparison.runs if run.heldout_groups is not None), [])
    count = len(set(groups))
    of = f" in {count} groups" if 0 < count < (examples or 0) else ""
    parts += [f"{examples} {comparison.measures.examples}{of}"] if examples else []
    return " · ".join(parts)


def _row_table(comparison: Comparison) -> str:
    rows = []
    for method, members in comparison.methods().items():
        top = best(members)
        for row in members:
            name, *others = [*row_cells(row), *extra_cells(comparison, row)]
            cells = [_with_chip(comparison, method, name), *map(page.escape, others)]
            kinds = [name for name, holds in (("best", row is top), ("first", row is members[0])) if holds]
            rows.append((" ".join(kinds), cells))
    note = page.quiet(f"{footnote(comparison)} Bold: the most accurate learning rate of each method.")
    heads = [*row_header(comparison), *extra_header(comparison)]
    return page.table(heads, {0}, rows, caption="Each method at each learning rate") + note


def _contrast_table(comparison: Comparison) -> str:
    intervals = [c.interval for c in comparison.contrasts if c.interval]
    ends = [abs(end) for i in intervals for end in ((i.low, i.high) if i.known else (i.mean,))]
    reach, rows, previous = max([*ends, 0.01]), [], comparison.contrasts[0].left.method
    heads, found, _ = contrast_table(comparison)
    for contrast, texts in zip(comparison.contrasts, found, strict=True):
        *cells, last = map(page.escape, texts)
        kind = "first" if contrast.left.method != previous else ""
        rows.append((kind, [*cells, _interval_picture(contrast, reach), last]))
        previous = contrast.left.method
    table = page.table(
        [*heads[:-1], "drawn", heads[-1]], {0, 1, 4, 5}, rows, caption="Paired differences in held-out accuracy"
    )
    return table + page.quiet("The line in the middle is a difference of 0; right of it the first is better.")


def _recovery_table(comparison: Comparison) -> str:
    note = (
        "(method - AdamW) / (AdamW on clean labels - AdamW), in held-out accuracy where nothing else is said: "
        "1 is what clean labels give."
    )
    caption = "What each method gives back of what wrong labels cost AdamW"
    return _table(recovery_table(comparison), caption, page.quiet(note))


def _solved_table(comparison: Comparison) -> str:
    note = page.quiet(f"Share: {problems(comparison)}. Intervals are over seeds and problems.")
    caption = "Problems solved, each method at the learning rate at which it solves the most"
    return _table(solved_table(comparison), caption, note)


def _simplicity_table(comparison: Comparison) -> str:
    note = page.quiet(
        "Each method at its most accurate learning rate; at equal accuracy or training loss at the highest level that "
        "both reach in a seed, straight between its learning rates. Intervals are over seeds."
    )
    return _table(simplicity_table(comparison), "Effective dimension and what is certified", note)


def _table(table: Table, caption: str, note: str) -> str:
    """A table and the note below it; empty without rows."""
    rows = [("", list(map(page.escape, cells))) for cells in table.rows]
    return page.table(table.heads, table.left, rows, caption=caption) + note if rows else ""


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
        f'<svg width="160" height="18" role="img" aria-label="{page.escape(contrast.text)}">'
        f'<line x1="80" x2="80" y1="0" y2="18" stroke="var(--quiet)" stroke-opacity="0.5" stroke-width="1.5"/>'
        f'{ends if interval.known else ""}<circle cx="{mean:.1f}" cy="9" r="4" fill="{colour}"/></svg>'
    )


def _run_table(comparison: Comparison) -> str:
    rows = []
    for row in comparison.rows:
        for run in row.runs:
            # A control takes something from a run of the method that it is bound to.
            methods = [row.source.method, row.method] if row.source is not None else [row.method]
            rate = format_rate(row.source.learning_rate if row.source is not None else row.learning_rate)
            lists = {"methods": methods, "learning_rates": [rate], "prm_learning_rates": [rate], "seeds": [run.seed]}
            known = run.seed is not None and (row.group != CONTROL or row.source is not None)
            again = command(comparison, **lists) if known else ""
            cells = [run.name, str(run.path), "" if run.seed is None else str(run.seed)]
            rows.append(("", [*map(page.escape, cells), page.copy_button(again, f"Copy the command of {run.name}")]))
    return page.table(["run", "folder", "seed", "command"], {0, 1, 3}, rows, caption="Finished runs")


def _settings(comparison: Comparison) -> list[str]:
    """The settings that all runs share, the names of those that differ, and where each run was made."""
    recorded = [run.settings for run in comparison.runs if run.settings]
    keys = sorted({key for settings in recorded for key in settings})
    shared = {k: recorded[0][k] for k in keys if all(k in s and is_equal(s[k], recorded[0].get(k)) for s in recorded)}
    made: dict[str, list[str]] = {}
    for run in comparison.runs:
        found = {key: run.info[key] for key in ("hardware", "versions") if key in run.info}
        made.setdefault(json.dumps(found), []).append(run.name)
    differing = ", ".join(key for key in keys if key not in shared)
    return [
        page.tag("h3", "Shared by all runs") + page.json_block(shared) if shared else "",
        page.quiet(f"Differ between runs: {differing}.") if differing else "",
        page.tag("h3", "Hardware and versions"),
        *(page.quiet(", ".join(names)) + page.json_block(json.loads(text)) for text, names in made.items()),
    ]
