"""The hyperparameters of PRM: their names, defaults and checks, in one place.

A parameter group of [`PRM`] holds them under the same names. Every error names the argument, its value and what is
allowed.
"""

import importlib.util
import inspect
import math
import warnings
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, Literal, TypedDict, get_args

import torch
from torch import Tensor

from .._names import did_you_mean, number_in_quotes
from ..sharding import is_fake


Mask = Literal["snr", "soft", "hard", "none"]
Reduction = Literal["per_param", "per_tensor", "per_row"]
Estimator = Literal["ema", "debiased"]
Boundary = Literal["batch", "empirical"]
StateDtype = Literal["float32", "bf16", "8bit"]

MASKS, REDUCTIONS, ESTIMATORS = get_args(Mask), get_args(Reduction), get_args(Estimator)
BOUNDARIES, STATE_DTYPES = get_args(Boundary), get_args(StateDtype)
_CHOICES = {
    "mask": MASKS,
    "reduction": REDUCTIONS,
    "estimator": ESTIMATORS,
    "boundary": BOUNDARIES,
    "state_dtype": STATE_DTYPES,
}
_SWITCHES = {
    **dict.fromkeys(("amsgrad", "bias_correction", "decoupled_weight_decay", "maximize"), (True, False)),
    **dict.fromkeys(("foreach", "fused"), (None, True, False)),
    **dict.fromkeys(("capturable", "differentiable"), (True, False)),
}
# Names of earlier versions, which are accepted with a warning.
RENAMED = {"rho": "variance_beta", "warmup_steps": "mask_warmup_steps"}

_PLAIN = frozenset({float, int, bool, str, type(None)})  # and not NumPy's kin of these

