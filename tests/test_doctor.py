"""`prm-hf doctor`: what it says of each configuration is what happens there, and it needs no more than torch."""

import importlib.metadata
import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import config_args

from prm_hf import cli, doctor
from prm_hf.sharding import ShardingPath

from .test_installation import EXTRAS, run_without


ROOT = Path(__file__).parents[1]
WHOLE = "every process holds whole tensors"
PATHS = {
    "single": None,
    "ddp": None,
    "fsdp2": ShardingPath.FSDP2,
    "zero0": None,
    "zero1": ShardingPath.ZERO_12,
    "zero2": ShardingPath.ZERO_12,
    "zero2_offload": ShardingPath.ZERO_12,
    "zero3": ShardingPath.ZERO_3,
    "zero3_offload": ShardingPath.ZERO_3,
}


def report(capsys, *arguments):
    """The exit code, and by its label the text of each line; several of one label are joined."""
    code = cli.main(["doctor", *arguments])
    out = capsys.readouterr().out
    found, label = {}, ""
    for line in out.splitlines()[1:]:
        label, text = line[: doctor.LABEL].strip() or label, line[doctor.LABEL :].strip()
        found[label] = f"{found.get(label, '')} {text}".strip()
    return code, found, out


def configuration(folder, **settings):
    """A file of accelerate."""
    machine = {"compute_environment": "LOCAL_MACHINE", "num_machines": 1, "num_processes": 2}
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump({**machine, **settings}))
    return str(file)


def test_every_configuration_is_known():
    assert {path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml")} == {*PATHS}


@pytest.mark.parametrize("name", PATHS)
def test_the_path_of_a_configuration(name, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, found, out = report(capsys, "--config_file", f"accelerate_configs/{name}.yaml")
    path = PATHS[name]
    assert code == 0 and found["PRM"] == "trains there with its defaults"
    assert found["sharding"] == (WHOLE if path is None else f"{path.value}, ShardingPath.{path.name}")
    assert "state_dtype" not in found.get("refused", "")
    assert len(out.splitlines()) < 35 and max(map(len, out.splitlines())) <= doctor.WIDTH


FSDP1 = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}}
REFUSED = {
    "rows": (FSDP1, "Invalid reduction='per_row': it is not supported under FSDP1"),
    "flat": (
        {**FSDP1, "fsdp_config": {"fsdp_version": 1, "fsdp_use_orig_params": False}},
        "Set `fsdp_use_orig_params: true`",
    ),
    "offload": (
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2, "offload_optimizer_device": "cpu"}},
        "accelerate would silently replace PRM by DeepSpeed's CPU Adam",
    ),
    "nvme": (
        {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_param_device": "nvme"}},
        "`zero_optimization.offload_param.device: nvme`",
    ),
    "megatron": ({"distributed_type": "MEGATRON_LM"}, "PRM was never run under Megatron-LM"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case, tmp_path, capsys):
    settings, message = REFUSED[case]
    code, found, _ = report(capsys, "--config_file", configuration(tmp_path, **settings))
    assert code == 1 and found["PRM"].startswith("is refused: ") and message in found["PRM"]


def test_a_refused_section_of_deepspeed(tmp_path, capsys):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"optimizer": {"type": "Adam"}, "zero_optimization": {"stage": 3}}))
    settings = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": str(file)}}
    code, found, _ = report(capsys, "--config_file", configuration(tmp_path, **settings))
    assert code == 1 and "a section `optimizer`, which would silently take PRM's place" in found["PRM"]
    assert found["sharding"] == "DeepSpeed ZeRO-3, ShardingPath.ZERO_3"


def test_what_fsdp1_cannot_resume(tmp_path, capsys):
    for kind, is_lost in (("SHARDED_STATE_DICT", True), ("FULL_STATE_DICT", False)):
        settings = {**FSDP1, "fsdp_config": {"fsdp_version": 1, "fsdp_state_dict_type": kind}}
        _, found, _ = report(capsys, "--config_file", configuration(tmp_path, **settings))
        assert ("resuming: accelerate loads no optimizer state" in found["refused"]) == is_lost


