"""The comparison of DPO as a user runs it: on the built-in task in short, on local files, interrupted, and wrongly."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from filelock import FileLock

from prm_hf.demo import build_demo
from prm_hf.experiments import data, runner, sweep
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.runs.methods import METHODS

from .comparisons import (
    ON_CPU,
    ONE_RATE,
    ROOT,
    SHORT,
    folder_of,
    infos,
    on_files,
    plain,
    read,
    read_lines,
    run_dpo,
    stamps,
    write_pairs,
)


def parse(*arguments):
    return DPOExperiment.parse(list(arguments))


def test_a_comparison_writes_what_it_says(tmp_path):
    run_dpo(tmp_path)
    runs = sorted(path.parent.name for path in tmp_path.glob("*/run.json"))
    assert plain(runs) == {
        "adamw_clean_lr0.001_seed0",
        "adamw_eps10_lr0.001_seed0",
        "adamw_lr0.001_seed0",
        "prm_noisy_labels_lr0.003_seed0",
    }
    assert len(runs) == 4
    for name in runs:
        info, metrics = read(tmp_path / name / "run.json"), read(tmp_path / name / "metrics.json")
        assert info["noise_rate"] == 0.3 and info["seed"] == 0 and info["hardware"]["world_size"] == 1
        assert info["settings"]["effective_batch_size"] == 16 and info["versions"]["trl"]
        assert metrics["steps"] == 3 and metrics["wall_seconds"] > 0
        names = {"rewards/accuracies", "memorization/flipped_fit", "memorization/clean_fit", "drift/kl"}
        names |= {"drift/reward_abs", "drift/logratio_abs", "drift/params_rel"}
        is_clean = name.startswith("adamw_clean")
        assert names - set(metrics) == ({"memorization/flipped_fit"} if is_clean else set())
        assert info["settings"]["noise_rate"] == (0.0 if is_clean else 0.3)
        assert ("mask/mean_q" in metrics) == name.startswith("prm_")
        history = read_lines(tmp_path / name / "history.jsonl")
        assert [row["step"] for row in history if "train/loss" in row] == [1, 2, 3]
        assert any("drift/kl" in row for row in history)
        margins = read(tmp_path / name / "margins.json")
        accuracy = np.mean(np.array(margins["heldout"]) > 0)
        assert accuracy == pytest.approx(metrics["rewards/accuracies"], abs=2 / 512)
        assert margins["heldout_groups"] == list(range(512))  # each pair has a prompt of its own
        flipped = np.array(margins["train_flipped"])
        assert len(flipped) == 256
        if is_clean:
            assert not flipped.any()
            continue
        assert 0.2 < flipped.mean() < 0.4
        assert np.mean(np.array(margins["train"])[flipped] > 0) == pytest.approx(
            metrics["memorization/flipped_fit"], abs=0.02
        )
    comparison_json = read(tmp_path / "comparison.json")
    assert len(comparison_json["runs"]) == 4 and comparison_json["statements"]
    report = (tmp_path / "report.html").read_text()
    body = re.sub(r"<script.*?</script>", "", report, flags=re.DOTALL)  # the chart's, which a browser's test looks at
    assert "data:image/png;base64" in body and "http" not in body.replace("http://www.w3.org", "")
    assert not re.search(r"<(script|link|img|iframe)[^>]*http", report)
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_finished_runs_are_not_repeated_unless_their_settings_change(pairs, tmp_path, capsys, no_pictures):
    def run(*more):
        run_dpo(tmp_path, *on_files(pairs), "--methods", "adamw", "prm_debiased", "constant_q", *more)

    run()
    before = stamps(tmp_path)
    run()
    assert stamps(tmp_path) == before and len(before) == 3
    assert "finished before" in capsys.readouterr().out

    # A file that is older than an argument that is None, or that has what does not count, is of the same run.
    for name, info in infos(tmp_path).items():
        assert info["settings"].pop("prm_signal_beta", None) is None
        info["settings"]["logging_nan_inf_filter"] = info["settings"]["output_dir"] = "another"
        (tmp_path / name / "run.json").write_text(json.dumps(info))
    # An interrupted run has no metrics.json: it alone is trained again.
    interrupted = folder_of(tmp_path, "prm_debiased_lr0.003_seed0")
    (interrupted / "metrics.json").unlink()
    run("--save_total_limit", "3", "--logging_steps", "2", "--hub_strategy", "end")
    after = stamps(tmp_path)
    assert {name for name in before if after[name] != before[name]} == {interrupted.name}

    # A setting of PRM concerns the PRM runs, and the control that takes its step from one of them. All others stay.
    run("--prm_softness", "0.5")
    out = capsys.readouterr().out
    assert f"since these settings differ from {interrupted.name}: prm_softness" in out
    now = stamps(tmp_path)
    assert {name: now[name] for name in after} == after
    new = {name.split("_lr")[0] for name in now.keys() - after.keys()}
    assert new == {"prm_debiased", "constant_q"} and len(read(tmp_path / "comparison.json")["runs"]) == 3

    # They go where it is asked for: those of the same method, learning rate and seed.
    run("--prm_softness", "0.5", "--overwrite_runs")
    assert now.keys() - stamps(tmp_path).keys() == {interrupted.name}
    assert f"{interrupted.name}: removed by `overwrite_runs`" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "folder"])
def test_local_datasets(kind, tmp_path):
    rows = {"prompt": [f"p{i}" for i in range(6)], "chosen": ["a"] * 6, "rejected": ["b"] * 6}
    dataset = Dataset.from_dict(rows)
    if kind == "folder":
        DatasetDict(train=dataset, test=dataset.select(range(2))).save_to_disk(tmp_path / "data")
        assert len(data.load_split(str(tmp_path / "data"), None, "test")) == 2
        with pytest.raises(ValueError, match="has the splits train, test and not 'dev'"):
            data.load_split(str(tmp_path / "data"), None, "dev")
        return
    path = tmp_path / f"data.{kind}"
    {"jsonl": dataset.to_json, "csv": dataset.to_csv, "parquet": dataset.to_parquet}[kind](path)
    loaded = data.load_split(str(path), None, "train[:4]")
    assert loaded["prompt"][:] == ["p0", "p1", "p2", "p3"] and loaded["chosen"][0] == "a"


@pytest.mark.slow
def test_a_model_and_files_of_ones_own_with_lora_and_other_losses(pairs, tmp_path, no_pictures):
    run_dpo(
        tmp_path,
        *on_files(pairs),
        *["--methods", "cdpo", "robust", "ipo", "prm_per_param", "--seeds", "1", "--eval_strategy", "no"],
        *["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"],
    )
    assert len(stamps(tmp_path)) == 4
    info = read(folder_of(tmp_path, "cdpo_lr0.001_seed1") / "run.json")
    assert info["model"] == os.path.basename(build_demo().model_path)
    assert info["settings"]["label_smoothing"] == pytest.approx(-0.75)
    metrics = read(folder_of(tmp_path, "prm_per_param_lr0.003_seed1") / "metrics.json")
    assert metrics["mask/parameter_count"] == 2 * (2 * (64 + 64) + 2 * (64 + 32))


def test_cdpo_by_way_of_the_robust_loss():
    """(1-e) L + e L_swapped, from TRL's ((1-s) L - s L_swapped) / (1-2s)."""
    for rate in (0.1, 0.3, 0.45):
        s = METHODS["cdpo"].changes(rate)["label_smoothing"]
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
    parsed = parse("--config", str(path), *files, *ON_CPU)
    script_args, training_args = parsed.script_args, parsed.training_args
    assert script_args.dataset_name == ["a.train.jsonl"] and len(script_args.seeds) == 5
    controls = {name for name, method in METHODS.items() if method.group == "control"}
    assert {"adamw_eps:10", "prm_debiased_eps:10", *controls} <= set(script_args.methods)
    assert ("early_stopping_clean" in script_args.methods) == ("gsm8k" in name)  # pandalm's labels are all there is
    assert training_args.per_device_train_batch_size * training_args.gradient_accumulation_steps == 32
    assert training_args.output_dir.endswith(name) and parsed.model_args.use_peft == name.endswith("_lora")
    with pytest.raises(ValueError, match="needs a `--dataset_name`"):
        parse("--config", str(path), *ON_CPU)


