"""What is compared with what: rows (method x learning rate) and contrasts (paired accuracy differences).

At one learning rate a mask q < 1 always drifts less, because it shrinks the step. So a PRM row is also set against
AdamW at its best learning rate, AdamW interpolated at the same KL, and AdamW with PRM's mean step (constant q); and a
method's whole curve against AdamW's, by the area under accuracy over log KL.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..runs.methods import BASELINE, GROUPS, LOSS, METHODS, OTHER, PRM, Method, find_method
from ..runs.read import Run
from ..runs.schema import KL, Measures
from . import statistics
from .statistics import Interval, finite


Outcomes = Callable[[Run], np.ndarray | None]  # of a run, one value an example or one in all
_RATE_CONTROLS = ("constant_q", "adamw_matched")  # AdamW at another learning rate
SAME_LR = "same learning rate"
BEST_LR = "best learning rates"
EQUAL_KL = "equal KL"
EQUAL_KL_MEAN = "equal KL, mean over learning rates"
FRONTIER = "frontier area"
CONTROLLED = "control"
MORE, LESS, LEVEL = "more accurate", "less accurate", "within noise"


def format_rate(rate: float | None) -> str:
    """`3e-3`, `2.5e-7`; `?` if unknown."""
    if rate is None:
        return "?"
    mantissa, exponent = f"{rate:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


@dataclass(eq=False)
class Row:
    """The runs of one method at one learning rate, one a seed.

    Attributes:
        learning_rate: that of the runs; the mean of them for `constant_q`, whose rate follows each run's mean mask.
        runs: sorted by seed.
        source: for a control such as `constant_q`, the row that it is the control of.
    """

    method: str
    learning_rate: float | None
    runs: list[Run]
    source: Row | None = None

    @property
    def kind(self) -> Method:
        return find_method(self.method)

    @property
    def group(self) -> str:
        return self.kind.group

    @property
    def measures(self) -> Measures:
        return self.runs[0].measures

    @property
    def name(self) -> str:
        return self.kind.label if self.source is None else f"{self.kind.label} of {self.source.kind.label}"

    @property
    def label(self) -> str:
        rate = self.learning_rate if self.source is None else self.source.learning_rate
        return f"{self.name} at {format_rate(rate)}" if rate is not None else self.name

    @property
    def accuracy(self) -> float:
        return self.mean(self.measures.accuracy)[0]

    def mean(self, name: str) -> tuple[float, float, int]:
        """Mean and standard error over seeds, and number of runs that have it; `"mean_q"` is the mean over the run."""
        values = [run.mean_q if name == "mean_q" else run.metrics.get(name) for run in self.runs]
        return statistics.mean_and_standard_error([value for value in values if value is not None])

    def accuracy_error(self) -> tuple[float, str]:
        """Standard error of the accuracy, and over what: `"seeds"`, with one seed `"examples"`, or `""` (unknown)."""
        accuracy, error, n = self.mean(self.measures.accuracy)
        if n > 1:
            return error, "seeds"
        examples = next((len(run.heldout) for run in self.runs if run.heldout is not None), 0)
        if n and examples and finite(accuracy):
            return statistics.proportion_standard_error(accuracy, examples), "examples"
        return math.nan, ""


@dataclass(eq=False)
class Contrast:
    """A paired accuracy difference, left minus right.

    Attributes:
        kind: one of the constants of this module, e.g. `"equal KL"`.
        right: the row it is judged against, or None where that is AdamW's whole curve; of another curve its best row.
        against: what it is judged against, for people.
        interval: the difference with its 95 % interval, or None where it cannot be had, for the reason `missing`.
        note: what limits it, a clause.
        p_holm: Holm's adjusted p-value among all contrasts of the comparison; NaN without an interval.
    """

    kind: str
    left: Row
    right: Row | None
    against: str
    interval: Interval | None = None
    note: str = ""
    missing: str = ""
    p_holm: float = math.nan

    @property
    def known(self) -> bool:
        return self.interval is not None and self.interval.known

    @property
    def verdict(self) -> str:
        """`MORE`, `LESS`, `LEVEL` (the interval holds 0) or `no interval`; or why the difference is unknown."""
        if not self.known:
            return self.missing or "no interval"
        return MORE if self.interval.low > 0 else LESS if self.interval.high < 0 else LEVEL

    @property
    def clear(self) -> bool:
        """Whether the interval leaves 0 out."""
        return self.verdict in (MORE, LESS)

    @property
    def judged(self) -> str:
        """The left side for people: a row, or the method where its whole curve is judged."""
        return self.left.name if self.kind in (EQUAL_KL_MEAN, FRONTIER) else self.left.label

    @property
    def text(self) -> str:
        """`+0.010 [-0.008, +0.028]`, or the difference alone, or `unknown`."""
        ends = f" [{self.interval.low:+.3f}, {self.interval.high:+.3f}]" if self.known else ""
        return f"{self.interval.mean:+.3f}{ends}" if self.interval else "unknown"


@dataclass(eq=False)
class Comparison:
    """The result of a comparison: rows in the order of the table, contrasts, and finished and unfinished runs.

    `findings` say what the numbers show and what they do not, as sentences by the keys of `findings.CASES`.
    """

    rows: list[Row]
    contrasts: list[Contrast]
    runs: list[Run]
    unfinished: list[Run] = field(default_factory=list)
    findings: dict[str, str] = field(default_factory=dict)

    @property
    def statements(self) -> list[str]:
        """The sentences of `findings`; the first one sums up."""
        return list(self.findings.values())

    @property
    def measures(self) -> Measures:
        return self.runs[0].measures

    def methods(self, *groups: str) -> dict[str, list[Row]]:
        """Rows by method, of the groups named (default: all), in the table's order."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            if not groups or row.group in groups:
                found.setdefault(row.method, []).append(row)
        return found

    @property
    def baseline(self) -> list[Row]:
        """AdamW's rows: those of `adamw`, else of the only method of the baseline group; else none."""
        methods = self.methods(BASELINE)
        if "adamw" in methods:
            return methods["adamw"]
        return next(iter(methods.values())) if len(methods) == 1 else []

    @property
    def rivals(self) -> dict[str, list[Row]]:
        """Rows by method of all that is neither PRM nor AdamW nor a control of one run."""
        others = self.methods(BASELINE, LOSS, OTHER)
        return {method: rows for method, rows in others.items() if rows != self.baseline}

    @property
    def curve(self) -> list[Row]:
        """The rows whose runs are points of AdamW's curve: its own, and controls that are AdamW at another rate."""
        controls = [row for row in self.rows if row.method in _RATE_CONTROLS]
        return [*self.baseline, *(c for c in controls if c.source is None or c.source.kind.baseline == "adamw")]

    def find(self, kind: str, left: Row, right: str | None = None) -> Contrast | None:
        """The first contrast of a row of that kind, which is that against AdamW; or against the method `right`."""
        found = [c for c in self.contrasts if c.kind == kind and c.left is left]
        return next((c for c in found if right is None or c.right.method == right), None)


