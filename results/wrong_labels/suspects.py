"""How well the runs of an archive tell which labels are wrong: the numbers of README.md.

    python results/wrong_labels/suspects.py results/wrong_labels/gsm8k_30.tar.xz

An interval is of a difference of two mean AUCs over seeds, by a bootstrap that draws seeds and pairs; each pair has a
prompt of its own.
"""

import json
import sys
import tarfile
import tempfile
from collections import defaultdict
from pathlib import Path

import numpy as np

from prm_hf.metrics.suspects import suspect_metrics
from prm_hf.noise.wrong_labels import estimate_wrong_labels


PRM, EPS, ADAMW = "prm_rows_eps:10", "adamw_eps:10", "adamw"
SMALLEST = {PRM: 4e-7, EPS: 1e-7, ADAMW: 1e-7}


def read(folder: Path) -> tuple[dict, dict, dict]:
    """In-sample margins and folds by method, learning rate and seed; by seed which labels are wrong."""
    in_sample, folds, wrong = {}, defaultdict(list), {}
    for file in sorted(folder.rglob("metrics.json")):
        info = json.loads(file.with_name("run.json").read_text())
        margins = json.loads(file.with_name("margins.json").read_text())
        method = info["method"].partition("-fold")[0]
        key = (method, info["learning_rate"], info["seed"])
        if "fold" in info["settings"]:
            folds[key].append((margins, json.loads(file.read_text())["agreement"]))
        elif method in SMALLEST:
            in_sample[key] = np.array(margins["train"])
            wrong[info["seed"]] = np.array(margins["train_flipped"])
    return in_sample, folds, wrong


def out_of_fold(runs: list, n: int) -> tuple[np.ndarray, float]:
    """Margins `(epochs, n)`, and how often they agree with the labels as given."""
    margins = np.full((len(runs[0][0]["label_margins"]), n), np.nan)
    for found, _ in runs:
        margins[:, found["rows"]] = found["label_margins"]
    return margins, float(np.mean([agreement for _, agreement in runs]))


def auc(scores: np.ndarray, wrong: np.ndarray) -> float:
    return suspect_metrics(scores, wrong)["suspects/auc"]


def least_left(scores: np.ndarray, wrong: np.ndarray) -> float:
    """The share of wrong labels if the highest scores are flipped, as many of them as the truth says is best."""
    gained = np.cumsum(np.where(wrong[np.argsort(-scores)], 1, -1))
    return float((wrong.sum() - max(gained.max(), 0)) / len(wrong))


def difference(ours: dict, theirs: dict, wrong: dict, resamples: int = 1000) -> tuple[float, float, float]:
    """Mean over seeds of our AUC minus theirs, and its 95 % interval."""
    rng, seeds = np.random.default_rng(0), sorted(wrong)
    n = len(wrong[seeds[0]])

    def mean(drawn: np.ndarray, rows: np.ndarray) -> float:
        gains = [auc(ours[s][rows], wrong[s][rows]) - auc(theirs[s][rows], wrong[s][rows]) for s in drawn]
        return float(np.mean(gains))

    values = [mean(rng.choice(seeds, len(seeds)), rng.integers(n, size=n)) for _ in range(resamples)]
    return mean(np.array(seeds), np.arange(n)), *np.quantile(values, [0.025, 0.975])


def main(archive: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        in_sample, folds, wrong = read(Path(folder))
    n = len(next(iter(wrong.values())))
    ranked = {}
    for method in (PRM, EPS):
        ranked[method, "out of fold"], ranked[method, "both"] = {}, {}
        for seed in wrong:
            found = {rate: out_of_fold(runs, n) for (m, rate, s), runs in folds.items() if (m, s) == (method, seed)}
            rate = max(found, key=lambda rate: found[rate][1])
            margins, agreement = found[rate]
            alone = estimate_wrong_labels(margins)
            both = estimate_wrong_labels(margins, in_sample=in_sample[method, rate, seed])
            ranked[method, "out of fold"][seed], ranked[method, "both"][seed] = alone.scores, both.scores
            left = np.mean(wrong[seed] != (both.probabilities > 0.5))
            best = least_left(both.probabilities, wrong[seed])
            right = np.mean((margins.mean(0) > 0) != wrong[seed])
            print(
                f"{method}, seed {seed}: rate {rate:g} (agreement {agreement:.3f}), right {right:.3f}, share "
                f"{alone.share:.3f} [{alone.share_low:.3f}, {alone.share_high:.3f}] of {wrong[seed].mean():.3f}; "
                f"wrong after a relabel {left:.3f}, by the best threshold {best:.3f}"
            )
    for method, rate in SMALLEST.items():
        ranked[method, "in sample"] = {seed: -in_sample[method, rate, seed] for seed in wrong}
    for name, scores in ranked.items():
        by_seed = [auc(scores[seed], wrong[seed]) for seed in sorted(wrong)]
        print(f"AUC of {', '.join(name)}: {np.mean(by_seed):.3f}, by seed", " ".join(f"{x:.3f}" for x in by_seed))
    for ours, theirs in [
        ((PRM, "both"), (ADAMW, "in sample")),
        ((PRM, "both"), (EPS, "in sample")),
        ((PRM, "both"), (EPS, "both")),
        ((PRM, "in sample"), (ADAMW, "in sample")),
        ((PRM, "in sample"), (EPS, "in sample")),
    ]:
        d, low, high = difference(ranked[ours], ranked[theirs], wrong)
        print(f"{', '.join(ours)} minus {', '.join(theirs)}: {d:+.3f} [{low:+.3f}, {high:+.3f}]")


if __name__ == "__main__":
    main(sys.argv[1])
