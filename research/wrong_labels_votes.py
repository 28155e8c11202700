"""How well the pairs of a prompt find each other's wrong labels: the data of results/wrong_labels/votes.md.

    python research/wrong_labels_votes.py gsm8k_pairs.train.jsonl results/wrong_labels/votes.json

No model is trained. Margins of one are drawn instead: Gaussian, of a given accuracy on clean labels.
"""

import json
import sys
from pathlib import Path

import numpy as np
from scipy.stats import norm

from prm_hf.noise.rng import row_uniforms
from prm_hf.noise.wrong_labels import estimate_wrong_labels, votes
from research.wrong_labels_table import measure


SHARES, SEEDS, ACCURACIES = (0.1, 0.2, 0.3, 0.4), range(5), (0.68, 0.75)


def main():
    """Writes a JSON object for each share of flips and seed, and prints their means."""
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()]
    prompts, chosen, rejected = ([json.dumps(row[name]) for row in rows] for name in ("prompt", "chosen", "rejected"))
    codes = np.unique(prompts, return_inverse=True)[1]
    pairs, entries = list(zip(chosen, rejected, strict=True)), []
    for share in SHARES:
        for seed in SEEDS:
            wrong = row_uniforms(seed, range(len(rows)), "flip_preferences") < share
            sides = [pair[:: -1 if flip else 1] for pair, flip in zip(pairs, wrong, strict=True)]
            vote = votes(prompts, *zip(*sides, strict=True))
            found = {"votes": estimate_wrong_labels(vote, groups=codes)}
            for accuracy in ACCURACIES:
                rng = np.random.default_rng([seed, round(100 * accuracy)])
                margins = rng.normal(norm.ppf(accuracy), 1, len(rows)) * np.where(wrong, -1, 1)
                found[f"margins {accuracy}"] = estimate_wrong_labels(margins, groups=codes)
                found[f"both {accuracy}"] = estimate_wrong_labels(margins, votes=vote, groups=codes)
            entry = {"share": share, "seed": seed, "wrong": float(wrong.mean())}
            entries.append(entry | {"estimates": {name: measure(x, wrong) for name, x in found.items()}})
        for name in found:
            of_share = [entry["estimates"][name] for entry in entries if entry["share"] == share]
            means = {key: np.mean([x[key] for x in of_share]) for key in of_share[0]}
            print(share, name, "  ".join(f"{key} {value:.3f}" for key, value in means.items()), flush=True)
    Path(sys.argv[2]).write_text(json.dumps(entries, indent=1) + "\n")


if __name__ == "__main__":
    main()