def best(rows: Iterable[Row]) -> Row | None:
    """The row with the highest accuracy, of equal ones that with the smaller KL; None if no accuracy is known."""
    rows = [row for row in rows if finite(row.accuracy)]
    return max(rows, key=lambda row: (row.accuracy, -row.mean(KL)[0]), default=None)


def build_comparison(runs: list[Run]) -> Comparison:
    """Rows and contrasts of `runs`; `findings` are still empty.

    Raises:
        ValueError: no run is finished, or the runs cannot be compared: another data set, model or noise rate, another
            number of held-out examples, or two runs of one method, learning rate and seed.
    """
    finished = [run for run in runs if run.finished]
    unfinished = [run for run in runs if not run.finished]
    if not finished:
        names = ", ".join(run.name for run in unfinished) or "none"
        raise ValueError(f"No finished run (one with metrics.json); unfinished: {names}.")
    _check_comparable(finished)
    comparison = Comparison(_rows(finished), [], finished, unfinished)
    comparison.contrasts = [*_contrasts(comparison), *_frontier_contrasts(comparison)]
    adjusted = statistics.holm([c.interval.p_value if c.interval else math.nan for c in comparison.contrasts])
    for contrast, p in zip(comparison.contrasts, adjusted, strict=True):
        contrast.p_holm = p
    return comparison


def _check_comparable(runs: list[Run]) -> None:
    shared: dict[str, Callable[[Run], Any]] = {
        "what their accuracy is": lambda run: run.measures.accuracy,
        **{f"`{key}`": lambda run, key=key: run.info.get(key) for key in ("dataset", "model", "noise_rate")},
        f"the number of {runs[0].measures.examples}": lambda run: None if run.heldout is None else len(run.heldout),
    }
    for what, of in shared.items():
        known = [(of(run), run.name) for run in runs if of(run) is not None]
        for value, name in known:
            if value != known[0][0]:
                raise ValueError(
                    f"The runs differ in {what}: {known[0][0]!r} in {known[0][1]}, {value!r} in {name}. Pass the "
                    "folders of one experiment at a time."
                )
    seen: dict[tuple, Run] = {}
    for run in runs:
        rate = format_rate(run.learning_rate)
        other = seen.setdefault((*_row_key(run), rate, run.seed), run)
        if other is not run:
            raise ValueError(
                f"{other.path} and {run.path} are both {run.method!r} at learning rate {rate} with seed {run.seed}. "
                "Leave one out, or tell them apart: by `method` in run.json, or for a Trainer by the folder's name."
            )


