"""What PRM adds to a TRL trainer: the optimizer, its statistics in the log, exact metrics, and the model card."""

import os
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import TrainOutput, has_length

from ..optim import PRM
from ..sharding import ShardingPath, deepspeed, fsdp
from .callbacks import PopulationRiskStoppingCallback, PRMCallback, notes
from .checkpoints import CheckpointMixin
from .config import PRMArguments, check_relative_eps, check_sharding, prm_kwargs, scaled_by_relative_eps
from .evaluation import EvaluationMixin
from .inputs import check_ids, check_inputs
from .presets import preset_note, with_preset


_DESCRIPTION = (
    "This model was trained with PRM (Population Risk Minimization, `prm-hf`): AdamW, each of whose updates is "
    "multiplied by a mask between 0 and 1 that compares the gradient's signal with its minibatch noise "
    "([arXiv 2605.01172](https://arxiv.org/abs/2605.01172), Algorithm 1).\n"
)
_TIMINGS = ("_runtime", "_per_second", "_preparation_time")


def groups_with_embeddings_apart(model: nn.Module, decaying: list[str], weight_decay: float) -> list[dict[str, Any]]:
    """The parameter groups of `Trainer.create_optimizer`, and beside them those of embeddings, with float32 state.

    As Trainer does for bitsandbytes' optimizers: the rows of rare tokens see gradients of other sizes than those of
    frequent ones, and rarely.

    Args:
        decaying: the names of the parameters that have weight decay.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(False, True): [], (False, False): []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.setdefault((id(p) in embeddings, name in decaying), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay * decays} | ({"state_dtype": "float32"} if apart else {})
        for (apart, decays), params in groups.items()
    ]


class PRMTrainerMixin(CheckpointMixin, EvaluationMixin):
    """Mixin for TRL's trainers, to be listed before the trainer in a class' bases.

    With `args.optim="prm"` it trains with [`PRM`], keeping the trainer's split into parameters with and without weight
    decay; `optimizers=` and `optimizer_cls_and_kwargs=` win over it. Whenever the optimizer in effect is a PRM, each
    log of a training step carries its `mask/*` statistics.

    Attributes:
        trains_with_prm (`bool`):
            Whether PRM is the optimizer that the run was set up with, by arguments or explicitly.
    """

    def __init__(
        self, *args, optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None, **kwargs
    ):
        self._embedding_rows = check_inputs(super().__init__, args, kwargs)
        super().__init__(*args, **kwargs)
        if optimizer_cls_and_kwargs is not None:
            if self.optimizer is not None:
                raise RuntimeError("Both `optimizers` and `optimizer_cls_and_kwargs` are given: pass one.")
            self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs

        # An optimizer that was passed takes precedence over the arguments
        self._arguments_choose = self.optimizer is None and self.optimizer_cls_and_kwargs is None
        if self._arguments_choose:
            self.trains_with_prm = self.args.optim == "prm"
        elif self.optimizer is not None:
            self.trains_with_prm = isinstance(self.optimizer, PRM)
        else:
            self.trains_with_prm = self.optimizer_cls_and_kwargs[0] is PRM
        self._is_peft = is_peft_model(self.model)
        # Raises where arguments contradict each other
        has_preset = self._settings() is not self.args and self.args.prm_preset is not None
        if has_preset and self.is_world_process_zero():
            notes.warning(preset_note(self.args, self._is_peft))
        # Count before the model is sharded, since FSDP1 hides the sizes of the tensors
        self._trained_numel = sum(
            getattr(p, "ds_numel", p.numel()) for p in self.model.parameters() if p.requires_grad
        )
        if self.trains_with_prm:
            if self.args.deepspeed_plugin is not None:
                deepspeed.check_config(self.args.deepspeed_plugin.deepspeed_config)
            if self.is_fsdp_enabled:
                plugin = self.accelerator.state.fsdp_plugin
                fsdp.check_plugin(plugin.fsdp_version, plugin.use_orig_params)
                if self._arguments_choose:
                    check_sharding(self.args, ShardingPath[f"FSDP{plugin.fsdp_version}"])
            self.add_callback(PRMCallback)
            self._tag_names = [*self._tag_names, "prm-optimizer"]
            self.model.add_model_tags(self._tag_names)
        self._sizes()  # raises now rather than after an hour of preparation
        self._set_up_evaluation()

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: TrainingArguments, *others: Any) -> Any:
        prepared = super()._prepare_dataset(dataset, processing_class, args, *others)
        if isinstance(prepared, Dataset):
            check_ids(prepared, others[-1], self._embedding_rows)
        return prepared

    # ---- Optimizer ----

    @staticmethod
    def get_optimizer_cls_and_kwargs(
        args: TrainingArguments, model: PreTrainedModel | None = None
    ) -> tuple[type[Optimizer], dict[str, Any]]:
        """The optimizer class and the keyword arguments that `args` stand for, without the sizes of the run."""
        if args.optim == "prm":
            return PRM, prm_kwargs(args if model is None else with_preset(args, is_peft_model(model)))
        return Trainer.get_optimizer_cls_and_kwargs(args, model)

    def create_optimizer(self, *args, **kwargs) -> Optimizer:
        settings = self._settings()
        is_plain = not self.trains_with_prm and settings.relative_eps is None
        if self.optimizer is not None or not self._arguments_choose or is_plain:
            return super().create_optimizer(*args, **kwargs)
        optimizer_cls, optimizer_kwargs = self.get_optimizer_cls_and_kwargs(settings, self.model)
        if optimizer_cls is not PRM:
            optimizer_kwargs = scaled_by_relative_eps(settings, optimizer_kwargs, self._trained_numel)
        elif settings.prm_state_dtype == "8bit":
            model = args[0] if args else kwargs.get("model") or self.model
            decaying = self.get_decay_parameter_names(model)
            optimizer_kwargs["params"] = groups_with_embeddings_apart(model, decaying, settings.weight_decay)
        self.optimizer_cls_and_kwargs = optimizer_cls, optimizer_kwargs | self._sizes()
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        finally:
            self.optimizer_cls_and_kwargs = None
        if optimizer_cls is not PRM:  # lr·weight_decay stays as it was
            for group in optimizer.param_groups:
                group["weight_decay"] /= 1 + settings.relative_eps
        return optimizer

    def _settings(self) -> PRMArguments:
        """The arguments, with what the preset sets where PRM is the optimizer."""
        if not (self._arguments_choose and self.trains_with_prm):
            return self.args
        settings = with_preset(self.args, self._is_peft)
        check_relative_eps(settings)
        return settings

    def _sizes(self) -> dict[str, int]:
        """b and n of `boundary="empirical"`, if the run needs them: the rows of a step, and those of the dataset."""
        arguments_choose_prm = self._arguments_choose and self.args.optim == "prm"
        if not arguments_choose_prm or self.args.prm_boundary != "empirical" or self.args.prm_alpha is not None:
            return {}
        batch_size = self.get_total_train_batch_size(self.args)
        if not has_length(self.train_dataset):
            problem = "an `IterableDataset` has no size: pass a `Dataset`"
        elif self.args.auto_find_batch_size:
            problem = "`auto_find_batch_size=True` changes the batch size: unset it"
        elif (n_dataset := len(self.train_dataset)) <= batch_size:
            problem = f"there are {n_dataset} examples and {batch_size} a step: lower `per_device_train_batch_size`"
        else:
            return {"batch_size": batch_size, "n_dataset": n_dataset}
        raise ValueError(
            "`prm_boundary='empirical'` needs the size of a step and that of a larger training set, and "
            f"{problem}, or set `prm_boundary='batch'`."
        )

    # ---- Logs ----

    def train(self, *args, **kwargs) -> TrainOutput:
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, PopulationRiskStoppingCallback):
                callback.trainer_logs_ratios = True
        return super().train(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        # Only the logs of training steps have "loss". The statistics of sharded parameters need all processes.
        if "loss" in logs and (prm := self.find_prm()) is not None:
            logs.update({f"mask/{name}": value for name, value in prm.get_mask_stats().items()})
        super().log(logs, start_time)

    # ---- Model card ----

    def create_model_card(self, *args, **kwargs) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero() and self.trains_with_prm:
            with open(os.path.join(self.args.output_dir, "README.md"), "a", encoding="utf-8") as card:
                card.write(self._model_card_section())

    def _model_card_section(self) -> str:
        prm = self.find_prm()
        settings = prm_kwargs(self._settings())
        names = [*settings, "weight_decay", "batch_size", "n_dataset"]
        if prm is not None:
            # Trainers set the weight decay of the groups instead of the optimizer's default
            decays = sorted({group["weight_decay"] for group in prm.param_groups})
            settings = {**prm.defaults, "weight_decay": " and ".join(map(str, decays))}
        lines = [
            "\n\n## Optimizer\n",
            _DESCRIPTION,
            *_table("Setting", {name: settings[name] for name in names if settings.get(name) is not None}),
        ]
        results = {k: f"{v:.4g}" for k, v in self.last_eval_metrics.items() if not k.endswith(_TIMINGS)}
        if results:
            lines += ["\n### Results\n", f"Last evaluation, at step {self.state.global_step}:\n"]
            lines += _table("Metric", results)
        return "\n".join(lines) + "\n"


def _table(head: str, values: dict[str, Any]) -> list[str]:
    return [f"| {head} | Value |", "|---|---|", *(f"| `{name}` | {value} |" for name, value in values.items())]
