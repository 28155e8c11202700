"""Writing a run's folder: what another run is, and that files are whole."""

import json
import subprocess
import sys

import pytest

from prm_hf.runs.read import load_runs
from prm_hf.runs.write import RunSpec, evaluation_metrics, find_run, finish_run, history_of, start_run, write_json


SPEC = RunSpec("prm_rows_eps:10", 3e-3, 1, {"beta": 0.1, "prm_preset": None})
METRICS = {"rewards/accuracies": 0.5, "steps": 4}


def test_a_run_that_is_written_is_read(tmp_path):
    folder = tmp_path / SPEC.name
    assert SPEC.name == "prm_rows_eps10_lr0.003_seed1"
    record = start_run(SPEC, folder, {"task": "preferences", "model": "tiny"})
    assert not load_runs(tmp_path)[0].finished
    log = [{"step": 2, "loss": 0.5, "mask/mean_q": 0.1}, {"step": 4, "eval_drift/kl": 0.2}, {"train_runtime": 1.0}]
    finish_run(folder, record | {"optimizer": {"class": "PRM"}}, history_of(log), {"heldout": [1.0, -1.0]}, METRICS)
    (run,) = load_runs(tmp_path)
    assert (run.method, run.learning_rate, run.seed, run.metrics) == (SPEC.method, 3e-3, 1, METRICS)
    assert run.history == [{"step": 2, "train/loss": 0.5, "mask/mean_q": 0.1}, {"step": 4, "drift/kl": 0.2}]
    assert run.info["optimizer"] == {"class": "PRM"} and run.info["versions"]["torch"] and run.info["finished"]
    assert run.heldout.tolist() == [1.0, -1.0] and not list(folder.glob("*.part"))


def test_a_run_is_found_until_its_settings_change(tmp_path):
    folder, said = tmp_path / SPEC.name, []
    assert find_run(SPEC, folder, said.append) == (None, False)
    record = start_run(SPEC, folder, {})
    (folder / "checkpoint-2").mkdir()
    assert find_run(SPEC, folder, said.append) == (None, True)
    finish_run(folder, record, [], {}, METRICS)
    assert find_run(SPEC, folder, said.append) == (METRICS, True) and not said
    # What does not count may differ, and what is None may be missing.
    other = RunSpec(SPEC.method, 3e-3, 1, {"beta": 0.1, "output_dir": "elsewhere", "relative_eps": 10.0})
    assert other.changes_from(json.loads((folder / "run.json").read_text())) == []
    other.settings["beta"] = 0.2
    assert find_run(other, folder, said.append) == (None, False)
    assert said == [f"{SPEC.name}: trained again, since these settings changed: beta"] and not folder.exists()


def test_a_file_is_whole_or_not_there(tmp_path):
    write_json(tmp_path / "metrics.json", METRICS)
    with pytest.raises(TypeError):
        write_json(tmp_path / "metrics.json", {"steps": object()})
    assert json.loads((tmp_path / "metrics.json").read_text()) == METRICS


def test_metrics_of_an_evaluation_have_the_names_of_the_files():
    evaluation = {"eval_loss": 0.5, "eval_runtime": 1.0, "epoch": 2.0, "eval_drift/kl": 0.1}
    assert evaluation_metrics(evaluation) == {"loss": 0.5, "drift/kl": 0.1}


def test_the_room_is_free_of_torch():
    code = (
        "import sys, prm_hf.runs.read, prm_hf.runs.write\n"
        "print({'torch', 'transformers', 'trl', 'datasets', 'accelerate', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
