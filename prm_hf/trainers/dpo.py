"""Direct preference optimization with PRM."""

import contextlib
import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from trl import DPOTrainer
from trl.models import prepare_deepspeed

from ..metrics import (
    PairEvaluation,
    drift_metrics,
    memorization_metrics,
    preference_scores,
    reward_margins,
    reward_metrics,
    suspect_metrics,
)
from ..metrics.forward import evaluation_mode, flags_kept, without_cudnn
from ..metrics.tables import evaluate_rows
from .config import PRMDPOConfig, checked_config
from .memorization import noisy_rows
from .mixin import PRMTrainerMixin
from .packing import add_packing, unpack_hidden, with_lengths
from .pair_losses import (
    PROBABILITY,
    check_probabilities,
    pair_loss_change,
    rewards_of,
    smoothing_change,
    with_probabilities,
)
from .prepared import (
    FINGERPRINT,
    IDS,
    REFERENCE,
    check_fingerprint,
    check_values,
    has_reference,
    informative_rows,
    reference_fingerprint,
    sample,
)


logger = get_logger(__name__)


class PRMDPOTrainer(PRMTrainerMixin, DPOTrainer):
    """
    TRL's [`~trl.DPOTrainer`], trained with PRM. ("PRM" is the optimizer here, not a process reward model.)

    With `args.drift_metrics` each evaluation, and one at the end of training, adds to the metrics of each split of
    `eval_dataset`, under the split's prefix (`eval_`, or `eval_<split>_` if `eval_dataset` is a dict), those of
    [`~prm_hf.metrics.reward_metrics`] (exact means over rows, in place of TRL's means over batches) and of
    [`~prm_hf.metrics.drift_metrics`]; and, once an evaluation, under `eval_`:

    - `drift/params_rel`;
    - `memorization/flipped_fit` and `memorization/clean_fit`, if `train_dataset` is a [`~datasets.Dataset`] with a
      bool column `flipped`, on `args.memorization_max_rows` of its rows; and on these the
      [`~prm_hf.metrics.suspect_metrics`] of minus the reward margin, if some are flipped.

    Tokenized rows, as those of another trainer's `train_dataset`, are not tokenized again. If all datasets have the
    columns `ref_chosen_logps` and `ref_rejected_logps` of `precompute_ref_log_probs=True`, training takes the
    reference's log-probabilities from them, and `drift/kl` is still measured. So runs can share both. A column
    `ref_fingerprint` says what they were made with; another model, tokenizer, `max_length` or precision is an error,
    and a few rows are computed again to make sure.

    Pairs that say nothing are left out of all datasets, and a warning counts them: those whose prompt alone fills
    `max_length`, and those whose two sides are equal once they are truncated.

    A float column `probability_wrong` of `train_dataset` says with what probability p the label of a row is wrong. The
    loss of the row is then (1-p)·L + p·L_swapped, L_swapped with its sides exchanged (cDPO, with a label smoothing for
    each row). It is for the losses `sigmoid`, `robust`, `hinge`, `ipo` and `sigmoid_norm`, and trains alone:
    evaluations take labels as they are.

    `args.padding_free=True` runs all forward passes of training on packed sequences, with any attention kernel and
    with the losses of padded batches.

    The arguments are those of [`~trl.DPOTrainer`], with a [`PRMDPOConfig`] as `args`. A model that was made in memory
    needs a `ref_model`, since TRL loads the default by `model`'s name. `optimizer_cls_and_kwargs` wins over
    `args.optim`.

    Attributes:
        pair_evaluations (`dict[str, PairEvaluation]`):
            The tables behind the metrics of the last evaluation, on the CPU, the same on all processes: one a split
            by its prefix (`"eval"` or `"eval_<split>"`), and `"train"` for the rows `memorization_rows`.
        memorization_rows (`list[int]`):
            Rows of `train_dataset` on which memorization is measured; empty if it is not.
        pair_loss (`Callable`, *optional*):
            From the sigmoid losses of the pairs of a training batch, `(n,)`, to the loss of the batch, in place of
            their mean. For comparisons with other losses.

    Example:

    ```python
    >>> args = PRMDPOConfig("out", learning_rate=5e-6, eval_strategy="epoch")
    >>> trainer = PRMDPOTrainer("Qwen/Qwen2.5-0.5B-Instruct", args=args, train_dataset=train, eval_dataset=heldout)
    >>> trainer.train()
    >>> trainer.last_eval_metrics["eval_drift/kl"]
    ```
    """

    _rows_are_apart = True
    _sequences_per_row = 2

    def __init__(
        self,
        model: "str | PreTrainedModel | Any",
        ref_model: PreTrainedModel | None = None,
        args: PRMDPOConfig | None = None,
        *positional,
        **kwargs,
    ):
        args = checked_config(args, PRMDPOConfig, model, "DPO")
        train, eval_dataset = (
            kwargs.get(name, positional[i] if len(positional) > i else None)
            for i, name in ((1, "train_dataset"), (2, "eval_dataset"))
        )
        self._has_probabilities = check_probabilities(train, args)
        self.pair_loss: Callable[[torch.Tensor], torch.Tensor] | None = None
        if args.sync_ref_model and args.drift_metrics and eval_dataset is not None:
            raise ValueError(
                "`sync_ref_model=True` moves the reference, from which drift and memorization would be measured: set "
                "`drift_metrics=False`, or `sync_ref_model=False`."
            )
        # TRL has no padding-free DPO, and raises an error for it
        self._packing_is_due, args.padding_free = args.padding_free, False
        try:
            # TRL adds a copy of an adapter as reference
            has_adapter = isinstance(model, nn.Module) and is_peft_model(model)
            with flags_kept(model) if has_adapter else contextlib.nullcontext():
                super().__init__(model, ref_model, args, *positional, **kwargs)
            self._add_packing()
        finally:
            # The attribute is missing if TRL raised an error
            args.padding_free = getattr(self, "padding_free", self._packing_is_due)
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        datasets = {name: rows for name, rows in {"train": self.train_dataset, **splits}.items() if rows is not None}
        # A reference that moves leaves what was computed beforehand behind
        self.precompute_ref_logps |= not args.sync_ref_model and all(map(has_reference, datasets.values()))
        if self.precompute_ref_logps:
            for name, dataset in datasets.items():
                self._check_reference(dataset, name)
        self.pair_evaluations: dict[str, PairEvaluation] = {}
        self.memorization_rows: list[int] = []
        self._memorization_loader: DataLoader | None = None
        if args.drift_metrics and self.eval_dataset is not None:
            self._prepare_memorization()
            if not self._has_reference():
                logger.warning(
                    "`drift/kl` is not measured, because no reference model is kept. To measure it, set "
                    "`precompute_ref_log_probs=False` or pass `ref_model`."
                )

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: PRMDPOConfig, dataset_name: str) -> Any:
        is_tokenized = "prompt_ids" in next(iter(dataset))
        n_before = None if isinstance(dataset, IterableDataset) else len(dataset)
        if not is_tokenized:
            dataset = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        dataset = informative_rows(dataset, args, dataset_name, n_before)
        if is_tokenized:
            self._check_tokens(dataset, processing_class, args, dataset_name)
        return dataset

    def _check_tokens(self, dataset: Any, processing_class: Any, args: PRMDPOConfig, name: str) -> None:
        """Raises if a few of the tokenized rows have a text beside them from which other tokens would be made."""
        rows = sample(dataset)
        if not rows or not {"prompt", "chosen", "rejected"} <= rows[0].keys():
            return
        texts = [{key: value for key, value in row.items() if key not in (*IDS, *REFERENCE)} for row in rows]
        fresh = super()._prepare_dataset(Dataset.from_list(texts), processing_class, args, name).to_list()
        if [[row[key] for key in IDS] for row in rows] != [[row[key] for key in IDS] for row in fresh]:
            raise ValueError(
                f"The tokens of {name!r} are not those of its texts: the rows were tokenized with another tokenizer "
                "or chat template, or the texts were changed afterwards. Pass the rows without the columns "
                f"{', '.join(map(repr, IDS))}, so that they are tokenized here."
            )

    def _add_packing(self) -> None:
        """Sets `padding_free=True` up, as soon as the models have TRL's fused head."""
        if not self._packing_is_due:
            return
        model = self.model
        learns_prompts = is_peft_model(model) and model.active_peft_config.is_prompt_learning
        if self._is_vision_dataset or self.aux_loss_enabled or learns_prompts:
            raise ValueError(
                "`padding_free=True` is not for images, prompt learning or the load-balancing loss of experts: set "
                "`padding_free=False`."
            )
        add_packing(model.get_base_model() if is_peft_model(model) else model)
        if self.ref_model is not None:
            add_packing(self.accelerator.unwrap_model(self.ref_model))
        self._packing_is_due, self.padding_free = False, True

    def get_train_dataloader(self) -> DataLoader:
        collate = self.data_collator
        if self._has_probabilities:
            self.data_collator = functools.partial(with_probabilities, self.data_collator)
        # accelerate deals the batches of a stream out to the processes, by slicing their tensors
        dealt_out = self.args.accelerator_config.dispatch_batches or isinstance(self.train_dataset, IterableDataset)
        if self.padding_free and not dealt_out:
            self.data_collator = functools.partial(with_lengths, self.data_collator)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = collate

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        with without_cudnn() if self.padding_free else contextlib.nullcontext():
            return super().training_step(*args, **kwargs)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        self._add_packing()
        if has_reference(dataset):
            self._check_reference(dataset, name)
            return dataset
        fingerprint = json.dumps(self._reference_fingerprint)
        # TRL's key of its cache is this hash and the dataset's, and lacks how rows are truncated
        self._precompute_model_hash = fingerprint
        dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        return dataset.add_column(FINGERPRINT, [fingerprint] * len(dataset))

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        with flags_kept(self.model):
            return super().compute_ref_log_probs(model, inputs)

    @functools.cached_property
    def _reference_fingerprint(self) -> dict[str, Any]:
        """Asked for before training, when the policy is its own reference if there is no other."""
        model = self.ref_model or self.model
        return reference_fingerprint(model, self.processing_class, self.args, self.accelerator)

    def _check_reference(self, dataset: Dataset | IterableDataset, name: str) -> None:
        """Raises if the log-probabilities that the rows carry are not those of this run's reference. Collective."""
        is_marked = check_fingerprint(dataset, self._reference_fingerprint, name)
        if not self._has_reference() and self.state.global_step > 0:
            if not is_marked:
                raise ValueError(
                    f"The reference's log-probabilities of {name!r} can't be checked, since no reference is kept: "
                    "pass `ref_model`, or the rows as `eval_dataset` when the trainer is made."
                )
            return
        if self.ref_model is None and self.is_deepspeed_enabled and self._precompute_engine is None:
            self._precompute_engine = prepare_deepspeed(self.model, self.accelerator)  # as TRL does
        model = self.ref_model or self._precompute_engine or self.model
        rows = sample(dataset)
        device = next(model.parameters()).device
        batch = {key: values.to(device) for key, values in self.data_collator(rows).items()}
        with evaluation_mode([model]):
            fresh = self.compute_ref_log_probs(model, batch)
        is_exact = self.accelerator.mixed_precision == "no" and self.model.dtype == torch.float32
        check_values(rows, [values.tolist() for values in fresh], name, is_exact)

    def _prepare_memorization(self) -> None:
        train = self.train_dataset
        if "flipped" not in (train.column_names or next(iter(train))):
            return
        try:
            self.memorization_rows, self._flipped = noisy_rows(train, self.args.memorization_max_rows, ["flipped"])
        except (TypeError, ValueError) as error:
            logger.warning(f"Memorization is not measured: {error}")

    def evaluate_pairs(self, dataset: Dataset | str | None = None) -> PairEvaluation:
        """Evaluates policy and reference on preference pairs, whatever `args.drift_metrics` says. Collective.

        Args:
            dataset ([`~datasets.Dataset`] or `str`, *optional*):
                Pairs, as the trainer takes them or already prepared by it; or the name of a split of `eval_dataset`.
                Defaults to `eval_dataset`. Preparation drops the rows whose prompt alone fills `max_length`.

        Raises:
            ValueError: no single dataset is meant; DeepSpeed has not been set up yet; or there is no reference.
        """
        dataset = self.eval_dataset if dataset is None else dataset
        if isinstance(dataset, str):
            dataset = self.eval_dataset[dataset]
        if dataset is None or isinstance(dataset, dict):
            found = "no `eval_dataset`. Pass `dataset`." if dataset is None else f"{list(dataset)}. Name one of them."
            raise ValueError(f"`evaluate_pairs` needs one dataset, and the trainer has {found}")
        if self.is_deepspeed_enabled and self.deepspeed is None:
            raise ValueError("DeepSpeed sets the model up in `train` or `evaluate`: call one before `evaluate_pairs`.")
        if not self._is_vision_dataset:
            dataset = self._prepare_dataset(dataset, self.processing_class, self.args, "evaluate_pairs")
            if not self._has_reference() and has_reference(dataset):
                self._check_reference(dataset, "evaluate_pairs")
        return evaluate_rows(self, self.get_test_dataloader(dataset))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if PROBABILITY not in self._signature_columns:
            self._signature_columns.append(PROBABILITY)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> Any:
        """TRL's loss. Of the metrics that TRL collects, `rewards/accuracies` is that of `preference_scores`."""
        gather, given, gathered = self.accelerator.gather, [], []

        def recorded(values: torch.Tensor) -> torch.Tensor:
            given.append(values)
            gathered.append(gather(values))
            return gathered[-1]

        inputs = dict(inputs)
        probabilities = inputs.pop(PROBABILITY, None)
        self.accelerator.gather = recorded
        try:
            with flags_kept(self.model):
                result = super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            del self.accelerator.gather  # the method is of the class
        if self.model.training and (probabilities is not None or self.pair_loss is not None):
            rewards = rewards_of(given, self.beta, inputs["completion_mask"])
            if probabilities is not None:
                result = result + smoothing_change(probabilities.view(torch.float32), rewards, self)
            if self.pair_loss is not None:
                result = result + pair_loss_change(self.pair_loss, rewards)
        metrics = self._metrics["train" if self.model.training else "eval"]
        # TRL gathers the margins to log their mean, by which they are known; NaN is written as NaN
        mean = str(metrics["rewards/margins"][-1])
        vectors = (values for values in reversed(gathered) if values.dim() == 1 and values.is_floating_point())
        margins = next((values for values in vectors if str(values.mean().item()) == mean), None)
        if margins is not None:
            metrics["rewards/accuracies"][-1] = preference_scores(margins.cpu()).mean().item()
            metrics["rewards/ties"].append((margins == 0).float().mean().item())
        return result

    def _batch_weights(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        chosen, rejected = (mask.sum() for mask in inputs["completion_mask"][:, 1:].chunk(2))
        return {
            "": torch.full_like(chosen, len(inputs["input_ids"]) // 2),  # the host need not wait for it
            "entropy": chosen + rejected,
            "logits/chosen": chosen,
            "logits/rejected": rejected,
            "mean_token_accuracy": chosen,
        }

    @property
    def _passes_of_trl(self) -> int:
        return 1 if self.precompute_ref_logps else 2

    def _run_more(self, model: nn.Module, inputs: dict[str, Any]) -> int:
        if not self.precompute_ref_logps or not self._has_reference():
            return 0
        self.compute_ref_log_probs(self.ref_model or model, inputs)
        return 1

    def _unpack(self, hidden: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
        return unpack_hidden(hidden, inputs["attention_mask"]) if self.padding_free else hidden

    def _split_metrics(self, dataloader: DataLoader, prefix: str) -> dict[str, float]:
        tables = self._shared_tables()
        pairs = evaluate_rows(self, dataloader) if tables is None else PairEvaluation(*tables)
        self.pair_evaluations[prefix] = pairs
        return {**reward_metrics(pairs, self.beta), **drift_metrics(pairs, self.beta)}

    def _run_metrics(self) -> dict[str, float]:
        metrics = super()._run_metrics()
        if self.memorization_rows:
            if self._memorization_loader is None:
                rows = self.train_dataset.select(self.memorization_rows)
                self._memorization_loader = self.get_test_dataloader(rows)
            pairs = evaluate_rows(self, self._memorization_loader)
            self.pair_evaluations["train"] = pairs
            metrics |= memorization_metrics(pairs, self._flipped, self.beta)
            metrics |= suspect_metrics(-reward_margins(pairs, self.beta), self._flipped)
        return metrics
