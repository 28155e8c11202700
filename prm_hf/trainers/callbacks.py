"""Callbacks of a trainer: checks of PRM, early stopping, memorization, and the evaluation at the end."""

import logging
import math
from numbers import Real
from typing import Any

import torch
from datasets import Dataset
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .._names import renamed_arguments, warn_renamed
from ..metrics import evaluate_classes, evaluate_pairs, evaluate_sequences, fit_metrics, memorization_rows, row_fit
from ..metrics.evaluation import rows_of
from ..optim import PRM
from ..sharding.deepspeed import check_config


logger = logging.getLogger(__name__)

# The columns that say which rows of a dataset are noisy: of `prm_hf.noise.corrupt`, and of `flip_preferences`
NOISE_COLUMNS = ("corrupted", "flipped")


def innermost_optimizer(optimizer: Optimizer | None) -> Optimizer | None:
    """The optimizer inside accelerate's and DeepSpeed's wrappers; PRM if it is in there."""
    while not isinstance(optimizer, PRM) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def find_prm(optimizer: Optimizer | None) -> PRM | None:
    """The PRM inside accelerate's and DeepSpeed's wrappers, or None if another optimizer is."""
    optimizer = innermost_optimizer(optimizer)
    return optimizer if isinstance(optimizer, PRM) else None


class PRMCallback(TrainerCallback):
    """Checks when training begins that PRM is the optimizer in effect, and that its masks will be exact.

    After the first step it says how PRM found the tensors. The trainers of this package have it; add it to any other.
    """

    def __init__(self) -> None:
        self._has_told = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs
    ) -> None:
        if args.deepspeed_plugin is not None:
            check_config(args.deepspeed_plugin.deepspeed_config)
        if find_prm(optimizer) is None:
            raise RuntimeError(
                "The run is to train with PRM, but the optimizer in effect is "
                f"{type(innermost_optimizer(optimizer)).__name__}. With DeepSpeed's CPU offload, set "
                '`"zero_force_ds_cpu_optimizer": false`, or accelerate puts its own in the place.'
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs
    ) -> None:
        prm = find_prm(optimizer)
        if self._has_told or prm is None:
            return
        path = prm.describe_sharding()
        if path is not None:  # not yet after a step that was skipped for the overflow of its gradients
            self._has_told = True
            if state.is_world_process_zero:
                processes = "1 process" if args.world_size == 1 else f"{args.world_size} processes"
                logger.warning("PRM trains %s on %s.", path, processes)  # a level that is shown by default


