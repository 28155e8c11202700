"""Grokking: its pairs, what is measured, and the task as a user runs it."""

import json

import pytest
import torch

from prm_hf import cli
from prm_hf.experiments.controls import _third_party_optimizer
from prm_hf.experiments.grokking import OPERATIONS, TRAIN_ACCURACY, GrokkingTask, equations, measure
from prm_hf.runs.write import RunSpec


TINY = ["--modulus", "5", "--train_share", "0.5", "--width", "8", "--per_device_train_batch_size", "5", "--use_cpu"]
TINY += ["--report_to", "none"]


def parse(*arguments):
    return GrokkingTask.parse([*TINY, *arguments])


@pytest.mark.parametrize("modulus", [3, 7, 97])
def test_results_are_those_of_the_operation(modulus):
    for operation in OPERATIONS:
        tokens, results = equations(operation, modulus)
        a, b, equals = tokens.unbind(1)
        undone = {
            "divide": (results * b, a),
            "add": (results - b, a),
            "subtract": (results + b, a),
            "multiply": (results, a * b),
        }[operation]
        assert torch.equal(undone[0] % modulus, undone[1] % modulus), operation
        assert (equals == modulus).all() and (results >= 0).all() and (results < modulus).all()
        divisors = modulus - (operation == "divide")
        assert len({*zip(a.tolist(), b.tolist(), strict=True)}) == len(tokens) == modulus * divisors
        assert operation != "divide" or (b > 0).all()


def pairs_of(columns):
    return {tuple(row) for row in columns["input_ids"].tolist()}


