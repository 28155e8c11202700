"""Margins of the built-in task's training pairs, in and out of fold: the data of results/built_in/wrong_labels.md.

    python research/wrong_labels.py OUT --tasks 0 1 2 --seeds 0 1 2    # 2 minutes a task, seed and noise rate

A run is a plain loop with the settings of `prm-hf dpo` on the built-in task. Each file of `OUT` has `margins` and
`trained`, both (models, pairs): the reward margins in the direction of the labels as given, `(models, epochs, pairs)`,
and which pairs a model trained on. A scheme of k folds has k models.
"""

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prm_hf import PRM
from prm_hf.demo import build_demo
from prm_hf.noise.rng import row_uniforms


BETA, BATCH, EPOCHS, WARMUP, MEASURED = 0.1, 16, 10, 16, (2, 4, 6, 8, 10)
PRESET = {"reduction": "per_row", "estimator": "debiased", "signal_beta": 0.98, "foreach": True}
RATES = {"adamw": (3e-4, 1e-4), "adamw_eps:10": (3e-4, 1e-4), "prm_rows_eps:10": (1e-3, 3e-4)}
SCHEMES = {"full": (1, 1), "folds5": (5, 1), "folds2": (2, 2), "folds10": (10, 1)}  # folds, repetitions


class Pairs:
    """Pairs as tensors: `ids` int64 (2, pairs, tokens), the better side first, and the reference's margins."""

    def __init__(self, rows, tokenizer, reference):
        chats = [[p + c for p, c in zip(rows["prompt"], rows[side], strict=True)] for side in ("chosen", "rejected")]
        ids = [[tokenizer.apply_chat_template(chat, return_dict=False) for chat in side] for side in chats]
        starts = [len(tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False))
                  for p in rows["prompt"]]  # fmt: skip
        longest = max(len(chat) for side in ids for chat in side)
        pad = tokenizer.pad_token_id
        self.ids = torch.tensor([[chat + [pad] * (longest - len(chat)) for chat in side] for side in ids])
        place = torch.arange(longest)
        self.counts = (self.ids != pad) & (place >= torch.tensor(starts)[:, None])
        with torch.no_grad():
            self.reference = self.logps(reference, torch.arange(len(starts)))

    def logps(self, model, rows):
        """Log-probabilities of the completions, (2, rows)."""
        ids, counts = self.ids[:, rows], self.counts[:, rows]
        logps = model(input_ids=ids.flatten(0, 1), use_cache=False).logits[:, :-1].log_softmax(-1)
        return (
            (logps.gather(-1, ids.flatten(0, 1)[:, 1:, None])[..., 0] * counts.flatten(0, 1)[:, 1:]).sum(1).view(2, -1)
        )

    def margins(self, model, rows):
        """Reward margins of the better side, (rows,)."""
        rewards = BETA * (self.logps(model, rows) - self.reference[:, rows])
        return rewards[0] - rewards[1]


def make_optimizer(method, model, lr):
    d = sum(p.numel() for p in model.parameters())
    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0)
    if method == "adamw_eps:10":
        return torch.optim.AdamW(model.parameters(), 11 * lr, eps=10 / math.sqrt(d), weight_decay=0.0)
    return PRM(model.parameters(), lr, relative_eps=10.0, **PRESET)


def train(model, pairs, signs, rows, method, lr, seed, heldout):
    """Trains on `rows`, and returns the margins of all pairs, (epochs, pairs), and those of the held-out pairs."""
    optimizer = make_optimizer(method, model, lr)
    n_batches = math.ceil(len(rows) / BATCH)
    total = EPOCHS * n_batches
    warmup = round(WARMUP * total / 160)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min(t / warmup, (total - t) / (total - warmup)))
    generator = torch.Generator().manual_seed(seed)
    measured = []
    for epoch in range(1, EPOCHS + 1):
        order = rows[torch.randperm(len(rows), generator=generator)]
        for batch in order.split(BATCH):
            margins = pairs.margins(model, batch) * signs[batch]
            (-torch.nn.functional.logsigmoid(margins).mean()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if epoch in MEASURED:
            with torch.no_grad():
                measured.append(pairs.margins(model, torch.arange(len(signs))) * signs)
    with torch.no_grad():
        return torch.stack(measured), heldout.margins(model, torch.arange(heldout.ids.shape[1]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--tasks", type=int, nargs="+", default=[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--noise_rates", type=float, nargs="+", default=[0.3])
    parser.add_argument("--schemes", nargs="+", default=["full", "folds5", "folds2"], choices=SCHEMES)
    parser.add_argument("--methods", nargs="+", default=list(RATES), choices=RATES)
    parser.add_argument("--learning_rates", type=float, nargs="+", help="default: two of each method")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for task in args.tasks:
        demo = build_demo(task)
        load = lambda: AutoModelForCausalLM.from_pretrained(demo.model_path).train()  # noqa: B023, E731
        tokenizer = AutoTokenizer.from_pretrained(demo.model_path)
        pairs, heldout = (Pairs(rows, tokenizer, load()) for rows in (demo.train, demo.test))
        for noise, seed, scheme, method in [
            (n, s, c, m) for n in args.noise_rates for s in args.seeds for c in args.schemes for m in args.methods
        ]:  # fmt: skip
            for lr in args.learning_rates or RATES[method]:
                file = args.out / f"task{task}_noise{noise:g}_seed{seed}_{scheme}_{method}_{lr:g}.npz"
                if not file.exists():
                    np.savez_compressed(file, **cell(pairs, heldout, load, noise, seed, scheme, method, lr))
                    print(file.name, flush=True)


def cell(pairs, heldout, load, noise, seed, scheme, method, lr):
    """The models of one scheme: what is saved."""
    n = pairs.ids.shape[1]
    flipped = row_uniforms(seed, range(n), "flip_preferences") < noise
    signs = torch.tensor(np.where(flipped, -1.0, 1.0), dtype=torch.float32)
    folds, repetitions = SCHEMES[scheme]
    margins, trained, accuracies = [], [], []
    for model in range(folds * repetitions):
        repetition, fold = divmod(model, folds)
        place = np.random.default_rng([seed, repetition]).permutation(n)
        is_trained = (place % folds != fold) | (folds == 1)
        rows = torch.tensor(np.flatnonzero(is_trained))
        epochs, test = train(load(), pairs, signs, rows, method, lr, 1000 * seed + model, heldout)
        margins.append(epochs.numpy())
        trained.append(is_trained)
        accuracies.append(float((test > 0).float().mean() + (test == 0).float().mean() / 2))
    logps = (pairs.reference[0] - pairs.reference[1]) * signs
    lengths = (pairs.counts[0].sum(1) - pairs.counts[1].sum(1)) * signs
    return {"margins": np.stack(margins), "trained": np.stack(trained), "flipped": flipped, "accuracy": accuracies,
            "reference": logps.numpy(), "length": lengths.numpy()}  # fmt: skip


if __name__ == "__main__":
    main()
