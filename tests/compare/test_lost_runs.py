"""Runs that diverged, failed or did not end: shown and counted, and in no number."""

import json

import pytest

from prm_hf.compare import compare_runs, format_comparison, write_report
from prm_hf.runs.read import load_runs

from .compared_runs import ACCURACY, KL, PAIRS, contrast, write_run


NAN = float("nan")


def write_three(root, **lost):
    """Three seeds of AdamW at .7 and PRM at .75; seed 1 of AdamW has other metrics, and files, than it should."""
    for seed in (0, 1, 2):
        name = write_run(root, "adamw", 1e-2, seed, 0.7, 0.4)
        write_run(root, "prm_per_tensor", 1e-2, seed, 0.75, 0.3)
        if seed == 1:
            path = root / name / "metrics.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | lost))
            folder = root / name
    return folder


@pytest.mark.parametrize(
    ("lost", "margins", "why"),
    [
        ({"diverged": True, "diverged_at_step": 40}, None, "at step 40"),
        ({"diverged": True, ACCURACY: None, KL: None}, None, "it says so"),
        ({ACCURACY: NAN}, None, "rewards/accuracies is nan"),
        ({ACCURACY: 0.0, "loss": NAN}, None, "loss is nan"),
        ({KL: NAN, ACCURACY: 0.0}, None, "drift/kl is nan"),
        ({KL: float("inf")}, None, "drift/kl is inf"),
        ({"memorization/flipped_fit": NAN}, None, "memorization/flipped_fit is nan"),
        ({"drift/reward_abs": NAN}, None, "drift/reward_abs is nan"),
        ({ACCURACY: 0.0}, [NAN] * PAIRS, "400 of 400 held-out margins are not finite"),
        ({}, [1.0] * (PAIRS - 1) + [float("inf")], "1 of 400 held-out margins are not finite"),
    ],
)
def test_a_diverged_run_is_shown_and_counts_for_nothing(tmp_path, lost, margins, why):
    folder = write_three(tmp_path, **lost)
    if margins:
        (folder / "margins.json").write_text(json.dumps({"heldout": margins}))
    comparison = compare_runs(tmp_path)
    adamw = comparison.baseline[0]
    assert adamw.accuracy == pytest.approx(0.7) and [run.seed for run in adamw.diverged] == [1]
    difference = contrast(comparison, "best learning rates")
    assert difference.interval.mean == pytest.approx(0.05) and difference.interval.seeds == 2
    text = " ".join(format_comparison(comparison).split())
    assert "AdamW 1e-2 2, 1 diverged 0.700" in text and f"adamw_lr1e-02_seed1 ({why})" in text
    assert "1 of 6 runs diverged" in text
    found = json.loads(format_comparison(comparison, "json"))
    assert [run["diverged"] for run in found["runs"] if "diverged" in run] == [why]
    write_report(comparison, tmp_path / "out")
    assert f"adamw_lr1e-02_seed1 ({why})" in (tmp_path / "out" / "report.html").read_text()


def test_a_row_of_which_all_runs_diverged_is_shown(tmp_path):
    write_run(tmp_path, "adamw", 1e-3, 0, 0.7, 0.4)
    write_run(tmp_path, "prm_per_tensor", 1e-2, 0, 0.75, 0.3)
    for method in ("adamw", "prm_per_tensor", "cdpo"):
        name = write_run(tmp_path, method, 1e-1, 0, 0.0, NAN)
        (tmp_path / name / "metrics.json").write_text(json.dumps({"diverged": True, "diverged_at_step": 3}))
    text = format_comparison(compare_runs(tmp_path))
    assert text.count("0, 1 diverged") == 3 and "3 of 5 runs diverged" in " ".join(text.split())


def test_a_trainers_run_that_diverged(tmp_path):
    for name, loss in (("adamw_seed0", 0.5), ("adamw_seed1", NAN)):
        (tmp_path / name).mkdir()
        log = [{"step": 8, "eval_loss": loss, f"eval_{ACCURACY}": 0.7 if loss == 0.5 else 0.0}]
        (tmp_path / name / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    comparison = compare_runs(tmp_path)
    assert comparison.baseline[0].accuracy == 0.7 and [run.problem for run in comparison.lost] == ["loss is nan"]


def test_nothing_but_diverged_runs(tmp_path):
    write_run(tmp_path, "adamw", 1e-2, 0, 0.7, NAN)
    with pytest.raises(ValueError, match=r"No finished run \(one with metrics.json\); diverged: adamw_lr1e-02_seed0"):
        compare_runs(tmp_path)


@pytest.mark.parametrize(
    ("failed", "why"),
    [
        ({"error": "OutOfMemoryError", "message": "CUDA out of memory"}, "OutOfMemoryError: CUDA out of memory"),
        ({"error": "KeyError"}, "KeyError"),
        ({}, "no reason given"),
    ],
)
def test_a_failed_run_says_why(tmp_path, failed, why):
    folder = write_three(tmp_path)
    (folder / "metrics.json").unlink()
    (folder / "failed.json").write_text(json.dumps(failed))
    comparison = compare_runs(tmp_path)
    text = " ".join(format_comparison(comparison).split())
    assert f"Ended in an error: adamw_lr1e-02_seed1 ({why})" in text
    assert json.loads(format_comparison(comparison, "json"))["failed"] == {"adamw_lr1e-02_seed1": why}


def test_a_run_that_finished_after_it_had_failed(tmp_path):
    folder = write_three(tmp_path)
    (folder / "failed.json").write_text('{"error": "OutOfMemoryError"}')
    assert all(run.finished for run in load_runs(tmp_path))


def test_a_tie_counts_one_half(tmp_path):
    name = write_run(tmp_path, "adamw", 1e-2, 0, 0.5, 0.4)
    (tmp_path / name / "margins.json").write_text(json.dumps({"heldout": [0.0] * 200 + [1.0] * 100 + [-1.0] * 100}))
    (run,) = load_runs(tmp_path)
    assert run.outcomes().mean() == 0.5 and not run.notes


def test_intervals_end_where_the_measure_does(tmp_path):
    """One NaN of three once gave an interval up to +1.4; three seeds that differ this much would do the same."""
    for seed, accuracy in enumerate((0.0, 0.02, 1.0)):
        write_run(tmp_path, "adamw", 1e-3, seed, 0.0, 0.4, margins=False)
        write_run(tmp_path, "prm_per_tensor", 1e-2, seed, accuracy, 0.4, margins=False)
    comparison = compare_runs(tmp_path)
    for found in comparison.contrasts:
        assert -1 <= found.interval.low and found.interval.high <= 1
    assert contrast(comparison, "best learning rates").interval.high == 1
