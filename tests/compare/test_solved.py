"""The problems that models solve, in the tables of a comparison."""

import json

import numpy as np
import pytest

from prm_hf.compare import compare_runs, format_comparison
from prm_hf.compare.contrasts import BEST_LR, FRONTIER
from prm_hf.compare.solved import best_solvers, share_solved
from prm_hf.compare.statistics import bootstrap_interval
from prm_hf.runs.read import load_runs

from .compared_runs import write_run


PROBLEMS = 60  # of 30 prompts
SHARES = {"adamw": 20, "adamw_eps:10": 26, "prm_rows": 32, "relabel:prm_rows": 35, "adamw_clean": 40, "cdpo": 14}


def add_problems(root, name, count, seed, before=0.2, groups=True):
    """The first problems, in an order that the seed shuffles a little, are solved."""
    order = np.argsort(np.arange(PROBLEMS) + np.random.default_rng(seed).normal(0, 4, PROBLEMS))
    solved = np.zeros(PROBLEMS, int)
    solved[order[:count]] = 1
    file = root / name / "margins.json"
    found = json.loads(file.read_text()) | {"solve": solved.tolist(), "solve_before": [0] * PROBLEMS}
    found |= {"solve_groups": [i // 2 for i in range(PROBLEMS)]} if groups else {}
    file.write_text(json.dumps(found))
    file = root / name / "metrics.json"
    shares = {"solve/accuracy": count / PROBLEMS, "solve/accuracy_before": before}
    file.write_text(json.dumps(json.loads(file.read_text()) | shares))


def write_problems(root, methods=SHARES, seeds=(0, 1, 2), **more):
    """Held-out accuracy is best at the first rate, problems are solved best at the second."""
    for method in methods:
        for seed in seeds:
            for lr, kl, accuracy, fewer in ((1e-3, 0.4, 0.75, 6), (1e-2, 1.6, 0.70, 0)):
                name = write_run(root, method, lr, seed, accuracy, kl)
                add_problems(root, name, methods[method] - fewer, seed, **more)


def test_each_method_beside_adamw_where_it_solves_the_most(tmp_path):
    write_problems(tmp_path)
    comparison = compare_runs(tmp_path)
    solvers = best_solvers(comparison)
    assert {(row.method, row.learning_rate) for row in solvers} == {(method, 1e-2) for method in SHARES}
    found = {(c.left.method, c.right.method): c for c in comparison.solved}
    assert set(found) == {
        *((method, "adamw") for method in SHARES if method != "adamw"),
        *((method, "adamw_eps:10") for method in ("prm_rows", "relabel:prm_rows")),  # the AdamW that solves the most
    }
    for (method, other), c in found.items():
        assert c.interval.mean == pytest.approx((SHARES[method] - SHARES[other]) / PROBLEMS)
        assert (c.interval.seeds, c.interval.examples, c.interval.groups) == (3, PROBLEMS, PROBLEMS // 2)
    assert (
        found["prm_rows", "adamw"].clear
        and found["prm_rows", "adamw"].p_holm >= found["prm_rows", "adamw"].interval.p_value
    )


def test_intervals_are_over_seeds_and_the_prompts_of_the_problems(tmp_path):
    write_problems(tmp_path, {"adamw": 20, "prm_rows": 32})
    row = best_solvers(compare_runs(tmp_path))[1]
    values, groups = np.stack([run.solved for run in row.runs]), np.arange(PROBLEMS) // 2
    expected = bootstrap_interval(values, groups, bounds=(0, 1))
    assert share_solved(row) == expected and expected.groups == PROBLEMS // 2
    assert expected != bootstrap_interval(values, bounds=(0, 1))
    # As many problems as held-out pairs do not get the groups of the pairs.
    for run in row.runs:
        run.heldout_groups = np.zeros(PROBLEMS, int)
    assert share_solved(row) == expected


def test_recovery_in_problems_solved(tmp_path):
    write_problems(tmp_path)
    comparison = compare_runs(tmp_path)
    found = {(r.kind, r.row.method): r for r in comparison.recoveries if r.in_solved}
    methods = set(SHARES) - {"adamw", "adamw_clean"}
    assert set(found) == {(kind, method) for kind in (BEST_LR, FRONTIER) for method in methods}
    best = found[BEST_LR, "prm_rows"]
    assert best.ratio.mean == pytest.approx(0.6) and best.ratio.groups == PROBLEMS // 2
    assert found[BEST_LR, "cdpo"].ratio.mean == pytest.approx(-0.3)
    at_kl = found[FRONTIER, "prm_rows"]
    assert at_kl.span == (0.4, 1.6) and at_kl.ratio.mean == pytest.approx(0.6)
    # That in accuracy is another one, and the verdict is about it.
    assert comparison.recovery(BEST_LR, best.row).ratio is None


def test_without_clean_labels_there_is_no_recovery(tmp_path):
    write_problems(tmp_path, {"adamw": 20, "prm_rows": 32})
    comparison = compare_runs(tmp_path)
    assert not comparison.recoveries and len(comparison.solved) == 1


def test_problems_solved_in_the_reports(tmp_path):
    write_problems(tmp_path)
    comparison = compare_runs(tmp_path)
    table = format_comparison(comparison)
    start = table.index("problems solved by")
    lines = table[start:].splitlines()
    interval = share_solved(best_solvers(comparison)[0])
    assert (
        lines[2].split("  ")[0] == "AdamW at 1e-2" and f"0.333 [{interval.low:.3f}, {interval.high:.3f}]" in lines[2]
    )
    (prm, other) = [line for line in lines if line.startswith("PRM per_row at 1e-2")]
    assert "+0.200 [" in prm and "AdamW at 1e-2 (its best)" in prm and "+0.100 [" in other and "eps 10" in other
    assert "PRM per_row, in problems solved" in table and "0.60 [" in table
    caption = "solved: the share of 60 problems that greedy decoding solves, 0.200 before training."
    assert caption in table.replace("\n", " ")
    assert "solved [95 % interval]" not in table and "solved [95 % interval]" in format_comparison(
        comparison, verbose=True
    )
    assert max(len(line) for line in table.splitlines() if not line.startswith("prm-hf")) <= 120
    for format in ("markdown", "html"):
        text = format_comparison(comparison, format)
        assert "problems solved by" in text and f"0.333 [{interval.low:.3f}" in text.replace("\\", "")
        assert "0.200 before training" in text and "in problems solved" in text
    data = json.loads(format_comparison(comparison, "json"))
    assert [x["method"] for x in data["solved"]] == [row.method for row in comparison.rows[::2]]
    assert data["solved"][0]["share"]["mean"] == pytest.approx(1 / 3) and data["solved"][0]["before"] == pytest.approx(
        0.2
    )
    assert {x["kind"] for x in data["solved_contrasts"]} == {"problems solved, best learning rates"}
    assert {x["measure"] for x in data["recoveries"]} == {"accuracy", "problems solved"}


def test_shares_alone_and_runs_without(tmp_path):
    """Only some runs have problems, and none of them says which: intervals are over seeds."""
    write_problems(tmp_path, {"adamw": 20, "prm_rows": 32}, groups=False)
    write_run(tmp_path, "ipo", 1e-3, 0, 0.7, 0.4)
    comparison = compare_runs(tmp_path)
    assert [row.method for row in best_solvers(comparison)] == ["adamw", "prm_rows"]
    assert comparison.solved[0].interval.groups == PROBLEMS
    for folder in tmp_path.iterdir():
        margins = json.loads((folder / "margins.json").read_text())
        (folder / "margins.json").write_text(json.dumps({"heldout": margins["heldout"]}))
    (contrast,) = compare_runs(tmp_path).solved
    assert contrast.interval.mean == pytest.approx(0.2) and contrast.interval.examples == 1
    (ipo,) = [x for x in format_comparison(comparison, verbose=True).splitlines() if x.startswith("IPO")][1:2]
    assert ipo.split() == ["IPO", "1e-3", "-"]
    write_run(tmp_path / "none", "adamw", 1e-3, 0, 0.7, 0.4)
    for format in ("table", "markdown", "json"):
        assert "solved" not in format_comparison(compare_runs(tmp_path / "none"), format)


@pytest.mark.parametrize(
    ("margins", "problem"),
    [
        ({"solve": [0, 2]}, "'solve' must be a list of 0 and 1"),
        ({"solve": ["x"]}, "'solve' must be a list of numbers"),
        ({"solve": [0, 1], "solve_groups": [0]}, "'solve_groups' must be one for each of the 2 numbers of 'solve'"),
        ({"solve": [0, 1], "solve_groups": [0, 0.5]}, "'solve_groups' must be a list of whole numbers"),
    ],
)
def test_wrong_files_are_named(tmp_path, margins, problem):
    name = write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    write_run(tmp_path, "adamw", 1e-2, 0, 0.7, 0.4)
    (tmp_path / name / "margins.json").write_text(json.dumps(margins))
    (lost,) = [run for run in load_runs(tmp_path) if run.end == "unreadable"]
    assert problem in lost.problem and "margins.json" in lost.problem
