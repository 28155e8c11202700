"""A run that is interrupted and resumed ends with the weights of the run that was not.

On as many processes of the same path to the last bit; on another number of them, or on another path, to the noise of
gradients that are added up in another order.
"""

import os
import subprocess
import sys

import pytest

from .launch import launch_runs, read_run
from .plans import COMMON, PATHS, PER_PARAM, REFUSES_REDUCTIONS, plan
from .records import assemble, compare_runs, difference, replay
from .test_traffic import sent_as_modelled


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

REFUSED = ("fsdp1_resumed",)
RESUMED = [(path, name) for path in PATHS for name in plan(path) if name.endswith("_resumed") and name not in REFUSED]
# One micro-batch a step, so that up to four processes can share it
PLAIN = COMMON["per_tensor"] | {"accumulation": 1}
PLAIN_ROWS = COMMON["per_row"] | {"accumulation": 1}
UNIVERSAL = {"checkpoint": {"load_universal": True}}
CONVERTED = "grad_var` cannot be converted. Create the optimizer with reduction"


def errors(ranks: list[dict]) -> list[str]:
    assert all(rank["error"] is not None for rank in ranks)
    return [rank["error"] for rank in ranks]


def resumes_like(ranks: list[dict], whole: list[dict], prm: dict) -> None:
    assert all(rank["error"] is None for rank in ranks), ranks[0]["error"]
    assert len(ranks[0]["steps"]) == 3
    mask, weight = compare_runs(ranks, whole, prm)
    assert weight < 5e-6
    # The noise of the gradients' sum, to which the mask of a single scalar parameter can be as sensitive as one likes
    assert mask < (3e-6 if prm["reduction"] == "per_tensor" else 1e-3)


@pytest.mark.parametrize(("path", "name"), RESUMED)
def test_same_processes_to_the_last_bit(recorded, path, name):
    resumed, whole = (recorded.run(path, which) for which in (name, name.removesuffix("_resumed")))
    assert [step["step"] for step in resumed[0]["steps"]] == [4, 5, 6]
    assert any(step["slices"] for step in resumed[0]["steps"])
    assert compare_runs(resumed, whole, plan(path)[name]["prm"]) == (0, 0)
    last, expected = (ranks[0]["steps"][-1]["stats"] for ranks in (resumed, whole))
    assert last == expected


@pytest.mark.parametrize(
    ("name", "theirs", "ours"),
    [("to_per_param", "per_tensor", "per_param"), ("to_per_tensor", "per_param", "per_tensor")],
)
@pytest.mark.parametrize("path", REFUSES_REDUCTIONS)
def test_another_reduction_is_refused(recorded, path, name, theirs, ours):
    for error in errors(recorded.runs(path)[name]):
        assert error.startswith("ValueError")
        assert f"trained with reduction='{theirs}', this optimizer was created with reduction='{ours}'" in error
        assert CONVERTED in error


def test_fsdp1_does_not_start_the_optimizer_anew(recorded):
    for error in errors(recorded.runs("fsdp2")["fsdp1_resumed"]):
        assert error.startswith("ValueError")
        assert "would start anew. Use `fsdp_state_dict_type: FULL_STATE_DICT`, or FSDP2" in error


# ---- Another number of processes ----


def test_fsdp2_on_four_processes(recorded, tmp_path):
    mesh = {"dp_replicate_size": 2, "dp_shard_size": 2}
    runs = {
        "fresh": PLAIN,
        "hybrid": PLAIN | {"mesh": mesh},
        "hybrid_per_param": COMMON["per_param"] | {"mesh": mesh},
        "hybrid_per_row": PLAIN_ROWS | {"mesh": mesh},
        "empty_shards": COMMON["per_row_lora"],  # of three rows
        "resumed": PLAIN | {"resume": str(recorded.checkpoint("fsdp2", "per_tensor"))},
        "resumed_per_row": PLAIN_ROWS | {"resume": str(recorded.checkpoint("fsdp2", "per_row"))},
    }
    results = launch_runs("fsdp2", runs, tmp_path, 4)
    resumes_like(results["resumed"], recorded.run("fsdp2", "per_tensor"), PLAIN["prm"])
    resumes_like(results["resumed_per_row"], recorded.run("fsdp2", "per_row"), PLAIN_ROWS["prm"])
    for name in ("fresh", "hybrid", "hybrid_per_param", "hybrid_per_row", "empty_shards"):
        assert results[name][0]["error"] is None, results[name][0]["error"]
        sent_as_modelled(results[name], "fsdp2", runs[name])
        mask, weight = replay(results[name], runs[name]["prm"])
        assert mask < 1e-6
        assert weight < 1e-6
        assert len({repr(rank["steps"][-1]["stats"]) for rank in results[name]}) == 1


@pytest.fixture(scope="module")
def universal(recorded):
    """Makes universal checkpoints, as a user does, and returns their folders by (path, run)."""
    folders = {}

    def convert(path: str, name: str) -> str:
        folder = recorded.checkpoint(path, name)
        if (path, name) not in folders:
            command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
            command += ["--input_folder", str(folder / "global_step3")]
            command += ["--output_folder", str(folder / "global_step3_universal")]
            environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            folders[path, name] = str(folder)
        return folders[path, name]

    return convert


