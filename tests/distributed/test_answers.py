"""Pairs of a model's answers, and the problems that it solves: two processes give what one gives."""

import json

import pytest

from prm_hf.demo import build_demo, completion_rows

from .launch import accelerate_launch


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHECKER = "tests.distributed.answers:same_digits"


def write_problems(file, start, n):
    rows = completion_rows(build_demo().test).select(range(start, start + n))
    texts = [{"prompt": r["prompt"][0]["content"], "completion": r["completion"][0]["content"]} for r in rows]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in texts))
    return str(file)


def test_pairs_do_not_depend_on_the_number_of_processes(tmp_path):
    data = write_problems(tmp_path / "rows.jsonl", 0, 11)
    own = [data, "--model", build_demo().model_path, "--answer_checker", CHECKER, "--samples", "3"]
    own += ["--max_new_tokens", "12", "--temperature", "1.5", "--batch_size", "4"]
    for path, processes in (("single", 1), ("ddp", 2)):
        output = ["--output", str(tmp_path / f"{path}.jsonl")]
        accelerate_launch(path, ["prm_hf", "pairs", *own, *output], tmp_path / f"{path}.log", processes)
        assert len(list(tmp_path.glob(f"{path}.completions.*.jsonl"))) == processes
    assert (tmp_path / "ddp.jsonl").read_text() == (tmp_path / "single.jsonl").read_text()


@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "2"]], ids=["full", "lora"])
def test_two_processes_solve_what_one_solves(tmp_path, lora):
    problems = write_problems(tmp_path / "problems.jsonl", 100, 13)
    for name in ("train", "test"):
        getattr(build_demo(), name).select(range(24)).to_json(tmp_path / f"{name}.jsonl")
    own = ["--model_name_or_path", build_demo().model_path, "--dataset_name", str(tmp_path / "train.jsonl")]
    own += ["--eval_dataset_name", str(tmp_path / "test.jsonl"), "--dataset_test_split", "train", "--bf16", "False"]
    own += ["--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "no", "--seeds", "0", "--methods", "adamw"]
    own += ["--learning_rates", "3e-3", "--max_length", "64", "--gradient_checkpointing", "False", "--use_cpu"]
    own += ["--solve_dataset_name", problems, "--solve_answer_checker", CHECKER, "--solve_max_new_tokens", "16", *lora]
    found = {}
    for path, processes in (("single", 1), ("ddp", 2)):
        batch = ["--per_device_train_batch_size", str(4 // processes), "--output_dir", str(tmp_path / path)]
        accelerate_launch(path, ["prm_hf", "dpo", *own, *batch], tmp_path / f"{path}.log", processes)
        (folder,) = (tmp_path / path).glob("adamw_*")
        margins = json.loads((folder / "margins.json").read_text())
        found[path] = {name: margins[name] for name in ("solve", "solve_before", "solve_groups")}
        assert json.loads((folder / "metrics.json").read_text())["solve/accuracy"] == sum(margins["solve"]) / 13
    assert found["ddp"] == found["single"] and len(found["ddp"]["solve"]) == 13
