"""Every method and every control as a run: what each trains with and takes from other runs, and resumed."""

import re
import shutil

import pytest
from transformers import AutoModelForCausalLM

from prm_hf import PopulationRiskStoppingCallback
from prm_hf.compare import compare_runs, rate_at_kl
from prm_hf.demo import build_demo
from prm_hf.experiments import dpo, grid
from prm_hf.experiments.controls import mean_masks
from prm_hf.runs.methods import METHODS

from .comparisons import folder_of, infos, read, read_lines, run_dpo_on_files, write_pairs


pytestmark = pytest.mark.slow

CONTROLS = [name for name, method in METHODS.items() if method.group == "control"]
ALONE = ["adamw_eps:0.3", "adamw_embedding:3", "cautious", "msvag", "sven", "early_stopping", "prm_stopping"]
ALONE += [
    "prm_rows",
    "prm_rows_eps:10",
    "prm_robust",
    "casmo",
    "interpolate:0.5",
    "beta:0.3",
    "trimmed:0.3",
    "drdpo:1",
]
TOGETHER = ["adamw", "prm_debiased", *CONTROLS]
RATE = ["--learning_rates", "1e-2", "--prm_learning_rates", "3e-3"]
COMPARED = [
    *["--methods", *TOGETHER, "--seeds", "0", "1"],
    *["--learning_rates", "1e-5", "1e-2", "--prm_learning_rates", "1e-3", "3e-3"],
]