# Keeps 0/0 out of the mask and changes nothing else: the smallest normal float32. Language-model gradients have
# m² far below Adam's eps of 1e-8, so a mask that shares that eps is closed by it and not by the noise.
SCALE_FREE_EPS = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Hyperparameters:
    """The arguments of [`PRM`], where they are documented, as they hold for one parameter group.

    Raises:
        ValueError: an argument is out of its range, or arguments contradict each other.
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float | Tensor = 0.01
    mask: Mask = "snr"
    reduction: Reduction = "per_row"
    estimator: Estimator = "debiased"
    variance_beta: float = 0.99
    signal_beta: float | None = None
    softness: float = 1.0
    boundary: Boundary = "batch"
    alpha: float | None = None
    batch_size: int | None = None
    n_dataset: int | None = None
    mask_eps: float | None = None
    mask_warmup_steps: int = 0
    mask_min_elements: int = 32
    relative_eps: float | None = None
    max_grad_norm: float = 1.0
    amsgrad: bool = False
    bias_correction: bool = True
    decoupled_weight_decay: bool = True
    maximize: bool = False
    foreach: bool | None = None
    fused: bool | None = None
    capturable: bool = False
    differentiable: bool = False
    state_dtype: StateDtype = "float32"

    @classmethod
    def of_group(cls, group: dict[str, Any]) -> "Hyperparameters":
        """The hyperparameters that a parameter group holds; it may hold other keys."""
        if "params" not in group:
            raise ValueError(f"A parameter group needs the key 'params', got one with {sorted({*group} - {*NAMES})}.")
        return cls(**{name: group[name] for name in NAMES})

    @property
    def beta1(self) -> float:
        return self.betas[0]

    @property
    def beta2(self) -> float:
        return self.betas[1]

    @property
    def has_decay(self) -> bool:
        return is_batched(self.weight_decay) or bool(self.weight_decay != 0)

    @property
    def masked(self) -> bool:
        return self.mask != "none"

    @property
    def noise_weight(self) -> float:
        """alpha, the factor between a signal that counts and the noise of the batch mean.

        1 for fresh batches (`"batch"`), b/(n-b) for batches of b drawn from n examples (`"empirical"`); a number given
        as `alpha` overrides both. Source: Litman & Guo, arXiv 2605.01172, eq. 245.
        """
        if self.alpha is not None:
            return self.alpha
        return self.batch_size / (self.n_dataset - self.batch_size) if self.boundary == "empirical" else 1.0

    @property
    def mask_epsilon(self) -> float:
        return SCALE_FREE_EPS if self.mask_eps is None else self.mask_eps

    def is_open(self, numel: float | Tensor) -> bool | Tensor:
        """Whether a tensor of so many elements has too few of them to tell signal from noise, so that q = 1."""
        has_units = self.estimator == "debiased" and self.reduction != "per_param"
        return has_units & (numel < self.mask_min_elements)

    @property
    def step_length(self) -> float:
        """The factor of the learning rate that makes a step with `relative_eps` as long as AdamW's."""
        return 1.0 if self.relative_eps is None else 1.0 + self.relative_eps

    def adam_eps(self, n_parameters: int) -> float:
        """eps in the denominator of Adam, where the optimizer trains `n_parameters` scalar parameters."""
        if self.relative_eps is None:
            return self.eps
        return self.relative_eps * self.max_grad_norm / max(n_parameters, 1) ** 0.5

    def __post_init__(self) -> None:
        check_lr(self)
        self._check_ranges()
        self._check_switches()
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            _check(value in allowed, name, value, "it must be one of " + ", ".join(map(repr, allowed)))
        self._check_signal_beta()
        self._check_boundary()
        self._check_relative_eps()
        self._check_state_dtype()
        self._check_implementation()

    def _check_ranges(self) -> None:
        betas = self.betas
        _check(isinstance(betas, (tuple, list)) and len(betas) == 2, "betas", betas, "it must be a pair of numbers")
        values = {"betas[0]": betas[0], "betas[1]": betas[1]}
        values |= {name: getattr(self, name) for name in ("variance_beta", "eps", "weight_decay", "softness")}
        for name in ("betas[0]", "betas[1]", "weight_decay"):
            value = values[name]
            if is_batched(value):
                _check(value.numel() == 1, name, value, "a tensor must have one element for each model")
                values[name] = 0.0  # checked where it was made
            elif isinstance(value, Tensor):
                allowed = "a tensor must have one element, and may only require a gradient with differentiable=True"
                _check(self.differentiable and value.numel() == 1, name, value, allowed)
                values[name] = value.item()
        for name in ("betas[0]", "betas[1]", "variance_beta"):
            _check(_number(values[name]) and 0 <= values[name] < 1, name, values[name], "it must be in [0, 1)")
        for name in ("eps", "weight_decay", "softness"):
            valid = _number(values[name]) and values[name] >= 0
            _check(valid, name, values[name], "it must be a finite number of at least 0")
        for name in ("alpha", "mask_eps"):
            value = getattr(self, name)
            allowed = "it must be None or a finite number of at least 0"
            _check(value is None or (_number(value) and value >= 0), name, value, allowed)
        for name in ("mask_warmup_steps", "mask_min_elements"):
            value = getattr(self, name)
            valid = _number(value) and value >= 0 and value == int(value)
            _check(valid, name, value, "it must be an integer of at least 0")
        for name in ("batch_size", "n_dataset"):
            value = getattr(self, name)
            valid = value is None or (_number(value) and value >= 1 and value == int(value))
            _check(valid, name, value, "it must be None or a positive integer")

    def _check_switches(self) -> None:
        for name, allowed in _SWITCHES.items():
            value = getattr(self, name)
            valid = any(value is known for known in allowed)
            _check(valid, name, value, "it must be " + " or ".join(map(str, allowed)))

    def _check_signal_beta(self) -> None:
        beta = self.signal_beta
        if beta is None:
            return
        _check(_number(beta) and 0 <= beta < 1, "signal_beta", beta, "it must be None or in [0, 1)")
        _check(
            self.reduction == "per_row" and self.estimator == "debiased",
            "signal_beta",
            beta,
            "it needs reduction='per_row' and estimator='debiased', and there are "
            f"reduction={self.reduction!r} and estimator={self.estimator!r}; set these, or leave signal_beta=None",
        )

    def _check_boundary(self) -> None:
        sizes = {"batch_size": self.batch_size, "n_dataset": self.n_dataset}
        if self.boundary == "empirical" and self.alpha is None:
            for name, value in sizes.items():
                allowed = "boundary='empirical' needs it for alpha = b/(n-b); or give `alpha`"
                _check(value is not None, name, value, allowed)
        if None not in sizes.values():
            allowed = f"it must be larger than batch_size={self.batch_size}"
            _check(self.n_dataset > self.batch_size, "n_dataset", self.n_dataset, allowed)

    def _check_relative_eps(self) -> None:
        norm = self.max_grad_norm
        if self.relative_eps is None:
            _check(_number(norm) and norm >= 0, "max_grad_norm", norm, "it must be a finite number of at least 0")
            return
        valid = _number(self.relative_eps) and self.relative_eps > 0
        _check(valid, "relative_eps", self.relative_eps, "it must be None or a finite number above 0")
        allowed = "relative_eps needs the norm that gradients are clipped to, a finite number above 0"
        _check(_number(norm) and norm > 0, "max_grad_norm", norm, allowed)
        allowed = "relative_eps sets it; leave eps at its default, or relative_eps=None"
        _check(self.eps == type(self).eps, "eps", self.eps, allowed)

    def _check_state_dtype(self) -> None:
        dtype = self.state_dtype
        if dtype != "float32":
            allowed = "autograd cannot run through what it rounds; use state_dtype='float32'"
            _check(not self.differentiable, "state_dtype", dtype, allowed)

    def _check_implementation(self) -> None:
        if self.fused:
            _check(not self.foreach, "fused", True, "`fused` and `foreach` cannot both be True")
            _check(not self.differentiable, "fused", True, "autograd cannot run through it; use fused=False")
            allowed = (
                'it needs Triton and NumPy; install them with `pip install "prm-hf[triton]"`, or leave fused=None'
            )
            found = all(importlib.util.find_spec(name) is not None for name in ("triton", "numpy"))
            _check(found, "fused", True, allowed)
        if self.foreach:
            _check(not self.differentiable, "foreach", True, "autograd cannot run through it; use foreach=False")


