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

import copy
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from comparison import Comparison, ComparisonArguments, RunSpec, is_prm, load_split, settings_of, show_progress
from datasets import disable_progress_bars
from transformers.utils import logging
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from prm_hf import PRMDPOConfig, PRMDPOTrainer, flip_preferences
from prm_hf.compare import load_runs


# What a method changes in the configuration. The losses that answer the same noise are told its true rate.
METHODS = {
    "adamw": lambda noise_rate: {"optimizer_name": "adamw"},
    "prm_per_tensor": lambda noise_rate: {"prm_reduction": "per_tensor", "prm_estimator": "ema"},
    "prm_per_param": lambda noise_rate: {"prm_reduction": "per_param", "prm_estimator": "ema"},
    "prm_debiased": lambda noise_rate: {"prm_reduction": "per_tensor", "prm_estimator": "debiased"},
    "prm_debiased_per_param": lambda noise_rate: {"prm_reduction": "per_param", "prm_estimator": "debiased"},
    # TRL's "sigmoid" loss ignores `label_smoothing`. cDPO with noise rate e is its "robust" loss at -e/(1-2e): the
    # same weights on the two labels, up to no factor at all.
    "cdpo": lambda noise_rate: {
        "optimizer_name": "adamw",
        "loss_type": ["robust"],
        "label_smoothing": -noise_rate / (1 - 2 * noise_rate),
    },
    "robust": lambda noise_rate: {
        "optimizer_name": "adamw",
        "loss_type": ["robust"],
        "label_smoothing": noise_rate,
    },
    "ipo": lambda noise_rate: {"optimizer_name": "adamw", "loss_type": ["ipo"]},
}
# AdamW with the step that a PRM run took on average: whether it is the selection that helps, or the smaller step.
CONSTANT_Q = "constant_q"

BUILT_IN = {
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
}
BUILT_IN_BATCH = 16


