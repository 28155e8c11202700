"""The physics-informed network: its loss, its data, and the task as a user runs it."""

import json
import math

import pytest
import torch
from torch import nn

from prm_hf import cli
from prm_hf.experiments.pinn import (
    PERIOD,
    PINN,
    PINNTask,
    draw_points,
    exact_solution,
    grid_of_points,
    measure,
    observe,
)
from prm_hf.runs.write import RunSpec


class Exact(nn.Module):
    """sin(x − βt), as a network."""

    def __init__(self, beta):
        super().__init__()
        self.beta = beta

    def forward(self, points):
        return exact_solution(points, self.beta)


def exact_pinn(beta, of=None):
    model = PINN(beta)
    model.network = Exact(beta if of is None else of)
    return model


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(*sizes):
    """Points of so many rows, points of the equation and times a row, in float64."""
    return {name: tensor.double() for name, tensor in draw_points(*sizes, generator()).items()}


@pytest.mark.parametrize("beta", [0.0, 1.0, 5.0, -30.0])
def test_the_exact_solution_has_no_loss(beta):
    start = {name: tensor.double() for name, tensor in observe(50, 0.0, generator()).items()}
    start["values"] = torch.sin(start["points"][:, :1])  # in float64
    loss = exact_pinn(beta)(**start, **drawn(50, 4, 1))["loss"]
    assert loss.dtype == torch.float64 and loss < 1e-10


def test_another_speed_is_another_equation():
    """sin(x − 4t) leaves cos(x − 4t) of u_t + 5·u_x, whose mean square is about 1/2; no other term sees it."""
    points, model = drawn(50, 80, 1), exact_pinn(5.0, of=4.0)
    inside = points["inside"]
    assert torch.allclose(model.residual(inside), torch.cos(inside[..., :1] - 4 * inside[..., 1:]))
    loss = model(inside[0], exact_solution(inside[0], 4.0), **points)["loss"]
    assert loss.item() == pytest.approx(0.5, abs=0.03)


def test_the_residual_is_that_of_two_derivatives():
    """And its gradient reaches every tensor but the last bias, on which no derivative of u depends."""
    torch.manual_seed(0)
    model = PINN(5.0, 2, 7).double()
    inside = drawn(3, 4, 1)["inside"].requires_grad_()
    (slopes,) = torch.autograd.grad(model.network(inside).sum(), inside)
    residual = model.residual(inside)
    assert torch.allclose(residual, slopes[..., 1:] + 5 * slopes[..., :1])
    residual.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["network.4.bias"]


def test_the_ends_of_the_period_are_to_agree():
    model, times = PINN().double(), drawn(20, 1, 2)["times"]
    assert exact_pinn(5.0).gap(times).abs().max() < 1e-10
    model.network = nn.Linear(2, 1).double()  # u = wx·x + wt·t + b
    wx = model.network.weight[0, 0]
    assert torch.allclose(model.gap(times), -PERIOD * wx.expand_as(times))
    start = torch.zeros(1, 2).double()
    loss = model(start, model.network(start).detach(), times=times)["loss"]
    assert torch.allclose(loss, (PERIOD * wx) ** 2)


def test_points_lie_in_the_domain():
    points, grid = draw_points(1000, 5, 5, generator()), grid_of_points()
    assert points["inside"].shape == (1000, 5, 2) and points["times"].shape == (1000, 5, 1)
    inside = points["inside"].flatten(0, 1)
    for low, high in ((inside.amin(0), inside.amax(0)), (grid.amin(0), grid.amax(0))):
        assert torch.allclose(low, torch.zeros(2), atol=0.01)
        assert torch.allclose(high, torch.tensor([2 * math.pi, 1.0]), atol=0.16)
    assert grid[:, 0].max() < 2 * math.pi - 0.05 and 0 <= points["times"].min() and points["times"].max() <= 1


def test_values_are_observed_with_noise():
    """Of the standard deviation asked for, and another one for each seed."""
    first, again, other = (observe(20_000, 0.5, generator(seed)) for seed in (0, 0, 1))
    x, t = first["points"].unbind(1)
    noise = first["values"][:, 0] - torch.sin(x)
    assert not t.any() and noise.std() == pytest.approx(0.5, rel=0.03) and abs(noise.mean()) < 0.02
    for name in first:
        assert torch.equal(again[name], first[name]) and not torch.equal(other[name], first[name])


def test_the_error_is_relative():
    data = {"points": torch.zeros(2, 2), "values": torch.tensor([[3.0], [4.0]])}
    for u, error in (([[3.0], [4.0]], 0), ([[0.0], [0.0]], 1), ([[3.0], [5.0]], 0.2)):
        assert measure(lambda u=u, **inputs: {"u": torch.tensor(u)}, data)["relative_l2"] == pytest.approx(error)


# ---- The task ----

TINY = ["--hidden_layers", "1", "--hidden_size", "32", "--observations", "16", "--per_device_train_batch_size", "4"]
TINY += ["--max_steps", "6", "--eval_steps", "2", "--logging_steps", "2", "--use_cpu"]
ONE = ["--learning_rates", "1e-3", "--prm_learning_rates", "1e-3", "--weight_decays", "0"]


def problem_of(*arguments, seed=0):
    return PINNTask.parse([*TINY, *arguments]).problem(seed)


