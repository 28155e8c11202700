"""What is compared: the rows of a comparison, its contrasts, and the runs that have no numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from ..runs.comparable import Difference, differences_between, group_comparable
from ..runs.methods import BASELINE, LOSS, OTHER
from ..runs.run import DIVERGED, FINISHED, UNFINISHED, Run
from ..runs.schema import Measures
from .contrasts import RATE_CONTROLS, Contrast, adjust, frontier_contrasts, row_contrasts
from .recovery import Recovery, find_recoveries
from .rows import Row, format_rate, make_rows, row_key
from .simplicity import SimplicityContrast, simplicity_contrasts
from .solved import solved_contrasts


WAY_OUT = "Give the folders of one experiment at a time, or train the runs with the same settings."


@dataclass(eq=False)
class Comparison:
    """The result of a comparison: rows in the order of the table, contrasts, and runs.

    Attributes:
        runs: the finished ones, whose numbers count.
        lost: those that diverged, failed, are unfinished or cannot be read.
        recoveries: what each method gives back of what wrong labels cost AdamW; none without `adamw_clean`.
        solved: differences in problems solved, where runs have them.
        simplicity: differences in effective dimension and certified accuracy, likewise.
        apart: where several experiments were given, in what the runs of this one differ from those of the first.
        answer: the key of the answer among `verdict.ANSWERS`.
        verdict: its lines, at most three.
        findings: lost runs and caveats, as sentences by the keys of their cases in `findings.py`.
    """

    rows: list[Row]
    contrasts: list[Contrast]
    runs: list[Run]
    lost: list[Run] = field(default_factory=list)
    recoveries: list[Recovery] = field(default_factory=list)
    solved: list[Contrast] = field(default_factory=list)
    simplicity: list[SimplicityContrast] = field(default_factory=list)
    apart: list[Difference] = field(default_factory=list)
    answer: str = ""
    verdict: list[str] = field(default_factory=list)
    findings: dict[str, str] = field(default_factory=dict)

    @property
    def statements(self) -> list[str]:
        """The lines of the verdict and the sentences of `findings`."""
        return [*self.verdict, *self.findings.values()]

    @property
    def unfinished(self) -> list[Run]:
        return self.ended(UNFINISHED)

    def ended(self, end: str) -> list[Run]:
        """The lost runs that ended so, as `runs.run.ENDS` has it."""
        return [run for run in self.lost if run.end == end]

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
        """Rows by method of all but PRM, AdamW, controls of one run, and those with repaired or clean labels."""
        others = self.methods(BASELINE, LOSS, OTHER)
        return {method: rows for method, rows in others.items() if rows != self.baseline}

    @property
    def curve(self) -> list[Row]:
        """The rows whose runs are points of AdamW's curve: its own, and controls that are AdamW at another rate."""
        controls = [row for row in self.rows if row.method in RATE_CONTROLS]
        return [*self.baseline, *(c for c in controls if c.source is None or c.source.kind.baseline == "adamw")]

    def find(self, kind: str, left: Row, right: str | None = None) -> Contrast | None:
        """The first contrast of a row of that kind, which is that against AdamW; or against the method `right`."""
        found = [c for c in self.contrasts if c.kind == kind and c.left is left]
        return next((c for c in found if right is None or c.right.method == right), None)

    def recovery(self, kind: str, row: Row) -> Recovery | None:
        """That of a row's method, of a kind, in accuracy."""
        found = (r for r in self.recoveries if r.kind == kind and not r.in_solved)
        return next((r for r in found if r.row.method == row.method), None)


def build_comparison(runs: list[Run]) -> Comparison:
    """Rows and contrasts of `runs`, all of one experiment; `findings` are still empty.

    Raises:
        ValueError: no run is finished, or the runs cannot be compared: they differ in a setting that is not the
            method's own, or two runs have one method, learning rate and seed.
    """
    _check_task(runs)
    finished, diverged = ([run for run in runs if run.end == end] for end in (FINISHED, DIVERGED))
    lost = [run for run in runs if not run.finished]
    if not finished:
        ends = dict.fromkeys(run.end for run in lost)
        words = "; ".join(f"{end}: {', '.join(run.name for run in lost if run.end == end)}" for end in ends)
        raise ValueError(f"No finished run (one with metrics.json); {words or 'none at all'}.")
    groups = group_comparable([*finished, *diverged])
    if len(groups) > 1:
        raise ValueError(f"The runs differ in {_listed(differences_between(groups)[0])}. {WAY_OUT}")
    _check_unique([*finished, *diverged])
    # Runs that can be compared have the same held-out examples, and an older one did not record which belong together.
    groups = next((run.heldout_groups for run in finished if run.heldout_groups is not None), None)
    for run in finished:
        if run.heldout is not None:
            run.heldout_groups = groups
    comparison = Comparison(make_rows(finished, diverged), [], finished, lost)
    comparison.contrasts = [*row_contrasts(comparison), *frontier_contrasts(comparison)]
    comparison.recoveries, comparison.solved = find_recoveries(comparison), solved_contrasts(comparison)
    comparison.simplicity = simplicity_contrasts(comparison)
    adjust(comparison.contrasts)
    return comparison


def _check_task(runs: list[Run]) -> None:
    """Raises ValueError for runs whose measure is no accuracy."""
    for run in runs:
        if run.measures.threshold is not None:
            raise ValueError(
                f"{run.path} is judged by its steps to a threshold: the command that made it reports on such runs, "
                f"`{run.info.get('command', 'prm-hf')}`."
            )


def build_comparisons(runs: list[Run]) -> list[Comparison]:
    """A comparison for each experiment among `runs`; runs of one experiment differ in nothing but the methods' own.

    Raises:
        ValueError: as `build_comparison`; also where runs of one method differ from the others in their folder, which
            is no experiment of its own but a mistake.
    """
    groups = group_comparable(run for run in runs if run.end in (FINISHED, DIVERGED))
    if len(groups) < 2:
        return [build_comparison(runs)]
    folders = [{run.path.parent for run in group} for group in groups]
    apart = differences_between(groups)
    for i, group in enumerate(groups):
        beside = set().union(*(other for j, other in enumerate(folders) if j != i))
        if len({run.method for run in group}) < 2 and folders[i] & beside:
            raise ValueError(f"The runs differ in {_listed(apart[max(i - 1, 0)])}. {WAY_OUT}")
    for run in runs:
        if run.end not in (FINISHED, DIVERGED):
            home = [i for i, those in enumerate(folders) if run.path.parent in those] or [0]
            groups[home[0]].append(run)
    comparisons = [build_comparison(group) for group in groups]
    for comparison, differences in zip(comparisons[1:], apart, strict=True):
        comparison.apart = differences
    return comparisons


def _listed(differences: list[Difference]) -> str:
    more = f"; and in {len(differences) - 3} more settings" if len(differences) > 3 else ""
    return "; ".join(map(str, differences[:3])) + more


def _check_unique(runs: Iterable[Run]) -> None:
    seen: dict[tuple, Run] = {}
    for run in runs:
        rate = format_rate(run.learning_rate)
        other = seen.setdefault((*row_key(run), rate, run.seed), run)
        if other is not run:
            raise ValueError(
                f"{other.path} and {run.path} are both {run.method!r} at learning rate {rate} with seed {run.seed}. "
                "Leave one out, or tell them apart: by `method` in run.json, or for a Trainer by the folder's name."
            )
