"""What a comparison shows, as a verdict of at most three lines, and what limits it, as numbered caveats.

Both come from tables of cases, each a condition on the numbers and a sentence. The number that decides is the frontier
area of the PRM method at equal KL, minus that of the AdamW with the best area: no learning rate is picked for it. No
method is called better where the 95 % interval of the difference holds 0, or where there is no interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from ..runs.methods import BASELINE, CEILING, PRM
from ..runs.run import DIVERGED, FAILED, UNFINISHED, UNREADABLE
from ..runs.schema import KL
from .command import command, more_seeds, wider_rates
from .comparison import Comparison
from .contrasts import BEST_LR, CONTROLLED, EQUAL_KL, EQUAL_KL_MEAN, FRONTIER, LESS, LEVEL, MORE, SAME_LR, Contrast
from .rows import Row, best, format_rate
from .statistics import finite


SEEDS = 5
PRESET = "prm_noisy_labels"
_MISSING = {"PRM": (PRESET,), "AdamW": ("adamw", "adamw_eps:10")}
WORTH = 0.02  # a gain in accuracy that is worth another optimizer: below it, level is no sign of a difference


class Facts:
    """A comparison and what follows from it: what the conditions and the sentences of the cases speak of."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, self.rows, self.contrasts = comparison, comparison.rows, comparison.contrasts
        self.runs, self.measures, self.methods = comparison.runs, comparison.measures, comparison.methods()
        prm = comparison.methods(PRM)
        self.top = best(self.rows)
        # The most accurate row of PRM, and of AdamW with any eps.
        self.lead = best(row for rows in prm.values() for row in rows)
        baselines = comparison.methods(BASELINE)
        self.adamw = best(row for rows in baselines.values() for row in rows)
        self.prm_methods, self.lacks = len(prm), "PRM" if self.lead is None else "AdamW" if self.adamw is None else ""
        # Of each opponent of the lead the contrast that decides: its frontier, else its best learning rate.
        self.adamw_curve = comparison.baseline
        opponents = (self.adamw_curve, *comparison.rivals.values()) if self.lead else ()
        self.against = {rows[0].kind.label: self._deciding(rows) for rows in opponents if rows}
        adamws = {rows[0].kind.label for rows in baselines.values()}
        areas = {n: c for n, c in self.against.items() if n in adamws and c and c.kind == FRONTIER and c.known}
        # The AdamW that leaves the smallest gain.
        self.best_tuned = min(areas, key=lambda name: areas[name].interval.mean, default="")
        self.decides = areas.get(self.best_tuned)
        self.tries = {rows[0].kind.label: sum(bool(row.runs) for row in rows) for rows in self.methods.values()}
        self.seeds = [len(row.runs) for row in self.rows if row.runs]
        self.at_step = comparison.find(CONTROLLED, self.lead, "constant_q") if self.lead else None
        self.ceiling = best(row for rows in comparison.methods(CEILING).values() for row in rows)

    def _deciding(self, rows: list[Row]) -> Contrast | None:
        """The contrast that says how the lead's method stands beside another: none where they share no seed."""
        method = rows[0].method
        found = [
            c
            for c in self.contrasts
            if c.left.method == self.lead.method
            and (rows is self.adamw_curve if c.right is None else c.right.method == method)
        ]
        known = [c for kind in (FRONTIER, BEST_LR) for c in found if c.kind == kind and c.known]
        return next(iter(known), next(iter(found), None)) if method != self.lead.method else None

    @property
    def standing(self) -> str:
        """`ahead of AdamW, level with AdamW eps 10`: every opponent is named."""
        words = {MORE: "ahead of", LEVEL: "level with", LESS: "behind", "": "not known to be ahead of"}
        names = {key: [] for key in words}
        for name, contrast in self.against.items():
            names[contrast.verdict if contrast and contrast.known else ""].append(name)
        return ", ".join(f"{word} {' and '.join(names[key])}" for key, word in words.items() if names[key])

    @property
    def number(self) -> str:
        """The number that decides, for people."""
        return f"{self.decides.text} accuracy beside {self.best_tuned} at equal KL"

    @property
    def points(self) -> float:
        """Of 100 held-out examples, how many more the lead has right than the best row of AdamW."""
        return 100 * (self.lead.accuracy - self.adamw.accuracy)

    @property
    def cost(self) -> float:
        """Of 100 held-out examples, how many fewer AdamW has right than with clean labels."""
        return 100 * (self.ceiling.accuracy - self.adamw.accuracy)

    @property
    def unequal(self) -> str:
        """Where PRM had more learning rates than the AdamW that it is ahead of, how many each had."""
        mine, theirs = self.tries[self.lead.name], self.tries.get(self.best_tuned, 0)
        return f"{mine} learning rates against {theirs}" if mine > theirs else ""


