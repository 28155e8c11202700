"""The controls of a comparison: their optimizers against their definitions, and all of them as runs, also resumed."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from prm_hf import PRM, PopulationRiskStoppingCallback
from prm_hf.compare import compare_runs
from prm_hf.demo import build_demo
from prm_hf.experiments import controls as methods
from prm_hf.experiments import dpo as dpo_noisy
from prm_hf.experiments import runner as comparison


def read(path):
    return json.loads(Path(path).read_text(encoding="utf-8"))


def tensors(seed=0, shapes=((3, 4), (5,), (2, 2), (7,))):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def feed(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=generator) + i  # so that tensors differ in their signal


def test_shuffled_masks_are_the_same_masks_elsewhere():
    params = tensors()
    groups = PRM([{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}], lr=0.1, reduction="per_tensor")
    shuffled = methods.ShuffledPRM(groups.param_groups, seed=3)
    plain = PRM([p.detach().clone().requires_grad_() for p in params], lr=0.1, reduction="per_tensor")
    assert [g["weight_decay"] for g in shuffled.param_groups] == [0.01, 0.0] and not shuffled.param_groups[0]["fused"]
    orders = set()
    for step in range(1, 6):
        before = [p.detach().clone() for p in params]
        decay = [0.01, 0.01, 0.0, 0.0]
        feed(params, step)
        for p, q in zip(params, plain.param_groups[0]["params"], strict=True):
            q.grad = p.grad.clone()  # the same gradients, so the same state and the same masks before they are dealt
        shuffled.step()
        plain.step()
        masks = [q for group in plain.get_tensor_masks() for q in group]
        dealt = []
        for p, old, wd in zip(params, before, decay, strict=True):
            state = shuffled.state[p]
            adam = state["exp_avg"] / (1 - 0.9**step) / ((state["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8)
            ratio = (old * (1 - 0.1 * wd) - p.detach()) / (0.1 * adam)
            assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-3)
            dealt.append(ratio.median().item())
        assert sorted(dealt) == pytest.approx(sorted(masks), rel=1e-3)
        orders.add(tuple(sorted(range(4), key=dealt.__getitem__)))
        tables = [q for group in shuffled.get_tensor_masks() for q in group]
        assert tables == pytest.approx(masks)  # the state's, as they were before they were dealt
    assert len(orders) > 1


def test_shuffling_goes_on_where_it_stopped():
    """The order is that of the step, not of the calls: a resumed run shuffles as an uninterrupted one."""
    ends = []
    for interrupted in (False, True):
        params = tensors()
        optimizer = methods.ShuffledPRM(PRM(params, lr=0.1, reduction="per_tensor").param_groups, seed=1)
        for step in range(1, 7):
            if interrupted and step == 4:
                saved = optimizer.state_dict()
                optimizer = methods.ShuffledPRM(PRM(params, lr=0.1, reduction="per_tensor").param_groups, seed=1)
                optimizer.load_state_dict(saved)
            feed(params, step)
            optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(*ends)


def test_tensor_masks_are_those_of_the_statistics():
    for reduction in ("per_tensor", "per_param"):
        params = tensors()
        optimizer = PRM([{"params": params[:1]}, {"params": params[1:]}], reduction=reduction, estimator="debiased")
        assert optimizer.get_tensor_masks() == [[], []]
        for step in range(3):
            feed(params, step)
            params[3].grad = None
            optimizer.step()
        masks = optimizer.get_tensor_masks()
        assert [len(group) for group in masks] == [1, 2]
        sizes = [12, 5, 4]
        mean = sum(q * n for q, n in zip(masks[0] + masks[1], sizes, strict=True)) / sum(sizes)
        assert mean == pytest.approx(optimizer.get_mask_stats()["mean_q"])


def test_scaled_learning_rates_leave_the_decay():
    params = tensors()
    groups = [{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    methods.scale_learning_rates(optimizer, {params[0]: 0.5, params[3]: 0.0})
    found = {id(p): (g["lr"], g["lr"] * g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    expected = [(0.005, 0.001), (0.01, 0.001), (0.01, 0.0), (0.0, 0.0)]
    assert [found[id(p)] for p in params] == [pytest.approx(pair) for pair in expected]


@pytest.mark.parametrize("steps", [1, 5])
def test_cautious_is_adamw_where_update_and_gradient_agree(steps):
    """Liang et al., arXiv 2411.16085: the update's entries that go against the gradient are dropped."""
    pytorch_optimizer = pytest.importorskip("pytorch_optimizer")
    (p,), settings = tensors(shapes=((20,),)), {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    optimizer = pytorch_optimizer.AdamP([p], delta=0.0, cautious=True, foreach=True, weight_decay=0.0, **settings)
    m = v = torch.zeros(20)
    for t in range(1, steps + 1):
        old = p.detach().clone()
        feed([p], t)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * p.grad, 0.999 * v + 0.001 * p.grad**2
        agree = (m * p.grad > 0).float()
        update = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8) * agree * 20 / (agree.sum() + 1)
        assert torch.allclose(old - p.detach(), 0.1 * update, rtol=1e-3, atol=1e-6)


