"""Grids whose runs are made up, for tests of what the runner does with runs and of which runs there are."""

from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import TrainerCallback

from prm_hf.experiments.data import Data
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.grid import ComparisonGrid, Grid, Made
from prm_hf.runs.write import RunSpec, find_folder, finish_run, start_run


DIVERGED = {"diverged": True, "diverged_at_step": 3}


class FakeTrainer:
    """Runs `steps` steps, whose losses are those of `losses`, by step, and 1 elsewhere."""

    def __init__(self, steps=4, losses=None, evaluation=None, before_step=lambda step: None):
        self.args = SimpleNamespace(save_strategy="no", disable_tqdm=True, fp16=False, report_to=[])
        self.state = SimpleNamespace(log_history=[], global_step=0, max_steps=steps, is_world_process_zero=True)
        self.model = torch.nn.Linear(1, 1)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.accelerator = SimpleNamespace(reduce=lambda tensor, how: tensor)
        self.callbacks: list[TrainerCallback] = []
        self.callback_handler = self  # whose `callbacks` they are
        self.losses, self.evaluation, self.before_step = losses or {}, evaluation or {}, before_step
        self.resumed = None

    def add_callback(self, callback):
        self.callbacks.append(callback)

    def remove_callback(self, callback):
        pass

    def training_step(self):
        return torch.tensor(self.losses.get(self.state.global_step + 1, 1.0))

    def train(self, resume_from_checkpoint=None):
        self.resumed = resume_from_checkpoint
        for callback in self.callbacks:
            callback.on_train_begin(self.args, self.state, None)
        for step in range(1, self.state.max_steps + 1):
            self.before_step(step)
            self.training_step()
            self.state.global_step = step
            for callback in self.callbacks:
                callback.on_step_end(self.args, self.state, None)
        self.state.log_history.append(
            {"step": step, "eval_rewards/accuracies": 0.5, "eval_loss": 1.0, **self.evaluation}
        )


class FakeGrid(Grid):
    """A run of `adamw` for each seed; `trainers` has functions that make the trainers of single seeds."""

    def __init__(self, output_dir, seeds=(0, 1, 2), settings=None, trainers=None, make=FakeTrainer):
        self.output_dir, self.seeds, self.settings = Path(output_dir), seeds, settings or {"beta": 0.1}
        self.trainers, self.make = trainers or {}, make
        self.trained, self.reported = [], None

    def specify_runs(self):
        return [RunSpec("adamw", 1e-3, seed, self.settings) for seed in self.seeds]

    def info_of(self, spec):
        return {"task": "preferences"}

    def make_trainer(self, spec, folder):
        self.trained.append(spec.seed)
        return self.trainers.get(spec.seed, self.make)()

    def outcomes(self, spec, trainer):
        return {}, {"heldout": [1.0, -1.0]}

    def describe(self, spec, metrics):
        return f"accuracy {metrics['rewards/accuracies']:.3f}"

    def report(self, made):
        self.reported = {run.folder.name: run.metrics for run in made}


RATES = ("--learning_rates", "1e-3", "3e-3", "--prm_learning_rates", "1e-2", "3e-2")


def comparison_grid(folder, *methods, seeds=(0,), arguments=RATES, noise_rate=0.3):
    experiment = DPOExperiment.parse(["--methods", *methods, *arguments, "--seeds", *map(str, seeds)])
    rows = Dataset.from_list([{"prompt": "p", "chosen": "a", "rejected": "b"}])
    return ComparisonGrid(experiment, Data("m", "m", "d", rows, rows, {}), noise_rate, folder)


def make(grid, ends):
    """Runs of a grid on the disk with these final metrics, or None, by method, learning rate and seed."""
    made = {}
    for spec in grid.specify_runs():
        folder, _ = find_folder(spec, grid.output_dir)
        metrics = ends.get((spec.method, spec.learning_rate, spec.seed), {})
        if metrics is not None:
            metrics = {"rewards/accuracies": 0.6, "drift/kl": spec.learning_rate, "mask/mean_q": 0.5, **metrics}
            finish_run(folder, start_run(spec, folder, {}), [], {}, metrics)
        made.setdefault((spec.method, spec.learning_rate), {})[spec.seed] = Made(folder, metrics)
    return made


class PartsGrid(FakeGrid):
    """Of `adamw` at each seed the parts of its way as well; without `adamw` in `methods` the parts alone."""

    def __init__(self, *args, methods=("adamw", "interpolate:0.5", "interpolate:2"), **more):
        super().__init__(*args, **more)
        self.methods, self.measured = methods, []

    def specify_runs(self):
        return [RunSpec(method, 1e-3, seed, self.settings) for seed in self.seeds for method in self.methods]

    def training_of(self, spec):
        return spec if spec.method == "adamw" else RunSpec("adamw", 1e-3, spec.seed, self.settings)

    def along(self, spec):
        others = [method for method in self.methods if method not in ("adamw", spec.method)]
        return [RunSpec(method, 1e-3, spec.seed, self.settings) for method in others]

    def outcomes(self, spec, trainer):
        self.measured.append((spec.method, spec.seed))
        trainer.state.log_history.append({"step": 4, "eval_part": len(self.measured)})
        return super().outcomes(spec, trainer)
