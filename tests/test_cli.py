"""The command line: `prm-hf compare`, and that each experiment is reached."""

import dataclasses
import importlib.util
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import prm_hf
from prm_hf import cli
from prm_hf.runs.methods import METHODS

from .compare.compared_runs import write_grid


@pytest.mark.parametrize(
    ("form", "start"),
    [("table", "No sign of it: "), ("json", "{"), ("markdown", "**No sign of it: PRM"), ("html", "<!DOCTYPE html>")],
)
def test_compare_prints_each_format(tmp_path, capsys, form, start):
    write_grid(tmp_path / "runs")
    folders = [str(folder) for folder in (tmp_path / "runs").iterdir()]
    assert cli.main(["compare", *folders, "--format", form]) == 0
    assert capsys.readouterr().out.startswith(start)


def test_compare_writes_a_file(tmp_path, capsys):
    write_grid(tmp_path / "runs")
    arguments = ["compare", str(tmp_path / "runs"), "--format", "markdown"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert cli.main([*arguments, "--output", str(tmp_path / "report.md")]) == 0
    assert capsys.readouterr().out == ""
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == printed


def test_compare_prints_the_table_by_default(tmp_path, capsys):
    write_grid(tmp_path)
    assert cli.main(["compare", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("No sign of it: ")


def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    write_grid(tmp_path / "runs")
    (tmp_path / "empty").mkdir()
    cases = [
        ([str(tmp_path / "empty")], "holds no run: expected a run folder"),
        ([str(tmp_path / "missing")], "does not exist"),
        ([str(tmp_path / "runs"), "--output", str(tmp_path / "no" / "file")], "No such file"),
    ]
    for arguments, message in cases:
        assert cli.main(["compare", *arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("prm-hf compare: error: ")
        assert message in captured.err and captured.err.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["compare", str(tmp_path / "runs"), "--format", "html"]) == 2
    assert 'pip install "prm-hf[report]"' in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["compare"], ["compare", "x", "--format", "pdf"]])
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2 and "usage: prm-hf" in capsys.readouterr().err


def test_command_line_and_room_load_little():
    """Beyond what `import prm_hf` itself loads, `--help` loads nothing but the parser, and the comparison neither
    matplotlib nor the training stack, nor the rooms that train."""
    code = (
        "import json, sys, prm_hf; before = set(sys.modules); from prm_hf import cli\n"
        "try: cli.main(['compare', '--help'])\n"
        "except SystemExit: pass\n"
        "new = set(sys.modules) - before; import prm_hf.compare; later = set(sys.modules) - before\n"
        "heavy = {'matplotlib', 'torch', 'transformers', 'trl', 'scipy.stats', 'datasets'}\n"
        "rooms = ('prm_hf.trainers', 'prm_hf.experiments', 'prm_hf.optim', 'prm_hf.noise', 'prm_hf.metrics')\n"
        "print(json.dumps([sorted(m for m in new if m.split('.')[0] not in sys.stdlib_module_names),"
        " sorted(m for m in later if m in heavy or m.startswith(rooms))]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--format" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1]) == [["prm_hf.cli"], []]


def test_runs_as_a_module(tmp_path, capsys, monkeypatch):
    write_grid(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prm-hf", "compare", str(tmp_path), "--format", "json"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("prm_hf", run_name="__main__")
    assert stopped.value.code == 0 and len(json.loads(capsys.readouterr().out)["rows"]) == 6


@pytest.mark.parametrize(
    ("name", "code"),
    [
        *[("dpo", 75), ("sft", 0), ("suspects", 1), ("randomization", None), ("pairs", 0), ("sweep", 1)],
        *[("regression", 0), ("grokking", 1), ("pinn", 0), ("diagnose", 1)],
    ],
)
def test_experiments_get_their_arguments(name, code, monkeypatch):
    experiment = importlib.import_module(f"prm_hf.experiments.{name}")
    given = []
    monkeypatch.setattr(experiment, "main", lambda arguments: given.append(arguments) or code)
    assert cli.main([name, "--methods", "adamw", "--help"]) == (code or 0)
    assert given == [["--methods", "adamw", "--help"]]
    others = {"suspects", "diagnose", "pairs", "randomization", "regression", "grokking", "pinn"}
    assert set(cli.EXPERIMENTS) == {"dpo", "sft", "sweep", *others}


def test_an_error_on_purpose_is_one_line(capsys):
    """Of a `raise` over several lines too."""
    for arguments in (["sweep", "dpoo"], ["dpo", "--learning_rates", "1", "2", "--prm_learning_rates", "1"]):
        assert cli.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"prm-hf {arguments[0]}: error: `") or "The first argument must be" in error
        assert error.count("\n") == 1 and "Traceback" not in error


def test_a_file_that_cannot_be_used_is_one_line(monkeypatch, capsys):
    def full(arguments):
        Path("/dev/full/x").write_text("x", encoding="utf-8")

    monkeypatch.setattr("prm_hf.experiments.sweep.main", full)
    assert cli.main(["sweep"]) == 2
    assert "prm-hf sweep: error: [Errno " in capsys.readouterr().err


def test_lines_of_another_library_become_one(monkeypatch, capsys):
    """In our own messages a line break is part of a name, and shown: tests/compare/test_odd_files.py."""

    def unknown(arguments):
        raise OSError("no model\n  of \x1b[1mthis\nname")

    monkeypatch.setattr("prm_hf.experiments.sweep.main", unknown)
    assert cli.main(["sweep"]) == 2
    assert capsys.readouterr().err == "prm-hf sweep: error: no model of \\x1b[1mthis name\n"


@pytest.mark.parametrize("code", ["None + 1", "int('x')", "{}['x']", "[1][2]", "(1).x", "1 / 0", "zip([1], [], 3)"])
def test_an_error_of_the_program_keeps_its_traceback(code, monkeypatch):
    monkeypatch.setattr("prm_hf.experiments.sweep.main", lambda arguments: eval(code))
    with pytest.raises(Exception) as raised:
        cli.main(["sweep"])
    assert type(raised.value).__module__ == "builtins"


def test_an_interruption_is_one_line(monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("prm_hf.experiments.sweep.main", interrupted)
    assert cli.main(["sweep"]) == 130
    assert capsys.readouterr().err == "prm-hf sweep: interrupted. The same command goes on from here.\n"


def test_of_several_processes_the_first_speaks_at_once(monkeypatch, capsys):
    """The launcher ends the others when the first ends; where only another fails, it speaks after a while."""
    waits = []
    monkeypatch.setattr(cli.time, "sleep", waits.append)
    for rank, waited in (("0", []), ("1", [cli.WAIT_FOR_LAUNCHER])):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["sweep", "dpoo"]) == 2
        assert waits == waited and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "name", ["dpo", "sft", "randomization", "regression", "grokking", "pinn", "pairs", "sweep", "compare", "doctor"]
)
def test_help_is_readable(name, capsys):
    try:
        assert cli.main([name, "--help"]) == 0
    except SystemExit as stopped:
        assert stopped.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: prm-hf {name} ")
    lines = out.splitlines()
    assert len(lines) < 175 and max(map(len, lines)) <= 120


