"""The comparison of SFT as a user runs it: what it writes, with rows of one's own, and generated answers."""

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from prm_hf.compare import compare_runs, format_comparison
from prm_hf.demo import best_completion, build_demo, completion_rows, utility
from prm_hf.experiments import sft
from prm_hf.experiments.answers import pattern_checker
from prm_hf.experiments.checks import check_experiment
from prm_hf.experiments.rows import check_rows
from prm_hf.experiments.sft import SFTExperiment
from prm_hf.experiments.solve import solve

from .comparisons import ON_CPU, ROOT, SHORT, on_files, read, read_lines, stamps


ONE_RATE = ["--learning_rates", "1e-3", "--prm_learning_rates", "1e-2", "--seeds", "0"]


def run(output_dir, *arguments):
    sft.main(["--output_dir", str(output_dir), *SHORT, *ONE_RATE, *arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A comparison on the built-in task, to be read."""
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
    assert [name.split("_lr")[0] for name in runs] == ["adamw_clean", "adamw_eps10", "adamw", "prm_noisy_labels"]
    for name in runs:
        info, metrics = read(finished / name / "run.json"), read(finished / name / "metrics.json")
        assert info["task"] == "sft" and info["noise_rate"] == 0.3 and "accuracy" not in info
        assert metrics["steps"] == 3 and info["settings"]["effective_batch_size"] == 16
        names = {"exact_match", "token_accuracy", "loss", "memorization/corrupted_fit", "memorization/clean_fit"}
        names |= {"memorization/heldout_fit", "memorization/gap", "drift/kl", "drift/logratio_abs", "drift/params_rel"}
        is_clean = name.startswith("adamw_clean")
        assert names - set(metrics) == ({"memorization/corrupted_fit"} if is_clean else set())
        assert info["settings"]["noise_rate"] == (0.0 if is_clean else 0.3)
        assert ("mask/mean_q" in metrics) == name.startswith("prm_")
        heldout = np.array(read(finished / name / "margins.json")["heldout"])
        assert read(finished / name / "margins.json")["heldout_groups"] == list(range(512))
        assert heldout.shape == (512,) and np.mean(heldout > 0) == pytest.approx(metrics["exact_match"])
        assert metrics["memorization/heldout_fit"] == pytest.approx(metrics["token_accuracy"])
        history = read_lines(finished / name / "history.jsonl")
        assert [row["step"] for row in history if "train/loss" in row] == [1, 2, 3]
        assert any("exact_match" in row for row in history)
        assert any("memorization/corrupted_fit" in row for row in history) == (not is_clean)


def test_the_report_has_the_names_of_sft(finished):
    text = format_comparison(compare_runs(finished))
    assert "corrupted fit" in text and "exact_match" in text and "held-out rows" in text
    assert "pairs" not in text and "|reward|" not in text and "flipped" not in text
    header = next(line for line in text.splitlines() if line.startswith("method"))
    assert header.split()[-4:] == ["mean", "q", "wall", "s"] and " loss " in header
    page = (finished / "report.html").read_text()
    assert "512 held-out rows" in page and (finished / "frontier.png").is_file()


def write_rows(folder, n=24):
    demo = build_demo()
    for name in ("train", "test"):
        rows = completion_rows(getattr(demo, name)).select(range(n))
        text = {"question": [r[0]["content"] for r in rows["prompt"]]}
        text["solution"] = [r[0]["content"] for r in rows["completion"]]
        Dataset.from_dict(text).to_json(folder / f"{name}.jsonl")


@pytest.mark.slow
def test_rows_of_ones_own_with_lora_and_answers(tmp_path, capsys, no_pictures):
    write_rows(tmp_path)

    def start(*more):
        run(
            tmp_path / "runs",
            *on_files(tmp_path),
            *["--prompt_column", "question", "--completion_column", "solution", "--as_messages"],
            *["--eval_strategy", "no", "--logging_steps", "10"],  # no mask is logged, and the control needs it
            *["--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"],
            *["--answer_pattern", r"answer ([0-9 ]*\d)", "--max_new_tokens", "16", "--seeds", "1", *more],
        )

    start("--methods", "adamw", "prm_per_param", "constant_q")
    before = stamps(tmp_path / "runs")
    assert len(before) == 3
    for name in before:
        folder = tmp_path / "runs" / name
        metrics, info = read(folder / "metrics.json"), read(folder / "run.json")
        assert info["accuracy"] == "answer_match" and metrics["drift/kl"] >= 0
        # The reference sorts, whatever its style; three steps of LoRA leave that as it is.
        assert metrics["answer_match"] > 0.8 > metrics["exact_match"]
        assert np.mean(np.array(read(folder / "margins.json")["heldout"]) > 0) == metrics["answer_match"]
    assert "answer_match" in format_comparison(compare_runs(tmp_path / "runs"))

    start("--methods", "adamw", "prm_per_param", "constant_q")
    assert stamps(tmp_path / "runs") == before and "finished before" in capsys.readouterr().out
    start("--methods", "adamw", "--noise_rate", "0.2")
    assert ": noise_rate" in capsys.readouterr().out
    assert before.items() < stamps(tmp_path / "runs").items()


def test_answers_are_those_of_decoding_one_prompt_at_a_time(tmp_path):
    """Left padding, batches sorted by length, and the last match: against plain decoding."""
    model_path = build_demo().model_path
    model, tokenizer = AutoModelForCausalLM.from_pretrained(model_path), AutoTokenizer.from_pretrained(model_path)
    checker = pattern_checker(r"answer ([0-9 ]*\d)")
    rows = completion_rows(build_demo().test).select(range(12))
    expected = []
    for row in rows:
        inputs = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(checker.is_right(tokenizer.decode(ids), row["completion"][0]["content"]))
    assert sum(expected) >= 9  # 98 % of the reference's digits are right

    config = sft.PRMSFTConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_eval_batch_size=5)
    trainer = sft.PRMSFTTrainer(model_path, args=config, train_dataset=rows)
    assert solve(trainer, rows["prompt"][:], sft.expected(rows, checker), checker, 16, 5) == expected
    with pytest.raises(ValueError, match=r"'#### \(.\+\)' in 12 of 12 rows: 0, 1, "):
        sft.expected(rows, pattern_checker("#### (.+)"))


def test_the_real_setting_parses():
    path = ROOT / "recipes" / "qwen2.5-0.5b" / "sft_noisy.yaml"
    parsed = SFTExperiment.parse(["--config", str(path), *ON_CPU])
    script_args = parsed.script_args
    assert script_args.noise_rate == [0.3] and script_args.seeds == [0, 1, 2] and script_args.as_messages
    assert script_args.checker.read("so it is 5.\n#### 5") == "5"
    assert len(script_args.learning_rates) == len(script_args.prm_learning_rates)
    assert parsed.model_args.model_name_or_path == "Qwen/Qwen2.5-0.5B-Instruct"
    assert parsed.training_args.max_length == 512


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "cdpo"], "`methods`: cdpo unknown. Known are adamw, adamw_eps, adamw_embedding"),
        (["--answer_pattern", "####"], "`answer_pattern` must have one group"),
        (["--answer_pattern", "(a)", "--answer_checker", "number"], "`answer_pattern` and `answer_checker` both say"),
        (["--answer_checker", "numbers"], "`answer_checker` is 'numbers': .* Did you mean 'number'"),
        (["--max_new_tokens", "0"], "`max_new_tokens` must be at least 1"),
        (["--memorization_max_rows", "0"], "`memorization_max_rows` must be at least 1"),
        (["--model_name_or_path", "somewhere"], "needs a `--dataset_name`"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        SFTExperiment.parse(arguments)


def test_answers_need_whole_weights(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for flag in (["--answer_checker", "exact"], ["--answer_pattern", "(a)"]):
        with pytest.raises(ValueError, match=f"`{flag[0][2:]}` needs whole weights .*: launch it on one GPU"):
            check_experiment(SFTExperiment.parse(["--methods", "adamw", *flag]))
    check_experiment(SFTExperiment.parse(["--methods", "adamw"]))


def test_wrong_rows_are_named():
    parsed = SFTExperiment.parse([])
    with pytest.raises(ValueError, match="no column 'prompt'; they have .*--prompt_column"):
        check_rows(Dataset.from_dict({"question": ["a"]}), "The rows", parsed.columns())
    args = sft.SFTArguments(as_messages=True)
    with pytest.raises(ValueError, match="has messages already"):
        sft.prepare_rows(completion_rows(build_demo().train), args)
