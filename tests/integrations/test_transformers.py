"""`optim="prm"` in transformers itself: arguments, parsers, pickles, and any Trainer."""

import copy
import json
import logging
import pickle
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, TrlParser

from prm_hf import PRM
from prm_hf.integrations import transformers as integration
from prm_hf.integrations.optim_args import optimizer_cls_and_kwargs
from prm_hf.trainers import PRMCallback, PRMDPOConfig

from ..tiny import make_model, make_tokenizer
from ..trainers.trainer_runs import SENTENCES, TRAIN, dpo_trainer, settings
from .tool_runs import ROOT, check_log, completions, save_model, write_lines


OPTIM_ARGS = "reduction=per_row,relative_eps=10"


@pytest.fixture(autouse=True)
def registered(unregistered):
    integration.register()


def arguments(tmp_path, **kwargs) -> TrainingArguments:
    return TrainingArguments(**settings(tmp_path, optim="prm", **kwargs))


# ---- What is extended in transformers. Where one of these fails, `register` has to follow. ----


def test_the_tables_that_transformers_keeps():
    assert isinstance(transformers.trainer._OPTIMIZER_HANDLERS, dict)
    assert isinstance(transformers.trainer.DEFAULT_CALLBACKS, list)
    assert {*transformers.trainer._OPTIMIZER_HANDLERS} <= {*OptimizerNames}


def test_the_enum_has_one_more_member():
    integration.register()
    member = OptimizerNames("prm")
    assert OptimizerNames.PRM is OptimizerNames["PRM"] is member and isinstance(member, OptimizerNames)
    assert (member.name, member.value, member) == ("PRM", "prm", "prm")
    assert [name.value for name in OptimizerNames].count("prm") == 1
    assert transformers.trainer.DEFAULT_CALLBACKS.count(integration.OptimCallback) == 1
    with pytest.raises(ValueError, match="nadam is not a valid OptimizerNames.*'prm'"):
        OptimizerNames("nadam")


def test_another_version_of_transformers_is_refused(monkeypatch):
    monkeypatch.delattr(transformers.trainer, "_OPTIMIZER_HANDLERS")
    with pytest.raises(
        ImportError, match="cannot be registered in transformers .* Pass PRM as .Trainer.optimizer_cls_and_kwargs"
    ):
        integration.register()


# ---- Arguments ----


@pytest.mark.parametrize(("parser_class", "config"), [(HfArgumentParser, TrainingArguments), (TrlParser, DPOConfig)])
def test_parsers_know_the_name(tmp_path, parser_class, config):
    parser = parser_class(config)
    flags = ["--output_dir", str(tmp_path), "--optim", "prm", "--optim_args", OPTIM_ARGS, "--bf16", "false"]
    (args,) = parser.parse_args_into_dataclasses([*flags, "--use_cpu"])
    assert args.optim is OptimizerNames.PRM and args.to_dict()["optim"] == "prm"
    cls, found = Trainer.get_optimizer_cls_and_kwargs(args)
    assert cls is PRM
    assert (found["reduction"], found["relative_eps"], found["max_grad_norm"]) == ("per_row", 10, args.max_grad_norm)


def test_values_have_their_types(tmp_path):
    text = (
        "signal_beta=0.98, alpha=none, amsgrad=true, foreach=False, mask_warmup_steps=3, state_dtype=bf16, mask=hard"
    )
    args = arguments(tmp_path, optim_args=text, adam_beta1=0.8, adam_epsilon=1e-6)
    _, found = optimizer_cls_and_kwargs(args)
    assert found == {
        "lr": 1e-2,
        "betas": (0.8, 0.999),
        "eps": 1e-6,
        "signal_beta": 0.98,
        "alpha": None,
        "amsgrad": True,
        "foreach": False,
        "mask_warmup_steps": 3,
        "state_dtype": "bf16",
        "mask": "hard",
    }


