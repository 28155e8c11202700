"""The methods that are compared, in one table: what each changes, what it is called, and what it is compared with."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from .._names import did_you_mean


BASELINE, PRM, CONTROL, LOSS, OTHER, REPAIRED, CEILING = GROUPS = (
    *("baseline", "PRM", "control", "loss-side", "other", "repaired labels", "ceiling"),
)

REPAIRS = DROP, FLIP, SOFT = ("drop", "flip", "soft")


@dataclass(frozen=True)
class Method:
    """A method of a comparison.

    Attributes:
        name: as in the argument `methods` and in `run.json`, with its value: `"prm_rows_eps:10"`.
        title: what people call it, without its value.
        group: one of `GROUPS`.
        settings: what it changes in the training configuration.
        label_smoothing: that setting, by the noise rate. Such a method exists for rates between 0 and 0.5 only.
        value, value_help: the number behind the colon of its name, and what it is; None for a method without a value.
        value_setting: the field of the training configuration that takes the value, if there is one.
        value_below: what the value is less than, if it is a share.
        base: the method whose step the mask or the control multiplies, without its value, which is this method's.
        has_mask: whether a mask shrinks its step. Such methods get the learning rates of PRM.
        has_controls: whether the controls can be bound to its runs.
        clean_labels: whether it is trained without the noise of the comparison. What it gains is what the noise costs.
        repair: of a method in two stages, what is done with rows whose label is probably wrong: one of `REPAIRS`.
        source, trained: of such a method, the one whose runs say which labels are wrong, and the one that is trained
            on what is left. The second gives all other attributes.
        needs_pairs: whether it is for preferences alone.
        tensor_masks: of a PRM method, whether it has one mask value a tensor; of a control, whether it needs those.
    """

    name: str
    title: str
    group: str
    settings: dict[str, Any] = field(default_factory=dict)
    label_smoothing: Callable[[float], float] | None = None
    value: float | None = None
    value_help: str | None = None
    value_setting: str | None = None
    value_below: float = float("inf")
    base: str = "adamw"
    has_mask: bool = False
    has_controls: bool = False
    tensor_masks: bool = False
    clean_labels: bool = False
    repair: str | None = None
    source: str | None = None
    trained: str | None = None
    needs_pairs: bool = False

    @property
    def key(self) -> str:
        """The name without the value."""
        return self.name.partition(":")[0]

    @property
    def label(self) -> str:
        """What people call it, with its value."""
        if self.trained is not None:
            return self.title
        return f"{self.title} {self.name.partition(':')[2]}".strip()

    @property
    def baseline(self) -> str:
        """The AdamW that the method adds its mask to: `adamw`, of `prm_rows_eps:10` `adamw_eps:10`."""
        if self.trained is not None:
            return find_method(self.trained).baseline
        return self.base + self.name.removeprefix(self.key) if METHODS[self.base].value_help else self.base

    @property
    def own_settings(self) -> set[str]:
        """The names of what it changes in the training configuration, whatever the noise rate."""
        own = {*self.settings, *([self.value_setting] if self.value_setting else ())}
        own |= {"label_smoothing"} if self.label_smoothing else set()
        return own | ({"noise_rate", "noise_kind", "label_rater"} if self.clean_labels else set())

    def changes(self, noise_rate: float = 0.3) -> dict[str, Any] | None:
        """What the method changes in the training configuration; None if it needs another noise rate."""
        settings = {**self.settings, **({self.value_setting: self.value} if self.value_setting else {})}
        if self.label_smoothing is None:
            return settings
        return {**settings, "label_smoothing": self.label_smoothing(noise_rate)} if 0 < noise_rate < 0.5 else None

    def exists_for(self, noise_rate: float, is_noisy: bool = False) -> bool:
        """Whether the method can be compared at that noise rate; `is_noisy`: labels are wrong whatever the rate is."""
        return self.changes(noise_rate) is not None and (is_noisy or noise_rate > 0 or not self.clean_labels)


METHODS: dict[str, Method] = {}


def register(*methods: Method) -> None:
    """Adds methods to the table, as a script with methods of its own does."""
    METHODS.update({method.name: method for method in methods})


def parse_method(name: str, known: Collection[str] | None = None) -> Method:
    """The method of a name that may end in a value: `adamw_eps:0.3`.

    Raises:
        ValueError: the name is not in `known` (names without values, by default all of `METHODS`), or a value is
            missing, not wanted or not a positive number.
    """
    key, colon, text = name.partition(":")
    known = METHODS if known is None else known
    if key not in known or key not in METHODS:
        raise ValueError(f"`methods`: {key} unknown. Known are {', '.join(known)}.{did_you_mean(key, known)}")
    method = METHODS[key]
    if method.repair is not None:
        return _in_two_stages(method, name, text, known)
    if method.value_help is None:
        if colon:
            raise ValueError(f"`methods`: {key!r} takes no value, got {name!r}.")
        return method
    value = _number(text)
    if value is None or value >= method.value_below:
        below = f" below {method.value_below:g}" if method.value_below < float("inf") else ""
        wanted = f"needs a positive number{below} behind a colon: {method.value_help}"
        raise ValueError(f"`methods`: {key!r} {wanted}; got {name!r}.")
    return replace(method, name=name, value=value)


def find_method(name: str) -> Method:
    """The method of a run that may come from elsewhere; of a name that is not known the group is guessed."""
    key, _, text = name.partition(":")
    if key in METHODS and METHODS[key].repair is not None:
        with contextlib.suppress(ValueError):
            return parse_method(name)
    if key in METHODS:
        return replace(METHODS[key], name=name, value=_number(text))
    return Method(name, key, _guess_group(name))


def _in_two_stages(repair: Method, name: str, text: str, known: Collection[str]) -> Method:
    """`filter:adamw_eps:10+prm_rows_eps:10`, of the method of the key `filter` and the text behind the first colon."""
    parts = re.split(r"\+(?=[a-z])", text)  # 1e+1 is a number
    if not text or len(parts) > 2:
        raise ValueError(
            f"`methods`: {repair.name!r} needs one or two methods behind a colon: {repair.value_help}; got {name!r}."
        )
    stages = [parse_method(part, known) for part in parts]
    for stage in stages:
        if stage.group not in (BASELINE, PRM) or stage.key in _OF_ITS_OWN:
            raise ValueError(
                f"`methods`: {repair.name!r} trains AdamW, AdamW with an eps, or PRM, and {stage.name!r} "
                f"in {name!r} is none of these."
            )
    source, trained = stages[0], stages[-1]
    then = "" if len(stages) == 1 else f", then {trained.label}"
    return replace(
        trained,
        name=name,
        title=f"{repair.name} ({source.label}{then})",  # short, for it is in tables and legends
        group=repair.group,
        has_controls=False,
        tensor_masks=False,
        repair=repair.repair,
        source=source.name,
        trained=trained.name,
        needs_pairs=repair.needs_pairs,
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None


def _guess_group(name: str) -> str:
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    telling = {
        CONTROL: {"constant", "shuffled", "fixed", "matched"},
        PRM: {"prm"},
        LOSS: {"cdpo", "robust", "rdpo", "ipo", "hinge", "early"},
        BASELINE: {"adamw"},
    }
    return next((group for group, those in telling.items() if words & those), OTHER)


_ADAMW = {"optim": "adamw_torch_fused"}
_TENSOR, _PARAM = ({"prm_reduction": name, "prm_estimator": "debiased"} for name in ("per_tensor", "per_param"))
_ROW = {"prm_reduction": "per_row", "prm_estimator": "debiased", "prm_signal_beta": 0.98}
_ROBUST, _SIGMOID = ({**_ADAMW, "loss_type": [name]} for name in ("robust", "sigmoid"))
# Early stopping evaluates ten times a run.
_EVALUATIONS = {**_ADAMW, "eval_strategy": "steps", "eval_steps": 0.1}


def _eps(example: str) -> dict[str, str]:
    """Of a method whose value is eps, relative to the scale of the clipped gradient."""
    text = f"eps, relative to the gradient's scale, as in `{example}`"
    return {"base": "adamw_eps", "value_help": text, "value_setting": "relative_eps"}


def _adamw(name: str, title: str, group: str = BASELINE, **more: Any) -> Method:
    return Method(name, title, group, _ADAMW, **more)


def _prm(
    name: str, title: str, settings: dict[str, Any], has_controls: bool = True, group: str = PRM, **more: Any
) -> Method:
    tensors = has_controls and settings.get("prm_reduction") == "per_tensor"
    return Method(name, title, group, settings, has_mask=True, has_controls=has_controls, tensor_masks=tensors, **more)


def _repair(name: str, repair: str, title: str) -> Method:
    """A method in two stages; the names of the two stand behind its own."""
    text = f"whose margins say which labels are wrong, and which is trained then, as in `{name}:adamw+prm_rows`"
    return Method(name, title, REPAIRED, repair=repair, value_help=text, needs_pairs=repair != DROP)


# These have an optimizer or an end of their own.
_OF_ITS_OWN = ("adamw_embedding", "prm_stopping")

# The order is that of the rows of a comparison within a group.
register(
    _adamw("adamw", "AdamW"),
    _adamw("adamw_eps", "AdamW eps", **_eps("adamw_eps:0.3")),
    _adamw("adamw_embedding", "AdamW embedding lr ×", value_help="the embedding's factor, as in `adamw_embedding:3`"),
    _adamw("cautious", "Cautious AdamW", OTHER),
    _adamw("msvag", "M-SVAG", OTHER),
    _adamw("casmo", "CASMO", OTHER),
    _adamw("grokfast", "Grokfast", OTHER),
    _adamw("grokadamw", "GrokAdamW", OTHER),
    # SGD takes the steps, which are those of a trainer.
    Method("sven", "Sven", OTHER, {"optim": "sgd"}),
    # A run of AdamW whose weights are moved back to where they came from, or beyond: another KL for no training.
    _adamw("interpolate", "AdamW, part of the way", OTHER, value_help="the part, as in `interpolate:0.5`"),
    _prm("prm_per_tensor", "PRM per_tensor", {**_TENSOR, "prm_estimator": "ema"}),
    _prm("prm_per_param", "PRM per_param", {**_PARAM, "prm_estimator": "ema"}),
    _prm("prm_rows_ema", "PRM per_row ema", {"prm_reduction": "per_row", "prm_estimator": "ema"}),
    _prm("prm_debiased", "PRM debiased", _TENSOR),
    _prm("prm_debiased_eps", "PRM debiased eps", _TENSOR, **_eps("prm_debiased_eps:10")),
    _prm("prm_debiased_per_param", "PRM debiased per_param", _PARAM),
    _prm("prm_rows", "PRM per_row", _ROW),
    _prm("prm_rows_eps", "PRM per_row eps", _ROW, **_eps("prm_rows_eps:10")),
    # With full fine-tuning the preset is `prm_rows_eps:10`, with LoRA `prm_rows`: bind controls to those.
    _prm("prm_noisy_labels", "PRM noisy_labels", {"prm_preset": "noisy_labels"}, has_controls=False),
    # Its runs end when the gradients of an epoch were mostly noise, and those of its controls would end later.
    _prm("prm_stopping", "PRM stopping", {**_TENSOR, "logging_steps": 1}, has_controls=False),
    # A control is bound to a PRM run, from which it takes something. Does the selection matter, or the smaller step:
    # AdamW at η·q̄, q̄ the run's mean mask (constant_q); AdamW at the learning rate that drifts as far (adamw_matched).
    # Does it matter which tensor is slowed, and when: the run with its masks permuted over the tensors at each step
    # (shuffled_q); AdamW with each tensor slowed as in the run of another seed (fixed_q). AdamW is here the baseline
    # of the PRM method, with the same eps.
    Method("constant_q", "constant q", CONTROL),
    Method("shuffled_q", "shuffled q", CONTROL, tensor_masks=True),
    Method("fixed_q", "fixed q", CONTROL, tensor_masks=True),
    Method("adamw_matched", "AdamW at the KL", CONTROL),
    # TRL's "sigmoid" loss ignores `label_smoothing`. cDPO with noise rate e is its "robust" loss at -e/(1-2e): the two
    # labels get the same weights, and the loss the same scale.
    Method("cdpo", "cDPO", LOSS, _ROBUST, label_smoothing=lambda rate: -rate / (1 - 2 * rate)),
    Method("robust", "rDPO (robust)", LOSS, _ROBUST, label_smoothing=lambda rate: rate),
    Method("ipo", "IPO", LOSS, {**_ADAMW, "loss_type": ["ipo"]}),
    _adamw("beta", "AdamW β", LOSS, value_setting="beta", value_help="DPO's β, as in `beta:0.3`"),
    Method(
        *("trimmed", "trimmed loss", LOSS, _SIGMOID),
        value_help="the share of a batch's largest losses that is left out, as in `trimmed:0.2`",
        value_below=1.0,
    ),
    Method("drdpo", "Dr. DPO", LOSS, _SIGMOID, value_help="its β', as in `drdpo:1`"),
    _prm(
        "prm_robust",
        "PRM noisy_labels, rDPO",
        {"prm_preset": "noisy_labels", "loss_type": ["robust"]},
        False,
        LOSS,
        label_smoothing=lambda rate: rate,
    ),
    # AdamW as it was at the evaluation at which validation pairs had the smallest loss: pairs as noisy as those that
    # are trained on, and the same pairs with their clean labels, which shows what better labels would be worth.
    Method("early_stopping", "early stopping", LOSS, _EVALUATIONS),
    Method("early_stopping_clean", "early stopping, clean labels", LOSS, _EVALUATIONS),
    # Rows whose label is probably wrong are left out, get the other label, or have both by their probabilities.
    _repair("filter", DROP, "suspects dropped"),
    _repair("relabel", FLIP, "suspects relabelled"),
    _repair("soft", SOFT, "soft labels"),
    # Where a prompt has several pairs, these say without any training which labels are wrong.
    _adamw("vote", "AdamW, labels by vote", OTHER, needs_pairs=True),
    _adamw("adamw_clean", "AdamW, clean labels", CEILING, clean_labels=True),
)