ALONE = ["adamw_eps:0.3", "adamw_embedding:3", "cautious", "msvag", "early_stopping", "prm_stopping"]
ALONE += ["prm_rows", "prm_rows_eps:10"]
TOGETHER = ["adamw", "prm_debiased", *methods.CONTROLS]
COMPARED = [
    *["--methods", *TOGETHER, "--seeds", "0", "1"],
    *["--learning_rates", "1e-5", "1e-2", "--prm_learning_rates", "1e-3", "3e-3"],
]


def run(folder, output_dir, *more):
    dpo_noisy.main(
        [
            *["--output_dir", str(output_dir), "--model_name_or_path", build_demo().model_path],
            *["--dataset_name", str(folder / "train.jsonl"), "--eval_dataset_name", str(folder / "test.jsonl")],
            *["--dataset_test_split", "train", "--per_device_train_batch_size", "4", "--max_length", "64"],
            *["--max_steps", "4", "--logging_steps", "1", "--eval_strategy", "no", "--weight_decay", "0"],
            *["--save_strategy", "steps", "--save_steps", "2", "--use_cpu", "--bf16", "False"],
            *["--gradient_checkpointing", "False", "--lr_scheduler_type", "constant", *more],
        ]
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    demo = build_demo()
    for name, n in (("train", 40), ("test", 24)):
        getattr(demo, name).select(range(n)).to_json(folder / f"{name}.jsonl")
    run(folder, folder / "runs", "--methods", *ALONE, "--learning_rates", "1e-2", "--prm_learning_rates", "3e-3")
    run(folder, folder / "runs", *COMPARED)
    return folder


def infos(finished):
    return {path.parent.name: read(path) for path in (finished / "runs").glob("*/run.json")}


def test_every_method_runs(finished):
    found = infos(finished)
    counts = {}
    for info in found.values():
        counts[info["method"]] = counts.get(info["method"], 0) + 1
    assert counts == {"adamw": 4, "prm_debiased": 4, **dict.fromkeys(methods.CONTROLS, 2), **dict.fromkeys(ALONE, 1)}
    assert all((finished / "runs" / name / "metrics.json").is_file() for name in found)
    comparison = compare_runs(finished / "runs")
    assert {row.source.method for row in comparison.methods("control")["shuffled_q"]} == {"prm_debiased"}
    assert len({row.method for row in comparison.rows}) == len(ALONE) + len(TOGETHER)


def test_the_optimizer_in_effect_is_on_record(finished):
    found = infos(finished)
    n = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(build_demo().model_path).parameters())
    optimizer = {name: info["optimizer"] for name, info in found.items()}
    scale = 1.0 / n**0.5  # gradients are clipped to the norm 1
    eps = optimizer["adamw_eps0.3_lr0.01_seed0"]
    assert eps == {"class": "AdamW", "learning_rate": pytest.approx(0.013), "eps": pytest.approx(0.3 * scale)}
    embedding = optimizer["adamw_embedding3_lr0.01_seed0"]
    assert (embedding["learning_rate"], embedding["smallest_learning_rate"]) == (pytest.approx(0.03), 0.01)
    assert optimizer["cautious_lr0.01_seed0"]["class"] == "AdamP"
    assert optimizer["msvag_lr0.01_seed0"]["learning_rate"] == pytest.approx(0.01 / scale)
    assert optimizer["adamw_lr0.01_seed0"]["class"] == "AdamW"
    for name, eps in (("prm_rows", None), ("prm_rows_eps10", 10 * scale)):
        info = next(info for key, info in found.items() if key.startswith(f"{name}_lr"))
        settings = {"prm_reduction": "per_row", "prm_estimator": "debiased", "prm_signal_beta": 0.98}
        assert info["settings"] | settings == info["settings"] and info["optimizer"]["class"] == "PRM"
        assert info["optimizer"]["eps"] == pytest.approx(eps or 1e-8)
    shuffled = next(info for info in found.values() if info["method"] == "shuffled_q")
    assert shuffled["optimizer"]["class"] == "ShuffledPRM" and shuffled["settings"]["prm_estimator"] == "debiased"


