"""The loss of pairs whose labels are wrong with a known probability, against formulas and against swapped rows."""

import math

import numpy as np
import pytest
import torch
from datasets import Dataset, Value
from torch.nn.functional import logsigmoid

from prm_hf.trainers.pair_losses import PROBABILITY, SWAPPABLE

from ..tiny import make_model, preference_dataset
from .trainer_runs import dpo_trainer, weights


pytestmark = pytest.mark.usefixtures("quiet")
ROWS = preference_dataset(12, flipped=False)
P = [i / 11 for i in range(12)]  # 0 and 1 among them


def soft(rows=ROWS, p=P):
    return rows.add_column(PROBABILITY, p)


def swapped(rows):
    return Dataset.from_list([{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows])


def batch_of(trainer):
    return next(iter(trainer.get_train_dataloader()))


def logps(model, batch):
    """The summed log-probability of each completion, by a plain pass."""
    ids, mask = batch["input_ids"], batch["completion_mask"][:, 1:]
    log_p = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    return (log_p.gather(-1, ids[:, 1:, None]).squeeze(-1) * mask).sum(1)


def losses(name, beta, chosen, rejected, n_chosen, n_rejected):
    """As the papers have them, for one side as chosen."""
    h = chosen - rejected
    per_token = chosen / n_chosen - rejected / n_rejected
    return {
        "sigmoid": -logsigmoid(beta * h),
        "robust": -logsigmoid(beta * h),
        "hinge": (1 - beta * h).relu(),
        "ipo": (per_token - 1 / (2 * beta)) ** 2,
        "sigmoid_norm": -logsigmoid(beta * per_token),
    }[name]


@pytest.mark.parametrize("names", [*([name] for name in SWAPPABLE), ["sigmoid", "hinge"]], ids="+".join)
def test_the_loss_and_its_gradient_are_those_of_the_formula(tmp_path, names):
    trainer = dpo_trainer(
        tmp_path, model=make_model(3), ref_model=make_model(0), train=soft(), loss_type=names,
        loss_weights=[0.7, 2.0][: len(names)], beta=0.4, per_device_train_batch_size=12,
    )  # fmt: skip
    model, batch = trainer.model.train(), batch_of(trainer)
    p = batch[PROBABILITY].view(torch.float32)
    loss = trainer.compute_loss(model, dict(batch))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        reference = logps(trainer.ref_model, batch)
    c, r = (logps(model, batch) - reference).chunk(2)
    n, m = batch["completion_mask"].sum(1).chunk(2)
    expected = 0.0
    for name, weight in zip(names, [0.7, 2.0], strict=False):
        as_given, other = losses(name, 0.4, c, r, n, m), losses(name, 0.4, r, c, m, n)
        expected += weight * ((1 - p) * as_given + p * other).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, list(model.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert sorted(p.tolist()) == pytest.approx(P)


def trained(folder, rows, **kwargs):
    trainer = dpo_trainer(folder, train=rows, optim="adamw_torch", **kwargs)
    trainer.train()
    return trainer, weights(trainer.model)


def distance(a, b):
    return (a - b).abs().max().item()


def test_certain_labels_train_as_the_rows_themselves(tmp_path):
    _, plain = trained(tmp_path, ROWS)
    _, right = trained(tmp_path, soft(p=[0.0] * 12))
    _, wrong = trained(tmp_path, soft(p=[1.0] * 12))
    _, other = trained(tmp_path, swapped(ROWS))
    assert distance(plain, right) == 0
    assert distance(wrong, other) < 2e-3 and distance(wrong, plain) > 1e-2


@pytest.mark.parametrize(
    "kwargs",
    [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"padding_free": True},
        {"precompute_ref_log_probs": True},
        {"remove_unused_columns": False},
    ],
    ids=lambda kwargs: "+".join(kwargs),
)
def test_it_is_the_same_loss_however_a_step_is_made(tmp_path, kwargs):
    """SGD, since Adam's first steps make much of little."""
    once, usual = trained_by_sgd(tmp_path, per_device_train_batch_size=4)
    again, other = trained_by_sgd(tmp_path, **kwargs)
    assert distance(usual, other) < 1e-6 and distance(usual, weights(dpo_trainer(tmp_path).model)) > 1e-4
    pairs = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (once, again)]
    assert pairs[0] == pytest.approx(pairs[1], rel=1e-5)


