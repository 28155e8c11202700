"""The method `sven` in the commands: which trainer makes its steps, and how long they are."""

import json

import pytest
import torch
from transformers import Trainer

from prm_hf.experiments import pinn, randomization, regression, sft
from prm_hf.experiments.controls import set_up_optimizer
from prm_hf.experiments.problems import order_of_rows
from prm_hf.experiments.sven import (
    SvenComparedDPOTrainer,
    SvenComparedSFTTrainer,
    SvenProblemTrainer,
    SvenWholeBatchTrainer,
    trainer_class,
)
from prm_hf.experiments.thresholds_grid import ThresholdGrid
from prm_hf.runs.methods import parse_method
from prm_hf.runs.write import RunSpec
from prm_hf.sven import Sven, SvenTrainer
from prm_hf.trainers import PRMDPOTrainer, PRMSFTTrainer

from .comparisons import ON_CPU, ONE_RATE, SHORT


REGRESSION = ["--methods", "adamw", "sven", "--max_steps", "6", "--eval_steps", "3", "--seeds", "0", "--rows", "64"]
REGRESSION += ["--learning_rates", "1e-3", "--weight_decays", "0", "--heldout_rows", "32"]


def test_only_sven_has_other_trainers():
    kinds = {PRMDPOTrainer: SvenComparedDPOTrainer, PRMSFTTrainer: SvenComparedSFTTrainer, Trainer: SvenTrainer}
    for kind, expected in kinds.items():
        assert trainer_class(kind, "sven") is expected and trainer_class(kind, "prm_rows_eps:10") is kind


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def test_regression_makes_svens_steps(tmp_path):
    """Clipped, and at most as long as AdamW's."""
    task = regression.Regression.parse([*REGRESSION, "--output_dir", str(tmp_path)])
    grid = ThresholdGrid(task)
    spec = grid.specify("sven", 1e-3, 0.0, 0)
    trainer = grid.make_trainer(spec, tmp_path)
    assert isinstance(trainer, SvenProblemTrainer)
    d = sum(p.numel() for p in trainer.model.parameters())
    factor = d**0.5 / task.training_args.max_grad_norm
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 * factor)
    own = task.problem(0)
    sven = Sven(own.model, task.row_losses, lr=1e-3 * factor, max_norm=task.training_args.max_grad_norm)
    before = flat(own.model)
    for epoch in range(3):
        for ids in order_of_rows(64, 0, epoch).split(32):
            rows = {name: values[ids] for name, values in own.rows.items()}
            sven.step((rows, rows))
    trainer.train()
    expected = flat(own.model) - before
    assert 0 < expected.norm() <= 6 * 1e-3 * d**0.5 * 1.001
    torch.testing.assert_close(flat(trainer.model) - before, expected, rtol=1e-3, atol=1e-5)


def test_regression_reports_sven(tmp_path):
    assert regression.main([*REGRESSION, "--output_dir", str(tmp_path)]) == 0
    (run,) = (path.parent for path in tmp_path.glob("**/run.json") if path.parent.name.startswith("sven"))
    info, metrics = (json.loads((run / name).read_text()) for name in ("run.json", "metrics.json"))
    assert info["optimizer"]["class"] == "SGD" and 0 < metrics["heldout_error"] < 10


def test_tasks_without_row_losses_do_not_know_it(tmp_path):
    with pytest.raises(ValueError, match="`methods`: sven unknown"):
        pinn.PINNTask.parse(["--methods", "sven", "--output_dir", str(tmp_path)])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "resnet", "sft", "dpo"])
def test_randomization_runs(model, tmp_path):
    """The ResNet has batch normalization, in which rows depend on each other."""
    args = randomization.Arguments(str(tmp_path), [model], ["partial_labels"], ["adamw", "sven"], max_steps=2)
    grid = randomization.RandomizationGrid(args)
    (spec,) = (spec for spec in grid.specify_runs() if spec.method == "sven")
    trainer = grid.make_trainer(spec, tmp_path / "run")
    assert isinstance(trainer, SvenWholeBatchTrainer) == (model == "resnet")
    before = flat(trainer.model)
    trainer.train()
    moved, d = (flat(trainer.model) - before).norm(), before.numel()
    assert 0 < moved <= 2 * spec.learning_rate * d**0.5


@pytest.mark.slow
def test_sft_comparison(tmp_path):
    arguments = ["--methods", "adamw", "sven", "--output_dir", str(tmp_path), *SHORT, *ONE_RATE, *ON_CPU]
    assert sft.main(arguments) == 0
    runs = {path.parent.name.partition("_lr")[0]: json.loads(path.read_text()) for path in tmp_path.glob("*/run.json")}
    assert runs["sven"]["optimizer"]["class"] == "SGD"
    log = next(tmp_path.glob("sven_lr*/history.jsonl")).read_text()
    assert "sven/rank" in log


def test_other_methods_keep_their_optimizer(tmp_path):
    task = regression.Regression.parse([*REGRESSION, "--output_dir", str(tmp_path)])
    trainer = ThresholdGrid(task).make_trainer(RunSpec("adamw", 1e-3, 0, {"weight_decay": 0.0}), tmp_path)
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    set_up_optimizer(trainer, parse_method("adamw"), 0)
    assert [group["lr"] for group in trainer.optimizer.param_groups] == rates
