"""What state in less than float32 costs in what is learned: loss, accuracy and masks beside those of float32.

    python benchmarks/convergence.py                      # the built-in task, by DPO with flipped labels
    python benchmarks/convergence.py --model Qwen/Qwen2.5-0.5B    # 200 steps of SFT on the sources of this package

Each optimizer trains with each `state_dtype` and each seed, which sets the order of the data and which labels are
flipped. Runs of one seed differ in their state alone, so differences to float32 are taken seed by seed; after a mean
stands the half width of its 95 % interval (Student's t). AdamW is PRM with `mask="none"`. Downloads nothing but MODEL.
"""

import argparse
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from scipy.special import stdtrit
from transformers import AutoModelForCausalLM, AutoTokenizer

import prm_hf
from prm_hf import PRMDPOConfig, PRMDPOTrainer, PRMSFTConfig, PRMSFTTrainer
from prm_hf.compare.statistics import mean_and_standard_error
from prm_hf.demo import build_demo
from prm_hf.noise import flip_preferences
from prm_hf.optim.hyperparameters import STATE_DTYPES


METHODS = {"AdamW": {"prm_mask": "none"}, "per_tensor": {"prm_reduction": "per_tensor"}}
METHODS |= {"per_row": {"prm_reduction": "per_row", "prm_signal_beta": 0.98}}
QUIET = {"logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
LAST = 30  # steps, of which loss and mask are means
IN_LOGS = {"loss": "loss", "mask": "mask/mean_q"}
COLUMNS = {"loss": "training loss", "mask": "mean mask", "eval_loss": "held-out loss", "accuracy": "held-out accuracy"}


def make_trainer(model: str | None, options: dict, seed: int) -> PRMDPOTrainer | PRMSFTTrainer:
    """A trainer of the model on texts, or of the built-in task's reference policy on pairs with flipped labels."""
    folder = model or build_demo().model_path
    policy, tokenizer = AutoModelForCausalLM.from_pretrained(folder).float(), AutoTokenizer.from_pretrained(folder)
    if model is None:
        data = flip_preferences(build_demo().train, 0.3, seed=seed), build_demo().test
        reference, args = AutoModelForCausalLM.from_pretrained(folder), PRMDPOConfig(**options, max_length=64)
        return PRMDPOTrainer(policy, reference, args, None, *data, tokenizer)
    source = "".join(x.read_text(encoding="utf-8") for x in sorted(Path(prm_hf.__file__).parent.rglob("*.py")))
    pieces = [{"text": source[i : i + 2000]} for i in range(0, len(source), 2000)]
    data = map(Dataset.from_list, ([x for i, x in enumerate(pieces) if i % 10], pieces[::10]))
    return PRMSFTTrainer(policy, PRMSFTConfig(**options, max_length=512), None, *data, tokenizer)


def train(args: argparse.Namespace, method: str, state_dtype: str, seed: int) -> dict[str, float]:
    """What one run ends with, by the names of `COLUMNS`."""
    options = {
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": 2 * args.batch_size,
        "learning_rate": args.learning_rate * (1 if method == "AdamW" else 3),
        "warmup_steps": args.steps // 10,
        "seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
        "gradient_checkpointing": args.model is not None,
        **({"prm_state_dtype": state_dtype} | QUIET | METHODS[method]),
    }
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(args.model, {"output_dir": folder, **options}, seed)
        trainer.train()
        metrics = trainer.evaluate()
    logs = [log for log in trainer.state.log_history if "loss" in log][-LAST:]
    of_logs = {name: float(np.mean([log[key] for log in logs])) for name, key in IN_LOGS.items()}
    accuracy = metrics["eval_mean_token_accuracy" if args.model else "eval_rewards/accuracies"]
    return of_logs | {"eval_loss": metrics["eval_loss"], "accuracy": accuracy}


def table(runs: dict[str, dict[str, float]], seeds: list[int]) -> str:
    """Means over seeds: of the runs with float32, and of the differences to these."""
    lines = [f"| optimizer | state | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for method, state_dtype in itertools.product(METHODS, STATE_DTYPES):
        cells = []
        for name in COLUMNS:
            values = np.array([runs[f"{method} {state_dtype} {seed}"][name] for seed in seeds])
            if state_dtype != "float32":
                values -= [runs[f"{method} float32 {seed}"][name] for seed in seeds]
            mean, error, n = mean_and_standard_error(values)
            sign = "" if state_dtype == "float32" else "+"
            cells.append(f"{mean:{sign}.4f}" + (f" ± {error * stdtrit(n - 1, 0.975):.4f}" if n > 1 else ""))
        lines.append(f"| {method} | {state_dtype} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a causal language model for SFT, by name or folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="default: 160, with --model 200")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, help="of AdamW, a third of PRM's; 1e-3, with --model 1e-5")
    parser.add_argument("--output", type=Path, help="a JSON file of all runs; those that it has are not repeated")
    args = parser.parse_args(argv)
    args.steps = args.steps or (160 if args.model is None else 200)
    args.learning_rate = args.learning_rate or (1e-3 if args.model is None else 1e-5)
    settings = {name: getattr(args, name) for name in ("model", "steps", "batch_size", "learning_rate")}
    record = {"settings": settings, "runs": {}}
    if args.output and args.output.exists():
        record = json.loads(args.output.read_text())
        if record["settings"] != settings:
            parser.error(f"{args.output} has runs of other settings: {record['settings']}. Name another file.")
    for seed, method, state_dtype in itertools.product(args.seeds, METHODS, STATE_DTYPES):
        key, runs = f"{method} {state_dtype} {seed}", record["runs"]
        runs[key] = runs.get(key) or train(args, method, state_dtype, seed)
        if args.output:
            args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(table(record["runs"], args.seeds))


if __name__ == "__main__":
    main()
