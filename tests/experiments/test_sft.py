"""recipes/sft_noisy.py as a user runs it: what it writes, with rows of one's own, and generated answers."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prm_hf.compare import compare_runs, format_comparison
from prm_hf.demo import best_completion, build_demo, completion_rows, utility
from prm_hf.experiments import sft as sft_noisy


ROOT = Path(__file__).parents[2]


SHORT = ["--max_steps", "3", "--logging_steps", "1", "--eval_steps", "3", "--warmup_steps", "1"]
ONE_RATE = ["--learning_rates", "1e-3", "--prm_learning_rates", "1e-2", "--seeds", "0"]


def run(output_dir, *arguments):
    sft_noisy.main(["--output_dir", str(output_dir), *SHORT, *ONE_RATE, *arguments])


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    run(folder)
    return folder


def test_the_built_in_rows_are_the_best_completions():
    demo = build_demo()
    rows = completion_rows(demo.train)
    assert len(rows) == len(demo.train) and rows.column_names == ["prompt", "completion"]
    for row, pair in zip(rows, demo.train, strict=True):
        assert row["prompt"] == pair["prompt"]
        assert utility(row["prompt"], row["completion"]) >= pair["utility_chosen"]
    assert best_completion("formal sort down : 3 1 4 1") == "certainly answer 4 3 1 1 thanks"
    assert best_completion("casual sort up : 3 1 4 1") == "hey answer 1 1 3 4 thanks"


def test_a_comparison_writes_what_it_says(finished):
    runs = sorted(path.parent.name for path in finished.glob("*/metrics.json"))
    assert [name.split("_lr")[0] for name in runs] == ["adamw", "constant_q", "prm_debiased", "prm_per_tensor"]
    for name in runs:
        info, metrics = read(finished / name / "run.json"), read(finished / name / "metrics.json")
        assert info["task"] == "sft" and info["noise_rate"] == 0.3 and "accuracy" not in info
        assert metrics["steps"] == 3 and info["settings"]["effective_batch_size"] == 16
        names = {"exact_match", "token_accuracy", "loss", "memorization/corrupted_fit", "memorization/clean_fit"}
        names |= {"memorization/heldout_fit", "memorization/gap", "drift/kl", "drift/logratio_abs", "drift/params_rel"}
        assert names <= set(metrics)
        assert ("mask/mean_q" in metrics) == name.startswith("prm_")
        heldout = np.array(read(finished / name / "margins.json")["heldout"])
        assert heldout.shape == (512,) and np.mean(heldout > 0) == pytest.approx(metrics["exact_match"])
        assert metrics["memorization/heldout_fit"] == pytest.approx(metrics["token_accuracy"])
        history = [json.loads(line) for line in (finished / name / "history.jsonl").read_text().splitlines()]
        assert [row["step"] for row in history if "train/loss" in row] == [1, 2, 3]
        assert any("exact_match" in row for row in history)
        assert any("memorization/corrupted_fit" in row for row in history)


def test_the_report_has_the_names_of_sft(finished):
    text = format_comparison(compare_runs(finished))
    assert "corrupted fit" in text and "exact_match" in text and "held-out rows" in text
    assert "pairs" not in text and "|reward|" not in text and "flipped" not in text
    header = next(line for line in text.splitlines() if line.startswith("method"))
    assert header.split()[-4:] == ["mean", "q", "wall", "s"] and " loss " in header
    page = (finished / "report.html").read_text()
    assert "512 held-out rows" in page and (finished / "frontier.png").is_file()


def test_finished_runs_are_not_repeated_unless_their_settings_change(finished, capsys):
    stamps = {path: path.stat().st_mtime_ns for path in finished.glob("*/metrics.json")}
    run(finished)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert "finished before" in capsys.readouterr().out
    run(finished, "--methods", "adamw", "--noise_rate", "0.2")
    assert "trained again, since these settings changed: noise_rate" in capsys.readouterr().out


def write_rows(folder, n=24):
    demo = build_demo()
    for name in ("train", "test"):
        rows = completion_rows(getattr(demo, name)).select(range(n))
        text = {"question": [r[0]["content"] for r in rows["prompt"]]}
        text["solution"] = [r[0]["content"] for r in rows["completion"]]
        Dataset.from_dict(text).to_json(folder / f"{name}.jsonl")
    return demo.model_path


def own_rows(folder):
    return [
        *["--model_name_or_path", write_rows(folder), "--dataset_name", str(folder / "train.jsonl")],
        *["--eval_dataset_name", str(folder / "test.jsonl"), "--dataset_test_split", "train"],
        *["--prompt_column", "question", "--completion_column", "solution", "--as_messages"],
        *["--use_cpu", "--bf16", "False", "--gradient_checkpointing", "False", "--save_strategy", "no"],
        *["--eval_strategy", "no", "--per_device_train_batch_size", "4"],
    ]


def test_a_model_and_files_of_ones_own_with_lora_and_answers(tmp_path):
    run(
        tmp_path / "runs",
        *own_rows(tmp_path),
        *["--methods", "adamw", "prm_per_param", "constant_q", "--seeds", "0", "1"],
        *["--logging_steps", "10"],  # no mask is logged, and the control needs it nevertheless
        *["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"],
        *["--answer_pattern", r"answer ([0-9 ]*\d)", "--max_new_tokens", "16"],
    )
    folders = sorted(path.parent for path in (tmp_path / "runs").glob("*/metrics.json"))
    assert len(folders) == 6
    for folder in folders:
        metrics, info = read(folder / "metrics.json"), read(folder / "run.json")
        assert info["accuracy"] == "answer_match" and metrics["drift/kl"] >= 0
        # The reference sorts, whatever its style; three steps of LoRA leave that as it is.
        assert metrics["answer_match"] > 0.8 > metrics["exact_match"]
        assert np.mean(np.array(read(folder / "margins.json")["heldout"]) > 0) == metrics["answer_match"]
    assert "answer_match" in format_comparison(compare_runs(tmp_path / "runs"))


def test_answers_are_those_of_decoding_one_prompt_at_a_time(tmp_path):
    """Left padding, batches sorted by length, and the last match: against plain decoding."""
    model_path = write_rows(tmp_path, 12)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    pattern = r"answer ([0-9 ]*\d)"
    args = sft_noisy.parse(["--answer_pattern", pattern])[0]
    rows = completion_rows(build_demo().test).select(range(12))
    expected = []
    for row in rows:
        inputs = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        answer, right = sft_noisy.answers([tokenizer.decode(ids), row["completion"][0]["content"]], pattern)
        expected.append(answer == right)
    assert sum(expected) >= 9  # 98 % of the reference's digits are right

    config = sft_noisy.PRMSFTConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_eval_batch_size=5)
    trainer = sft_noisy.PRMSFTTrainer(model_path, args=config, train_dataset=rows)
    assert sft_noisy.matches_answers(trainer, rows, args.answer_pattern, 16) == expected
    assert sft_noisy.answers(["a #### 3\n#### 4 ", "none"], "#### (.+)") == ["4", None]
    with pytest.raises(ValueError, match="is not found in the completion of held-out row 0"):
        sft_noisy.matches_answers(trainer, rows, "#### (.+)", 4)


def test_the_real_setting_parses():
    path = ROOT / "recipes" / "qwen2.5-0.5b" / "sft_noisy.yaml"
    script_args, training_args, model_args = sft_noisy.parse(["--config", str(path), "--use_cpu", "--bf16", "False"])
    assert script_args.noise_rate == [0.3] and script_args.seeds == [0, 1, 2] and script_args.as_messages
    assert sft_noisy.answers(["so it is 5.\n#### 5"], script_args.answer_pattern) == ["5"]
    assert len(script_args.learning_rates) == len(script_args.prm_learning_rates)
    assert model_args.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct" and training_args.max_length == 512


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "cdpo"], "`methods`: cdpo unknown. Known are adamw, adamw_eps, adamw_embedding"),
        (["--answer_pattern", "####"], "`answer_pattern` must have one group"),
        (["--max_new_tokens", "0"], "`max_new_tokens` must be at least 1"),
        (["--memorization_max_rows", "0"], "`memorization_max_rows` must be at least 1"),
        (["--model_name_or_path", "somewhere"], "needs a `--dataset_name`"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        sft_noisy.parse(arguments)


def test_wrong_rows_are_named():
    args = sft_noisy.parse([])[0]
    with pytest.raises(ValueError, match="no column 'prompt'; it has .*--prompt_column"):
        sft_noisy.prepare_rows(Dataset.from_dict({"question": ["a"]}), args)
    args.as_messages = True
    with pytest.raises(ValueError, match="has messages already"):
        sft_noisy.prepare_rows(completion_rows(build_demo().train), args)
