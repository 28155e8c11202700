"""Finished run folders with known differences, which several files of tests compare."""

import json
from pathlib import Path

import numpy as np


PAIRS = 400
ACCURACY, KL = "rewards/accuracies", "drift/kl"


def write_run(root, method, lr, seed, accuracy, kl, *, settings=None, margins=True, mean_q=None, **changes):
    """A finished run folder. The first `accuracy`·PAIRS held-out pairs, in an order that the seed shuffles a little,
    are right: two runs of one seed differ exactly in the pairs between their accuracies."""
    order = np.argsort(np.arange(PAIRS) + np.random.default_rng(seed).normal(0, 20, PAIRS))
    heldout = np.full(PAIRS, -1.0)
    heldout[order[: round(accuracy * PAIRS)]] = 1.0
    name = changes.get("name", f"{method}_lr{lr:.0e}_seed{seed}")
    folder = Path(root) / name
    folder.mkdir(parents=True)
    info = {
        "schema": 1,
        "name": name,
        "method": method,
        "learning_rate": lr,
        "seed": seed,
        "noise_rate": 0.3,
        "model": "tiny",
        "dataset": "built-in",
        "settings": {"beta": 0.1, "learning_rate": lr, "seed": seed, **(settings or {})},
        "versions": {"torch": "2"},
        "hardware": {"device": "cpu"},
    }
    known = {*info, "extension"}
    (folder / "run.json").write_text(json.dumps(info | {k: v for k, v in changes.items() if k in known}))
    history = []
    for step in range(0, 41, 10):
        mask = {"mask/mean_q": mean_q} if mean_q and step else {}
        values = {ACCURACY: accuracy * step / 40, "memorization/flipped_fit": 0.3, KL: kl * (step / 40) ** 2}
        history += [{"step": step, "train/loss": 0.69, **mask}, {"step": step, **values}]
    (folder / "history.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in history))
    metrics = {
        ACCURACY: accuracy,
        "memorization/flipped_fit": 0.4,
        "memorization/clean_fit": 0.8,
        KL: kl,
        "drift/reward_abs": 0.5,
        "wall_seconds": 12.0,
        "steps": 40,
    }
    dropped = changes.get("drop", ())
    (folder / "metrics.json").write_text(json.dumps({k: v for k, v in metrics.items() if k not in dropped}))
    if margins:
        (folder / "margins.json").write_text(
            json.dumps({"heldout": heldout.tolist(), "train": [], "train_flipped": []})
        )
    return name


def write_grid(root, seeds=(0,), prm_gain=0.0, prm=("prm_per_tensor",), constant=None):
    """AdamW and PRM at three learning rates each; at the same KL PRM is more accurate by `prm_gain`."""
    for seed in seeds:
        for lr, kl, accuracy in ((1e-4, 0.1, 0.70), (1e-3, 0.4, 0.75), (1e-2, 1.6, 0.65)):
            write_run(root, "adamw", lr, seed, accuracy, kl)
        for method in prm:
            for lr, kl, accuracy in ((1e-3, 0.2, 0.725), (1e-2, 0.4, 0.75), (1e-1, 0.8, 0.70)):
                name = write_run(root, method, lr, seed, accuracy + prm_gain, kl, mean_q=0.05)
                if lr == 1e-2 and method == prm[0] and constant is not None:
                    source = {"constant_q": {"of": name, "mean_q": 0.05 + seed / 1000}}
                    rate = lr * (0.05 + seed / 1000)
                    write_run(root, "constant_q", rate, seed, constant, 0.3, settings=source)


def contrast(comparison, kind, method="prm_per_tensor"):
    return next(c for c in comparison.contrasts if c.kind == kind and c.left.method == method)