class Case(NamedTuple):
    """A sentence that is said where `holds` returns something that is true.

    It is formatted with the facts as `f` and with what `holds` returned as `it`, the items of a list joined.
    """

    key: str
    holds: Callable[[Any], Any]
    sentence: str


# The first one that holds of each of these three tables is a line of the verdict.
ANSWERS = (
    Case("no_accuracy", lambda f: f.top is None, "No answer: no run has {f.measures.accuracy}."),
    Case("without", lambda f: f.lacks, "No answer: there is no run of {it} to compare with."),
    Case(
        "no_area",
        lambda f: f.decides is None and _why_no_area(f),
        "Not at this size: {f.lead.name} is {f.standing} at best rates, where steps differ in size. {it}",
    ),
    Case(
        "unequal",
        lambda f: f.decides.verdict == MORE and f.unequal,
        "Not at this size: {f.lead.name} is {f.standing}, {f.number}, but had {it}.",
    ),
    Case("yes", lambda f: f.decides.verdict == MORE, "Yes: {f.lead.name} is {f.standing}: {f.number}."),
    Case("behind", lambda f: f.decides.verdict == LESS, "No sign of it: {f.lead.name} is {f.standing}: {f.number}."),
    Case(
        "no_sign",
        lambda f: f.decides.interval.high < WORTH,
        "No sign of it: {f.lead.name} is {f.standing}: {f.number}.",
    ),
    Case("unsure", lambda f: True, "Not at this size: {f.lead.name} is {f.standing}: {f.number}."),
)
MEANINGS = (
    Case("none", lambda f: f.lacks or f.top is None, ""),
    Case(
        "free",
        lambda f: f.ceiling and f.cost <= 0,
        "Wrong labels cost AdamW nothing here: {f.adamw.accuracy:.3f} with them, {f.ceiling.accuracy:.3f} without.",
    ),
    Case(
        "loses",
        lambda f: f.ceiling and f.points < 0 and -f.points,
        "At its best rate it loses {it:.1f} points more than the {f.cost:.1f} that wrong labels cost AdamW.",
    ),
    Case(
        "gives_back",
        lambda f: f.ceiling,
        "At its best rate it gives back {f.points:.1f} of the {f.cost:.1f} points that wrong labels cost AdamW.",
    ),
    Case(
        "more",
        lambda f: f.decides and f.decides.verdict == MORE and 100 * f.decides.interval.mean,
        "Of 100 {f.measures.examples} it has {it:.1f} more right at the same drift from the reference.",
    ),
    Case(
        "between",
        lambda f: f.decides and tuple(f"{100 * x:+.1f}" for x in (f.decides.interval.low, f.decides.interval.high)),
        "Of 100 {f.measures.examples} it has between {it[0]} and {it[1]} more right at the same drift.",
    ),
    Case(
        "at_best",
        lambda f: True,
        "At their best rates it has {f.points:+.1f} of 100 {f.measures.examples} more right, at another drift.",
    ),
)
# The next command, in words.
NEXT = (
    Case("none", lambda f: not command(f.comparison), ""),
    Case(
        "methods",
        lambda f: f.lacks and command(f.comparison, methods=[*f.methods, *_MISSING[f.lacks]]),
        "Next, with {f.lacks}: {it}",
    ),
    Case(
        "rates",
        lambda f: (f.decides is None or f.unequal or _edge_of(f)) and command(f.comparison, **_wider(f)),
        "Next, more learning rates: {it}",
    ),
    Case(
        "seeds",
        lambda f: min(f.seeds) < SEEDS and command(f.comparison, seeds=more_seeds(f.comparison, SEEDS)),
        "Next, more seeds: {it}",
    ),
    Case(
        "preset",
        lambda f: (
            f.decides.verdict != MORE
            and PRESET not in f.methods
            and command(f.comparison, methods=[*f.methods, PRESET])
        ),
        "Next, the preset: {it}",
    ),
    Case(
        "own", lambda f: f.decides.verdict == MORE, 'Next, in your training: PRMDPOConfig(prm_preset="noisy_labels")'
    ),
)
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
        lambda f: [text for rows in f.methods.values() if (text := _edge(rows))],
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
)


