"""`prm-hf compare …`: the comparison of finished runs, as a table, markdown, JSON or an HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="prm-hf", description="Tools around the PRM optimizer.")
    commands = parser.add_subparsers(dest="command", required=True)
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
    compare.add_argument("--output", metavar="FILE", help="write to this file instead of the standard output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 if the input is wrong."""
    arguments = _make_parser().parse_args(argv)

    from prm_hf.compare import compare_runs, format_comparison

    try:
        text = format_comparison(compare_runs(arguments.folders), arguments.format)
        if arguments.output:
            Path(arguments.output).write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)
    except (ValueError, OSError, ImportError) as error:
        print(f"prm-hf {arguments.command}: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
