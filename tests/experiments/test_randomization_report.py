"""What the report of the randomization tests says of runs whose numbers are known."""

import json

import pytest

from prm_hf.compare import load_runs
from prm_hf.experiments import randomization_report as report


LABELS = ("true_labels", "partial_labels", "random_labels")


def write_run(folder, kind, method, points, model="vit", seed=0, max_steps=100):
    """A run folder of points (step, train fit, clean fit, corrupted fit, held-out fit)."""
    folder = folder / model / kind / f"{method}_lr1e-3_seed{seed}"
    folder.mkdir(parents=True)
    settings = {"model": model, "kind": kind, "p": 0.3, "heldout_rows": 100, "eval_steps": 2}
    info = {"schema": 1, "name": folder.name, "method": method, "learning_rate": 1e-3, "seed": seed}
    (folder / "run.json").write_text(json.dumps({**info, "task": "randomization", "settings": settings}))
    names = ("train_fit", "clean_fit", "corrupted_fit", "heldout_fit")
    rows = [{"step": s, **{f"memorization/{n}": v for n, v in zip(names, fits, strict=True)}} for s, *fits in points]
    (folder / "history.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = {**rows[-1], "steps": rows[-1].pop("step"), "chance": 0.1, "corrupted_rows": 100}
    fitted = [point[0] for point in points if point[1] >= 0.99]
    (folder / "metrics.json").write_text(json.dumps(metrics | ({"steps_to_fit": fitted[0]} if fitted else {})))


def write_method(folder, method, steps, corrupted, heldout_random=0.1, **run):
    """Runs that fit true, partly random and random labels in `steps`, None for never, and that have fitted a share
    `corrupted` of the corrupted rows when 90 % of the clean ones are fitted."""
    for kind, step in zip(LABELS, steps, strict=True):
        heldout = heldout_random if kind == "random_labels" else 0.8
        # The clean fit reaches .9 halfway between two measurements
        points = [(0, 0.1, 0.1, 0.1, 0.1), (2, 0.5, 0.8, corrupted - 0.1, 0.6), (4, 0.6, 1.0, corrupted + 0.1, 0.7)]
        last = (step, 1.0, 1.0, 1.0, heldout) if step else (100, 0.7, 1.0, 0.7, heldout)
        write_run(folder, kind, method, [*points, last], **run)


def read(folder):
    return report.grouped(load_runs(folder))


def test_the_known_results(tmp_path):
    write_method(tmp_path, "adamw", (10, 20, 40), 0.5)
    write_method(tmp_path, "prm_per_tensor", (10, 8, 40), 0.5)
    write_method(tmp_path, "prm_debiased", (10, 20, None), 0.5, heldout_random=0.12)
    found = report.statements(read(tmp_path))
    assert "0.10 to 0.12, which is chance (0.10 ± 0.03)" in found["vit: chance"]
    assert "rising: AdamW (10, 20, 40), PRM debiased (10, 20, >100);" in found["vit: rising"]
    assert "not throughout: PRM per_tensor (10, 8, 40)." in found["vit: rising"]


def test_where_prm_memorises_less(tmp_path):
    write_method(tmp_path, "adamw", (10, 20, 40), 0.5)
    write_method(tmp_path, "prm_per_tensor", (10, 20, 40), 0.35)  # 2.2 standard errors below
    write_method(tmp_path, "prm_per_param", (10, 20, 40), 0.4)
    write_method(tmp_path, "prm_debiased", (10, 20, 40), 0.7)
    text = report.statements(read(tmp_path))["vit: memorised"]
    assert text.split(" are: ")[1] == (
        "AdamW 0.50 ± 0.05; more: PRM debiased 0.70 ± 0.05; less: PRM per_tensor 0.35 ± 0.05; "
        "no sure difference: PRM per_param 0.40 ± 0.05."
    )
    heads, body = report.memory_table(read(tmp_path))
    row = dict(zip(heads, body[0], strict=True))
    assert row["random/true"] == "4.0 [3.8, 5.0]" and row["corrupted fit"] == "0.50 ± 0.05"
    assert row["held-out fit"] == "0.65" and row["best held-out"] == "0.80"


def test_where_prm_slows_noise_down(tmp_path):
    write_method(tmp_path, "adamw", (10, 20, 40), 0.5)  # 38/10 to 40/8
    write_method(tmp_path, "prm_per_tensor", (10, 20, 50), 0.5)  # from 4.8
    write_method(tmp_path, "prm_per_param", (10, 20, 54), 0.5)  # from 5.2
    write_method(tmp_path, "prm_debiased", (10, 20, 30), 0.5)  # to 3.75
    write_method(tmp_path, "prm_debiased_per_param", (10, 20, None), 0.5)
    found = report.statements(read(tmp_path))
    _, adamw, *others = found["vit: slowed"].removesuffix(".").replace(": AdamW", "; AdamW").split("; ")
    assert adamw == "AdamW 4.0 [3.8, 5.0]"
    assert others == [
        "more: PRM debiased per_param >10.0, PRM per_param 5.4 [5.2, 6.8]",
        "less: PRM debiased 3.0 [2.8, 3.8]",
        "no sure difference: PRM per_tensor 5.0 [4.8, 6.2]",
    ]
    assert "one_seed" in found


def test_what_was_not_reached_or_not_run(tmp_path):
    write_method(tmp_path, "adamw", (10, 20, 40), 0.5, heldout_random=0.4)
    write_run(tmp_path, "partial_labels", "prm_debiased", [(0, 0.1, 0.1, 0.1, 0.1), (9, 0.2, 0.2, 0.1, 0.2)])
    found = report.statements(read(tmp_path))
    assert "not all of it by chance" in found["vit: chance"] and "vit: slowed" not in found
    assert "not there: PRM debiased" in found["vit: memorised"]
    heads, body = report.fit_table(read(tmp_path))
    assert heads == ["model", "kind", "AdamW", "PRM debiased"]
    assert {row[1]: row[2:] for row in body} == {
        "partial_labels": ["  20 1.00 0.80", "  >9 0.20 0.20"],
        "random_labels": ["  40 1.00 0.40", ""],
        "true_labels": ["  10 1.00 0.80", ""],
    }


def test_seeds_are_averaged_and_one_that_never_fits_counts(tmp_path):
    for seed, step in enumerate((10, 30)):
        write_method(tmp_path, "adamw", (step, step, step), 0.5, seed=seed)
    write_method(tmp_path, "prm_debiased", (10, 10, 10), 0.5)
    write_method(tmp_path, "prm_debiased", (None, None, None), 0.5, seed=1)
    groups = read(tmp_path)
    assert "one_seed" not in report.statements(groups)
    ratio = report.relative_steps(groups["vit", "true_labels", "adamw"], groups["vit", "random_labels", "adamw"])
    assert ratio == (1, pytest.approx(0.8), pytest.approx(1.25))
    assert report.steps_to_fit(groups["vit", "true_labels", "adamw"]) == 20
    assert report.fit_table(groups)[1][0][2:] == ["  20 1.00 0.80", ">100 0.85 0.80"]
