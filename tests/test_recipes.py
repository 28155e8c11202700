"""The recipes as a user runs them: on the built-in task in short, on local files, interrupted, and wrongly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from prm_hf.demo import build_demo


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import comparison  # noqa: E402
import dpo_noisy  # noqa: E402


SHORT = ["--max_steps", "3", "--logging_steps", "1", "--eval_steps", "3", "--warmup_steps", "1"]
ONE_RATE = ["--learning_rates", "1e-3", "--prm_learning_rates", "3e-3"]


def run(output_dir, *arguments):
    dpo_noisy.main(["--output_dir", str(output_dir), *SHORT, *ONE_RATE, *arguments])


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def stamps(folder):
    return {path.parent.name: path.stat().st_mtime_ns for path in Path(folder).glob("*/metrics.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    run(folder)
    return folder


def test_a_comparison_writes_what_it_says(finished, capsys):
    runs = sorted(path.parent.name for path in finished.glob("*/run.json"))
    assert [name for name in runs if not name.startswith("constant_q")] == [
        "adamw_lr0.001_seed0",
        "prm_debiased_lr0.003_seed0",
        "prm_per_tensor_lr0.003_seed0",
    ]
    assert len(runs) == 4
    for name in runs:
        info, metrics = read(finished / name / "run.json"), read(finished / name / "metrics.json")
        assert info["noise_rate"] == 0.3 and info["seed"] == 0 and info["hardware"]["world_size"] == 1
        assert info["settings"]["effective_batch_size"] == 16 and info["versions"]["trl"]
        assert metrics["steps"] == 3 and metrics["wall_seconds"] > 0
        names = {"rewards/accuracies", "memorization/flipped_fit", "memorization/clean_fit", "drift/kl"}
        names |= {"drift/reward_abs", "drift/logratio_abs", "drift/params_rel"}
        assert names <= set(metrics)
        assert ("mask/mean_q" in metrics) == name.startswith("prm_")
        history = [json.loads(line) for line in (finished / name / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in history if "train/loss" in row] == [1, 2, 3]
        assert any("drift/kl" in row for row in history)
        margins = read(finished / name / "margins.json")
        accuracy = np.mean(np.array(margins["heldout"]) > 0)
        assert accuracy == pytest.approx(metrics["rewards/accuracies"], abs=2 / 512)
        flipped = np.array(margins["train_flipped"])
        assert len(flipped) == 256 and 0.2 < flipped.mean() < 0.4
        assert np.mean(np.array(margins["train"])[flipped] > 0) == pytest.approx(
            metrics["memorization/flipped_fit"], abs=0.02
        )
    (control,) = (name for name in runs if name.startswith("constant_q"))
    info = read(finished / control / "run.json")
    source = info["settings"]["constant_q"]
    rate = read(finished / source["of"] / "run.json")["learning_rate"]
    assert info["learning_rate"] == pytest.approx(rate * source["mean_q"])
    comparison_json = read(finished / "comparison.json")
    assert len(comparison_json["runs"]) == 4 and comparison_json["statements"]
    report = (finished / "report.html").read_text()
    assert "data:image/png;base64" in report and "http" not in report.replace("http://www.w3.org", "")
    assert (finished / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_finished_runs_are_not_repeated_unless_their_settings_change(finished, capsys):
    before = stamps(finished)
    run(finished)
    assert stamps(finished) == before
    assert "finished before" in capsys.readouterr().out

    # An interrupted run has no metrics.json: it alone is trained again.
    (finished / "prm_per_tensor_lr0.003_seed0" / "metrics.json").unlink()
    run(finished)
    after = stamps(finished)
    assert {name for name in before if after[name] != before[name]} == {"prm_per_tensor_lr0.003_seed0"}

    # A setting of PRM concerns the PRM runs, and the control that takes its step from one of them.
    run(finished, "--prm_softness", "0.5")
    out = capsys.readouterr().out
    assert "prm_debiased_lr0.003_seed0: trained again, since these settings changed: prm_softness" in out
    changed = {name for name in before if stamps(finished).get(name) != after[name]}
    assert changed == {"prm_per_tensor_lr0.003_seed0", "prm_debiased_lr0.003_seed0"}
    # The old control lies there still, and is no part of the new comparison.
    assert len(stamps(finished)) == 5 and len(read(finished / "comparison.json")["runs"]) == 4


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder"])
def test_local_datasets(kind, tmp_path):
    rows = {"prompt": [f"p{i}" for i in range(6)], "chosen": ["a"] * 6, "rejected": ["b"] * 6}
    data = Dataset.from_dict(rows)
    if kind == "folder":
        DatasetDict(train=data, test=data.select(range(2))).save_to_disk(tmp_path / "data")
        assert len(comparison.load_split(str(tmp_path / "data"), None, "test")) == 2
        with pytest.raises(ValueError, match="has the splits train, test and not 'dev'"):
            comparison.load_split(str(tmp_path / "data"), None, "dev")
        return
    path = tmp_path / f"data.{kind}"
    {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](path)
    loaded = comparison.load_split(str(path), None, "train[:4]")
    assert loaded["prompt"][:] == ["p0", "p1", "p2", "p3"] and loaded["chosen"][0] == "a"


def test_a_model_and_files_of_ones_own_with_lora_and_other_losses(tmp_path):
    demo = build_demo()
    for name in ("train", "test"):
        getattr(demo, name).select(range(24)).to_json(tmp_path / f"{name}.jsonl")
    run(
        tmp_path / "runs",
        *["--model_name_or_path", demo.model_path, "--dataset_name", str(tmp_path / "train.jsonl")],
        *["--eval_dataset_name", str(tmp_path / "test.jsonl"), "--dataset_test_split", "train"],
        *["--methods", "cdpo", "robust", "ipo", "prm_per_param", "--seeds", "0", "1"],
        *["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"],
        *["--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False", "--save_strategy", "no"],
        *["--eval_strategy", "no", "--per_device_train_batch_size", "4"],
    )
    assert len(stamps(tmp_path / "runs")) == 8
    info = read(tmp_path / "runs" / "cdpo_lr0.001_seed1" / "run.json")
    assert info["model"] == demo.model_path and info["settings"]["label_smoothing"] == pytest.approx(-0.75)
    metrics = read(tmp_path / "runs" / "prm_per_param_lr0.003_seed0" / "metrics.json")
    assert metrics["mask/parameter_count"] == 2 * (2 * (64 + 64) + 2 * (64 + 32))


def test_cdpo_by_way_of_the_robust_loss():
    """(1-e) L + e L_swapped, from TRL's ((1-s) L - s L_swapped) / (1-2s)."""
    for rate in (0.1, 0.3, 0.45):
        s = dpo_noisy.methods(rate)["cdpo"]["label_smoothing"]
        assert (1 - s) / (1 - 2 * s) == pytest.approx(1 - rate) and -s / (1 - 2 * s) == pytest.approx(rate)


