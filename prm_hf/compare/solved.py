"""The problems that models solve: what share, and how much more than those of AdamW, best against best."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..runs.methods import BASELINE, CONTROL, PRM, REPAIRED
from ..runs.run import Run
from ..runs.schema import SOLVED, SOLVED_BEFORE
from .contrasts import SOLVED_BEST, Contrast, adjust, between, interval_of, stack
from .rows import Row, best
from .statistics import Interval, finite


if TYPE_CHECKING:
    from .comparison import Comparison


def share_solved(row: Row) -> Interval | None:
    """The share of problems that a row's models solve, with its interval over seeds and problems."""
    found = [solutions for run in row.runs if (solutions := run.solutions()) is not None]
    return interval_of(stack(found), [row], Run.solutions, (0.0, 1.0)) if found else None


def best_solvers(comparison: Comparison) -> list[Row]:
    """Of each method the row that solves the most, in the table's order; of none without such runs."""
    methods = [rows for rows in comparison.methods().values() if rows[0].group != CONTROL]
    return [top for rows in methods if (top := best(rows, SOLVED))]


def solved_contrasts(comparison: Comparison) -> list[Contrast]:
    """Each method minus AdamW, best against best; PRM and repaired labels minus the AdamW that solves the most, too.

    Holm's correction is over these contrasts alone.
    """
    solvers, adamw = best_solvers(comparison), best(comparison.baseline, SOLVED)
    strongest = best((row for row in solvers if row.group == BASELINE), SOLVED)
    found = []
    for row in solvers:
        rivals = [adamw, *([strongest] if row.group in (PRM, REPAIRED) and strongest is not adamw else [])]
        found += [between(SOLVED_BEST, row, rival, Run.solutions) for rival in rivals if rival and rival is not row]
    adjust(found)
    return found


def problems(comparison: Comparison) -> str:
    """How many problems there are and how many were solved before training, for people; empty without any."""
    runs = [run for run in comparison.runs if run.solutions() is not None]
    if not runs:
        return ""
    count = next((f"{run.solved.size} " for run in runs if run.solved is not None), "")
    before = {f"{share:.3f}" for run in runs if finite(share := run.metrics.get(SOLVED_BEFORE))}
    ends = " to ".join(sorted({min(before), max(before)})) if before else ""
    return f"the share of {count}problems that greedy decoding solves" + (f", {ends} before training" if ends else "")
