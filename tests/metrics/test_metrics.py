import copy
import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prm_hf.metrics import (
    PairEvaluation,
    ParameterDrift,
    SequenceEvaluation,
    drift_metrics,
    evaluate_pairs,
    evaluate_sequences,
    evaluation,
    memorization_metrics,
    memorization_rows,
    preference_scores,
    reward_accuracy,
    reward_margins,
    reward_metrics,
    row_fit,
)
from prm_hf.runs.read import Run

from ..tiny import make_model


COLLATE = DataCollatorForPreference(pad_token_id=0)
VOCAB = 43
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def tokenized_rows(n: int, seed: int = 0) -> list[dict]:
    """Rows of TRL's preference format, all lengths different."""
    generator = torch.Generator().manual_seed(seed)

    def ids(longest: int) -> list[int]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(3, VOCAB, (length,), generator=generator).tolist()

    return [{"prompt_ids": ids(5), "chosen_ids": ids(7), "rejected_ids": ids(7)} for _ in range(n)]


def plain_loop(model: nn.Module, ref_model: nn.Module, rows: list[dict]) -> dict[str, torch.Tensor]:
    """The definitions of the metrics, one completion at a time, in float64, from whole logits and without padding."""
    model, ref_model = copy.deepcopy(model).double().eval(), copy.deepcopy(ref_model).double().eval()
    table = {f"{side}_{key}": [] for side in ("chosen", "rejected") for key in ("logps", "logratio", "tokens", "kl")}
    for row in rows:
        for side in ("chosen", "rejected"):
            prompt, completion = row["prompt_ids"], row[f"{side}_ids"]
            ids = torch.tensor([prompt + completion])
            with torch.no_grad():
                log_p = model(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
                log_r = ref_model(input_ids=ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
            at = range(len(completion)), completion
            table[f"{side}_logps"].append(log_p[at].sum())
            table[f"{side}_logratio"].append((log_p[at] - log_r[at]).sum())
            table[f"{side}_tokens"].append(torch.tensor(len(completion)))
            table[f"{side}_kl"].append((log_p.exp() * (log_p - log_r)).sum())
    return {key: torch.stack(values) for key, values in table.items()}


def assert_same(pairs: PairEvaluation, expected: dict[str, torch.Tensor]) -> None:
    for side in ("chosen", "rejected"):
        table = getattr(pairs, side)
        assert torch.equal(table.tokens, expected[f"{side}_tokens"])
        for key in ("logps", "logratio", "kl"):
            actual = getattr(table, key)
            assert actual.dtype == torch.float64 and actual.device.type == "cpu"
            torch.testing.assert_close(actual, expected[f"{side}_{key}"], rtol=1e-4, atol=1e-5, check_dtype=False)


def perturbed(model: nn.Module, scale: float = 0.05, seed: int = 1) -> nn.Module:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


# ---- The pass over the data ----


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_pairs_equal_a_plain_loop_for_any_batch_size(accelerator, batch_size):
    ref_model = make_model()
    model = perturbed(ref_model)
    rows = tokenized_rows(11)
    pairs = evaluate_pairs(model, rows, COLLATE, accelerator, ref_model=ref_model, batch_size=batch_size)
    assert len(pairs) == 11
    expected = plain_loop(model, ref_model, rows)
    assert expected["chosen_logratio"].abs().min() > 1e-3  # the two policies do differ
    assert_same(pairs, expected)


def test_tokens_of_probability_zero():
    """The KL is defined there: what the policy never emits adds nothing, what only the reference never emits is ∞."""
    inf = float("inf")
    logits_p = torch.tensor([[1.0, 0.5, -inf], [1.0, 0.5, -inf], [1.0, 0.5, -0.2], [float("nan"), 0.0, 0.0]])
    logits_r = torch.tensor([[0.2, 0.1, -inf], [0.2, 0.1, 0.3], [0.2, 0.1, -inf], [0.2, 0.1, 0.3]])
    targets = torch.tensor([0, 1, 1, 2])

    def of(logits):
        return SimpleNamespace(hidden=logits, weight=torch.empty(3, 1), logits=lambda hidden: hidden)

    logps, correct, logratio, kl = evaluation._score_tokens(of(logits_p), of(logits_r), targets)
    p, log_p, log_r = logits_p.softmax(-1), logits_p.log_softmax(-1), logits_r.log_softmax(-1)
    expected = [(p * (log_p - log_r))[i, :2].sum() for i in range(2)]
    torch.testing.assert_close(kl[:2], torch.stack(expected))
    assert kl[2] == inf and kl[3].isnan() and logps[3].isnan()
    assert correct[:3].tolist() == [True, False, False]
    torch.testing.assert_close(logratio[:3], (log_p - log_r)[range(3), targets[:3]])
    # Also where the target is the token that neither emits, whose log-ratio is not defined
    logps, _, logratio, kl = evaluation._score_tokens(of(logits_p[:1]), of(logits_r[:1]), torch.tensor([2]))
    assert logps == -inf and logratio.isnan()
    torch.testing.assert_close(kl, expected[0][None])


def test_chunks_change_nothing_and_bound_the_logits(accelerator, monkeypatch):
    ref_model = make_model()
    model = perturbed(ref_model)
    rows = tokenized_rows(6)
    whole = evaluate_pairs(model, rows, COLLATE, accelerator, ref_model=ref_model)

    widths = []
    linear = nn.functional.linear

    def spy(input, weight, bias=None):
        if weight.shape[0] == VOCAB:
            widths.append(input.numel() // input.shape[-1])
        return linear(input, weight, bias)

    monkeypatch.setattr(evaluation, "CHUNK_LOGITS", 4 * VOCAB)
    monkeypatch.setattr(nn.functional, "linear", spy)
    chunked = evaluate_pairs(model, rows, COLLATE, accelerator, ref_model=ref_model)
    torch.testing.assert_close(chunked.chosen.kl, whole.chosen.kl, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(chunked.rejected.logratio, whole.rejected.logratio, rtol=1e-5, atol=1e-6)
    # 2 * 6 sequences in the forward pass, of which only the last position gets logits; chunks of 4 after that
    assert widths.count(12) == 2 and max(w for w in widths if w != 12) == 4


@pytest.mark.parametrize(
    "model_class, config",
    [
        (Gemma2ForCausalLM, Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5)),
        (CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.25)),
        (GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=8.0)),
        (
            OPTForCausalLM,  # learnt positions, and a projection between the decoder's width and the embedding's
            OPTConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=16,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=1,
            ),
        ),
    ],
)
def test_other_output_heads(accelerator, model_class, config):
    torch.manual_seed(0)
    ref_model = model_class(config)
    model = perturbed(ref_model, 0.1)
    rows = tokenized_rows(5)
    pairs = evaluate_pairs(model, rows, COLLATE, accelerator, ref_model=ref_model, batch_size=2)
    assert_same(pairs, plain_loop(model, ref_model, rows))


