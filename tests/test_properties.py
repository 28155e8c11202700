"""What holds for all inputs: of masks, noise, statistics, and the readers of files that others may damage."""

import io
import json
import math
import shutil
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from prm_hf import PRM, cli
from prm_hf.compare import statistics
from prm_hf.noise import corrupt, flip_preferences
from prm_hf.noise.rng import row_uniforms
from prm_hf.optim import masks
from prm_hf.optim.hyperparameters import ESTIMATORS, MASKS, REDUCTIONS, Hyperparameters
from prm_hf.runs.read import load_runs
from prm_hf.trainers.completeness import last_complete_checkpoint, problems_of

from .compare.compared_runs import write_run
from .optim.reference_prm import ReferenceTensor, mask_of


# The same examples at each run of the tests, and no database of earlier ones.
settings.register_profile(
    "tests",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tests")


# ---- Masks ----

squares = st.floats(1e-12, 1e6)
weights = st.floats(1e-3, 1e3)


@given(
    mask=st.sampled_from(["snr", "soft", "hard"]),
    signal=st.lists(st.just(0.0) | squares, min_size=1, max_size=8),
    noise=squares,
    softness=weights,
    alpha=weights,
)
def test_masks_are_those_of_the_formulas(mask, signal, noise, softness, alpha):
    h = Hyperparameters(mask=mask, softness=softness, alpha=alpha)
    x = torch.tensor(sorted(signal), dtype=torch.float64)
    q = masks.mask_values(x, torch.full_like(x, noise), h)
    np.testing.assert_allclose(q, mask_of(x.numpy(), noise, mask, alpha, softness, h.mask_epsilon), rtol=1e-12)
    assert ((q >= 0) & (q <= 1)).all()
    assert (q.diff() >= 0).all()  # more signal opens the mask
    noisier = masks.mask_values(x, torch.full_like(x, noise * 2), h)
    assert (noisier <= q).all()


@settings(max_examples=40)
@given(
    shape=st.sampled_from([(), (1,), (5,), (1, 4), (3, 1), (4, 3), (2, 3, 2)]),
    scales=st.lists(st.sampled_from([0.0, 1e-7, 1e-3, 1.0, 1e3]), min_size=1, max_size=5),
    mask=st.sampled_from(MASKS),
    reduction=st.sampled_from(REDUCTIONS),
    estimator=st.sampled_from(ESTIMATORS),
    beta1=st.floats(0.0, 0.99),
    beta2=st.floats(0.5, 0.9999),
    variance_beta=st.floats(0.0, 0.999),
    alpha=weights,
    foreach=st.booleans(),
)
def test_steps_are_those_of_a_float64_reference(
    shape, scales, mask, reduction, estimator, beta1, beta2, variance_beta, alpha, foreach
):
    """Also of gradients that are 0 or change by ten orders of magnitude."""
    kwargs = {"mask": mask, "reduction": reduction, "estimator": estimator, "variance_beta": variance_beta}
    kwargs |= {"betas": (beta1, beta2), "alpha": alpha, "weight_decay": 0.1}
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    reference = ReferenceTensor(p.detach().numpy().copy())
    optimizer = PRM([p], lr=1e-2, foreach=foreach, **kwargs)
    for scale in scales:
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        reference.step(p.grad.numpy(), lr=1e-2, **kwargs)
        # A hard mask, and one of a signal that is all but noise, decide on the last bit.
        sure = np.abs(reference.signal - alpha * reference.noise) > 1e-9 * (reference.signal + alpha * reference.noise)
        assume(mask == "none" or bool(np.all(sure | (reference.signal == reference.noise))))
        assume(np.all((reference.signal == 0) | (reference.signal > 1e-6 * reference.noise)))
        optimizer.step()
        assert torch.isfinite(p).all()
        np.testing.assert_allclose(p.detach().numpy(), reference.w, rtol=1e-7, atol=1e-9)


@given(beta1=st.floats(0.0, 0.999), t=st.integers(1, 10_000))
def test_averaging_takes_noise_away(beta1, t):
    kappa = masks.averaging_variance(beta1, t)
    assert (1 - beta1) / (1 + beta1) - 1e-12 <= kappa <= 1 + 1e-12
    assert masks.averaging_variance(beta1, t + 1) <= kappa + 1e-12


# ---- Noise ----

seeds = st.integers(0, 2**63 - 1)
rates = st.floats(0.0, 1.0)


def pairs(n: int) -> Dataset:
    columns = {"prompt": "p", "chosen": "good", "rejected": "bad"}
    return Dataset.from_dict({name: [f"{text}{i}" for i in range(n)] for name, text in columns.items()})


@settings(max_examples=25)
@given(n=st.integers(1, 40), low=rates, high=rates, seed=seeds)
def test_flips_are_marked_and_nested(n, low, high, seed):
    low, high = sorted([low, high])
    clean = pairs(n)
    few, many = (flip_preferences(clean, rate, seed) for rate in (low, high))
    for noisy in (few, many):
        for before, after in zip(clean, noisy, strict=True):
            swapped = {**before, "chosen": before["rejected"], "rejected": before["chosen"]}
            assert {k: after[k] for k in before} == (swapped if after["flipped"] else before)
    assert all(b for a, b in zip(few["flipped"], many["flipped"], strict=True) if a)
    exact = flip_preferences(clean, high, seed, exact=True)
    assert sum(exact["flipped"]) == round(high * n)
    assert (
        flip_preferences(clean.select(range((n + 1) // 2)), high, seed)["flipped"][:]
        == many["flipped"][: (n + 1) // 2]
    )


@settings(max_examples=25)
@given(
    labels=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    rate=rates,
    seed=seeds,
    kind=st.sampled_from(["true_labels", "partial_labels", "random_labels"]),
)
def test_a_row_is_marked_just_where_its_class_changed(labels, rate, seed, kind):
    features = Features({"label": ClassLabel(names=list("abcde")), "x": Value("int64")})
    clean = Dataset.from_dict({"label": labels, "x": list(range(len(labels)))}, features=features)
    noisy = corrupt(clean, kind, 1.0 if kind != "partial_labels" else rate, seed)
    assert noisy["x"][:] == clean["x"][:] and set(noisy["label"]) <= set(range(5))
    assert noisy["corrupted"][:] == [a != b for a, b in zip(clean["label"], noisy["label"], strict=True)]
    if kind == "true_labels":
        assert not any(noisy["corrupted"])


@settings(max_examples=25)
@given(indices=st.lists(st.integers(0, 500), max_size=10), seed=seeds, stream=st.text(max_size=8))
def test_the_number_of_a_row_is_its_own(indices, seed, stream):
    numbers = row_uniforms(seed, indices, stream)
    assert numbers.shape == (len(indices),) and ((numbers >= 0) & (numbers < 1)).all()
    assert numbers.tolist() == [row_uniforms(seed, [i], stream).item() for i in indices]


# ---- Statistics ----

differences = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(st.sampled_from([-1.0, 0.0, 1.0]), min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(values=differences)
def test_intervals_hold_their_mean(values):
    values = np.array(values)
    found = statistics.bootstrap_interval(values, resamples=300)
    assert found.mean == pytest.approx(values.mean())
    if found.known:
        assert found.low <= found.mean + 1e-12 and found.mean <= found.high + 1e-12
        assert 0 <= found.p_value <= 1
        if found.mean:
            assert (found.p_value < 0.05) == (found.low > 0 or found.high < 0) or found.p_value == pytest.approx(0.05)
    turned = statistics.bootstrap_interval(-values, resamples=300)
    assert turned.known == found.known and turned.mean == pytest.approx(-found.mean)


@given(st.lists(st.floats(0, 1) | st.just(math.nan), max_size=12))
def test_adjusted_p_values(p_values):
    adjusted = statistics.holm(p_values)
    known = sorted((p, a) for p, a in zip(p_values, adjusted, strict=True) if not math.isnan(p))
    assert [math.isnan(a) for a in adjusted] == [math.isnan(p) for p in p_values]
    assert all(p <= a <= 1 for p, a in known)
    assert [a for _, a in known] == sorted(a for _, a in known)
    if known:
        assert known[0][1] == pytest.approx(min(1, len(known) * known[0][0]))


curves = st.lists(st.tuples(st.floats(1e-4, 1e2), st.floats(0, 1)), min_size=2, max_size=6, unique_by=lambda x: x[0])


@given(curve=curves, share=st.floats(0, 1))
def test_curves_stay_between_their_points(curve, share):
    kl, heights = (np.array(column) for column in zip(*curve, strict=True))
    at = float(np.clip(math.exp(math.log(kl.min()) * (1 - share) + math.log(kl.max()) * share), kl.min(), kl.max()))
    found = statistics.interpolate_at_kl(kl, heights[:, None], at)
    assert found is not None and heights.min() - 1e-9 <= found.item() <= heights.max() + 1e-9
    assert statistics.interpolate_at_kl(kl, heights[:, None], kl[0]).item() == pytest.approx(heights[0])
    for outside in (kl.min() * 0.9, kl.max() * 1.1, 0.0, math.nan):
        assert statistics.interpolate_at_kl(kl, heights[:, None], outside) is None
    low, high = statistics.shared_range([kl, kl])
    assert (low, high) == (kl.min(), kl.max())
    height = statistics.mean_over_log_kl(kl, np.full((len(kl), 1), 0.25), low, high)
    assert height.item() == pytest.approx(0.25)


@given(
    curve=st.lists(
        st.tuples(st.floats(1e-6, 1), st.floats(1e-4, 1e2)), min_size=2, max_size=6, unique_by=lambda x: x[0]
    )
)
def test_a_rate_is_between_its_neighbours(curve):
    rates, kl = zip(*sorted(curve), strict=True)
    for at in kl:
        found = statistics.rate_at_kl(rates, kl, at)
        assert found is not None and min(rates) * (1 - 1e-9) <= found <= max(rates) * (1 + 1e-9)
    assert statistics.rate_at_kl(rates, kl, max(kl) * 1.01) is None


# ---- Readers ----

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def clean_runs(tmp_path_factory):
    """A run folder of ours beside one of a Trainer, and beside a second run that stays as it is."""
    root = tmp_path_factory.mktemp("clean")
    write_run(root, "adamw", 1e-3, 0, 0.7, 0.2)
    write_run(root, "prm_per_tensor", 1e-3, 0, 0.8, 0.2, mean_q=0.1)
    log = [
        {"step": 1, "loss": 0.7, "learning_rate": 1e-3},
        {"step": 2, "eval_loss": 0.6, "eval_rewards/accuracies": 0.5},
    ]
    (root / "other_lr1e-3_seed1").mkdir()
    state = {"log_history": log, "global_step": 2, "max_steps": 2, "num_train_epochs": 1}
    (root / "other_lr1e-3_seed1" / "trainer_state.json").write_text(json.dumps(state))
    return root


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Any bytes; the beginning of a file; any JSON; or a file in which one value is another one."""
    how = data.draw(st.sampled_from(["bytes", "cut", "json", "value", "value", "value", "deep"]))
    if how == "bytes":
        return data.draw(st.binary(max_size=40))
    if how == "cut":
        return content[: data.draw(st.integers(0, len(content)))]
    if how == "json":
        return json.dumps(data.draw(json_values)).encode()
    if how == "deep":
        return b"[" * 100_000
    lines = content.splitlines()
    i = data.draw(st.integers(0, len(lines) - 1))
    held = json.loads(lines[i])
    held[data.draw(st.sampled_from(sorted(held)))] = data.draw(json_values)
    return b"\n".join([*lines[:i], json.dumps(held).encode(), *lines[i + 1 :]])


@pytest.mark.slow
@settings(max_examples=150)
@given(data=st.data())
def test_a_damaged_run_gives_a_clear_error_or_none(clean_runs, data):
    """What is not read is named, and nothing ends in a traceback, in `load_runs` and at the command line."""
    files = sorted(path.relative_to(clean_runs) for path in clean_runs.glob("*/*"))
    file = data.draw(st.sampled_from(files))
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(clean_runs, root, dirs_exist_ok=True)
        Path(root, file).write_bytes(damaged(Path(root, file).read_bytes(), data))
        try:
            assert len(load_runs(root)) == 3
        except (ValueError, OSError) as error:
            assert file.parts[0] in str(error), error
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.main(["compare", root])
        assert code in (0, 2)
        assert (code == 2) == err.getvalue().startswith("prm-hf compare: error: ")


@pytest.fixture(scope="module")
def clean_checkpoints(tmp_path_factory):
    """Small files of the layouts of one process, with weights in two files, and of DeepSpeed."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in ("checkpoint-1", "checkpoint-2"):
        (root / name / "global_step2").mkdir(parents=True)
        for file in ("scheduler.pt", "rng_state_0.pth", "rng_state_1.pth"):
            torch.save({"a": 1}, root / name / file)
        (root / name / "trainer_state.json").write_text('{"global_step": 2}')
    (root / "checkpoint-1" / "global_step2").rmdir()
    torch.save({"a": torch.ones(3)}, root / "checkpoint-1" / "optimizer.pt")
    save_file({"a": torch.ones(3)}, root / "checkpoint-1" / "model-1.safetensors")
    (root / "checkpoint-1" / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-1.safetensors"}}')
    for file in (
        "mp_rank_00_model_states",
        "zero_pp_rank_0_mp_rank_00_optim_states",
        "zero_pp_rank_1_mp_rank_00_optim_states",
    ):
        torch.save({"a": torch.ones(3)}, root / "checkpoint-2" / "global_step2" / f"{file}.pt")
    (root / "checkpoint-2" / "latest").write_text("global_step2")
    assert problems_of(root / "checkpoint-1") == problems_of(root / "checkpoint-2") == []
    return root


@given(data=st.data(), how=st.sampled_from(["bytes", "cut", "json", "name"]))
def test_any_bytes_in_a_checkpoint_are_judged(clean_checkpoints, data, how):
    """And the checkpoint that has them, unless it is complete with them, is not the one to go on from."""
    files = sorted(path.relative_to(clean_checkpoints) for path in clean_checkpoints.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files))
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(clean_checkpoints, root, dirs_exist_ok=True)
        content = Path(root, file).read_bytes()
        content = {
            "bytes": lambda: data.draw(st.binary(max_size=40)),
            "cut": lambda: content[: data.draw(st.integers(0, len(content) - 1))],
            "json": lambda: json.dumps(data.draw(json_values)).encode(
                "utf-16" if data.draw(st.booleans()) else "utf-8"
            ),
            "name": lambda: data.draw(st.text(max_size=400)).encode(errors="replace"),
        }[how]()
        Path(root, file).write_bytes(content)
        problems = problems_of(Path(root, file.parts[0]))
        assert all(isinstance(problem, str) for problem in problems)
        if how == "cut":
            assert problems
        other = {"checkpoint-1": "checkpoint-2", "checkpoint-2": "checkpoint-1"}[file.parts[0]]
        expected = "checkpoint-2" if not problems else other
        assert last_complete_checkpoint(root) == Path(root, expected)
