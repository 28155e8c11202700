"""What limits a comparison: the runs that have no numbers, and numbered caveats, each a condition and a sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ..runs.run import DIVERGED, FAILED, UNFINISHED, UNREADABLE
from ..runs.schema import KL
from .contrasts import BEST_LR, EQUAL_KL, EQUAL_KL_MEAN, FRONTIER, MORE, SAME_LR, Contrast
from .rows import Row, best, format_rate
from .statistics import finite


class Case(NamedTuple):
    """A sentence that is said where `holds` returns something that is true.

    It is formatted with the facts as `f` and with what `holds` returned as `it`, the items of a list joined.
    """

    key: str
    holds: Callable[[Any], Any]
    sentence: str


def say(cases: Iterable[Case], facts: Any) -> Iterator[tuple[str, str]]:
    """Key and sentence of each case that holds."""
    for case in cases:
        it = case.holds(facts)
        if it:
            yield case.key, case.sentence.format(f=facts, it="; ".join(it) if isinstance(it, list) else it)


LOST = (
    Case(
        "diverged",
        lambda f: _of(f, DIVERGED),
        "Diverged, and in no mean and no difference: {it}.",
    ),
    Case("failed", lambda f: _of(f, FAILED), "Ended in an error: {it}."),
    Case(
        "unreadable",
        lambda f: _of(f, UNREADABLE),
        "Left out, as it cannot be read; train it again, or leave its folder out: {it}.",
    ),
    Case(
        "unfinished",
        lambda f: [r.name for r in f.comparison.ended(UNFINISHED)],
        "Unfinished, without metrics.json: {it}.",
    ),
)
# Each keeps its number, whether it applies or not.
CAVEATS = (
    Case(
        "same_rate",
        lambda f: [_drift(c) for c in f.contrasts if c.kind == SAME_LR],
        "At one learning rate a mask below 1 takes smaller steps, so a difference says nothing of the mask: {it}.",
    ),
    Case(
        "equal_kl",
        lambda f: any(c.kind in (EQUAL_KL, EQUAL_KL_MEAN, FRONTIER) and c.interval for c in f.contrasts),
        "Between two neighbouring runs of a seed a curve is straight in log KL. Where it bulges up, that is low.",
    ),
    Case(
        "picked",
        lambda f: f.top and any(len(rows) > 1 for rows in f.methods.values()),
        "Best learning rates were picked on the same {f.measures.examples}, so every best is optimistic.",
    ),
    Case(
        "picked_method",
        lambda f: f.prm_methods > 1 and f.lead,
        "{f.lead.name} is the most accurate of {f.prm_methods} PRM methods, picked on the same {f.measures.examples}.",
    ),
    Case(
        "unequal_grids",
        lambda f: [text for c in f.contrasts if c.kind == BEST_LR and (text := _grids(c, f.methods))],
        "The best of more learning rates looks better by chance: {it}.",
    ),
    Case(
        "edge",
        lambda f: [text for rows in f.methods.values() if (text := edge_of(rows))],
        "The best learning rate is at the end of its grid, so a better one may lie outside: {it}.",
    ),
    Case(
        "mean_step",
        lambda f: f.lead and (f.at_step is None or f.at_step.verdict != MORE) and f.lead.label,
        "Smaller steps alone (the control constant_q) are not known to do worse than {it}.",
    ),
    Case("one_seed", lambda f: max(f.seeds) == 1, "One seed: another seed may lie outside all intervals."),
    Case(
        "seeds",
        lambda f: 1 < max(f.seeds) and min(f.seeds) < 4,
        "Few seeds: a 95 % interval over two covers about 80 %, over three 90 %, where seeds matter most.",
    ),
    Case(
        "many_intervals",
        lambda f: sum(c.known for c in f.contrasts) > 1 and _counts(f.contrasts),
        "Of many intervals some miss 0 by chance; the column p (Holm) corrects for all of them: {it}.",
    ),
    Case(
        "run_notes",
        lambda f: [f"{run.name}: {note}" for run in f.runs for note in run.notes],
        "Notes on runs: {it}.",
    ),
    Case(
        "contrast_notes",
        lambda f: [f"{c.judged} against {c.against}: {c.note}" for c in f.contrasts if c.note],
        "Notes on differences: {it}.",
    ),
    Case(
        "trainer_runs",
        lambda f: any(run.source == "trainer" for run in f.runs),
        "trainer_state.json does not say whether evaluation labels are clean, nor which data and model were used.",
    ),
    Case(
        "not_on_frontier",
        lambda f: any(map(_has_kl, f.rows)) and [row.label for row in f.rows if not _has_kl(row)],
        f"Not on the frontier, for lack of {KL}: {{it}}.",
    ),
    Case(
        "extended",
        lambda f: [text for rows in f.methods.values() if (text := _extended(rows))],
        "Learning rates were added while a best one was at the end of its grid: {it}.",
    ),
    Case(
        "ungrouped",
        lambda f: not _independence_known(f),
        "Which {f.measures.examples} share a prompt is not on record, and each counts as independent: where some do, "
        "intervals are too narrow and p too small.",
    ),
)


def _of(f: Any, end: str) -> list[str]:
    return [f"{run.name} ({run.problem.removesuffix('.')})" for run in f.comparison.ended(end)]


def _drift(contrast: Contrast) -> str:
    left, right = (row.mean(KL)[0] for row in (contrast.left, contrast.right))
    ratio = f"{right / left:.1f} times that of" if finite(right) and left > 0 else "not known beside that of"
    return f"the KL of {contrast.right.label} is {ratio} {contrast.left.label}"


def _grids(contrast: Contrast, methods: dict[str, list[Row]]) -> str:
    left, right = (len(methods[row.method]) for row in (contrast.left, contrast.right))
    return "" if left == right else f"{left} of {contrast.left.name} against {right} of {contrast.right.name}"


def edge_of(rows: list[Row]) -> str:
    """The best row of a method, if it has the smallest or largest learning rate tried; else empty."""
    rates = [row.learning_rate for row in rows if row.learning_rate is not None and finite(row.accuracy)]
    top = best(rows)
    if top is None or len(rates) < 2 or top.learning_rate not in (min(rates), max(rates)):
        return ""
    side = "smallest" if top.learning_rate == min(rates) else "largest"
    times = max(extension_of(row) for row in rows)
    after = f", after {times} extension{'s' * (times > 1)}" if times else ""
    return f"{top.name} ({side}, {format_rate(top.learning_rate)}{after})"


def extension_of(row: Row) -> int:
    """Which extension of its method's grid added a row; 0 for one that was asked for."""
    found = [run.info.get("extension") for run in (*row.runs, *row.diverged)]
    return max((n for n in found if isinstance(n, int)), default=0)


def _extended(rows: list[Row]) -> str:
    """The learning rates that were added to a method's grid, in the order in which they were."""
    added = sorted((row for row in rows if extension_of(row) and row.source is None), key=extension_of)
    return f"{rows[0].kind.label} by {', '.join(format_rate(row.learning_rate) for row in added)}" if added else ""


def _independence_known(f: Any) -> bool:
    """Whether it is on record which examples belong together, or no number of single examples is used."""
    return all(run.heldout is None or run.heldout_groups is not None for run in f.runs)


def _counts(contrasts: list[Contrast]) -> str:
    known, clear = sum(c.known for c in contrasts), [c for c in contrasts if c.clear]
    kept = sum(c.p_holm < 0.05 for c in clear)
    return f"{len(clear)} of {known} intervals miss 0, {kept} still after that"


def _has_kl(row: Row) -> bool:
    return finite(row.mean(KL)[0])