def test_the_published_setting_parses():
    parsed = parse("--config", str(ROOT / "recipes" / "qwen2.5-0.5b" / "dpo_noisy.yaml"), *ON_CPU)
    script_args = parsed.script_args
    assert script_args.noise_rate == [0.3] and script_args.seeds == [0, 1, 2]
    assert parsed.model_args.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert parsed.training_args.beta == 0.1 and len(script_args.learning_rates) == len(script_args.prm_learning_rates)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "adam"], "`methods`: adam unknown. Known are adamw, adamw_eps, adamw_embedding"),
        (["--methods", "adamw", "constant_q"], "add a PRM method"),
        (["--learning_rates", "1e-3", "2e-3", "--prm_learning_rates", "1e-3"], "2 values and `prm_learning_rates` 1"),
        (["--learning_rates", "0", "--prm_learning_rates", "1"], "positive numbers, got 0"),
        (["--seeds", "1", "1"], "`seeds` must name at least one, and none twice"),
        (["--noise_rate", "0.1", "1.5"], r"`noise_rate` must be in \[0, 1\), got 1.5"),
        (["--noise_rate", "0", "--methods", "adamw", "cdpo"], "`cdpo` needs a noise rate between 0 and 0.5"),
        (["--noise_rate", "0.6", "--methods", "robust"], "`robust` needs a noise rate between 0 and 0.5"),
        (["--model_name_or_path", "somewhere"], "needs a `--dataset_name`"),
        (["--dataset_name", "somewhere", *ON_CPU], "needs a `--model_name_or_path`"),
        (["--prm_variance_beta", "1.5"], "prm_variance_beta=1.5"),
        (["--optim", "adamw_torch"], "`methods` choose the optimizers, and `optim` is .*: leave it unset"),
        (["--max_minutes", "0"], "`max_minutes` must be above 0, got 0"),
        (["--task_seed", "-1"], "`task_seed` is the built-in task's and at least 0, got -1"),
        (["--dataset_name", "a", "b", "--eval_dataset_name", "c", *ON_CPU], "has 1 values and `dataset_name` 2"),
        (["--dataset_name", "x/a", "y/a", *ON_CPU], "two datasets of one name"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(*arguments)


def test_another_seed_is_another_built_in_task(monkeypatch):
    demo, made = build_demo(), []
    monkeypatch.setattr(data, "build_demo", lambda seed: made.append(seed) or demo)
    for seed, source in ((0, {}), (3, {"task_seed": 3})):
        parsed = parse("--task_seed", str(seed))
        (found,) = data.load_data(parsed.script_args, parsed.model_args, parsed.built_in_rows, parsed.columns())
        assert made.pop() == seed and found.source == source  # runs of before have no other settings than they had


@pytest.mark.slow
def test_datasets_and_noise_rates_have_comparisons_of_their_own(tmp_path, capsys):
    folders = [tmp_path / f"data{i}" for i in (0, 1)]
    for folder in folders:
        folder.mkdir()
        write_pairs(folder)
        (folder / "train.jsonl").rename(tmp_path / f"{folder.name}.jsonl")
    arguments = [*on_files(folders[0]), "--noise_rate", "0", "0.4", "--methods", "adamw", "cdpo"]
    arguments += ["--dataset_name", *(str(tmp_path / f"data{i}.jsonl") for i in (0, 1))]
    arguments += ["--eval_dataset_name", *(str(folder / "test.jsonl") for folder in folders)]
    assert run_dpo(tmp_path / "runs", *arguments) == 0
    found = {
        str(path.parent.relative_to(tmp_path / "runs")) for path in (tmp_path / "runs").glob("*/*/*/metrics.json")
    }
    expected = {f"data{i}/noise0.4/{method}_lr0.001_seed0" for i in (0, 1) for method in ("adamw", "cdpo")}
    expected |= {f"data{i}/noise0/adamw_lr0.001_seed0" for i in (0, 1)}
    assert plain(found) == expected
    assert "Without cdpo, which are not for the noise rate 0." in capsys.readouterr().out
    for name in found:
        info = read(tmp_path / "runs" / name / "run.json")
        assert info["dataset"] == f"{name[:5]}.jsonl" and info["noise_rate"] == float(name.split("/")[1][5:])
        flipped = read(tmp_path / "runs" / name / "margins.json")["train_flipped"]
        assert any(flipped) == (info["noise_rate"] > 0)
    assert (tmp_path / "runs" / "data1" / "noise0.4" / "report.html").is_file()


@pytest.mark.slow
def test_a_run_is_the_same_wherever_its_files_lie(tmp_path, no_pictures):
    write_pairs(tmp_path, train=24, test=16)

    def run():
        run_dpo(tmp_path / "runs", *on_files(tmp_path), "--methods", "adamw", "--eval_strategy", "no")
        return stamps(tmp_path / "runs")

    before = run()
    for name in ("train", "test"):
        os.utime(tmp_path / f"{name}.jsonl")  # as after another download
    assert run() == before
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(reversed(lines)))
    assert run() != before


