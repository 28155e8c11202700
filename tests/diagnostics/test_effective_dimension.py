"""The effective dimension against recorded values, and matrices that are made in another way."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import hessian
from torch.nn.attention import SDPBackend, sdpa_kernel
from trl.trainer.dpo_trainer import DataCollatorForPreference

from prm_hf.diagnostics import Curvature, effective_dimension

from .recorded import falling, recorded_mlp
from .small import jacobian, logits_of, lora_model, pair_rows, token_rows


ALPHAS = [1e-3, 1e-2, 6e-3, 0.1, 1.0]


@pytest.mark.parametrize(("kind", "name"), [("hessian", "exact_eigs_all"), ("ggn", "ggn_eigs")])
@pytest.mark.parametrize("batch_size", [60, 50])  # 50 and 10 rows: the uneven batches of the original's mistake
def test_recorded_eigenvalues(kind, name, batch_size):
    model, rows, recorded = recorded_mlp()
    found = effective_dimension(model, rows, kind=kind, method="exact", loss="classification", batch_size=batch_size)
    np.testing.assert_allclose(found.eigenvalues, falling(recorded[name]), rtol=0, atol=1e-12)
    assert found.n_negative == int(kind == "hessian")
    assert found.loss == pytest.approx(recorded["loss"], abs=1e-15)
    assert (found.n_params, found.n_terms) == (44, 60)


def test_recorded_effective_dimensions():
    model, rows, recorded = recorded_mlp()
    options = {"kind": "hessian", "method": "exact", "loss": "classification", "batch_size": 60}
    of_all = effective_dimension(model, rows, **options)
    weights = effective_dimension(model, rows, **options, params=["0.weight", "2.weight"])
    for expected in recorded["effdim"]:
        for found, name in ((of_all, "all_params_positive"), (weights, "weights_only_positive")):
            found = found.at(expected["alpha"])
            assert found.value == pytest.approx(expected[name], abs=1e-8)
            assert found.lower == pytest.approx(found.upper, abs=1e-12) == found.value


def test_lanczos_finds_the_recorded_eigenvalues():
    model, rows, recorded = recorded_mlp()
    found = effective_dimension(model, rows, kind="hessian", k=10, loss="classification", batch_size=50)
    np.testing.assert_allclose(found.eigenvalues, recorded["curvlinops"]["top10"], rtol=0, atol=1e-12)
    assert found.residuals.max() < 1e-12
    exact = effective_dimension(model, rows, kind="hessian", method="exact", loss="classification", batch_size=60)
    for alpha in ALPHAS:
        assert found.at(alpha).lower <= exact.at(alpha).value <= found.at(alpha).upper


def test_curvlinops_gives_the_same_products():
    curvlinops = pytest.importorskip("curvlinops")
    model, rows, _ = recorded_mlp()
    batches = [
        (torch.stack([x for x, _ in part]), torch.stack([y for _, y in part])) for part in (rows[:50], rows[50:])
    ]
    vector = torch.randn(44, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for kind, operator in (("hessian", "HessianLinearOperator"), ("ggn", "GGNLinearOperator")):
        theirs = getattr(curvlinops, operator)(model, nn.CrossEntropyLoss(), [*model.parameters()], batches)
        ours = Curvature(model, rows, kind=kind, loss="classification", batch_size=50)
        torch.testing.assert_close(ours.product(vector), (theirs @ vector).detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("method", ["exact", "lanczos", "slq"])
def test_the_trace_of_the_hat_matrix_of_ridge_regression(method):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 12, generator=generator, dtype=torch.float64)
    model = nn.Linear(12, 1, bias=False).double()
    rows = [(x, torch.zeros(1, dtype=torch.float64)) for x in features]
    alpha = 3.0
    hat = features @ torch.linalg.solve(features.T @ features + alpha * torch.eye(12), features.T)
    found = effective_dimension(
        model, rows, alpha, reduction="sum", method=method, loss=lambda p, y: (p - y).square() / 2, seed=1
    )
    if method == "exact":
        assert found.value == pytest.approx(hat.trace().item(), abs=1e-10)
    else:
        assert found.lower <= hat.trace() <= found.upper
    mean = effective_dimension(model, rows, alpha / 30, method="exact", loss=lambda p, y: (p - y).square() / 2)
    assert mean.value == pytest.approx(hat.trace().item(), abs=1e-10)  # α of the mean is α / terms of the sum


def dense_ggn_of_tokens(model, rows):
    """Σ Jᵀ(diag p − ppᵀ)J / tokens, of each row alone and without padding."""
    total, n_tokens = 0, 0
    for row in rows:
        predicted = [i for i, label in enumerate(row["labels"][1:]) if label != -100]
        logits = logits_of(model, {}, row["input_ids"])[predicted].detach()
        slopes = jacobian(model, lambda v, row=row, at=predicted: logits_of(model, v, row["input_ids"])[at])
        slopes = slopes.reshape(len(predicted), logits.shape[1], -1)
        for p, slope in zip(logits.softmax(-1), slopes, strict=True):
            total = total + slope.T @ (p.diag() - p.outer(p)) @ slope
            n_tokens += 1
    return total / n_tokens


def test_the_whole_matrix_of_a_lora_model():
    model, rows = lora_model(), token_rows()
    curvature = Curvature(model, rows, batch_size=3)
    model.eval()  # the second way has no dropout either
    expected = dense_ggn_of_tokens(model, rows)
    torch.testing.assert_close(curvature.matrix(), expected, rtol=1e-5, atol=1e-7)  # norms are in float32
    found = effective_dimension(model, rows, alpha=1e-3, method="exact", batch_size=2)
    np.testing.assert_allclose(found.eigenvalues, falling(np.linalg.eigvalsh(expected.numpy())), atol=1e-6)
    assert found.n_negative == 0


def test_the_hessian_of_a_lora_model_is_indefinite_and_says_so():
    model, rows = lora_model(b=0.0), token_rows()

    def loss(values):
        parts = []
        for row in rows:
            logits, labels = logits_of(model, values, row["input_ids"])[:-1], torch.tensor(row["labels"][1:])
            parts.append(nn.functional.cross_entropy(logits, labels, reduction="sum"))
        return sum(parts)

    curvature = Curvature(model, rows, kind="hessian", reduction="sum", batch_size=3)
    model.eval()
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with sdpa_kernel(SDPBackend.MATH):
        blocks = hessian(loss)(values)
    sizes = {name: p.numel() for name, p in values.items()}
    expected = torch.cat(
        [torch.cat([blocks[a][b].reshape(sizes[a], sizes[b]) for b in values], dim=1) for a in values]
    )
    torch.testing.assert_close(curvature.matrix(), expected, rtol=1e-4, atol=1e-4)  # Qwen2's norms are in float32
    found = effective_dimension(model, rows, kind="hessian", method="exact", reduction="sum")
    assert found.n_negative == (np.linalg.eigvalsh(expected.numpy()) < -1e-4).sum() > 0
    assert found.eigenvalues[-1] < 0  # as it is, not clipped
    positive = found.eigenvalues[found.eigenvalues > 0]
    assert found.value == pytest.approx((positive / (positive + 1)).sum())


@pytest.mark.parametrize("padded_by", ["rows", pytest.param("trl", marks=pytest.mark.slow)])
def test_preference_pairs(padded_by):
    """Σ σ(m)(1−σ(m)) ∇m ∇mᵀ, each pair alone, and the reference the model without its adapter."""
    model, rows, beta = lora_model(), pair_rows(), 0.5
    data = rows
    if padded_by == "trl":
        data = torch.utils.data.DataLoader(rows, batch_size=3, collate_fn=DataCollatorForPreference(pad_token_id=0))
    options = {"loss": "dpo", "beta": beta, "batch_size": 2}
    curvature = Curvature(model, data, **options)
    model.eval()

    def difference(values, row):
        totals = []
        for side in ("chosen_ids", "rejected_ids"):
            ids, start = row["prompt_ids"] + row[side], len(row["prompt_ids"])
            logps = logits_of(model, values, ids)[start - 1 : -1].log_softmax(-1)
            totals.append(logps.gather(-1, torch.tensor(ids[start:])[:, None]).sum())
        return totals[0] - totals[1]

    expected, losses = 0, []
    for row in rows:
        with model.disable_adapter(), torch.no_grad():
            reference = difference({}, row)
        margin = beta * (difference({}, row) - reference).detach()
        slope = beta * jacobian(model, lambda values, row=row: difference(values, row))
        expected = expected + margin.sigmoid() * (-margin).sigmoid() * slope.T @ slope / len(rows)
        losses.append(-nn.functional.logsigmoid(margin))
    torch.testing.assert_close(curvature.matrix(), expected, rtol=1e-5, atol=1e-9)  # the reference is float32
    assert curvature.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    # `exact` takes one gradient a pair, since there are fewer pairs than parameters
    found = effective_dimension(model, data, method="exact", **options)
    assert len(found.eigenvalues) == len(rows) < found.n_params
    whole = falling(np.linalg.eigvalsh(curvature.matrix().numpy()))
    np.testing.assert_allclose(found.eigenvalues, whole[: len(rows)], atol=1e-9)
    products = curvature.product(found.eigenvectors)
    torch.testing.assert_close(
        products, found.eigenvectors * torch.tensor(found.eigenvalues.copy()), atol=1e-8, rtol=0
    )


def test_rows_of_pairs_are_those_of_the_chosen_parameters_in_their_order():
    model, rows = lora_model(), pair_rows()
    names = [name for name, p in model.named_parameters() if p.requires_grad][3:0:-1]
    for p in model.parameters():
        p.requires_grad_(False)
    curvature = Curvature(model, rows, loss="dpo", params=names, batch_size=3)
    found = curvature.rows().double()
    torch.testing.assert_close(found.T @ found, curvature.matrix(), rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(curvature.gram(found), found @ found.T)
    assert not any(p.requires_grad for p in model.parameters())  # as before


def test_references_may_come_with_the_rows():
    model, rows = lora_model(), pair_rows()
    own = Curvature(model, rows, loss="dpo")
    # Any numbers with the differences of the model without its adapter
    differences = torch.cat([batch.reference for batch in own._batches]).tolist()
    given = rows.add_column("ref_chosen_logps", differences).add_column("ref_rejected_logps", [0.0] * len(rows))
    assert Curvature(model, given, loss="dpo").loss == pytest.approx(own.loss, rel=1e-6)
    shifted = rows.add_column("ref_chosen_logps", [d + 5 for d in differences])
    shifted = shifted.add_column("ref_rejected_logps", [0.0] * len(rows))
    assert Curvature(model, shifted, loss="dpo").loss > own.loss + 0.1


def test_the_fisher_matrix_is_the_ggn_on_average():
    model, rows, _ = recorded_mlp()
    model[2].weight.data *= 0.1  # predictions that are not certain
    options = {"loss": "classification", "batch_size": 50}
    ggn = Curvature(model, rows, **options).matrix()
    draws = [Curvature(model, rows, kind="fisher", seed=seed, **options) for seed in range(16)]
    matrices = torch.stack([draw.matrix() for draw in draws])
    assert (matrices.mean(0) - ggn).norm() < 0.15 * ggn.norm()
    assert (matrices[0] - ggn).norm() > 0.15 * ggn.norm()  # each is a draw
    slopes = draws[0].rows()
    torch.testing.assert_close(slopes.T @ slopes, matrices[0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(Curvature(model, rows, kind="fisher", seed=0, **options).matrix(), matrices[0])


def test_fisher_and_a_function_agree_with_the_named_losses():
    model, rows, _ = recorded_mlp()
    named = Curvature(model, rows, loss="classification", batch_size=60)
    function = Curvature(model, rows, loss=nn.CrossEntropyLoss(reduction="none"), batch_size=60)
    torch.testing.assert_close(named.matrix(), function.matrix())
    assert named.is_semidefinite
    assert not function.is_semidefinite  # nobody knows


class Careless(nn.Module):
    """Dropout and a batch norm, one of which is frozen in training."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(4, 6), nn.BatchNorm1d(6)
        self.frozen, self.dropout, self.last = nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.dropout(self.frozen(self.norm(self.first(x)))))


