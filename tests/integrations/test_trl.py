"""`prm-hf trl dpo` and `sft`: TRL's own scripts, with the configurations that users copy."""

import importlib
import json
import logging

import pytest

from prm_hf import cli
from prm_hf.integrations.trl import SCRIPTS

from .tool_runs import ROOT, check_log, completions, pairs, save_model, write_lines


SHORT = ["--use_cpu", "--dtype", "float32", "--bf16", "false", "--report_to", "none", "--eval_strategy", "no"]
SHORT += ["--max_steps", "2", "--logging_steps", "1", "--gradient_accumulation_steps", "1"]
SHORT += ["--gradient_checkpointing", "false"]


@pytest.fixture
def run(tmp_path, quiet):
    """Runs a script with its example on a tiny model and local rows, and further arguments."""
    model = save_model(tmp_path / "model")

    def run(script: str, *arguments: str) -> int:
        rows = pairs() if script == "dpo" else completions()
        write_lines(tmp_path / "rows" / "train.jsonl", rows)
        config = str(ROOT / "examples" / "trl" / f"{script}.yaml")
        local = ["--model_name_or_path", model, "--dataset_name", str(tmp_path / "rows")]
        local += ["--output_dir", str(tmp_path / "out")]
        return cli.main(["trl", script, "--config", config, *local, *SHORT, *arguments])

    return run


@pytest.mark.parametrize("script", ["dpo", "sft"])
def test_the_examples_train_with_prm(run, tmp_path, caplog, script):
    with caplog.at_level(logging.WARNING, logger="prm_hf"):
        assert run(script) == 0
    (line,) = [record.getMessage() for record in caplog.records if "PRM trains" in record.getMessage()]
    assert "signal_beta=0.98, relative_eps=10" in line
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    check_log(state["log_history"], 2)


def test_prm_is_the_default_and_another_optimizer_is_taken(run, tmp_path, monkeypatch):
    """What a user says wins: the command line over the configuration, and both over the default."""
    seen = []
    monkeypatch.setattr(importlib.import_module("trl.scripts.dpo"), "main", lambda *arguments: seen.append(arguments))
    run("dpo", "--optim", "adamw_torch")
    (config := tmp_path / "none.yaml").write_text("learning_rate: 1.0e-5\n")
    assert cli.main(["trl", "dpo", "--config", str(config), "--output_dir", "out", "--bf16", "false"]) == 0
    config.write_text("optim: sgd\n")
    assert cli.main(["trl", "dpo", "--config", str(config), "--output_dir", "out", "--bf16", "false"]) == 0
    assert [arguments[1].optim.value for arguments in seen] == ["adamw_torch", "prm", "sgd"]


WRONG = [
    ([], "got nothing: name a training script of TRL, one of distillation, dpo, grpo"),
    (["ppo"], "got 'ppo': name a training script"),
    (["dpo", "--accelerate_config", "zero3"], "write `accelerate launch --config_file FILE -m prm_hf trl dpo"),
    (["dpo", "--use_cpu", "--bf16", "true", "--fp16", "true"], "At most one of fp16 and bf16"),
    (["dpo", "--bf16", "false", "--optim_args", "reductoin=per_row"], "Did you mean 'reduction'?"),
    (["dpo", "--bf16", "false", "--optim_args", "relative_eps=-1"], "Invalid relative_eps=-1"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_input_is_one_line(capsys, arguments, message):
    assert cli.main(["trl", *arguments]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("prm-hf trl: error: ") and message in printed and printed.count("\n") == 1


def test_trl_has_the_scripts():
    for name in SCRIPTS:
        script = importlib.import_module(f"trl.scripts.{name}")
        assert callable(script.main) and callable(script.make_parser)
