"""A model's trained parameters as one vector that a file can hold: all of them, or a random subspace of them."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .projectors import Kind, Projector, make_projector


class TrainedVector:
    """The trainable parameters of a model, one after another, as the vector that is compressed.

    Of a PEFT model these are the adapter's. A `UniLoraConfig` adapter is one vector already, and the random map from
    it to LoRA's matrices is PEFT's (Uni-LoRA, arXiv 2506.00799).

    Args:
        model: with at least one parameter that requires a gradient.
        base: the model that training started from; then the vector has the differences from it. Default: the values.

    Raises:
        ValueError: no parameter is trainable, `base` lacks one, or a layer keeps statistics of the data that no file
            would hold.
    """

    projector_name = "none"

    def __init__(self, model: nn.Module, base: nn.Module | None = None) -> None:
        self.parameters = trainable_parameters(model)
        self.start: torch.Tensor | float = 0.0 if base is None else _values_of(base, model)
        learnt = [name for name, m in model.named_modules() if _keeps_statistics(m)]
        if learnt:
            raise ValueError(
                f"`model` keeps running statistics of its data in {learnt[0]} (BatchNorm), which are no part of the "
                "compressed weights: train another normalization, or freeze the layer's weights if it was not trained."
            )

    @property
    def dim(self) -> int:
        """Number of entries."""
        return sum(p.numel() for p in self.parameters)

    def read(self) -> torch.Tensor:
        """The vector as the model has it. Shape `(dim,)`, float32."""
        return flat_values(self.parameters) - self.start

    def write(self, vector: torch.Tensor) -> None:
        """Sets the model's parameters to what the vector stands for, in their own dtype."""
        write_flat(self.parameters, self.start + vector)

    def gradient(self) -> torch.Tensor:
        """The gradient with respect to the vector, of the parameters' own; zeros where a parameter has none."""
        return flat_gradient(self.parameters)

    def check(self) -> None:
        """Raises a ValueError if the model is not what the vector stands for. Here it always is."""


class Subspace(TrainedVector):
    """The trainable parameters as θ = θ₀ + P w, with a vector w of `dim` numbers and a random matrix P.

    θ₀ are the parameters that the model has when it is made: of a seed, or of a checkpoint that was trained on other
    data. Any optimizer of w trains the model, in any Trainer (`optimizers=(optimizer, None)`):

        subspace = Subspace(model, dim=256)
        optimizer = subspace.attach(torch.optim.Adam([subspace.vector], lr=1e-2))

    This is the training of pactl and SubLoRA (Lotfi et al., 2022, arXiv 2211.13609; 2023, arXiv 2312.17173), without
    another module around the model.

    Args:
        model: a network, or a PEFT model with LoRA, whose parameters that require a gradient are trained.
        dim: number of entries of w.
        projector: `"kronecker"`, `"dense"`, `"sparse"` or `"fastfood"`: see [`projectors`].
        seed: of P.

    Attributes:
        vector (`nn.Parameter`): w. Shape `(dim,)`, float32, zeros at first.
    """

    def __init__(self, model: nn.Module, dim: int, projector: Kind = "kronecker", seed: int = 0) -> None:
        super().__init__(model)
        device = self.parameters[0].device
        self.start = flat_values(self.parameters)
        self.projector: Projector = make_projector(projector, self.start.numel(), dim, seed).to(device)
        self.projector_name, self.seed = projector, seed
        self.vector = nn.Parameter(torch.zeros(dim, device=device))

    @property
    def dim(self) -> int:
        return self.vector.numel()

    def read(self) -> torch.Tensor:
        return self.vector.detach().clone()

    def write(self, vector: torch.Tensor) -> None:
        with torch.no_grad():
            self.vector.copy_(vector)
            write_flat(self.parameters, self.start + self.projector.project(self.vector))

    def gradient(self) -> torch.Tensor:
        return self.projector.pull_back(flat_gradient(self.parameters))

    def attach(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Lets an optimizer of [`vector`] train the model: each step reads its gradients and writes its parameters.

        Raises:
            ValueError: the optimizer does not have `vector` as its only parameter.
        """
        if [id(p) for group in optimizer.param_groups for p in group["params"]] != [id(self.vector)]:
            raise ValueError("`optimizer` must have `[subspace.vector]` as its parameters, and nothing else.")
        optimizer.register_step_pre_hook(lambda *_: setattr(self.vector, "grad", self.gradient()))
        optimizer.register_step_post_hook(lambda *_: self._after_step())
        return optimizer

    def _after_step(self) -> None:
        self.write(self.vector)
        for parameter in self.parameters:
            parameter.grad = None

    def check(self) -> None:
        """Raises a ValueError if the parameters are not θ₀ + P w, as after training by another optimizer."""
        expected = self.start + self.projector.project(self.vector.detach())
        found = flat_values(self.parameters)
        eps = torch.finfo(self.parameters[0].dtype).eps
        if not torch.allclose(found, expected, rtol=8 * eps, atol=8 * eps * max(expected.abs().max().item(), 1e-30)):
            raise ValueError(
                f"The weights of `model` are up to {(found - expected).abs().max().item():.3g} away from θ₀ + P w of "
                "`subspace`: they were trained outside of it. Train by `subspace.attach(optimizer)`."
            )


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that require a gradient, each once."""
    found = [p for p in model.parameters() if p.requires_grad]
    if not found:
        raise ValueError(
            "No parameter of `model` requires a gradient, so it is unknown which were trained. Load an adapter with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    return found


def _values_of(base: nn.Module, model: nn.Module) -> torch.Tensor:
    """The values in `base` of the parameters that are trained in `model`."""
    own = dict(base.named_parameters())
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for name, p in model.named_parameters():
        if p.requires_grad and (name not in own or own[name].shape != p.shape):
            raise ValueError(
                f"`base` has no {name} of shape {tuple(p.shape)}, which `model` trains: it is another one."
            )
    return flat_values([own[name] for name in names]).to(next(model.parameters()).device)


def flat_values(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The values of several parameters in one float32 vector."""
    return torch.cat([p.detach().float().flatten() for p in parameters])


def write_flat(parameters: Iterable[nn.Parameter], flat: torch.Tensor) -> None:
    """Copies one vector into several parameters, in their order."""
    start = 0
    with torch.no_grad():
        for p in parameters:
            p.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()


def flat_gradient(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The gradients of several parameters in one float32 vector."""
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).float().flatten() for p in parameters])


def _keeps_statistics(module: nn.Module) -> bool:
    if not isinstance(module, _BatchNorm) or not module.track_running_stats:
        return False
    return module.weight is None or module.weight.requires_grad