def test_the_model_is_in_evaluation_mode_and_left_as_it_was():
    torch.manual_seed(0)
    model = Careless().double()
    model.train()
    model.frozen.eval()
    rows = [(torch.randn(4, dtype=torch.float64), torch.tensor(i % 3)) for i in range(10)]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    found = effective_dimension(model, rows, method="exact", loss="classification", batch_size=4)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not model.frozen.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    same = effective_dimension(model.eval(), rows, method="exact", loss="classification", batch_size=10)
    np.testing.assert_allclose(found.eigenvalues, same.eigenvalues, atol=1e-12)


def test_an_error_leaves_the_model_as_it_was_too():
    model = Careless().double().train()
    rows = [(torch.full((4,), float("nan"), dtype=torch.float64), torch.tensor(0))] * 4
    with pytest.raises(ValueError, match="loss of the model on `data` is nan"):
        effective_dimension(model, rows, loss="classification")
    assert all(module.training for module in model.modules())


def test_max_batches_and_other_alphas():
    model, rows, _ = recorded_mlp()
    options = {"method": "exact", "loss": "classification", "batch_size": 10}
    some = effective_dimension(model, rows, max_batches=2, **options)
    same = effective_dimension(model, rows[:20], **options)
    np.testing.assert_allclose(some.eigenvalues, same.eigenvalues, atol=1e-15)
    values = [same.at(alpha).value for alpha in sorted(ALPHAS)]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == len(values)
    assert same.to_dict()["n_terms"] == 20 and len(same.to_dict()["eigenvalues"]) == 44


