"""Relabelling in rounds on the built-in task: the numbers in results/built_in/wrong_labels.md.

    python -m research.wrong_labels_rounds OUT.json --seeds 0 1 2    # a minute a task and seed

Each round trains on the labels of the round before, cross-fitted in five folds, and flips the labels that are wrong
with a probability above one half. `current` doubts the labels that were trained on, `given` always those as given, and
`out_of_fold` does so by margins out of three folds alone, as `relabel:SOURCE` of `prm-hf dpo` judges.
The accuracy is that of a model that trains on all pairs with a round's labels; round 0 has the labels as given.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prm_hf.demo import build_demo
from prm_hf.noise.rng import row_uniforms
from prm_hf.noise.wrong_labels import estimate_wrong_labels
from prm_hf.suspects import fold_of_rows
from research.wrong_labels import Pairs, train


ROUNDS, RATES = 3, {"prm_rows_eps:10": 1e-3, "adamw_eps:10": 3e-4}
KINDS = ["current", "given", "out_of_fold"]


def judge(pairs, signs, doubted, load, heldout, seed, kind, method):
    """How probably each of the labels `doubted` is wrong, (pairs,), by models that train on the labels `signs`."""
    n = len(signs)
    folds, alone = (3, True) if kind == "out_of_fold" else (5, False)
    fold = fold_of_rows(range(n), 3, seed) if alone else np.random.default_rng([seed, 0]).permutation(n) % folds
    outer, inner = np.zeros((2, 5, n))
    for k in range(folds):
        rows = torch.tensor(np.flatnonzero(fold != k))
        margins, _ = train(load(), pairs, signs, rows, method, RATES[method], 1000 * seed + k, heldout)
        margins = (margins * signs * doubted).numpy()  # in the direction of the labels that are doubted
        outer[:, fold == k] = margins[:, fold == k]
        inner[:, fold != k] += margins[:, fold != k] / (folds - 1)
    return estimate_wrong_labels(outer, in_sample=None if alone else inner).probabilities


def rounds(pairs, heldout, load, noise, seed, kind, method):
    """Of each round the share of wrong labels, and the held-out accuracy of a model that trains on them."""
    n = pairs.ids.shape[1]
    flipped = row_uniforms(seed, range(n), "flip_preferences") < noise
    given = torch.tensor(np.where(flipped, -1.0, 1.0), dtype=torch.float32)
    signs, found = given, []
    for i in range(ROUNDS + 1):
        if i:
            doubted = signs if kind == "current" else given
            wrong = torch.tensor(judge(pairs, signs, doubted, load, heldout, seed, kind, method) > 0.5)
            signs = torch.where(wrong, -doubted, doubted)
        order = 1000 * seed + (50 if kind == "out_of_fold" else 5)
        _, test = train(load(), pairs, signs, torch.arange(n), method, RATES[method], order, heldout)
        accuracy = float((test > 0).float().mean() + (test == 0).float().mean() / 2)
        found.append({"wrong": float((signs < 0).float().mean()), "accuracy": accuracy})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--noise_rates", type=float, nargs="+", default=[0.3])
    parser.add_argument("--kinds", nargs="+", default=["current", "given"], choices=KINDS)
    parser.add_argument("--method", default="prm_rows_eps:10", choices=RATES)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    for task in args.tasks:
        demo = build_demo(task)
        load = lambda: AutoModelForCausalLM.from_pretrained(demo.model_path).train()  # noqa: B023, E731
        tokenizer = AutoTokenizer.from_pretrained(demo.model_path)
        pairs, heldout = (Pairs(rows, tokenizer, load()) for rows in (demo.train, demo.test))
        for noise, seed, kind in [(n, s, k) for n in args.noise_rates for s in args.seeds for k in args.kinds]:
            key = f"task{task}_noise{noise:g}_seed{seed}_{kind}_{args.method}"
            if key not in found:
                found[key] = rounds(pairs, heldout, load, noise, seed, kind, args.method)
                args.out.write_text(json.dumps(found, indent=1))
                print(key, *(f"{r['wrong']:.3f}/{r['accuracy']:.3f}" for r in found[key]), flush=True)


if __name__ == "__main__":
    main()