def parse(arguments: list[str]) -> tuple[ComparisonArguments, PRMDPOConfig, ModelConfig]:
    parser = TrlParser((ComparisonArguments, PRMDPOConfig, ModelConfig))
    parser.set_defaults(output_dir="runs/dpo_noisy", report_to="none")
    if not any(argument.split("=")[0] in ("--dataset_name", "--config") for argument in arguments):
        world_size = int(os.environ.get("WORLD_SIZE", "1"))
        if BUILT_IN_BATCH % world_size:
            raise ValueError(
                f"The built-in task has {BUILT_IN_BATCH} pairs a step, which {world_size} processes cannot share "
                "evenly. Launch 1, 2, 4, 8 or 16."
            )
        parser.set_defaults(**BUILT_IN, per_device_train_batch_size=BUILT_IN_BATCH // world_size)
    script_args, training_args, model_args = parser.parse_args_and_config(arguments)
    script_args.check([*METHODS, CONSTANT_Q], training_args.learning_rate)
    if {"cdpo", "robust"} & set(script_args.methods) and not 0 < script_args.noise_rate < 0.5:
        raise ValueError(
            f"`cdpo` and `robust` need a `noise_rate` between 0 and 0.5, got {script_args.noise_rate}: leave them "
            "out of `methods`."
        )
    if script_args.dataset_name is None and model_args.model_name_or_path is not None:
        raise ValueError(
            "`--model_name_or_path` needs a `--dataset_name`: the built-in task has a vocabulary of its own, and a "
            "model that comes with it."
        )
    if script_args.dataset_name is not None and model_args.model_name_or_path is None:
        raise ValueError("`--dataset_name` needs a `--model_name_or_path`: the model to train.")
    return script_args, training_args, model_args


def load_data(script_args: ComparisonArguments, model_args: ModelConfig) -> tuple[str, str, Any, Any]:
    """Name or path of the model, name of the dataset, and the splits to train on and to hold out."""
    if script_args.dataset_name is None:
        from prm_hf.demo import build_demo

        if PartialState().is_main_process:
            print(
                "Built-in task: the reference policy is trained now, for about 30 s, unless it is cached.", flush=True
            )
        demo = build_demo()
        return demo.model_path, "built-in", demo.train, demo.test
    name, config = script_args.dataset_name, script_args.dataset_config
    train = load_split(name, config, script_args.dataset_train_split)
    other = script_args.eval_dataset_name
    heldout = load_split(other or name, None if other else config, script_args.dataset_test_split)
    return model_args.model_name_or_path, name, train, heldout


def main(arguments: list[str]) -> None:
    script_args, training_args, model_args = parse(arguments)
    model, dataset, train_dataset, eval_dataset = load_data(script_args, model_args)
    built_in = script_args.dataset_name is None
    logging.set_verbosity_error()
    if built_in:  # many short bars for a tiny model and a tiny dataset
        logging.disable_progress_bar()
        disable_progress_bars()

    def configure(method: str, overrides: dict[str, Any]) -> PRMDPOConfig:
        config = copy.deepcopy(training_args)
        config.optimizer_name = "prm"
        for key, value in (METHODS[method](script_args.noise_rate) | overrides).items():
            setattr(config, key, value)
        return config

    def specify(method: str, learning_rate: float, seed: int, **extra: Any) -> RunSpec:
        base = "adamw" if method == CONSTANT_Q else method
        config = configure(base, {})
        settings = settings_of(
            config,
            noise_rate=script_args.noise_rate,
            model="built-in" if built_in else model,
            dataset=dataset,
            train_split=None if built_in else script_args.dataset_train_split,
            test_split=None if built_in else script_args.dataset_test_split,
            eval_dataset=script_args.eval_dataset_name,
            train_pairs=len(train_dataset),
            heldout_pairs=len(eval_dataset),
            **{f"model_{key}": value for key, value in vars(model_args).items() if key != "model_name_or_path"},
            **extra,
        )
        return RunSpec(method, learning_rate, seed, settings)

    def train_run(spec: RunSpec, folder: Path, resume: bool) -> PRMDPOTrainer:
        base = "adamw" if spec.method == CONSTANT_Q else spec.method
        place = {"output_dir": str(folder), "learning_rate": spec.learning_rate, "seed": spec.seed}
        config = configure(base, place)
        config.model_init_kwargs = {
            "revision": model_args.model_revision,
            "attn_implementation": model_args.attn_implementation,
            "dtype": model_args.dtype,
            **(config.model_init_kwargs or {}),
        }
        trainer = PRMDPOTrainer(
            model=model,
            args=config,
            train_dataset=flip_preferences(train_dataset, script_args.noise_rate, seed=spec.seed),
            eval_dataset=eval_dataset,
            quantization_config=get_quantization_config(model_args),
            peft_config=get_peft_config(model_args),
        )
        show_progress(trainer, spec.name)
        trainer.train(resume_from_checkpoint=resume or None)
        if config.save_strategy != "no":
            trainer.save_model(str(folder))
        return trainer

    grids = {
        method: script_args.prm_learning_rates if is_prm(method) else script_args.learning_rates
        for method in script_args.methods
        if method != CONSTANT_Q
    }
    n_runs = (sum(map(len, grids.values())) + (CONSTANT_Q in script_args.methods)) * len(script_args.seeds)
    info = {"noise_rate": script_args.noise_rate, "model": "built-in" if built_in else model, "dataset": dataset}
    comparison = Comparison(training_args.output_dir, train_run, info, n_runs)

    specs = {}
    accuracy = {}
    for method, grid in grids.items():
        for learning_rate in grid:
            for seed in script_args.seeds:
                spec = specify(method, learning_rate, seed)
                specs[spec.name] = spec
                metrics = comparison.run(spec)
                accuracy.setdefault((method, learning_rate), []).append(metrics["rewards/accuracies"])

    if CONSTANT_Q in script_args.methods:
        prm_rows = {row: sum(values) / len(values) for row, values in accuracy.items() if is_prm(row[0])}
        method, learning_rate = max(prm_rows, key=prm_rows.get)
        for seed in script_args.seeds:
            source = specify(method, learning_rate, seed)
            (run,) = load_runs(comparison.output_dir / source.name)
            constant = {"of": source.name, "mean_q": run.mean_q}
            comparison.run(specify(CONSTANT_Q, learning_rate * run.mean_q, seed, constant_q=constant))

    comparison.report()


if __name__ == "__main__":
    main(sys.argv[1:])