MISTAKES = [
    ({"alpha": 0}, "`alpha` is 0: it must be a finite number above 0"),
    ({"alpha": "1e-3"}, "It is a string: pass the number 0.001"),
    ({"kind": "hesian"}, "`kind` is 'hesian': it must be one of ggn, hessian, fisher. Did you mean 'hessian'"),
    ({"method": "exakt"}, "`method` is 'exakt'.*Did you mean 'exact'"),
    ({"reduction": "avg"}, "`reduction` is 'avg'"),
    ({"loss": "causal-lm"}, "`loss` is 'causal-lm'.*Did you mean 'causal_lm'"),
    ({"k": 0}, "`k` is 0: it must be a whole number above 0"),
    ({"k": 44}, "`k=44` eigenvalues of 44 are too many"),
    ({"params": "weights"}, "`params` is 'weights'"),
    ({"params": ["0.wieght"]}, "`params` has '0.wieght', which no parameter"),
    ({"n_probes": 1}, "`n_probes` is 1"),
    ({"batch_size": 0}, "`batch_size` is 0"),
    ({"loss": nn.MSELoss(reduction="none"), "kind": "fisher"}, "`kind` is 'fisher', which draws targets"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES, ids=str)
def test_mistakes(changes, message):
    model, rows, _ = recorded_mlp()
    with pytest.raises(ValueError, match=message):
        effective_dimension(model, rows, **{"loss": "classification", **changes})


def test_mistakes_about_data():
    model, _, _ = recorded_mlp()
    with pytest.raises(ValueError, match="`data` has no rows"):
        effective_dimension(model, [], loss="classification")
    with pytest.raises(TypeError, match="`data` is a int"):
        effective_dimension(model, 3, loss="classification")
    with pytest.raises(ValueError, match="rows of `data` have prompt, and the loss needs `input_ids`"):
        effective_dimension(model, [{"prompt": "a"}])
    with pytest.raises(ValueError, match="the loss needs `prompt_ids`, `chosen_ids`, `rejected_ids`: tokenize them"):
        effective_dimension(model, [{"prompt": "a"}], loss="dpo")
    masked = [{"input_ids": [3, 4, 5], "labels": [-100] * 3}]
    with pytest.raises(ValueError, match="`data` has no label: every token is masked"):
        effective_dimension(lora_model(), masked)
    with pytest.raises(ValueError, match="pass `ref_model`, or batches with `ref_chosen_logps`"):
        effective_dimension(lora_model().get_base_model(), pair_rows(), loss="dpo", params="all")
    with pytest.raises(ValueError, match="logits have the shape .2, 2. and the labels .2, 1."):
        effective_dimension(model, [(torch.zeros(4).double(), torch.tensor([0]))] * 2, loss="classification")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="`params` is 'trainable', and the model has no such parameter"):
        effective_dimension(model, [(torch.zeros(4).double(), torch.tensor(0))], loss="classification")