@pytest.mark.slow
def test_time_that_is_over_ends_between_runs(pairs, tmp_path, monkeypatch, capsys, no_pictures):
    make = runner.Runner.try_run

    def last(self, *args):
        self.deadline = 0.0
        return make(self, *args)

    monkeypatch.setattr(runner.Runner, "try_run", last)
    arguments = ("--methods", "adamw", "prm_debiased", "constant_q", "--max_minutes", "60", "--eval_strategy", "no")
    for done, code in ((1, 75), (2, 75), (3, 0)):
        assert run_dpo(tmp_path, *on_files(pairs), *arguments) == code
        assert ("The 60 minutes are over" in capsys.readouterr().out) == (code == 75)
        reported = read(tmp_path / "comparison.json")
        assert len(stamps(tmp_path)) == len(reported["runs"]) == done and reported["unfinished"] == []


@pytest.mark.slow
def test_processes_share_the_runs(pairs, tmp_path, no_pictures):
    """What another process is training is left to it, and waited for at the end."""
    arguments = [*on_files(pairs), "--methods", "adamw", "prm_debiased", "--eval_strategy", "no"]
    assert run_dpo(tmp_path, *arguments) == 0
    first, second = (folder_of(tmp_path, f"{name}_seed0") for name in ("adamw_lr0.001", "prm_debiased_lr0.003"))
    lock, other = tmp_path / ".locks" / f"{first.name}.lock", second / "metrics.json"
    for folder in (first, second):
        (folder / "metrics.json").unlink()
    code = f"""
import filelock, pathlib, time
with filelock.FileLock({str(lock)!r}):
    print("held", flush=True)
    while not pathlib.Path({str(other)!r}).is_file():
        time.sleep(0.05)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        # With no time left the run is not waited for
        assert run_dpo(tmp_path, *arguments, "--max_minutes", "1e-9") == 75
        assert run_dpo(tmp_path, *arguments) == 0
        assert holder.wait(timeout=60) == 0
    found = stamps(tmp_path)
    assert found[second.name] < found[first.name]
    with FileLock(lock, timeout=0):  # and was given back
        pass


SCRIPT, MODULE = [str(ROOT / "recipes" / "dpo_noisy.py")], ["-m", "prm_hf", "dpo"]


def launch(flags, output_dir, *arguments, program=SCRIPT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *program]
    command += ["--output_dir", str(output_dir), *SHORT, *ONE_RATE, *arguments]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, cwd=output_dir, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.slow
def test_accelerate_launch_with_two_processes(tmp_path):
    """From a clone or without one. Two processes share the batch of 16: the runs are those of one, up to rounding."""
    flags = ["--multi_gpu", "--num_processes", "2"]
    for folder, f, program in (("two", flags, SCRIPT), ("one", ["--num_processes", "1"], MODULE)):
        (tmp_path / folder).mkdir()
        out = launch(f, tmp_path / folder, "--methods", "adamw", "prm_per_tensor", program=program)
        assert "PRM per_tensor" in out and "Report:" in out
    for name in ("adamw_lr0.001_seed0", "prm_per_tensor_lr0.003_seed0"):
        two, one = (folder_of(tmp_path / folder, name) for folder in ("two", "one"))
        assert read(two / "run.json")["hardware"]["world_size"] == 2
        assert read(two / "run.json")["settings"] == read(one / "run.json")["settings"]
        for key, value in read(one / "metrics.json").items():
            if key.startswith(("drift/", "mask/", "memorization/", "rewards/accuracies")):
                assert read(two / "metrics.json")[key] == pytest.approx(value, rel=2e-2, abs=1e-4), key


@pytest.mark.slow
def test_a_sweep_spreads_the_runs_over_processes(tmp_path):
    """As many processes as there are devices (here only in name) share the runs of one comparison."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0,1"}
    command = [sys.executable, str(ROOT / "recipes" / "sweep.py"), *SCRIPT, "--output_dir", str(tmp_path / "runs")]
    command += [*SHORT, *ONE_RATE, "--methods", "adamw", "prm_debiased", "--seeds", "0", "1", "2"]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path, check=False
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    other = (tmp_path / "worker1.log").read_text()
    assert len(stamps(tmp_path / "runs")) == 6
    trained = [
        sum(" s)" in line and "accuracy" in line for line in out.splitlines()) for out in (result.stdout, other)
    ]
    assert sum(trained) == 6 and min(trained) > 0
    assert "Report:" in result.stdout and "Report:" in other


