"""The loss of each sample, for models and trainers that return a mean; TRL's output layer, open to hooks."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from trl.trainer.utils import FusedCausalLMOutput


def losses_by_type(outputs: Any, labels: Tensor, model: nn.Module) -> Tensor:
    """The loss of each row, `(B,)`: of tokens the mean over those that have a label, of classes cross entropy.

    Args:
        outputs: what the model returned, with `logits`.
        labels: `(B,)`, `(B, classes)` or `(B, T)`; -100 marks tokens without a label.
        model: a transformers model, whose `loss_type` and `config.problem_type` say which loss it has.

    Raises:
        ValueError: the model has another loss.
    """
    kind, logits = getattr(model, "loss_type", None), outputs["logits"].float()
    if kind is None and type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():  # as GPT2LMHeadModel
        kind = "ForCausalLM"
    if kind in ("ForCausalLM", "ForMaskedLM", "ForTokenClassification"):
        if kind == "ForCausalLM" and not model.config.is_encoder_decoder:
            logits, labels = logits[:, :-1], labels[:, 1:]
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
        return losses.sum(1) / (labels != -100).sum(1).clamp(min=1)
    if kind in ("ForSequenceClassification", "ForImageClassification"):
        problem = model.config.problem_type
        if problem == "regression" or (problem is None and model.config.num_labels == 1):
            return (logits.view(len(labels), -1) - labels.view(len(labels), -1)).square().mean(1)
        if problem == "multi_label_classification" or (problem is None and labels.is_floating_point()):
            return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(1)
        return nn.functional.cross_entropy(logits, labels, reduction="none")
    raise ValueError(
        f"Sven knows the loss of each row of language models and classifiers, and {type(model).__name__} has the loss "
        f"{kind!r}: pass `per_sample_loss_func`, a function of the outputs and the labels that returns a tensor (B,)."
    )


class Recorder:
    """A model that keeps what it returns, to be given to a trainer's `compute_loss`."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.outputs = model, []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.outputs.append(self.model(*args, **kwargs))
        return self.outputs[-1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


class MeansRecorder(TorchFunctionMode):
    """Keeps each vector with gradients that `Tensor.mean` is called on, as TRL does with the losses of pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors: list[Tensor] = []

    def __torch_function__(self, func: Any, kinds: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        is_mean = func is torch.Tensor.mean and len(args) == 1 and not kwargs
        if is_mean and args[0].dim() == 1 and args[0].requires_grad:
            self.vectors.append(args[0])
        return func(*args, **(kwargs or {}))


def plain_head(model: PreTrainedModel) -> None:
    """Lets calls with `fused_lm_head=True` use the output layer's `forward`, where gradients are computed.

    TRL multiplies with the layer's weight in a function of its own, in which no hook sees per-sample gradients. The
    logits of the batch are kept in memory instead. Where the output layer is not trained, the call stays as it is.
    """
    fused = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, **kwargs):
        is_trained = any(p.requires_grad for p in self.get_output_embeddings().parameters())
        if not (fused_lm_head and is_trained and torch.is_grad_enabled()):
            return fused(*args, fused_lm_head=fused_lm_head, **kwargs)
        labels = kwargs.pop("labels")
        n_items = kwargs.pop("num_items_in_batch", None)
        outputs = fused(*args, **{**kwargs, "use_cache": False})
        return _output(outputs.logits[:, :-1], labels[:, 1:], n_items)

    model.forward = types.MethodType(forward, model)


def _output(logits: Tensor, labels: Tensor, n_items: Any) -> FusedCausalLMOutput:
    mask = labels != -100
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    log_probs = -nn.functional.cross_entropy(logits.transpose(1, 2), labels.clamp(min=0), reduction="none")
    log_probs = log_probs.masked_fill(~mask, 0)
    with torch.no_grad():
        distribution = logits.log_softmax(-1)
        found = {
            "entropy": -(distribution.exp() * distribution).sum(-1),
            "log_sum_sq_probs": (2 * distribution).logsumexp(-1),
            "mean_logits": logits.mean(-1),
        }
        found = {name: values.masked_fill(~mask, 0) for name, values in found.items()}
        is_top1 = (logits.argmax(-1) == labels) & mask
    loss = -log_probs.sum() / (mask.sum().clamp(min=1) if n_items is None else n_items)
    return FusedCausalLMOutput(loss=loss, log_probs=log_probs, is_top1=is_top1, label_mask=mask, **found)
