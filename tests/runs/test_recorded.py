"""Run folders of version 0.1.0, as recorded then: they are read as they were, and are not trained again.

`recorded/expected.json` is what version 0.1.0 read from them.
"""

import json
import shutil
from pathlib import Path

import pytest

from prm_hf.runs.read import load_runs
from prm_hf.runs.write import RunSpec, find_folder, finished_metrics


RECORDED = Path(__file__).parent / "recorded"
NAMES = ["adamw_lr0.001", "constant_q_lr0.000361", "prm_debiased_lr0.003", "prm_rows_eps10_lr0.003"]


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_recorded_runs_are_read_as_they_were():
    expected, found = read(RECORDED / "expected.json"), {}
    for run in load_runs(RECORDED):
        steps, values = run.series("drift/kl")
        found[run.name] = {
            "method": run.method,
            "learning_rate": run.learning_rate,
            "seed": run.seed,
            "accuracy": run.metrics[run.measures.accuracy],
            "kl": run.metrics["drift/kl"],
            "steps": run.metrics["steps"],
            "mean_q": run.mean_q,
            "kl_steps": steps.tolist(),
            "kl_values": values.tolist(),
            "losses": run.series("train/loss")[1].tolist(),
            "heldout": [len(run.heldout), run.heldout.sum()],
        }
    assert found == expected


def specify(name, changes=()):
    """The specification of a recorded run by this version, with settings under the names of today."""
    info = read(RECORDED / f"{name}_seed0" / "run.json")
    names = {
        "prm_rho": "prm_variance_beta",
        "prm_warmup_steps": "prm_mask_warmup_steps",
        "memorization_max_pairs": "memorization_max_rows",
    }
    settings = {names.get(key, key): value for key, value in info["settings"].items()}
    is_prm = settings.pop("optimizer_name") == "prm"
    settings["optim"] = "prm" if is_prm else "adamw_torch_fused"
    settings["relative_eps"] = 10.0 if "eps" in name or "constant" in name else None
    settings |= {"prm_preset": None} if is_prm else {}
    configured_as = "adamw_eps:10" if "constant" in name else info["method"]
    return RunSpec(info["method"], info["learning_rate"], 0, {**settings, **dict(changes)}, configured_as)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_run_is_finished(name):
    folder, others = find_folder(specify(name), RECORDED, pytest.fail)
    assert folder == RECORDED / f"{name}_seed0" and not others
    assert finished_metrics(folder, pytest.fail)["steps"] == 3


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("adamw_lr0.001", {"relative_eps": 10.0}),
        ("adamw_lr0.001", {"optim": "adamw_torch"}),
        ("prm_debiased_lr0.003", {"prm_preset": "noisy_labels"}),
        ("prm_debiased_lr0.003", {"prm_variance_beta": 0.9}),
        ("prm_rows_eps10_lr0.003", {"relative_eps": 3.0}),
        ("prm_rows_eps10_lr0.003", {"memorization_max_rows": 64}),
    ],
)
def test_a_recorded_run_of_other_settings_is_another_run(name, change):
    info = read(RECORDED / f"{name}_seed0" / "run.json")
    assert specify(name, change).changes_from(info) == list(change)


def test_a_run_of_the_randomization_tests_has_no_other_optimizer():
    """In version 0.1.0 its settings named the optimizer by `optimizer_name` alone."""
    spec = RunSpec("adamw", 1e-3, 0, {"kind": "true_labels", "optim": "adamw_torch_fused"})
    info = {"method": "adamw", "learning_rate": 1e-3, "seed": 0}
    assert spec.changes_from({**info, "settings": {"kind": "true_labels", "optimizer_name": "adamw"}}) == []


@pytest.mark.slow
def test_the_same_command_finds_them_finished(tmp_path, capsys):
    from prm_hf.experiments import dpo

    shutil.copytree(RECORDED, tmp_path, dirs_exist_ok=True)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.json")}
    steps = ["--max_steps", "3", "--logging_steps", "1", "--eval_steps", "3", "--warmup_steps", "1"]
    rates = ["--learning_rates", "1e-3", "--prm_learning_rates", "3e-3"]
    methods = ["--methods", "adamw", "prm_debiased", "prm_rows_eps:10", "constant_q"]
    dpo.main(["--output_dir", str(tmp_path), *steps, *rates, *methods, "--seeds", "0"])
    assert capsys.readouterr().out.count("finished before") == len(NAMES)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*_seed*/*.json")} == before
