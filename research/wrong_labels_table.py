"""The rows of results/built_in/wrong_labels.md and its JSON, from the files that wrong_labels.py has written.

python research/wrong_labels_table.py MARGINS results/built_in/wrong_labels.json
"""

import json
import re
import sys
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from prm_hf.noise.wrong_labels import estimate_wrong_labels


NAME = re.compile(r"task(\d)_noise([\d.]+)_seed(\d)_(\w+?)_((?:adamw|prm)[\w:]*)_([\d.e-]+)")


def area(scores, wrong):
    """Area under the ROC curve."""
    n = wrong.sum()
    return float((rankdata(scores)[wrong].sum() - n * (n + 1) / 2) / (n * (len(wrong) - n)))


def average_precision(scores, wrong):
    """Mean over the wrong labels of the precision at their ranks."""
    hits = wrong[np.argsort(-scores, kind="stable")]
    return float((np.cumsum(hits) / np.arange(1, len(hits) + 1))[hits].mean())


def calibration_error(probabilities, wrong, bins=5):
    """Mean distance between probability and frequency in bins of equally many rows."""
    parts = np.array_split(np.argsort(probabilities), bins)
    return float(sum(abs(probabilities[i].mean() - wrong[i].mean()) * len(i) for i in parts) / len(wrong))


def measure(result, wrong):
    """What is reported of one estimate."""
    return {
        "auc": area(result.scores, wrong),
        "average_precision": average_precision(result.scores, wrong),
        "calibration_error": calibration_error(result.probabilities, wrong),
        "share": result.share,
        "share_low": result.share_low,
        "share_high": result.share_high,
        "share_error": abs(result.share - wrong.mean()),
        "covers": bool(result.share_low <= wrong.mean() <= result.share_high),
    }


def main():
    """Writes a JSON object for each file, with an estimate for each way of scoring."""
    entries = []
    for file in sorted(Path(sys.argv[1]).glob("*.npz")):
        task, noise, seed, scheme, method, lr = NAME.fullmatch(file.stem).groups()
        saved = np.load(file)
        margins, trained, wrong = saved["margins"], saved["trained"][:, None], saved["flipped"]
        inner = (margins * trained).sum(0) / trained.sum(0)
        ways = {"in_sample": {"in_sample": inner}, "in_sample_end": {"in_sample": inner[-1]}}
        entry = {"task": int(task), "noise_rate": float(noise), "seed": int(seed), "scheme": scheme, "method": method}
        entry |= {"learning_rate": float(lr), "wrong": float(wrong.mean())}
        entry |= {"heldout_accuracy": float(saved["accuracy"].mean())}
        if scheme != "full":
            outer = (margins * ~trained).sum(0) / (~trained).sum(0)
            entry |= {"agreement": float((outer[-1] > 0).mean())}
            entry |= {"accuracy": float((outer[-1] * np.where(wrong, -1, 1) > 0).mean())}
            ways = {"out": {"margins": outer}, "out_end": {"margins": outer[-1]}}
            ways |= {"both": {"margins": outer, "in_sample": inner}}
        entry["estimates"] = {way: measure(estimate_wrong_labels(**given), wrong) for way, given in ways.items()}
        entries.append(entry)
    Path(sys.argv[2]).write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
