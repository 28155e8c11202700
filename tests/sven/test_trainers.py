"""The trainers' steps beside those of the optimizer, and beside numpy's pseudo-inverse of gradients row by row."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from prm_hf import PRM
from prm_hf.sven import Sven, SvenArguments, SvenTrainer, SvenTrainingArguments
from prm_hf.sven.losses import losses_by_type

from .models import flat, gpt2, llama, padded_batch, token_losses, true_rows
from .trainer_runs import (
    assert_near,
    collate,
    dpo_trainer_of,
    settings,
    sft_trainer_of,
    trained,
    trainer_of,
)


def trained_in_a_loop(model, batch_size: int, rows: int = 22, **own):
    """The same batches in three lines, without padding that all rows share."""
    data, before = padded_batch(rows), flat(model)
    optimizer = Sven(model, lambda outputs, y: token_losses(outputs.logits, y), lr=0.05, **own)
    for start in range(0, rows, batch_size):
        batch = {name: values[start : start + batch_size] for name, values in data.items()}
        optimizer.step((batch, batch.pop("labels")))
    return flat(model) - before


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("sizes", "own"),
    [
        ((8, 1), {}),
        ((4, 2), {}),
        slow((2, 4), {"kappa": 1.0}),
        slow((4, 2), {"microbatch_size": 3}),
        slow((4, 2), {"svd": "svd"}),
        slow((4, 2), {"jacobian": "loop"}),
        slow((4, 2), {"param_fraction": 0.5}),
        slow((8, 1), {"variable_k": True}),
        slow((4, 2), {"variable_k": True, "k": 8}),
        slow((4, 2), {"max_norm": 0.5}),
    ],
    ids=str,
)
def test_trainer_makes_the_optimizers_steps(sizes, own, tmp_path):
    """Of 22 rows, 8 a step; the last step has 6, also where batches are accumulated."""
    batch_size, accumulated = sizes
    trainer = trainer_of(
        tmp_path, per_device_train_batch_size=batch_size, gradient_accumulation_steps=accumulated, **own
    )
    found = trained(trainer)
    seed = {"seed": trainer.args.seed} if "param_fraction" in own else {}
    assert_near(found, trained_in_a_loop(llama(), 8, **own, **seed))
    logs = trainer.state.log_history[0]
    assert logs["sven/rank"] == trainer_rank(own) and logs["sven/condition"] >= 1


def trainer_rank(own) -> int:
    rows = 3 if "microbatch_size" in own else 8
    return own.get("k", max(1, rows // 2))


def test_tied_weights_and_shared_positions(tmp_path):
    """GPT-2 has one matrix as embedding and as output layer, and position embeddings that all rows share."""
    assert_near(trained(trainer_of(tmp_path, gpt2(), gradient_accumulation_steps=2)), trained_in_a_loop(gpt2(), 8))


@pytest.mark.parametrize("changes", [{"bf16": True}, {"gradient_checkpointing": True}], ids=lambda c: next(iter(c)))
def test_precision_and_checkpointing(changes, tmp_path):
    expected = trained(trainer_of(tmp_path))
    found = trained(trainer_of(tmp_path, **changes))
    if "bf16" in changes:
        assert_near(found, expected, 0.1)
        assert (found - expected).norm() > 1e-4 * expected.norm()
    else:
        assert_near(found, expected)


def test_dropout_is_the_same_in_both_passes(tmp_path, monkeypatch):
    losses = []
    trainer = trainer_of(tmp_path, gpt2(resid_pdrop=0.3, embd_pdrop=0.3), gradient_accumulation_steps=2, max_steps=1)
    compute = trainer.per_sample_losses
    monkeypatch.setattr(trainer, "per_sample_losses", lambda *args: losses.append(compute(*args)) or losses[-1])
    trainer.train()
    first, second, again = losses
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_a_step_is_a_part_of_the_way_to_zero(tmp_path):
    """To first order, and with as many singular values as rows, the losses become 1 - lr times as large."""
    trainer = trainer_of(tmp_path, max_steps=1, k=4, rtol=1e-5, learning_rate=1e-3)
    batch = collate([trainer.train_dataset[i] for i in range(4)])
    before = trainer.per_sample_losses(trainer.model, dict(batch)).detach()
    trainer.train()
    after = trainer.per_sample_losses(trainer.model, dict(batch)).detach()
    torch.testing.assert_close((before - after) / before, torch.full((4,), 1e-3), rtol=0.05, atol=0)


def expected_change(model, losses_of, k: int, rate: float = 0.05) -> torch.Tensor:
    """By numpy, of all parameters in their order; those that are not trained stay."""
    rows, losses = true_rows(model, losses_of).double().numpy(), losses_of().detach().double().numpy()
    u, s, v = np.linalg.svd(rows, full_matrices=False)
    change = -rate * v[:k].T @ ((u[:, :k].T @ losses) / s[:k])
    parts, start = [], 0
    for p in model.parameters():
        size = p.numel() if p.requires_grad else 0
        parts.append(torch.from_numpy(change[start : start + size]) if size else torch.zeros(p.numel()))
        start += size
    return torch.cat([part.float() for part in parts])


def logps(model, batch) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    of_tokens = logits.log_softmax(-1).gather(2, batch["input_ids"][:, 1:, None]).squeeze(2)
    return (of_tokens * batch["completion_mask"][:, 1:]).sum(1)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "LoRA"])
@pytest.mark.parametrize("accumulated", [slow(1), 2])
def test_dpo_steps(adapters, accumulated, tmp_path):
    trainer = dpo_trainer_of(tmp_path, adapters, max_steps=1, gradient_accumulation_steps=accumulated)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4 * accumulated)])
    model = trainer.model
    with torch.no_grad():  # TRL's reference of an adapter is the adapter as it was
        reference = logps(model if adapters else trainer.ref_model, batch)

    def losses():
        chosen, rejected = (logps(model, batch) - reference).chunk(2)
        return -nn.functional.logsigmoid(trainer.beta * (chosen - rejected))

    expected = expected_change(model, losses, 2 * accumulated)
    assert_near(trained(trainer), expected)
    assert {"rewards/margins", "sven/rank"} <= trainer.state.log_history[0].keys()


@pytest.mark.parametrize("loss_type", [slow("ipo"), slow("hinge"), slow("apo_zero"), ["sigmoid", "ipo"]], ids=str)
def test_dpo_losses_of_pairs(loss_type, tmp_path):
    trainer = dpo_trainer_of(tmp_path, loss_type=loss_type)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    whole = trainer.per_sample_losses(trainer.model, dict(batch)).detach()
    single = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(4)]
    each = [trainer.per_sample_losses(trainer.model, one).detach() for one in single]
    torch.testing.assert_close(whole, torch.cat(each), rtol=1e-4, atol=1e-6)


def test_sft_steps(tmp_path):
    trainer = sft_trainer_of(tmp_path, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    model = trainer.model
    expected = expected_change(model, lambda: token_losses(model(**inputs).logits, batch["labels"]), 2)
    assert_near(trained(trainer), expected)
    assert {"mean_token_accuracy", "entropy"} <= trainer.state.log_history[0].keys()


def test_plain_head_gives_trls_numbers(tmp_path):
    """The output with a trained output layer, and the fused one, which a call without gradients gets."""
    trainer = sft_trainer_of(tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    own = trainer.model(**batch, fused_lm_head=True)
    with torch.no_grad():
        fused = trainer.model(**batch, fused_lm_head=True)
    assert own.log_probs.requires_grad and type(own) is type(fused)
    names = [name for name, value in fused.items() if value is not None]
    assert {"loss", "log_probs", "entropy", "is_top1", "label_mask"} <= {*names}
    for name in names:
        torch.testing.assert_close(own[name].detach(), fused[name].to(own[name].dtype), rtol=1e-4, atol=1e-5)


def test_prm_takes_the_step(tmp_path):
    trainer = trainer_of(tmp_path, trainer_kwargs={"optimizer_cls_and_kwargs": (PRM, {"lr": 1e-3})})
    seen = []
    step = PRM.step

    class Watched(PRM):
        def step(self, *args, **kwargs):
            seen.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]).norm())
            return step(self, *args, **kwargs)

    trainer.optimizer_cls_and_kwargs = (Watched, {"lr": 1e-3})
    assert trained(trainer).norm() > 0 and len(seen) == 3
    # the first gradient is the step that SGD would make
    sgd = trained(trainer_of(tmp_path, max_steps=1))
    torch.testing.assert_close(seen[0] * 0.05, sgd.norm(), rtol=1e-4, atol=0)


@pytest.mark.slow
def test_a_resumed_run_goes_on(tmp_path):
    own = {"param_fraction": 0.5, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trainer_of(tmp_path / "run", **own)
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", **own)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert flat(whole.model).equal(flat(resumed.model))


def bert(**config) -> BertForSequenceClassification:
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return BertForSequenceClassification(BertConfig(**sizes, num_attention_heads=2, **config)).eval()


@pytest.mark.parametrize(
    ("model", "labels"),
    [
        (bert(num_labels=3), torch.tensor([0, 2, 1, 1])),
        (bert(num_labels=1), torch.tensor([0.5, -1.0, 2.0, 0.0])),
        (bert(num_labels=3), torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 1]])),
        (llama(), padded_batch(4)["input_ids"]),
    ],
    ids=["classes", "regression", "several", "language"],
)
def test_losses_by_type_have_the_models_mean(model, labels):
    inputs = {"input_ids": padded_batch(4)["input_ids"]}
    losses = losses_by_type(model(**inputs), labels, model)
    assert losses.shape == (4,)
    torch.testing.assert_close(losses.mean(), model(**inputs, labels=labels).loss)


def test_per_sample_loss_func(tmp_path):
    def twice(outputs, labels):
        return 2 * token_losses(outputs.logits, labels)

    trainer = trainer_of(tmp_path, max_steps=1, trainer_kwargs={"per_sample_loss_func": twice})
    plain = trained(trainer_of(tmp_path, max_steps=1))
    assert_near(trained(trainer), plain)
    assert trainer.state.log_history[0]["loss"] > 7


REFUSED = [
    ({"fp16": True}, "`fp16=True` scales losses"),
    ({"torch_compile": True}, "`torch_compile=True` fuses the layers"),
    ({"variable_k": True, "weight_decay": 0.1}, "set `optim='sgd'` alone"),
    ({"variable_k": True, "optim": "adamw_torch"}, "set `optim='sgd'` alone"),
    ({"variable_k": True, "max_grad_norm": 1.0}, "`variable_k` tries the step that `max_grad_norm=1`"),
    ({"label_smoothing_factor": 0.1}, "pass `per_sample_loss_func`"),
    ({"max_norm": 0.5, "max_grad_norm": 1.0}, "both limit the step"),
    ({"kappa": -1.0}, "`kappa` must be above 0"),
    (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "which reentrant checkpointing cannot",
    ),
]


@pytest.mark.parametrize(("own", "words"), REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_refused_arguments(own, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        trainer_of(tmp_path, **own)


@pytest.mark.parametrize("name", ["is_fsdp_enabled", "is_deepspeed_enabled"])
def test_sharded_models_are_refused(name, tmp_path):
    """As soon as the trainer is made, and with the way out."""

    class Sharded(SvenTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            setattr(self, name, True)

    args = SvenTrainingArguments(**settings(tmp_path))
    with pytest.raises(ValueError, match="launch it with DDP"):
        Sharded(llama(), args)


@pytest.mark.parametrize(
    ("make", "own", "words"),
    [
        (dpo_trainer_of, {"loss_type": "aot"}, "depends on the others"),
        (sft_trainer_of, {"packing": True, "max_length": 32}, "one sample a row"),
        (sft_trainer_of, {"loss_type": "dft"}, "set 'nll'"),
    ],
)
def test_refused_trl_arguments(make, own, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        make(tmp_path, **own)


def test_other_trainers_losses_are_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.model.loss_type = "ForCTC"
    with pytest.raises(ValueError, match="pass `per_sample_loss_func`"):
        trainer.train()


def test_arguments_stand_alone():
    assert (SvenArguments().kappa, SvenArguments(max_norm=0.5).max_grad_norm) == (2.0, 0.5)
    with pytest.raises(ValueError, match="`rtol` must be in"):
        SvenArguments(rtol=-1)