class PopulationRiskStoppingCallback(TrainerCallback):
    """
    Ends training when what is left in the gradients is mostly noise: a criterion that needs no labels.

    For the trainers of this package, with PRM as their optimizer. When an epoch ends in which the mean of the logged
    `mask/snr`, the signal-to-noise ratio pooled over all masked parameters, is below `threshold`, training stops. The
    learning rate's warm-up does not count. A mean of few values decides by chance, so let `logging_steps` be a tenth
    of an epoch or less. Use `prm_estimator="debiased"`, whose ratio goes to 0 where no signal is left; with `"ema"`
    pure noise keeps it at about 1/20. With `prm_reduction="per_row"` the ratio is larger, the more so the shorter the
    rows: look at your logs before you choose `threshold`. A resumed run stops at the same epoch.

    Args:
        threshold (`float`, *optional*, defaults to `0.4`):
            Signal-to-noise ratio, above 0. The default is what served best on the built-in task with
            `prm_reduction="per_tensor"`. In DPO of a model of 0.5 B parameters the ratio of the first epoch was .04 to
            .09 with 30 % of the labels flipped, and .17 to .43 with 10 %: most runs ended there.

    Raises:
        ValueError: `threshold` is not a positive number; PRM is not the optimizer or masks nothing; or `mask/snr` is
            not logged within an epoch.

    Example:

    ```python
    >>> trainer = PRMDPOTrainer(model, args=args, train_dataset=train, callbacks=[PopulationRiskStoppingCallback()])
    ```
    """

    def __init__(self, threshold: float = 0.4):
        valid = isinstance(threshold, Real) and not isinstance(threshold, bool) and 0 < threshold < math.inf
        if not valid:
            raise ValueError(f"`threshold` is a signal-to-noise ratio and must be above 0, got {threshold!r}.")
        self.threshold = threshold

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **kwargs
    ) -> None:
        prm = find_prm(optimizer)
        if prm is None:
            found = type(innermost_optimizer(optimizer)).__name__
            problem = f"the optimizer is {found}: train with `optim='prm'`, or drop the callback"
        elif all(group["mask"] == "none" for group in prm.param_groups):
            problem = "`mask` is 'none': choose another"
        elif args.logging_strategy != "steps":
            found = args.logging_strategy.value
            problem = f"`logging_strategy` is {found!r}: set it to 'steps', and `logging_steps` to several an epoch"
        else:
            return
        raise ValueError(f"`PopulationRiskStoppingCallback` goes by the logged ratios of PRM's mask, and {problem}.")

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        entries = [entry for entry in state.log_history if state.epoch - 1 < entry["epoch"] <= state.epoch]
        logged = [(entry["step"], entry["mask/snr"]) for entry in entries if "mask/snr" in entry]
        if not logged and any("loss" in entry for entry in entries):
            raise ValueError(
                "`PopulationRiskStoppingCallback` goes by `mask/snr`, and this trainer does not log it: use "
                "`PRMDPOTrainer`, `PRMSFTTrainer`, or `PRMTrainerMixin` in a class of your own."
            )
        # The averages of signal and noise form while the learning rate rises. The debiased estimator has neither in
        # the first step.
        warmup = args.get_warmup_steps(state.max_steps)
        logged = [ratio for step, ratio in logged if step > warmup and math.isfinite(ratio)]
        if logged and (mean := sum(logged) / len(logged)) < self.threshold:
            text = "Training stops after %.3g epochs: the gradients' signal-to-noise ratio was %.3g in the last one."
            logger.warning(text, state.epoch, mean)
            control.should_training_stop = True


class PopulationRiskStopping(PopulationRiskStoppingCallback):
    """The old name of [`PopulationRiskStoppingCallback`]."""

    def __init__(self, threshold: float = 0.4):
        warn_renamed("PopulationRiskStopping", "PopulationRiskStoppingCallback")
        super().__init__(threshold)


