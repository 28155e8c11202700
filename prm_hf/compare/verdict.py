"""What a comparison shows: a verdict of at most three short lines, each from a table of cases.

The number that decides is the frontier area of the PRM method at equal KL, minus that of the AdamW that PRM is least
known to be ahead of: no learning rate is picked for it. No method is called better where the 95 % interval of the
difference holds 0, or where there is no interval.

It is about PRM on the labels as they are. A method that repairs labels and trains again costs several trainings, and
is no opponent: it is named where it is known to be ahead of PRM.
"""

from __future__ import annotations

from typing import NamedTuple

from ..runs.methods import BASELINE, CEILING, PRM, REPAIRED
from ..runs.run import DIVERGED
from .command import command, more_seeds, options, wider_rates
from .comparison import Comparison
from .contrasts import BEST_LR, CONTROLLED, FRONTIER, LESS, LEVEL, MORE, Contrast
from .findings import CAVEATS, LOST, Case, edge_of, say
from .recovery import Recovery
from .rows import Row, best
from .statistics import Interval


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
        # The AdamW that PRM is least known to be ahead of.
        self.nearest = min(areas, key=lambda name: areas[name].interval.low, default="")
        self.decides = areas.get(self.nearest)
        # The AdamWs that PRM is not known to be ahead of.
        self.unbeaten = [name for name in self.against if name in adamws and not _is_ahead(self.against[name])]
        self.tries = {rows[0].kind.label: len(rows) for rows in self.methods.values()}
        self.seeds = [len(row.runs) for row in self.rows if row.runs]
        self.at_step = comparison.find(CONTROLLED, self.lead, "constant_q") if self.lead else None
        # What wrong labels cost is told by AdamW as it is, with and without them.
        self.plain = best(self.adamw_curve) or self.adamw
        self.ceiling = best(row for rows in comparison.methods(CEILING).values() for row in rows)
        # What PRM and the best-tuned AdamW give back of it.
        leads = (row and comparison.recovery(BEST_LR, row) for row in (self.lead, self.adamw))
        self.back, self.adamw_back = (found if found and found.gain else None for found in leads)
        # The most accurate method with repaired labels that is known to be ahead of the lead.
        repaired = comparison.methods(REPAIRED).values() if self.lead else ()
        known = {best(rows): c for rows in repaired if best(rows) and (c := self._deciding(rows)) and c.known}
        self.repaired = best(row for row, c in known.items() if c.verdict == LESS)
        self.ahead_by = known.get(self.repaired)

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
    def ranked(self) -> list[tuple[str, str]]:
        """Of each opponent the words for how the lead stands beside it, and its name; the strongest first."""
        words = {LESS: "behind", "": "not known to be ahead of", LEVEL: "level with", MORE: "ahead of"}
        order, found = [*words], []
        for name, contrast in self.against.items():
            key = contrast.verdict if contrast and contrast.known else ""
            found.append((order.index(key), contrast.interval.mean if key else 0.0, words[key], name))
        return [entry[2:] for entry in sorted(found, key=lambda entry: entry[:2])]

    @property
    def standing(self) -> str:
        """`level with AdamW eps 10, ahead of AdamW`: the strongest one is named, more than two are counted."""
        return _in_short(self.ranked)

    @property
    def decision(self) -> str:
        """`level with AdamW eps 10 at equal KL, +0.010 [-0.008, +0.028]`, and how it stands beside the others."""
        ((words, name),) = [entry for entry in self.ranked if entry[1] == self.nearest]
        others = [entry for entry in self.ranked if entry[1] != self.nearest]
        rest = f"; {_in_short(others)}" if others else ""
        return f"{words} {name} at equal KL, {self.decides.text}{rest}"

    @property
    def points(self) -> str:
        """Of the points in accuracy that wrong labels cost AdamW, in 100 held-out examples, those that the lead gives
        back at its best rate, and those that the best-tuned AdamW does, where that is another.
        """
        words, other = _given_back(self.back), self.adamw_back
        if other is None:
            return words
        if other.ratio is None or not other.ratio.low > 0:
            return f"{words}; {self.adamw.name} is not known to"
        gain, cost = other.gain.mean, other.cost.mean
        return f"{words}, and {self.adamw.name} {'all' if gain > cost else f'{100 * gain:.1f}'}"

    @property
    def better_repaired(self) -> str:
        """By how much the best method with repaired labels is ahead of the lead, and what it gives back."""
        contrast, interval = self.ahead_by, self.ahead_by.interval
        found = self.comparison.recovery(BEST_LR, self.repaired)
        where = "at equal KL" if contrast.kind == FRONTIER else "at best rates"
        ends = f"{-interval.mean:+.3f} [{-interval.high:+.3f}, {-interval.low:+.3f}]"
        back = f", and gives back {_given_back(found)}" if found and found.ratio and found.ratio.low > 0 else ""
        return f"{self.repaired.name} is ahead of it {where}, {ends}{back}"

    @property
    def unequal(self) -> str:
        """Where PRM had more learning rates than the AdamW that it is ahead of, how many each had."""
        mine, theirs = self.tries[self.lead.name], self.tries.get(self.nearest, 0)
        return f"{mine} learning rates against {theirs}" if mine > theirs else ""


