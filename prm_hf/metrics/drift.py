"""How far a policy has moved from where training started: in its outputs, and in its weights."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from torch import nn

from .evaluation import PairEvaluation, SequenceEvaluation
from .sharded import whole


def drift_metrics(evaluation: PairEvaluation | SequenceEvaluation, beta: float | None = None) -> dict[str, float]:
    """Drift of the policy's outputs on held-out completions; of pairs, all completions count.

    Returns:
        Up to three numbers:

        - `drift/reward_abs`: mean over completions of |β (log π - log π_ref)|; only with `beta`, DPO's β.
        - `drift/logratio_abs`: mean over completions of |log π - log π_ref| / tokens, nats a token. A completion
          without tokens counts as 0.
        - `drift/kl`: mean over completion tokens of KL(π‖π_ref), full vocabulary, nats a token; left out if the
          reference could not be run.

    Raises:
        ValueError: the evaluation is one without a reference.
    """
    table = evaluation.completions() if isinstance(evaluation, PairEvaluation) else evaluation
    if table.logratio is None:
        raise ValueError("`evaluation` was made without a reference, so it holds no drift. Make it with `ref_model`.")
    absolute = table.logratio.abs()
    metrics = {"drift/logratio_abs": (absolute / table.tokens.clamp(min=1)).mean().item()}
    if beta is not None:
        metrics["drift/reward_abs"] = beta * absolute.mean().item()
    if table.kl is not None:
        metrics["drift/kl"] = (table.kl.sum() / table.tokens.sum().clamp(min=1)).item()
    return metrics


class ParameterDrift:
    """‖w - w₀‖ / ‖w₀‖ over the trained tensors, w₀ being the weights at construction.

    LoRA layers count by their effective weight: ‖BA·scaling - (its value at construction)‖ against ‖W‖, where W is the
    frozen weight. (With DoRA that is the direction; the magnitude vectors count as tensors of their own.) The copy of
    w₀ stays in the main process' host memory. Sharded parameters are gathered one at a time.

    The model may be prepared or not. The trained parameters are those that require a gradient now.

    Attributes:
        initial: The copy of w₀ by name, on the main process; None for a new adapter, whose BA is 0.

    Raises:
        ValueError: if no parameter requires a gradient.
    """

    def __init__(self, model: nn.Module, accelerator: Accelerator):
        if not any(p.requires_grad for p in model.parameters()):
            raise ValueError("`model` has no parameter that requires a gradient, so there is no drift to measure.")
        self.accelerator = accelerator
        self.initial: dict[str, torch.Tensor | None] = {}
        squared_norm = 0.0
        for name, value, frozen in _trained_tensors(model, accelerator, with_frozen=True):
            weight = value if frozen is None else frozen
            squared_norm += torch.linalg.vector_norm(weight, dtype=torch.float32).item() ** 2
            # A new adapter starts at BA = 0 and costs no memory
            self.initial[name] = value.detach().to("cpu", copy=True) if value.any() else None
        self._norm = squared_norm**0.5

    def relative(self, model: nn.Module) -> float:
        """‖w - w₀‖ / ‖w₀‖ of the model's present weights; the same number on every process. Collective."""
        norms = []  # of the changes; they are read after all have been launched
        for name, value, _ in _trained_tensors(model, self.accelerator, with_frozen=False):
            initial = self.initial[name]
            change = value if initial is None else initial.to(value.device).float() - value
            norms.append(torch.linalg.vector_norm(change, dtype=torch.float32).to(self.accelerator.device))
        change = torch.stack(norms).cpu().double().square().sum().sqrt().item() if norms else 0.0
        relative = change / self._norm if self._norm else float("nan")
        if self.accelerator.num_processes == 1:
            return relative
        # Only the main process has the number
        return self.accelerator.gather(torch.tensor([relative], device=self.accelerator.device))[0].item()


def _trained_tensors(
    model: nn.Module, accelerator: Accelerator, with_frozen: bool
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Name and value of each trained tensor, whole, on the main process; nothing on the others, which help to gather.

    For a LoRA layer the value is BA·scaling, with the frozen weight as third element if `with_frozen`.
    """
    model = accelerator.unwrap_model(model, keep_torch_compile=False)
    with torch.no_grad():
        factors = set()
        for name, layer, factor_a, factor_b, scaling in _lora_layers(model):
            factors |= {id(factor_a), id(factor_b)}
            frozen = _frozen_weight(layer) if with_frozen else None
            with whole(factor_a, factor_b, frozen) as (a, b, frozen):
                if accelerator.is_main_process:
                    experts = getattr(layer, "num_experts", 1)  # expert stacks keep their factors side by side
                    a, b = a.reshape(experts, -1, a[0].numel()), b.reshape(b.shape[0], -1, experts)
                    yield _plain(name), scaling * torch.einsum("ore,eri->eoi", b.float(), a.float()), frozen
        for name, param in model.named_parameters():
            if param.requires_grad and id(param) not in factors:
                with whole(param) as (value,):
                    if accelerator.is_main_process:
                        yield _plain(name), value, None


def _plain(name: str) -> str:
    """The name without what torch.compile and activation checkpointing put into it."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def _lora_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, torch.Tensor, torch.Tensor, float]]:
    """Each LoRA adapter in training: name, layer, A, B, scaling."""
    if not is_peft_model(model):
        return
    from peft.tuners.lora import LoraLayer

    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            elif adapter in layer.lora_embedding_A:
                a, b = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
            else:
                continue
            if a.requires_grad or b.requires_grad:
                yield f"{name}.{adapter}", layer, a, b, layer.scaling[adapter]


def _frozen_weight(layer: nn.Module) -> torch.Tensor:
    from peft.tuners.lora.layer import ParamWrapper
    from peft.utils.integrations import dequantize_module_weight

    return layer.get_param() if isinstance(layer, ParamWrapper) else dequantize_module_weight(layer.get_base_layer())
