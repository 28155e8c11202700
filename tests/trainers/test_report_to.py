"""A tracker of `report_to` that cannot begin a run is said by every command, before anything is loaded or written."""

import sys

import pytest

from prm_hf import cli
from prm_hf.trainers.trackers import check_trackers


@pytest.fixture
def nobody(tmp_path, monkeypatch):
    """A user who is logged in nowhere, in a folder of their own."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "NETRC", "HF_TOKEN", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr("huggingface_hub.utils._auth.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.chdir(tmp_path)
    wandb = pytest.importorskip("wandb")
    wandb.teardown()
    yield tmp_path
    wandb.teardown()


COMMANDS = [
    ["dpo"],
    ["sft"],
    ["regression"],
    [
        "suspects",
        "--model",
        "no/model",
        "--dataset_name",
        "no/data",
        "--kind",
        "preference",
        "--use_cpu",
        "--bf16",
        "no",
    ],
    ["sweep", "--ray", "nowhere:1", "dpo"],
    ["trl", "dpo", "--model_name_or_path", "no/model", "--dataset_name", "no/data", "--bf16", "false"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: " ".join(words[:1]))
def test_wandb_without_a_key(nobody, capsys, command):
    """The real client is asked, and it sends nothing."""
    assert cli.main([*command, "--report_to", "wandb", "--output_dir", "out"]) == 2
    error = capsys.readouterr().err
    assert f"prm-hf {command[0]}: error: `report_to` has 'wandb': No API key configured" in error
    assert "set `WANDB_MODE=offline`" in error and not (nobody / "out").exists()


@pytest.mark.parametrize("mode", ["offline", "disabled", "dryrun"])
def test_wandb_that_sends_nothing_needs_no_key(nobody, monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", mode)
    check_trackers(["wandb"])


def test_only_the_process_that_reports_needs_a_login(nobody, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    check_trackers("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "short")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="'wandb': WANDB_API_KEY invalid.* Run `wandb login`"):
        check_trackers("wandb")


def test_a_space_of_trackio_needs_a_token(nobody, monkeypatch):
    check_trackers(["trackio", "tensorboard"])
    with pytest.raises(ValueError, match="has 'trackio': `trackio_space_id` is 'me/runs', and .* Run `hf auth login`"):
        check_trackers(["trackio"], "me/runs")
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/others")
    with pytest.raises(ValueError, match="`TRACKIO_SPACE_ID` is 'me/others'"):
        check_trackers(["trackio"])
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    check_trackers(["trackio"])


def test_what_is_not_there(monkeypatch):
    for nothing in (None, [], "none"):
        check_trackers(nothing)
    with pytest.raises(ValueError, match="`report_to` has 'wanbd': wanbd is not supported, only azure_ml"):
        check_trackers("wanbd")
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ImportError, match="has 'trackio': .* Run `pip install trackio`. Or leave it out"):
        check_trackers("trackio")
    with pytest.raises(ImportError, match="has 'comet_ml': .* run `comet login`, or set `COMET_API_KEY`"):
        check_trackers("comet_ml")