DEEPSPEED = {"distributed_type": "DEEPSPEED"}
WRONG = {
    "unknown": ({"distributed_type": "NO", "num_gpus": 2}, "unknown keys (['num_gpus'])"),
    "no type": ({}, "`distributed_type` must be specified"),
    "stage": ({**DEEPSPEED, "deepspeed_config": {"zero_stage": 4}}, "The stage of DeepSpeed's ZeRO is 4"),
    "missing": ({**DEEPSPEED, "deepspeed_config": {"deepspeed_config_file": "zero.json"}}, "does not exist in the"),
    "no JSON": ({**DEEPSPEED, "deepspeed_config": {"deepspeed_config_file": "config.yaml"}}, "is not JSON: "),
    "section": ({**DEEPSPEED, "deepspeed_config": {"deepspeed_config_file": "empty.json"}}, "no section `zero_opt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case, tmp_path, capsys, monkeypatch):
    settings, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.json").write_text("{}")
    assert cli.main(["doctor", "--config_file", configuration(tmp_path, **settings)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("prm-hf doctor: error: ") and message in captured.err
    assert captured.err.count("\n") == 1


def test_a_file_that_is_none(tmp_path, capsys):
    (tmp_path / "broken.yaml").write_text("a: [")
    cases = {"none.yaml": "does not exist", ".": "is a folder", "broken.yaml": "accelerate does not take it"}
    for name, message in cases.items():
        assert cli.main(["doctor", "--config_file", str(tmp_path / name)]) == 2
        assert message in capsys.readouterr().err


def test_without_a_configuration(capsys, monkeypatch, tmp_path):
    """What accelerate would take by itself is taken here too."""
    monkeypatch.setattr(config_args, "default_config_file", str(tmp_path / "config.yaml"))
    code, found, _ = report(capsys)
    assert code == 0 and "no configuration of accelerate" in found["launch"] and "sharding" not in found
    configuration(tmp_path, distributed_type="FSDP", fsdp_config={"fsdp_version": 2})
    code, found, _ = report(capsys)
    assert code == 0 and found["sharding"] == "FSDP2, ShardingPath.FSDP2"


def test_devices_and_what_is_in_the_way(capsys, monkeypatch, tmp_path):
    import torch

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    _, found, _ = report(capsys, "--config_file", "accelerate_configs/fsdp2.yaml")
    assert found["devices"].startswith("no GPU, ") and "has FSDP on GPUs alone" in found["this machine"]
    for name, key in (("zero2", "1"), ("ddp", "0")):
        monkeypatch.setenv("DS_ACCELERATOR", "cpu" if key == "0" else "")
        _, found, _ = report(capsys, "--config_file", f"accelerate_configs/{name}.yaml")
        assert ("DS_ACCELERATOR" in found["this machine"]) == (key == "1")

    class Card:
        total_memory = 140 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Card)
    _, found, _ = report(capsys, "--config_file", "accelerate_configs/ddp.yaml")
    assert found["devices"] == "GPU 0: H200, 140 GiB" and found["this machine"].startswith(
        "has 1 GPU, and 2 processes"
    )


def test_tools_and_versions(capsys, monkeypatch):
    """Of each tool whether it is there and how PRM gets in, and which package is none that is tested."""
    monkeypatch.setattr(doctor, "version_of", lambda package: {"torch": "2.13.0", "trl": "9.1"}.get(package))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.7", 'trl<1.17; extra == "trl"'])
    monkeypatch.setattr(config_args, "default_config_file", "nowhere.yaml")
    _, found, _ = report(capsys)
    assert found["packages"] == "torch 2.13.0, trl 9.1" and "transformers" in found["not installed"]
    assert found["not tested"] == "trl 9.1, and prm-hf asks for <1.17"
    for name, (_, how) in doctor.TOOLS.items():
        assert found[name] == f"{'9.1' if name == 'TRL' else 'not installed'}: {how}"


@pytest.mark.slow
def test_torch_alone_is_enough():
    code = "from prm_hf import cli; print(cli.main(['doctor'])); print(cli.main(['doctor', '--config_file', 'x']))"
    result = run_without((*EXTRAS, "packaging", "deepspeed", "torchao"), code)
    assert result.returncode == 0, result.stderr
    assert "no configuration of accelerate" in result.stdout and result.stdout.splitlines()[-2:] == ["0", "2"]
    assert '`--config_file` needs accelerate: pip install "prm-hf[trl]"' in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage, device", [(0, "none"), (2, "cpu"), (3, "none")])
def test_deepspeed_gets_what_was_looked_at(stage, device, tmp_path):
    """accelerate's plugin makes of the file what the doctor makes of it."""
    from accelerate import DeepSpeedPlugin

    own = {"zero_stage": stage, "offload_optimizer_device": device, "offload_param_device": "none"}
    file = configuration(tmp_path, **DEEPSPEED, deepspeed_config=own)
    ours = doctor._deepspeed_config(doctor._launch_arguments(Path(file)))["zero_optimization"]
    theirs = DeepSpeedPlugin(**own).deepspeed_config["zero_optimization"]
    assert ours["stage"] == theirs["stage"]
    for part in ("offload_optimizer", "offload_param"):
        assert ours[part]["device"] == theirs[part]["device"]
