import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import PromptTuningConfig, TaskType, get_peft_model
from trl.trainer.utils import add_fused_lm_head

from prm_hf.trainers.packing import add_packing, pack

from ..tiny import make_model
from .trainer_runs import HELDOUT, TRAIN, dpo_trainer, evaluations, lora, weights


pytestmark = pytest.mark.usefixtures("quiet")
LENGTHS = [3, 17, 5, 5, 1, 9, 12, 2]
FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


def padded_batch(lengths: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.randint(2, 40, mask.shape, generator=generator).masked_fill(~mask, 0)
    labels = ids.masked_fill(~mask | (torch.arange(mask.shape[1]) < 2), -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels, "fused_lm_head": True}


def fused_model(attn_implementation: str = "sdpa", **config) -> torch.nn.Module:
    model = make_model(attn_implementation=attn_implementation, **config)
    add_fused_lm_head(model, outputs=FIELDS)
    return model


@pytest.mark.parametrize("capacity", [17, 20, 54])
def test_pack(capacity):
    places, filled = pack(LENGTHS, capacity)
    cells = [(row, start + t) for (row, start), n in zip(places, LENGTHS, strict=True) for t in range(n)]
    assert len(set(cells)) == sum(LENGTHS)
    assert max(column for _, column in cells) < capacity
    assert sum(filled) == sum(LENGTHS) and max(filled) <= capacity
    assert len(filled) == -(-sum(LENGTHS) // capacity)  # these lengths leave no row that could have been saved


@pytest.mark.parametrize(
    "config",
    [{}, {"attn_implementation": "eager"}, {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}],
    ids=["sdpa", "eager", "sliding_window"],
)
@pytest.mark.parametrize("lengths", [LENGTHS, [6, 6, 6], [1, 4]])
@pytest.mark.parametrize("given", [False, True], ids=["", "lengths_given"])
def test_outputs_and_gradients_are_those_of_padded_batches(config, lengths, given):
    padded = fused_model(**config)
    packed = copy.deepcopy(padded)
    add_fused_lm_head(packed, outputs=FIELDS)  # a copy's forward is bound to the original
    add_packing(packed)
    widths = []
    packed.model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    expected = padded(**padded_batch(lengths))
    actual = packed(**padded_batch(lengths), **({"lengths": lengths} if given else {}))
    for field in FIELDS:
        torch.testing.assert_close(getattr(actual, field), getattr(expected, field), rtol=1e-5, atol=1e-6)
    assert actual.log_sum_sq_probs is None
    weight = torch.randn(expected.log_probs.shape, generator=torch.Generator().manual_seed(1))
    for outputs in (expected, actual):
        (outputs.log_probs * weight).sum().backward()
    for p, q in zip(padded.parameters(), packed.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)
    assert widths[0].numel() < sum(lengths) + max(lengths)


def test_cudnn_has_no_part_in_packed_passes():
    """It plans for each shape anew. Other calls of the model are not ours."""
    model, enabled = fused_model(), []
    add_packing(model)
    model.model.register_forward_pre_hook(lambda *_: enabled.append(torch.backends.cuda.cudnn_sdp_enabled()))
    batch = padded_batch(LENGTHS)
    model(**batch)
    del batch["fused_lm_head"]
    model(**batch)
    assert enabled == [False, True] and torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("padding_free", [False, True])
def test_a_pass_is_recomputed_with_the_kernels_it_was_made_with(tmp_path, padding_free):
    """Gradient checkpointing runs it once more in the backward pass, and compares what is saved."""
    model, enabled = make_model(), []
    trainer = dpo_trainer(
        tmp_path,
        model=model,
        ref_model=make_model(),
        padding_free=padding_free,
        gradient_checkpointing=True,
        max_steps=1,
    )
    model.model.layers[0].mlp.register_forward_pre_hook(
        lambda *_: enabled.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    trainer.train()
    assert enabled == [not padding_free] * 2 and torch.backends.cuda.cudnn_sdp_enabled()


def test_batches_of_training_know_their_lengths(tmp_path):
    """On the host, which would wait for the device to be told. Those of streams are dealt out by tensors alone."""
    for kind in (Dataset, IterableDataset):
        train = TRAIN if kind is Dataset else TRAIN.to_iterable_dataset()
        trainer = dpo_trainer(tmp_path, train=train, padding_free=True, max_steps=1)
        batch = next(iter(trainer.get_train_dataloader()))
        if kind is Dataset:
            assert batch["lengths"] == batch["attention_mask"].sum(1).tolist()
        assert ("lengths" in batch) is (kind is Dataset)
        assert "lengths" not in next(iter(trainer.get_test_dataloader(trainer.train_dataset)))


def test_other_calls_stay_as_they_are():
    model = fused_model()
    batch = padded_batch(LENGTHS)
    del batch["fused_lm_head"]
    expected = model(**batch).logits
    add_packing(model)
    assert torch.equal(model(**batch).logits, expected)
    assert model.generate(batch["input_ids"][1:2], max_new_tokens=2, min_new_tokens=2).shape == (1, 19)


@pytest.mark.parametrize("kind", ["full", "lora", "precomputed"])
def test_training_is_that_of_padded_batches(tmp_path, kind):
    trained, metrics = [], []
    for padding_free in (False, True):
        model, reference = make_model(), make_model()
        more = {}
        if kind == "lora":
            model, reference = lora(model), None
        if kind == "precomputed":
            more = {"precompute_ref_log_probs": True}
        trainer = dpo_trainer(
            tmp_path / str(padding_free),
            model=model,
            ref_model=reference,
            eval_dataset=HELDOUT,
            padding_free=padding_free,
            learning_rate=1e-3,
            **more,
        )
        assert trainer.padding_free is padding_free and trainer.args.padding_free is padding_free
        trainer.train()
        trained.append(weights(trainer.model))
        metrics.append(evaluations(trainer)[-1])
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=2e-5)
    assert not torch.equal(trained[1], weights(make_model() if kind != "lora" else lora(make_model())))
    for name in ("eval_loss", "eval_rewards/margins", "eval_drift/reward_abs", "eval_mean_token_accuracy"):
        assert metrics[1][name] == pytest.approx(metrics[0][name], rel=1e-3, abs=1e-5)


def test_what_cannot_be_packed_is_refused(tmp_path):
    model = make_model()
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="padding_free=False"):
        add_packing(model)
    prompts = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=2)
    with pytest.raises(ValueError, match="padding_free=False"):
        dpo_trainer(tmp_path, model=get_peft_model(make_model(), prompts), train=TRAIN, padding_free=True)


def test_an_error_in_setting_up_is_trls_own(tmp_path):
    with pytest.raises(OSError, match="no-such-model"):
        dpo_trainer(tmp_path, model=str(tmp_path / "no-such-model"), padding_free=True)