def trained_by_sgd(folder, **kwargs):
    trainer = dpo_trainer(folder, train=soft(), optim="sgd", learning_rate=0.3, beta=1.0, **kwargs)
    trainer.train()
    return trainer, weights(trainer.model)


def test_evaluations_take_labels_as_they_are(tmp_path):
    plain = dpo_trainer(tmp_path, train=ROWS, eval_dataset=ROWS).evaluate()
    found = dpo_trainer(tmp_path, train=soft(), eval_dataset=soft()).evaluate()
    assert found["eval_loss"] == plain["eval_loss"]


@pytest.mark.parametrize(
    ("rows", "kwargs", "message"),
    [
        (soft(p=[0.5] * 11 + [1.5]), {}, r"must be in \[0, 1\], and 1 of 12 rows are not: rows 11 .* has 1.5"),
        (soft(p=[-0.1, math.nan] + [0.5] * 10), {}, r"and 2 of 12 rows are not: rows 0, 1 .* has -0.1"),
        (soft(p=[None] + [0.5] * 11), {}, "and 1 of 12 rows are not: rows 0 .* has nan"),
        (soft(p=[1] * 12), {}, "must be of floats, and is int64: cast it"),
        (soft(p=["0.5"] * 12), {}, "must be of floats, and is string: cast it"),
        (soft().to_iterable_dataset(), {}, "is not for streams"),
        (soft(), {"accelerator_config": {"dispatch_batches": True}}, "nor for `dispatch_batches`"),
        (soft(), {"loss_type": ["apo_zero"]}, "`loss_type` has 'apo_zero': use one of them, or remove the column"),
        (soft(), {"loss_type": ["robust"], "label_smoothing": 0.1}, "and `label_smoothing=0.1` both change the loss"),
        (soft(), {"use_weighting": True}, "and `use_weighting=True` both change the loss"),
        (soft(), {"f_divergence_type": "js_divergence"}, "`f_divergence_type=.*js_divergence.*` both change the loss"),
    ],
)
def test_what_is_no_probability_is_refused_before_training(tmp_path, rows, kwargs, message):
    with pytest.raises(ValueError, match=message):
        dpo_trainer(tmp_path, train=rows, **kwargs)


def test_floats_of_any_size_are_taken(tmp_path):
    trainer = dpo_trainer(tmp_path, train=soft(p=[0.25] * 12).cast_column(PROBABILITY, Value("float16")))
    assert batch_of(trainer)[PROBABILITY].view(torch.float32).tolist() == [0.25] * 4


def test_another_loss_of_the_pairs_takes_the_place_of_their_mean(tmp_path):
    trainer = dpo_trainer(tmp_path, model=make_model(3), ref_model=make_model(0), train=ROWS, beta=0.4)
    model, batch, seen = trainer.model.train(), batch_of(trainer), []

    def largest(values):
        seen.append(values.detach().numpy())
        return values.max()

    usual = trainer.compute_loss(model, dict(batch)).item()
    trainer.pair_loss = largest
    loss = trainer.compute_loss(model, dict(batch))
    assert seen[0].mean() == pytest.approx(usual, rel=1e-6) and loss.item() == pytest.approx(seen[0].max(), rel=1e-6)
    pair = {key: values[[i, i + 4]] for i in [int(np.argmax(seen[0]))] for key, values in batch.items()}
    trainer.pair_loss = None
    alone = torch.autograd.grad(trainer.compute_loss(model, pair), list(model.parameters()))
    for ours, theirs in zip(torch.autograd.grad(loss, list(model.parameters())), alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
