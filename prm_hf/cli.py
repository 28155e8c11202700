"""`prm-hf dpo | sft | suspects | … | diagnose | sweep | compare | doctor`; `python -m prm_hf …` is the same."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from . import __version__


EXPERIMENTS = {
    "dpo": "compare PRM with AdamW in DPO on preferences with flipped labels",
    "sft": "compare PRM with AdamW in SFT on prompts with wrong completions",
    "suspects": "find the labels of a dataset that are probably wrong, and repair them",
    "grokking": "compare the steps until a model generalizes in modular arithmetic",
    "randomization": "train on true labels and on pure noise, with PRM and with AdamW",
    "regression": "compare the steps to a held-out error where training labels are wrong",
    "pinn": "compare the steps to a solution of a differential equation from noisy values",
    "pairs": "make preference pairs of a model's right and wrong answers",
    "diagnose": "measure how simple a trained model is: effective dimension, compression bound",
    "sweep": "run `dpo`, `sft`, `suspects`, `regression`, `grokking` or `pinn` on every GPU, also of a Ray cluster",
}
# Training scripts of other packages, which run with `optim="prm"`
TOOLS = {
    "trl": "run a training script of TRL, as `trl dpo` does, with `optim: prm`",
    "llamafactory": "train with LLaMA-Factory, as `llamafactory-cli train` does, with `optim: prm`",
}
WAIT_FOR_LAUNCHER = 10.0  # seconds


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prm-hf", description="Experiments with the PRM optimizer.")
    parser.add_argument("--version", action="version", version=f"prm-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in {**EXPERIMENTS, **TOOLS}.items():
        commands.add_parser(name, help=text)
    compare = commands.add_parser(
        "compare",
        help="compare finished runs",
        description="Compares finished runs: PRM against AdamW at the same and at the best learning rate, and at "
        "equal drift from the reference policy, with 95%% bootstrap intervals; says what the numbers show, and not.",
    )
    compare.add_argument(
        "folders",
        nargs="+",
        metavar="DIR",
        help="folders of runs of this package or of any transformers Trainer (trainer_state.json), or folders that "
        "hold such folders",
    )
    # The formats are spelled out, for `--help` is to answer without numpy.
    compare.add_argument(
        "--format", choices=("table", "json", "markdown", "html"), default="table", help="%(default)s"
    )
    compare.add_argument("--verbose", action="store_true", help="also list the caveats that apply")
    compare.add_argument("--output", metavar="FILE", help="write to this file instead of the standard output")
    doctor = commands.add_parser(
        "doctor",
        help="show what is installed, which way of sharding would run, and how PRM gets into each tool",
        description="Says what is installed and on which devices, which way of sharding a configuration of accelerate "
        "stands for, what PRM refuses there and why, and how PRM gets into each tool. The exit code is 1 if PRM with "
        "its defaults is refused.",
    )
    doctor.add_argument(
        "--config_file", metavar="FILE", help="of `accelerate launch`; without it accelerate's own default file"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Returns:
        The exit code: of an experiment its own, otherwise 0; 2 if the input is wrong, 130 if the user interrupts.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not sys.stderr.isatty():  # a log file has a line for each run, and no bars
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # Each experiment has a parser of its own, which is slow to load
    command = argv[0] if argv else ""
    room = "integrations" if command in TOOLS else "experiments"
    run: Callable[[], int | None] = partial(_run_command, room, argv)
    if command not in {**EXPERIMENTS, **TOOLS}:
        arguments = _make_parser().parse_args(argv)
        command = arguments.command
        run = partial({"compare": _compare, "doctor": _doctor}[command], arguments)
    try:
        return run() or 0
    except KeyboardInterrupt:
        return _say(command, "interrupted. The same command goes on from here.", code=130)
    except Exception as error:
        is_ours = _is_raised_here(error)
        if not is_ours and not isinstance(error, OSError):
            raise
        from .runs.text import one_line, printable

        # In our own messages a line break is part of a name.
        return _say(command, f"error: {printable(error if is_ours else one_line(error))}", code=2)


def _run_command(room: str, argv: list[str]) -> int | None:
    return importlib.import_module(f"prm_hf.{room}.{argv[0]}").main(argv[1:])


def _doctor(arguments: argparse.Namespace) -> int:
    from prm_hf.doctor import main

    return main(arguments.config_file)


def _compare(arguments: argparse.Namespace) -> None:
    from prm_hf.compare import compare_experiments, format_comparison

    output = None if arguments.output is None else Path(arguments.output)
    if output is not None and output.is_dir():
        raise ValueError(f"`--output` {str(output)!r} is a folder: name a file.")
    if output is not None and not output.parent.is_dir():
        raise ValueError(f"`--output` {str(output)!r}: No such file or folder {str(output.parent)!r}: make it first.")
    text = format_comparison(compare_experiments(arguments.folders), arguments.format, arguments.verbose)
    if output is None:
        sys.stdout.write(text)
    else:
        output.write_text(text, encoding="utf-8")


def _is_raised_here(error: Exception) -> bool:
    """Whether this package raised an error on purpose. All others but OSErrors show their traceback."""
    place = traceback.extract_tb(error.__traceback__)[-1]
    is_ours = Path(place.filename).is_relative_to(Path(__file__).parent) and (place.line or "").startswith("raise ")
    return is_ours and isinstance(error, OSError | ValueError | TypeError | ImportError)


def _say(command: str, message: str, code: int) -> int:
    if os.environ.get("RANK", "0") != "0":
        # The first process says the same. When it ends, the launcher ends the others.
        time.sleep(WAIT_FOR_LAUNCHER)
    print(f"prm-hf {command}: {message}", file=sys.stderr, flush=True)
    return code
