"""The whole call, on tiny models: what it returns, what makes it larger or smaller, and what it refuses."""

import json
import math
from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import ImageClassifierOutput

from prm_hf.diagnostics.compression import CompressionBound, compression_bound, load_compressed
from prm_hf.diagnostics.subspace import Subspace
from prm_hf.experiments.compression_data import VOCABULARY, documents


peft = pytest.importorskip("peft")
needs_unilora = pytest.mark.skipif(not hasattr(peft, "UniLoraConfig"), reason="this peft has no UniLoraConfig")
CLASSES, INPUTS = 4, 6


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(INPUTS, 64), nn.ReLU(), nn.Linear(64, CLASSES))

    def forward(self, x, labels=None):
        logits = self.layers(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)


def make_rows(n: int = 600, random_labels: bool = False, seed: int = 0) -> Dataset:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, INPUTS))
    labels = rng.integers(CLASSES, size=n) if random_labels else 2 * (x[:, 0] > 0) + (x[:, 1] > 0)
    return Dataset.from_dict({"x": x.tolist(), "labels": labels.tolist(), "number": list(range(n))})


def collate(rows):
    return {
        "x": torch.tensor([row["x"] for row in rows]).float(),
        "labels": torch.tensor([row["labels"] for row in rows]),
    }


def trained(rows: Dataset, dim: int = 24, steps: int = 150) -> tuple[Network, Subspace]:
    torch.manual_seed(0)
    model = Network()
    subspace = Subspace(model, dim)
    optimizer = subspace.attach(torch.optim.Adam([subspace.vector], lr=0.1))
    batch = collate(list(rows))
    for _ in range(steps):
        model(**batch).loss.backward()
        optimizer.step()
    return model, subspace


@pytest.fixture(scope="module")
def learnt():
    rows = make_rows()
    return rows, *trained(rows)


def bound_of(learnt, **changed) -> CompressionBound:
    rows, model, subspace = learnt
    options = {"subspace": subspace, "prior": "init", "data_collator": collate, "levels": 7, "batch_size": 600}
    return compression_bound(model, changed.pop("rows", rows), "classification", **options | changed)


