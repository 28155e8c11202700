"""The suspects of a comparison: `--suspects` of `prm-hf dpo` and `prm-hf sft`."""

import copy
from collections.abc import Sequence

from accelerate import PartialState
from datasets import Dataset

from ..runs.methods import Method
from ..runs.write import RunSpec
from .data import Data
from .experiment import Experiment
from .grid import ComparisonGrid, MadeRuns
from .suspects import METHODS_THAT_FIND, SuspectsArguments, doubt, make_suspects
from .suspects_grid import SuspectsData, SuspectsGrid
from .suspects_kinds import KINDS


FOLDER = "suspects"  # in the folder of the comparison
# What runs have no use for: nothing is held out but a fold, and no model is kept.
OWN = {"eval_strategy": "no", "drift_metrics": False, "save_strategy": "no", "load_best_model_at_end": False}


def finders(methods: Sequence[Method]) -> list[str]:
    """The names of those methods that can find wrong labels."""
    return [method.name for method in methods if method.key in METHODS_THAT_FIND]


def check_finders(experiment: Experiment) -> None:
    """Raises ValueError if no method of the comparison can find wrong labels."""
    if not finders(experiment.script_args.compared):
        raise ValueError(
            f"`suspects` goes on with the most accurate method of AdamW or PRM, and `methods` are "
            f"{experiment.script_args.methods}: add one, as `adamw`."
        )


def doubted_rows(experiment: Experiment, data: Data, noise_rate: float) -> SuspectsData:
    """The training rows of a comparison with the labels as given, those of its first seed.

    Raises:
        ValueError: they cannot be dealt out to folds, or a run would fail on them.
    """
    args, kind = _arguments(experiment), _kind(experiment)
    seed = args.seeds[0]
    data = experiment.readable(data)
    rows: Dataset = data.train
    if noise_rate or experiment.script_args.label_rater is not None:
        settings = {**data.source, "noise_rate": noise_rate}
        rows = experiment.noisy_rows(RunSpec(args.method, 1.0, seed, settings), data)
    about = {"model": data.model_name, "dataset": data.dataset_name, "noise_rate": noise_rate}
    about |= {key: value for key, value in data.digests.items() if key == "model_digest"}
    about |= {key: value for key, value in data.source.items() if key == "task_seed"}
    place = f"`suspects`: the training rows of {data.dataset_name}"
    of_kind = KINDS[kind](data.model, experiment.model_args)
    return doubt(args, of_kind, data.dataset_name, place, rows, about, data.train_groups)


def find_suspects(
    grid: ComparisonGrid, made: MadeRuns, data: SuspectsData, deadline: float | None, reports: bool
) -> int:
    """Finds them by the most accurate row, and writes them beside the runs; returns 0 or `FAILED`. Collective.

    Raises:
        OutOfTime: the deadline has left a run.
    """
    experiment = grid.experiment
    method, rate = grid.best(made, finders(grid.methods))
    args = _arguments(experiment)
    args.method, args.learning_rates = method, [rate]
    config = copy.deepcopy(experiment.training_args)
    for name, value in {**OWN, "output_dir": str(grid.output_dir / FOLDER)}.items():
        setattr(config, name, value)
    if PartialState().is_main_process and reports:
        labels = f"with the noise of seed {args.seeds[0]}" if grid.noise_rate else "as they are given"
        print(
            f"\nNow the suspects of the training labels {labels}, by {method} at {rate:g}, the most accurate row "
            "above that can find them:"
        )
    return make_suspects(
        SuspectsGrid(args, config, experiment.model_args, data, experiment.command_line), deadline, reports
    )


def _kind(experiment: Experiment) -> str:
    return "preference" if experiment.has_pairs else "completion"


def _arguments(experiment: Experiment) -> SuspectsArguments:
    """Those of `prm-hf suspects`, with its defaults where the comparison has none of its own."""
    own = experiment.script_args
    return SuspectsArguments(kind=_kind(experiment), seeds=own.seeds[:1], overwrite_runs=own.overwrite_runs)