def test_logits_that_are_not_head_times_hidden_state_raise(accelerator):
    model = make_model()
    model.lm_head.register_forward_hook(lambda _module, _args, logits: logits.flip(-1))
    with pytest.raises(ValueError, match="Qwen2ForCausalLM.*drift_metrics=False"):
        evaluate_pairs(model, tokenized_rows(2), COLLATE, accelerator, ref_model=make_model())


def test_a_diverged_policy_gives_nan_not_an_error(accelerator):
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    pairs = evaluate_pairs(model, tokenized_rows(2), COLLATE, accelerator, ref_model=make_model())
    assert pairs.chosen.kl.isnan().all() and pairs.chosen.logratio.isnan().all()


def test_an_unsuitable_model_raises(accelerator):
    class NoLogitsToKeep(type(make_model())):
        def forward(self, input_ids, attention_mask=None):
            raise AssertionError("must not be called")

    model = NoLogitsToKeep(make_model().config)
    with pytest.raises(ValueError, match="logits_to_keep.*drift_metrics=False"):
        evaluate_pairs(model, tokenized_rows(2), COLLATE, accelerator, ref_model=make_model())


def test_fsdp_version_1_raises(accelerator):
    model = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(model)
    with pytest.raises(TypeError, match="fsdp_version: 2"):
        evaluate_pairs(model, tokenized_rows(2), COLLATE, accelerator)


def test_another_vocabulary_raises(accelerator):
    ref_model = make_model(vocab_size=50)
    with pytest.raises(ValueError, match="50 logits a token and the policy 43"):
        evaluate_pairs(make_model(), tokenized_rows(2), COLLATE, accelerator, ref_model=ref_model)


def test_an_empty_dataset_raises(accelerator):
    with pytest.raises(ValueError, match="`dataset` has no rows"):
        evaluate_pairs(make_model(), [], COLLATE, accelerator, ref_model=make_model())


def test_policy_equal_to_its_reference_has_drift_zero(accelerator):
    model = make_model()
    pairs = evaluate_pairs(model, tokenized_rows(4), COLLATE, accelerator, ref_model=copy.deepcopy(model))
    assert not pairs.chosen.kl.any() and not pairs.rejected.logratio.any()