WRONG = [
    ({"optim_args": "reductoin=per_row"}, "'reductoin=per_row', which is no hyperparameter.*Did you mean 'reduction'"),
    ({"optim_args": "per_row"}, "'per_row', which is no hyperparameter of PRM: write `name=value`"),
    ({"optim_args": "reduction=rows"}, "Invalid reduction='rows'.*optim_args='reduction=rows'"),
    ({"optim_args": "relative_eps=much"}, "Invalid relative_eps='much'"),
    ({"optim_args": "lr=1"}, "'lr=1', which has an argument of its own: set `learning_rate`"),
    ({"optim_args": "betas=1"}, "set `adam_beta1` and `adam_beta2`"),
    ({"optim_args": "relative_eps=10", "adam_epsilon": 1e-6}, "Invalid eps=1e-06: relative_eps sets it"),
    ({"optim_args": "relative_eps=10", "max_grad_norm": 0.0}, "Invalid max_grad_norm=0.0"),
    ({"optim_args": "boundary=empirical"}, "Invalid batch_size=None"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments_are_refused_before_training(tmp_path, changes, message):
    args = arguments(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        Trainer(make_model(), args)


def test_pickles_and_copies(tmp_path):
    args = arguments(tmp_path)
    for again in (pickle.loads(pickle.dumps(args)), copy.deepcopy(args)):
        assert again.optim is OptimizerNames.PRM
    # What loads it elsewhere finds the function that registers the name
    assert integration._member.__module__.encode() in pickle.dumps(args)


@pytest.mark.slow
def test_a_process_that_has_not_registered_the_name_reads_its_pickle(tmp_path):
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    code = f"import torch; print(torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False).optim.name)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout == "PRM\n", done.stderr


# ---- Trainers ----


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def plain_trainer(args):
    rows = [{"input_ids": [3 + i, 5, 7], "labels": [3 + i, 5, 7]} for i in range(12)]
    return Trainer(make_model(), args, train_dataset=rows, data_collator=collate)


def sft_trainer(args):
    args = SFTConfig(**settings(args.output_dir, optim="prm", optim_args=args.optim_args))
    return SFTTrainer(make_model(), args, train_dataset=SENTENCES, processing_class=make_tokenizer())


def dpo(args):
    args = DPOConfig(**settings(args.output_dir, optim="prm", optim_args=args.optim_args))
    return DPOTrainer(make_model(), make_model(), args, train_dataset=TRAIN, processing_class=make_tokenizer())


@pytest.mark.parametrize("make", [plain_trainer, sft_trainer, dpo])
def test_trainers_train_with_prm(tmp_path, caplog, make):
    trainer = make(arguments(tmp_path, optim_args=OPTIM_ARGS))
    with caplog.at_level(logging.WARNING, logger="prm_hf"):
        trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert type(optimizer) is PRM and {int(state["step"]) for state in optimizer.state.values()} == {3}
    assert optimizer.param_groups[0]["relative_eps"] == 10
    (line,) = [record.getMessage() for record in caplog.records if "PRM trains" in record.getMessage()]
    assert line.endswith("on 1 process. It has lr=0.01, weight_decay=0.0, relative_eps=10.")
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and all(0 < entry["mask/mean_q"] <= 1 for entry in losses)


def test_the_example_trains_with_prm(tmp_path, monkeypatch, quiet):
    write_lines(tmp_path / "rows" / "train.jsonl", completions())
    local = ["--model", save_model(tmp_path / "model"), "--dataset", str(tmp_path / "rows")]
    short = ["--use_cpu", "--bf16", "false", "--max_steps", "2", "--logging_steps", "1"]
    short += ["--gradient_accumulation_steps", "1", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["sft.py", *local, *short])
    runpy.run_path(str(ROOT / "examples" / "transformers" / "sft.py"), run_name="__main__")
    state = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    check_log(state["log_history"], 2)


def test_it_is_the_prm_that_is_made_by_hand(tmp_path):
    """The optimizer of `optim="prm"` and PRM with these settings end in the same weights, bit for bit."""
    named = plain_trainer(arguments(tmp_path, optim_args=OPTIM_ARGS + ",signal_beta=0.98"))
    by_hand = {"lr": 1e-2, "relative_eps": 10, "max_grad_norm": 1.0, "signal_beta": 0.98}
    passed = plain_trainer(TrainingArguments(**settings(tmp_path)))
    passed.optimizer_cls_and_kwargs = PRM, by_hand
    for trainer in (named, passed):
        trainer.train()
    pairs = zip(named.model.parameters(), passed.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


class EmbeddingRate(Trainer):
    """Makes its optimizer as `UnslothTrainer` does with `embedding_learning_rate`."""

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(self.args)
            embedding = [*self.model.get_input_embeddings().parameters()]
            others = [p for p in self.model.parameters() if p is not embedding[0]]
            self.optimizer = optimizer_cls([{"params": others}, {"params": embedding, "lr": 5e-5}], **kwargs)
        return self.optimizer


@pytest.mark.parametrize("asked", ["optim", "optimizer_cls_and_kwargs"])
def test_a_trainer_with_a_learning_rate_of_embeddings(tmp_path, asked):
    """It makes the optimizer of `optim`, and drops `optimizer_cls_and_kwargs`: that may not be silent."""
    kwargs = {"optim": "prm"} if asked == "optim" else {"optim": "adamw_torch"}
    trainer = plain_trainer(TrainingArguments(**settings(tmp_path, **kwargs)))
    trainer.__class__ = EmbeddingRate
    if asked == "optim":
        trainer.train()
        assert type(trainer.optimizer.optimizer) is PRM
        assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [1e-2, 5e-5]
        return
    trainer.optimizer_cls_and_kwargs = PRM, {"lr": 1e-2}
    trainer.add_callback(PRMCallback)
    before = [p.clone() for p in trainer.model.parameters()]
    with pytest.raises(RuntimeError, match="to train with PRM, but the optimizer in effect is AdamW.*UnslothTrainer"):
        trainer.train()
    assert all(torch.equal(p, start) for p, start in zip(trainer.model.parameters(), before, strict=True))


def test_an_optimizer_that_replaces_it_in_training_raises(tmp_path):
    callback = integration.OptimCallback()
    state = SimpleNamespace(is_world_process_zero=True)
    with pytest.raises(RuntimeError, match="the optimizer in effect is SGD"):
        callback.on_step_end(arguments(tmp_path), state, None, optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0))


def test_other_optimizers_are_left_alone(tmp_path):
    trainer = plain_trainer(TrainingArguments(**settings(tmp_path, optim="adamw_torch", optim_args="reduction=rows")))
    trainer.train()
    assert type(trainer.optimizer.optimizer) is torch.optim.AdamW
    assert not any("mask/mean_q" in entry for entry in trainer.state.log_history)


def test_our_trainers_stay_as_they_are(tmp_path, caplog):
    """Theirs is the plain name "prm", and they tell once, and log once."""
    trainer = dpo_trainer(tmp_path, prm_reduction="per_tensor")
    assert type(trainer.args) is PRMDPOConfig and type(trainer.args.optim) is str
    with caplog.at_level(logging.WARNING, logger="prm_hf"):
        trainer.train()
    assert caplog.text.count("PRM trains") == 1