@pytest.fixture(scope="module")
def finished(pairs, tmp_path_factory):
    """The folder of a run of each method and of each control. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("methods")
    run_dpo_on_files(pairs, folder, "--methods", *ALONE, *RATE)
    run_dpo_on_files(pairs, folder, *COMPARED)
    return folder


def number_of_parameters():
    return sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(build_demo().model_path).parameters())


def test_every_method_runs(finished):
    found = infos(finished)
    counts = {}
    for info in found.values():
        counts[info["method"]] = counts.get(info["method"], 0) + 1
    assert counts == {"adamw": 4, "prm_debiased": 4, **dict.fromkeys(CONTROLS, 2), **dict.fromkeys(ALONE, 1)}
    assert all((finished / name / "metrics.json").is_file() for name in found)
    comparison = compare_runs(finished)
    assert {row.source.method for row in comparison.methods("control")["shuffled_q"]} == {"prm_debiased"}
    assert len({row.method for row in comparison.rows}) == len(ALONE) + len(TOGETHER)


def test_the_optimizer_in_effect_is_on_record(finished):
    found = infos(finished)
    n = number_of_parameters()
    optimizer = {name: info["optimizer"] for name, info in found.items()}
    scale = 1.0 / n**0.5  # gradients are clipped to the norm 1
    optimizer = {re.sub("_[0-9a-f]{8}$", "", name): of for name, of in optimizer.items()}
    eps = optimizer["adamw_eps0.3_lr0.01_seed0"]
    assert eps == {"class": "AdamW", "learning_rate": pytest.approx(0.013), "eps": pytest.approx(0.3 * scale)}
    embedding = optimizer["adamw_embedding3_lr0.01_seed0"]
    assert (embedding["learning_rate"], embedding["smallest_learning_rate"]) == (pytest.approx(0.03), 0.01)
    assert optimizer["cautious_lr0.01_seed0"]["class"] == "AdamP"
    assert optimizer["msvag_lr0.01_seed0"]["learning_rate"] == pytest.approx(0.01 / scale)
    assert optimizer["sven_lr0.01_seed0"] == {"class": "SGD", "learning_rate": pytest.approx(0.01 / scale)}
    assert optimizer["adamw_lr0.01_seed0"]["class"] == "AdamW" and optimizer["casmo_lr0.01_seed0"]["class"] == "CASMO"
    for name, eps in (("prm_rows", None), ("prm_rows_eps10", 10 * scale)):
        info = next(info for key, info in found.items() if key.startswith(f"{name}_lr"))
        settings = {"prm_reduction": "per_row", "prm_estimator": "debiased", "prm_signal_beta": 0.98}
        assert info["settings"] | settings == info["settings"] and info["optimizer"]["class"] == "PRM"
        assert info["optimizer"]["eps"] == pytest.approx(eps or 1e-8)
    shuffled = next(info for info in found.values() if info["method"] == "shuffled_q")
    assert shuffled["optimizer"]["class"] == "ShuffledPRM" and shuffled["settings"]["prm_estimator"] == "debiased"


def test_a_part_of_the_way_is_nearer_to_the_start(finished):
    """Of the two runs, which train alike, the history is the same; the metrics are of other weights."""
    half, adamw = (folder_of(finished, f"{name}_lr0.01_seed0") for name in ("interpolate0.5", "adamw"))
    ends = [read(folder / "metrics.json")["drift/params_rel"] for folder in (half, adamw)]
    assert ends[0] == pytest.approx(ends[1] / 2, rel=1e-3)
    assert read(half / "margins.json")["heldout"] != read(adamw / "margins.json")["heldout"]
    losses = [[x["train/loss"] for x in read_lines(y / "history.jsonl") if "train/loss" in x] for y in (half, adamw)]
    assert losses[0] == losses[1]


def test_controls_take_from_their_run(finished):
    found = infos(finished)
    for info in found.values():
        method, seed = info["method"], info["seed"]
        if method not in CONTROLS:
            continue
        detail = info["settings"][method]
        source = found[detail["of"]]
        assert source["seed"] == seed and source["method"] == "prm_debiased"
        if method == "constant_q":
            assert 0 < detail["mean_q"] < 1
            assert info["learning_rate"] == pytest.approx(source["learning_rate"] * detail["mean_q"])
        if method == "adamw_matched":
            kl = read(finished / detail["of"] / "metrics.json")["drift/kl"]
            assert detail["kl"] == kl and 1e-5 < info["learning_rate"] < 1e-2
        if method == "fixed_q":
            assert found[detail["masks_of"]]["seed"] == 1 - seed
            masks = mean_masks(finished / detail["masks_of"])
            largest, smallest = max(masks.values()), min(masks.values())
            assert info["optimizer"]["learning_rate"] == pytest.approx(info["learning_rate"] * largest)
            assert info["optimizer"]["smallest_learning_rate"] == pytest.approx(info["learning_rate"] * smallest)
            assert largest > smallest


@pytest.mark.slow
def test_an_eps_goes_with_the_controls(pairs, tmp_path):
    """The controls of PRM with a larger eps are AdamW and PRM with that eps; AdamW at the KL lies on its curve."""
    methods = ["--methods", "adamw_eps:10", "prm_debiased_eps:10", *CONTROLS, "--seeds", "0", "1"]
    rates = ["--learning_rates", "1e-6", "1e-2", "--prm_learning_rates", "1e-3", "3e-3"]
    run_dpo_on_files(pairs, tmp_path, *methods, *rates)
    found = {path.parent.name: read(path) for path in tmp_path.glob("*/run.json")}
    of = {control: [i for i in found.values() if i["method"] == control] for control in CONTROLS}
    assert {control: len(infos) for control, infos in of.items()} == dict.fromkeys(CONTROLS, 2)
    source = found[of["constant_q"][0]["settings"]["constant_q"]["of"]]
    assert source["method"] == "prm_debiased_eps:10" and source["optimizer"]["class"] == "PRM"
    assert source["settings"]["prm_estimator"] == "debiased" and source["settings"]["prm_reduction"] == "per_tensor"
    n = number_of_parameters()
    classes = {"ShuffledPRM": 2, "PRM": 4, "AdamW": 4 + 6}
    for info in found.values():
        optimizer = info["optimizer"]
        classes[optimizer["class"]] -= 1
        assert optimizer["eps"] == pytest.approx(10 / n**0.5), info["name"]
        if info["method"] != "fixed_q":
            assert optimizer["learning_rate"] == pytest.approx(11 * info["learning_rate"]), info["name"]
    assert set(classes.values()) == {0}
    for info in of["fixed_q"]:
        masks = mean_masks(tmp_path / info["settings"]["fixed_q"]["masks_of"])
        assert info["optimizer"]["learning_rate"] == pytest.approx(11 * info["learning_rate"] * max(masks.values()))
    for info in of["adamw_matched"]:
        ends = sorted(
            (i["learning_rate"], read(tmp_path / name / "metrics.json")["drift/kl"])
            for name, i in found.items()
            if i["method"] == "adamw_eps:10" and i["seed"] == info["seed"]
        )
        rate = rate_at_kl(*zip(*ends, strict=True), info["settings"]["adamw_matched"]["kl"])
        assert info["learning_rate"] == pytest.approx(rate)


def test_stopping_by_the_ratio_is_a_method(pairs, tmp_path, monkeypatch, no_pictures):
    """40 pairs, 8 a step and a threshold that every ratio is below: one epoch of 5 steps and no more."""
    monkeypatch.setattr(grid, "PopulationRiskStoppingCallback", lambda: PopulationRiskStoppingCallback(1e9))
    longer = ["--max_steps", "-1", "--num_train_epochs", "2", "--per_device_train_batch_size", "8"]
    run_dpo_on_files(pairs, tmp_path, "--methods", "prm_stopping", "prm_debiased", *RATE, *longer)
    steps = {path.parent.name.split("_lr")[0]: read(path)["steps"] for path in tmp_path.glob("*/metrics.json")}
    assert steps == {"prm_stopping": 5, "prm_debiased": 10}


def test_early_stopping_keeps_the_best_evaluation(finished):
    folder = folder_of(finished, "early_stopping_lr0.01_seed0")
    history = read_lines(folder / "history.jsonl")
    losses = {row["step"]: row["validation/loss"] for row in history if "validation/loss" in row}
    assert sorted(losses) == [1, 2, 3, 4]
    metrics, best = read(folder / "metrics.json"), read(folder / "best.json")
    assert metrics["steps"] == min(losses, key=losses.get) and best["loss"] == min(losses.values())
    (evaluated,) = (r for r in history if r["step"] == metrics["steps"] and "drift/kl" in r)
    assert metrics["drift/kl"] == evaluated["drift/kl"]
    assert sum(x > 0 for x in read(folder / "margins.json")["heldout"]) == round(24 * metrics["rewards/accuracies"])
    assert len(read(folder / "margins.json")["train"]) == 36  # a tenth of the pairs is not trained on


def test_early_stopping_on_clean_labels_holds_out_the_same_pairs(tmp_path, monkeypatch, no_pictures):
    """Both keep the same rows from training; only the labels that the weights are chosen by differ."""
    kept = {}

    class KeepBest(dpo.KeepBest):
        def __init__(self, trainer, rows, folder):
            kept[folder.name.split("_lr")[0]] = rows, trainer.train_dataset
            super().__init__(trainer, rows, folder)

    monkeypatch.setattr(dpo, "KeepBest", KeepBest)
    write_pairs(tmp_path, train=120, test=8)
    short = ["--max_steps", "1", "--noise_rate", "0.4"]
    run_dpo_on_files(tmp_path, tmp_path / "runs", "--methods", *dpo.EARLY_STOPPING, *RATE, *short)
    (noisy, trained), (clean, trained_too) = (kept[name] for name in dpo.EARLY_STOPPING)
    assert noisy["prompt_ids"][:] == clean["prompt_ids"][:] and trained[:] == trained_too[:]
    assert (len(clean), len(trained)) == (12, 108)
    flips = [a != b for a, b in zip(noisy["chosen_ids"][:], clean["chosen_ids"][:], strict=True)]
    assert flips == noisy["flipped"][:] and 0 < sum(flips) < len(flips)


@pytest.mark.slow
def test_interrupted_runs_go_on(pairs, finished, tmp_path):
    """Each method from its checkpoint of step 2 ends where it had ended."""
    runs, expected = tmp_path / "runs", {}
    shutil.copytree(finished, runs)
    resumed = [*ALONE, "prm_debiased", "shuffled_q", "fixed_q"]
    for name, info in infos(finished).items():
        if info["seed"] == 0 and info["method"] in resumed:
            expected[name] = (read(runs / name / "metrics.json"), read(runs / name / "margins.json"))
            (runs / name / "metrics.json").unlink()
            shutil.rmtree(runs / name / "checkpoint-4")
    assert len(expected) == len(ALONE) + 4  # two of prm_debiased
    checkpoints = {name: (runs / name / "checkpoint-2" / "trainer_state.json").stat().st_mtime_ns for name in expected}
    run_dpo_on_files(pairs, runs, "--methods", *ALONE, *RATE)
    run_dpo_on_files(pairs, runs, *COMPARED)
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
        (
            ["prm_debiased", "fixed_q", "--seeds", "0"],
            r"masks of another seed: give two `seeds` or more, got \[0\]",
        ),
        (
            ["adamw_eps:10", "adamw_clean"],
            "says what wrong labels cost `adamw`: add `adamw` to `methods`",
        ),
        (["prm_stopping", "constant_q"], "`constant_q` takes something from a PRM run"),
        (["prm_debiased", "adamw_matched"], "lies between runs of AdamW with the same eps: add `adamw` to"),
        (["adamw", "prm_debiased_eps:3", "adamw_matched"], "of `prm_debiased_eps:3` lies .* add `adamw_eps:3` to"),
        (["prm_debiased_eps"], "'prm_debiased_eps' needs a positive number behind a colon"),
        (["prm_rows_eps"], "'prm_rows_eps' needs a positive number behind a colon"),
        (["adamw", "prm_rows", "fixed_q"], "`fixed_q` is about the masks of tensors"),
        (["prm_debiased_eps:3", "--max_grad_norm", "0"], "`prm_debiased_eps` is scaled by the clipped gradient"),
        (["sven", "--max_grad_norm", "0"], "`sven` is scaled by the clipped gradient: set `max_grad_norm`"),
        (["msvag", "--max_grad_norm", "0"], "`msvag` is scaled by the clipped gradient: set `max_grad_norm`"),
    ],
)
def test_wrong_methods_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        dpo.DPOExperiment.parse(["--methods", *arguments])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--padding_free"], "`sven` of `methods`: Sven needs one sequence a row"),
        (["--loss_type", "aot"], "`sven` of `methods`: The loss of a pair in `loss_type='aot'` depends"),
    ],
)
def test_losses_that_sven_cannot_take_are_named(arguments, message, no_pictures, tmp_path):
    """Before a model is loaded."""
    with pytest.raises(ValueError, match=message):
        dpo.main(["--methods", "sven", "--output_dir", str(tmp_path / "runs"), *arguments])
