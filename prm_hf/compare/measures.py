"""What a run is judged by: it depends on the task that was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Measures:
    """Names of metrics, and what people call them.

    Attributes:
        accuracy: held-out accuracy, the share of held-out examples that are right.
        noise_fit: fit of the training examples whose label is noise.
        extra, extra_label: one more number of the table, and the head of its column.
        examples: what a held-out example is, in the plural.
    """

    accuracy: str
    noise_fit: str
    extra: str
    extra_label: str
    examples: str

    @property
    def noise_label(self) -> str:
        return self.noise_fit.removeprefix("memorization/").replace("_", " ")


TASKS = {
    "preferences": Measures(
        "rewards/accuracies", "memorization/flipped_fit", "drift/reward_abs", "|reward|", "held-out pairs"
    ),
    "sft": Measures("exact_match", "memorization/corrupted_fit", "loss", "loss", "held-out rows"),
    "randomization": Measures(
        "memorization/heldout_fit", "memorization/corrupted_fit", "steps", "steps", "held-out rows"
    ),
}


def measures_of(info: Mapping[str, Any]) -> Measures:
    """By `run.json`: its `task`, one of `TASKS`, by default preferences; an `accuracy` in it wins over the task's.

    Raises:
        ValueError: the task is not known.
    """
    task = info.get("task", "preferences")
    if task not in TASKS:
        raise ValueError(f"run.json has the task {task!r}; this version of prm_hf knows {', '.join(TASKS)}.")
    measures = TASKS[task]
    return replace(measures, accuracy=info["accuracy"]) if "accuracy" in info else measures