def test_a_bound_is_of_the_decoded_file_and_the_model_stays_as_it_was(learnt, tmp_path):
    rows, model, _subspace = learnt
    before = [p.detach().clone() for p in model.parameters()]
    found = bound_of(learnt, levels=(3, 7), output_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

    data = (tmp_path / "weights-1.bin").read_bytes()
    assert found.path == str(tmp_path / "weights-1.bin")
    assert 8 * len(data) == found.message_bits + found.codebook_bits
    assert found.codebook_bits == 16 * found.levels and found.levels == data[0]
    bits = found.message_bits + found.codebook_bits + found.prefix_bits + found.misc_bits
    assert found.kl_nats == pytest.approx(bits * math.log(2))
    saved = json.loads((tmp_path / "bound-1.json").read_text())
    assert {**saved, "assumptions": tuple(saved["assumptions"])} == asdict(found)

    fresh, new = trained(rows, steps=0)
    load_compressed(fresh, found.path, new)
    batch = collate(list(rows))
    wrong = (fresh(batch["x"]).logits.argmax(1) != batch["labels"]).double().mean().item()
    assert found.empirical_risk == pytest.approx(wrong, abs=1e-12)
    assert 0 <= found.empirical_risk < found.bound < found.guess == 0.75
    assert not found.vacuous and found.certified_accuracy == 1 - found.bound
    assert f"risk ≤ {found.bound:.4f}" in str(found) and "assumed: each row" in str(found)
    assert found.n == found.n_evaluated == 600 and found.dim == 24


def test_random_labels_give_a_vacuous_bound_although_they_are_partly_learnt():
    rows = make_rows(random_labels=True)
    found = bound_of((rows, *trained(rows, dim=100)), levels=(3, 7, 17))
    assert found.unquantized_risk < 0.65
    assert found.vacuous and found.bound >= found.guess


def test_the_true_risk_is_below_the_bound(learnt):
    _, _model, _subspace = learnt
    found = bound_of(learnt)
    fresh = bound_of(learnt, rows=make_rows(4000, seed=1))
    assert fresh.empirical_risk < found.bound


def test_a_bound_grows_with_what_is_tried_and_with_certainty_and_falls_with_rows(learnt):
    found = bound_of(learnt)
    assert bound_of(learnt, delta=0.001).bound > found.bound
    tried = bound_of(learnt, configurations=64)
    assert tried.misc_bits == found.misc_bits + 6 and tried.bound > found.bound
    more = bound_of(learnt, rows=make_rows(2400, seed=0))
    assert more.bound < found.bound + more.empirical_risk - found.empirical_risk + 0.02
    for kind in ("catoni", "subsampling"):
        assert found.empirical_risk < bound_of(learnt, bound=kind).bound < 1


def test_some_units_cost_more_than_all(learnt):
    found, some = bound_of(learnt), bound_of(learnt, n_evaluate=100)
    assert (some.n, some.n_evaluated) == (600, 100)
    assert some.bound > some.empirical_risk + found.bound - found.empirical_risk
    assert bound_of(learnt, n_evaluate=10_000).n_evaluated == 600


def test_what_is_tried_is_counted_over_calls(learnt, tmp_path):
    rows, _model, _subspace = learnt
    first = bound_of(learnt, output_dir=tmp_path)
    assert first.misc_bits == 1  # ½ is the weight of the first
    other = bound_of((rows, *trained(rows, dim=30, steps=5)), output_dir=tmp_path)
    assert other.misc_bits == pytest.approx(math.log2(6))
    again = bound_of(learnt, output_dir=tmp_path)
    assert again.misc_bits == 1 and again.path.endswith("weights-3.bin")
    assert len(json.loads((tmp_path / "tried.json").read_text())) == 2


def test_fine_tuning_lowers_the_bound_at_as_many_levels():
    rows = make_rows()
    both = trained(rows, dim=60)
    plain, tuned = (bound_of((rows, *both), levels=3, qat_steps=steps, batch_size=200) for steps in (0, 60))
    assert tuned.qat_steps == 60 and tuned.codebook_bits == plain.codebook_bits
    assert tuned.bound < plain.bound and tuned.empirical_risk < plain.empirical_risk


def test_all_trainable_parameters_without_a_subspace(learnt):
    _rows, model, _ = learnt
    found = bound_of(learnt, subspace=None)
    assert found.dim == sum(p.numel() for p in model.parameters())
    assert found.bound > bound_of(learnt).bound


def test_rows_of_a_unit_count_once(learnt):
    rows, _model, _subspace = learnt
    units = [i // 3 for i in range(len(rows))]
    grouped = rows.add_column("unit", units)
    found = bound_of(learnt, rows=grouped, unit="unit")
    assert found.n == 200 and found.bound > bound_of(learnt).bound
    assert found.empirical_risk == pytest.approx(bound_of(learnt).empirical_risk)
    assert "each unit of" in str(found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"delta": 0}, "`delta` must be in \\(0, 1\\), got 0"),
        ({"levels": (1, 3)}, "`levels` must be 2 to 255 each"),
        ({"bound": "hoeffding"}, "`bound` must be 'kl'"),
        ({"prior": "seen"}, "`prior` must be 'pretrained' or 'init'"),
        ({"qat_steps": -1}, "`qat_steps` must be at least 0"),
        ({"configurations": 0}, "`configurations` must be at least 1"),
        ({"n_evaluate": 0}, "`n_evaluate` must be at least 1"),
        ({"unit": "prompt"}, "`unit='prompt'` is neither 'row' nor a column"),
        ({"rows": make_rows(1)}, "1 independent units: a bound needs at least 2"),
        ({"data_collator": None, "rows": Dataset.from_dict({"x": [1]})}, "no column 'labels', which"),
    ],
)
def test_bad_arguments_are_refused(learnt, changed, message):
    if "rows" in changed and changed.get("data_collator", collate) is None:
        changed = {**changed, "rows": Dataset.from_dict({"x": [1.0, 2.0]})}
    with pytest.raises(ValueError, match=message):
        bound_of(learnt, **changed)


def test_a_condition_that_fails_is_refused(learnt):
    rows, _model, _ = learnt
    twice = Dataset.from_list([*rows, *rows.select(range(10))])
    with pytest.raises(ValueError, match="10 rows of `dataset` are copies of others.*`unit='row'`"):
        bound_of(learnt, rows=twice)
    assert bound_of(learnt, rows=twice, unit="number").n == 600
    assert bound_of(learnt, rows=twice, unit="row").n == 610

    with pytest.raises(ValueError, match="20 rows of `dataset` are of a row that `prior_data` has too"):
        bound_of(learnt, prior="pretrained", prior_data=rows.select(range(20)))
    other = make_rows(50, seed=9)
    assert "`prior_data` are all rows" in str(bound_of(learnt, prior="pretrained", prior_data=other))
    with pytest.raises(ValueError, match="none of which `dataset` has"):
        bound_of(learnt, prior_data=Dataset.from_dict({"z": [1]}))
    assert "has not seen `dataset`" in str(bound_of(learnt, prior="pretrained"))

    outside, subspace = trained(rows, steps=1)
    with torch.no_grad():
        outside.layers[0].weight += 0.01
    with pytest.raises(ValueError, match="trained outside of it"):
        bound_of((rows, outside, subspace))


