"""Shell commands of the documentation: what they would run, found by running them with stand-ins for the programs."""

import argparse
import functools
import os
import re
import subprocess
from collections.abc import Callable, Collection
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from accelerate.commands.launch import launch_command_parser
from transformers import HfArgumentParser
from trl import ModelConfig, TrlParser

from benchmarks import sharded
from prm_hf import cli
from prm_hf.experiments import dimension_curves, sweep
from prm_hf.experiments.compression import CompressionArguments
from prm_hf.experiments.diagnose import DiagnoseArguments
from prm_hf.experiments.dpo import DPOExperiment
from prm_hf.experiments.experiment import Experiment
from prm_hf.experiments.grokking import GrokkingTask
from prm_hf.experiments.pairs import PairsArguments
from prm_hf.experiments.pinn import PINNTask
from prm_hf.experiments.randomization import Arguments
from prm_hf.experiments.regression import Regression
from prm_hf.experiments.sft import SFTExperiment
from prm_hf.experiments.suspects import SHORT, SuspectsArguments, in_full
from prm_hf.experiments.thresholds import ThresholdConfig, ThresholdTask
from prm_hf.integrations.trl import SCRIPTS
from prm_hf.runs.methods import parse_method
from research import mask_search

from .docs_runs import PROGRAMS, ROOT


# Of programs that a script starts side by side one writes at a time.
STAND_IN = '#!/bin/bash\nexec 9>>"$CALLS"; flock 9; printf "%s\\0" "{program}" "$@" >&9; printf "\\n" >&9\n'
EXPERIMENTS = {
    "dpo": DPOExperiment,
    "recipes/dpo_noisy.py": DPOExperiment,
    "sft": SFTExperiment,
    "recipes/sft_noisy.py": SFTExperiment,
}
OTHERS = (CompressionArguments, DiagnoseArguments, PairsArguments, SuspectsArguments)
# Tasks that are judged by the steps to a threshold
TASKS: dict[str, type[ThresholdTask]] = {"regression": Regression, "grokking": GrokkingTask, "pinn": PINNTask}


def calls_of(script: str, folder: Path, *arguments: str) -> list[list[str]]:
    """The commands that a bash script gives in an empty folder, each a program and its arguments.

    Raises:
        subprocess.CalledProcessError: bash cannot read the script, or it names a program that is not in `PROGRAMS`.
    """
    bin_folder, work, calls = folder / "bin", folder / "work", folder / "calls"
    for program in PROGRAMS:
        path = (work if "/" in program else bin_folder) / program
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(STAND_IN.format(program=program))
        path.chmod(0o755)
    calls.write_text("")
    environment = {"PATH": f"{bin_folder}{os.pathsep}/usr/bin{os.pathsep}/bin", "CALLS": str(calls)}
    command = ["bash", "-e", "-u", "-c", script, "bash", *arguments]
    subprocess.run(command, cwd=work, env=environment, check=True, capture_output=True, text=True)
    return [line.split("\0")[:-1] for line in calls.read_text().splitlines()]


def check_call(call: list[str]) -> None:
    """Fails if the program would not accept its arguments, or names a file of the repository that is not there."""
    program, *arguments = call
    CHECKS.get(program, lambda arguments: None)(arguments)


@functools.cache
def known_flags() -> set[str]:
    """The flags of all commands that the documentation speaks of."""
    classes = {cls for e in EXPERIMENTS.values() for cls in (e.arguments_class, e.config_class)}
    classes |= {cls for task in TASKS.values() for cls in (task.arguments_class, ThresholdConfig)}
    parsers = [HfArgumentParser(cls) for cls in (*classes, ModelConfig, Arguments, *OTHERS)]
    parsers += [dimension_curves.make_parser(), sweep.make_parser()]
    parsers += [launch_command_parser(), *_subparsers(cli._make_parser())]
    flags = {flag for parser in parsers for flag in parser._option_string_actions} | {"--config", *SHORT}
    scripts = [script.read_text(encoding="utf-8") for script in (ROOT / "benchmarks").glob("*.py")]
    return flags | {flag for text in scripts for flag in re.findall(r'"(--\w+)"', text)}


def _subparsers(parser: argparse.ArgumentParser) -> list[argparse.ArgumentParser]:
    """A parser and those of its commands."""
    commands = [action.choices.values() for action in parser._actions if isinstance(action.choices, dict)]
    return [parser, *(command for choices in commands for command in choices)]


def _check_pip(arguments: list[str]) -> None:
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert arguments[0] == "install"
    for flag, value in pairwise(arguments):
        if flag == "-c":
            _check_file(value)
        if flag == "-e":
            wanted = value.removeprefix(".").strip("[]")
            assert not wanted or set(wanted.split(",")) <= set(extras), value


def _check_pytest(arguments: list[str]) -> None:
    markers = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    flags = dict(pairwise(arguments))
    assert "-m" not in flags or flags["-m"] in markers, arguments
    for argument in arguments:
        if "/" in argument:
            _check_file(argument)


