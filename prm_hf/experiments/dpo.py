"""DPO on preferences with flipped labels: `prm-hf dpo`, and recipes/dpo_noisy.py, which has the commands."""

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from transformers import TrainerCallback

from .. import PRMDPOConfig, PRMDPOTrainer, flip_preferences
from ..metrics import PairEvaluation, preference_scores, reward_margins
from ..runs.methods import FLIP, SOFT, Method, find_method
from ..runs.read import read_json
from ..runs.write import RunSpec, evaluation_metrics, write_json
from ..suspects.repair import repair
from ..sven.checks import check_pair_arguments
from ..trainers.checks import check_losses
from ..trainers.pair_losses import check_swappable
from . import interruptible
from .baselines import PAIR_LOSSES, check_pair_loss, set_pair_loss, votes
from .data import Data
from .experiment import BUILT_IN, Experiment
from .rows import Columns
from .runner import run_comparisons
from .selection import mislabelled
from .solve import SolveArguments, Solving
from .sven import SVEN, trainer_class


EARLY_STOPPING = ("early_stopping", CLEAN := "early_stopping_clean")
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
VALIDATION_EVERY = 10  # one training pair of ten is kept for validation


class KeepBest(TrainerCallback):
    """Remembers the evaluation with the smallest DPO loss on `rows`, as keeping the best weights would.

    It is kept in the `folder` as `best.json`, so that a resumed run knows it.
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
        accuracy = preference_scores(margins).mean().item()
        self.trainer.log({"eval_validation/loss": loss, "eval_validation/accuracies": accuracy})
        if loss < self.best.get("loss", float("inf")):
            found = {**evaluation_metrics(metrics), "validation/accuracies": accuracy, "steps": state.global_step}
            self.best = {"loss": loss, "metrics": found, "margins": margins_of(self.trainer)}
            if state.is_world_process_zero:
                write_json(self.file, self.best)


def margins_of(trainer: PRMDPOTrainer) -> dict[str, list]:
    """One number for each pair of the last evaluation: beta times the difference of the log-ratios."""

    def rounded(pairs: PairEvaluation) -> list[float]:
        # Six digits, whatever the size: a small margin must not become a tie
        return [float(f"{x:.6g}") for x in reward_margins(pairs, trainer.beta).tolist()]

    tables = trainer.pair_evaluations
    if "train" not in tables:
        return {"heldout": rounded(tables["eval"])}
    flipped = trainer.train_dataset.select(trainer.memorization_rows)["flipped"][:]
    return {"heldout": rounded(tables["eval"]), "train": rounded(tables["train"]), "train_flipped": flipped}


class DPOExperiment(Experiment):
    """DPO on preference pairs, of which a share is flipped for training."""

    command = "dpo"
    description = (
        "DPO on preferences of which a share is flipped: PRM against AdamW, at each learning rate and seed. Without "
        "--dataset_name it is the built-in task, with the defaults below."
    )
    task = "preferences"
    output_dir = "runs/dpo_noisy"
    arguments_class = SolveArguments
    config_class = PRMDPOConfig
    has_pairs = True
    built_in: ClassVar[dict[str, Any]] = {
        **BUILT_IN,
        "beta": 0.1,
        "learning_rate": 3.2e-4,
        "workers": 2,
    }

    @functools.cached_property
    def solving(self) -> Solving:
        return Solving(self.script_args)

    def settings(self) -> dict[str, Any]:
        return self.solving.settings()

    def unused_arguments(self) -> dict[str, str]:
        return self.script_args.unused_arguments()

    def columns(self) -> Columns:
        return Columns("prompt", ("chosen", "rejected"), needs_prompt=False, advice="Rename yours in the dataset.")

    def check_method(self, method: Method, config: PRMDPOConfig) -> None:
        """What TRL says once the model and the references are there."""
        check_pair_loss(method, config)
        if method.key in PAIR_LOSSES or method.repair == SOFT:
            check_swappable(config, f"`{method.key}`", "leave it out of `methods`")
        self.script_args.check_method(method, config)
        if method.key == SVEN:
            check_pair_arguments(config)
        check_losses(config.loss_type)
        if "exo_pair" in config.loss_type and not config.label_smoothing:
            raise ValueError("`loss_type` is 'exo_pair', which needs a `label_smoothing` above 0, as 1e-3.")
        for name, known in (("truncation_mode", ("keep_start", "keep_end")), ("f_divergence_type", DIVERGENCES)):
            if getattr(config, name) not in known:
                raise ValueError(f"`{name}` is {getattr(config, name)!r}: it must be {' or '.join(known)}.")

    def check_rows(self, data: Data) -> None:
        try:
            flip_preferences(data.train.select([0]), 0.5)
        except ValueError as error:
            raise ValueError(f"The training rows of {data.dataset_name} cannot be flipped. {error}") from error
        self.solving.check(data.train, self.columns())

    def prepare(self, data: Data) -> Data:
        """The tokenizer, and the rows tokenized, with the reference's log-probabilities: the same for all runs.

        TRL computes them, and keeps them in the datasets' cache. Where several processes train one run, each run
        computes its own: TRL's processes find each other's cache only for datasets that are files on a disk that they
        share.
        """
        config = copy.deepcopy(self.training_args)
        if config.world_size > 1 or config.deepspeed_plugin is not None or config.sync_ref_model:
            return data
        config.precompute_ref_log_probs, config.drift_metrics, config.optim = True, False, "adamw_torch"
        trainer = self._trainer(config, data, data.train)
        shared = {"train": trainer.train_dataset, "heldout": trainer.eval_dataset}
        return dataclasses.replace(data, **shared, processing_class=trainer.processing_class)

    def noisy_rows(self, spec: RunSpec, data: Data) -> Dataset:
        train = mislabelled(data.train, spec)
        if find_method(spec.method).key != "vote":
            return train
        return repair(train, [float(outvoted) for outvoted in votes(train, data.train_groups)], FLIP)[0]

    def make_trainer(self, config: PRMDPOConfig, spec: RunSpec, data: Data) -> PRMDPOTrainer:
        train = self.noisy_rows(spec, data) if data.given is None else data.given
        if spec.method not in EARLY_STOPPING:
            trainer = self._trainer(config, data, train, trainer_class(PRMDPOTrainer, spec.method))
            set_pair_loss(trainer, find_method(spec.method))
            if "fold" not in spec.settings:
                self.solving.before(trainer, data.model_key)
            return trainer
        kept = range(0, len(train), VALIDATION_EVERY)
        validation = (data.train if spec.method == CLEAN else train).select(kept)
        train = train.select([i for i in range(len(train)) if i not in kept])
        trainer = self._trainer(config, data, train)
        trainer.add_callback(KeepBest(trainer, validation, Path(config.output_dir)))
        return trainer

    def _trainer(
        self, config: PRMDPOConfig, data: Data, train: Dataset, kind: type[PRMDPOTrainer] = PRMDPOTrainer
    ) -> PRMDPOTrainer:
        return kind(
            model=data.model,
            args=config,
            train_dataset=train,
            eval_dataset=data.heldout,
            processing_class=data.processing_class,
            **self.model_settings(),
        )

    def outcomes(self, trainer: PRMDPOTrainer, data: Data) -> tuple[dict[str, float], dict[str, list]]:
        """The margins of the end, or with early stopping metrics and margins of the evaluation that it chooses."""
        chosen = [c.best for c in trainer.callback_handler.callbacks if isinstance(c, KeepBest)]
        if chosen:
            return chosen[0]["metrics"], chosen[0]["margins"]
        solved, by_problem = self.solving.outcomes(trainer, data.model_key)
        return solved, {**margins_of(trainer), **by_problem}


@interruptible
def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit code of [`run_comparisons`]."""
    return run_comparisons(DPOExperiment, arguments)
