"""ms-swift: its own command with the configurations that users copy, in an environment of its own."""

import pytest

from .tool_runs import ROOT, check_log, pairs, save_model, write_lines
from .tools import environment_of, logged


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test also waits for the environment

SHORT = ["--max_steps", "2", "--logging_steps", "1", "--gradient_accumulation_steps", "1", "--use_cpu", "true"]
SHORT += ["--torch_dtype", "float32", "--max_length", "512", "--check_model", "false"]
# The names that ms-swift finds for a model of its hub
SHORT += ["--model_type", "qwen2", "--template", "qwen2_5"]


@pytest.fixture(scope="module")
def swift(tmp_path_factory):
    with environment_of("swift", tmp_path_factory.mktemp("tools")) as tool:
        yield tool


def rows(task: str) -> list[dict]:
    chats = [
        {"messages": [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["chosen"]}]}
        for row in pairs()
    ]
    if task == "sft":
        return chats
    return [{**chat, "rejected_response": row["rejected"]} for chat, row in zip(chats, pairs(), strict=True)]


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_the_examples_train_with_prm(swift, tmp_path, task):
    local = ["--model", save_model(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    local += ["--dataset", write_lines(tmp_path / "rows.jsonl", rows(task))]
    command = "sft" if task == "sft" else "rlhf"
    printed = swift.call("swift", command, f"examples/swift/{task}.yaml", *local, *SHORT, cwd=ROOT)
    assert "PRM trains 26 tensors with per_row masks as whole tensors on 1 process." in printed
    assert "signal_beta=0.98, relative_eps=10" in printed
    check_log(logged(tmp_path / "out"), 2)