def test_controls_take_from_their_run(finished):
    found, runs = infos(finished), finished / "runs"
    for info in found.values():
        method, seed = info["method"], info["seed"]
        if method not in methods.CONTROLS:
            continue
        detail = info["settings"][method]
        source = found[detail["of"]]
        assert source["seed"] == seed and source["method"] == "prm_debiased"
        if method == "adamw_matched":
            kl = read(runs / detail["of"] / "metrics.json")["drift/kl"]
            assert detail["kl"] == kl and 1e-5 < info["learning_rate"] < 1e-2
        if method == "fixed_q":
            assert found[detail["masks_of"]]["seed"] == 1 - seed
            masks = methods.mean_masks(runs / detail["masks_of"])
            largest, smallest = max(masks.values()), min(masks.values())
            assert info["optimizer"]["learning_rate"] == pytest.approx(info["learning_rate"] * largest)
            assert info["optimizer"]["smallest_learning_rate"] == pytest.approx(info["learning_rate"] * smallest)
            assert largest > smallest


@pytest.mark.slow
def test_an_eps_goes_with_the_controls(finished, tmp_path):
    """The controls of PRM with a larger eps are AdamW and PRM with that eps; AdamW at the KL lies on its curve."""
    methods_of = ["--methods", "adamw_eps:10", "prm_debiased_eps:10", *methods.CONTROLS, "--seeds", "0", "1"]
    run(finished, tmp_path, *methods_of, "--learning_rates", "1e-6", "1e-2", "--prm_learning_rates", "1e-3", "3e-3")
    found = {path.parent.name: read(path) for path in tmp_path.glob("*/run.json")}
    of = {control: [i for i in found.values() if i["method"] == control] for control in methods.CONTROLS}
    assert {control: len(infos) for control, infos in of.items()} == dict.fromkeys(methods.CONTROLS, 2)
    source = found[of["constant_q"][0]["settings"]["constant_q"]["of"]]
    assert source["method"] == "prm_debiased_eps:10" and source["optimizer"]["class"] == "PRM"
    assert source["settings"]["prm_estimator"] == "debiased" and source["settings"]["prm_reduction"] == "per_tensor"
    n = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(build_demo().model_path).parameters())
    classes = {"ShuffledPRM": 2, "PRM": 4, "AdamW": 4 + 6}
    for info in found.values():
        optimizer = info["optimizer"]
        classes[optimizer["class"]] -= 1
        assert optimizer["eps"] == pytest.approx(10 / n**0.5), info["name"]
        if info["method"] != "fixed_q":
            assert optimizer["learning_rate"] == pytest.approx(11 * info["learning_rate"]), info["name"]
    assert set(classes.values()) == {0}
    for info in of["fixed_q"]:
        masks = methods.mean_masks(tmp_path / info["settings"]["fixed_q"]["masks_of"])
        assert info["optimizer"]["learning_rate"] == pytest.approx(11 * info["learning_rate"] * max(masks.values()))
    for info in of["adamw_matched"]:
        ends = sorted(
            (i["learning_rate"], read(tmp_path / name / "metrics.json")["drift/kl"])
            for name, i in found.items()
            if i["method"] == "adamw_eps:10" and i["seed"] == info["seed"]
        )
        rate = comparison.rate_at_kl(*zip(*ends, strict=True), info["settings"]["adamw_matched"]["kl"])
        assert info["learning_rate"] == pytest.approx(rate)


def test_stopping_by_the_ratio_is_a_method(finished, tmp_path, monkeypatch):
    """40 pairs, 4 a step and a threshold that every ratio is below: one epoch of 10 steps and no more."""
    monkeypatch.setattr(comparison, "PopulationRiskStoppingCallback", lambda: PopulationRiskStoppingCallback(1e9))
    longer = ["--max_steps", "-1", "--num_train_epochs", "3", "--prm_learning_rates", "3e-3"]
    run(finished, tmp_path, "--methods", "prm_stopping", "prm_debiased", "--learning_rates", "1e-2", *longer)
    steps = {path.parent.name.split("_lr")[0]: read(path)["steps"] for path in tmp_path.glob("*/metrics.json")}
    assert steps == {"prm_stopping": 10, "prm_debiased": 30}


def test_early_stopping_keeps_the_best_evaluation(finished):
    runs = finished / "runs"
    folder = runs / "early_stopping_lr0.01_seed0"
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["validation/loss"] for row in history if "validation/loss" in row}
    assert sorted(losses) == [1, 2, 3, 4]
    metrics, best = read(folder / "metrics.json"), read(folder / "best.json")
    assert metrics["steps"] == min(losses, key=losses.get) and best["loss"] == min(losses.values())
    (evaluated,) = (r for r in history if r["step"] == metrics["steps"] and "drift/kl" in r)
    assert metrics["drift/kl"] == evaluated["drift/kl"]
    assert sum(x > 0 for x in read(folder / "margins.json")["heldout"]) == round(24 * metrics["rewards/accuracies"])
    assert len(read(folder / "margins.json")["train"]) == 36  # a tenth of the pairs is not trained on