class Verdict(NamedTuple):
    """The answer: the key of its case among `ANSWERS`, and at most three lines."""

    answer: str
    lines: list[str]


def judge(comparison: Comparison) -> tuple[Verdict, dict[str, str]]:
    """The verdict, and by their keys the lost runs and the caveats that apply, which begin with their numbers."""
    facts = Facts(comparison)
    parts = [next(say(table, facts), ("", "")) for table in (ANSWERS, MEANINGS, NEXT)]
    lines = [text for _, text in parts if text]
    if lost := comparison.ended(DIVERGED):
        lines[0] += f" ({len(lost)} of {len(lost) + len(facts.runs)} runs diverged.)"
    numbers = {case.key: i for i, case in enumerate(CAVEATS, start=1)}
    caveats = {key: f"{numbers[key]}. {text}" for key, text in say(CAVEATS, facts)}
    return Verdict(parts[0][0], lines), {**dict(say(LOST, facts)), **caveats}


def say(cases: Iterable[Case], facts: Any) -> Iterator[tuple[str, str]]:
    """Key and sentence of each case that holds."""
    for case in cases:
        it = case.holds(facts)
        if it:
            yield case.key, case.sentence.format(f=facts, it="; ".join(it) if isinstance(it, list) else it)


def _why_no_area(f: Facts) -> str:
    """Why there is no number that decides."""
    contrast = f.against.get(f.adamw.kind.label) or next((c for c in f.against.values() if c), None)
    areas = [c for c in f.contrasts if c.kind == FRONTIER and c.left.method == f.lead.method and c.missing]
    if areas:
        return f"At equal KL: {areas[0].missing}."
    if contrast is not None and not contrast.known:
        return "No interval: that takes several seeds, or margins.json."
    return "A frontier takes two learning rates of both."


def _of(f: Facts, end: str) -> list[str]:
    return [f"{run.name} ({run.problem.removesuffix('.')})" for run in f.comparison.ended(end)]


def _edge_of(f: Facts) -> bool:
    """Whether the best rate of the lead's method, or of AdamW, is at the end of its grid."""
    return any(_edge(f.methods[row.method]) for row in (f.lead, f.adamw))


def _wider(f: Facts) -> dict[str, list[str]]:
    """The grids of both with a rate more at each end, and as many for both."""
    grids = {False: set(), True: set()}
    for row in f.rows:
        if row.learning_rate and row.source is None:
            grids[row.kind.has_mask].add(row.learning_rate)
    longest = max(map(len, grids.values()))
    found = {}
    for name, mask in (("learning_rates", False), ("prm_learning_rates", True)):
        rates = wider_rates(sorted(grids[mask] or grids[not mask]))
        while len(rates) < longest + 2:
            rates = wider_rates(list(map(float, rates)))[: longest + 2]
        found[name] = rates
    return found


def _drift(contrast: Contrast) -> str:
    left, right = (row.mean(KL)[0] for row in (contrast.left, contrast.right))
    ratio = f"{right / left:.1f} times that of" if finite(right) and left > 0 else "not known beside that of"
    return f"the KL of {contrast.right.label} is {ratio} {contrast.left.label}"


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


def _counts(contrasts: list[Contrast]) -> str:
    known, clear = sum(c.known for c in contrasts), [c for c in contrasts if c.clear]
    kept = sum(c.p_holm < 0.05 for c in clear)
    return f"{len(clear)} of {known} intervals miss 0, {kept} still after that"


def _has_kl(row: Row) -> bool:
    return finite(row.mean(KL)[0])