class MemorizationCallback(TrainerCallback):
    """
    Measures at each evaluation how well corrupted and clean training rows are fitted, and held-out rows beside them.

    For the trainers of classifiers (a model with `logits` of a class each row), SFT and DPO, TRL's own ones included.
    The numbers of [`~prm_hf.metrics.fit_metrics`], of the fit by [`~prm_hf.metrics.row_fit`], are logged and added to
    what `evaluate` returns, as `eval_memorization/…`. All are exact over rows, and collective over processes.

    Args:
        trainer ([`~transformers.Trainer`]):
            The trainer that it is added to. A bool column `corrupted` or `flipped` of its `train_dataset` says which
            rows are noisy; without it all count as clean.
        eval_dataset ([`~datasets.Dataset`], *optional*):
            Held-out rows, as the trainer has them prepared. Defaults to its `eval_dataset`, unless that is a dict.
        memorization_max_rows (`int`, *optional*, defaults to `1024`):
            Number of training rows measured, spread evenly over the training set. `None` for all.

    Example:

    ```python
    >>> trainer = SFTTrainer(model, args=args, train_dataset=corrupt(train, "partial_labels", 0.3), eval_dataset=test)
    >>> trainer.add_callback(MemorizationCallback(trainer))
    ```
    """

    @renamed_arguments(max_rows="memorization_max_rows")
    def __init__(
        self, trainer: Trainer, eval_dataset: Dataset | None = None, memorization_max_rows: int | None = 1024
    ):
        if not isinstance(trainer.train_dataset, Dataset):
            found = type(trainer.train_dataset).__name__
            raise TypeError(f"`trainer.train_dataset` must be a `datasets.Dataset`, got {found}.")
        if memorization_max_rows is not None and memorization_max_rows < 1:
            raise ValueError(f"`memorization_max_rows` must be at least 1, or None, got {memorization_max_rows!r}.")
        self.trainer = trainer
        self.rows = memorization_rows(len(trainer.train_dataset), memorization_max_rows)
        chosen = trainer.train_dataset.select(self.rows)
        column = next((name for name in NOISE_COLUMNS if name in chosen.column_names), None)
        self.corrupted = torch.tensor(chosen.with_format(None)[column][:] if column else [False] * len(chosen))
        if self.corrupted.dtype != torch.bool:
            found = self.corrupted.dtype
            raise ValueError(f"The column {column!r} of `trainer.train_dataset` must be bool, got {found}.")
        if eval_dataset is None and isinstance(trainer.eval_dataset, Dataset):
            eval_dataset = trainer.eval_dataset
        self._datasets = {"train": chosen} | ({} if eval_dataset is None else {"heldout": eval_dataset})
        self._loaders: dict[str, Any] = {}
        self._step: int | None = None
        self._measured: dict[str, float] = {}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        # Raise errors now rather than at the first evaluation
        for name in self._datasets:
            self._first_batch(name)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kwargs
    ) -> None:
        is_other_split = isinstance(self.trainer.eval_dataset, dict) and self._step == state.global_step
        if not is_other_split:
            self._step = state.global_step
            self._measured = {f"eval_{name}": value for name, value in self.measure().items()}
            self.trainer.log(dict(self._measured))
        if metrics is not None:
            metrics.update(self._measured)

    def measure(self) -> dict[str, float]:
        """The metrics of the present weights, by their names without a prefix. Collective."""
        fits = {name: self._fit(name) for name in self._datasets}
        return fit_metrics(fits["train"], self.corrupted, fits.get("heldout"))

    def _first_batch(self, name: str) -> dict[str, torch.Tensor]:
        """The batch of the first row alone. Its shapes say what kind of task it is."""
        if name not in self._loaders:
            self._loaders[name] = self.trainer.get_test_dataloader(self._datasets[name])
        loader = self._loaders[name]
        batch = loader.collate_fn([dict(rows_of(loader)[0])])
        labels = batch.get("labels")
        if labels is not None and (labels.is_floating_point() or labels.dim() > 2):
            raise ValueError(
                "`MemorizationCallback` is for classes, completions and pairs; the `labels` of this trainer are "
                f"{labels.dtype} of shape {tuple(labels.shape)}, a batch of one row. Leave it out."
            )
        return batch

    def _fit(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        trainer, batch = self.trainer, self._first_batch(name)
        loader = self._loaders[name]
        arguments = (trainer.model_wrapped, rows_of(loader), loader.collate_fn, trainer.accelerator)
        batch_size = trainer.args.per_device_eval_batch_size
        if "labels" not in batch:
            pairs = evaluate_pairs(*arguments, ref_model=trainer.ref_model, batch_size=batch_size)
            return row_fit(pairs, trainer.beta)
        if batch["labels"].dim() == 1:
            return row_fit(evaluate_classes(*arguments, batch_size=batch_size))
        # A padding-free batch is one long sequence: taken row by row, its sums are the row's
        batch_size = 1 if getattr(trainer, "padding_free", False) else batch_size
        return row_fit(evaluate_sequences(*arguments, batch_size=batch_size))


class EvaluateAtEndCallback(TrainerCallback):
    """With `drift_metrics`, evaluates when training ends, unless the weights have just been evaluated."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if args.drift_metrics and self.trainer.eval_dataset is not None and not self.trainer.weights_are_evaluated():
            self.trainer.evaluate()