def test_universal_on_one_process(recorded, universal, tmp_path):
    runs = {}
    for path in ("zero1", "zero2", "zero3"):
        config = {"deepspeed": UNIVERSAL | {"zero_optimization": {"stage": int(path[-1])}}}
        per_param = COMMON["per_param"] | config
        runs[path] = PLAIN | config | {"resume": universal(path, "per_tensor")}
        runs[f"{path}_lora"] = COMMON["lora"] | config | {"resume": universal(path, "lora")}
        rows = plan(path)["per_row_universal"] | config
        runs[f"{path}_per_row"] = rows | {"resume": universal(path, "per_row_universal")}
        runs[f"{path}_signal"] = PLAIN_ROWS | config | {"resume": universal(path, "per_row")}
        runs[f"{path}_per_param"] = per_param | {"resume": universal(path, "per_param")}
        runs[f"{path}_to_per_param"] = per_param | {"resume": universal(path, "per_tensor")}
        runs[f"{path}_to_per_tensor"] = PLAIN | config | {"resume": universal(path, "per_param")}
    results = launch_runs("zero2", runs, tmp_path, 1)
    for path in ("zero1", "zero2", "zero3"):
        resumes_like(results[path], recorded.run(path, "per_tensor"), PLAIN["prm"])
        resumes_like(results[f"{path}_lora"], recorded.run(path, "lora"), COMMON["lora"]["prm"])
        whole = recorded.run(path, "per_row_universal")
        resumes_like(results[f"{path}_per_row"], whole, plan(path)["per_row_universal"]["prm"])
        (error,) = errors(results[f"{path}_signal"])
        assert "no `exp_avg_signal`" in error and "or train with signal_beta=None" in error
        decays = {piece["weight_decay"] for piece in results[path][0]["steps"][0]["slices"]}
        assert decays == {0, 0.1}  # DeepSpeed gives every group of stage 3 the settings of the first
        (error,) = errors(results[f"{path}_per_param"])
        assert "resume the original one on as many processes as wrote it" in error
        for name, theirs in (("to_per_param", "per_tensor"), ("to_per_tensor", "per_param")):
            (error,) = errors(results[f"{path}_{name}"])
            assert f"trained with reduction='{theirs}'" in error
            assert CONVERTED in error


def test_universal_on_four_processes(recorded, universal, tmp_path):
    config = {"deepspeed": UNIVERSAL}
    runs = {"fresh": PLAIN, "fresh_per_row": PLAIN_ROWS}
    runs["resumed"] = PLAIN | config | {"resume": universal("zero3", "per_tensor")}
    rows = plan("zero3")["per_row_universal"]
    runs["resumed_per_row"] = rows | config | {"resume": universal("zero3", "per_row_universal")}
    results = launch_runs("zero3", runs, tmp_path, 4)
    resumes_like(results["resumed"], recorded.run("zero3", "per_tensor"), PLAIN["prm"])
    resumes_like(results["resumed_per_row"], recorded.run("zero3", "per_row_universal"), rows["prm"])
    for name in ("fresh", "fresh_per_row"):
        sent_as_modelled(results[name], "zero3", runs[name])
        mask, weight = replay(results[name], runs[name]["prm"])
        assert mask < 1e-6
        assert weight < 1e-6


# ---- Another path ----


@pytest.mark.parametrize(("path", "other"), [("fsdp2", "single"), ("single", "fsdp2"), ("ddp", "fsdp2")])
def test_fsdp2_and_whole_tensors(recorded, path, other, tmp_path):
    runs = {
        name: COMMON[name] | {"resume": str(recorded.checkpoint(other, name))}
        for name in ("per_tensor", "per_param", "per_row", "lora")
    }
    if path == "ddp":
        runs["8bit"] = plan(path)["per_tensor_8bit"] | {"resume": str(recorded.checkpoint(other, "per_tensor_8bit"))}
    runs["to_per_param"] = COMMON["per_tensor"] | {"prm": PER_PARAM, "resume": runs["per_tensor"]["resume"]}
    results = launch_runs(path, runs, tmp_path, PATHS[path])
    for name in ("per_tensor", "per_param", "per_row"):
        resumes_like(results[name], recorded.run(path, name), COMMON[name]["prm"])
    if path == "ddp":  # the codes of two shards; those of a step are rounded by other random numbers
        (first, whole) = results["8bit"], recorded.run("fsdp2", "per_tensor_8bit")
        weights = [assemble(ranks, step, "after") for ranks, step in ((first, 0), (whole, 3))]
        assert first[0]["error"] is None and difference(*weights, relative=False) < 5e-6
    assert all("has adapters" in error for error in errors(results["lora"]))
    assert all(CONVERTED in error for error in errors(results["to_per_param"]))


# ---- Killed ----


@pytest.mark.parametrize("path", ["fsdp2", "zero2", "zero3"])
def test_a_killed_run(recorded, path, tmp_path):
    options = COMMON["per_tensor"]
    folder = tmp_path / "killed"
    killed = {"killed": options | {"die_after": 5}}
    launch_runs(path, killed, tmp_path, kill_when=folder / "waiting1")
    assert (folder / "checkpoint-3").is_dir()
    assert not (folder / "rank0.pt").exists()
    (ranks,) = launch_runs(path, {"again": options | {"resume": str(folder / "checkpoint-3")}}, tmp_path).values()
    whole = recorded.run(path, "per_tensor")
    assert len(read_run(tmp_path / "again", 2)[0]["steps"]) == 3
    assert compare_runs(ranks, whole, options["prm"]) == (0, 0)
    assert len(assemble(ranks, -1, "after")) == 26
