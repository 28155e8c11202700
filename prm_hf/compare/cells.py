"""The cells of the tables of a comparison, and what is said beside them, for every format."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..runs.schema import BOUND, CERTIFIED, CLEAN_FIT, COST, EFFECTIVE_DIMENSION, KL
from .comparison import Comparison
from .contrasts import BEST_LR, Contrast
from .findings import LOST
from .rows import Row, format_rate
from .simplicity import MEASURES, mean_of, measures_in, simplest_rows, span
from .solved import best_solvers, problems, share_solved
from .statistics import Interval, finite


_AS_IN_TRAINING = (
    "with probability .95, for rows labelled as in training, if these are new to the model that training started from"
)
SIMPLICITY_NOTES = {
    EFFECTIVE_DIMENSION: "eff. dim.: directions that 256 training rows determine",
    CERTIFIED: f"certified: the accuracy is at least that, {_AS_IN_TRAINING}",
    BOUND: f"bound: bits a token are at most that, {_AS_IN_TRAINING}",
}


class Table(NamedTuple):
    """Heads, the cells of each row, and the columns that are aligned to the left."""

    heads: list[str]
    rows: list[list[str]]
    left: set[int]


def tables(comparison: Comparison) -> list[Table]:
    """Of rows, of what else they have, and those below in their order; all but the first may be empty."""
    heads = extra_header(comparison)
    more = [[*row_cells(row)[:2], *extra_cells(comparison, row)] for row in comparison.rows if heads]
    return [
        Table(row_header(comparison), list(map(row_cells, comparison.rows)), {0}),
        Table(["method", "lr", *heads], more, {0}),
        contrast_table(comparison),
        recovery_table(comparison),
        solved_table(comparison),
        simplicity_table(comparison),
    ]


def row_header(comparison: Comparison) -> list[str]:
    names = comparison.measures
    fits = [names.noise_label, "clean fit"]
    return ["method", "lr", "seeds", "accuracy", *fits, "drift/kl", names.extra_label, "mean q", "wall s"]


# Columns that there are where a run has the metric, with their heads.
_MEASURED = {
    "suspects/auc": "suspects AUC",
    "suspects/average_precision": "suspects AP",
    "suspects/share_error": "share error",
    COST: "cost s",
    EFFECTIVE_DIMENSION: "eff. dim.",
    CERTIFIED: "certified",
    BOUND: "bound",
}
_SHARES = {name for name in _MEASURED if name.startswith("suspects/")} | {CERTIFIED}


def extra_header(comparison: Comparison) -> list[str]:
    """The heads of the columns of `extra_cells`."""
    solved = ["solved [95 % interval]"] if problems(comparison) else []
    return [*(["recovery"] if comparison.recoveries else []), *solved, *map(_MEASURED.get, _measured(comparison))]


def extra_cells(comparison: Comparison, row: Row) -> list[str]:
    """What a row has besides `row_cells`: the recovery of its method if it is the best row, and what was measured."""
    recoveries = [r for r in comparison.recoveries if r.kind == BEST_LR and not r.in_solved]
    of_row = [r for r in recoveries if r.row is row and r.ratio]
    cells = [f"{of_row[0].ratio.mean:.2f}" if of_row else "-"] if comparison.recoveries else []
    cells += [interval_text(share_solved(row))] if problems(comparison) else []
    return cells + [(share if name in _SHARES else number)(row.mean(name)[0]) for name in _measured(comparison)]


def _measured(comparison: Comparison) -> list[str]:
    found = [name for name in _MEASURED if any(name in run.metrics for run in comparison.runs)]
    return [name for name in found if name not in MEASURES or name in measures_in(comparison)]


def recovery_table(comparison: Comparison) -> Table:
    """A row a method."""
    rows: dict[tuple, list[str]] = {}
    for recovery in comparison.recoveries:
        ends = f", KL {recovery.span[0]:.2g}-{recovery.span[1]:.2g}" if recovery.span and recovery.ratio else ""
        name = f"{recovery.row.name}{', in problems solved' if recovery.in_solved else ''}"
        rows.setdefault((recovery.row.method, recovery.in_solved), [name]).append(f"{recovery.text}{ends}")
    return Table(["recovery of", "best against best [95 % interval]", "at equal KL"], [*rows.values()], {0, 1, 2})


def solved_table(comparison: Comparison) -> Table:
    """A row a difference in problems solved, and one of each method without any."""
    heads, rows = ["problems solved by", "share [95 % interval]", "minus that of"], []
    for row in best_solvers(comparison):
        of_row = [_contrast_cells(contrast)[1:4] for contrast in comparison.solved if contrast.left is row]
        rows += [[row.label, interval_text(share_solved(row)), *cells] for cells in of_row or [["", "", ""]]]
    return Table([*heads, "difference [95 % interval]", "p (Holm)"], rows, {0, 2})


def simplicity_table(comparison: Comparison) -> Table:
    """A row a difference, and one of each method without any; means are those at the most accurate learning rate."""
    heads, rows = ["measure", "of", "mean [95 % interval]", "minus that of", "compared at"], []
    for measure in measures_in(comparison):
        for row in simplest_rows(comparison, measure):
            found = [c for c in comparison.simplicity if c.left is row and c.measure == measure]
            found = [[c.right.name, c.kind.replace("learning ", ""), c.text, p_text(c.p_holm)] for c in found]
            mean = span(mean_of(row, measure), "")
            rows += [[_MEASURED[measure], row.name, mean, *of_one] for of_one in found or [[""] * 4]]
    return Table([*heads, "difference [95 % interval]", "p (Holm)"], rows, {0, 1, 3, 4})


def contrast_table(comparison: Comparison) -> Table:
    """A row a contrast of accuracies."""
    heads = ["accuracy of", "minus that of", "difference [95 % interval]", "p (Holm)", "so the first is"]
    return Table(heads, list(map(_contrast_cells, comparison.contrasts)), {0, 1, 4})


def interval_text(interval: Interval | None) -> str:
    """`0.512 [0.470, 0.554]`, or the share alone."""
    if interval is None:
        return "-"
    return share(interval.mean) + (f" [{interval.low:.3f}, {interval.high:.3f}]" if interval.known else "")


def share(value: float) -> str:
    return f"{value:.3f}" if finite(value) else "-"


def p_text(p: float) -> str:
    return "<0.001" if p < 0.001 else share(p)


def number(value: float) -> str:
    """Three significant digits, for what spans orders of magnitude; `-` if it was not measured."""
    if not finite(value):
        return "-"
    if value == 0 or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def row_cells(row: Row) -> list[str]:
    names, (error, over) = row.measures, row.accuracy_error()
    shares = [share(row.mean(name)[0]) for name in (names.accuracy, names.noise_fit, CLEAN_FIT)]
    if over:
        shares[0] += f" ± {error:.3f}" + ("*" if over == "examples" else "")
    numbers = [number(row.mean(name)[0]) for name in (KL, names.extra, "mean_q", "wall_seconds")]
    seeds = f"{len(row.runs)}, {len(row.diverged)} diverged" if row.diverged else str(len(row.runs))
    return [row.name, format_rate(row.learning_rate), seeds, *shares, *numbers]


def _contrast_cells(contrast: Contrast) -> list[str]:
    return [contrast.judged, contrast.against, contrast.text, p_text(contrast.p_holm), contrast.verdict]


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
    if comparison.recoveries:
        notes.append("recovery: (method - AdamW) / (AdamW on clean labels - AdamW), in accuracy")
    notes += [SIMPLICITY_NOTES[measure] for measure in measures_in(comparison)]
    notes += [f"solved: {of_problems}"] if (of_problems := problems(comparison)) else []
    return f"{words} {'; '.join(notes)}." if notes else words


def told_apart(comparisons: list[Comparison], i: int) -> tuple[str, str]:
    """Of several experiments the title of one, and in what its settings differ from those of the first."""
    if len(comparisons) == 1:
        return "", ""
    folders = dict.fromkeys(str(run.path.parent) for run in comparisons[i].runs)
    differences = comparisons[i].apart
    more = f"; and in {len(differences) - 5} more settings" if len(differences) > 5 else ""
    words = "; ".join(map(str, differences[:5]))
    text = f"It has a table of its own, as its settings differ from those of the first: {words}{more}." if i else ""
    return f"Experiment {i + 1} of {len(comparisons)}: {', '.join(folders)}", text


def lost_and_caveats(comparison: Comparison) -> tuple[list[str], list[str]]:
    """What is said of runs without numbers, and the caveats that apply."""
    keys = {case.key for case in LOST}
    lost = [text for key, text in comparison.findings.items() if key in keys]
    return lost, [text for key, text in comparison.findings.items() if key not in keys]


def apart_from_command(comparison: Comparison) -> tuple[list[str], str]:
    """The lines of the verdict, and the code of the last one, which stands alone to be copied; empty without."""
    *others, last = comparison.verdict
    words, colon, code = last.partition(": ")
    return ([*others, f"{words}:"], code) if last.startswith("Next, ") and colon else (comparison.verdict, "")
