"""What makes runs comparable: they share all that changes a result, except what is the method's own."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable
from typing import Any, NamedTuple

from .methods import find_method
from .run import Run
from .schema import comparable_settings
from .text import short


# Of `run.json` itself, besides its settings; and what ends so, as `train_digest`.
_OF_THE_RUN = ("task", "accuracy", "model", "dataset", "noise_rate", "noise_kind")
_DIGEST = "_digest"
# They make another run, as its history or its speed is another one, and leave the result as it is.
_NEUTRAL = {
    *("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "eval_do_concat_batches"),
    "eval_use_gather_object",
    *("save_strategy", "memorization_max_rows", "drift_metrics", "batch_eval_metrics", "include_for_metrics"),
    *("prediction_loss_only", "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing"),
    *("activation_checkpointing_kwargs", "activation_offloading", "torch_compile", "torch_compile_backend"),
    *("torch_compile_mode", "use_cache", "auto_find_batch_size", "ignore_data_skip", "precompute_ref_log_probs"),
    *("precompute_ref_batch_size", "restore_callback_states_from_checkpoint", "model_attn_implementation"),
    "model_trust_remote_code",
}
# Whatever the method, these say which optimizer it has.
_OF_THE_OPTIMIZER = {"optim", "optim_args", "optim_target_modules", "relative_eps", "shuffled_q", "fixed_q"}

Shared = dict[tuple[str, str], tuple[Any, Run]]  # by setting and owner: the value, and a run that has it


class Difference(NamedTuple):
    """A setting that two runs do not share, and that is not the method's own."""

    setting: str
    values: tuple[Any, Any]
    runs: tuple[Run, Run]

    def __str__(self) -> str:
        same_name = self.runs[0].name == self.runs[1].name
        names = [str(run.path) if same_name else run.name for run in self.runs]
        a, b = (f"{short(value)} in {name}" for value, name in zip(self.values, names, strict=True))
        return f"{self.setting}: {a}, {b}"


def shared_settings(run: Run) -> Shared:
    """What a run must share with those that it is compared with, as far as it is on record.

    A setting that is the method's own has the method as its owner, and is shared by that method's runs; the others
    have no owner. A Trainer's run has no settings on record.
    """
    of_run = {key: value for key, value in run.info.items() if key in _OF_THE_RUN or key.endswith(_DIGEST)}
    settings = {**comparable_settings(run.settings, run.method), **of_run}
    settings.pop(run.method, None)  # what a control takes from its run
    own = find_method(run.method).own_settings
    found = {("what their accuracy is", ""): run.measures.accuracy}
    for key in sorted(settings.keys() - _NEUTRAL):
        is_own = key in own or key in _OF_THE_OPTIMIZER or key.startswith("prm_")
        # A control is bound to runs of several methods.
        owner = run.method if is_own and not run.control_of else run.name if is_own else ""
        found[f"`{key}`", owner] = settings[key]
    if run.heldout is not None:
        found[f"the number of {run.measures.examples}", ""] = len(run.heldout)
    if run.heldout_groups is not None:
        found[f"the groups of {run.measures.examples}", ""] = numbered(run.heldout_groups.tolist())
    return {place: (value, run) for place, value in found.items()}


def find_differences(shared: Shared, others: Shared) -> list[Difference]:
    """Where two sets of runs do not agree, of what is on record of both."""
    return [
        Difference(place[0], (value, others[place][0]), (run, others[place][1]))
        for place, (value, run) in shared.items()
        if place in others and not is_equal(value, others[place][0])
    ]


def group_comparable(runs: Iterable[Run]) -> list[list[Run]]:
    """Runs that can be compared, group by group, each in the order given.

    A run that fits several groups, for lack of settings on record, joins the one that has runs of its own folder.
    """
    groups: list[tuple[list[Run], Shared]] = []
    for run in runs:
        shared = shared_settings(run)
        fitting = [group for group in groups if not find_differences(group[1], shared)]
        fitting.sort(key=lambda group: all(other.path.parent != run.path.parent for other in group[0]))
        if not fitting:
            groups.append(([], {}))
        members, known = fitting[0] if fitting else groups[-1]
        members.append(run)
        known.update({place: found for place, found in shared.items() if place not in known})
    return [members for members, _ in groups]


def differences_between(groups: list[list[Run]]) -> list[list[Difference]]:
    """Of each group but the first, what tells it from the first."""
    first, *others = ({k: v for run in reversed(runs) for k, v in shared_settings(run).items()} for runs in groups)
    return [find_differences(first, other) for other in others]


def numbered(keys: Iterable[Hashable]) -> list[int]:
    """Numbers from 0 in the place of keys, by their first appearance: equal where the keys are."""
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(key, len(numbers)) for key in keys]


def is_equal(a: Any, b: Any) -> bool:
    """Whether two values of JSON files are the same; NaN is."""
    return a == b or json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
