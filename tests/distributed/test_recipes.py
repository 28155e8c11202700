"""The recipes run under every configuration in `accelerate_configs/`, with the metrics of one process."""

import functools
import json
from pathlib import Path

import pytest

from prm_hf.demo import build_demo

from .launch import CONFIGS, accelerate_launch
from .plans import PATHS


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SHORT = ["--max_steps", "2", "--logging_steps", "1", "--eval_steps", "2", "--warmup_steps", "1"]
RATE = ["--learning_rates", "3e-3", "--prm_learning_rates", "3e-3", "--seeds", "0"]
PACKED = ("ddp", "fsdp2", "zero3")  # paths on which DPO runs without padding, with the numbers of one process with it
# By name the command, its AdamW, and its methods with a mask
COMPARISONS = {
    "dpo": ("dpo", "adamw", ("prm_per_tensor", "prm_rows")),
    "sft": ("sft", "adamw", ("prm_per_tensor", "prm_rows")),
    "relative_eps": ("dpo", "adamw_eps:10", ("prm_rows_eps:10",)),
}
ONLY = {"relative_eps": ("single", "fsdp2", "zero2")}  # the paths of a comparison that is not on all
# By recipe, metrics that are means over many tokens, and shares, in which one decision may tip over
MEANS = {
    "dpo": ["drift/kl", "drift/reward_abs", "drift/logratio_abs", "drift/params_rel", "mask/mean_q"],
    "sft": ["drift/kl", "drift/logratio_abs", "drift/params_rel", "memorization/corrupted_loss", "mask/mean_q"],
}
SHARES = {
    "dpo": ["rewards/accuracies", "memorization/flipped_fit", "memorization/clean_fit"],
    "sft": ["token_accuracy", "memorization/corrupted_fit", "memorization/clean_fit"],
}


def test_every_configuration_is_named_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(PATHS)


def run_of(folder: Path, name: str) -> Path:
    """The folder of a run, whose name ends in a hash."""
    (found,) = folder.glob(f"{name}_*")
    return found


def launch(path: str, folder: Path) -> Path:
    """Makes the comparisons of a path in one launch, each in a folder of its name."""
    build_demo()  # trains its model when it is first asked for, on one process sooner than on two
    commands = []
    for name, (command, adamw, masked) in COMPARISONS.items():
        if path in ONLY.get(name, PATHS):
            more = ["--padding_free", "true"] if command == "dpo" and path in PACKED else []
            own = ["--output_dir", str(folder / name), "--methods", adamw, *masked, *more]
            commands.append((command, [*SHORT, *RATE, *own, "--log_level", "info"]))
    (folder / "plan.json").write_text(json.dumps(commands))
    log = folder / "log"
    accelerate_launch(path, ["tests.distributed.recipe", str(folder / "plan.json")], log, PATHS[path], timeout=600)
    # one run after the other in the same processes
    n_masked = sum(len(masked) for name, (*_, masked) in COMPARISONS.items() if path in ONLY.get(name, PATHS))
    assert log.read_text().count("PRM trains ") == n_masked
    return folder


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """By path, the folder with a folder of each comparison. A path is launched when a test first asks for it."""
    return functools.cache(lambda path: launch(path, tmp_path_factory.mktemp(path)))


def metrics_of(name: str, path: str, folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of the masked methods."""
    _, _, masked = COMPARISONS[name]
    assert len(list(folder.glob("*/metrics.json"))) == 1 + len(masked)
    runs = {method: run_of(folder, f"{method.replace(':', '')}_lr0.003_seed0") for method in masked}
    for run in runs.values():
        assert json.loads((run / "run.json").read_text())["hardware"]["world_size"] == PATHS[path]
    return {method: json.loads((run / "metrics.json").read_text()) for method, run in runs.items()}


@pytest.mark.parametrize("name", ["dpo", "sft"])
@pytest.mark.parametrize("path", [path for path in PATHS if path != "single"])
def test_recipe(launched, path, name):
    check(name, *(metrics_of(name, p, launched(p) / name) for p in (path, "single")))


def check(recipe, found, expected_of):
    for method, expected in expected_of.items():
        metrics = found[method]
        assert metrics.keys() == expected.keys()
        assert metrics["steps"] == 2
        for name in MEANS[recipe]:
            assert metrics[name] == pytest.approx(expected[name], rel=1e-3), (method, name)
        for name in SHARES[recipe]:
            assert metrics[name] == pytest.approx(expected[name], abs=0.02), (method, name)


@pytest.mark.parametrize("path", ["fsdp2", "zero2"])
def test_relative_eps(launched, path):
    """Eps and learning rate follow from the size of the whole model, which no process holds."""
    folders = [launched(p) / "relative_eps" for p in (path, "single")]
    check("dpo", *(metrics_of("relative_eps", p, folder) for p, folder in zip((path, "single"), folders, strict=True)))
    for name in ("adamw_eps10_lr0.003_seed0", "prm_rows_eps10_lr0.003_seed0"):
        ours, theirs = (json.loads((run_of(folder, name) / "run.json").read_text()) for folder in folders)
        assert (
            ours["optimizer"]["eps"] == pytest.approx(theirs["optimizer"]["eps"]) and ours["optimizer"]["eps"] > 1e-3
        )
        assert ours["optimizer"]["learning_rate"] == pytest.approx(0.033)
        metrics = [json.loads((run_of(folder, name) / "metrics.json").read_text()) for folder in folders]
        assert metrics[0]["drift/kl"] == pytest.approx(metrics[1]["drift/kl"], rel=1e-3)


def test_bench_sharded(tmp_path):
    tiny = ["--vocab_size", "257", "--hidden_size", "32", "--intermediate_size", "65", "--num_layers", "2"]
    tiny += ["--num_heads", "4", "--num_key_value_heads", "2", "--batch_size", "4", "--length", "11"]
    tiny += ["--warmup", "1", "--timed_steps", "2"]
    reference = tmp_path / "single.json"
    halves = ["--gradient_accumulation_steps", "2"]
    rows = ["--reduction", "per_row", "--optimizers"]
    launches = {
        "single": ("single", halves),
        "zero3": ("zero3", ["--reference", str(reference)]),
        "rows": ("zero3", rows),
    }
    for name, (path, more) in launches.items():
        module = ["tests.distributed.bench", *tiny, *more, "--output", str(tmp_path / f"{name}.json")]
        accelerate_launch(path, module, tmp_path / f"{name}.log", PATHS[path])
    in_rows = json.loads((tmp_path / "rows.json").read_text())["agreement"]
    assert in_rows["path"] == "26 tensors with per_row masks under DeepSpeed ZeRO-3"
    assert in_rows["mask_replay"] < 1e-6 and in_rows["weight_replay"] < 1e-6
    sent = in_rows["sent"]
    assert sent["bytes"] == sent["model"]["bytes"] > 0 and sent["messages"] == sent["model"]["messages"]
    result = json.loads((tmp_path / "zero3.json").read_text())
    assert result["processes"] == 2
    agreement = result["agreement"]
    assert agreement["path"] == "26 tensors with per_tensor masks under DeepSpeed ZeRO-3"
    # Parts of the sums are float32 on a CPU, and other parts where a tensor is whole
    assert agreement["mask_replay"] < 1e-7
    assert agreement["weight_replay"] < 1e-8
    assert len(agreement["mask_reference"]) == 5
    assert max(agreement["mask_reference"]) < 1e-6
    assert set(result["relative_to_adamw"]) == set(result["optimizer_step_ms"]) == set(result["train_step_ms"])
