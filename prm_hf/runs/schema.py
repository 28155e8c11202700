"""The schema of a run's folder: its files, the names in them, and what a run of each task is judged by.

A folder holds `run.json` (what was run), `history.jsonl` (one JSON object a logged step), `margins.json` (one number
an example, and as `heldout_groups` which held-out examples belong together) and `metrics.json` (the final values,
written last: a folder without it is unfinished). A run whose loss was not finite has `"diverged": true` and
`diverged_at_step` there; one that ended in an error has `failed.json`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from .methods import find_method


VERSION = 1  # of the schema, `schema` in run.json
RUN_FILE, HISTORY_FILE, MARGINS_FILE, METRICS_FILE = "run.json", "history.jsonl", "margins.json", "metrics.json"
FAILED_FILE = "failed.json"  # of a run that ended in an error: its "error" and "message"
MASKS_FILE = "masks.jsonl"  # the masks of tensors, for the control fixed_q
# What a comparison puts beside the run folders; `prm-hf compare runs/dpo_noisy/*` is to work after a first report.
SOLVE_BEFORE_FILE = "solve_before.json"  # what models solve before they are trained
REPORT_FILES = ("comparison.json", "report.html", "frontier.png", SOLVE_BEFORE_FILE)

ACCURACY = "rewards/accuracies"
CLEAN_FIT, CORRUPTED_FIT = "memorization/clean_fit", "memorization/corrupted_fit"
TRAIN_FIT, HELDOUT_FIT = "memorization/train_fit", "memorization/heldout_fit"
KL = "drift/kl"
MEAN_Q = "mask/mean_q"
SOLVED, SOLVED_BEFORE = "solve/accuracy", "solve/accuracy_before"  # shares of problems
EFFECTIVE_DIMENSION, FITTED_LOSS = "effective_dimension/value", "effective_dimension/loss"  # both of training rows
CERTIFIED, BOUND = "bound/certified_accuracy", "bound/value"
STEPS_TO_THRESHOLD, SECONDS_TO_THRESHOLD = "steps_to_threshold", "seconds_to_threshold"  # the first is a task, too
SECONDS = "seconds"  # in the history: of training until an evaluation
COST = "cost_seconds"  # of all training that a run rests on, where that is more than its own

# What changes no result makes no other run: where a run is written and how it is shown, what is saved and how often,
# how data are loaded, and how the batch of a step is spread (see `effective_batch_size`). Learning rate and seed are
# named beside the settings.
NOT_SETTINGS = {
    *("output_dir", "logging_dir", "run_name", "project", "report_to", "disable_tqdm", "resume_from_checkpoint"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "push_to_hub", "hub_model_id", "hub_token"),
    *("hub_strategy", "hub_always_push", "hub_private_repo", "hub_revision", "log_level", "log_level_replica"),
    *("log_on_each_node", "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter"),
    *("local_rank", "use_cpu", "skip_memory_metrics", "include_num_input_tokens_seen", "debug", "do_train", "do_eval"),
    *("do_predict", "save_total_limit", "save_only_model", "save_on_each_node", "save_safetensors"),
    *("enable_jit_checkpoint", "per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed", "fsdp"),
    *("per_device_eval_batch_size", "eval_accumulation_steps", "fsdp_config", "accelerator_config", "ddp_backend"),
    *("ddp_timeout", "ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "ddp_find_unused_parameters"),
    *("dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps"),
    *("learning_rate", "seed"),
}
# These choose the weights that a run ends with where `load_best_model_at_end` does; elsewhere they change nothing.
_OF_THE_BEST = {"save_steps", "metric_for_best_model", "greater_is_better"}
# Names of settings in the files of version 0.1.
RENAMED_SETTINGS = {
    "prm_rho": "prm_variance_beta",
    "prm_warmup_steps": "prm_mask_warmup_steps",
    "memorization_max_pairs": "memorization_max_rows",
}


def comparable_settings(settings: Mapping[str, Any], method: str) -> dict[str, Any]:
    """The settings in a `run.json` that make a run what it is, by today's names.

    Args:
        method: the method that the run is configured as. In version 0.1 its name alone told the relative eps.
    """
    renamed = {RENAMED_SETTINGS.get(key, key): value for key, value in settings.items()}
    optimizer = renamed.pop("optimizer_name", None)
    if optimizer == "prm":
        renamed["optim"] = "prm"
    elif optimizer == "adamw":  # runs of the randomization tests name nothing else
        renamed.setdefault("optim", "adamw_torch_fused")
    named = find_method(method)
    if named.value_setting:
        renamed.setdefault(named.value_setting, named.value)
    left_out = NOT_SETTINGS if renamed.get("load_best_model_at_end") else NOT_SETTINGS | _OF_THE_BEST
    return {key: value for key, value in renamed.items() if key not in left_out}


def has_diverged(metrics: Mapping[str, Any]) -> bool:
    """Whether a run's final metrics are of weights that were not finite, said so or not."""
    return bool(metrics.get("diverged")) or any(not math.isfinite(metrics.get(name) or 0.0) for name in ("loss", KL))


