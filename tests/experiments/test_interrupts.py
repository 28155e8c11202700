"""Ctrl-C, as a terminal sends it: to all processes of a command, in each phase."""

import os
import signal
import subprocess
import sys

import pytest

from .comparisons import ONE_RATE, ROOT, SHORT, stamps


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

LINE = "Interrupted. The same command goes on from here."
COMMAND = [*SHORT, *ONE_RATE, "--methods", "adamw", "prm_debiased", "--max_steps", "30", "--eval_steps", "30"]
ONE = [sys.executable, "-m", "prm_hf", "dpo"]
TWO = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "-m",
    "prm_hf",
    "dpo",
]
SWEEP = [sys.executable, "-m", "prm_hf", "sweep", "dpo"]
RANDOMIZATION = [sys.executable, "-m", "prm_hf", "randomization", "--models", "resnet", "--methods", "adamw"]


def interrupt_at(text, command, output_dir):
    """The exit code and the output of a command that is interrupted once it has written `text`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [*command, "--output_dir", str(output_dir)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=output_dir.parent,
        start_new_session=True,  # so that the signal does not reach the tests
    )
    output = b""
    while text.encode() not in output:
        piece = os.read(process.stdout.fileno(), 4096)
        assert piece, output.decode()[-3000:]
        output += piece
    os.killpg(process.pid, signal.SIGINT)
    output += process.communicate(timeout=120)[0]
    return process.returncode, output.decode()


@pytest.mark.parametrize(
    "text",
    ["Built-in task", "adamw_lr0.001_seed0:   0%", "adamw_lr0.001_seed0:  50%", "adamw_lr0.001_seed0: 100%", "mean q"],
    ids=["loading", "start", "training", "evaluating", "reporting"],
)
def test_one_process(tmp_path, text):
    code, output = interrupt_at(text, [*ONE, *COMMAND], tmp_path / "runs")
    assert code == 130 and output.count(LINE) == 1 and "Traceback" not in output, output[-3000:]
    assert not list(tmp_path.glob("runs/*/failed.json"))


def test_two_processes(tmp_path):
    """What the launcher says is its own."""
    code, output = interrupt_at("adamw_lr0.001_seed0:  50%", [*TWO, *COMMAND], tmp_path / "runs")
    assert code != 0 and output.count(LINE) == 1 and f'File "{ROOT}' not in output, output[-3000:]
    assert not list(tmp_path.glob("runs/*/failed.json")) and not stamps(tmp_path / "runs")


def test_a_sweep(tmp_path):
    code, output = interrupt_at("adamw_lr0.001_seed0:  50%", [*SWEEP, *COMMAND], tmp_path / "runs")
    assert code == 130 and output.count(LINE) == 1 and "Traceback" not in output, output[-3000:]


def test_the_workers_of_randomization(tmp_path):
    code, output = interrupt_at("runs:   0%", [*RANDOMIZATION, "--workers", "2"], tmp_path / "runs")
    assert code == 130 and output.count(LINE) == 1 and "Traceback" not in output, output[-3000:]
