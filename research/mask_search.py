"""Which mask is worth its place? Variants of PRM's debiased per_tensor mask, each with one thing changed.

    python research/mask_search.py --seeds 0 1 2 3 4     # DPO on the built-in task, hours on one core; resumable
    python research/mask_search.py recipes/sft_noisy.py  # SFT

All flags, folders and statistics are those of `dpo_noisy.py`, or of the recipe that is named first; its methods may be
named beside the variants. At the end it prints a table: of each method the area of accuracy over log KL, against AdamW
and against the best baseline.

The optimizer is in `searched_prm.py`. What was worth keeping is in `prm_hf.PRM`: `search_prm_rows_signal0.98` is its
`reduction="per_row"` with `signal_beta=0.98`, the method `prm_rows`, and with the larger eps `prm_rows_eps:10`. The
parts of it and its controls are variants here.
"""

import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from prm_hf.compare import Comparison, Interval, Row, compare_experiments
from prm_hf.compare.contrasts import frontier_difference
from prm_hf.compare.statistics import holm
from prm_hf.experiments.controls import is_sharded, scale_embedding
from prm_hf.experiments.data import Data
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.experiment import Experiment
from prm_hf.experiments.runner import run_comparisons
from prm_hf.experiments.sft import SFTExperiment
from prm_hf.optim.hyperparameters import Hyperparameters
from prm_hf.runs.methods import BASELINE, OTHER, PRM, Method, find_method, register
from prm_hf.runs.write import RunSpec
from prm_hf.trainers.callbacks import innermost_optimizer
from research.searched_prm import SearchedPRM, row_masks


# What each variant changes: `eps` is `relative_eps`, `embedding` as in `adamw_embedding`, `modules` one of the `pools`
# for each LoRA layer; the rest are arguments of `SearchedPRM`.
VARIANTS: dict[str, dict[str, Any]] = {
    "search_prm_rows": {"rows": True},
    "search_prm_rows_eps10": {"rows": True, "eps": 10},
    "search_prm_softness0.3": {"softness": 0.3},
    "search_prm_softness3": {"softness": 3.0},
    "search_prm_softness0.3_eps10": {"softness": 0.3, "eps": 10},
    "search_prm_softness3_eps10": {"softness": 3.0, "eps": 10},
    "search_prm_signal0.95": {"signal_beta": 0.95},
    "search_prm_signal0.98": {"signal_beta": 0.98},
    "search_prm_signal0.98_eps10": {"signal_beta": 0.98, "eps": 10},
    # The control of `prm_rows_eps:10`: as many rows are as open, but others.
    "search_prm_rows_signal0.98_eps10_shuffled": {"rows": True, "signal_beta": 0.98, "eps": 10, "shuffle": True},
    "search_prm_within": {"within_step": True},
    "search_prm_within_eps10": {"within_step": True, "eps": 10},
    # With the learning rates of AdamW, whose mean step they have.
    "search_selection": {"keep_mean": True},
    "search_selection_eps10": {"keep_mean": True, "eps": 10},
    # No mask: another learning rate for the embedding on top of the larger eps, two baselines in one.
    "search_embedding3_eps10": {"embedding": 3.0, "eps": 10},
    "search_embedding0.3_eps10": {"embedding": 0.3, "eps": 10},
}
METHODS = ["adamw", "adamw_eps:3", "adamw_eps:10", "adamw_eps:30", "prm_debiased", "prm_debiased_eps:10"]
METHODS += ["prm_rows", "prm_rows_eps:10", *VARIANTS]
# Is it the measuring, or only the allocation? AdamW with the same eps and each row's learning rate multiplied by the
# row's mean mask in the run of another seed, which has to be there. Not among `METHODS`, as it comes after them.
FIXED, FIXED_FROM = "search_prm_rows_fixed_eps10", "prm_rows_eps:10"
VARIANTS[FIXED] = {"rows": True, "eps": 10}
# For LoRA alone: one mask for A and B of a layer. Not among `METHODS` either.
VARIANTS |= {"search_prm_modules": {"modules": True}, "search_prm_modules_eps10": {"modules": True, "eps": 10}}
ROW_MASKS = "row_masks.pt"
MICRO_BATCHES = 4  # a step's, for noise that is measured within it