def test_the_published_setting_parses():
    path = ROOT / "recipes" / "qwen2.5-0.5b" / "dpo_noisy.yaml"
    overrides = ["--use_cpu", "--bf16", "False"]
    script_args, training_args, model_args = dpo_noisy.parse(["--config", str(path), *overrides])
    assert script_args.noise_rate == 0.3 and script_args.seeds == [0, 1, 2]
    assert model_args.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert training_args.beta == 0.1 and len(script_args.learning_rates) == len(script_args.prm_learning_rates)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "adam"], "`methods`: adam unknown. Known are adamw, adamw_eps, adamw_embedding"),
        (["--methods", "adamw", "constant_q"], "add a PRM method"),
        (["--learning_rates", "1e-3", "2e-3", "--prm_learning_rates", "1e-3"], "2 values and `prm_learning_rates` 1"),
        (["--learning_rates", "0", "--prm_learning_rates", "1"], "positive numbers, got 0"),
        (["--seeds", "1", "1"], "`seeds` must name .* none of them twice"),
        (["--noise_rate", "1.5"], r"`noise_rate` must be in \[0, 1\), got 1.5"),
        (["--noise_rate", "0", "--methods", "cdpo"], "`cdpo` and `robust` need a `noise_rate` between 0 and 0.5"),
        (["--model_name_or_path", "somewhere"], "needs a `--dataset_name`"),
        (["--dataset_name", "somewhere", "--use_cpu", "--bf16", "False"], "needs a `--model_name_or_path`"),
        (["--prm_rho", "1.5"], "prm_rho"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo_noisy.parse(arguments)


def launch(flags, output_dir, *arguments, timeout=240):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, str(ROOT / "recipes" / "dpo_noisy.py")]
    command += ["--output_dir", str(output_dir), *SHORT, *ONE_RATE, *arguments]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=output_dir, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def test_accelerate_launch(tmp_path):
    out = launch(["--num_processes", "1"], tmp_path, "--methods", "adamw", "prm_per_tensor")
    assert "PRM per_tensor" in out and "Report:" in out


@pytest.mark.slow
def test_accelerate_launch_with_two_processes(tmp_path):
    """Two processes share the batch of 16: the runs are those of one process, up to rounding."""
    flags = ["--multi_gpu", "--num_processes", "2"]
    for folder, f in (("two", flags), ("one", ["--num_processes", "1"])):
        (tmp_path / folder).mkdir()
        launch(f, tmp_path / folder, "--methods", "adamw", "prm_per_tensor")
    for name in ("adamw_lr0.001_seed0", "prm_per_tensor_lr0.003_seed0"):
        two, one = (tmp_path / folder / name for folder in ("two", "one"))
        assert read(two / "run.json")["hardware"]["world_size"] == 2
        assert read(two / "run.json")["settings_hash"] == read(one / "run.json")["settings_hash"]
        for key, value in read(one / "metrics.json").items():
            if key.startswith(("drift/", "mask/", "memorization/", "rewards/accuracies")):
                assert read(two / "metrics.json")[key] == pytest.approx(value, rel=2e-2, abs=1e-4), key