def unilora_model(dim: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    adapter = peft.UniLoraConfig(r=16, theta_d_length=dim, target_modules="all-linear")
    return peft.get_peft_model(LlamaForCausalLM(config), adapter)


def train_documents(model: nn.Module, rows: Dataset, steps: int, learning_rate: float = 0.05) -> None:
    ids = torch.tensor(rows["input_ids"])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=learning_rate)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = ids[torch.randint(len(ids), (64,), generator=generator)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()


@needs_unilora
def test_bits_a_token_of_a_unilora_adapter():
    rows = documents(40)
    model = unilora_model(32)
    train_documents(model, rows, 5)
    found = compression_bound(model, rows, "lm", levels=3, alphas=(0.1, 0.5), batch_size=7, unit="row")
    assert found.dim == 32 and found.n == 40 and found.misc_bits == 1
    assert found.guess == math.log2(VOCABULARY) and found.alpha in (0.1, 0.5)
    assert found.empirical_risk <= found.bound <= -math.log2(found.alpha / VOCABULARY) + 1e-9
    with pytest.raises(ValueError, match="certified_accuracy"):
        _ = found.certified_accuracy

    # The same number by hand, of the weights before compression
    ids = torch.tensor(rows["input_ids"])
    with torch.no_grad():
        p = model(input_ids=ids).logits[:, :-1].softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    bits = -torch.log2((1 - found.alpha) * p + found.alpha / VOCABULARY)
    assert found.unquantized_risk == pytest.approx(bits.mean().item(), abs=1e-5)


@needs_unilora
def test_documents_of_different_lengths_count_once_each():
    rows = Dataset.from_dict(
        {"input_ids": [[1, 2, 3, 4], [5, 6], [7, 8, 9]], "labels": [[-100, 2, 3, 4], [5, 6], [7] * 3]}
    )
    model = unilora_model(16)
    whole = compression_bound(model, rows, "lm", levels=3, alphas=(0.2,), batch_size=3)
    single = compression_bound(model, rows, "lm", levels=3, alphas=(0.2,), batch_size=1)
    assert whole.empirical_risk == pytest.approx(single.empirical_risk, abs=1e-6)
    empty = Dataset.from_dict({"input_ids": [[1, 2], [3, 4]], "labels": [[1, 2], [3, -100]]})
    with pytest.raises(ValueError, match="Row 1 of `dataset` has no token with a label"):
        compression_bound(model, empty, "lm")


def pairs(n: int, seed: int = 0) -> Dataset:
    """The chosen completion counts up from the last token of the prompt, the rejected one down."""
    rng = np.random.default_rng(seed)
    start = rng.integers(VOCABULARY, size=n)
    return Dataset.from_dict(
        {
            "prompt_ids": [[int(s), i % VOCABULARY, i // VOCABULARY, int(s)] for i, s in enumerate(start)],
            "chosen_ids": [[int(s + k) % VOCABULARY for k in (1, 2, 3)] for s in start],
            "rejected_ids": [[int(s - k) % VOCABULARY for k in (1, 2, 3)] for s in start],
        }
    )


@needs_unilora
def test_pairs_of_a_prompt_are_one_unit():
    rows = pairs(30)
    found = compression_bound(
        unilora_model(16), Dataset.from_list([*rows, *rows.select(range(20))]), "preference", levels=3, batch_size=50
    )
    assert found.n == 30 and found.guess == 0.5 and "each prompt_ids" in str(found)
    assert 0 <= found.empirical_risk < found.bound <= 1
    with pytest.raises(ValueError, match="`unit` is needed: pairs of one prompt are not independent"):
        compression_bound(unilora_model(16), rows.rename_column("prompt_ids", "ids"), "preference")


@needs_unilora
@pytest.mark.slow
def test_fine_tuning_goes_down_dpos_loss():
    options = {"levels": 5, "batch_size": 60, "beta": 1.0}
    model, rows = unilora_model(64), pairs(60)
    before = compression_bound(model, rows, "preference", **options)
    tuned = compression_bound(model, rows, "preference", qat_steps=20, qat_learning_rate=0.3, **options)
    assert tuned.qat_steps == 20 and tuned.empirical_risk < before.empirical_risk


@needs_unilora
@pytest.mark.slow
@pytest.mark.parametrize("random_tokens", [False, True])
def test_a_language_model_of_counting_documents_is_certified_and_one_of_random_tokens_is_not(random_tokens):
    """In kind the recorded mini reproduction: 20,000 documents, 2,000 of them evaluated, a guess has 4.087 bits.

    There, 5 levels gave 3.99 bits without and 3.05 with fine-tuning, and 4.64 on random tokens.
    """
    rows = documents(20_000, random_tokens)
    model = unilora_model(256)
    train_documents(model, rows, 400)
    options = {"levels": 5, "n_evaluate": 2000, "unit": "row", "batch_size": 200, "alphas": (0.1, 0.25, 0.5)}
    plain = compression_bound(model, rows, "lm", bound="subsampling", **options)
    tuned = compression_bound(model, rows, "lm", qat_steps=100, **options)
    if random_tokens:
        assert plain.vacuous and tuned.vacuous
    else:
        assert tuned.bound < plain.bound - 0.2 and tuned.bound < 3.5 and not tuned.vacuous


def test_every_field_is_documented():
    for field in fields(CompressionBound):
        assert field.name in CompressionBound.__doc__
