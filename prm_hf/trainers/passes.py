"""The tables of an evaluation out of the forward passes that TRL makes in it."""

import contextlib
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.utils.data import DataLoader, SequentialSampler
from transformers.trainer_utils import EvalLoopOutput

from ..metrics import SequenceEvaluation
from ..metrics.evaluation import check_parallelism, evaluations_of, score_rows
from ..metrics.forward import captured_hidden_states


class SharedPassesMixin:
    """Mixin for the trainers of this package, to be listed before [`PRMTrainerMixin`] in a class' bases.

    While TRL evaluates a batch, hooks take the last hidden states of its forward passes, and the scores of the batch
    are computed of them right after. Not where a batch does not hold rows one by one, the model is compiled (its
    passes call no hooks), or rows are left out or permuted: then `_shared_tables` gives None.

    The class says how many sequences a row is, how many of the passes over policy and reference TRL makes, and
    whether a batch holds the rows one by one. It may run more passes as TRL does, and change the shape of the states.
    """

    _sequences_per_row = 1
    _passes_of_trl = 1
    _rows_are_apart = True

    def __init__(self, *args, **kwargs):
        # Of an evaluation under way: a tensor a batch, as `score_rows` gives it
        self._scores: list[torch.Tensor] | None = None
        self._logits_are_checked = False
        super().__init__(*args, **kwargs)

    def evaluation_loop(self, dataloader: DataLoader, *args, **kwargs) -> EvalLoopOutput:
        measured = self._is_evaluating and self.args.drift_metrics and self._rows_are_apart
        if measured and not self.args.torch_compile and _goes_through_all_rows(dataloader):
            check_parallelism(self.model_wrapped, self.accelerator)
            self._scores = []
        try:
            return super().evaluation_loop(dataloader, *args, **kwargs)
        finally:
            self._scores = None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> tuple:
        if self._scores is None:
            return super().prediction_step(model, inputs, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        models = [m for m in (model, self.ref_model) if m is not None]
        # Without `train` before it, an evaluation of TRL's runs the reference in mixed precision and the policy not
        autocast = contextlib.nullcontext() if self.is_in_train else self.accelerator.autocast()
        with captured_hidden_states(models, self.accelerator) as hidden:
            with autocast:
                outputs = super().prediction_step(model, dict(inputs), *args, **kwargs)
            passes = self._passes_of_trl
            del hidden[passes:]  # `compute_metrics` has the policy run once more
            passes += self._run_more(model, inputs)
        is_first, self._logits_are_checked = not self._logits_are_checked, True
        if is_first or len(hidden) < passes:
            hidden = []  # passes of our own, which give logits to compare with, and also see a model that is compiled
        scores = score_rows(
            model,
            self.ref_model,
            inputs,
            self.accelerator,
            self._sequences_per_row,
            [self._unpack(states, inputs) for states in hidden],
            check=is_first,
        )
        if self.accelerator.num_processes > 1:
            scores = scores.to(self.accelerator.device)
        self._scores.append(self.accelerator.gather_for_metrics(scores))
        return outputs

    def _run_more(self, model: nn.Module, inputs: dict[str, Any]) -> int:
        """Makes passes that are not TRL's here but are made in its way, and returns their number."""
        return 0

    def _unpack(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        """Hidden states in the shape of the batch."""
        return hidden

    def _has_reference(self) -> bool:
        return self.ref_model is not None or is_peft_model(self.model)

    def _shared_tables(self) -> list[SequenceEvaluation] | None:
        """A table for each sequence of a row, when TRL has gone through all batches."""
        return None if self._scores is None else evaluations_of(torch.cat(self._scores).cpu(), self._has_reference())


def _goes_through_all_rows(dataloader: DataLoader) -> bool:
    """Whether a dataloader of a trainer yields all rows of its dataset, in their order."""
    batches = dataloader.batch_sampler
    while hasattr(batches, "batch_sampler"):  # one for each process is inside
        batches = batches.batch_sampler
    return isinstance(getattr(batches, "sampler", None), SequentialSampler) and not batches.drop_last