def test_cudnn_has_no_part_in_the_passes(accelerator):
    """It plans for each shape anew, and each batch has one of its own."""
    model, enabled = make_model(), []
    model.model.register_forward_pre_hook(lambda *_: enabled.append(torch.backends.cuda.cudnn_sdp_enabled()))
    evaluate_pairs(model, tokenized_rows(4), COLLATE, accelerator, ref_model=make_model(1), batch_size=2)
    assert enabled and not any(enabled) and torch.backends.cuda.cudnn_sdp_enabled()


def test_dropout_is_off_and_the_mode_comes_back(accelerator):
    ref_model = make_model(attention_dropout=0.5)
    model = perturbed(ref_model).train()
    ref_model.train()
    rows = tokenized_rows(4)
    pairs = evaluate_pairs(model, rows, COLLATE, accelerator, ref_model=ref_model)
    assert_same(pairs, plain_loop(model, ref_model, rows))
    assert model.training and ref_model.training


def test_a_completion_cut_to_nothing_counts_as_zero(accelerator):
    ref_model = make_model()
    rows = [{"prompt_ids": [3, 4, 5, 6], "chosen_ids": [7], "rejected_ids": [8, 9]}, *tokenized_rows(2)]
    collate = DataCollatorForPreference(pad_token_id=0, max_length=4)
    pairs = evaluate_pairs(perturbed(ref_model), rows, collate, accelerator, ref_model=ref_model, batch_size=1)
    assert pairs.chosen.tokens[0] == 0 and pairs.chosen.logratio[0] == 0 and pairs.chosen.kl[0] == 0
    assert not any(math.isnan(value) for value in drift_metrics(pairs, beta=0.1).values())


def lora(model: nn.Module, **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], **kwargs))


def test_the_reference_of_a_peft_model_is_the_base_model(accelerator):
    base = make_model()
    model = perturbed(lora(copy.deepcopy(base)))
    rows = tokenized_rows(5)
    pairs = evaluate_pairs(model, rows, COLLATE, accelerator, batch_size=2)
    assert_same(pairs, plain_loop(model, base, rows))
    assert model.active_adapter == "default" and any(p.requires_grad for p in model.parameters())


def test_the_reference_of_a_continued_adapter_is_its_copy(accelerator):
    start = perturbed(lora(make_model()))
    model = copy.deepcopy(start)
    model.add_adapter("ref", model.peft_config["default"])
    for name, p in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(p.data)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B.default" in name:
                p.add_(0.05)
    rows = tokenized_rows(5)
    pairs = evaluate_pairs(model, rows, COLLATE, accelerator)
    assert_same(pairs, plain_loop(model, start, rows))
    assert model.active_adapter == "default"


@pytest.mark.parametrize("has_copy", [False, True])
def test_a_frozen_part_of_an_adapter_stays_frozen(accelerator, has_copy):
    """PEFT lets each adapter train that it switches on again."""
    model = perturbed(lora(make_model()))
    if has_copy:
        model.add_adapter("ref", model.peft_config["default"])
    for name, p in model.named_parameters():
        p.requires_grad_("lora_B.default" in name)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    evaluate_pairs(model, tokenized_rows(2), COLLATE, accelerator)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_precomputed_reference_gives_everything_but_kl(accelerator):
    ref_model = make_model()
    model = perturbed(ref_model)
    rows = tokenized_rows(5)
    expected = plain_loop(model, ref_model, rows)
    for i, row in enumerate(rows):
        for side in ("chosen", "rejected"):
            row[f"ref_{side}_logps"] = float(expected[f"{side}_logps"][i] - expected[f"{side}_logratio"][i])
    pairs = evaluate_pairs(model, rows, COLLATE, accelerator, batch_size=2)
    torch.testing.assert_close(pairs.chosen.logratio, expected["chosen_logratio"], rtol=1e-4, atol=1e-5)
    assert pairs.chosen.kl is None and pairs.completions().kl is None
    assert set(drift_metrics(pairs, beta=0.1)) == {"drift/logratio_abs", "drift/reward_abs"}


def test_no_reference_at_all_raises(accelerator):
    with pytest.raises(ValueError, match="no reference.*`ref_model`"):
        evaluate_pairs(make_model(), tokenized_rows(2), COLLATE, accelerator)


def test_a_batch_without_labels_raises(accelerator):
    def collate(examples):
        return {"input_ids": torch.tensor([[3, 4, 5]] * len(examples))}

    with pytest.raises(ValueError, match=r"\['input_ids'\], with neither `completion_mask` nor `labels`"):
        evaluate_sequences(make_model(), tokenized_rows(2), collate, accelerator, ref_model=make_model())