@pytest.mark.parametrize("name", ["dpo", "sft"])
def test_help_shows_what_is_used_and_help_all_the_rest(name, capsys):
    experiment = importlib.import_module(f"prm_hf.experiments.{name}")
    task = experiment.DPOExperiment if name == "dpo" else experiment.SFTExperiment
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    short = capsys.readouterr().out
    for field in dataclasses.fields(task.arguments_class):
        assert (f"--{field.name} " in short) == field.init
    for key in task.known_methods():
        assert re.search(rf"^  {key}(:VALUE)? +{re.escape(METHODS[key].title)}", short, re.MULTILINE)
    assert "--help-all" in short and "--adam_beta2" not in short and "--prm_rho" not in short
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help-all"])
    long = capsys.readouterr().out
    assert stopped.value.code == 0 and "--adam_beta2" in long and "--lora_r " in long and "--prm_mask" in long


@pytest.mark.parametrize(
    "recipe", ["dpo_noisy", "sft_noisy", "randomization", "regression", "grokking", "pinn", "pairs", "sweep"]
)
def test_recipes_are_the_commands(recipe, monkeypatch):
    given = []
    monkeypatch.setattr(cli, "main", lambda arguments: given.append(arguments) or 3)
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", "--seeds", "1"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(Path(__file__).parents[1] / "recipes" / f"{recipe}.py"), run_name="__main__")
    assert stopped.value.code == 3 and given == [[recipe.removesuffix("_noisy"), "--seeds", "1"]]


def test_a_missing_package_is_named(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("prm_hf.experiments")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "trl" else name)
    assert cli.main(["dpo"]) == 2
    error = 'prm-hf dpo: error: `prm_hf.experiments` needs trl: pip install "prm-hf[trl]"\n'
    assert capsys.readouterr().err == error


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out == f"prm-hf {prm_hf.__version__}\n"