def _row_key(run: Run) -> tuple[str, str]:
    """The method and the learning rate; of a control, whose rate follows its run, that run's name without the seed."""
    if run.control_of:
        return run.method, re.sub(r"[-_.]?seed[-_=]?\d+", "", run.control_of)
    return run.method, format_rate(run.learning_rate)


def _rows(runs: list[Run]) -> list[Row]:
    grouped: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        grouped.setdefault(_row_key(run), []).append(run)
    rows = {}
    for key, members in grouped.items():
        rates = [run.learning_rate for run in members]
        rate = rates[0] if len(set(map(format_rate, rates))) == 1 else float(np.mean(rates))
        rows[key] = Row(key[0], rate, sorted(members, key=lambda run: -1 if run.seed is None else run.seed))
    names = {run.name: rows[_row_key(run)] for run in runs}
    for row in rows.values():
        row.source = next((names[run.control_of] for run in row.runs if run.control_of in names), None)
    order = [*METHODS]

    def place(row: Row) -> tuple:
        number = order.index(row.kind.key) if row.kind.key in METHODS else len(order)
        return GROUPS.index(row.group), number, row.name, row.learning_rate or 0

    return sorted(rows.values(), key=place)


def _contrasts(comparison: Comparison) -> Iterator[Contrast]:
    """The contrasts of single rows."""
    baseline, curve, rivals = comparison.baseline, comparison.curve, comparison.rivals
    baseline_best, prm = best(baseline), comparison.methods(PRM)
    # Without PRM among the runs, the other methods are what AdamW is compared with.
    for rows in (prm or rivals).values() if baseline else ():
        lead = best(rows)
        if lead is None:
            continue
        same = [row for row in baseline if format_rate(row.learning_rate) == format_rate(lead.learning_rate)]
        yield from (_between(SAME_LR, lead, row) for row in same)
        if baseline_best is not None:
            yield _between(BEST_LR, lead, baseline_best)
        at_kl = [_at_equal_kl(EQUAL_KL, [row], curve) for row in (lead, *(r for r in rows if r is not lead))]
        yield from at_kl
        covered = [contrast.left for contrast in at_kl if contrast.interval]
        if len(covered) > 1:
            yield _at_equal_kl(EQUAL_KL_MEAN, covered, curve)
    yield from (_between(CONTROLLED, row.source, row) for row in comparison.rows if row.source is not None)
    lead = best(row for rows in prm.values() for row in rows)
    if lead is None and not baseline:
        lead = best(comparison.rows)
    if lead is not None:
        for method, rows in rivals.items():
            rival = best(rows)
            if rival is not None and method != lead.method:
                yield _between(BEST_LR, lead, rival)


def _frontier_contrasts(comparison: Comparison) -> list[Contrast]:
    """The area of each method's curve against AdamW's, and of each PRM method's against the best of the rivals'."""
    if not comparison.baseline:
        return []
    rivals, prm = comparison.rivals, comparison.methods(PRM)
    contrasts = [_areas(rows, comparison.curve) for rows in (*prm.values(), *rivals.values()) if len(rows) > 1]
    ranked = [(c.interval.mean, c.left.method) for c in contrasts if c.interval and c.left.method in rivals]
    if ranked:
        strongest = rivals[max(ranked)[1]]
        contrasts += [_areas(rows, strongest, best(strongest)) for rows in prm.values() if len(rows) > 1]
    return contrasts


def _areas(rows: list[Row], curve: list[Row], right: Row | None = None) -> Contrast:
    """Mean accuracy over log KL, of one method minus another, over the range of KL that both curves cover."""
    against = f"{curve[0].kind.label}, frontier area"
    found = frontier_difference(rows, curve)
    if isinstance(found, str):
        return Contrast(FRONTIER, rows[0], right, against, missing=found)
    interval, (low, high) = found
    note = f"over a range of KL of a factor of {high / low:.1f} only" if high / low < 2 else ""
    return Contrast(FRONTIER, rows[0], right, f"{against}, KL {low:.2g}-{high:.2g}", interval, note)


