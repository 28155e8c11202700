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
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import ModelConfig, get_peft_config, get_quantization_config

from .. import PRMDPOConfig, PRMDPOTrainer, flip_preferences
from ..metrics import PairEvaluation, reward_margins
from .arguments import BuiltIn, ComparisonArguments, Data, parse_arguments
from .controls import OPTIMIZERS
from .run_folder import evaluation_metrics, read_json, write_json
from .runner import Recipe, RunSpec, run_comparisons


def methods(noise_rate: float) -> dict[str, dict[str, Any]]:
    """What a method changes in the configuration. The losses that answer the same noise are told its true rate."""
    # TRL's "sigmoid" loss ignores `label_smoothing`. cDPO with noise rate e is its "robust" loss at -e/(1-2e): the
    # same weights on the two labels, up to no factor at all.
    adamw, noise_aware = OPTIMIZERS["adamw"], {}
    if 0 < noise_rate < 0.5:
        smoothing = -noise_rate / (1 - 2 * noise_rate)
        noise_aware = {
            "cdpo": {**adamw, "loss_type": ["robust"], "label_smoothing": smoothing},
            "robust": {**adamw, "loss_type": ["robust"], "label_smoothing": noise_rate},
        }
    return {
        **OPTIMIZERS,
        **noise_aware,
        "ipo": {**adamw, "loss_type": ["ipo"]},
        **{method: {**adamw, "eval_strategy": "steps", "eval_steps": 0.1} for method in EARLY_STOPPING},
    }


# AdamW as it was at the evaluation at which validation pairs had the smallest loss: pairs as noisy as those that are
# trained on, and the same pairs with their clean labels, which shows what better labels would be worth.
EARLY_STOPPING = ("early_stopping", CLEAN := "early_stopping_clean")
VALIDATION_EVERY = 10  # of so many training pairs one is kept for validation


class KeepBest(TrainerCallback):
    """Remembers the evaluation at which the DPO loss on `rows` was smallest: what keeping the best weights would give.

    Args:
        trainer: the trainer that it is added to.
        rows: validation pairs, prepared or not.
        folder: where `best.json` is kept, so that a resumed run knows it.
    """

    def __init__(self, trainer: PRMDPOTrainer, rows: Dataset, folder: Path) -> None:
        self.trainer, self.rows = trainer, rows
        self.file = folder / "best.json"
        self.best: dict[str, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step > 0:
            self.best = read_json(self.file) or {}

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        margins = reward_margins(self.trainer.evaluate_pairs(self.rows), self.trainer.beta)
        loss = -torch.nn.functional.logsigmoid(margins).mean().item()
        accuracy = (margins > 0).double().mean().item()
        self.trainer.log({"eval_validation/loss": loss, "eval_validation/accuracies": accuracy})
        if loss < self.best.get("loss", float("inf")):
            found = {**evaluation_metrics(metrics), "validation/accuracies": accuracy, "steps": state.global_step}
            self.best = {"loss": loss, "metrics": found, "margins": margins_of(self.trainer)}
            if state.is_world_process_zero:
                write_json(self.file, self.best)


def make_built_in(seed: int) -> tuple[str, Dataset, Dataset]:
    from ..demo import build_demo

    demo = build_demo(seed)
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


def parse(
    arguments: list[str], known: Iterable[str] = tuple(methods(0.3)), output_dir: str = "runs/dpo_noisy"
) -> tuple[ComparisonArguments, PRMDPOConfig, ModelConfig]:
    script_args, training_args, model_args = parse_arguments(
        arguments, ComparisonArguments, PRMDPOConfig, list(known), output_dir, BUILT_IN
    )
    if {"cdpo", "robust"} & set(script_args.methods) and not any(0 < r < 0.5 for r in script_args.noise_rate):
        raise ValueError(
            f"`cdpo` and `robust` need a noise rate between 0 and 0.5, got `noise_rate` {script_args.noise_rate}: "
            "leave them out of `methods`."
        )
    return script_args, training_args, model_args


def margins_of(trainer: PRMDPOTrainer) -> dict[str, list]:
    """Of the last evaluation one number a pair, for paired statistics: beta times the difference of the log-ratios."""

    def rounded(pairs: PairEvaluation) -> list[float]:
        return [round(x, 6) for x in reward_margins(pairs, trainer.beta).tolist()]

    tables = trainer.pair_evaluations
    result = {"heldout": rounded(tables["eval"])}
    if "train" in tables:
        rows = trainer.memorization_rows
        result["train"] = rounded(tables["train"])
        result["train_flipped"] = trainer.train_dataset.select(rows)["flipped"][:]
    return result


def outcomes(trainer: PRMDPOTrainer, data: Data) -> tuple[dict[str, float], dict[str, list]]:
    """The margins of the end, or with early stopping metrics and margins of the evaluation that it chooses."""
    chosen = [c.best for c in trainer.callback_handler.callbacks if isinstance(c, KeepBest)]
    return (chosen[0]["metrics"], chosen[0]["margins"]) if chosen else ({}, margins_of(trainer))


def prepare(data: Data, config: PRMDPOConfig, model_args: ModelConfig) -> Data:
    """The tokenizer, and the rows tokenized, with the reference's log-probabilities: the same for all runs.

    TRL computes them, and keeps them in the datasets' cache. Where several processes train one run, each run computes
    its own: TRL's processes find each other's cache only for datasets that are files on a disk that they share.
    """
    if config.world_size > 1 or config.deepspeed_plugin is not None or config.sync_ref_model:
        return data
    config = copy.deepcopy(config)
    config.precompute_ref_log_probs, config.drift_metrics, config.optim = True, False, "adamw_torch"
    trainer = make_trainer(config, data, data.train, model_args)
    shared = {"train": trainer.train_dataset, "heldout": trainer.eval_dataset}
    return dataclasses.replace(data, **shared, processing_class=trainer.processing_class)


def make_trainer(config: PRMDPOConfig, data: Data, train: Dataset, model_args: ModelConfig) -> PRMDPOTrainer:
    return PRMDPOTrainer(
        model=data.model,
        args=config,
        train_dataset=train,
        eval_dataset=data.heldout,
        processing_class=data.processing_class,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


def make_recipe(script_args: ComparisonArguments, model_args: ModelConfig) -> Recipe:
    def trainer_of(config: PRMDPOConfig, spec: RunSpec, data: Data) -> PRMDPOTrainer:
        train, validation = flip_preferences(data.train, spec.settings["noise_rate"], seed=spec.seed), None
        if spec.method in EARLY_STOPPING:
            kept = range(0, len(train), VALIDATION_EVERY)
            validation = (data.train if spec.method == CLEAN else train).select(kept)
            train = train.select([i for i in range(len(train)) if i not in kept])
        trainer = make_trainer(config, data, train, model_args)
        if validation is not None:
            trainer.add_callback(KeepBest(trainer, validation, Path(config.output_dir)))
        return trainer

    return Recipe(
        built_in=BUILT_IN,
        methods=methods,
        prepare=lambda data, config: prepare(data, config, model_args),
        make_trainer=trainer_of,
        outcomes=outcomes,
        info={"task": "preferences"},
        settings={},
    )


def main(arguments: list[str]) -> int:
    script_args, training_args, model_args = parse(arguments)
    return run_comparisons(script_args, training_args, model_args, make_recipe(script_args, model_args))
