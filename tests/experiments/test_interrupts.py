"""Ctrl-C, as a terminal sends it: to all processes of a command, in each phase."""

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest

from .comparisons import ONE_RATE, ROOT, SHORT, stamps


pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TRAINING = r" (1|2|3)\d%\|"  # of two runs
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
    """The exit code and the output of a command in a terminal, interrupted once it has written the pattern `text`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    terminal, its_side = pty.openpty()  # a bar is shown there alone
    fcntl.ioctl(its_side, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    process = subprocess.Popen(
        [*command, "--output_dir", str(output_dir)],
        env=environment,
        stdout=its_side,
        stderr=its_side,
        cwd=output_dir.parent,
        start_new_session=True,  # so that the signal does not reach the tests
    )
    os.close(its_side)
    output = b""
    while piece := read_some(terminal):
        output += piece
        if text is not None and re.search(text.encode(), output):
            os.killpg(process.pid, signal.SIGINT)
            text = None
    os.close(terminal)
    code = process.wait(timeout=120)
    output = output.decode(errors="replace").replace("\r\n", "\n")
    assert text is None, output[-3000:]
    return code, output


def read_some(terminal):
    """What is written next, and nothing once all processes have ended."""
    try:
        return os.read(terminal, 4096)
    except OSError:  # as Linux says so
        return b""


@pytest.mark.parametrize(
    "text",
    ["Built-in task", r"  0%\|", TRAINING, r" 50%\|", "mean q"],
    ids=["loading", "start", "training", "evaluating", "reporting"],
)
def test_one_process(tmp_path, text):
    code, output = interrupt_at(text, [*ONE, *COMMAND], tmp_path / "runs")
    assert code == 130 and output.count(LINE) == 1 and "Traceback" not in output, output[-3000:]
    assert not list(tmp_path.glob("runs/*/failed.json"))


def test_two_processes(tmp_path):
    """What the launcher says is its own."""
    code, output = interrupt_at(TRAINING, [*TWO, *COMMAND], tmp_path / "runs")
    assert code != 0 and output.count(LINE) == 1 and f'File "{ROOT}' not in output, output[-3000:]
    assert not list(tmp_path.glob("runs/*/failed.json")) and not stamps(tmp_path / "runs")


def test_a_sweep(tmp_path):
    code, output = interrupt_at(TRAINING, [*SWEEP, *COMMAND], tmp_path / "runs")
    assert code == 130 and output.count(LINE) == 1 and "Traceback" not in output, output[-3000:]


def test_the_workers_of_randomization(tmp_path):
    code, output = interrupt_at(r"  0%\|", [*RANDOMIZATION, "--workers", "2"], tmp_path / "runs")
    assert code == 130 and output.count(LINE) == 1 and "Traceback" not in output, output[-3000:]