def frontier_difference(
    mine: list[Row], theirs: list[Row], outcomes: Outcomes = Run.outcomes
) -> tuple[Interval, tuple[float, float]] | str:
    """Mean over log KL of one curve minus another's, and the range of KL that both cover in every seed they share.

    Args:
        mine, theirs: the rows of each curve.
        outcomes: by default whether each held-out example is right.

    Returns:
        The interval over seeds and examples, and the range, nats a token; or why there is none.
    """
    seeds = dict.fromkeys(run.seed for row in mine for run in row.runs)
    pairs = [[_points(rows, seed, outcomes) for rows in (mine, theirs)] for seed in seeds]
    pairs = [both for both in pairs if min(map(len, both)) > 1]
    span = statistics.shared_range([_kls(runs) for both in pairs for runs in both])
    if span is None:
        return f"no {KL} range that both cover" if pairs else "no seed with two runs of both"
    differences = []
    for both in pairs:
        values = np.split(_stack([outcomes(run) for runs in both for run in runs]), [len(both[0])])
        areas = [statistics.mean_over_log_kl(_kls(runs), its, *span) for runs, its in zip(both, values, strict=True)]
        differences.append(np.subtract(*areas))
    return statistics.bootstrap_interval(_stack(differences)), span


def _kls(runs: list[Run]) -> np.ndarray:
    return np.array([run.metrics[KL] for run in runs])


def _points(rows: list[Row], seed: int | None, outcomes: Outcomes = Run.outcomes) -> list[Run]:
    """The runs of a seed that are points of the rows' curve: those with a KL and with outcomes."""
    runs = [run for row in rows for run in row.runs if run.seed == seed]
    return [run for run in runs if finite(run.metrics.get(KL)) and outcomes(run) is not None]


def _stack(outcomes: list[np.ndarray]) -> np.ndarray:
    """`[runs, examples]`, or `[runs, 1]` (the accuracies) if the examples of any run are not known."""
    if len({values.size for values in outcomes}) > 1:
        outcomes = [np.array([values.mean()]) for values in outcomes]
    return np.stack(outcomes)


def _between(kind: str, left: Row, right: Row) -> Contrast:
    """Left minus right over the seeds that both have."""
    of_right = {run.seed: run.outcomes() for run in right.runs}
    pairs = [(run.outcomes(), of_right.get(run.seed)) for run in left.runs]
    differences = [np.subtract(*_stack(pair)) for pair in pairs if not any(values is None for values in pair)]
    against = right.label
    if right.method in _RATE_CONTROLS:
        adamw = find_method(left.kind.baseline).label
        against = f"{right.kind.label} ({adamw} at {format_rate(right.learning_rate)})"
    else:
        against += {SAME_LR: " (same rate: a larger step)", BEST_LR: " (its best)"}.get(kind, "")
    if not differences:
        return Contrast(kind, left, right, against, missing="no shared seed")
    partly = len(differences) < max(len(left.runs), len(right.runs))
    note = f"over the {len(differences)} seed(s) that both have" if partly else ""
    return Contrast(kind, left, right, against, statistics.bootstrap_interval(_stack(differences)), note)


def _at_equal_kl(kind: str, rows: list[Row], baseline: list[Row]) -> Contrast:
    """Runs minus the baseline's curve of the same seed, read at each run's KL; several rows are averaged in a seed."""
    name = baseline[0].kind.label
    several = f", mean over {len(rows)} rates" if kind == EQUAL_KL_MEAN else ""
    contrast = Contrast(kind, rows[0], None, f"{name} at the same KL{several}")
    by_seed: dict[int | None, list[np.ndarray]] = defaultdict(list)
    lacking, ratios, notes = [], [], []
    for run in (run for row in rows for run in row.runs):
        curve = _points(baseline, run.seed)
        if not curve or run not in _points(rows, run.seed):
            continue
        kl, kls = run.metrics[KL], _kls(curve)
        outcomes, *points = _stack([other.outcomes() for other in (run, *curve)])
        matched = statistics.interpolate_at_kl(kls, np.stack(points), kl)
        if matched is None:
            lacking.append("larger" if kl > kls.max() else "smaller")
        else:
            ratios.append(statistics.bracket_ratio(kls, kl))
            by_seed[run.seed].append(outcomes - matched)
    if lacking:
        notes.append(
            f"the KL of {len(lacking)} of {len(lacking) + len(ratios)} runs lies outside that of all {name} runs, "
            f"where nothing is extrapolated: {name} lacks {' and '.join(sorted(set(lacking)))} rates"
        )
    if ratios:
        contrast.interval = statistics.bootstrap_interval(
            _stack([_stack(values).mean(axis=0) for values in by_seed.values()])
        )
        notes += [f"interpolated between KLs up to {max(ratios):.0f}-fold apart"] if max(ratios) > 4 else []
    else:
        extent = "much" if set(lacking) == {"larger"} else "little"
        contrast.missing = f"no {name} drifts so {extent}" if lacking else "no KL"
    contrast.note = "; ".join(notes)
    return contrast
