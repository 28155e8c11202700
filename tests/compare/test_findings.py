"""What a comparison is found to show: which cases hold, and the numbers in them, but not their words."""

import json
import shlex

import pytest

from prm_hf.compare import compare_runs, format_comparison, plots
from prm_hf.compare.command import command
from prm_hf.compare.contrasts import BEST_LR, FRONTIER
from prm_hf.compare.findings import CAVEATS, LOST
from prm_hf.compare.verdict import ANSWERS, MEANINGS, NEXT
from prm_hf.experiments.dpo import DPOExperiment

from .compared_runs import ACCURACY, contrast, write_grid, write_run


MANY = (0, 1, 2)
YES, NO, UNSURE = "Yes: ", "No sign of it: ", "Not at this size: "


def write_method(root, method, gain, seeds=MANY, **more):
    """At the KLs of AdamW in `write_grid`, more accurate by `gain`."""
    for seed in seeds:
        for lr, kl, accuracy in ((1e-4, 0.1, 0.70), (1e-3, 0.4, 0.75), (1e-2, 1.6, 0.65)):
            write_run(root, method, lr, seed, accuracy + gain, kl, **more)


@pytest.mark.parametrize(
    ("answer", "start", "grid"),
    [
        ("no_sign", NO, {"seeds": MANY, "prm_gain": 0.0}),
        ("behind", NO, {"seeds": MANY, "prm_gain": -0.1}),
        ("yes", YES, {"seeds": MANY, "prm_gain": 0.1}),
        ("yes", YES, {"seeds": MANY, "prm_gain": 0.1, "constant": 0.75}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_answers(tmp_path, answer, start, grid):
    write_grid(tmp_path, **grid)
    comparison = compare_runs(tmp_path)
    assert comparison.answer == answer and len(comparison.verdict) == 3
    line = comparison.verdict[0]
    decides = contrast(comparison, FRONTIER)
    assert line.startswith(start) and decides.text in line
    assert decides.interval.mean == pytest.approx(
        grid["prm_gain"], abs=0.005
    )  # constant q is a point of AdamW's curve
    text = format_comparison(comparison)
    assert text.startswith(f"{line}\n") and text.splitlines()[3] == ""


def test_an_interval_that_holds_much_is_no_answer(tmp_path):
    for seed, gain in enumerate((-0.08, 0.0, 0.1)):
        for lr, kl, accuracy in ((1e-4, 0.1, 0.70), (1e-3, 0.4, 0.75), (1e-2, 1.6, 0.65)):
            write_run(tmp_path, "adamw", lr, seed, accuracy, kl)
            write_run(tmp_path, "prm_per_tensor", lr, seed, accuracy + gain, kl)
    comparison = compare_runs(tmp_path)
    assert comparison.answer == "unsure" and comparison.verdict[0].startswith(UNSURE)
    ends = contrast(comparison, FRONTIER).interval
    assert f"{100 * ends.low:+.1f} and {100 * ends.high:+.1f}" in comparison.verdict[1]
    assert "--seeds 0 1 2 3 4" in comparison.verdict[2]


@pytest.mark.parametrize(
    ("rivals", "answer", "standing"),
    [
        ({"adamw_eps:10": 0.1}, "no_sign", "level with AdamW eps 10 at equal KL, {}; ahead of AdamW."),
        ({"adamw_eps:10": 0.2}, "behind", "behind AdamW eps 10 at equal KL, {}; ahead of AdamW."),
        ({"adamw_eps:10": 0.0}, "yes", "ahead of AdamW at equal KL, {}; ahead of AdamW eps 10."),
        ({"cdpo": 0.1}, "yes", "ahead of AdamW at equal KL, {}; level with cDPO."),
        (
            {"adamw_eps:10": 0.1, "cdpo": 0.0, "robust": 0.2},
            "no_sign",
            "level with AdamW eps 10 at equal KL, {}; behind rDPO (robust), ahead of 2 of 2 others.",
        ),
        (
            {"adamw_eps:10": 0.0, "cdpo": 0.1, "ipo": 0.2, "robust": 0.3, "casmo": 0.0},
            "yes",
            "ahead of AdamW at equal KL, {}; behind rDPO (robust), ahead of 2 of 4 others.",
        ),
        (
            {"cdpo": 0.0, "ipo": -0.1, "robust": -0.1},
            "yes",
            "ahead of AdamW at equal KL, {}; ahead of cDPO and 2 others.",
        ),
        ({"cdpo": -0.1, "ipo": 0.0}, "yes", "ahead of AdamW at equal KL, {}; ahead of IPO and cDPO."),
    ],
)
def test_the_strongest_adamw_decides_and_the_strongest_other_is_named(tmp_path, rivals, answer, standing):
    write_grid(tmp_path, seeds=MANY, prm_gain=0.1, constant=0.75)
    for method, gain in rivals.items():
        write_method(tmp_path, method, gain)
    comparison = compare_runs(tmp_path)
    before, after = standing.split("{}")
    line = comparison.verdict[0]
    assert comparison.answer == answer and f" is {before}" in line and line.endswith(after) and len(line) <= 145
    decides = "adamw_eps:10" if rivals.get("adamw_eps:10") else None
    (area,) = [
        c
        for c in comparison.contrasts
        if c.kind == FRONTIER and c.left.group == "PRM" and (c.right and c.right.method) == decides
    ]
    assert f"KL, {area.text};" in line


def test_an_opponent_without_a_shared_seed_is_named_too(tmp_path):
    write_grid(tmp_path, seeds=MANY, prm_gain=0.1, constant=0.75)
    write_method(tmp_path, "adamw_eps:10", 0.0, seeds=(7,))
    comparison = compare_runs(tmp_path)
    assert "; not known to be ahead of AdamW eps 10." in comparison.verdict[0]
    assert comparison.answer == "unbeaten"


def test_an_adamw_at_one_rate_that_is_as_good_is_no_win(tmp_path):
    """It has no frontier, and is compared at the best rates."""
    write_grid(tmp_path, seeds=MANY, prm_gain=0.1)
    for seed in MANY:
        write_run(tmp_path, "adamw_eps:10", 1e-3, seed, 0.85, 0.4)
    comparison = compare_runs(tmp_path)
    assert comparison.answer == "unbeaten" and "; level with AdamW eps 10. No frontier" in comparison.verdict[0]
    assert comparison.verdict[2].startswith("Next, more learning rates; add to the same command: --")


def test_more_learning_rates_than_adamw_are_no_win(tmp_path):
    write_grid(tmp_path, seeds=MANY, prm_gain=0.1)
    for seed in MANY:
        write_run(tmp_path, "prm_per_tensor", 3e-1, seed, 0.7, 1.0)
    comparison = compare_runs(tmp_path)
    assert comparison.answer == "unequal" and "4 learning rates against 3" in comparison.verdict[0]
    rates = comparison.verdict[2].split("--learning_rates ")[1].split(" --")
    assert len(rates[0].split()) == len(rates[1].split()[1:]) == 6


@pytest.mark.parametrize("runs", [((1e-3, 0.4),), ((1e-3, 0.02), (1e-2, 0.03)), ((1e-3, 1.5), (1e-2, 100.0))])
def test_without_a_frontier_there_is_no_answer(tmp_path, runs):
    """One rate; KLs that AdamW does not reach; a range of KL that is too short."""
    write_run(tmp_path, "adamw", 1e-3, 0, 0.6, 0.4)
    write_run(tmp_path, "adamw", 1e-2, 0, 0.6, 1.6)
    for lr, kl in runs:
        write_run(tmp_path, "prm_per_tensor", lr, 0, 0.8, kl)
    comparison = compare_runs(tmp_path)
    assert comparison.answer == "no_area" and comparison.verdict[0].startswith(UNSURE)
    assert "more learning rates" in comparison.verdict[2]


@pytest.mark.parametrize(
    ("prm", "clean", "meaning"),
    [
        (0.06, 0.1, "gives back 6.0 of the 10.0 points that wrong labels cost"),
        (-0.02, 0.1, "loses 2.0 points more than the 10.0 that wrong labels cost"),
        (0.06, -0.01, "cost AdamW nothing here: 0.750 with them, 0.740 without"),
        (0.06, None, "6.0 more right at the same drift"),
    ],
)
def test_what_it_means_to_the_reader(tmp_path, prm, clean, meaning):
    write_grid(tmp_path, seeds=MANY, prm_gain=prm)
    if clean is not None:
        write_method(tmp_path, "adamw_clean", clean, settings={"noise_rate": 0})
    assert meaning in compare_runs(tmp_path).verdict[1]


def write_uneven(root, method, gains):
    """As `write_method`, with another gain in each seed."""
    for seed, gain in enumerate(gains):
        write_method(root, method, gain, seeds=(seed,))


@pytest.mark.parametrize(
    ("prm", "clean", "meaning"),
    [
        # What wrong labels cost may be nothing.
        ((0.08, 0.06, 0.1), (-0.06, 0.04, 0.1), "What wrong labels cost AdamW is not known: between -"),
        ((-0.08, -0.06, -0.1), (-0.06, 0.04, 0.1), "What wrong labels cost AdamW is not known: between -"),
        # What is given back may be.
        ((-0.06, 0.02, 0.08), (0.1, 0.1, 0.1), "is not known to give back any of the 10.0 points that wrong labels"),
        ((0.02, -0.06, 0.02), (0.1, 0.1, 0.1), "is not known to give back any of the 10.0 points that wrong labels"),
        # More than the cost is all of it.
        ((0.14, 0.14, 0.14), (0.1, 0.1, 0.1), "At its best rate it gives back all 10.0 points that wrong labels cost"),
    ],
)
def test_points_are_claimed_where_the_recovery_is_known_alone(tmp_path, prm, clean, meaning):
    write_method(tmp_path, "adamw", 0.0)
    write_uneven(tmp_path, "prm_per_tensor", prm)
    write_uneven(tmp_path, "adamw_clean", clean)
    comparison = compare_runs(tmp_path)
    assert meaning in comparison.verdict[1] and len(comparison.verdict) == 3
    ratio = comparison.recovery(BEST_LR, comparison.methods("PRM")["prm_per_tensor"][0]).ratio
    claims = "gives back" in comparison.verdict[1].replace("known to give back", "")
    assert claims == (ratio is not None and ratio.low > 0)


def test_what_the_best_tuned_adamw_gives_back_is_claimed_where_it_is_known(tmp_path):
    write_grid(tmp_path, seeds=MANY, prm_gain=0.06)
    write_uneven(tmp_path, "adamw_eps:10", (-0.08, 0.04, 0.1))
    write_method(tmp_path, "adamw_clean", 0.1)
    assert (
        compare_runs(tmp_path)
        .verdict[1]
        .endswith("6.0 of the 10.0 points that wrong labels cost AdamW; AdamW eps 10 is not known to.")
    )


REPAIRED = ("relabel:prm_rows_eps:10", "filter:prm_rows_eps:10", "soft:adamw", "relabel:adamw_eps:10+prm_rows")


@pytest.mark.slow
@pytest.mark.parametrize("gain", [-0.1, 0.05, 0.2])
def test_repaired_labels_are_no_opponent_and_are_named_where_they_are_ahead(tmp_path, gain):
    write_grid(tmp_path, seeds=MANY, prm_gain=0.05)
    write_method(tmp_path, "adamw_clean", 0.25)
    before = compare_runs(tmp_path)
    for i, method in enumerate(REPAIRED):
        write_method(tmp_path, method, gain - i / 100)
    comparison = compare_runs(tmp_path)
    assert (comparison.answer, comparison.verdict[0]) == (before.answer, before.verdict[0])
    assert len(comparison.verdict) == 3 and max(map(len, comparison.verdict[:2])) <= 160
    if gain < 0.1:
        assert comparison.verdict[1] == before.verdict[1]
        return
    line = comparison.verdict[1]
    ahead = next(c for c in comparison.contrasts if c.kind == FRONTIER and c.right and c.right.method == REPAIRED[0])
    assert line.startswith("relabel (PRM per_row eps 10) is ahead of it at equal KL, +0.150 [+0.1")
    assert f"[{-ahead.interval.high:+.3f}, {-ahead.interval.low:+.3f}]" in line
    assert line.endswith(", and gives back 20.0 of the 25.0 points that wrong labels cost AdamW.")


@pytest.mark.slow
def test_a_verdict_is_short_however_many_methods_there_are(tmp_path):
    """Names of ours: two lines of a console at most, before the command."""
    write_grid(tmp_path, seeds=MANY, prm=("prm_rows_eps:10",))
    others = ("adamw_eps:10", "adamw_eps:3", "cautious", "cdpo", "robust", "ipo", "beta:0.3", "trimmed:0.2", "drdpo:1")
    for i, method in enumerate((*others, *REPAIRED, "early_stopping_clean", "adamw_clean")):
        write_method(tmp_path, method, (i - 5) / 100)
    comparison = compare_runs(tmp_path)
    assert len(comparison.verdict) == 3 and max(map(len, comparison.verdict[:2])) <= 160
    verdict, command, table, *_ = format_comparison(comparison).split("\n\n")
    assert command.startswith("--") and table.startswith("method") and len(verdict.splitlines()) <= 5


def test_what_the_best_tuned_adamw_gives_back_is_said(tmp_path):
    write_grid(tmp_path, seeds=MANY, prm_gain=0.06)
    write_method(tmp_path, "adamw_eps:10", 0.02)
    write_method(tmp_path, "adamw_clean", 0.1)
    assert "gives back 6.0 of the 10.0 points" in compare_runs(tmp_path).verdict[1]
    assert compare_runs(tmp_path).verdict[1].endswith("AdamW, and AdamW eps 10 2.0.")


def test_the_next_command(tmp_path):
    write_grid(tmp_path, seeds=range(5), prm_gain=0.1, prm=("prm_rows_eps:10",))
    configuration = compare_runs(tmp_path).verdict[2]
    assert configuration.startswith("Next, in your own training: PRMDPOConfig(prm_reduction='per_row', ")
    assert "relative_eps=10.0, learning_rate=0.01)" in configuration


def test_the_command_of_own_data(tmp_path):
    own = {"dataset": "my pairs.jsonl", "model": "tiny"}
    settings = {"num_train_epochs": 2, "max_steps": -1, "beta": 0.1, "model_use_peft": True, "effective_batch_size": 8}
    for seed in MANY:
        for lr, kl, accuracy in ((1e-4, 0.1, 0.70), (1e-3, 0.4, 0.75), (1e-2, 1.6, 0.65)):
            write_run(tmp_path, "adamw", lr, seed, accuracy, kl, settings=settings, **own)
            write_run(tmp_path, "prm_debiased", lr, seed, accuracy, kl, settings=settings, **own)
    comparison = compare_runs(tmp_path)
    whole = command(comparison)
    words = shlex.split(whole)
    assert words[:2] == ["prm-hf", "dpo"] and words[words.index("--dataset_name") + 1] == "my pairs.jsonl"
    expected = {"--num_train_epochs": "2", "--beta": "0.1", "--per_device_train_batch_size": "8"}
    assert {key: words[words.index(key) + 1] for key in expected} == expected
    assert "--use_peft" in words and "--max_steps" not in words and "--learning_rates 1e-4 1e-3 1e-2 --prm" in whole
    # What comes next is of the options that change alone
    assert comparison.verdict[2] == "Next, more seeds; add to the same command: --seeds 0 1 2 3 4"
    assert command(comparison, seeds=[0, 7]) == whole.replace("--seeds 0 1 2", "--seeds 0 7")


@pytest.mark.parametrize("last", ["--seeds 0 1", "--seeds=0"])
def test_the_next_options_go_behind_a_command(tmp_path, last):
    """Where an option stands twice, the later one counts, as in the command that is made of both."""
    recorded = f"prm-hf dpo --max_steps 7 {last} --output_dir runs/own"
    write_grid(tmp_path, seeds=MANY, prm_gain=0.1)
    for file in tmp_path.glob("*/run.json"):
        file.write_text(json.dumps({**json.loads(file.read_text()), "command": recorded}))
    comparison = compare_runs(tmp_path)
    _, _, added = comparison.verdict[2].partition("add to the same command: ")
    name, *values = added.split()
    joined = command(comparison, **{name.removeprefix("--"): values})

    def parsed(text):
        experiment = DPOExperiment.parse(shlex.split(text)[2:])
        return vars(experiment.script_args), experiment.training_args.max_steps, experiment.training_args.output_dir

    assert (
        joined.count(name) == 1
        and name == "--seeds"
        and parsed(f"{recorded} {added}") == parsed(joined) != parsed(recorded)
    )


def test_the_ceiling_is_no_opponent(tmp_path):
    write_grid(tmp_path, seeds=MANY, prm_gain=0.05)
    before = format_comparison(compare_runs(tmp_path), "json")
    write_method(tmp_path, "adamw_clean", 0.2)
    comparison = compare_runs(tmp_path)
    assert json.loads(format_comparison(comparison, "json"))["contrasts"] == json.loads(before)["contrasts"]
    assert "clean labels" not in comparison.verdict[0] and comparison.rows[-1].method == "adamw_clean"


def test_how_far_a_grid_was_extended_is_said(tmp_path):
    """AdamW is best inside its grid after an extension, PRM still at the end of its own after three."""
    write_grid(tmp_path, seeds=(0, 1))
    assert "extended" not in compare_runs(tmp_path).findings
    for n, lr in enumerate((3e-1, 1.0, 3.0), start=1):
        for seed in (0, 1):
            write_run(tmp_path, "prm_per_tensor", lr, seed, 0.75 + n / 100, 0.8 + n, extension=n)
            if n == 1:
                write_run(tmp_path, "adamw", 3e-2, seed, 0.6, 2.0, extension=1)
    findings = compare_runs(tmp_path).findings
    assert findings["extended"].endswith(
        "while a best one was at the end of its grid: AdamW by 3e-2; PRM per_tensor by 3e-1, 1e0, 3e0."
    )
    assert findings["edge"].endswith("may lie outside: PRM per_tensor (largest, 3e0, after 3 extensions).")


def test_every_case_has_a_key_of_its_own():
    for tables in ((ANSWERS,), (MEANINGS,), (NEXT,), (LOST, CAVEATS)):
        keys = [case.key for table in tables for case in table]
        assert len(set(keys)) == len(keys)


def test_caveats_that_every_comparison_needs(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), prm_gain=0.02, constant=0.75)
    write_run(tmp_path, "cdpo", 1e-3, 0, 0.6, 0.3)
    comparison = compare_runs(tmp_path)
    found = comparison.findings
    expected = {"same_rate", "equal_kl", "picked", "unequal_grids", "seeds"}
    assert expected <= set(found) and "one_seed" not in found
    known = sum(1 for c in comparison.contrasts if c.known)
    assert f"of {known} intervals" in found["many_intervals"]
    assert "4.0 times" in found["same_rate"]  # of the KL: 1.6 against 0.4
    assert "3 of PRM per_tensor against 1 of cDPO" in found["unequal_grids"]
    # Each keeps its number, and the console has them when asked.
    numbers = {case.key: i for i, case in enumerate(CAVEATS, start=1)}
    assert all(text.startswith(f"{numbers[key]}. ") for key, text in found.items())
    assert found["picked"] not in format_comparison(comparison)
    assert f"{len(found)} caveats apply" in format_comparison(comparison)
    assert found["picked"] in format_comparison(comparison, verbose=True)


def test_one_seed(tmp_path):
    write_grid(tmp_path, prm_gain=0.1)
    found = compare_runs(tmp_path).findings
    assert "one_seed" in found and "seeds" not in found


def test_best_at_the_edge_of_its_grid(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    write_run(tmp_path, "adamw", 1e-2, 0, 0.6, 1.6)
    write_run(tmp_path, "prm_per_tensor", 1e-3, 0, 0.7, 0.5)
    found = compare_runs(tmp_path).findings
    assert "AdamW (smallest, 1e-3)" in found["edge"] and "PRM" not in found["edge"]


@pytest.mark.parametrize("gain", [-0.1, -0.02, -0.01, 0.0, 0.01, 0.02, 0.1])
@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_no_winner_without_an_interval_off_zero(tmp_path, gain, seeds):
    write_grid(tmp_path, seeds=seeds, prm_gain=gain)
    comparison = compare_runs(tmp_path)
    for c in comparison.contrasts:
        low, high = c.interval.low, c.interval.high
        word = "more accurate" if low > 0 else "less accurate" if high < 0 else "within noise"
        cells = [cells for cells in format_comparison(comparison).splitlines() if cells.startswith(c.left.name)]
        assert any(line.endswith(word) and f"[{low:+.3f}, {high:+.3f}]" in line for line in cells)
    assert (comparison.answer == "yes") == (contrast(comparison, FRONTIER).interval.low > 0)


def test_accuracy_that_contradicts_its_margins(tmp_path):
    name = write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    (tmp_path / name / "metrics.json").write_text(json.dumps({ACCURACY: 0.9}))
    assert "0.900, its margins.json 0.700" in compare_runs(tmp_path).findings["run_notes"]


def test_comparisons_without_prm_or_adamw(tmp_path):
    write_run(tmp_path, "cdpo", 1e-3, 0, 0.7, 0.4)
    comparison = compare_runs(tmp_path)
    assert comparison.answer == "without" and "PRM" in comparison.verdict[0]
    assert "prm_noisy_labels" in comparison.verdict[-1]
    write_run(tmp_path, "hoelder", 1e-3, 0, 0.8, 0.4)
    assert contrast(compare_runs(tmp_path), BEST_LR, "hoelder").interval.mean == pytest.approx(0.1)
    write_run(tmp_path, "prm_debiased", 1e-3, 0, 0.7, 0.4)
    comparison = compare_runs(tmp_path)
    assert comparison.answer == "without" and "AdamW" in comparison.verdict[0]


def test_runs_without_accuracy(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4, margins=False, drop=(ACCURACY,))
    comparison = compare_runs(tmp_path)
    assert comparison.answer == "no_accuracy" and ACCURACY in comparison.verdict[0]
    assert plots.plot_frontier(comparison) is None
