"""What the package needs: torch alone for the optimizer, and who is not installed is named with the pip command."""

import subprocess
import sys

import pytest


EXTRAS = ("transformers", "trl", "accelerate", "datasets", "peft", "filelock", "yaml", "scipy", "matplotlib", "numpy")


def run_without(modules: tuple[str, ...], code: str) -> subprocess.CompletedProcess:
    """Runs `code` in an interpreter to which `modules` are not installed."""
    blocked = f"import sys; sys.modules.update(dict.fromkeys({modules!r}))\n"
    return subprocess.run(
        [sys.executable, "-c", blocked + code], check=False, capture_output=True, text=True, timeout=120
    )


def test_the_optimizer_needs_torch_alone():
    code = "import torch; from prm_hf import PRM; w = torch.ones(3, requires_grad=True); opt = PRM([w])\n"
    code += "w.sum().backward(); opt.step(); print(opt.get_mask_stats()['parameter_count'])"
    result = run_without((*EXTRAS, "deepspeed", "torchao"), code)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == 3


@pytest.mark.parametrize("room", ["trainers", "noise", "metrics", "demo", "experiments"])
def test_a_room_says_what_it_needs(room):
    result = run_without(EXTRAS, f"import prm_hf.{room}")
    assert result.returncode == 1
    assert f"ImportError: `prm_hf.{room}` needs " in result.stderr and 'pip install "prm-hf[trl]"' in result.stderr


def test_lazy_names_say_what_they_need():
    result = run_without(EXTRAS, "from prm_hf import PRMDPOTrainer")
    assert "`prm_hf.trainers` needs transformers, trl, accelerate, datasets, peft: pip install" in result.stderr


@pytest.mark.parametrize(
    "statement", ["import prm_hf", pytest.param("from prm_hf import PRM", marks=pytest.mark.slow)], ids=str
)
def test_an_import_costs_little_beyond_torch(statement):
    code = f"import time, torch; start = time.process_time(); {statement}; print(time.process_time() - start)"
    seconds = min(float(run_without((), code).stdout) for _ in range(3))
    assert seconds < 0.3