def test_sequences_are_scored_where_labels_are(accelerator):
    ref_model = make_model()
    model = perturbed(ref_model)
    rows = tokenized_rows(5)
    expected = plain_loop(model, ref_model, rows)

    def collate(examples):
        batch = COLLATE(examples)
        n = len(examples)
        ids, labels = batch["input_ids"][:n], batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)[:n]
        return {"input_ids": ids, "attention_mask": batch["attention_mask"][:n], "labels": labels}

    table = evaluate_sequences(model, rows, collate, accelerator, ref_model=ref_model, batch_size=2)
    torch.testing.assert_close(table.kl, expected["chosen_kl"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(table.logps, expected["chosen_logps"], rtol=1e-4, atol=1e-5)


def test_bf16_logits_do_not_blur_the_kl(accelerator):
    """Logits of 64 ± 1 in bf16 are rounded to multiples of 0.5, in which a KL of 1e-4 nats a token would drown."""
    ref_model = make_model()
    ref_model.lm_head.bias = nn.Parameter(torch.full((VOCAB,), 64.0))
    model = copy.deepcopy(ref_model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    rows = tokenized_rows(16)
    expected = plain_loop(model, ref_model, rows)
    expected = (expected["chosen_kl"].sum() + expected["rejected_kl"].sum()) / (
        expected["chosen_tokens"].sum() + expected["rejected_tokens"].sum()
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pairs = evaluate_pairs(model, rows, COLLATE, accelerator, ref_model=ref_model)
    assert drift_metrics(pairs)["drift/kl"] == pytest.approx(expected.item(), rel=0.2)


# ---- Numbers from the table ----


def table(logratio, tokens=None, kl=None) -> SequenceEvaluation:
    logratio = torch.tensor(logratio, dtype=torch.float64)
    tokens = torch.ones(len(logratio), dtype=torch.int64) if tokens is None else torch.tensor(tokens)
    return SequenceEvaluation(logratio - 10, logratio, tokens, None if kl is None else torch.tensor(kl).double())


def test_rewards():
    pairs = PairEvaluation(table([1.0, -2.0, 0.5, 0.0]), table([0.5, -1.0, -3.0, 0.0]))
    assert reward_margins(pairs, 0.2).tolist() == pytest.approx([0.1, -0.2, 0.7, 0.0])
    assert reward_accuracy(pairs, 0.2) == 0.625  # the tie counts half
    metrics = reward_metrics(pairs, 0.2)
    assert metrics["rewards/accuracies"] == 0.625 and metrics["rewards/ties"] == 0.25
    assert metrics["rewards/margins"] == pytest.approx(0.6 / 4)
    assert metrics["rewards/chosen"] == pytest.approx(0.2 * -0.5 / 4)
    assert metrics["rewards/rejected"] == pytest.approx(0.2 * -3.5 / 4)
    assert metrics["logps/chosen"] == pytest.approx(-10.125)


def test_drift():
    pairs = PairEvaluation(table([1.0, -2.0], [2, 4], [0.5, 0.1]), table([0.0, 3.0], [1, 3], [0.0, 0.4]))
    metrics = drift_metrics(pairs, beta=0.1)
    assert metrics["drift/reward_abs"] == pytest.approx(0.1 * 6 / 4)
    assert metrics["drift/logratio_abs"] == pytest.approx((0.5 + 0.5 + 0 + 1) / 4)
    assert metrics["drift/kl"] == pytest.approx(1.0 / 10)  # a mean over tokens, not over completions
    assert "drift/reward_abs" not in drift_metrics(pairs.chosen)


def test_memorization():
    pairs = PairEvaluation(table([1.0, -1.0, 1.0, 1.0]), table([0.0, 0.0, 0.0, 2.0]))
    flipped = torch.tensor([True, True, False, False])
    assert memorization_metrics(pairs, flipped, 0.1) == {
        "memorization/flipped_fit": 0.5,
        "memorization/clean_fit": 0.5,
    }
    assert memorization_metrics(pairs, [False, True, False, False], 0.1) == {
        "memorization/flipped_fit": 0.0,
        "memorization/clean_fit": pytest.approx(2 / 3),
    }
    assert memorization_metrics(pairs, [False] * 4, 0.1) == {"memorization/clean_fit": 0.5}
    with pytest.raises(ValueError, match="`flipped`.*4 pairs.*\\(3,\\)"):
        memorization_metrics(pairs, [False] * 3, 0.1)


def test_memorization_rows():
    assert memorization_rows(5, None) == memorization_rows(5, 5) == memorization_rows(5, 9) == [0, 1, 2, 3, 4]
    assert memorization_rows(10, 4) == [0, 2, 5, 7]


# ---- Drift of the weights ----


def test_parameter_drift_of_full_fine_tuning(accelerator):
    model = make_model()
    model.model.embed_tokens.requires_grad_(False)  # and with it the tied head
    drift = ParameterDrift(model, accelerator)
    assert drift.relative(model) == 0.0
    moved = perturbed(model)
    with torch.no_grad():
        moved.model.embed_tokens.weight.add_(1.0)  # frozen: does not count
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    w0 = torch.cat([model.get_parameter(n).detach().flatten() for n in trained])
    w = torch.cat([moved.get_parameter(n).detach().flatten() for n in trained])
    assert drift.relative(moved) == pytest.approx(((w - w0).norm() / w0.norm()).item(), rel=1e-5)


@pytest.mark.parametrize("fresh", [True, False])
def test_parameter_drift_of_lora_is_of_the_effective_weight(accelerator, fresh):
    model = lora(make_model())
    if not fresh:
        model = perturbed(model)
    drift = ParameterDrift(model, accelerator)
    assert fresh == all(value is None for value in drift.initial.values())  # a new adapter needs no copy
    assert drift.relative(model) == 0.0
    moved = perturbed(model, seed=2)
    layers = [n for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))]
    change = [
        moved.get_submodule(n).get_delta_weight("default") - model.get_submodule(n).get_delta_weight("default")
        for n in layers
    ]
    base = [model.get_submodule(n).base_layer.weight for n in layers]
    expected = torch.cat([c.flatten() for c in change]).norm() / torch.cat([b.flatten() for b in base]).norm()
    assert drift.relative(moved) == pytest.approx(expected.item(), rel=1e-4)


def test_parameter_drift_of_lora_with_other_trained_tensors(accelerator):
    model = lora(make_model(tie_word_embeddings=False), modules_to_save=["lm_head"])
    drift = ParameterDrift(model, accelerator)
    with torch.no_grad():
        model.get_output_embeddings().modules_to_save["default"].weight.mul_(1.5)
    layers = [m.base_layer.weight for n, m in model.named_modules() if n.endswith(("q_proj", "down_proj"))]
    head = model.get_output_embeddings().original_module.weight
    norm = torch.cat([w.flatten() for w in [*layers, head]]).norm()
    assert drift.relative(model) == pytest.approx((0.5 * head.norm() / norm).item(), rel=1e-5)


def test_parameter_drift_of_an_embedding_adapter(accelerator):
    torch.manual_seed(0)
    model = get_peft_model(make_model(tie_word_embeddings=False), LoraConfig(r=2, target_modules=["embed_tokens"]))
    drift = ParameterDrift(model, accelerator)
    moved = perturbed(model)
    layer = moved.get_submodule("base_model.model.model.embed_tokens")
    expected = layer.get_delta_weight("default").norm() / layer.base_layer.weight.norm()
    assert drift.relative(moved) == pytest.approx(expected.item(), rel=1e-4)


def test_parameter_drift_without_trained_parameters_raises(accelerator):
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        ParameterDrift(make_model().requires_grad_(False), accelerator)


def test_dataset_rows_work_as_lists_do(accelerator):
    rows = tokenized_rows(3)
    model, ref_model = perturbed(make_model()), make_model()
    as_list = evaluate_pairs(model, rows, COLLATE, accelerator, ref_model=ref_model)
    as_dataset = evaluate_pairs(model, Dataset.from_list(rows), COLLATE, accelerator, ref_model=ref_model)
    assert torch.equal(as_list.chosen.logratio, as_dataset.chosen.logratio)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tie_counts_half_wherever_pairs_are_scored(tmp_path, dtype):
    """In metrics, in the fit of training pairs, and in the outcomes of a run that is read from its folder."""
    margins = torch.tensor([1e-6, 0.0, -0.0, -1e-6, 2.0, math.inf, -math.inf], dtype=dtype)
    expected = [1, 0.5, 0.5, 0, 1, 1, 0]
    assert preference_scores(margins).tolist() == expected and preference_scores(margins).dtype == torch.float64
    assert preference_scores(torch.tensor([math.nan, 1.0])).isnan().tolist() == [True, False]
    zero = SequenceEvaluation(torch.zeros(7), torch.zeros(7).double(), torch.ones(7).long(), None)
    ratio = SequenceEvaluation(torch.zeros(7), margins.double(), torch.ones(7).long(), None)
    assert row_fit(PairEvaluation(ratio, zero))[0].tolist() == expected
    run = Run(tmp_path, "a", "adamw", 1e-3, 0, "prm_hf", heldout=margins.double().numpy())
    assert run.outcomes().tolist() == expected