def named_metrics(values: Mapping[str, Any]) -> dict[str, Any]:
    """A trainer's log by the names in a run's files: evaluations are plain, training batches under `train/`."""
    named = {}
    for key, value in values.items():
        plain = key in ("step", "epoch") or key.startswith("mask/")
        if not key.endswith(("_runtime", "_per_second", "_preparation_time")):
            named[key if plain else key.removeprefix("eval_") if key.startswith("eval_") else f"train/{key}"] = value
    return named


@dataclass(frozen=True)
class Threshold:
    """The value of a metric by whose first step runs are judged.

    Attributes:
        metric: its name in the history of a run.
        value: what it must reach.
        larger_is_better: whether it rises to the value, or falls to it.
        label: what people call the metric.
    """

    metric: str
    value: float
    larger_is_better: bool
    label: str

    def is_reached(self, found: float) -> bool:
        return found >= self.value if self.larger_is_better else found <= self.value


@dataclass(frozen=True)
class Measures:
    """What a run is judged by: names of metrics, and what people call them.

    Attributes:
        accuracy: held-out accuracy, the share of held-out examples that are right.
        noise_fit: fit of the training examples whose label is noise.
        extra, extra_label: one more number of the table, and the head of its column.
        examples: what a held-out example is, in the plural.
        threshold: of a run that is judged by the steps to a threshold; its metric is `accuracy`, and may be no share.
    """

    accuracy: str
    noise_fit: str
    extra: str
    extra_label: str
    examples: str
    threshold: Threshold | None = None

    @property
    def noise_label(self) -> str:
        return self.noise_fit.removeprefix("memorization/").replace("_", " ")


TASKS = {
    "preferences": Measures(ACCURACY, "memorization/flipped_fit", "drift/reward_abs", "|reward|", "held-out pairs"),
    "sft": Measures("exact_match", CORRUPTED_FIT, "loss", "loss", "held-out rows"),
    "labels": Measures("accuracy", CORRUPTED_FIT, "loss", "loss", "held-out rows"),
    "randomization": Measures(HELDOUT_FIT, CORRUPTED_FIT, "steps", "steps", "held-out rows"),
    # Its `run.json` has the threshold too
    STEPS_TO_THRESHOLD: Measures("accuracy", CORRUPTED_FIT, "loss", "loss", "held-out rows"),
}


def measures_of(info: Mapping[str, Any]) -> Measures:
    """By `run.json`: its `task`, one of `TASKS`, by default preferences; an `accuracy` in it wins over the task's.

    Raises:
        ValueError: the task is not known, or lacks its threshold.
    """
    task = info.get("task", "preferences")
    if task not in TASKS:
        raise ValueError(f"run.json has the task {task!r}; this version of prm_hf knows {', '.join(TASKS)}.")
    measures = TASKS[task]
    if task == STEPS_TO_THRESHOLD:
        try:
            threshold = Threshold(**info.get("threshold", {}))
        except TypeError:
            names = ", ".join(field.name for field in fields(Threshold))
            raise ValueError(f"run.json has the task {task!r}, whose `threshold` needs {names}.") from None
        return replace(measures, accuracy=threshold.metric, threshold=threshold)
    return replace(measures, accuracy=info["accuracy"]) if "accuracy" in info else measures
