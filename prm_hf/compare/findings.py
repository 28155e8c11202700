"""What a comparison shows and what it does not: a table of cases, each a condition on the numbers and a sentence.

No method is called better where the 95 % interval of the difference holds 0, or where there is no interval.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ..runs.methods import PRM
from ..runs.run import DIVERGED, FAILED, UNREADABLE
from ..runs.schema import KL
from .comparison import Comparison
from .contrasts import (
    BEST_LR,
    CONTROLLED,
    EQUAL_KL,
    EQUAL_KL_MEAN,
    FRONTIER,
    LESS,
    LEVEL,
    MORE,
    SAME_LR,
    Contrast,
)
from .rows import Row, best, format_rate
from .statistics import finite


class Facts:
    """A comparison and what follows from it: what the conditions and the sentences of the cases speak of."""

    def __init__(self, comparison: Comparison) -> None:
        self.rows, self.contrasts, self.runs = comparison.rows, comparison.contrasts, comparison.runs
        self.unfinished, self.measures, self.methods = comparison.unfinished, comparison.measures, comparison.methods()
        baseline, prm = comparison.baseline, comparison.methods(PRM)
        self.grids = [baseline, *prm.values()]
        # The most accurate row of all, and of PRM.
        self.top, self.lead = best(self.rows), best(row for rows in prm.values() for row in rows)
        self.lacks = "PRM" if self.lead is None else "AdamW" if best(baseline) is None else ""
        self.adamw = baseline[0].kind.label if baseline else "AdamW"
        self.settings, self.tries = sum(map(len, prm.values())), len(baseline)
        # The lead minus AdamW at its best, at the same KL, and with PRM's mean step; None where it was not compared.
        self.at_best, self.at_kl = (comparison.find(kind, self.lead) for kind in (BEST_LR, EQUAL_KL))
        self.at_step = comparison.find(CONTROLLED, self.lead, "constant_q")
        self.verdicts = {c.verdict for c in (self.at_best, self.at_kl) if c}
        # Every rival of AdamW, by how the lead stands beside it.
        self.rivals = _standings(comparison, self.lead) if self.lead else {}
        counts = [len(row.runs) for row in self.rows if row.runs]
        self.diverged, self.failed, self.unreadable = map(comparison.ended, (DIVERGED, FAILED, UNREADABLE))
        self.seeds = min(counts), max(counts)
        clear = [c for c in self.contrasts if c.clear]
        self.clear, self.kept = len(clear), sum(c.p_holm < 0.05 for c in clear)
        self.intervals = sum(c.known for c in self.contrasts)


class Case(NamedTuple):
    """A sentence that is said where `holds` returns something that is true.

    It is formatted with the facts as `f` and with what `holds` returned as `it`, the items of a list joined.
    """

    key: str
    holds: Callable[[Any], Any]
    sentence: str


# The first of these that holds ends the statement that sums up.
CONCLUSIONS = (
    Case("no_accuracy", lambda f: f.top is None, "No run has {f.measures.accuracy}: there is nothing to compare."),
    Case("without", lambda f: f.lacks, "Without a run of {it}, the table cannot say what PRM's mask does."),
    Case("loses", lambda f: LESS in f.verdicts and MORE not in f.verdicts, "So PRM loses to {f.adamw} here."),
    Case("not_shown", lambda f: MORE in f.verdicts and f.verdicts != {MORE}, "So PRM is not ahead in both."),
    Case("level", lambda f: LEVEL in f.verdicts, "So neither is shown to be more accurate, nor that they are equal."),
    Case("no_interval", lambda f: MORE not in f.verdicts, "No interval: that takes several seeds or margins.json."),
    Case(
        "rival",
        lambda f: {*f.rivals} - {MORE} and _beside(f),
        "So PRM is {it}.",
    ),
    Case(
        "more_tries",
        lambda f: f.settings > f.tries,
        "So PRM is ahead, but it had {f.settings} tries and {f.adamw} {f.tries}, which might do as well with more.",
    ),
    Case(
        "mean_step",
        lambda f: f.at_step is None or f.at_step.verdict != MORE,
        "So PRM is ahead of {f.adamw}, but its mean step alone, constant q, is not known to do worse.",
    ),
    Case(
        "ahead",
        lambda f: _beside(f),
        "So PRM is {it}, by more than a smaller step explains, on one task and on {f.measures.examples} that also "
        "chose its learning rate.",
    ),
)

# Each of these that holds is a statement of its own.
REMARKS = (
    Case(
        "same_rate",
        lambda f: [_drift(c) for c in f.contrasts if c.kind == SAME_LR],
        "A difference at the same learning rate proves nothing about the mask, as q < 1 shrinks the step. {it}.",
    ),
    Case(
        "equal_kl",
        lambda f: any(c.kind in (EQUAL_KL, EQUAL_KL_MEAN, FRONTIER) and c.interval for c in f.contrasts),
        "At the same KL, a curve is read on the straight line in log KL between two neighbouring runs of a seed, and "
        "the frontier's area is its mean height. Where a curve bulges up between its runs, the line lies too low.",
    ),
    Case(
        "picked",
        lambda f: f.top and any(len(rows) > 1 for rows in f.methods.values()),
        "Each best learning rate was picked on the same {f.measures.examples}: every best is optimistic, which no "
        "interval counts.",
    ),
    Case(
        "unequal_grids",
        lambda f: [text for c in f.contrasts if c.kind == BEST_LR and (text := _grids(c, f.methods))],
        "The best of more learning rates looks better by chance: {it}.",
    ),
    Case(
        "edge",
        lambda f: [text for rows in f.grids if (text := _edge(rows))],
        "At the edge of its grid, so that its true best may lie outside: {it}.",
    ),
    Case("one_seed", lambda f: f.seeds[1] == 1, "One seed: another seed may lie outside all intervals."),
    Case(
        "seeds",
        lambda f: f.seeds[1] > 1,
        "{f.seeds[0]} to {f.seeds[1]} seeds a row. Over two or three an interval covers less than it says (about 80 "
        "and 90 % instead of 95 %) where the seed matters most; over one shared seed it holds for that seed alone.",
    ),
    Case(
        "many_intervals",
        lambda f: f.intervals > 1 and f"{0.05 * f.intervals:.1f}",
        "If nothing differed, about {it} of the {f.intervals} intervals of 95 % would miss 0 by chance. {f.clear} do, "
        "and {f.kept} still after Holm's correction for all of them.",
    ),
    Case("run_notes", lambda f: _by_note((run.name, note) for run in f.runs for note in run.notes), "{it}."),
    Case(
        "contrast_notes",
        lambda f: _by_note((f"{c.judged} against {c.against}", c.note) for c in f.contrasts if c.note),
        "{it}.",
    ),
    Case(
        "trainer_runs",
        lambda f: any(run.source == "trainer" for run in f.runs),
        "trainer_state.json does not say whether evaluation labels are clean, nor which data and model were used.",
    ),
    Case(
        "unequal_settings",
        lambda f: [text for rows in f.methods.values() if (text := _unequal_settings(rows))],
        "The runs of a method are not one experiment, for they differ not only in learning rate and seed: {it}.",
    ),
    Case(
        "not_on_frontier",
        lambda f: any(map(_has_kl, f.rows)) and [row.label for row in f.rows if not _has_kl(row)],
        f"Not on the frontier, for lack of {KL}: {{it}}.",
    ),
    Case(
        "diverged",
        lambda f: [f"{run.name} ({run.problem})" for run in f.diverged],
        "Diverged, and left out of every mean and difference, which are of the runs that did not: {it}.",
    ),
    Case("failed", lambda f: [f"{run.name} ({run.problem})" for run in f.failed], "Ended in an error: {it}."),
    Case(
        "unreadable",
        lambda f: [f"{run.name} ({run.problem.removesuffix('.')})" for run in f.unreadable],
        "Left out, as it cannot be read; train it again, or leave its folder out: {it}.",
    ),
    Case("unfinished", lambda f: [run.name for run in f.unfinished], "Unfinished, without metrics.json: {it}."),
)


def find(comparison: Comparison) -> dict[str, str]:
    """The sentences of the cases that hold, by their keys; the first one sums up."""
    facts = Facts(comparison)
    key, conclusion = next(say(CONCLUSIONS, facts))
    return {key: f"{_summary(facts)}{conclusion}", **dict(say(REMARKS, facts))}


def say(cases: Iterable[Case], facts: Any) -> Iterator[tuple[str, str]]:
    """Key and sentence of each case that holds."""
    for case in cases:
        it = case.holds(facts)
        if it:
            yield case.key, case.sentence.format(f=facts, it="; ".join(it) if isinstance(it, list) else it)


def _summary(f: Facts) -> str:
    """The numbers of the row that leads, and of what it is compared with."""
    lead = f.lead or f.top
    if lead is None:
        return ""
    among = f"PRM setting of {f.settings}" if f.lead else f"setting of {len(f.rows)}"
    compared = [c for c in (f.at_best, f.at_kl, f.at_step) if c]
    numbers = "".join(f"; against {c.against} {c.text} ({c.verdict})" for c in compared)
    lost = f" {len(f.diverged)} of {len(f.diverged) + len(f.runs)} runs diverged." if f.diverged else ""
    return f"{lead.label}, the best {among}, has {lead.accuracy:.3f} held-out accuracy{numbers}.{lost} "


def _standings(comparison: Comparison, lead: Row) -> dict[str, list[str]]:
    """Names of the rivals by how the lead's method stands beside each: ahead only where nothing says otherwise."""
    found: dict[str, list[str]] = defaultdict(list)
    for method, rows in comparison.rivals.items():
        both = [
            c
            for c in comparison.contrasts
            if c.left.method == lead.method and c.right is not None and c.right.method == method
        ]
        verdicts = {c.verdict for c in both if c.known}
        standing = LEVEL if len(verdicts) > 1 else verdicts.pop() if verdicts else "unknown"
        found[standing].append(rows[0].kind.label)
    return found


