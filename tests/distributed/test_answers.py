"""Pairs of a model's answers, and the problems that it solves: two processes give what one gives."""

import json

import pytest

from prm_hf.demo import build_demo, completion_rows

from .launch import accelerate_launch


pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CHECKER = "tests.distributed.answers:same_digits"
PROCESSES = {"single": 1, "ddp": 2}
LORA = {"full": [], "lora": ["--use_peft", "--lora_r", "2"]}


def write_problems(file, start, n):
    rows = completion_rows(build_demo().test).select(range(start, start + n))
    texts = [{"prompt": r["prompt"][0]["content"], "completion": r["completion"][0]["content"]} for r in rows]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in texts))


def commands(folder, processes):
    """`prm-hf pairs`, and `prm-hf dpo` that solves problems, of a whole model and of one with adapters."""
    output = ["--output", str(folder / "pairs.jsonl")]
    own = [str(folder.parent / "rows.jsonl"), "--model", build_demo().model_path, "--answer_checker", CHECKER]
    own += ["--samples", "3", "--max_new_tokens", "12", "--temperature", "1.5", "--batch_size", "4"]
    found = [("pairs", [*own, *output])]
    own = ["--model_name_or_path", build_demo().model_path, "--dataset_name", str(folder.parent / "train.jsonl")]
    own += ["--eval_dataset_name", str(folder.parent / "test.jsonl"), "--dataset_test_split", "train"]
    own += ["--max_steps", "4", "--eval_strategy", "no", "--save_strategy", "no", "--seeds", "0", "--methods", "adamw"]
    own += ["--learning_rates", "3e-3", "--max_length", "64", "--gradient_checkpointing", "False", "--use_cpu"]
    own += ["--solve_dataset_name", str(folder.parent / "problems.jsonl"), "--solve_answer_checker", CHECKER]
    own += ["--solve_max_new_tokens", "16", "--bf16", "False", "--per_device_train_batch_size", str(4 // processes)]
    return found + [("dpo", [*own, "--output_dir", str(folder / name), *more]) for name, more in LORA.items()]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """By path the folder of what one launch of each made."""
    root = tmp_path_factory.mktemp("answers")
    write_problems(root / "rows.jsonl", 0, 11)
    write_problems(root / "problems.jsonl", 100, 13)
    for name in ("train", "test"):
        getattr(build_demo(), name).select(range(24)).to_json(root / f"{name}.jsonl")
    found = {path: root / path for path in PROCESSES}
    for path, folder in found.items():
        folder.mkdir()
        (plan := folder / "plan.json").write_text(json.dumps(commands(folder, PROCESSES[path])))
        accelerate_launch(path, ["tests.distributed.recipe", str(plan)], folder / "log", PROCESSES[path])
    return found


def test_pairs_do_not_depend_on_the_number_of_processes(folders):
    for path, folder in folders.items():
        assert len(list(folder.glob("pairs.completions.*.jsonl"))) == PROCESSES[path]
    assert (folders["ddp"] / "pairs.jsonl").read_text() == (folders["single"] / "pairs.jsonl").read_text()


@pytest.mark.parametrize("model", LORA)
def test_two_processes_solve_what_one_solves(folders, model):
    found = {}
    for path in folders:
        (folder,) = (folders[path] / model).glob("adamw_*")
        margins = json.loads((folder / "margins.json").read_text())
        found[path] = {name: margins[name] for name in ("solve", "solve_before", "solve_groups")}
        assert json.loads((folder / "metrics.json").read_text())["solve/accuracy"] == sum(margins["solve"]) / 13
    assert found["ddp"] == found["single"] and len(found["ddp"]["solve"]) == 13
