"""One forward pass whose result is hidden states, from which logits are made in chunks.

The logits of whole sequences never exist, since with a vocabulary of 150,000 they do not fit into memory. The pass is
run here, or captured from a trainer that makes it anyway.
"""

import contextlib
import inspect
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_compiled_module, is_peft_model
from torch import nn

from .sharded import whole


@dataclass
class Forward:
    """The hidden states of one forward pass, and what makes logits of them."""

    name: str
    hidden: torch.Tensor  # (tokens, hidden size): the positions that predict a completion token
    last_hidden: torch.Tensor  # (hidden size,): the last position of the first sequence,
    last_logits: torch.Tensor | None  # (vocabulary,): and the model's own logits there, if it was run for them
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits in float32, computed in float32 unless under autocast. To be called in `gathered()`."""
        logits = nn.functional.linear(hidden.to(self.weight.device).float(), self.weight, self.bias)
        logits = logits.float() if self.scale == 1 else logits.float() * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Makes `weight` and `bias` whole and float32 for the time of the context, whatever shards them."""
        sharded = self.weight, self.bias
        with whole(*sharded) as (weight, bias):
            self.weight, self.bias = weight.float(), None if bias is None else bias.float()
            try:
                yield
            finally:
                self.weight, self.bias = sharded

    def check(self) -> None:
        """Compares with the model's own logits, so that an unknown step between hidden states and logits is seen."""
        if self.last_logits is None:
            return
        expected = self.last_logits.float()
        actual = self.logits(self.last_hidden).to(expected.device)
        # Wide enough for the rounding of bf16 logits; a missing scale or cap is off by far more
        tolerance = 0.05 * expected.abs().max().item()
        if expected.isfinite().all() and not torch.allclose(actual, expected, rtol=0.05, atol=tolerance):
            raise ValueError(
                f"The logits of {self.name} differ by {(actual - expected).abs().max().item():.3g} from its output "
                "embedding times its last hidden state. Set `drift_metrics=False`."
            )


def forward(
    model: nn.Module,
    inputs: dict[str, Any],
    places: tuple[torch.Tensor, torch.Tensor],
    accelerator: Accelerator,
    hidden: torch.Tensor | None = None,
) -> Forward:
    """Runs `model`, unless its last hidden states are known, without building the logits of more than one position.

    `places` are the sequences and the positions whose next token is evaluated, int64, `(tokens,)` each.
    """
    # A compiled forward does not call the hook
    model = model._orig_mod if is_compiled_module(model) else model
    causal = _causal_model(model, accelerator)
    decoder, head, name = causal.get_decoder(), causal.get_output_embeddings(), type(causal).__name__
    keeps_logits = "logits_to_keep" in inspect.signature(type(causal).forward).parameters
    if decoder is causal or head is None or hasattr(head, "base_layer") or not keeps_logits:
        raise ValueError(
            f"The drift of {name} can't be measured: it must have `get_decoder()`, an output embedding without an "
            "adapter, and an argument `logits_to_keep` of `forward`. Set `drift_metrics=False`."
        )

    logits = None
    if hidden is None:
        with captured_hidden_states([model], accelerator) as captured, accelerator.autocast(), without_cudnn():
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits
        hidden = captured[-1]
    # Prompt-learning adapters put virtual tokens in front: keep the positions of the real ones
    hidden = hidden[:, -inputs["input_ids"].shape[1] :]

    config = causal.config.get_text_config()
    return Forward(
        name=name,
        hidden=hidden[places],
        last_hidden=hidden[0, -1],
        last_logits=None if logits is None else logits[0, -1],
        weight=head.weight,
        bias=getattr(head, "bias", None),
        scale=_logit_scale(config),
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@contextlib.contextmanager
def captured_hidden_states(models: Sequence[nn.Module], accelerator: Accelerator) -> Iterator[list[torch.Tensor]]:
    """Yields a list that each forward pass in the context adds its last hidden states to; a compiled one adds nothing.

    The models are those of [`evaluate_pairs`], and are in evaluation mode in the context.
    """
    captured: list[torch.Tensor] = []
    decoders = {id(decoder): decoder for decoder in (_causal_model(m, accelerator).get_decoder() for m in models)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(evaluation_mode(models))
        for decoder in decoders.values():
            handle = decoder.register_forward_hook(lambda _module, _args, output: captured.append(output[0]))
            stack.callback(handle.remove)
        yield captured


@contextlib.contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention by torch's other kernels.

    cuDNN plans its kernel for each new shape of a batch, which takes a tenth of a second or more, half of a step of a
    0.5 B model on an H200. The context must hold the backward pass too: gradient checkpointing raises an error if it
    runs the forward pass again with another kernel.
    """
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(enabled)


@contextlib.contextmanager
def evaluation_mode(models: Sequence[nn.Module]) -> Iterator[None]:
    training = [m for m in models if m.training]
    for m in training:
        m.eval()
    try:
        yield
    finally:
        for m in training:
            m.train()


@contextlib.contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the same parameters require a gradient: PEFT lets adapters train that it switches on again."""
    before = {p: p.requires_grad for p in model.parameters()}
    try:
        yield
    finally:
        for p, was_trained in before.items():
            if p.requires_grad != was_trained:
                p.requires_grad_(was_trained)


@contextlib.contextmanager
def reference_adapters(model: nn.Module) -> Iterator[None]:
    """A PEFT model as its own reference: TRL's copy of an adapter that training started from, or no adapter."""
    with flags_kept(model), contextlib.ExitStack() as stack:
        if "ref" in model.peft_config:
            stack.callback(model.set_adapter, model.active_adapter)
            model.set_adapter("ref")
        else:
            stack.enter_context(model.disable_adapter())
        yield


@contextlib.contextmanager
def as_reference(
    model: nn.Module, ref_model: nn.Module | None, accelerator: Accelerator
) -> Iterator[nn.Module | None]:
    """The model to call as reference, with a PEFT model's adapters set accordingly for the time of the context."""
    unwrapped, is_peft = unwrap(model, accelerator)
    if ref_model is not None:
        yield ref_model
    elif not is_peft:
        yield None
    else:
        with reference_adapters(unwrapped):
            yield model


_INNER: weakref.WeakKeyDictionary[nn.Module, tuple[weakref.ref, bool]] = weakref.WeakKeyDictionary()


def unwrap(model: nn.Module, accelerator: Accelerator) -> tuple[nn.Module, bool]:
    """The model inside its wrappers, and whether it is one of PEFT's.

    accelerate is asked once a model, since it looks for installed packages each time, which takes milliseconds.
    """
    if model not in _INNER:
        inner = accelerator.unwrap_model(model, keep_torch_compile=False)
        _INNER[model] = weakref.ref(inner), is_peft_model(inner)
    inner, is_peft = _INNER[model]
    return inner(), is_peft


def _causal_model(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model inside all wrappers and adapters."""
    inner, is_peft = unwrap(model, accelerator)
    return inner.get_base_model() if is_peft else inner


def _logit_scale(config: Any) -> float:
    """The factor between head output and logits, by the names it has in configs (as TRL's `add_fused_lm_head`)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling"):
        if (scale := getattr(config, name, None)) is not None:
            is_divisor = name == "logits_scaling" and config.model_type != "hyperclovax"
            return 1 / scale if is_divisor else scale
    return 1.0
