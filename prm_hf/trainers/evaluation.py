"""The exact metrics of an evaluation, which the trainers compute from TRL's own forward passes."""

import contextlib
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers.integrations.liger import apply_liger_kernel
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from ..metrics import ParameterDrift, SequenceEvaluation
from ..metrics.evaluation import check_parallelism, evaluations_of, score_rows
from ..metrics.forward import captured_hidden_states
from .averages import Step, Weights, even_dataloader, even_steps, goes_through_all_rows
from .callbacks import DriftCallback, DriftStart


class EvaluationMixin:
    """Mixin for TRL's trainers, to be listed before the trainer in a class' bases.

    The metrics of an evaluation carry the prefix of their split, in the log as in the returned dict. (TRL names those
    of every split of a dict of datasets `eval_*`, so that the last split stands for all.)

    With `args.drift_metrics` the class measures a split in `_split_metrics(dataloader, prefix)`, which returns a dict
    of numbers by their names in `prm_hf.metrics`; it may extend `_run_metrics()`, what is measured once an evaluation.

    If the class sets `_rows_are_apart`, the scores of a batch are computed from the hidden states of TRL's forward
    passes. Such a class sets how many sequences a row has, and how many of the passes over policy and reference TRL
    makes. It may run the missing passes in `_run_more`, and restore the shape of the states in `_unpack`.

    Attributes:
        last_eval_metrics (`dict[str, float]`):
            What the last evaluation returned, all splits together.
        parameter_drift ([`~prm_hf.metrics.ParameterDrift`], *optional*):
            The weights before training, if `drift/params_rel` is measured.
    """

    _rows_are_apart = False
    _sequences_per_row = 1
    _passes_of_trl = 1

    def _set_up_evaluation(self) -> None:
        self.last_eval_metrics: dict[str, float] = {}
        self._evaluated_step: int | None = None
        self._is_evaluating = False
        # The prefix of the current evaluation, until the metrics of the run (not of a split) have been measured
        self._run_prefix: str | None = None
        self._weights = {"train": Weights(), "eval": Weights()}
        # The steps of the current evaluation that are still to come, where several processes share its rows evenly
        self._steps: list[Step] | None = None
        # The scores of the current evaluation: one tensor a batch, as `score_rows` returns it
        self._scores: list[torch.Tensor] | None = None
        self._logits_are_checked = False
        self._copies = 1
        self.parameter_drift = None
        if self.args.drift_metrics and self.eval_dataset is not None:
            if self.is_fsdp_enabled and (version := self.accelerator.state.fsdp_plugin.fsdp_version) != 2:
                raise ValueError(
                    f"`drift_metrics` needs FSDP version 2, got version {version}. Set `fsdp_version: 2`, or "
                    "`drift_metrics=False`."
                )
            if any(p.requires_grad for p in self.model.parameters()):
                self.parameter_drift = ParameterDrift(self.model, self.accelerator)
        self.add_callback(DriftStart())
        # First: at the end of training it evaluates, and then the callbacks of trackers end their runs
        self.callback_handler.callbacks.insert(0, DriftCallback(self))

    def train(self, *args, **kwargs) -> TrainOutput:
        if self.args.use_liger_kernel and self.ref_model is not None:
            # `super().train` gives the kernels to the model alone, and a difference in rounding would look like drift
            apply_liger_kernel(self.accelerator.unwrap_model(self.ref_model), self.args.liger_kernel_config)
        return super().train(*args, **kwargs)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        if self._is_evaluating:  # one split of several, called from within the evaluation of all
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        self._is_evaluating, self._run_prefix = True, metric_key_prefix
        try:
            metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        finally:
            self._is_evaluating, self._run_prefix = False, None
        self.last_eval_metrics = dict(metrics)
        if eval_dataset is None:
            self._evaluated_step = self.state.global_step
        return metrics

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        measured = self._is_evaluating and self.args.drift_metrics
        shares_passes = measured and self._rows_are_apart and not self.args.torch_compile
        in_order = goes_through_all_rows(dataloader)
        if shares_passes and in_order:
            check_parallelism(self.model_wrapped, self.accelerator)
            self._scores = []
        try:
            evaluated = self._shared_evenly(dataloader) if in_order else dataloader
            arguments = evaluated, description, prediction_loss_only, ignore_keys, metric_key_prefix
            output = super().evaluation_loop(*arguments)
            # Take over what TRL collected in this loop, before its `log` names it "eval_" whatever the split is
            self._weights["eval"].average(self._metrics["eval"])
            metrics = {name: sum(values) / len(values) for name, values in self._metrics["eval"].items()}
            self._metrics["eval"].clear()
            if measured:
                metrics |= self._split_metrics(dataloader, metric_key_prefix)
        finally:
            self._scores = self._steps = None
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        if self._run_prefix is not None and self.args.drift_metrics:
            run_metrics = self._run_metrics()
            output.metrics.update({f"{self._run_prefix}_{name}": value for name, value in run_metrics.items()})
            self._run_prefix = None
        return output

    def _shared_evenly(self, dataloader: Any) -> Any:
        """The dataloader, or if several processes share its rows one in which each row counts once."""
        accelerator = self.accelerator
        # `compute_metrics` needs the predictions that transformers gathers, and there are none of extra rows
        if accelerator.num_processes == 1 or accelerator.parallelism_config or self.compute_metrics:
            return dataloader
        sizes = len(dataloader.dataset), self.args.per_device_eval_batch_size
        self._steps = even_steps(*sizes, accelerator.num_processes, accelerator.process_index)
        return even_dataloader(dataloader, self._steps, accelerator, self.args.dataloader_num_workers)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> tuple:
        step = self._steps.pop(0) if self._steps else None
        self._copies = 1 if step is None else step.copies
        if self._scores is None:
            outputs = super().prediction_step(model, inputs, *args, **kwargs)
        else:
            outputs, scores = self._predict_and_score(model, inputs, *args, **kwargs)
            if self.accelerator.num_processes > 1:
                scores = scores.to(self.accelerator.device)
            gathered = self.accelerator.gather_for_metrics(scores)
            self._scores.append(gathered if step is None else gathered[: step.n_rows])
        # The mean of each process' batch, which counts as many rows or tokens as it has
        loss = outputs[0].float()
        weight = self._batch_weights(inputs)[""].to(loss)
        sums = self.accelerator.gather(torch.stack([loss * weight, weight])[None]).sum(0)
        self._metrics["eval"]["loss"].append((sums[0] / sums[1].clamp(min=1)).item())
        return outputs

    def _predict_and_score(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> tuple:
        """TRL's step, and the scores of its rows."""
        inputs = self._prepare_inputs(inputs)
        models = [m for m in (model, self.ref_model) if m is not None]
        # Outside of `train`, TRL evaluates the reference in mixed precision and the policy in full precision
        autocast = contextlib.nullcontext() if self.is_in_train else self.accelerator.autocast()
        with captured_hidden_states(models, self.accelerator) as hidden:
            with autocast:
                outputs = super().prediction_step(model, dict(inputs), *args, **kwargs)
            passes = self._passes_of_trl
            del hidden[passes:]  # `compute_metrics` has the policy run once more
            passes += self._run_more(model, inputs)
        is_first, self._logits_are_checked = not self._logits_are_checked, True
        if is_first or len(hidden) < passes:
            # `score_rows` then runs its own passes, which return logits to compare with and see compiled models too
            hidden = []
        hidden = [self._unpack(states, inputs) for states in hidden]
        sequences = self._sequences_per_row
        return outputs, score_rows(model, self.ref_model, inputs, self.accelerator, sequences, hidden, check=is_first)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> Any:
        # TRL collects a mean a batch, and then takes the mean of these, whatever the batches hold
        is_training = self.model.training
        copies = 1 if is_training else self._copies
        self._weights["train" if is_training else "eval"].add(self._batch_weights(inputs), self.accelerator, copies)
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _batch_weights(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What the means of a batch count, by name of the metric; `""` for the loss and all others."""
        return {"": (inputs["labels"][..., 1:] != -100).sum()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        self._weights[mode].average(self._metrics[mode])
        super().log(logs, start_time)

    def _run_more(self, model: nn.Module, inputs: dict[str, Any]) -> int:
        """Runs the passes that TRL leaves out, in the way that TRL runs its own; returns their number."""
        return 0

    def _unpack(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Returns the hidden states in the shape of the batch."""
        return hidden

    def _has_reference(self) -> bool:
        return self.ref_model is not None or is_peft_model(self.model)

    def _shared_tables(self) -> list[SequenceEvaluation] | None:
        """Returns a table for each sequence of a row; None if hooks or the dataloader did not yield all rows."""
        return None if self._scores is None else evaluations_of(torch.cat(self._scores).cpu(), self._has_reference())

    def _run_metrics(self) -> dict[str, float]:
        if self.parameter_drift is None:
            return {}
        return {"drift/params_rel": self.parameter_drift.relative(self.model_wrapped)}

    def weights_are_evaluated(self) -> bool:
        """Whether the last evaluation of `eval_dataset` was of the weights that training ends with."""
        step = self.state.global_step
        older_loaded = self.args.load_best_model_at_end and self.state.best_global_step not in (None, step)
        return self._evaluated_step == step and not older_loaded
