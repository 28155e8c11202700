"""The pull request for transformers in docs/upstream/: it fits the version that it is for, and its tests pass."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import transformers

from .tool_runs import ROOT


PATCH = ROOT / "docs" / "upstream" / "transformers-5.23.0.patch"
INSTALLED = Path(transformers.__file__).parent

pytestmark = pytest.mark.skipif(
    transformers.__version__ not in PATCH.name,
    reason=f"the patch is for another version of transformers than {transformers.__version__}",
)


def apply(folder: Path) -> None:
    subprocess.run(["git", "apply", str(PATCH)], cwd=folder, check=True, capture_output=True, text=True)


def patched_files() -> list[str]:
    lines = PATCH.read_text().splitlines()
    return [line.removeprefix("--- a/src/transformers/") for line in lines if line.startswith("--- a/src/")]


def test_the_patch_applies(tmp_path):
    for name in patched_files():
        (copy := tmp_path / "src" / "transformers" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(INSTALLED / name, copy)
    apply(tmp_path)
    assert 'PRM = "prm"' in (tmp_path / "src" / "transformers" / "training_args.py").read_text()


@pytest.mark.slow
def test_its_own_tests_pass(tmp_path):
    shutil.copytree(INSTALLED, tmp_path / "src" / "transformers", ignore=shutil.ignore_patterns("__pycache__"))
    apply(tmp_path)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'src'}{os.pathsep}{ROOT}", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tests/trainer/test_trainer_prm.py", "-v"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Ran 3 tests" in done.stderr and "skipped" not in done.stderr, done.stderr[-3000:]