NAMES = tuple(field.name for field in fields(Hyperparameters))


class Options(TypedDict, total=False):
    """The keyword arguments of [`PRM`] for type checkers; `rho` and `warmup_steps` are names of earlier versions."""

    eps: float
    weight_decay: float | Tensor
    mask: Mask
    reduction: Reduction
    estimator: Estimator
    variance_beta: float
    signal_beta: float | None
    softness: float
    boundary: Boundary
    alpha: float | None
    batch_size: int | None
    n_dataset: int | None
    mask_eps: float | None
    mask_warmup_steps: int
    mask_min_elements: int
    relative_eps: float | None
    max_grad_norm: float
    amsgrad: bool
    bias_correction: bool
    decoupled_weight_decay: bool
    maximize: bool
    foreach: bool | None
    fused: bool | None
    capturable: bool
    differentiable: bool
    state_dtype: StateDtype | torch.dtype
    rho: float
    warmup_steps: int


def signature() -> inspect.Signature:
    """The signature of [`PRM`], for `help` and for libraries that look at it."""
    params = inspect.Parameter("params", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    kinds = {"lr": inspect.Parameter.POSITIONAL_OR_KEYWORD, "betas": inspect.Parameter.POSITIONAL_OR_KEYWORD}
    others = [
        inspect.Parameter(f.name, kinds.get(f.name, inspect.Parameter.KEYWORD_ONLY), default=f.default)
        for f in fields(Hyperparameters)
    ]
    return inspect.Signature([params, *others])


def is_batched(value: Any) -> bool:
    """Whether a value is a tensor of `torch.func.vmap`, one of several models: what it holds cannot be read."""
    return isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value)


