"""What `prm-hf suspects` writes and prints once its runs are made: suspects, page, repaired rows."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..metrics.suspects import suspect_metrics
from ..suspects import Suspects
from ..suspects.decisions import read_decisions
from ..suspects.files import SUSPECTS_FILE
from ..suspects.page import write_page
from ..suspects.repair import repair, write_rows


if TYPE_CHECKING:
    from .suspects import SuspectsArguments

PAGE_FILE, REPAIRED_FILE = "suspects.html", "repaired.jsonl"


def report(suspects: Suspects, folder: Path, args: "SuspectsArguments", truth: list[bool] | None, model: str) -> None:
    """Writes all files into the folder and prints what they say.

    Args:
        truth: whether each label is wrong, where that is known.
        model: of the command for the next step.
    """
    suspects.save(folder)
    write_page(folder)
    print()
    n, share = len(suspects.rows), f"{suspects.share:.1%}"
    interval = f"95 % interval {suspects.share_low:.1%} to {suspects.share_high:.1%}"
    print(f"{n} rows, of whose labels {share} are estimated to be wrong ({interval}; {suspects.how}).")
    unjudged = suspects.scores.count(None)
    if unjudged:
        print(f"{unjudged} of them say nothing, for instance as two equal sides, and have the share as probability.")
    if truth is not None and 0 < sum(truth) < n:
        found = suspect_metrics([-rank for rank in suspects.ranks], truth)
        print(
            f"By the column that says which labels are wrong: {sum(truth) / n:.1%} are; AUC of the suspects "
            f"{found['suspects/auc']:.3f}, average precision {found['suspects/average_precision']:.3f}."
        )
    print(f"Suspects, the most suspect first: {folder / SUSPECTS_FILE}")
    print(f"To look through them, and decide: {folder / PAGE_FILE}")
    write_repaired(suspects, folder, args)
    if suspects.kind != "label":
        task = "dpo" if suspects.kind == "preference" else "sft"
        words = ["prm-hf", task, "--model_name_or_path", model, "--dataset_name", str(folder / REPAIRED_FILE)]
        print(f"Next, to train on them: {shlex.join([*words, '--noise_rate', '0', '--methods', args.method])}")


def write_repaired(suspects: Suspects, folder: Path, args: "SuspectsArguments") -> None:
    """Writes `repaired.jsonl`, by the decisions of `args` if there are any."""
    decisions = None if args.decisions is None else read_decisions(args.decisions, len(suspects.rows))
    rows, summary = repair(suspects.rows, suspects.probabilities, args.repair, args.threshold, decisions)
    write_rows(folder / REPAIRED_FILE, rows)
    print(f"Repaired rows: {folder / REPAIRED_FILE}. {summary}")


def decide_again(folder: Path, args: "SuspectsArguments") -> None:
    """Applies decisions to suspects that were found before; ValueError or OSError if either cannot be read."""
    write_repaired(Suspects.load(folder), folder, args)