def register_variants() -> None:
    """Adds the variants to the table of methods, of this process."""
    for name, options in VARIANTS.items():
        masked = not {"keep_mean", "embedding"} & set(options)
        group = PRM if masked and name != FIXED and "shuffle" not in options else OTHER
        settings = find_method("adamw").settings | {"relative_eps": options.get("eps")}
        register(Method(name, name, group, settings, has_mask=masked))


class RowMaskRecorder(TrainerCallback):
    """Adds up the masks of PRM's rows over all steps, for `FIXED`, and writes their means, of each tensor `[rows]`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.steps, self.sums = 0, {}

    def on_optimizer_step(self, args, state, control, **kwargs):
        prm = self.trainer.find_prm()
        self.steps += 1
        for group in prm.param_groups:
            h = Hyperparameters.of_group(group)
            for p in group["params"]:
                self.sums[p] = self.sums.get(p, 0) + row_masks(p, prm.state[p], h)

    def on_train_end(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            means = [(total / self.steps).cpu() for total in self.sums.values()]
            torch.save(means, Path(args.output_dir) / ROW_MASKS)


def set_up_variant(trainer: Trainer, variant: str, fixed: Path | None = None) -> None:
    """Gives the trainer the optimizer of a variant; `fixed` is the file of the row masks of `FIXED`.

    Raises:
        ValueError: the model is sharded, or what the variant needs is not there.
    """
    if is_sharded(trainer) or trainer.args.world_size > 1:
        raise ValueError(f"`{variant}` runs on whole tensors in one process: launch it on one GPU, or on a CPU.")
    options = {key: value for key, value in VARIANTS[variant].items() if key != "eps"}
    optimizer = trainer.create_optimizer()  # AdamW, with the variant's eps and learning rate
    if "embedding" in options:
        scale_embedding(trainer, variant, options["embedding"])
        return
    if fixed is not None:
        if not fixed.is_file():
            raise ValueError(
                f"`{variant}` takes the row masks of another seed, and {fixed} is not there: run {FIXED_FROM} with "
                "all `seeds` and `prm_learning_rates` before it."
            )
        options["fixed"] = torch.load(fixed, weights_only=True)
    names = ("params", "lr", "eps", "betas", "weight_decay")
    groups = [{name: group[name] for name in names} for group in optimizer.param_groups]
    if options.pop("modules", False):
        params = [p for group in groups for p in group["params"]]
        names = {p: name for name, p in trainer.model.named_parameters()}
        if not all(".lora_" in names[p] for p in params):
            raise ValueError(f"`{variant}` has one mask for A and B of each LoRA layer: set `use_peft`.")
        modules = [names[p].split(".lora_")[0] for p in params]
        options["pools"] = [modules.index(module) for module in modules]
    trainer.optimizer = SearchedPRM(groups, **options)


class Search:
    """Mixin for an experiment, which then knows the variants too."""

    output_dir = "runs/mask_search"

    @classmethod
    def parse(cls, arguments: list[str]) -> Experiment:
        register_variants()  # here, as each worker process parses the arguments again
        experiment = super().parse(arguments)
        recipe = next(name for name, search in RECIPES.items() if search is cls)
        experiment.command_line = shlex.join(["python", "research/mask_search.py", recipe, *arguments])
        return experiment

    def check_method(self, method: Method, config: Any) -> None:
        super().check_method(method, config)
        if VARIANTS.get(method.name, {}).get("modules") and not self.model_args.use_peft:
            raise ValueError("it has one mask for A and B of each LoRA layer: set `use_peft`.")

    def make_trainer(self, config: Any, spec: RunSpec, data: Data) -> Trainer:
        if VARIANTS.get(spec.method, {}).get("within_step"):  # the batch of a step is split, and not enlarged
            per_device = config.per_device_train_batch_size
            micro = 1 if per_device % MICRO_BATCHES else per_device // MICRO_BATCHES
            config.per_device_train_batch_size = micro
            config.gradient_accumulation_steps *= per_device // micro
        trainer = super().make_trainer(config, spec, data)
        if spec.method in VARIANTS:
            seeds, fixed = self.script_args.seeds, None
            if spec.method == FIXED:
                other = RunSpec(FIXED_FROM, spec.learning_rate, seeds[seeds.index(spec.seed) - 1], {})
                place = Path(config.output_dir).parent
                made = place.glob(f"{other.name}*/{ROW_MASKS}")  # also with other settings: the latest
                fixed = max(made, key=lambda path: path.stat().st_mtime, default=place / other.name / ROW_MASKS)
            set_up_variant(trainer, spec.method, fixed)
        elif spec.method == FIXED_FROM:
            trainer.add_callback(RowMaskRecorder(trainer))
        return trainer

    def outcomes(self, trainer: Trainer, data: Data) -> tuple[dict[str, float], dict[str, list]]:
        metrics, margins = super().outcomes(trainer, data)
        optimizer = innermost_optimizer(trainer.optimizer)
        if isinstance(optimizer, SearchedPRM):
            metrics = {**metrics, "mask/mean_q": torch.stack(optimizer.mean_qs).mean().item()}
        return metrics, margins


class DPOSearch(Search, DPOExperiment):
    """The variants in DPO."""


class SFTSearch(Search, SFTExperiment):
    """The variants in SFT."""


RECIPES = {"dpo_noisy": DPOSearch, "sft_noisy": SFTSearch}


class Area(NamedTuple):
    """One method's mean over log KL minus another's, at equal drift."""

    accuracy: Interval  # over seeds and held-out pairs
    noise_fit: Interval  # of the fit of wrong labels, over seeds
    kl: tuple[float, float]  # the range of KL, nats a token, that the curves of both cover in every seed


def area(mine: list[Row], theirs: list[Row]) -> Area | None:
    """None without two seeds, or where the curves have no KL in common."""
    noise_fit = mine[0].measures.noise_fit
    accuracy = frontier_difference(mine, theirs)
    fit = frontier_difference(mine, theirs, lambda run: np.array([run.metrics[noise_fit]]))
    if isinstance(accuracy, str) or accuracy[0].seeds < 2:
        return None
    return Area(accuracy[0], fit[0], accuracy[1])


def table(comparison: Comparison) -> str:
    """Markdown: of each method its area against AdamW and against the best baseline, which is AdamW's eps of the
    largest area. p-values are Holm's over all areas of accuracy in the table."""
    rows = comparison.methods()
    ahead = {name: area(its, rows["adamw"]) for name, its in comparison.methods(BASELINE).items() if name != "adamw"}
    strongest = max(filter(ahead.get, ahead), key=lambda name: ahead[name].accuracy.mean, default=None)
    rivals = ["adamw", strongest] if strongest else ["adamw"]
    pairs = [(name, rival) for name in rows for rival in rivals if name not in ("adamw", rival)]
    areas = {(name, rival): found for name, rival in pairs if (found := area(rows[name], rows[rival]))}
    adjusted = dict(zip(areas, holm([found.accuracy.p_value for found in areas.values()]), strict=True))

    def cells(name: str, rival: str) -> list[str]:
        if (name, rival) not in areas:
            return ["", "", ""]
        found, p = areas[name, rival], adjusted[name, rival]
        accuracy, fit = (f"{x.mean:+.3f} [{x.low:+.3f}, {x.high:+.3f}]" for x in (found.accuracy, found.noise_fit))
        return [accuracy, f"{p:.2g}" if p >= 0.001 else "<.001", fit]

    heads = ["method", "seeds", "best accuracy"]
    for rival in rivals:
        heads += [f"accuracy against {find_method(rival).label}", "p (Holm)", comparison.measures.noise_label]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, its in rows.items():
        top = max(its, key=lambda row: row.accuracy)
        line = [find_method(name).label, str(min(len(row.runs) for row in its))]
        line += [f"{top.accuracy:.3f} ± {top.accuracy_error()[0]:.3f}", *(x for r in rivals for x in cells(name, r))]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    search = DPOSearch
    if arguments and not arguments[0].startswith("-"):
        name, arguments = Path(arguments[0]).stem, arguments[1:]
        if name not in RECIPES:
            raise ValueError(f"The first argument may name a recipe, {' or '.join(RECIPES)}, got {name!r}.")
        search = RECIPES[name]
    if "--methods" not in arguments:
        arguments = [*arguments, "--methods", *METHODS]
    code = run_comparisons(search, arguments)
    output_dir = Path(search.parse(arguments).training_args.output_dir)
    for folder in sorted({path.parent.parent for path in output_dir.rglob("metrics.json")}):
        for comparison in compare_experiments(folder):
            if "adamw" in comparison.methods():
                print(f"\n{folder}, areas over log KL:\n\n{table(comparison)}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
