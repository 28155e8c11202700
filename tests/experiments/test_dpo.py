"""The recipes as a user runs them: on the built-in task in short, on local files, interrupted, and wrongly."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from filelock import FileLock
from transformers import TrainerControl, TrainerState

from prm_hf.demo import build_demo
from prm_hf.experiments import arguments as inputs
from prm_hf.experiments import controls as methods
from prm_hf.experiments import dpo as dpo_noisy
from prm_hf.experiments import run_folder
from prm_hf.experiments import runner as comparison


ROOT = Path(__file__).parents[2]
SHORT = ["--max_steps", "3", "--logging_steps", "1", "--eval_steps", "3", "--warmup_steps", "1"]
ON_CPU = ["--use_cpu", "--bf16", "False"]
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

    # A file that is older than an argument that is None, or that has what does not count, is of the same run.
    for file in finished.glob("*/run.json"):
        info = read(file)
        assert info["settings"].pop("prm_signal_beta", None) is None
        info["settings"]["logging_nan_inf_filter"] = info["settings"]["output_dir"] = "another"
        file.write_text(json.dumps(info))
    run(finished)
    assert stamps(finished) == before

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
        assert len(inputs.load_split(str(tmp_path / "data"), None, "test")) == 2
        with pytest.raises(ValueError, match="has the splits train, test and not 'dev'"):
            inputs.load_split(str(tmp_path / "data"), None, "dev")
        return
    path = tmp_path / f"data.{kind}"
    {"jsonl": data.to_json, "csv": data.to_csv, "parquet": data.to_parquet}[kind](path)
    loaded = inputs.load_split(str(path), None, "train[:4]")
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
    assert info["model"] == Path(demo.model_path).name and info["settings"]["label_smoothing"] == pytest.approx(-0.75)
    metrics = read(tmp_path / "runs" / "prm_per_param_lr0.003_seed0" / "metrics.json")
    assert metrics["mask/parameter_count"] == 2 * (2 * (64 + 64) + 2 * (64 + 32))


def test_cdpo_by_way_of_the_robust_loss():
    """(1-e) L + e L_swapped, from TRL's ((1-s) L - s L_swapped) / (1-2s)."""
    for rate in (0.1, 0.3, 0.45):
        s = dpo_noisy.methods(rate)["cdpo"]["label_smoothing"]
        assert (1 - s) / (1 - 2 * s) == pytest.approx(1 - rate) and -s / (1 - 2 * s) == pytest.approx(rate)


@pytest.mark.parametrize(
    "name",
    [
        *(f"qwen2.5-0.5b/{name}" for name in ("gsm8k_pairs", "gsm8k_pairs_lora", "pandalm", "pandalm_lora")),
        "smollm2-135m/gsm8k_pairs",
    ],
)
def test_the_frontier_settings_parse(name):
    path = ROOT / "recipes" / f"{name}.yaml"
    files = ["--dataset_name", "a.train.jsonl", "--eval_dataset_name", "a.test.jsonl"]
    script_args, training_args, model_args = dpo_noisy.parse(["--config", str(path), *files, *ON_CPU])
    assert script_args.dataset_name == ["a.train.jsonl"] and len(script_args.seeds) == 5
    assert {"adamw_eps:10", "prm_debiased_eps:10", *methods.CONTROLS} <= set(script_args.methods)
    assert ("early_stopping_clean" in script_args.methods) == ("gsm8k" in name)  # pandalm's labels are all there is
    assert training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps == 32
    assert training_args.output_dir.endswith(name) and model_args.use_peft == name.endswith("_lora")
    with pytest.raises(ValueError, match="needs a `--dataset_name`"):
        dpo_noisy.parse(["--config", str(path), *ON_CPU])


