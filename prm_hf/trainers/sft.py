"""Supervised fine-tuning with PRM."""

from dataclasses import fields
from typing import Any

from accelerate.logging import get_logger
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, TrainingArguments
from trl import SFTTrainer
from trl.models import prepare_deepspeed, prepare_fsdp

from ..metrics import SequenceEvaluation, completion_metrics, drift_metrics
from ..metrics.tables import evaluate_rows
from .config import PRMSFTConfig, checked_config
from .mixin import PRMTrainerMixin
from .prepared import warn_of_rows_left_out


logger = get_logger(__name__)


class PRMSFTTrainer(PRMTrainerMixin, SFTTrainer):
    """
    TRL's [`~trl.SFTTrainer`], trained with PRM. ("PRM" is the optimizer here, not a process reward model.)

    With `args.drift_metrics` each evaluation, and one at the end of training, measures on each split of
    `eval_dataset`, over the tokens that the loss is taken on and under the split's prefix, the
    [`~prm_hf.metrics.completion_metrics`] (not with packing, since a row then holds many completions), and how far the
    model has moved from the one that training started from:

    - `drift/params_rel`, once an evaluation, under `eval_`;
    - `drift/kl` and `drift/logratio_abs` (not with packing) on each split, if there is a reference: the base model of
      a PEFT model, or `ref_model` in full fine-tuning.

    [`MemorizationCallback`] measures how much of corrupted training rows is learnt by heart.

    The arguments are those of [`~trl.SFTTrainer`], with a [`PRMSFTConfig`] as `args`, and `ref_model`, the model to
    measure drift from: usually a second copy of `model` as it is before training. Of [`~trl.SFTConfig`] and plain
    [`~transformers.TrainingArguments`], which TRL's trainer takes, a [`PRMSFTConfig`] is made that trains with PRM
    unless they name an optimizer other than their default.

    Attributes:
        sequence_evaluations (`dict[str, SequenceEvaluation]`):
            The tables behind the metrics of the last evaluation, on the CPU, the same on all processes: one a split
            by its prefix (`"eval"` or `"eval_<split>"`).
    """

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        args: PRMSFTConfig | TrainingArguments | None = None,
        *positional,
        ref_model: PreTrainedModel | None = None,
        **kwargs,
    ):
        args = checked_config(_with_prm(args), PRMSFTConfig, model, "SFT")
        if ref_model is not None and ref_model is model:
            raise ValueError("`ref_model` is `model` itself, which moves in training: pass a copy of it.")
        if ref_model is not None and not args.drift_metrics:
            raise ValueError("`ref_model` only serves `drift_metrics`, which is False: set it, or drop the model.")
        super().__init__(model, args, *positional, **kwargs)
        self.sequence_evaluations: dict[str, SequenceEvaluation] = {}

        if ref_model is None:
            self.ref_model = None
        elif self.is_deepspeed_enabled:
            self.ref_model = prepare_deepspeed(ref_model, self.accelerator)
        elif self.is_fsdp_enabled:
            self.ref_model = prepare_fsdp(ref_model, self.accelerator)
        else:
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)
        if args.drift_metrics and self.eval_dataset is not None and not self._has_reference():
            logger.warning(
                "`drift/kl` and `drift/logratio_abs` are not measured, because full fine-tuning keeps no model to "
                "compare with. To measure them, pass `ref_model`."
            )

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        arguments = processing_class, args, packing, formatting_func, dataset_name
        prepared = super()._prepare_dataset(dataset, *arguments)
        if isinstance(dataset, Dataset) and not packing and (n_left_out := len(dataset) - len(prepared)):
            found = [f"{n_left_out} with no token to learn in what `max_length={args.max_length}` leaves of them"]
            warn_of_rows_left_out(dataset_name, "rows", len(dataset), len(prepared), found)
        return prepared

    @property
    def _packs(self) -> bool:
        return self.args.packing if self.args.eval_packing is None else self.args.eval_packing

    @property
    def _rows_are_apart(self) -> bool:
        return not self.padding_free and not self._packs

    def evaluate_sequences(self, dataloader: DataLoader) -> SequenceEvaluation:
        """Evaluates the model, and the reference if there is one, on the rows of a dataloader. Collective."""
        return evaluate_rows(self, dataloader)

    def _split_metrics(self, dataloader: DataLoader, prefix: str) -> dict[str, float]:
        if self._packs and not self._has_reference():
            return {}
        tables = self._shared_tables()
        table = self.evaluate_sequences(dataloader) if tables is None else tables[0]
        self.sequence_evaluations[prefix] = table
        metrics = drift_metrics(table) if self._has_reference() else {}
        if self._packs:
            del metrics["drift/logratio_abs"]
            return metrics
        return {**completion_metrics(table), **metrics}


def _with_prm(args: Any) -> Any:
    """Plain arguments as a [`PRMSFTConfig`]; anything else as it is."""
    known = {field.name for field in fields(PRMSFTConfig) if field.init}
    if isinstance(args, PRMSFTConfig) or not isinstance(args, TrainingArguments):
        return args
    # (`to_dict` would hide the tokens)
    values = {field.name: getattr(args, field.name) for field in fields(args) if field.init}
    if not known >= values.keys():
        return args
    return PRMSFTConfig(**values | ({"optim": "prm"} if args.optim == TrainingArguments.optim else {}))
