"""The problems that a model solves before and after DPO: against plain decoding, cached, and what is refused."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prm_hf.compare import compare_runs
from prm_hf.demo import build_demo, completion_rows
from prm_hf.experiments import solve
from prm_hf.experiments.answers import pattern_checker
from prm_hf.experiments.checks import check_data, check_experiment
from prm_hf.experiments.data import load_data
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.generation import generate

from .comparisons import folder_of, on_files, read, read_lines, run_dpo_on_files


PATTERN = r"answer ([0-9 ]*\d)"


@pytest.fixture
def place(pairs, tmp_path, monkeypatch):
    """Problems of the built-in task in problems.jsonl, with a checker; the working folder."""
    rows = completion_rows(build_demo().test).select(range(100, 112))
    texts = [{"prompt": r["prompt"][0]["content"], "completion": r["completion"][0]["content"]} for r in rows]
    texts.append({**texts[0], "completion": "answer 0 0 0 0"})  # which is wrong
    (tmp_path / "problems.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in texts))
    (tmp_path / "digits.py").write_text(
        f"import re\n\n\ndef same(completion, answer):\n    return len({{str(re.findall(r'{PATTERN}', text)[-1:]) "
        "for text in (completion, answer)}) == 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


ARGUMENTS = ["--solve_dataset_name", "problems.jsonl", "--solve_answer_checker", "digits:same"]
ARGUMENTS += ["--solve_max_new_tokens", "16", "--solve_batch_size", "5"]


def solved_one_by_one(model):
    """By greedy decoding of one problem after another, with transformers alone."""
    tokenizer, judge = AutoTokenizer.from_pretrained(build_demo().model_path), pattern_checker(PATTERN)
    found = []
    for row in read_lines("problems.jsonl"):
        messages = [{"role": "user", "content": row["prompt"]}]
        inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        found.append(int(judge.is_right(tokenizer.decode(ids, skip_special_tokens=True), row["completion"])))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("lora", [[], ["--use_peft", "--lora_r", "2"]], ids=["full", "lora"])
def test_problems_are_solved_as_one_after_another(pairs, place, monkeypatch, no_pictures, lora):
    passes = []
    monkeypatch.setattr(solve, "solve", lambda *a, original=solve.solve: passes.append(len(a[1])) or original(*a))
    rates = ["--learning_rates", "3e-2", "--prm_learning_rates", "3e-2", "--max_steps", "6"]
    methods = ["--methods", "adamw", "prm_rows", *rates, "--save_only_model", "true"]
    assert run_dpo_on_files(pairs, place / "runs", *methods, *ARGUMENTS, *lora) == 0
    assert passes == [13] * 3  # before, once for all runs
    before = solved_one_by_one(AutoModelForCausalLM.from_pretrained(build_demo().model_path))
    for method in ("adamw", "prm_rows"):
        folder = folder_of(place / "runs", f"{method}_lr0.03_seed0")
        margins, metrics = read(folder / "margins.json"), read(folder / "metrics.json")
        after = solved_one_by_one(AutoModelForCausalLM.from_pretrained(folder))
        assert margins["solve_before"] == before and margins["solve"] == after != before
        assert margins["solve_groups"] == [*range(12), 0]
        assert metrics["solve/accuracy"] == sum(after) / 13 and metrics["solve/accuracy_before"] == sum(before) / 13
    assert len(compare_runs(sorted((place / "runs").glob("[!.]*"))).rows) == 2  # as a shell names them

    passes.clear()
    assert run_dpo_on_files(pairs, place / "runs", *methods, *ARGUMENTS, *lora, "--seeds", "0", "1") == 0
    assert passes == [13] * 2  # after the runs of the new seed


@pytest.mark.slow
def test_decoding_changes_no_run(pairs, place, no_pictures):
    """Not its numbers, and not the folder of a run that is measured without problems."""
    more = ["--methods", "adamw", "--use_peft", "--lora_r", "2", "--lora_dropout", "0.2"]
    run_dpo_on_files(pairs, place / "plain", *more, "--gradient_checkpointing", "true")
    run_dpo_on_files(pairs, place / "solved", *more, "--gradient_checkpointing", "true", *ARGUMENTS)
    plain, solved = (folder_of(place / name, "adamw_lr0.001_seed0") for name in ("plain", "solved"))
    metrics = {folder: read(folder / "metrics.json") for folder in (plain, solved)}
    new = metrics[solved].keys() - metrics[plain].keys()
    assert new == {"solve/accuracy", "solve/accuracy_before"}
    assert {k: v for k, v in metrics[solved].items() if k not in {*new, "wall_seconds"}} == {
        k: v for k, v in metrics[plain].items() if k != "wall_seconds"
    }
    assert plain.name != solved.name and "solve" not in read(plain / "run.json")["settings"]


def check(pairs, *arguments):
    """All that is checked before a model is loaded."""
    experiment = DPOExperiment.parse([*on_files(pairs), *arguments])
    check_experiment(experiment)
    for data in load_data(experiment.script_args, experiment.model_args, lambda rows: rows, experiment.columns()):
        check_data(experiment, data)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--solve_dataset_name", "no.jsonl"], "The dataset 'no.jsonl' does not exist"),
        (["--solve_answer_column", "answer"], "no column 'answer'; they have .*--solve_answer_column"),
        (["--solve_prompt_column", "problem"], "no column 'problem'; they have .*--solve_prompt_column"),
        (["--solve_answer_checker", "choice"], "no answer is found by 'choice' in 13 of 13 rows: 0, 1"),
        (["--solve_answer_checker", "choise"], "`solve_answer_checker` is 'choise': .* Did you mean 'choice'"),
        (["--solve_split", "test"], "`solve_split` is 'test', and .* has one split"),
        (["--solve_rows", "0"], "`solve_rows` must be at least 1"),
        (["--methods", "adamw", "early_stopping"], "`early_stopping` of `methods`: its numbers are of an evaluation"),
    ],
)
def test_wrong_arguments_are_named(pairs, place, arguments, message):
    with pytest.raises(ValueError, match=message):
        check(pairs, *ARGUMENTS, *arguments)


def test_problems_are_needed_and_not_trained_on(pairs, place, monkeypatch):
    with pytest.raises(ValueError, match="`solve_rows` is 3, which is for a `solve_dataset_name`, and there is none"):
        check(pairs, "--solve_rows", "3")
    rows = [json.loads(line) for line in (pairs / "train.jsonl").read_text().splitlines()]
    trained = {"prompt": rows[5]["prompt"][0]["content"], "completion": "answer 1"}
    with (place / "problems.jsonl").open("a") as file:
        file.write(json.dumps(trained) + "\n")
    with pytest.raises(ValueError, match=r"1 of the 14 problems .* are prompts of the training rows .*13"):
        check(pairs, *ARGUMENTS)
    check(pairs, *ARGUMENTS, "--solve_rows", "13")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`solve_dataset_name` needs whole weights .*: launch it on one GPU"):
        check(pairs, *ARGUMENTS, "--solve_rows", "13", "--methods", "adamw")


def test_a_model_s_own_generation_config_changes_nothing(place):
    """As that of Qwen2.5, which samples and penalizes repetition."""
    model_path = build_demo().model_path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    prompts = [[{"role": "user", "content": f"formal sort up : {i} 2 2 1"}] for i in range(4)]
    plain = generate(model, tokenizer, prompts, 12)
    assert all(completion.is_whole for completion in plain)
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=5, repetition_penalty=9.0, num_beams=3)
    assert generate(model, tokenizer, prompts, 12) == plain
    first = tokenizer(plain[0].text, add_special_tokens=False)["input_ids"][2]
    model.generation_config.eos_token_id = [first]
    shorter = generate(model, tokenizer, prompts[:1], 12)[0]  # all that ends a text does
    assert shorter.is_whole and len(shorter.text) < len(plain[0].text)
    model.generation_config.eos_token_id = None
    assert not generate(model, tokenizer, prompts[:1], 3)[0].is_whole
