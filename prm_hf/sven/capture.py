"""Per-sample gradients from one forward and one backward pass: hooks record what goes in and out of each layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.func import functional_call, vjp, vmap

from .jacobian import Jacobian, Outer, Rows, Use


if TYPE_CHECKING:
    from typing_extensions import Self

JacobianMethod = Literal["layers", "loop"]
_CONV1D = "transformers.pytorch_utils.Conv1D"  # the linear layer of GPT-2
# Their gradients do not follow from what one call of `forward` gets and gives
_OPAQUE = (nn.RNNBase, nn.MultiheadAttention)


@dataclass
class _Call:
    """One call of a layer: its input, where the gradient of its output will be, and the rows of the model's input."""

    layer: nn.Module
    given: Tensor
    output: GradientEdge
    rows: int | None


@dataclass
class Capture:
    """Records the calls of a model's layers while it is entered.

    Args:
        model: the model that is called.
        method: `"layers"` takes the gradients of parameters from what goes in and out of their layers; parameters that
            do not belong to a layer by itself, and with `"loop"` all of them, need a backward pass for each sample.
        looped: parameters that need one too. Those of a batch belong here in the next ones, so that a layer whose rows
            are samples by chance, as an expert that a few tokens are sent to, is not taken for one.

    Raises:
        ValueError: with `"layers"`, the model has batch normalization in training mode.
    """

    model: nn.Module
    method: JacobianMethod = "layers"
    looped: set[nn.Parameter] = field(default_factory=set)
    calls: list[_Call] = field(default_factory=list)
    rows: int | None = None

    def __enter__(self) -> Self:
        self.handles = []
        if self.method == "loop":
            return self
        for name, module in self.model.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ValueError(
                    f"`{name}` is batch normalization in training mode, in which a sample's loss depends on the other "
                    'samples: call its `eval()`, use another normalization, or set `jacobian="loop"`.'
                )
            if _is_layer(module) and any(p.requires_grad for p in module.parameters(recurse=False)):
                self.handles.append(module.register_forward_hook(self._record, with_kwargs=True))
        self.handles.append(self.model.register_forward_pre_hook(self._note_rows, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _note_rows(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        tensors = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim())
        self.rows = next((len(x) for x in tensors), None)

    def _record(self, layer: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
        if not (isinstance(output, Tensor) and output.requires_grad and torch.is_grad_enabled()):
            return None
        if (
            len(args) != 1
            or kwargs
            or not isinstance(args[0], Tensor)
            or args[0].dim() < (1 if type(layer) is nn.Embedding else 2)
        ):
            return None
        given, shared = args[0].detach(), None
        if len(given) == 1 != self.rows and self.rows is not None:  # positions, which all samples share
            given = given.expand(self.rows, *given.shape[1:])
            output = shared = output.expand(self.rows, *output.shape[1:])
        self.calls.append(_Call(layer, given, get_gradient_edge(output), self.rows))
        return shared

    def differentiate(self, losses: Tensor) -> Jacobian:
        """The gradients of the losses, `(B,)`, that were computed in the meantime. Their graph is kept."""
        if losses.dim() != 1:
            raise ValueError(f"Sven needs the loss of each sample, a tensor of shape (B,), and got {_of(losses)}.")
        if not losses.requires_grad:
            raise ValueError("The losses do not depend on any parameter that is trained: unfreeze some.")
        n, uses = len(losses), {}
        edges = [call.output for call in self.calls]
        grads = torch.autograd.grad(losses.sum(), edges, retain_graph=True, allow_unused=True) if edges else ()
        for call, grad in zip(self.calls, grads, strict=True):
            for name, p in call.layer.named_parameters(recurse=False):
                if not p.requires_grad or grad is None:
                    continue
                if call.rows is None or call.rows % n or not len(grad) == len(call.given) == call.rows:
                    self.looped.add(p)
                    continue
                uses.setdefault(p, []).append(_use(call, name, p, grad, n))
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.looped.update(p for p in params if p not in uses)
        rest = [p for p in params if p in self.looped]
        uses = {p: of_p for p, of_p in uses.items() if p not in self.looped}
        return Jacobian(params, {**uses, **_by_loop(losses, rest)}, n)


def _of(losses: Tensor) -> str:
    return f"one of shape {tuple(losses.shape)}: compute it with `reduction='none'` and its mean over the rest"


def _is_layer(module: nn.Module) -> bool:
    """Whether the gradients of its own parameters follow from its input and the gradient of its output."""
    if isinstance(module, nn.Embedding) and (module.scale_grad_by_freq or module.sparse or module.max_norm):
        return False
    return not next(module.children(), None) and not isinstance(module, _OPAQUE)


def _full(x: Tensor) -> Tensor:
    """In float32 or float64, whatever autocast made of it."""
    return x if x.dtype in (torch.float32, torch.float64) or not x.is_floating_point() else x.float()


def _fold(x: Tensor, n: int) -> Tensor:
    """`(m·n, ..., d)` as `(n, T, d)`: of several rows of a sample, those that lie n apart belong together."""
    return x.unflatten(0, (-1, n)).transpose(0, 1).flatten(1, -2)


def _use(call: _Call, name: str, p: nn.Parameter, grad: Tensor, n: int) -> Use:
    """The gradients of a parameter by one call, from the gradient of the call's output, `(rows, ..., d)`."""
    layer, given = call.layer, call.given
    kind = type(layer)
    if kind is nn.Embedding:
        ids = _fold(given.view(len(given), -1, 1), n).squeeze(2)
        right = _fold(grad.unsqueeze(1), n)
        if layer.padding_idx is not None:
            right = right.masked_fill((ids == layer.padding_idx).unsqueeze(2), 0)
        return Outer(ids, right, p.shape[0])
    is_linear, is_conv1d = kind is nn.Linear, f"{kind.__module__}.{kind.__name__}" == _CONV1D
    if (is_linear or is_conv1d) and name == "bias":
        return Rows(_full(_fold(grad.unsqueeze(1), n)).sum(1))
    if is_linear or is_conv1d:
        left, right = (_fold(x.unsqueeze(1), n) for x in ((grad, given) if is_linear else (given, grad)))
        return Outer(left, right, p.shape[0])
    rows = vmap(_gradient(layer, name, p), randomness="error")(call.given, grad)
    return Rows(_full(rows).unflatten(0, (-1, n)).sum(0))


def _gradient(layer: nn.Module, name: str, p: nn.Parameter) -> Callable[[Tensor, Tensor], Tensor]:
    """The gradient of one parameter by one row of a call, of a layer of any kind."""

    def gradient(x: Tensor, grad: Tensor) -> Tensor:
        output, pull_back = vjp(lambda q: functional_call(layer, {name: q}, (x.unsqueeze(0),)), p.detach())
        return pull_back(grad.unsqueeze(0).to(output.dtype))[0]

    return gradient


def _by_loop(losses: Tensor, params: list[nn.Parameter]) -> dict[nn.Parameter, list[Use]]:
    """The gradients of these parameters by a backward pass for each sample; none of those that have no influence."""
    if not params:
        return {}
    total = torch.autograd.grad(losses.sum(), params, retain_graph=True, allow_unused=True)
    params = [p for p, grad in zip(params, total, strict=True) if grad is not None]
    if not params:
        return {}
    rows = []
    for loss in losses:
        grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if grad is None else grad for p, grad in zip(params, grads, strict=True)])
    return {p: [Rows(_full(torch.stack(of_p)))] for p, of_p in zip(params, zip(*rows, strict=True), strict=True)}
