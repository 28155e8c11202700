"""`prm-hf suspects` that is killed and given again, on two processes, by two workers of a sweep, and with LoRA."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from prm_hf.demo import build_demo
from prm_hf.experiments import suspects
from prm_hf.noise import flip_preferences

from ..distributed.launch import accelerate_launch
from .comparisons import ON_CPU, ROOT, read, read_lines


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FILES = ("suspects.jsonl", "suspects_summary.json", "suspects.html", "repaired.jsonl")
SETTINGS = ["--max_length", "64", "--num_train_epochs", "2", "--folds", "3", "--learning_rates", "1e-3", *ON_CPU]
SETTINGS += ["--gradient_checkpointing", "False", "--save_strategy", "steps", "--save_steps", "2"]
# For each name a process that ends as by SIGKILL in place of the rename that puts the file of that name there.
# They are forks of one that has imported all, since that takes longer than what they do.
KILLED = """
import os, sys
from pathlib import Path
from prm_hf.experiments import suspects
replace = os.replace
for name in {names!r}:
    child = os.fork()
    if child == 0:
        os.replace = lambda part, path: os._exit(9) if Path(path).name == name else replace(part, path)
        os._exit(suspects.main({arguments!r}))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (Path({output!r}) / name).exists()
"""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    flip_preferences(build_demo().train.select(range(24)), 0.3).to_json(file)
    return file


def arguments_of(pairs, output, *more, batch="4"):
    model = build_demo().model_path
    own = [str(pairs), "--model", model, "--output", str(output), "--per_device_train_batch_size", batch]
    return [*own, *SETTINGS, *more]


@pytest.fixture(scope="module")
def alone(pairs, tmp_path_factory):
    """The folder of a command that nothing has interrupted."""
    output = tmp_path_factory.mktemp("alone") / "out"
    assert suspects.main(arguments_of(pairs, output)) == 0
    return output


def environment(**more):
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **more}


def same(found, expected):
    """Whether two folders have the same suspects, but for the command that made them."""
    assert (found / FILES[0]).read_bytes() == (expected / FILES[0]).read_bytes()
    assert (found / FILES[3]).read_bytes() == (expected / FILES[3]).read_bytes()
    summaries = [read(folder / FILES[1]) for folder in (found, expected)]
    for summary in summaries:
        del summary["settings"]["command"]
    assert summaries[0] == summaries[1]


@pytest.mark.parametrize("step", [2, 4])
def test_a_kill_in_the_middle_of_a_fold(step, pairs, alone, tmp_path):
    """Within an epoch, and at its end before its margins are measured."""
    output = tmp_path / "out"
    command = [sys.executable, "-m", "prm_hf", "suspects", *arguments_of(pairs, output)]
    process = subprocess.Popen(command, env=environment(), cwd=tmp_path, start_new_session=True)
    until = time.monotonic() + 200
    while not list(output.glob(f"runs/fold1of3/*/checkpoint-{step}/trainer_state.json")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in output.glob("runs/*/*/metrics.json")}
    assert len(finished) == 1 and not (output / FILES[0]).exists()
    subprocess.run(command, env=environment(), cwd=tmp_path, check=True)
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in finished.items())
    same(output, alone)


def test_a_kill_while_files_are_written(pairs, alone, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(alone / "runs", output / "runs")
    script = KILLED.format(names=FILES, arguments=arguments_of(pairs, output), output=str(output))
    subprocess.run([sys.executable, "-c", script], env=environment(), cwd=tmp_path, check=True)
    capsys.readouterr()
    assert suspects.main(arguments_of(pairs, output)) == 0
    assert capsys.readouterr().out.count("finished before") == 3
    same(output, alone)
    assert not list(output.glob("*.part"))


def test_two_workers_of_a_sweep(pairs, alone, tmp_path):
    command = [sys.executable, "-m", "prm_hf", "sweep", "suspects", *arguments_of(pairs, tmp_path / "out")]
    subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES="0,1"), cwd=tmp_path, check=True)
    assert "without fold" in (tmp_path / "worker1.log").read_text()
    same(tmp_path / "out", alone)


def test_two_processes_that_share_each_run(pairs, alone, tmp_path):
    """They take the batches of one process, so they find what it finds, as far as sums in another order do."""
    module = ["prm_hf", "suspects", *arguments_of(pairs, tmp_path / "ddp", batch="2")]
    accelerate_launch("ddp", module, tmp_path / "log", 2)
    runs = [read(file)["hardware"]["world_size"] for file in tmp_path.glob("ddp/runs/*/*/run.json")]
    assert runs == [2] * 3
    lines = {line["row"]: line for line in read_lines(tmp_path / "ddp" / FILES[0])}
    expected_lines = {line["row"]: line for line in read_lines(alone / FILES[0])}
    assert lines.keys() == expected_lines.keys()
    for row, line in lines.items():
        expected = expected_lines[row]
        for name in ("margins", "in_sample_margins"):
            assert line[name] == pytest.approx(expected[name], rel=0.02, abs=2e-4), (row, name)
        assert (line["fold"], line["data"]) == (expected["fold"], expected["data"])


def test_adapters(pairs, tmp_path):
    arguments = arguments_of(pairs, tmp_path / "out", "--use_peft", "--lora_r", "4", "--learning_rates", "1e-2")
    assert suspects.main(arguments) == 0
    lines = read_lines(tmp_path / "out" / FILES[0])
    assert len(lines) == 24 and any(abs(line["margins"][-1]) > 1e-3 for line in lines)
    for file in tmp_path.glob("out/runs/*/*/run.json"):
        assert read(file)["settings"]["model_use_peft"] is True
    for checkpoint in tmp_path.glob("out/runs/*/*/checkpoint-*"):
        assert json.loads((checkpoint / "adapter_config.json").read_text())["r"] == 4