EXITS = """
import json, os, sys
codes = json.loads(sys.argv[1])
print("device", os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
print("of worker", os.environ["CUDA_VISIBLE_DEVICES"], file=sys.stderr)
sys.exit(codes[int(os.environ["CUDA_VISIBLE_DEVICES"])])
"""


@pytest.mark.parametrize("codes, code", [([0, 0], 0), ([75, 0], 75), ([75, 2], 2), ([0, 2], 2), ([75, 75], 75)])
def test_a_sweep_ends_with_the_code_of_its_processes(tmp_path, monkeypatch, capfd, codes, code):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    (tmp_path / "program.py").write_text(EXITS)
    assert sweep.main(["program.py", json.dumps(codes)]) == code
    here, there = capfd.readouterr(), (tmp_path / "worker1.log").read_text()
    assert here.out == "device 0\n" and here.err == "of worker 0\n"
    assert sorted(there.splitlines()) == ["device 1", "of worker 1"]


@pytest.mark.parametrize("method, unmade", [("adamw", 0), ("sven", 1)])  # the step that Sven cannot make
def test_a_rate_at_which_training_diverges(method, unmade, pairs, tmp_path, capsys, no_pictures):
    arguments = [*on_files(pairs), "--methods", method, "--learning_rates", "1e-3", "1e30"]
    arguments += ["--prm_learning_rates", "1e-3", "1e-2", "--max_steps", "8", "--eval_strategy", "no"]
    assert run_dpo(tmp_path, *arguments) == 0
    sound, diverged = (folder_of(tmp_path, f"{method}_lr{rate}_seed0") for rate in ("0.001", "1e+30"))
    metrics = read(diverged / "metrics.json")
    assert metrics["diverged"] is True and 1 < metrics["diverged_at_step"] == metrics["steps"] + unmade < 8
    assert "rewards/accuracies" not in metrics and read(sound / "metrics.json")["steps"] == 8
    assert f"diverged at step {metrics['diverged_at_step']}" in capsys.readouterr().out