def _beside(f: Facts) -> str:
    """`ahead of AdamW, level with AdamW eps 10`: every opponent is named."""
    by_standing = {**f.rivals, MORE: [f.adamw, *f.rivals.get(MORE, ())]}
    words = {MORE: "ahead of", LEVEL: "level with", LESS: "behind", "unknown": "not known to be ahead of"}
    return ", ".join(f"{word} {' and '.join(by_standing[key])}" for key, word in words.items() if key in by_standing)


def _drift(contrast: Contrast) -> str:
    left, right = (row.mean(KL)[0] for row in (contrast.left, contrast.right))
    ratio = f"{right / left:.1f} times that of" if finite(right) and left > 0 else "not known beside that of"
    return f"The KL of {contrast.right.label} is {ratio} {contrast.left.label}"


def _grids(contrast: Contrast, methods: dict[str, list[Row]]) -> str:
    left, right = (len(methods[row.method]) for row in (contrast.left, contrast.right))
    return "" if left == right else f"{left} of {contrast.left.name} against {right} of {contrast.right.name}"


def _edge(rows: list[Row]) -> str:
    """The best row of a method, if it has the smallest or largest learning rate tried; else empty."""
    rates = [row.learning_rate for row in rows if row.learning_rate is not None and finite(row.accuracy)]
    top = best(rows)
    if top is None or len(rates) < 2 or top.learning_rate not in (min(rates), max(rates)):
        return ""
    side = "smallest" if top.learning_rate == min(rates) else "largest"
    return f"{top.name} ({side}, {format_rate(top.learning_rate)})"


def _by_note(noted: Iterable[tuple[str, str]]) -> list[str]:
    names = defaultdict(list)
    for name, note in noted:
        names[note].append(name)
    return [f"{', '.join(those)}: {note}" for note, those in names.items()]


def _has_kl(row: Row) -> bool:
    return finite(row.mean(KL)[0])


def _unequal_settings(rows: list[Row]) -> str:
    """Settings that vary within a method and should not: leftovers of an earlier experiment in the same folder."""
    expected = ("seed", "learning_rate", "constant_q", "adamw_matched", "shuffled_q", "fixed_q", "name", "dir")
    settings = [run.settings for row in rows for run in row.runs if run.settings]
    varying = {key for each in settings for key in each if any(s.get(key) != each[key] for s in settings)}
    varying = sorted(key for key in varying if not any(word in key for word in expected))
    return f"{rows[0].kind.label} in {', '.join(varying)}" if varying else ""
