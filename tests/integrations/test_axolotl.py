"""axolotl: its own command with the configurations that users copy, in an environment of its own."""

from typing import Any

import pytest
import yaml

from .tool_runs import ROOT, check_log, pairs, save_model, write_lines
from .tools import environment_of, logged


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # the first test also waits for the environment

PINNED = ["axolotl==0.19.0", "axolotl-contribs-lgpl==0.0.7", "axolotl-contribs-mit==0.0.6"]


@pytest.fixture(scope="module")
def axolotl(tmp_path_factory):
    with environment_of("axolotl", tmp_path_factory.mktemp("tools"), without_dependencies=PINNED) as tool:
        yield tool


def rows(task: str) -> list[dict[str, Any]]:
    if task == "sft":
        return [{"instruction": row["prompt"], "input": "", "output": row["chosen"]} for row in pairs()]
    return [
        {
            "conversation": [{"role": "user", "content": row["prompt"]}],
            "chosen": {"role": "assistant", "content": row["chosen"]},
            "rejected": {"role": "assistant", "content": row["rejected"]},
        }
        for row in pairs()
    ]


def local_config(tmp_path, task: str, **changes: Any) -> str:
    """The example with a tiny model, local rows and two steps, as a file."""
    config = yaml.safe_load((ROOT / "examples" / "axolotl" / f"{task}.yaml").read_text())
    path = write_lines(tmp_path / "rows.jsonl", rows(task))
    config["datasets"][0] |= {"path": path, "ds_type": "json"}
    config.pop("val_set_size", None)
    config |= {"base_model": save_model(tmp_path / "model"), "output_dir": str(tmp_path / "out")}
    config |= {"dataset_prepared_path": str(tmp_path / "prepared"), "bf16": False, "sequence_len": 256}
    config |= {"max_steps": 2, "logging_steps": 1, "gradient_accumulation_steps": 1, **changes}
    (file := tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return str(file)


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_the_examples_train_with_prm(axolotl, tmp_path, task):
    printed = axolotl.call("python", "-m", "axolotl.cli.train", local_config(tmp_path, task), cwd=tmp_path)
    assert "PRM trains 26 tensors with per_row masks as whole tensors on 1 process." in printed
    assert "signal_beta=0.98, relative_eps=10" in printed
    check_log(logged(tmp_path / "out"), 2)
