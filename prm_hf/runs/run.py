"""One run as it lies on disk: what was run, its numbers, and how it ended."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .schema import CLEAN_FIT, COST, KL, MEAN_Q, Measures, measures_of


# How a run ended. The numbers of a finished run count; of the others the comparison says that they are there.
FINISHED, UNFINISHED, DIVERGED, FAILED, UNREADABLE = ENDS = (
    *("finished", "unfinished", "diverged", "failed", "unreadable"),
)


class UnreadableError(ValueError):
    """A file of a run does not hold what it should; the message names the file, and what is wrong with it."""


@dataclass(eq=False)
class Run:
    """One run as it lies on disk. What was not recorded is absent (`None`, or no key), never made up.

    Attributes:
        name, method: of a Trainer's run the folder's name, and that without `lr…` and `seed…`.
        learning_rate: the peak learning rate.
        source: `"prm_hf"` or `"trainer"`.
        end: one of `ENDS`. A run that is unfinished (it has no `metrics.json`), failed or unreadable has no numbers.
        problem: what went wrong where it failed, diverged or cannot be read.
        metrics: final values by name (`rewards/accuracies`, `drift/kl`, …; `wall_seconds`, `steps`).
        history: one dict a logged step, with `step`; values of training batches are prefixed `train/`.
        heldout: `[examples]` float64, one number a held-out example that is positive where the run is right, or None:
            of a pair β·(log-ratio of chosen − of rejected) against the clean label.
        heldout_groups: `[examples]` int64, equal where held-out examples belong together, as those of one prompt do;
            None where that is not on record.
        info: `run.json`, or what `trainer_state.json` says about the run.
        notes: remarks that a reader of the comparison must know.
    """

    path: Path
    name: str
    method: str
    learning_rate: float | None
    seed: int | None
    source: str
    end: str = FINISHED
    problem: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    heldout: np.ndarray | None = None
    heldout_groups: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        return self.end == FINISHED

    @property
    def measures(self) -> Measures:
        return measures_of(self.info)

    @property
    def settings(self) -> dict[str, Any]:
        return self.info.get("settings", {})

    @property
    def control(self) -> dict[str, Any]:
        """Of a control, what it takes from which run; empty for other runs."""
        control = self.settings.get(self.method)
        return control if isinstance(control, dict) else {}

    @property
    def control_of(self) -> str | None:
        """Of a control, the name of the run that it takes something from."""
        return self.control.get("of")

    @property
    def mean_q(self) -> float | None:
        """Mean of the mask over the run: of the logged steps, else the final value, else that of `constant_q`."""
        logged = self.series(MEAN_Q)[1]
        if logged.size:
            return float(logged.mean())
        return self.metrics.get(MEAN_Q, self.control.get("mean_q") if self.method == "constant_q" else None)

    @property
    def cost(self) -> float | None:
        """Seconds of all training that the run rests on: its own, unless it says otherwise."""
        return self.metrics.get(COST, self.metrics.get("wall_seconds"))

    def outcomes(self) -> np.ndarray | None:
        """`[examples]` float64, 1 where the held-out example is right and ½ at a tie; `[1]`, the accuracy, where they
        are unknown.
        """
        if self.heldout is not None:
            return (np.sign(self.heldout) + 1) / 2
        accuracy = self.metrics.get(self.measures.accuracy)
        return None if accuracy is None or not math.isfinite(accuracy) else np.array([accuracy])

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values, two `[n]` float64 arrays, of one key of the history; empty where it was not logged."""
        points = [(entry["step"], entry[name]) for entry in self.history if name in entry and "step" in entry]
        steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
        return steps, values

    def check_numbers(self) -> None:
        """Marks the run as diverged where a number that it is judged by is not finite.

        A reward that is NaN is not above 0, so a diverged run's accuracy can be a finite 0.

        Raises:
            UnreadableError: a share is not in [0, 1].
        """
        names = self.measures
        shares = (names.accuracy, names.noise_fit, CLEAN_FIT) if names.threshold is None else ()
        for name in shares:
            value = self.metrics.get(name, 0.0)
            if math.isfinite(value) and not 0 <= value <= 1:
                raise UnreadableError(f"{self.path}: {name} is {value:g}, which is no share from 0 to 1.")
        judged = {name: self.metrics.get(name, 0.0) for name in (names.accuracy, names.noise_fit, KL, names.extra)}
        judged |= {"loss": self.metrics.get("loss", 0.0)}
        bad = [f"{name} is {value}" for name, value in judged.items() if not math.isfinite(value)]
        if self.heldout is not None and not np.isfinite(self.heldout).all():
            bad.append(f"{np.sum(~np.isfinite(self.heldout))} of {self.heldout.size} held-out margins are not finite")
        if bad and self.finished:
            self.end, self.problem = DIVERGED, bad[0]


def parse_name(name: str) -> tuple[str, float | None, int | None]:
    """`prm_per_tensor_lr3e-03_seed0` → (`prm_per_tensor`, 0.003, 0); a hash behind the seed is left out."""
    seed = re.search(r"[-_.]?seed[-_=]?(\d{1,18})(?!\d)(?:_[0-9a-f]{8}$)?", name, flags=re.IGNORECASE)
    rate = re.search(r"(?:^|[-_.])lr[-_=]?(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", name, flags=re.IGNORECASE)
    method = name
    for match in filter(None, (seed, rate)):
        method = method.replace(match[0], "")
    return method.strip("-_.") or name, float(rate[1]) if rate else None, int(seed[1]) if seed else None


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number that fits a float; NaN and infinities are."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**1023
