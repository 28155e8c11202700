"""LLaMA-Factory in both of its versions, with the configurations that users copy, in an environment of its own."""

import json

import pytest

from .tool_runs import ROOT, check_log, pairs, save_model
from .tools import environment_of, logged


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test also waits for the environment

EXAMPLES = ROOT / "examples" / "llamafactory"


@pytest.fixture(scope="module")
def llamafactory(tmp_path_factory):
    with environment_of("llamafactory", tmp_path_factory.mktemp("tools")) as tool:
        yield tool


@pytest.fixture
def data(tmp_path):
    """A folder with `dataset_info.json` and the rows of both tasks."""
    instructions = [{"instruction": row["prompt"], "input": ""} for row in pairs()]
    both = list(zip(instructions, pairs(), strict=True))
    files = {
        "sft.json": [{**given, "output": row["chosen"]} for given, row in both],
        "dpo.json": [{**given, "chosen": row["chosen"], "rejected": row["rejected"]} for given, row in both],
        "dataset_info.json": {
            "rows_sft": {"file_name": "sft.json"},
            "rows_dpo": {
                "file_name": "dpo.json",
                "ranking": True,
                "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen", "rejected": "rejected"},
            },
        },
        "v1.yaml": {"rows": {"path": str(tmp_path / "sft.json"), "source": "local", "converter": "alpaca"}},
    }
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_the_examples_train_with_prm(llamafactory, data, tmp_path, task):
    local = [f"model_name_or_path={save_model(tmp_path / 'model')}", f"dataset_dir={data}", f"dataset=rows_{task}"]
    short = ["bf16=false", "use_cpu=true", "max_steps=2", "logging_steps=1", "gradient_accumulation_steps=1"]
    command = ["python", "-m", "prm_hf", "llamafactory", "train", str(EXAMPLES / f"{task}.yaml")]
    printed = llamafactory.call(*command, *local, *short, "warmup_steps=0", f"output_dir={tmp_path / 'out'}")
    assert "PRM trains 26 tensors with per_row masks as whole tensors on 1 process." in printed
    assert "signal_beta=0.98, relative_eps=10" in printed
    check_log(logged(tmp_path / "out"), 2)


def test_version_1_trains_with_prm(llamafactory, data, tmp_path):
    local = [f"model={save_model(tmp_path / 'model')}", f"train_dataset={data / 'v1.yaml'}"]
    short = ["bf16=false", "max_steps=2", "logging_steps=1", "micro_batch_size=4", "global_batch_size=4"]
    command = ["python", "-m", "prm_hf", "llamafactory", "sft", str(EXAMPLES / "v1_sft.yaml")]
    more = ["batching_workers=0", f"output_dir={tmp_path / 'out'}"]
    printed = llamafactory.call(*command, *local, *short, *more, USE_V1="1")
    assert printed.count("PRM trains 26 tensors with per_row masks as whole tensors on 1 process.") == 1
    assert "signal_beta=0.98, relative_eps=10" in printed and "step: 2, loss: " in printed
