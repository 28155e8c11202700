"""A curvature matrix of a model's loss: its products with vectors, and the matrix itself where that is small.

`torch.func` differentiates. A product costs about five forward passes over the data.
"""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..metrics.forward import flags_kept, reference_adapters
from ..sven.capture import Capture
from .batches import Batch, read_batches
from .checks import check_choice, check_count
from .losses import find_loss, sequence_differences


Kind = Literal["ggn", "hessian", "fisher"]
Reduction = Literal["mean", "sum"]
Values = dict[str, torch.Tensor]
LARGEST_MATRIX = 20_000  # rows of a matrix that is made whole: 3.2 GB in float64
SMALL_MODEL = 2_000_000  # elements; it is multiplied with many vectors at once, which takes as many times the memory
VECTORS_AT_ONCE = 32
COLUMNS_AT_ONCE = 1 << 18


class Curvature:
    """The Hessian, the generalized Gauss-Newton matrix (GGN) or the Fisher matrix of a loss over data.

    A model makes predictions f(θ), and each term has a loss ℓ. `"hessian"` is the sum of ∇²ℓ(f(θ)) over the terms.
    `"ggn"` is the sum of Jᵀ ∇²ℓ J with J = ∂f/∂θ and ∇²ℓ with respect to the predictions (Martens, 2020, arXiv
    1412.1193). `"fisher"` is the sum of g gᵀ with the gradient g of each term for one target that is drawn from the
    model. The model is in evaluation mode during each product, and attention uses the kernel of plain matrix products,
    the one that torch can differentiate forwards.

    Args:
        model: any `nn.Module`, as a `PreTrainedModel` or `PeftModel`, on one process. A prediction is its output's
            `logits`, or its output if that is a tensor.
        data: a `DataLoader`, or rows: a dataset or a list. A batch is a dictionary of the model's arguments with
            `labels` (or `completion_mask`), or a tuple of inputs and labels. Rows of tokens may have unequal lengths.
            Preference pairs are rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, or batches of TRL's
            `DataCollatorForPreference`.
        kind: which matrix.
        reduction: `"mean"` divides by the number of terms in all batches, `"sum"` by nothing. A term is a token with
            a label, a row with a class, a pair, or one of the numbers that a function as `loss` returns.
        params: `"trainable"`, `"all"`, or the names of the parameters that the matrix is about.
        loss: `"causal_lm"`, `"classification"`, `"dpo"`, or a function of predictions and targets that returns one
            loss a term, as `nn.MSELoss(reduction="none")`.
        max_batches: reads no more batches.
        batch_size: rows a batch, unless `data` is a `DataLoader`.
        ref_model: the reference of `"dpo"`. Without one it is the model without its adapter, unless the batches have
            `ref_chosen_logps` and `ref_rejected_logps`.
        beta: of `"dpo"`.
        seed: of the targets that are drawn.

    Attributes:
        parameters: the tensors that the matrix is about, by name.
        n_params: their elements, the rows of the matrix.
        n_terms: the terms of the loss.
        loss: the loss, mean or sum as `reduction` says.
        rank_bound: the matrix has no more eigenvalues that are not 0.
        vectors_at_once: so many vectors are multiplied together; more take more memory.

    Raises:
        ValueError: an argument is none of those above, there is nothing to differentiate, or the loss is not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        *,
        kind: Kind = "ggn",
        reduction: Reduction = "mean",
        params: Literal["trainable", "all"] | Sequence[str] = "trainable",
        loss: str | Callable = "causal_lm",
        max_batches: int | None = None,
        batch_size: int = 8,
        ref_model: nn.Module | None = None,
        beta: float = 0.1,
        seed: int = 0,
    ) -> None:
        check_choice("kind", kind, get_args(Kind))
        check_choice("reduction", reduction, get_args(Reduction))
        check_count("max_batches", max_batches)
        check_count("batch_size", batch_size)
        self._model, self.kind, self.reduction = model, kind, reduction
        self._loss = find_loss(loss, beta)
        if kind == "fisher" and self._loss.draw is None:
            raise ValueError("`kind` is 'fisher', which draws targets from the model; a function as `loss` has none.")
        self.parameters = _choose(model, params)
        _check_attention(model)
        self.n_params = sum(tensor.numel() for tensor in self.parameters.values())
        self._device = next(iter(self.parameters.values())).device
        small = sum(tensor.numel() for tensor in model.parameters()) <= SMALL_MODEL
        self.vectors_at_once = VECTORS_AT_ONCE if small else 1
        self._batches = read_batches(data, loss, batch_size, max_batches)
        if loss == "dpo":
            self._batches = [self._with_reference(batch, ref_model) for batch in self._batches]
        self._first_pass(torch.Generator().manual_seed(seed))

    def product(self, vectors: torch.Tensor) -> torch.Tensor:
        """The matrix times one vector `(n_params,)` or several `(n_params, n)`; float64 on the CPU.

        Raises:
            ValueError: the product is not finite.
        """
        several = vectors.dim() == 2
        tangents = self._split(vectors.T if several else vectors)
        total: Values = {}
        with _evaluating(self._model):
            for batch in self._on_device():
                multiply = self._batch_product(batch)
                if several:
                    multiply = vmap(multiply, chunk_size=self.vectors_at_once)
                for name, part in multiply(tangents).items():
                    total[name] = total[name].add_(part) if name in total else part.double()
        lead = tangents[next(iter(tangents))].shape[:1] if several else ()
        flat = torch.cat([total[name].reshape(*lead, -1) for name in self.parameters], dim=-1).cpu() * self._scale
        if not flat.isfinite().all():
            raise ValueError("A product with the curvature matrix is not finite: the model's derivatives are not.")
        return flat.T if several else flat

    def matrix(self) -> torch.Tensor:
        """The whole matrix, float64 `(n_params, n_params)`.

        Raises:
            ValueError: it has more than 20,000 rows.
        """
        _check_size(self.n_params, "parameters")
        units = torch.eye(self.n_params, dtype=torch.float64)
        matrix = torch.cat([self.product(part) for part in units.split(self.vectors_at_once, dim=1)], dim=1)
        return (matrix + matrix.T) / 2

    @property
    def is_semidefinite(self) -> bool:
        """Whether no eigenvalue can be negative. A function as loss may not be convex in its predictions."""
        return self.kind == "fisher" or (self.kind == "ggn" and self._loss.draw is not None)

    @property
    def has_rows(self) -> bool:
        """Whether the matrix is RᵀR with one row of R a term."""
        return self.kind == "fisher" or (self.kind == "ggn" and self._loss.is_scalar)

    def rows(self) -> torch.Tensor:
        """R of a matrix RᵀR, `(n_terms, n_params)` on the CPU: a scaled gradient a term.

        Raises:
            ValueError: the matrix has no such form, or more than 20,000 terms.
        """
        if not self.has_rows:
            raise ValueError(f"The matrix {self.kind!r} of this loss has more than one row a term.")
        _check_size(self.n_terms, "terms")
        dtype = torch.promote_types(torch.float32, next(iter(self.parameters.values())).dtype)
        found = torch.empty(self.n_terms, self.n_params, dtype=dtype)  # gigabytes of a large adapter: made once
        begin, of_batch = 0, self._rows_of_pairs if self._loss.is_scalar else self._rows_of_terms
        with _evaluating(self._model):
            for batch in self._on_device():
                for rows in of_batch(batch):
                    found[begin : begin + len(rows)] = rows * self._scale**0.5
                    begin += len(rows)
        return found

    def _rows_of_pairs(self, batch: Batch) -> Iterator[torch.Tensor]:
        """The rows of a batch of pairs, all by one backward pass."""
        with torch.enable_grad(), _trained(self._model, self.parameters):
            with Capture(self._model) as capture:
                predictions = self._predict({}, batch)
            jacobian = capture.differentiate(predictions)
        named = dict(self._model.named_parameters())
        jacobian.params = [named[name] for name in self.parameters]  # the order of the rows' elements
        yield jacobian.rows() * self._factors(predictions.detach(), batch)[:, None]

    def _rows_of_terms(self, batch: Batch) -> Iterator[torch.Tensor]:
        """The rows of a batch, by a backward pass each."""
        predictions, pull = vjp(lambda point: self._predict(point, batch), self.parameters)
        factors = self._factors(predictions, batch)
        for i in range(len(predictions)):
            one = torch.zeros_like(predictions)
            one[i] = factors[i]
            (row,) = pull(one)
            yield torch.cat([row[name].reshape(-1) for name in self.parameters])[None]

    def gram(self, rows: torch.Tensor) -> torch.Tensor:
        """RRᵀ of the rows R that [`rows`] returns, float64 `(n_terms, n_terms)` on the CPU."""
        device = torch.device("cpu") if self._device.type == "mps" else self._device  # which has no float64
        total = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device)
        for part in rows.split(COLUMNS_AT_ONCE, dim=1):
            part = part.to(device).double()
            total.addmm_(part, part.T)
        return total.cpu()

    def loss_at(self, offset: torch.Tensor | None = None) -> float:
        """The loss where the parameters are moved by `offset`, `(n_params,)`; mean or sum as `reduction` says."""
        return sum(losses.double().sum().item() for _, losses in self._at(offset)) * self._scale

    def choices_at(self, offset: torch.Tensor | None = None) -> torch.Tensor:
        """The class, token or side that is predicted for each term, `(n_terms,)`, where parameters are moved.

        Raises:
            ValueError: the loss is a function, whose predictions are no choices.
        """
        choose = self._loss.choose
        if choose is None:
            raise ValueError("A function as `loss` predicts no class: use 'classification', 'causal_lm' or 'dpo'.")
        return torch.cat([choose(predictions).cpu() for predictions, _ in self._at(offset)])

    def _at(self, offset: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Predictions and losses of each batch where the parameters are moved by `offset`."""
        values = self.parameters
        if offset is not None:
            values = {name: values[name] + part for name, part in self._split(offset).items()}
        for batch in self._on_device():
            with _evaluating(self._model):
                predictions = self._predict(values, batch)
                losses = self._loss.of_terms(predictions, batch.targets)
            yield predictions, losses

    def _first_pass(self, generator: torch.Generator) -> None:
        """Counts the terms, whose number weights the batches, and draws the targets of `"fisher"`."""
        total, n_predictions, drawn = 0.0, 0, []
        self.n_terms = 0
        for predictions, losses in self._at(None):
            total, self.n_terms = total + losses.double().sum().item(), self.n_terms + losses.numel()
            n_predictions += predictions.numel()
            if self.kind == "fisher":
                drawn.append(self._loss.draw(predictions, generator).cpu())
        if not self.n_terms:
            raise ValueError("`data` has no label: every token is masked.")
        if not torch.tensor(total).isfinite():
            raise ValueError(f"The loss of the model on `data` is {total}: it has no curvature.")
        if drawn:
            self._batches = [replace(b, drawn=targets) for b, targets in zip(self._batches, drawn, strict=True)]
        self._scale = 1 / self.n_terms if self.reduction == "mean" else 1.0
        self.loss = total * self._scale
        # Adding a number to all logits of a term changes nothing
        rank = n_predictions if self._loss.choose is None or self._loss.is_scalar else n_predictions - self.n_terms
        rank = {"ggn": rank, "fisher": self.n_terms, "hessian": self.n_params}[self.kind]
        self.rank_bound = min(rank, self.n_params)

    def _batch_product(self, batch: Batch) -> Callable[[Values], Values]:
        """The product of the sum over one batch with one vector."""
        values = self.parameters

        def predict(point: Values) -> torch.Tensor:
            return self._predict(point, batch)

        def total(predictions: torch.Tensor) -> torch.Tensor:
            return self._loss.of_terms(predictions, batch.targets).sum()

        def of_hessian(tangents: Values) -> Values:
            return jvp(grad(lambda point: total(predict(point))), (values,), (tangents,))[1]

        def of_ggn(tangents: Values) -> Values:
            predictions, moved = jvp(predict, (values,), (tangents,))
            _, curved = jvp(grad(total), (predictions,), (moved,))
            return vjp(predict, values)[1](curved)[0]

        def of_fisher(tangents: Values) -> Values:
            predictions, moved = jvp(predict, (values,), (tangents,))
            slopes = self._factors(predictions, batch)
            along = (slopes * moved).reshape(len(slopes), -1).sum(1)
            return vjp(predict, values)[1](slopes * along.reshape(-1, *[1] * (slopes.dim() - 1)))[0]

        return {"hessian": of_hessian, "ggn": of_ggn, "fisher": of_fisher}[self.kind]

    def _factors(self, predictions: torch.Tensor, batch: Batch) -> torch.Tensor:
        """What a row of R is of the gradients of its term's predictions: slopes at drawn targets, or √∇²ℓ."""
        if self.kind == "fisher":
            return grad(lambda p: self._loss.of_terms(p, batch.drawn).sum())(predictions)
        slope = grad(lambda p: self._loss.of_terms(p, batch.targets).sum())
        return jvp(slope, (predictions,), (torch.ones_like(predictions),))[1].clamp(min=0).sqrt()

    def _predict(self, values: Values, batch: Batch) -> torch.Tensor:
        return self._loss.predict(_logits(self._model, values, batch.inputs), batch)

    def _on_device(self) -> Iterator[Batch]:
        return (batch.to(self._device) for batch in self._batches)

    def _split(self, vectors: torch.Tensor) -> Values:
        """One vector `(n_params,)` or rows of them `(n, n_params)` by parameter, in its shape and dtype."""
        parts = vectors.split([tensor.numel() for tensor in self.parameters.values()], dim=-1)
        return {
            name: part.to(tensor).reshape(*vectors.shape[:-1], *tensor.shape)
            for (name, tensor), part in zip(self.parameters.items(), parts, strict=True)
        }

    def _with_reference(self, batch: Batch, ref_model: nn.Module | None) -> Batch:
        if batch.reference is not None:
            return batch
        model = self._model if ref_model is None else ref_model
        with _evaluating(model), _without_adapter(model) if ref_model is None else contextlib.nullcontext():
            on_device = batch.to(self._device)
            logits = _logits(model, {}, on_device.inputs)
            return replace(batch, reference=sequence_differences(logits, on_device).cpu())


