"""The script for a SLURM array: bash reads it, the command's own parser takes its command, and 75 queues it again."""

import os
import re
import subprocess

import pytest

from ..docs_commands import calls_of, check_call
from .comparisons import ROOT


SCRIPT = ROOT / "examples" / "slurm" / "sweep.sbatch"


def test_bash_reads_it():
    subprocess.run(["bash", "-n", SCRIPT], check=True)


def test_slurm_reads_its_options():
    """It looks for them before the first command, and takes no space around `=`."""
    head, _, rest = SCRIPT.read_text().partition("\nset -")
    options = re.findall(r"^#SBATCH (.*)$", head, re.MULTILINE)
    assert len(options) > 5 and all(re.fullmatch(r"--[a-z-]+(=\S+)?", option) for option in options)
    assert "#SBATCH" not in rest and all(line.startswith("#") for line in head.splitlines())


def test_the_command_is_accepted(tmp_path):
    (call,) = calls_of(SCRIPT.read_text(), tmp_path)
    assert call[:2] == ["prm-hf", "dpo"]
    check_call(call)


@pytest.mark.parametrize("ends, code, requeued", [(0, 0, ""), (1, 1, ""), (75, 0, "requeue 7_3\n")])
def test_what_follows_the_command(ends, code, requeued, tmp_path):
    """Out of time the job is queued again; an error is the job's."""
    for name, line in (("prm-hf", f"exit {ends}"), ("scontrol", 'echo "$@" >> calls')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    (tmp_path / "calls").write_text("")
    assert subprocess.run(["bash", SCRIPT], cwd=tmp_path, env=environment, check=False).returncode == code
    assert (tmp_path / "calls").read_text() == requeued
