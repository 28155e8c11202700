"""The command line: `prm-hf compare`, and that each experiment is reached."""

import importlib.util
import json
import runpy
import subprocess
import sys

import pytest

import prm_hf
from prm_hf import cli

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


@pytest.mark.parametrize(("name", "code"), [("dpo", 75), ("sft", 0), ("randomization", None), ("sweep", 1)])
def test_experiments_get_their_arguments(name, code, monkeypatch):
    experiment = importlib.import_module(f"prm_hf.experiments.{name}")
    given = []
    monkeypatch.setattr(experiment, "main", lambda arguments: given.append(arguments) or code)
    assert cli.main([name, "--methods", "adamw", "--help"]) == (code or 0)
    assert given == [["--methods", "adamw", "--help"]]
    assert set(cli.EXPERIMENTS) == {"dpo", "sft", "randomization", "sweep"}


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
