"""TRL's fused output layer, computed by the layer itself, so that its per-sample gradients can be seen."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput


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
