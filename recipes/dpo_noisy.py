"""DPO on preferences with flipped labels: PRM against AdamW, compared fairly.

The built-in task, on two CPU cores, in minutes:

    accelerate launch recipes/dpo_noisy.py

A model and a dataset of your own:

    accelerate launch recipes/dpo_noisy.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized \
        --noise_rate 0.3 --seeds 0 1 2 \
        --methods adamw prm_per_tensor prm_debiased constant_q cdpo robust \
        --learning_rates 1e-7 2.5e-7 5e-7 --prm_learning_rates 1e-6 2.5e-6 5e-6 \
        --output_dir runs/ultrafeedback

or with everything in a file: `--config recipes/qwen2.5-0.5b/dpo_noisy.yaml`. All flags of `PRMDPOConfig` and TRL's
`ModelConfig` work. Finished runs are not repeated; `prm-hf compare runs/…` prints the table again.
"""

import sys
from typing import Any

from comparison import OPTIMIZERS, BuiltIn, ComparisonArguments, load_data, parse_arguments, run_comparison
from datasets import Dataset
from trl import ModelConfig, get_peft_config, get_quantization_config

from prm_hf import PRMDPOConfig, PRMDPOTrainer, flip_preferences
from prm_hf.metrics import PairEvaluation, reward_margins


def methods(noise_rate: float) -> dict[str, dict[str, Any]]:
    """What a method changes in the configuration. The losses that answer the same noise are told its true rate."""
    # TRL's "sigmoid" loss ignores `label_smoothing`. cDPO with noise rate e is its "robust" loss at -e/(1-2e): the
    # same weights on the two labels, up to no factor at all.
    smoothing = -noise_rate / (1 - 2 * noise_rate) if noise_rate != 0.5 else None
    adamw = OPTIMIZERS["adamw"]
    return {
        **OPTIMIZERS,
        "cdpo": {**adamw, "loss_type": ["robust"], "label_smoothing": smoothing},
        "robust": {**adamw, "loss_type": ["robust"], "label_smoothing": noise_rate},
        "ipo": {**adamw, "loss_type": ["ipo"]},
    }


def make_built_in() -> tuple[str, Dataset, Dataset]:
    from prm_hf.demo import build_demo

    demo = build_demo()
    return demo.model_path, demo.train, demo.test


BUILT_IN = BuiltIn(
    settings={
        "num_train_epochs": 10,
        "lr_scheduler_type": "linear",
        "warmup_steps": 16,
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "beta": 0.1,
        "max_length": 64,
        "logging_steps": 10,
        "eval_strategy": "steps",
        "eval_steps": 40,
        "per_device_eval_batch_size": 128,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "learning_rates": [3e-4, 1e-3, 3e-3],
        "prm_learning_rates": [1e-3, 3e-3, 1e-2],
    },
    batch_size=16,
    make=make_built_in,
)


def parse(arguments: list[str]) -> tuple[ComparisonArguments, PRMDPOConfig, ModelConfig]:
    script_args, training_args, model_args = parse_arguments(
        arguments, ComparisonArguments, PRMDPOConfig, list(methods(0.3)), "runs/dpo_noisy", BUILT_IN
    )
    if {"cdpo", "robust"} & set(script_args.methods) and not 0 < script_args.noise_rate < 0.5:
        raise ValueError(
            f"`cdpo` and `robust` need a `noise_rate` between 0 and 0.5, got {script_args.noise_rate}: leave them "
            "out of `methods`."
        )
    return script_args, training_args, model_args


def margins(trainer: PRMDPOTrainer) -> tuple[dict[str, float], dict[str, list]]:
    """One number a pair, for paired statistics: beta times the difference of the log-ratios."""

    def rounded(pairs: PairEvaluation) -> list[float]:
        return [round(x, 6) for x in reward_margins(pairs, trainer.beta).tolist()]

    tables = trainer.pair_evaluations
    result = {"heldout": rounded(tables["eval"])}
    if "train" in tables:
        rows = trainer.memorization_rows
        result["train"] = rounded(tables["train"])
        result["train_flipped"] = trainer.train_dataset.select(rows)["flipped"][:]
    return {}, result


def main(arguments: list[str]) -> None:
    script_args, training_args, model_args = parse(arguments)
    data = load_data(script_args, model_args, BUILT_IN)

    def make_trainer(config: PRMDPOConfig, seed: int) -> PRMDPOTrainer:
        return PRMDPOTrainer(
            model=data.model,
            args=config,
            train_dataset=flip_preferences(data.train, script_args.noise_rate, seed=seed),
            eval_dataset=data.heldout,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )

    run_comparison(
        script_args,
        training_args,
        model_args,
        data,
        methods(script_args.noise_rate),
        make_trainer,
        margins,
        {"task": "preferences"},
    )


if __name__ == "__main__":
    main(sys.argv[1:])
