"""Settings by name: what the evidence supports for full fine-tuning and for LoRA."""

import copy
from dataclasses import fields
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .config import PRMArguments


# By the preset's name. With LoRA the larger eps costs accuracy.
PRESETS = {
    "noisy_labels": {
        "prm_reduction": "per_row",
        "prm_estimator": "debiased",
        "prm_signal_beta": 0.98,
        "relative_eps": 10.0,
    }
}
WITH_LORA = {"noisy_labels": {"relative_eps": None}}


def preset_values(args: "PRMArguments", is_peft: bool | None) -> dict[str, Any]:
    """What `prm_preset` sets for a PEFT model or for any other one; for None, what it sets for both."""
    preset = args.prm_preset
    if preset is None:
        return {}
    if preset not in PRESETS:
        raise ValueError(f"`prm_preset` is {preset!r}: set it to one of {', '.join(map(repr, PRESETS))}, or to None.")
    values = {**PRESETS[preset], **(WITH_LORA[preset] if is_peft else {})}
    if is_peft is None:
        values = {name: value for name, value in values.items() if name not in WITH_LORA[preset]}
    defaults = {f.name: f.default for f in fields(args)}
    for name, value in values.items():
        if getattr(args, name) not in (defaults[name], value):
            raise ValueError(
                f"`{name}={getattr(args, name)!r}` and `prm_preset={preset!r}`, which sets it to {value!r}"
                f"{' with LoRA' if is_peft else ''}, contradict each other. Leave `{name}` unset, or instead of the "
                f"preset set {_listed(values)}."
            )
    return values


def with_preset(args: "PRMArguments", is_peft: bool | None) -> "PRMArguments":
    """A copy of `args` with the [`preset_values`] in place of the preset; the user's own serves other trainers too."""
    result = copy.copy(args)
    for name, value in preset_values(args, is_peft).items():
        setattr(result, name, value)
    result.prm_preset = None
    return result


def preset_note(args: "PRMArguments", is_peft: bool | None) -> str:
    """A sentence about what the preset sets; empty without a preset."""
    values = preset_values(args, is_peft)
    return f"`prm_preset={args.prm_preset!r}` sets {_listed(values)}." if values else ""


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in values.items())