def check_lr(h: "Hyperparameters", lr: float | Tensor | None = None) -> None:
    """Raises ValueError for an invalid learning rate: that of `h`, or another one that a schedule has set."""
    lr = h.lr if lr is None else lr
    if not isinstance(lr, Tensor):
        _check(_number(lr) and lr >= 0, "lr", lr, "the learning rate must be a finite number of at least 0")
        return
    _check(lr.numel() == 1, "lr", lr, "a tensor learning rate must have one element")
    allowed = "a tensor learning rate with foreach=True needs capturable=True"
    _check(not h.foreach or h.capturable, "lr", lr, allowed)
    # On an accelerator looking at the value would stop the step for it.
    is_hidden = lr.device.type != "cpu" or is_fake(lr) or is_batched(lr)
    _check(is_hidden or lr.item() >= 0, "lr", lr, "the learning rate must be at least 0")


def with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """The settings that were given, and the defaults of the others. A parameter group may complete them.

    Raises:
        TypeError: a setting is not known.
    """
    for name in given:
        if name not in NAMES:
            raise TypeError(
                f"PRM() got an unexpected keyword argument {name!r}.{did_you_mean(name, NAMES)} "
                f"It knows {', '.join(NAMES)}."
            )
    return {name: given.get(name, getattr(Hyperparameters, name)) for name in NAMES}


def normalize(settings: dict[str, Any], warn: bool = True) -> dict[str, Any]:
    """A group's settings by today's names and values.

    Earlier names are renamed, torch dtypes become their names, and NumPy's scalars and tensors of one element the
    numbers that a checkpoint can hold. A tensor `lr` stays, which a schedule may change in place, and so does what
    autograd follows.
    """
    for old, new in RENAMED.items():
        if old in settings:
            if warn:
                message = f"PRM's `{old}` is `{new}` now; the old name will go."
                warnings.warn(message, DeprecationWarning, stacklevel=3)
            settings[new] = settings.pop(old)
    if {"beta1", "beta2"} <= settings.keys():  # of the functional form
        warnings.warn("`beta1` and `beta2` are `betas` now; the old names will go.", DeprecationWarning, stacklevel=3)
        settings["betas"] = (settings.pop("beta1"), settings.pop("beta2"))
    dtypes = {torch.float32: "float32", torch.bfloat16: "bf16"}
    if isinstance(dtype := settings.get("state_dtype"), torch.dtype):
        settings["state_dtype"] = dtypes.get(dtype, dtype)
    for name in NAMES:
        value = settings.get(name)
        if isinstance(value, (tuple, list)) and not all(type(x) in _PLAIN for x in value):
            settings[name] = tuple(map(_as_number, value))
        elif type(value) not in _PLAIN and not (name == "lr" and isinstance(value, Tensor)):
            settings[name] = _as_number(value)
    return settings


def check_checkpoint_group(number: int, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raises ValueError if the state of a checkpoint's group cannot be that of ours.

    Their `grad_var` would have another shape and meaning, or one of them lacks `exp_avg_signal`.
    """
    messages = {
        "reduction": "their `grad_var` cannot be converted",
        "signal_beta": "only one of them has `exp_avg_signal`",
    }
    for name, why in messages.items():
        mine = ours.get(name)
        other = theirs.get(name, mine if name == "reduction" else None)
        if mine == other or (name == "signal_beta" and None not in (mine, other)):
            continue
        raise ValueError(
            f"The checkpoint's parameter group {number} was trained with {name}={other!r}, this optimizer was created "
            f"with {name}={mine!r}: {why}. Create the optimizer with {name}={other!r}, or start from the weights "
            "alone with a fresh optimizer."
        )


def _check(valid: bool, name: str, value: Any, allowed: str) -> None:
    if not valid:
        raise ValueError(f"Invalid {name}={value!r}: {allowed}.{number_in_quotes(value)}")


def _as_number(value: Any) -> Any:
    """The only element of a tensor, an array or a NumPy scalar; as it is what autograd and vmap follow, and others."""
    if getattr(value, "requires_grad", False) or is_batched(value):
        return value
    return value.item() if math.prod(getattr(value, "shape", (0,))) == 1 else value


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
