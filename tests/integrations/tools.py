"""Tools whose versions of transformers and TRL are not those of this package: each in an environment of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .tool_runs import ROOT


TORCH = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
# Where environments are kept from one run of the tests to the next; without it they are made anew and removed
KEPT = os.environ.get("PRM_HF_TOOLS")
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "USE_HF": "1",  # ms-swift asks no hub of its own
    "DO_NOT_TRACK": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "WANDB_MODE": "disabled",
    "TQDM_DISABLE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


class Tool:
    """A Python environment that a tool is installed in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def call(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Runs a program of the environment and returns what it printed; AssertionError with that if it fails."""
        program = str(self.folder / "bin" / command[0])
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        variables = {**os.environ, **QUIET, "PATH": path, "PYTHONPATH": str(ROOT), **environment}
        done = subprocess.run(
            [program, *command[1:]], cwd=cwd, env=variables, capture_output=True, text=True, check=False, timeout=1100
        )
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed[-6000:]
        return printed

    def install(self, *requirements: str) -> None:
        self.call("python", "-m", "pip", "install", "--quiet", "--no-compile", TORCH, *requirements, PYTHONPATH="")

    def remove_builds_for_cuda(self) -> None:
        """torchvision and torchaudio of PyPI load CUDA's libraries, and beside a torch for CPUs they fail to.

        transformers does without torchvision, and torchaudio without what is compiled of it.
        """
        if "+cpu" in self.call("python", "-c", "import torch; print(torch.__version__)"):
            self.call("python", "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision")
            for library in self.folder.glob("lib/*/site-packages/torchaudio/lib/*.so"):
                library.unlink()


@contextmanager
def environment_of(name: str, temporary: Path, without_dependencies: Sequence[str] = ()) -> Iterator[Tool]:
    """The environment of a tool with what is in `requirements/`, which is made unless `PRM_HF_TOOLS` has it."""
    tool = Tool(Path(KEPT or temporary) / f"tools-{name}")
    if not (tool.folder / "bin" / "python").exists():
        subprocess.run([sys.executable, "-m", "venv", str(tool.folder)], check=True)
        try:
            tool.install("-r", str(Path(__file__).parent / "requirements" / f"{name}.txt"))
            if without_dependencies:
                tool.install("--no-deps", *without_dependencies)
            tool.remove_builds_for_cuda()
        except BaseException:
            shutil.rmtree(tool.folder)
            raise
    yield tool
    if KEPT is None:
        shutil.rmtree(tool.folder)


def logged(output: Path) -> list[dict[str, Any]]:
    """What the Trainer of a tool logged in two steps."""
    (file,) = output.rglob("checkpoint-2/trainer_state.json")
    return json.loads(file.read_text())["log_history"]