def test_flash_attention_is_refused():
    model = lora_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention is 'flash_attention_2'.*attn_implementation='sdpa'"):
        effective_dimension(model, token_rows())


def test_another_reference_model():
    model, reference = lora_model(seed=1), lora_model(seed=2)
    with torch.no_grad():
        own = Curvature(model, pair_rows(), loss="dpo", ref_model=model)
        other = Curvature(model, pair_rows(), loss="dpo", ref_model=reference)
    assert own.loss == pytest.approx(np.log(2), rel=1e-6)  # no margin against itself
    assert other.loss != pytest.approx(np.log(2), rel=1e-3)


def test_tied_weights_are_one_tensor():
    model = lora_model().get_base_model()
    embedding = model.get_input_embeddings().weight
    names = [name for name, p in model.named_parameters() if p is embedding]
    curvature = Curvature(model, token_rows(2), params=names)
    found = curvature.product(torch.ones(embedding.numel(), dtype=torch.float64))

    def logits_moved_by(step):
        with torch.no_grad():
            embedding.add_(step)
            found = [logits_of(model, {}, row["input_ids"])[1:-1] for row in token_rows(2)]
            embedding.sub_(step)
        return torch.cat(found)

    # Along one direction v a GGN is Σ (Jv)ᵀ(diag p − ppᵀ)(Jv). Both uses of the tensor move
    model.eval()
    middle, h = logits_moved_by(0), 1e-3  # the norms of Qwen2 compute in float32
    slope = (logits_moved_by(h) - logits_moved_by(-h)) / (2 * h)
    p = middle.softmax(-1)
    expected = ((p * slope.square()).sum(-1) - (p * slope).sum(-1).square()).mean()
    assert found.sum().item() == pytest.approx(expected.item(), rel=2e-3)
