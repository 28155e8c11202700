"""Writing a run's folder: what another run is, and that files are whole."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys

import pytest

from prm_hf.runs import write
from prm_hf.runs.read import load_runs
from prm_hf.runs.write import (
    RunSpec,
    evaluation_metrics,
    fail_run,
    failure_of,
    find_folder,
    finish_run,
    finished_metrics,
    history_of,
    start_run,
    write_json,
)


SPEC = RunSpec("prm_rows_eps:10", 3e-3, 1, {"beta": 0.1, "prm_preset": None})
METRICS = {"rewards/accuracies": 0.5, "steps": 4}


def finish(spec, parent, metrics=METRICS):
    folder, _ = find_folder(spec, parent, pytest.fail)
    finish_run(folder, start_run(spec, folder, {}), [], {}, metrics)
    return folder


def test_a_run_that_is_written_is_read(tmp_path):
    folder, others = find_folder(SPEC, tmp_path)
    assert folder.parent == tmp_path and not others and not folder.exists()
    assert folder.name == SPEC.folder_name and re.fullmatch(r"prm_rows_eps10_lr0.003_seed1_[0-9a-f]{8}", folder.name)
    record = start_run(SPEC, folder, {"task": "preferences", "model": "tiny"})
    assert not load_runs(tmp_path)[0].finished
    log = [{"step": 2, "loss": 0.5, "mask/mean_q": 0.1}, {"step": 4, "eval_drift/kl": 0.2}, {"train_runtime": 1.0}]
    finish_run(folder, record | {"optimizer": {"class": "PRM"}}, history_of(log), {"heldout": [1.0, -1.0]}, METRICS)
    (run,) = load_runs(tmp_path)
    assert (run.method, run.learning_rate, run.seed, run.metrics) == (SPEC.method, 3e-3, 1, METRICS)
    assert run.history == [{"step": 2, "train/loss": 0.5, "mask/mean_q": 0.1}, {"step": 4, "drift/kl": 0.2}]
    assert run.info["optimizer"] == {"class": "PRM"} and run.info["versions"]["torch"] and run.info["finished"]
    assert run.heldout.tolist() == [1.0, -1.0] and not list(folder.glob("*.part")) and run.name == folder.name


def test_a_run_is_found_by_what_makes_it_this_run(tmp_path):
    folder = finish(SPEC, tmp_path)
    assert finished_metrics(folder) == METRICS
    # What does not count may differ, and what is None may be missing.
    same = {"beta": 0.1, "output_dir": "elsewhere", "save_total_limit": 3, "logging_steps": 7, "relative_eps": 10.0}
    assert find_folder(dataclasses.replace(SPEC, settings=same), tmp_path) == (folder, {})
    # Its name does not matter: of version 0.1 it has no hash.
    old = folder.rename(tmp_path / SPEC.name)
    assert find_folder(SPEC, tmp_path) == (old, {})
    other = dataclasses.replace(SPEC, settings={"beta": 0.2})
    found, others = find_folder(other, tmp_path)
    assert found.name == other.folder_name != SPEC.folder_name and others == {old: "beta"}
    finish(other, tmp_path)
    assert finished_metrics(old) == finished_metrics(found) == METRICS


def test_what_a_newer_library_adds_makes_no_other_run(tmp_path):
    folder = finish(SPEC, tmp_path)
    newer = dataclasses.replace(
        SPEC, settings={**SPEC.settings, "added": "as before"}, defaults={"added": "as before"}
    )
    assert find_folder(newer, tmp_path) == (folder, {})
    changed = dataclasses.replace(newer, settings={**SPEC.settings, "added": "otherwise"})
    assert find_folder(changed, tmp_path)[1] == {folder: "added"}
    recorded = dataclasses.replace(SPEC, settings={**SPEC.settings, "train_digest": "f00", "model_digest": "ba7"})
    assert find_folder(recorded, tmp_path) == (folder, {})  # version 0.2 did not record them
    assert find_folder(recorded, tmp_path / "elsewhere")[0].name != folder.name
    finish(dataclasses.replace(recorded, seed=2), tmp_path)
    of_others = dataclasses.replace(recorded, seed=2, settings={**SPEC.settings, "train_digest": "0dd"})
    assert list(find_folder(of_others, tmp_path)[1].values()) == ["model_digest, train_digest"]


def test_the_steps_of_checkpoints_count_where_the_best_is_chosen():
    specs = [RunSpec("adamw", 1e-3, 0, {"load_best_model_at_end": best, "save_steps": 10}) for best in (False, True)]
    for spec, changes in zip(specs, ([], ["save_steps"]), strict=True):
        info = {"method": "adamw", "learning_rate": 1e-3, "seed": 0, "settings": {**spec.settings, "save_steps": 20}}
        assert spec.changes_from(info) == changes


@pytest.mark.parametrize("rates", [(1e-3, 1.0001e-3), (2e-5, 2.0001e-5)])
def test_rates_of_one_name_have_folders_of_their_own(tmp_path, rates):
    specs = [RunSpec("adamw", rate, 0, {}) for rate in rates]
    assert specs[0].name == specs[1].name
    folders = [finish(spec, tmp_path) for spec in specs]
    assert len(set(folders)) == 2
    assert [find_folder(spec, tmp_path) for spec in specs] == [(folder, {}) for folder in folders]


@pytest.mark.parametrize("name", ["0/../../x", "../x", "..", ".hidden", "", "a/b", "a\\b", "a\n", "a\0b", None, 3])
def test_no_name_leads_elsewhere(name):
    with pytest.raises(ValueError, match="`methods` becomes the name of a folder"):
        RunSpec(name, 1e-3, 0, {})


@pytest.mark.parametrize("seed", ["0/../../x", "0", 1.0, True, None, -1, 2**32])
def test_no_seed_leads_elsewhere(seed):
    with pytest.raises(ValueError, match=r"`seeds` must be integers in \[0, 2\*\*32\), got"):
        RunSpec("adamw", 1e-3, seed, {})


def test_what_is_not_a_run_is_left_alone(tmp_path):
    folder = tmp_path / SPEC.folder_name
    folder.mkdir()
    (folder / "run.part").write_text("{")  # of a run that ended before its first file was whole
    assert find_folder(SPEC, tmp_path) == (folder, {})
    (folder / "thesis.tex").write_text("")
    for make in (lambda: None, lambda: write_json(folder / "run.json", {"name": "another program's"})):
        make()
        with pytest.raises(ValueError, match=rf"{folder.name} is not the folder of a run .* move it away, or name"):
            find_folder(SPEC, tmp_path)
        assert (folder / "thesis.tex").is_file()
    shutil.rmtree(folder)
    folder.write_text("a file")
    with pytest.raises(ValueError, match="is not the folder of a run"):
        find_folder(SPEC, tmp_path)


def test_a_run_that_another_process_begins_meanwhile_is_the_same_run(tmp_path, monkeypatch):
    folder, read = tmp_path / SPEC.folder_name, write._info_of

    def begins(path):
        found = read(path)
        if not path.joinpath("run.json").exists():
            start_run(SPEC, folder, {})
        return found

    folder.mkdir()
    monkeypatch.setattr(write, "_info_of", begins)
    assert find_folder(SPEC, tmp_path) == (folder, {})


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '"text"'])
def test_files_that_cannot_be_read_are_set_aside(tmp_path, text):
    said, folder = [], finish(SPEC, tmp_path)
    (folder / "metrics.json").write_text(text)
    assert finished_metrics(folder, said.append) is None
    assert (folder / "metrics.json.corrupt").read_text() == text and not (folder / "metrics.json").exists()
    assert len(said) == 1 and "metrics.json cannot be read. It is set aside as metrics.json.corrupt" in said[0]
    (folder / "run.json").write_text(text)
    assert find_folder(SPEC, tmp_path, said.append) == (folder, {}) and not folder.exists()
    assert (tmp_path / f"{folder.name}.corrupt" / "run.json").read_text() == text and "run.json cannot be" in said[1]


def test_a_failure_is_kept_until_the_next_attempt(tmp_path):
    folder = tmp_path / SPEC.folder_name
    start_run(SPEC, folder, {})
    assert failure_of(folder) is None
    for message in ("out of memory", "a process is gone"):  # the second is a consequence
        fail_run(folder, RuntimeError(message))
    failed = json.loads((folder / "failed.json").read_text())
    assert (failed["error"], failed["message"]) == ("RuntimeError", "out of memory")
    assert failure_of(folder)[0] == "RuntimeError: out of memory"
    start_run(SPEC, folder, {})
    assert failure_of(folder) is None


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
