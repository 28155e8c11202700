"""What `prm-hf suspects` writes and prints once its runs are made: suspects, page, repaired rows."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ..metrics.suspects import suspect_metrics
from ..suspects import Suspects
from ..suspects.decisions import read_decisions
from ..suspects.files import IN_SAMPLE, SUSPECTS_FILE, as_line
from ..suspects.page import PAGE_FILE, write_page
from ..suspects.repair import repair, write_rows


if TYPE_CHECKING:
    from .suspects import SuspectsArguments

REPAIRED_FILE = "repaired.jsonl"


def report(suspects: Suspects, folder: Path, args: "SuspectsArguments", truth: list[bool] | None, model: str) -> None:
    """Writes all files into the folder and prints what they say. What was decided there before stays decided.

    Args:
        truth: whether each label is wrong, where that is known.
        model: of the command for the next step.
    """
    suspects = suspects.decided(decisions_before(suspects, folder))
    print()
    if truth is not None and 0 < sum(truth) < len(truth):
        found = suspect_metrics([-rank for rank in suspects.ranks], truth)
        print(
            f"By the column that says which labels are wrong: {sum(truth) / len(truth):.1%} are; AUC of the suspects "
            f"{found['suspects/auc']:.3f}, average precision {found['suspects/average_precision']:.3f}."
        )
    write(suspects, folder, args)
    if suspects.kind != "label":
        task = "dpo" if suspects.kind == "preference" else "sft"
        words = ["prm-hf", task, "--model_name_or_path", model, "--dataset_name", str(folder / REPAIRED_FILE)]
        print(f"Next, to train on them: {shlex.join([*words, '--noise_rate', '0', '--methods', args.method])}")


def write(suspects: Suspects, folder: Path, args: "SuspectsArguments") -> None:
    """Writes suspects, page and repaired rows, and says what they are and where."""
    rows, summary = repair(suspects.rows, suspects.probabilities, args.repair, args.threshold, suspects.decisions)
    suspects.save(folder)
    write_page(folder)
    write_rows(folder / REPAIRED_FILE, rows)
    n, n_decided, share = len(suspects.rows), len(suspects.decisions), f"{suspects.share:.1%}"
    interval = f"95 % interval {suspects.share_low:.1%} to {suspects.share_high:.1%}"
    where = f"{suspects.how}; {n_decided} decided by hand" if n_decided else suspects.how
    print(f"{n} rows, of whose labels {share} are estimated to be wrong ({interval}; {where}).")
    if suspects.how == IN_SAMPLE:
        print("In sample the ranks are of use; the probabilities and the share deserve less trust than out of fold.")
    unjudged = suspects.scores.count(None)
    if unjudged:
        print(f"{unjudged} of them say nothing, for instance as two equal sides, and have the share as probability.")
    print(f"Suspects, the most suspect first: {folder / SUSPECTS_FILE}")
    print(f"To look through them, and decide: {folder / PAGE_FILE}")
    print(f"Repaired rows: {folder / REPAIRED_FILE}. {summary}")


def decisions_before(suspects: Suspects, folder: Path) -> dict[int, str]:
    """What was decided on these rows before the command was given again; of other rows, or none, nothing."""
    try:
        before = Suspects.load(folder)
    except ValueError:
        return {}
    is_same = all(as_line(x, default=str) == as_line(y) for x, y in zip(suspects.rows, before.rows, strict=False))
    is_same = is_same and before.kind == suspects.kind and len(before.rows) == len(suspects.rows)
    return before.decisions if is_same else {}


def decide_again(folder: Path, args: "SuspectsArguments") -> None:
    """Applies decisions to suspects that were found before; ValueError or OSError if either cannot be read."""
    suspects = Suspects.load(folder)
    write(suspects.decided(read_decisions(args.decisions, len(suspects.rows))), folder, args)
