"""`prm-hf dpo | sft | randomization | sweep | compare …`; `python -m prm_hf …` is the same."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__


EXPERIMENTS = {
    "dpo": "DPO on preferences with flipped labels: PRM against AdamW",
    "sft": "SFT on prompts with wrong completions: PRM against AdamW",
    "randomization": "can a model fit pure noise, and what does PRM change?",
    "sweep": "run `dpo` or `sft` on every GPU of this machine, one process each",
}


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prm-hf", description="Experiments with the PRM optimizer.")
    parser.add_argument("--version", action="version", version=f"prm-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in EXPERIMENTS.items():
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
        help="run folders (of the recipes), folders of any transformers Trainer (trainer_state.json), or "
        "folders that hold such folders",
    )
    # The formats are spelled out, for `--help` is to answer without numpy.
    compare.add_argument(
        "--format", choices=("table", "json", "markdown", "html"), default="table", help="%(default)s"
    )
    compare.add_argument("--verbose", action="store_true", help="list the caveats that apply, too")
    compare.add_argument("--output", metavar="FILE", help="write to this file instead of the standard output")
    return parser


def _run_experiment(name: str, arguments: list[str]) -> int:
    try:
        experiment = importlib.import_module(f"prm_hf.experiments.{name}")
    except ImportError as error:
        print(f"prm-hf {name}: error: {error}", file=sys.stderr)
        return 2
    return experiment.main(arguments) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: of an experiment its own, otherwise 2 if the input is wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in EXPERIMENTS:  # each has a parser of its own, which is slow to load
        return _run_experiment(argv[0], argv[1:])
    arguments = _make_parser().parse_args(argv)

    try:
        from prm_hf.compare import compare_experiments, format_comparison

        text = format_comparison(compare_experiments(arguments.folders), arguments.format, arguments.verbose)
        if arguments.output:
            Path(arguments.output).write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)
    except (ValueError, OSError, ImportError) as error:
        from .runs.text import printable

        print(f"prm-hf {arguments.command}: error: {printable(error)}", file=sys.stderr)
        return 2
    return 0