def test_the_published_setting_parses():
    path = ROOT / "recipes" / "qwen2.5-0.5b" / "dpo_noisy.yaml"
    overrides = ["--use_cpu", "--bf16", "False"]
    script_args, training_args, model_args = dpo_noisy.parse(["--config", str(path), *overrides])
    assert script_args.noise_rate == [0.3] and script_args.seeds == [0, 1, 2]
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
        (["--noise_rate", "0.1", "1.5"], r"`noise_rate` must be in \[0, 1\), got 1.5"),
        (["--noise_rate", "0", "--methods", "cdpo"], "`cdpo` and `robust` need a noise rate between 0 and 0.5"),
        (["--model_name_or_path", "somewhere"], "needs a `--dataset_name`"),
        (["--dataset_name", "somewhere", *ON_CPU], "needs a `--model_name_or_path`"),
        (["--prm_variance_beta", "1.5"], "prm_variance_beta=1.5"),
        (["--max_minutes", "0"], "`max_minutes` must be above 0, got 0"),
        (["--task_seed", "-1"], "`task_seed` is the built-in task's and at least 0, got -1"),
        (["--dataset_name", "a", "b", "--eval_dataset_name", "c", *ON_CPU], "has 1 values and `dataset_name` 2"),
        (["--dataset_name", "x/a", "y/a", *ON_CPU], "two datasets of one name"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo_noisy.parse(arguments)


def test_another_seed_is_another_built_in_task():
    rows = build_demo().test
    for seed, source in ((0, {}), (3, {"task_seed": 3})):
        made = []
        built_in = dataclasses.replace(
            dpo_noisy.BUILT_IN, make=lambda seed, made=made: made.append(seed) or ("", rows, rows)
        )
        script_args, _, model_args = dpo_noisy.parse(["--task_seed", str(seed)])
        (data,) = inputs.load_data(script_args, model_args, built_in)
        assert made == [seed] and data.source == source  # runs of before have no other settings than they had


@pytest.fixture
def files(tmp_path):
    """Two datasets in files and what a run on them needs; `files(…)` runs, and returns the exit code."""
    demo = build_demo()
    for i in (0, 1):
        demo.train.select(range(24 * i, 24 * i + 24)).to_json(tmp_path / f"data{i}.jsonl")
        demo.test.select(range(16)).to_json(tmp_path / f"held{i}.jsonl")

    def start(n, *arguments):
        return dpo_noisy.main(
            [
                *["--output_dir", str(tmp_path / "runs"), *SHORT, *ONE_RATE, "--dataset_test_split", "train"],
                *["--dataset_name", *(str(tmp_path / f"data{i}.jsonl") for i in range(n))],
                *["--eval_dataset_name", *(str(tmp_path / f"held{i}.jsonl") for i in range(n))],
                *["--model_name_or_path", demo.model_path, "--use_cpu", "--bf16", "False", "--save_strategy", "no"],
                *["--gradient_checkpointing", "False", "--per_device_train_batch_size", "4", *arguments],
            ]
        )

    return start


@pytest.mark.slow
def test_datasets_and_noise_rates_have_comparisons_of_their_own(files, tmp_path, capsys):
    assert files(2, "--noise_rate", "0", "0.4", "--methods", "adamw", "cdpo") == 0
    found = {str(path.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").glob("*/*/*/metrics.json")}
    expected = {f"data{i}/noise0.4/{method}_lr0.001_seed0" for i in (0, 1) for method in ("adamw", "cdpo")}
    expected |= {f"data{i}/noise0/adamw_lr0.001_seed0" for i in (0, 1)}
    assert found == {f"{name}/metrics.json" for name in expected}
    assert "Without cdpo, which are not for the noise rate 0." in capsys.readouterr().out
    for name in expected:
        info = read(tmp_path / "runs" / name / "run.json")
        assert info["dataset"] == f"{name[:5]}.jsonl" and info["noise_rate"] == float(name.split("/")[1][5:])
        flipped = read(tmp_path / "runs" / name / "margins.json")["train_flipped"]
        assert any(flipped) == (info["noise_rate"] > 0)
    assert (tmp_path / "runs" / "data1" / "noise0.4" / "report.html").is_file()


def test_a_run_is_the_same_wherever_its_files_lie(files, tmp_path):
    files(1, "--methods", "adamw")
    before = stamps(tmp_path / "runs")
    for name in ("data0", "held0"):
        os.utime(tmp_path / f"{name}.jsonl")  # as after another download
    files(1, "--methods", "adamw")
    assert stamps(tmp_path / "runs") == before
    lines = (tmp_path / "data0.jsonl").read_text().splitlines()
    (tmp_path / "data0.jsonl").write_text("\n".join(reversed(lines)))
    files(1, "--methods", "adamw")
    assert stamps(tmp_path / "runs") != before


def test_time_that_is_over_ends_between_runs(files, tmp_path, monkeypatch, capsys):
    train = comparison.Grid._train

    def last(self, *args):
        self.comparison.deadline = 0.0
        return train(self, *args)

    monkeypatch.setattr(comparison.Grid, "_train", last)
    arguments = ("--methods", "adamw", "prm_debiased", "constant_q", "--max_minutes", "60")
    done = []
    for code in (75, 75, 0):
        assert files(1, *arguments) == code
        out = capsys.readouterr().out
        assert ("The 60 minutes are over" in out) == (code == 75) and "Report:" in out
        done.append(len(stamps(tmp_path / "runs")))
    assert done == [1, 2, 3]
    assert read(tmp_path / "runs" / "comparison.json")["unfinished"] == []


def test_processes_share_the_runs(files, tmp_path):
    """What another process is training is left to it, and waited for at the end."""
    lock, other = (
        tmp_path / "runs" / name
        for name in (".locks/adamw_lr0.001_seed0.lock", "prm_debiased_lr0.003_seed0/metrics.json")
    )
    lock.parent.mkdir(parents=True)
    code = f"""
import filelock, pathlib, time


ROOT = Path(__file__).parents[2]
with filelock.FileLock({str(lock)!r}):
    print("held", flush=True)
    while not pathlib.Path({str(other)!r}).is_file():
        time.sleep(0.05)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        # With no time left the run is not waited for
        assert files(1, "--methods", "adamw", "prm_debiased", "--max_minutes", "1e-9") == 75
        assert files(1, "--methods", "adamw", "prm_debiased") == 0
        assert holder.wait(timeout=60) == 0
    found = stamps(tmp_path / "runs")
    assert found["prm_debiased_lr0.003_seed0"] < found["adamw_lr0.001_seed0"]
    with FileLock(lock, timeout=0):  # and was given back
        pass


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
        assert read(two / "run.json")["settings"] == read(one / "run.json")["settings"]
        for key, value in read(one / "metrics.json").items():
            if key.startswith(("drift/", "mask/", "memorization/", "rewards/accuracies")):
                assert read(two / "metrics.json")[key] == pytest.approx(value, rel=2e-2, abs=1e-4), key


@pytest.mark.slow
def test_a_sweep_spreads_the_runs_over_processes(tmp_path):
    """As many processes as there are devices (here only in name) share the runs of one comparison."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    command = [sys.executable, str(ROOT / "recipes" / "sweep.py"), str(ROOT / "recipes" / "dpo_noisy.py")]
    command += ["--output_dir", str(tmp_path / "runs"), *SHORT, *ONE_RATE, "--methods", "adamw", "prm_debiased"]
    command += ["--seeds", "0", "1", "2"]

    def start(*more):
        return subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False
        )

    assert start("--max_minutes", "1e-9").returncode == 75 and not stamps(tmp_path / "runs")
    result = start()
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    other = (tmp_path / "worker1.log").read_text()
    assert len(stamps(tmp_path / "runs")) == 6
    trained = [
        sum(" s)" in line and "accuracy" in line for line in out.splitlines()) for out in (result.stdout, other)
    ]
    assert sum(trained) == 6 and min(trained) > 0
    assert "Report:" in result.stdout and "Report:" in other
    failed = start("--seeds", "0", "0")
    assert failed.returncode == 1 and "none of them twice" in failed.stderr


def test_a_run_whose_gradients_are_not_finite_ends_there(tmp_path, capsys):
    state, control = TrainerState(global_step=7), TrainerControl()
    args = SimpleNamespace(output_dir=tmp_path / "adamw", fp16=False)
    stop = run_folder.StopWhereNotFinite()
    stop.on_log(args, state, control, logs={"eval_loss": 0.5})
    stop.on_log(args, state, control, logs={"grad_norm": 3.0})
    stop.on_log(SimpleNamespace(fp16=True), state, control, logs={"grad_norm": float("inf")})
    assert not control.should_training_stop
    stop.on_log(args, state, control, logs={"grad_norm": float("nan")})
    assert control.should_training_stop
    assert "adamw ends at step 7: its gradient's norm is nan" in capsys.readouterr().out