# The first one that holds of each of these three tables is a line of the verdict.
ANSWERS = (
    Case("no_accuracy", lambda f: f.top is None, "No answer: no run has {f.measures.accuracy}."),
    Case("without", lambda f: f.lacks, "No answer: there is no run of {it} to compare with."),
    Case(
        "no_area",
        lambda f: f.decides is None and _why_no_area(f),
        "Not at this size: {f.lead.name} is {f.standing} at best rates. {it}",
    ),
    Case(
        "unbeaten",
        lambda f: f.decides.verdict == MORE and f.unbeaten and _counted(f.unbeaten, "AdamWs"),
        "Not at this size: {f.lead.name} is {f.decision}. No frontier beside {it}.",
    ),
    Case(
        "unequal",
        lambda f: f.decides.verdict == MORE and f.unequal,
        "Not at this size: {f.lead.name} is {f.decision}, but had {it}.",
    ),
    Case("yes", lambda f: f.decides.verdict == MORE, "Yes: {f.lead.name} is {f.decision}."),
    Case("behind", lambda f: f.decides.verdict == LESS, "No sign of it: {f.lead.name} is {f.decision}."),
    Case(
        "no_sign",
        lambda f: f.decides.interval.high < WORTH,
        "No sign of it: {f.lead.name} is {f.decision}.",
    ),
    Case("unsure", lambda f: True, "Not at this size: {f.lead.name} is {f.decision}."),
)
MEANINGS = (
    Case("none", lambda f: f.lacks or f.top is None, ""),
    Case("repaired", lambda f: f.repaired, "{f.better_repaired}."),
    Case(
        "free",
        lambda f: f.back and f.back.cost.known and f.back.cost.high <= 0,
        "Wrong labels cost AdamW nothing here: {f.plain.accuracy:.3f} with them, {f.ceiling.accuracy:.3f} without.",
    ),
    Case(
        "cost_unknown",
        lambda f: f.back and f.back.ratio is None and (_in_points(f.back.cost),),
        "What wrong labels cost AdamW is not known: {it[0]}.",
    ),
    Case(
        "back_unknown",
        lambda f: f.back and not _is_off_0(f.back.ratio) and (100 * f.back.cost.mean,),
        "At its best rate it is not known to give back any of the {it[0]:.1f} points that wrong labels cost AdamW.",
    ),
    Case(
        "loses",
        lambda f: f.back and f.back.ratio.high < 0 and (-100 * f.back.gain.mean, 100 * f.back.cost.mean),
        "At its best rate it loses {it[0]:.1f} points more than the {it[1]:.1f} that wrong labels cost AdamW.",
    ),
    Case("gives_back", lambda f: f.back, "At its best rate it gives back {f.points}."),
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
        lambda f: (100 * (f.lead.accuracy - f.adamw.accuracy),),
        "At their best rates it has {it[0]:+.1f} of 100 {f.measures.examples} more right, at another drift.",
    ),
)
# What to do next: what to add to the command of these runs, if there is one.
NEXT = (
    Case("none", lambda f: not command(f.comparison), ""),
    Case(
        "methods",
        lambda f: f.lacks and options(methods=[*f.methods, *_MISSING[f.lacks]]),
        "Next, with {f.lacks}; add to the same command: {it}",
    ),
    Case(
        "rates",
        lambda f: _lacks_rates(f) and options(**_wider(f)),
        "Next, more learning rates; add to the same command: {it}",
    ),
    Case(
        "seeds",
        lambda f: min(f.seeds) < SEEDS and options(seeds=more_seeds(f.comparison, SEEDS)),
        "Next, more seeds; add to the same command: {it}",
    ),
    Case(
        "preset",
        lambda f: f.decides.verdict != MORE and PRESET not in f.methods and options(methods=[*f.methods, PRESET]),
        "Next, the preset; add to the same command: {it}",
    ),
    Case("own", lambda f: f.decides.verdict == MORE and _configuration(f), "Next, in your own training: {it}"),
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


def _in_short(ranked: list[tuple[str, str]]) -> str:
    """How the lead stands beside opponents, the strongest first: its name, that of another one, or how many others."""
    (words, name), *others = ranked
    if not others:
        return f"{words} {name}"
    ahead = sum(other == "ahead of" for other, _ in others)
    if len(others) == 1:
        ((other, second),) = others
        return f"{words} {name} and {second}" if other == words else f"{words} {name}, {other} {second}"
    if words == "ahead of":
        return f"{words} {name} and {len(others)} others"
    return f"{words} {name}, ahead of {ahead or 'none'} of {len(others)} others"


def _counted(names: list[str], many: str) -> str:
    """One name, or how many there are."""
    return names[0] if len(names) == 1 else f"{len(names)} {many}"


def _given_back(found: Recovery) -> str:
    """`6.0 of the 10.0 points that wrong labels cost AdamW`."""
    gain, cost = (100 * interval.mean for interval in (found.gain, found.cost))
    words = "points that wrong labels cost AdamW"
    return f"all {cost:.1f} {words}" if gain > cost else f"{gain:.1f} of the {cost:.1f} {words}"


def _is_off_0(interval: Interval) -> bool:
    return interval.known and (interval.low > 0 or interval.high < 0)


def _in_points(interval: Interval) -> str:
    """An interval of accuracies for people."""
    if not interval.known:
        return "there is no interval"
    return f"between {100 * interval.low:+.1f} and {100 * interval.high:+.1f} points"


def _is_ahead(contrast: Contrast | None) -> bool:
    return contrast is not None and contrast.known and contrast.verdict == MORE


def _why_no_area(f: Facts) -> str:
    """Why there is no number that decides."""
    contrast = f.against.get(f.adamw.kind.label) or next((c for c in f.against.values() if c), None)
    areas = [c for c in f.contrasts if c.kind == FRONTIER and c.left.method == f.lead.method and c.missing]
    if areas:
        return f"At equal KL: {areas[0].missing}."
    if contrast is not None and not contrast.known:
        return "No interval: that takes several seeds, or margins.json."
    return "A frontier takes two learning rates of both."


def _lacks_rates(f: Facts) -> bool:
    """Whether more learning rates could tell: no frontier, an unequal grid, or a best rate at the end of its grid."""
    if f.decides is None or f.unequal or (f.decides.verdict == MORE and f.unbeaten):
        return True
    return any(edge_of(f.methods[row.method]) for row in (f.lead, f.adamw))


def _wider(f: Facts) -> dict[str, list[str]]:
    """More extensions of the grids; of runs of version 0.1, or without a curve, a rate more at each end of both."""
    if f.decides is not None and "command" in f.runs[0].info:
        return {"max_extensions": ["6"]}
    grids = {False: set(), True: set()}
    for row in f.rows:
        if row.learning_rate and row.source is None:
            grids[row.kind.has_mask].add(row.learning_rate)
    longest = max(map(len, grids.values()))
    if not longest:
        return {}
    found = {}
    for name, mask in (("learning_rates", False), ("prm_learning_rates", True)):
        rates = wider_rates(sorted(grids[mask] or grids[not mask]))
        while len(rates) < longest + 2:
            rates = wider_rates(list(map(float, rates)))[: longest + 2]
        found[name] = rates
    return found


def _configuration(f: Facts) -> str:
    """The arguments of a training configuration that make the lead's optimizer."""
    config = {"preferences": "PRMDPOConfig", "sft": "PRMSFTConfig"}.get(f.runs[0].info.get("task", "preferences"))
    arguments = {**(f.lead.kind.changes() or {}), "learning_rate": f.lead.learning_rate}
    return f"{config}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" if config else ""