def test_early_stopping_on_clean_labels_holds_out_the_same_pairs(tmp_path, monkeypatch):
    """Both keep the same rows from training; only the labels that the weights are chosen by differ."""
    kept = {}

    class KeepBest(dpo_noisy.KeepBest):
        def __init__(self, trainer, rows, folder):
            kept[folder.name.split("_lr")[0]] = rows, trainer.train_dataset
            super().__init__(trainer, rows, folder)

    monkeypatch.setattr(dpo_noisy, "KeepBest", KeepBest)
    rates = ["--learning_rates", "1e-3", "--prm_learning_rates", "1e-3"]
    short = ["--max_steps", "1", *rates, "--output_dir", str(tmp_path), "--noise_rate", "0.4"]
    dpo_noisy.main(["--methods", *dpo_noisy.EARLY_STOPPING, *short])
    (noisy, trained), (clean, trained_too) = (kept[name] for name in dpo_noisy.EARLY_STOPPING)
    assert noisy["prompt_ids"][:] == clean["prompt_ids"][:] and trained[:] == trained_too[:]
    assert len(clean) * 9 == pytest.approx(len(trained), abs=9)
    flips = [a != b for a, b in zip(noisy["chosen_ids"][:], clean["chosen_ids"][:], strict=True)]
    assert flips == noisy["flipped"][:] and 0 < sum(flips) < len(flips)


@pytest.mark.slow
def test_interrupted_runs_go_on(finished, tmp_path):
    """Each method from its checkpoint of step 2 ends where it had ended."""
    runs, expected = tmp_path / "runs", {}
    shutil.copytree(finished / "runs", runs)
    resumed = [*ALONE, "prm_debiased", "shuffled_q", "fixed_q"]
    for name, info in infos(finished).items():
        if info["seed"] == 0 and info["method"] in resumed:
            expected[name] = (read(runs / name / "metrics.json"), read(runs / name / "margins.json"))
            (runs / name / "metrics.json").unlink()
            shutil.rmtree(runs / name / "checkpoint-4")
    assert len(expected) == 12  # two of prm_debiased
    checkpoints = {name: (runs / name / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns for name in expected}
    run(finished, runs, "--methods", *ALONE, "--learning_rates", "1e-2", "--prm_learning_rates", "3e-3")
    run(finished, runs, *COMPARED)
    for name, (metrics, margins) in expected.items():
        # written before, so the run did not start anew
        assert (runs / name / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns == checkpoints[name]
        found = read(runs / name / "metrics.json")
        for key in ("drift/kl", "rewards/accuracies", "steps"):
            assert found[key] == pytest.approx(metrics[key], rel=1e-6), (name, key)
        assert read(runs / name / "margins.json")["heldout"] == pytest.approx(margins["heldout"], abs=2e-6), name


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["adamw:3"], "'adamw' takes no value, got 'adamw:3'"),
        (["adamw_eps"], "'adamw_eps' needs a positive number behind a colon: eps, relative"),
        (["adamw_embedding:-1"], "needs a positive number .* got 'adamw_embedding:-1'"),
        (["adamw", "shuffled_q"], "`shuffled_q` takes something from a PRM run"),
        (["adamw", "prm_per_param", "fixed_q"], "`fixed_q` is about the masks of tensors"),
        (["prm_debiased", "fixed_q"], r"takes the masks of another seed: give two `seeds` or more, got \[0\]"),
        (["prm_stopping", "constant_q"], "`constant_q` takes something from a PRM run"),
        (["prm_debiased", "adamw_matched"], "lies between runs of AdamW with the same eps: add `adamw` to"),
        (["adamw", "prm_debiased_eps:3", "adamw_matched"], "of `prm_debiased_eps:3` lies .* add `adamw_eps:3` to"),
        (["prm_debiased_eps"], "'prm_debiased_eps' needs a positive number behind a colon"),
        (["prm_rows_eps"], "'prm_rows_eps' needs a positive number behind a colon"),
        (["adamw", "prm_rows", "fixed_q"], "`fixed_q` is about the masks of tensors"),
        (["prm_debiased_eps:3", "--max_grad_norm", "0"], "`prm_debiased_eps` is scaled by the clipped gradient"),
        (["msvag", "--max_grad_norm", "0"], "`msvag` is scaled by the clipped gradient: set `max_grad_norm`"),
    ],
)
def test_wrong_methods_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo_noisy.parse(["--methods", *arguments])


def test_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r'`cautious` needs pytorch-optimizer: pip install "prm-hf\[controls\]"'):
        methods._pytorch_optimizer("cautious")


def test_masks_that_were_not_recorded_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no masks.jsonl"):
        methods.mean_masks(tmp_path)