def _logits(model: nn.Module, values: Values, inputs: Any) -> torch.Tensor:
    """What a model returns where some of its tensors have other values; at least float32."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    output = functional_call(model, values, args, kwargs)
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(f"The model returns a {type(output).__name__}: it must be a tensor, or have `logits`.")
    if isinstance(inputs, Mapping) and "input_ids" in inputs and logits.dim() == 3:
        logits = logits[:, -inputs["input_ids"].shape[1] :]  # prompt-learning adapters put virtual tokens in front
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _choose(model: nn.Module, params: str | Sequence[str]) -> Values:
    """The tensors of a model that a matrix is about, by name, detached."""
    known = dict(model.named_parameters())
    if params == "trainable":
        chosen = {name: tensor for name, tensor in known.items() if tensor.requires_grad}
    elif params == "all":
        chosen = {name: tensor for name, tensor in known.items() if tensor.is_floating_point()}
    elif isinstance(params, str):
        raise ValueError(f"`params` is {params!r}: it must be 'trainable', 'all' or a list of names.")
    else:
        if unknown := [name for name in params if name not in known]:
            raise ValueError(f"`params` has {unknown[0]!r}, which no parameter of the model is called.")
        chosen = {name: known[name] for name in params}
    if not chosen:
        raise ValueError(f"`params` is {params!r}, and the model has no such parameter.")
    if sharded := [name for name, tensor in chosen.items() if isinstance(tensor, DTensor)]:
        raise ValueError(f"The parameter {sharded[0]!r} is sharded: load the model on one process.")
    return {name: tensor.detach() for name, tensor in chosen.items()}


def _check_attention(model: nn.Module) -> None:
    used = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if used not in (None, "eager", "sdpa"):
        raise ValueError(
            f"The model's attention is {used!r}, which torch cannot differentiate forwards: load the model with "
            "`attn_implementation='sdpa'` or 'eager'."
        )


def _check_size(rows: int, of: str) -> None:
    if rows > LARGEST_MATRIX:
        raise ValueError(
            f"The matrix of {rows:,} {of} is too large to be made whole, the limit is {LARGEST_MATRIX:,}: use "
            "`method='lanczos'` or 'slq', or fewer rows of data."
        )


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a cache of keys; afterwards each module is as it was."""
    training = {module: module.training for module in model.modules()}
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    try:
        if use_cache is not None:
            config.use_cache = False
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if use_cache is not None:
            config.use_cache = use_cache
        for module, was_training in training.items():
            module.training = was_training


@contextlib.contextmanager
def _trained(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Gradients for the parameters of these names and for no others."""
    with flags_kept(model):
        for name, p in model.named_parameters():
            p.requires_grad_(name in names)
        yield


@contextlib.contextmanager
def _without_adapter(model: nn.Module) -> Iterator[None]:
    """The reference of a PEFT model."""
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            "`loss` is 'dpo', which needs a reference: pass `ref_model`, or batches with `ref_chosen_logps` and "
            "`ref_rejected_logps`. Only a PEFT model is its own reference, without its adapter."
        )
    with reference_adapters(model):
        yield
