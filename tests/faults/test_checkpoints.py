"""A checkpoint that is not complete: what is said of it, and what a run does that finds it."""

import json
import logging
import math
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from prm_hf.runs.read import load_runs
from prm_hf.trainers.completeness import last_complete_checkpoint, problems_of

from ..tiny import make_model
from ..trainers.trainer_runs import dpo_trainer, lora, sft_trainer, weights
from .disk import change_disk, files_of_at_most, small_disk


pytestmark = pytest.mark.usefixtures("quiet")

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "drift_metrics": False}


def cut(share):
    return lambda file: file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def fill(content):
    return lambda file: file.write_bytes(content)


# What happens to a file, and the words that name it.
FAULTS = {
    "optimizer cut off": ("optimizer.pt", cut(0.5), "optimizer.pt is cut off"),
    "optimizer without its end": ("optimizer.pt", cut(0.99), "optimizer.pt is cut off"),
    "optimizer of zeros": ("optimizer.pt", fill(bytes(5000)), "optimizer.pt is cut off, or no file of torch.save"),
    "optimizer empty": ("optimizer.pt", cut(0), "optimizer.pt is empty"),
    "no optimizer": ("optimizer.pt", Path.unlink, "optimizer.pt is missing"),
    "scheduler cut off": ("scheduler.pt", cut(0.7), "scheduler.pt is cut off"),
    "no scheduler": ("scheduler.pt", Path.unlink, "scheduler.pt is missing"),
    "random state cut off": ("rng_state.pth", cut(0.7), "rng_state.pth is cut off"),
    "no random state": ("rng_state.pth", Path.unlink, "rng_state.pth is missing"),
    "state cut off": ("trainer_state.json", cut(0.7), "trainer_state.json is not JSON"),
    "state of something else": ("trainer_state.json", fill(b"[1, 2]"), "trainer_state.json is not the state"),
    "no state": ("trainer_state.json", Path.unlink, "trainer_state.json is missing"),
    "weights cut off": ("model.safetensors", cut(0.9), "model.safetensors has"),
    "weights cut off in the header": ("model.safetensors", cut(0.001), "model.safetensors is cut off"),
    "weights without a header": ("model.safetensors", fill(bytes(8) + b"x" * 99), "model.safetensors has a header"),
    "no weights": ("model.safetensors", Path.unlink, "model.safetensors is missing"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run with a checkpoint after each step, and its weights at the end."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = dpo_trainer(folder, **SAVING)
    trainer.train()
    return folder, weights(trainer.model)


@pytest.fixture
def run(whole, tmp_path):
    """A copy of that folder, to be damaged: its checkpoints of steps 1 and 2."""
    for step in (1, 2):
        shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return tmp_path


def damage(checkpoint: Path, fault: str) -> str:
    name, change, words = FAULTS[fault]
    change(checkpoint / name)
    return words


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_is_said(run, fault):
    words, said = damage(run / "checkpoint-2", fault), []
    assert any(problem.startswith(words) for problem in problems_of(run / "checkpoint-2"))
    assert problems_of(run / "checkpoint-1") == []
    assert last_complete_checkpoint(run, said.append) == run / "checkpoint-1"
    assert len(said) == 1 and f"checkpoint-2 is not complete and is left out: {words}" in said[0]


@pytest.mark.parametrize("fault", ["optimizer cut off", "no optimizer", "no scheduler", "no state", "weights cut off"])
def test_a_path_of_half_a_checkpoint_raises(run, fault):
    words = damage(run / "checkpoint-2", fault)
    trainer = dpo_trainer(run, **SAVING)
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` is .*no complete checkpoint: {words}"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("fault", ["optimizer cut off", "no optimizer", "weights cut off"])
def test_the_last_complete_checkpoint_is_taken(run, whole, fault, caplog):
    words = damage(run / "checkpoint-2", fault)
    trainer = dpo_trainer(run, **SAVING)
    with caplog.at_level(logging.INFO):
        trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-2 is not complete and is left out: {words}" in caplog.text
    assert f"The run goes on from {run / 'checkpoint-1'}." in caplog.text
    assert torch.equal(weights(trainer.model), whole[1])
    assert last_complete_checkpoint(run) == run / "checkpoint-4"


def test_a_run_without_a_complete_checkpoint_starts_again_and_says_so(run, whole, caplog):
    damage(run / "checkpoint-1", "no state")
    damage(run / "checkpoint-2", "optimizer empty")
    trainer = dpo_trainer(run, **SAVING)
    trainer.train(resume_from_checkpoint=True)
    assert f"No checkpoint in {run} is complete: the run starts again from the beginning." in caplog.text
    assert torch.equal(weights(trainer.model), whole[1])


def test_there_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="`resume_from_checkpoint` is True, and `output_dir`.* has no checkpoint"):
        dpo_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="no complete checkpoint: the folder does not exist"):
        dpo_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))


def test_sft_and_lora_resume_from_complete_checkpoints_alone(tmp_path):
    def trainer():
        return sft_trainer(tmp_path, lora(make_model()), **SAVING)

    trainer().train()
    (tmp_path / "checkpoint-3" / "adapter_model.safetensors").unlink()
    assert problems_of(tmp_path / "checkpoint-4") == []
    assert problems_of(tmp_path / "checkpoint-3") == ["model.safetensors is missing"]
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=True)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        trainer().train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_weights_in_several_files(run):
    checkpoint = run / "checkpoint-2"
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "model-00001-of-00002.safetensors")
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00002-of-00002.safetensors")
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": dict(zip("ab", files, strict=True))}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    assert problems_of(checkpoint) == []
    (checkpoint / files[1]).unlink()
    assert problems_of(checkpoint) == [f"{files[1]} is missing"]


# ---- Other ways of sharding ----


@pytest.fixture
def sharded(run):
    """A checkpoint as FSDP writes it with SHARDED_STATE_DICT."""
    checkpoint = run / "checkpoint-2"
    for name in ("model.safetensors", "optimizer.pt"):
        (checkpoint / name).unlink()
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        dcp.save({"a": torch.ones(300), "b": torch.ones(5)}, checkpoint_id=checkpoint / name, no_dist=True)
    return checkpoint


def test_shards_are_whole_or_named(sharded):
    assert problems_of(sharded) == []
    (shard,) = (sharded / "optimizer_0").glob("*.distcp")
    cut(0.8)(shard)
    (problem,) = problems_of(sharded)
    assert problem.startswith(f"optimizer_0/{shard.name} has ")
    shard.unlink()
    assert problems_of(sharded) == [f"optimizer_0/{shard.name} is missing"]
    (sharded / "pytorch_model_fsdp_0" / ".metadata").unlink()
    assert "pytorch_model_fsdp_0/.metadata is missing or cannot be read" in problems_of(sharded)[0]


@pytest.fixture
def zero(run):
    """The names of the files that two processes write under ZeRO-2."""
    checkpoint = run / "checkpoint-2"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    shutil.copy(checkpoint / "rng_state_0.pth", checkpoint / "rng_state_1.pth")
    (checkpoint / "global_step2").mkdir()
    names = ["mp_rank_00_model_states", *(f"bf16_zero_pp_rank_{i}_mp_rank_00_optim_states" for i in range(2))]
    for name in names:
        shutil.copy(checkpoint / "optimizer.pt", checkpoint / "global_step2" / f"{name}.pt")
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "latest").write_text("global_step2")
    return checkpoint


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("latest", "latest is missing"),
        ("rng_state_0.pth", "rng_state_0.pth is missing"),
        ("rng_state_1.pth", "rng_state_1.pth is missing"),
        ("global_step2/mp_rank_00_model_states.pt", "global_step2/mp_rank_00_model_states.pt is missing"),
        *(
            (f"global_step2/bf16_zero_pp_rank_{i}_mp_rank_00_optim_states.pt", f"global_step2/zero_pp_rank_{i}_mp")
            for i in range(2)
        ),
    ],
)
def test_files_of_deepspeed_are_there_or_named(zero, file, words):
    assert problems_of(zero) == []
    (zero / file).unlink()
    (problem,) = problems_of(zero)
    assert problem.startswith(words)


def test_a_checkpoint_of_deepspeed_is_not_for_a_run_without(zero):
    trainer = dpo_trainer(zero.parent, **SAVING)
    with pytest.raises(ValueError, match="was written under DeepSpeed, and this run is without, so the"):
        trainer.train(resume_from_checkpoint=True)


# ---- Disks ----


@pytest.mark.parametrize("limit", [20_000, 100_000], ids=["weights", "optimizer"])
def test_a_disk_gets_full_while_saving(tmp_path, whole, limit):
    """Over the checkpoint of another run, which is none any more as soon as a file of it is another one's."""
    shutil.copytree(whole[0] / "checkpoint-2", tmp_path / "checkpoint-2")
    trainer = dpo_trainer(tmp_path, **SAVING | {"save_steps": 2})
    with files_of_at_most(limit), pytest.raises(OSError, match=r"checkpoint-2' could not be written .*goes on from"):
        trainer.train()
    assert "trainer_state.json is missing" in problems_of(tmp_path / "checkpoint-2")
    resumed = dpo_trainer(tmp_path, **SAVING)
    resumed.train(resume_from_checkpoint=True)
    assert torch.equal(weights(resumed.model), whole[1])


def test_a_full_disk(tmp_path, whole):
    folder = tmp_path / "disk"
    with small_disk(folder, "700k"):
        with pytest.raises(OSError, match="could not be written"):
            dpo_trainer(folder, **SAVING).train()
        assert last_complete_checkpoint(folder) is not None
        change_disk(folder, "size=20m")
        resumed = dpo_trainer(folder, **SAVING)
        resumed.train(resume_from_checkpoint=True)
        assert torch.equal(weights(resumed.model), whole[1])


def test_a_read_only_folder(tmp_path):
    folder = tmp_path / "disk"
    with small_disk(folder, "1m"):
        trainer = dpo_trainer(folder, **SAVING)
        change_disk(folder, "ro")
        with pytest.raises(OSError, match="`output_dir` is .* in which checkpoints cannot be written"):
            trainer.train()
        assert trainer.state.global_step == 0
        assert not list(folder.glob("checkpoint-*"))


def test_a_batch_without_numbers(tmp_path):
    """What is written is whole and can be read, and the log says where the gradient had no numbers."""

    def trainer():
        made = dpo_trainer(tmp_path, **SAVING)
        compute = made.compute_loss

        def spoiled(*args, **kwargs):
            return compute(*args, **kwargs) * (math.nan if made.state.global_step == 2 else 1)

        made.compute_loss = spoiled
        return made

    ended = trainer()
    ended.train()
    counts = [log["mask/nonfinite_count"] for log in ended.state.log_history if "loss" in log]
    assert [count > 0 for count in counts[:3]] == [False, False, True]
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    (run,) = load_runs(tmp_path)
    assert run.metrics["steps"] == 4
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(resumed.model).isnan(), weights(ended.model).isnan())