def _check_python(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        name = arguments[1]
        assert find_spec(name.split(".")[0]) is None or find_spec(name) is not None, name
        assert name != "prm_hf" or _check_prm_hf(arguments[2:]) is None
    else:
        _check_script(arguments[0], arguments[1:])


def _check_accelerate(arguments: list[str]) -> None:
    assert arguments[0] == "launch"
    launched = launch_command_parser().parse_args(arguments[1:])
    if launched.config_file:
        _check_file(launched.config_file)
    if launched.module:
        assert launched.training_script == "prm_hf"
        _check_prm_hf(launched.training_script_args)
    else:
        _check_script(launched.training_script, launched.training_script_args)


def _check_prm_hf(arguments: list[str]) -> None:
    if arguments[0] == "sweep":
        _check_script("recipes/sweep.py", arguments[1:])
    elif arguments[0] in TASKS:
        TASKS[arguments[0]].parse(arguments[1:])
    elif arguments[0] in EXPERIMENTS:
        _check_experiment(EXPERIMENTS[arguments[0]], arguments[1:])
    elif arguments[0] == "pairs":
        _check_script("recipes/pairs.py", arguments[1:])
    elif arguments[0] == "diagnose":
        HfArgumentParser(DiagnoseArguments).parse_args(["--runs", *arguments[1:]])
    elif arguments[0] == "suspects":
        _check_suspects(arguments[1:])
    elif arguments[0] in cli.TOOLS:
        _check_tool(arguments)
    else:
        cli._make_parser().parse_args(arguments)


def _check_script(script: str, arguments: list[str]) -> None:
    _check_file(script)
    if script == "recipes/sweep.py":
        name, *rest = sweep.make_parser().parse_args(arguments).experiment
        if name in (*EXPERIMENTS, *TASKS, "suspects"):
            _check_prm_hf([name, *rest])
        else:
            _check_script(name, rest)
    elif script in EXPERIMENTS:
        _check_experiment(EXPERIMENTS[script], arguments)
    elif script == mask_search.__name__.replace(".", "/") + ".py":
        recipe = arguments.pop(0) if arguments and arguments[0] in EXPERIMENTS else "dpo"
        _check_experiment(EXPERIMENTS[recipe], arguments, mask_search.VARIANTS)
    elif script == "recipes/pairs.py":
        HfArgumentParser(PairsArguments).parse_args(arguments[1:])
    elif script == "recipes/effective_dimension.py":
        dimension_curves.make_parser().parse_args(arguments)
    elif (task := Path(script).stem) in TASKS:
        TASKS[task].parse(arguments)
    elif script == "benchmarks/sharded.py":
        sharded.parse(arguments)
    elif script == "recipes/randomization.py":
        HfArgumentParser(Arguments).parse_args(arguments)
    elif script == "recipes/compression.py":
        HfArgumentParser(CompressionArguments).parse_args(arguments)
    else:
        text = (ROOT / script).read_text(encoding="utf-8")
        for flag in (argument for argument in arguments if argument.startswith("--")):
            assert f'"{flag}"' in text, flag


def _check_experiment(experiment: type[Experiment], arguments: list[str], more: Collection[str] = ()) -> None:
    """By the experiment's own parser, but for the files of the user, which nobody has here.

    `more` are methods that it knows beside those of the table.
    """
    arguments = [argument for argument in arguments if argument != "--help"]
    if "--config" in arguments:
        at = arguments.index("--config")
        if (file := arguments[at + 1]).startswith("recipes/"):
            _check_file(file)
        del arguments[at : at + 2]
    parser = TrlParser((experiment.arguments_class, experiment.config_class, ModelConfig))
    for method in parser.parse_args(arguments).methods:
        assert method in more or parse_method(method)


def _check_suspects(arguments: list[str]) -> None:
    parser = TrlParser((SuspectsArguments, DPOExperiment.config_class, ModelConfig))
    arguments = [argument for argument in arguments if argument != "--help"]
    parse_method(parser.parse_args(in_full(arguments)).method)


def _check_tool(arguments: list[str]) -> None:
    """A command of another tool: which it knows, and the file of this repository that it trains by."""
    commands = {f"trl {script} --config" for script in SCRIPTS} | {"llamafactory train", "llamafactory sft"}
    command, file = next((arguments[:i], x) for i, x in enumerate(arguments) if x.endswith(".yaml"))
    assert " ".join(command) in commands | {"sft", "rlhf", "train"}, arguments
    _check_file(file)


def _check_file(path: str) -> None:
    assert (ROOT / path).exists(), path


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "accelerate": _check_accelerate,
    "axolotl": _check_tool,
    "pip": _check_pip,
    "prm-hf": _check_prm_hf,
    "pytest": _check_pytest,
    "python": _check_python,
    "swift": _check_tool,
}
