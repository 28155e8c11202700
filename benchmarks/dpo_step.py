"""What the optimizer costs of a whole DPO training step: `benchmarks/step.py --dpo_steps 12`.

[`PRMDPOTrainer`] trains a model of random weights on random preference pairs of a fixed length, in bfloat16 with
float32 weights. PRM and fused AdamW take turns, step by step, on the same weights, so that both see the same clocks,
memory and batches. Nothing is downloaded.
"""

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from benchmarks.step import milliseconds, synchronize
from prm_hf import PRMDPOConfig, PRMDPOTrainer
from prm_hf.demo import task
from prm_hf.demo.model import make_tokenizer
from prm_hf.metrics import ParameterDrift
from prm_hf.trainers.callbacks import PRMCallback


PAIRS = 32  # a step
WARMUP_STEPS = 3  # of each optimizer
EVALUATED_PAIRS = 128
# The run whose share is printed: the pairs of UltraFeedback, the pairs of one evaluation, the pairs between two logs
TRAINED, HELDOUT, LOGGED = 61_135, 2_000, 10 * 8
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads", "num_key_value_heads")
# By name: the model's sizes, tokens of a prompt and of a completion, and pairs a device works on at a time
MODELS = {
    "0.5b": ((151_936, 896, 4864, 24, 14, 2), (64, 192), 8),
    "tiny": ((128, 32, 48, 2, 4, 2), (4, 8), 16),
}


def pairs(count: int, prompt: int, completion: int) -> Dataset:
    """Random digits: a token each, and one more that ends a completion."""
    rng = random.Random(0)

    def text(length: int) -> str:
        return "".join(f" {digit}" for digit in rng.choices(task.DIGITS, k=length))

    lengths = {"prompt": prompt, "chosen": completion - 1, "rejected": completion - 1}
    return Dataset.from_list([{name: text(length) for name, length in lengths.items()} for _ in range(count)])


class TakeTurns(TrainerCallback):
    """Lets another optimizer take each step, and measures the steps: all of one, and the optimizer's part.

    Attributes:
        steps, parts: milliseconds by optimizer, without those that warm up.
    """

    def __init__(self, trainer: PRMDPOTrainer) -> None:
        self.trainer, self.device = trainer, trainer.args.device.type
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self.steps: dict[str, list[float]] = {"PRM": [], "AdamW": []}
        self.parts: dict[str, list[float]] = {"PRM": [], "AdamW": []}
        self._last = None

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        prm = self.trainer.find_prm()
        groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in prm.param_groups]
        adamw = torch.optim.AdamW(groups, betas=(args.adam_beta1, args.adam_beta2), eps=args.adam_epsilon, fused=True)
        self.optimizers = {"PRM": prm, "AdamW": adamw}

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.name = ("PRM", "AdamW")[state.global_step % 2]
        self.trainer.optimizer.optimizer = self.optimizers[self.name]
        if self._last is None:
            self._last = self._now()

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._began = self._mark()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._ended = self._mark()

    def _mark(self) -> torch.cuda.Event | float:
        if self.device != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def on_step_end(self, args, state, control, **kwargs) -> None:
        now, began, ended = self._now(), self._began, self._ended
        if state.global_step > 2 * WARMUP_STEPS:
            self.steps[self.name].append((now - self._last) * 1e3)
            part = began.elapsed_time(ended) if self.device == "cuda" else (ended - began) * 1e3
            self.parts[self.name].append(part)
        self._last = now


def seconds(function: Callable[[], object], device: str) -> float:
    """The median time of three calls."""
    return statistics.median(milliseconds(function, device, repeats=3, seconds=0)) / 1e3