def test_all_of_a_run_follows_from_its_seed():
    a, same, other = (problem_of(seed=seed) for seed in (3, 3, 4))
    for name, column in a.rows.items():
        assert torch.equal(column, same.rows[name]) and not torch.equal(column, other.rows[name])
    weights = [problem.model.network[0].weight for problem in (a, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert all(torch.equal(a.data[name], other.data[name]) for name in a.data)


@pytest.mark.parametrize("points", [1, 3])
def test_points_are_drawn_again_or_not(points):
    """Resampled, no step sees a point twice, and the observed values come back; the first ones are the fixed ones."""
    size = ["--collocation_points", str(points), "--max_steps", "10"]
    fixed, again = (problem_of(*size, "--collocation", kind).rows for kind in ("fixed", "resampled"))
    n, m = len(fixed["values"]), len(again["values"])
    assert (n, m) == (16, 48) and m >= 4 * 10  # batches of 4 in 10 steps
    assert again["inside"].shape == (m, points, 2) and len(again["inside"].flatten(0, 1).unique(dim=0)) == m * points
    assert torch.equal(again["values"], fixed["values"].repeat(3, 1))
    accumulated = problem_of(*size, "--gradient_accumulation_steps", "2", "--models_at_once", "1").rows
    assert len(accumulated["values"]) == 80


def test_the_evaluation_compares_with_the_exact_solution(tmp_path):
    task = PINNTask.parse([*TINY, "--beta", "2", "--output_dir", str(tmp_path)])
    trainer = task.make_trainer(task.training_args, RunSpec("adamw", 1e-3, 0, {}))
    grid = grid_of_points()
    with torch.no_grad():
        u = trainer.model.network(grid)
    exact = exact_solution(grid, 2.0)
    expected = ((u - exact).norm() / exact.norm()).item()
    assert trainer.evaluate()["eval_relative_l2"] == pytest.approx(expected, rel=1e-5)


def test_empirical_counts_observed_values():
    """However many rows they have."""
    alphas = [
        PINNTask.parse([*TINY, "--collocation", kind, "--prm_boundary", "empirical"]).training_args.prm_alpha
        for kind in ("fixed", "resampled")
    ]
    assert alphas == [4 / 12, 4 / 12]
    given = PINNTask.parse([*TINY, "--prm_boundary", "empirical", "--prm_alpha", "0.5"])
    assert given.training_args.prm_alpha == 0.5 and PINNTask.parse(TINY).training_args.prm_alpha is None


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.slow
def test_runs_to_the_end(tmp_path, capsys):
    """Alone and stacked alike; a run that does not get there is censored at its last step."""
    methods = ["adamw", "prm_per_tensor", "prm_per_param", "prm_rows", "constant_q"]
    arguments = [*TINY, *ONE, "--methods", *methods, "--seeds", "0", "1", "--prm_boundary", "empirical"]
    errors = []
    for at_once in ("1", "4"):
        folder = tmp_path / at_once
        assert cli.main(["pinn", *arguments, "--models_at_once", at_once, "--output_dir", str(folder)]) == 0
        out = capsys.readouterr().out
        assert ">6" in out and "3,300" in out and "1,400" in out
        runs = [json.loads(file.read_text()) for file in folder.rglob("metrics.json")]
        assert len(runs) == 2 * len(methods) and all(run["steps"] == 6 for run in runs)
        errors.append(sorted(run["relative_l2"] for run in runs))
    assert min(errors[0]) > 0.4 and len({*errors[0]}) == len(errors[0])
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)


@pytest.mark.usefixtures("no_pictures")
def test_a_threshold_that_is_reached_ends_the_run(tmp_path, capsys):
    arguments = [*TINY, *ONE, "--methods", "adamw", "--seeds", "0", "--output_dir", str(tmp_path)]
    assert cli.main(["pinn", *arguments, "--threshold", "100"]) == 0
    (run,) = [json.loads(file.read_text()) for file in tmp_path.rglob("metrics.json")]
    assert run["steps_to_threshold"] == 0 and run["steps"] < 6
    assert "3,300" not in capsys.readouterr().out  # which is of another threshold


@pytest.mark.slow
def test_the_solution_is_found():
    """Without noise, and at a slow speed, AdamW's error falls far in 300 steps."""
    problem = PINNTask.parse(["--noise", "0", "--beta", "1", "--max_steps", "300"]).problem(0)
    optimizer = torch.optim.AdamW(problem.model.parameters(), lr=1e-2)
    for index in torch.arange(300 * 16).split(16):
        optimizer.zero_grad()
        problem.model(**{name: column[index] for name, column in problem.rows.items()})["loss"].backward()
        optimizer.step()
    assert measure(problem.model, problem.data)["relative_l2"] < 0.2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--noise", "-1"], "`noise`"),
        (["--noise", "nan"], "`noise`"),
        (["--beta", "inf"], "`beta`"),
        (["--observations", "0"], "`observations`"),
        (
            ["--observations", "3"],
            "A step has 4 rows by `per_device_train_batch_size`, and there are 3 `observations`.",
        ),
        (["--collocation_points", "0"], "`collocation_points`"),
        (["--boundary_points", "0"], "`boundary_points`"),
        (["--hidden_layers", "0"], "`hidden_layers`"),
        (["--hidden_size", "-5"], "`hidden_size`"),
        (["--collocation", "sobol"], "sobol"),
        (["--preset", "gpu"], "`preset` must be one of cpu, full, got 'gpu'."),
        (["--prm_boundary", "empirical", "--observations", "4"], "needs more `observations` than a step has, 4."),
    ],
)
def test_wrong_input_is_said_before_any_run(tmp_path, capsys, arguments, says):
    assert cli.main(["pinn", *TINY, *ONE, "--output_dir", str(tmp_path / "runs"), *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()
