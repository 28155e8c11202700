"""However a run is split, it logs the same numbers.

The same rows in the same order, in steps of four pairs: by gradient accumulation, over processes, with and without
padding, with the reference's log-probabilities computed before, in evaluation batches of any size. Every number that
is logged or returned must be the same up to rounding: loss, entropies, `mask/*`, `drift/*`, `memorization/*`,
`rewards/*`.
"""

import functools
import json

import numpy as np
import pytest

from .distributed.launch import accelerate_launch
from .trainers.invariant_runs import logged


pytestmark = pytest.mark.usefixtures("quiet")

ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
SPLITS = {
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "more accumulation": ACCUMULATED,
    "evaluation by one": {"per_device_eval_batch_size": 1},
    "evaluation by three": {"per_device_eval_batch_size": 3},
    "evaluation at once": {"per_device_eval_batch_size": 64},
    "padding free": {"padding_free": True},
    "padding free, accumulation": {"padding_free": True, **ACCUMULATED, "per_device_eval_batch_size": 3},
}
CACHED = {
    "cached reference": {"cached_reference": True},
    "computed reference": {"precompute_ref_log_probs": True},
    "cached reference, all": {"cached_reference": True, "padding_free": True, **ACCUMULATED},
}
CASES = [("dpo", name, changes) for name, changes in {**SPLITS, **CACHED}.items()]
CASES += [("sft", name, changes) for name, changes in SPLITS.items()]
PROCESSES = {
    "two": {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2},
    "two, accumulation, padding free": {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 2,
        "per_device_eval_batch_size": 3,
        "padding_free": True,
    },
}
# What has to be among the numbers
NAMES = {
    "dpo": ["loss", "entropy", "mask/snr", "drift/kl", "memorization/flipped_fit", "rewards/ties"],
    "sft": ["loss", "entropy", "mask/snr", "drift/kl", "memorization/corrupted_fit", "exact_match"],
}


@functools.cache
def whole(task: str) -> dict[str, float]:
    """What the run logs that is not split."""
    return logged(task)


def assert_same_numbers(found: dict[str, float], task: str) -> None:
    expected = whole(task)
    assert found.keys() == expected.keys()
    for name in NAMES[task]:
        assert any(key.endswith(name) for key in expected), name
    wrong = {
        name: (found[name], value)
        for name, value in expected.items()
        if not np.isclose(found[name], value, rtol=2e-3, atol=2e-5, equal_nan=True)
    }
    assert not wrong


def test_the_numbers_change_in_training():
    """Else a run that logged nothing of interest would agree with every other."""
    for task in ("dpo", "sft"):
        steps = [value for key, value in whole(task).items() if key.endswith(": mask/snr")]
        assert len(steps) == 4 and len(set(steps)) >= 3
        assert whole(task)["returned eval_a_drift/kl"] > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("task, changes", [pytest.param(t, c, id=f"{t}, {name}") for t, name, c in CASES])
def test_every_number_is_the_same_however_a_run_is_split(task, changes):
    assert_same_numbers(logged(task, **changes), task)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["dpo", "sft"])
@pytest.mark.parametrize("name", PROCESSES)
def test_every_number_is_the_same_over_two_processes(task, name, tmp_path):
    file = tmp_path / "logged.json"
    module = ["tests.trainers.invariant_runs", task, json.dumps(PROCESSES[name]), "2", str(file)]
    accelerate_launch("ddp", module, tmp_path / "log", 2)
    assert_same_numbers(json.loads(file.read_text()), task)