def measure(model_name: str, steps: int, device: str) -> dict:
    """Trains `steps` steps with each optimizer, after warm-up.

    Returns:
        By optimizer, medians in milliseconds of a step and of the optimizer's part in it and its share; `ratio`, of
        the two steps; `mask_stats_ms`, what a log of the mask's statistics costs; seconds of an evaluation with and
        without `drift_metrics`, of `drift/params_rel` in it, and of a pass of our own over the same pairs, which
        `evaluate_pairs` and memorization take; and how it was measured.
    """
    sizes, (prompt, completion), at_a_time = MODELS[model_name]
    tokenizer = make_tokenizer()
    config = Qwen2Config(
        **dict(zip(SIZES, sizes, strict=True)),
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(config)
    total = 2 * (steps + WARMUP_STEPS)
    with tempfile.TemporaryDirectory() as folder:
        arguments = PRMDPOConfig(
            folder,
            prm_reduction="per_tensor",
            per_device_train_batch_size=at_a_time,
            gradient_accumulation_steps=PAIRS // at_a_time,
            max_steps=total,
            max_length=prompt + completion,
            learning_rate=5e-7,
            lr_scheduler_type="constant",
            bf16=True,
            gradient_checkpointing=False,
            **dict.fromkeys(("logging_strategy", "save_strategy", "eval_strategy"), "no"),
            per_device_eval_batch_size=at_a_time,
            report_to="none",
            disable_tqdm=True,
            use_cpu=device == "cpu",
        )
        trainer = PRMDPOTrainer(
            model,
            copy.deepcopy(model),
            arguments,
            train_dataset=pairs(PAIRS * total, prompt, completion),
            eval_dataset=pairs(EVALUATED_PAIRS, prompt, completion),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PRMCallback)  # which stops a run where another optimizer steps
        turns = TakeTurns(trainer)
        trainer.add_callback(turns)
        trainer.train()  # and evaluates at the end, which is the warm-up of what is measured now
        drift = ParameterDrift(trainer.model, trainer.accelerator)
        row = {
            "model": model_name,
            "pairs_a_step": PAIRS,
            "pairs_at_a_time": at_a_time,
            "tokens_a_row": prompt + completion,
            "measured_steps_each": steps,
            "mask_stats_ms": seconds(turns.optimizers["PRM"].get_mask_stats, device) * 1e3,
            "evaluated_pairs": EVALUATED_PAIRS,
            "evaluation_s": seconds(trainer.evaluate, device),
            "own_pass_s": seconds(trainer.evaluate_pairs, device),
            "params_rel_s": seconds(lambda: drift.relative(trainer.model_wrapped), device),
        }
        trainer.args.drift_metrics = False
        row["evaluation_of_trl_s"] = seconds(trainer.evaluate, device)
    for name in turns.steps:
        step, part = statistics.median(turns.steps[name]), statistics.median(turns.parts[name])
        row[name] = {"step_ms": step, "optimizer_ms": part, "share": part / step, "steps_ms": turns.steps[name]}
    row["ratio"] = row["PRM"]["step_ms"] / row["AdamW"]["step_ms"]
    return row


def print_row(row: dict) -> None:
    print(
        f"\nDPO step, {row['model']}, {row['pairs_a_step']} pairs of {row['tokens_a_row']} tokens, "
        f"{row['pairs_at_a_time']} at a time, bf16, medians of {row['measured_steps_each']} steps each\n"
    )
    print("| optimizer | ms a step | ms its part | share |\n|---|---|---|---|")
    for name in ("AdamW", "PRM"):
        own = row[name]
        print(f"| {name} | {own['step_ms']:.1f} | {own['optimizer_ms']:.2f} | {own['share']:.2%} |")
    training, a_pair = row["PRM"]["step_ms"] / row["pairs_a_step"], 1e3 / row["evaluated_pairs"]
    of_trl, own_pass = row["evaluation_of_trl_s"] * a_pair, row["own_pass_s"] * a_pair
    extra = (row["evaluation_s"] - row["evaluation_of_trl_s"] - row["params_rel_s"]) * a_pair
    run = training * TRAINED
    shares = extra * HELDOUT / run, row["params_rel_s"] * 1e3 / run, row["mask_stats_ms"] / (training * LOGGED)
    print(
        f"\nPRM / AdamW: {row['ratio']:.4f}. A pair takes {training:.2f} ms to train on and {of_trl:.2f} ms in TRL's "
        f"evaluation.\n\n| what `drift_metrics` and the log of the mask add | ms | share of a run |\n|---|---|---|\n"
        f"| a pair, to an evaluation | {extra:.2f} | {shares[0]:.2%} |\n"
        f"| `drift/params_rel`, an evaluation | {row['params_rel_s'] * 1e3:.0f} | {shares[1]:.2%} |\n"
        f"| `get_mask_stats`, a log | {row['mask_stats_ms']:.1f} | {shares[2]:.2%} |\n"
        f"| together | | {sum(shares):.2%} |\n\n"
        f"The run: {TRAINED} pairs, one evaluation of {HELDOUT}, a log every {LOGGED} pairs. A pair in a pass of our "
        f"own (`evaluate_pairs`, memorization) takes {own_pass:.2f} ms."
    )