@pytest.mark.parametrize(("preset", "train", "n"), [("full", 2328, 97 * 96), ("cpu", 558, 31 * 30)])
def test_no_pair_is_both_trained_on_and_held_out(preset, train, n):
    task = GrokkingTask.parse(["--preset", preset])
    problem, other = task.problem(0), task.problem(1)
    trained, heldout = pairs_of(problem.rows), pairs_of(problem.data)
    assert len(trained) == problem.n_rows == train and len(heldout) == n - train and not trained & heldout
    assert train == round(task.args.train_share * n)
    assert torch.equal(problem.data["train_input_ids"], problem.rows["input_ids"])
    assert pairs_of(other.rows) != trained
    again = task.problem(0)
    assert torch.equal(again.rows["labels"], problem.rows["labels"])
    for found, expected in zip(again.model.parameters(), problem.model.parameters(), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(other.model.head.weight, problem.model.head.weight)


def test_the_task_leaves_the_random_numbers_alone():
    task = parse()
    before = torch.get_rng_state()
    task.problem(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_metric_is_the_share_of_right_results():
    problem = parse().problem(0)
    a, b, _ = problem.data["input_ids"].unbind(1)
    divided = {(a, b): c for (a, b, _), c in zip(*map(torch.Tensor.tolist, equations("divide", 5)), strict=True)}

    def knows(pairs):
        def call(input_ids, labels):
            logits = torch.zeros(len(labels), 5)
            for logit, (a, b, _) in zip(logits, input_ids.tolist(), strict=True):
                logit[divided[a, b] if (a, b) in pairs else (divided[a, b] + 1) % 5] = 9.0
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

        return measure(call, problem.data)

    heldout = list(zip(a.tolist(), b.tolist(), strict=True))
    trained = [(a, b) for a, b, _ in problem.rows["input_ids"].tolist()]
    assert knows(trained)["accuracy"] == 0 and knows(trained)[TRAIN_ACCURACY] == 1
    assert knows(heldout)["accuracy"] == 1 and knows(heldout)[TRAIN_ACCURACY] == 0
    assert knows(heldout)["loss"] < 0.01 < knows(trained)["loss"]
    assert knows(heldout[:3])["accuracy"] == pytest.approx(3 / len(heldout))


@pytest.mark.parametrize(("value", "is_reached"), [(0.9499, False), (0.95, True), (1.0, True)])
def test_the_threshold(value, is_reached):
    assert parse().threshold.is_reached(value) is is_reached


def test_published_numbers_belong_to_one_task():
    full = ["--preset", "full"]
    assert GrokkingTask.parse(full).published == {"AdamW": 29_450, "PRM": 5_950}
    for other in (["--operation", "add"], ["--modulus", "101"], ["--train_share", "0.3"], ["--threshold", "0.9"]):
        assert not GrokkingTask.parse([*full, *other]).published
    assert not GrokkingTask.parse([]).published


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--modulus", "9"], "`modulus` must be a prime number above 2, as 31 or 97, got 9"),
        (["--modulus", "1"], "`modulus` must be a prime number above 2"),
        (["--operation", "power"], "`--operation` has no choice 'power'"),
        (["--train_share", "1"], "`train_share` must be above 0 and below 1, with 20 pairs, got 1.0"),
        (["--train_share", "0.01"], "`train_share` must be above 0 and below 1, with 20 pairs, got 0.01"),
        (["--heads", "3"], "`width` must be a multiple of `heads`, got 8 and 3"),
        (["--layers", "0"], "`layers` must be at least 1, got 0"),
        (
            ["--per_device_train_batch_size", "11"],
            "`per_device_train_batch_size` must be at most 10, with 10 pairs to train on and .*'batch'`, got 11",
        ),
        (
            ["--per_device_train_batch_size", "10", "--prm_boundary", "empirical"],
            "`per_device_train_batch_size` must be at most 9, with 10 pairs to train on and .*'empirical'`, got 10",
        ),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse(*arguments)


RUN = ["--seeds", "0", "1", "--learning_rates", "1e-2", "--weight_decays", "1"]
RUN += ["--max_steps", "4", "--eval_steps", "2"]


def metrics_of(folder):
    found = {}
    for file in folder.rglob("metrics.json"):
        info = json.loads((file.parent / "run.json").read_text())
        found[info["method"], info["seed"]] = json.loads(file.read_text())
    return found


def test_from_the_command_line_to_the_report(tmp_path, capsys):
    """No model of four steps gets there, and each is trained with the optimizer of its method."""
    pytest.importorskip("pytorch_optimizer")
    pytest.importorskip("grokadamw")
    methods = ["adamw", "prm_per_param", "grokfast", "grokadamw", "constant_q"]
    folder = tmp_path / "runs"
    arguments = ["grokking", *TINY, *RUN, "--methods", *methods, "--output_dir", str(folder)]
    assert cli.main([*arguments, "--prm_boundary", "empirical"]) == 0
    found = metrics_of(folder)
    assert {*found} == {(method, seed) for method in methods for seed in (0, 1)}
    for metrics in found.values():
        assert metrics["steps"] == 4 and "steps_to_threshold" not in metrics
        assert 0 <= metrics["accuracy"] < 0.95 and 0 <= metrics[TRAIN_ACCURACY] <= 1
    assert len({metrics["loss"] for (_, seed), metrics in found.items() if seed == 0}) == len(methods)
    printed = capsys.readouterr().out
    assert "Grokfast" in printed and ">4" in printed


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_run_that_gets_there_ends(tmp_path, at_once):
    """With the first evaluation that is good enough: here any is."""
    folder = tmp_path / "runs"
    arguments = [*TINY, *RUN, "--methods", "adamw", "prm_rows", "--models_at_once", str(at_once)]
    assert cli.main(["grokking", *arguments, "--threshold", "0.0", "--output_dir", str(folder)]) == 0
    found = metrics_of(folder)
    assert len(found) == 4 and {metrics["steps_to_threshold"] for metrics in found.values()} == {0}


def test_a_trainer_and_a_stack_train_the_same_model(tmp_path):
    methods = ["--methods", "adamw", "prm_per_param"]
    for name, more in (("one", []), ("many", ["--models_at_once", "4"])):
        assert cli.main(["grokking", *TINY, *RUN, *methods, *more, "--output_dir", str(tmp_path / name)]) == 0
    one, many = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "many")
    assert {*one} == {*many} and len(one) == 4
    for key, metrics in one.items():
        assert many[key]["loss"] == pytest.approx(metrics["loss"], abs=1e-4), key


def test_the_methods_made_for_grokking():
    """Grokfast adds the gradient's average, λ times, and its learning rate is AdamW's."""
    library = pytest.importorskip("pytorch_optimizer")
    task = parse("--methods", "grokfast")
    spec = RunSpec("grokfast", 1e-2, 0, {})
    trainer = task.make_trainer(task.training_args, spec)
    trainer.args.learning_rate, trainer.args.weight_decay, trainer.args.optim = 1e-2, 0.5, "adamw_torch"
    trainer.create_optimizer()
    optimizer = _third_party_optimizer(trainer, "grokfast")
    assert isinstance(optimizer, library.GrokFastAdamW)
    assert {group["lr"] for group in optimizer.param_groups} == {1e-2}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.5, 0.0}
    assert {group["betas"] for group in optimizer.param_groups} == {(0.9, 0.98)}
