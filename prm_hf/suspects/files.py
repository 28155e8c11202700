"""The rows of a dataset, each with the probability that its label is wrong, and the two files that hold them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..noise.wrong_labels import estimate_wrong_labels, votes
from ..runs.write import write_json


SUSPECTS_FILE, SUMMARY_FILE = "suspects.jsonl", "suspects_summary.json"
OUT_OF_FOLD, IN_SAMPLE = "out of fold", "in sample"
KINDS = ("preference", "completion", "label")


@dataclass(frozen=True)
class Suspects:
    """The rows of a dataset and how suspect their labels are. All lists have one entry a row, in the dataset's order.

    Attributes:
        rows: the rows as they were read.
        probabilities: that the label is wrong.
        scores: larger is more suspect; None of a row that says nothing, as a pair of two equal sides, which has the
            `share` as its probability.
        ranks: 1 is the most suspect row. Rows without a score come last.
        margins: by how much models that were not trained on the row prefer its label, one number an epoch.
        in_sample_margins: the same of the model that was trained on all rows; None where there was none.
        folds: the fold that a row was held out in; None where no row was held out.
        share, share_low, share_high: estimated share of wrong labels, and its 95 % interval.
        how: `"out of fold"` or `"in sample"`, what the probabilities come from.
        kind: one of `KINDS`.
        settings: what the margins were made with.
    """

    rows: list[dict[str, Any]]
    probabilities: list[float]
    scores: list[float | None]
    ranks: list[int]
    margins: list[list[float]]
    in_sample_margins: list[list[float]] | None
    folds: list[int] | None
    share: float
    share_low: float
    share_high: float
    how: str
    kind: str
    settings: dict[str, Any] = field(default_factory=dict)

    def save(self, folder: Path) -> None:
        """Writes `suspects.jsonl`, the most suspect row first, and `suspects_summary.json`."""
        folder.mkdir(parents=True, exist_ok=True)
        part = (folder / SUSPECTS_FILE).with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            for i in sorted(range(len(self.rows)), key=self.ranks.__getitem__):
                line = {
                    "row": i,
                    "rank": self.ranks[i],
                    "probability_wrong": self.probabilities[i],
                    "score": self.scores[i],
                    "margins": self.margins[i],
                    "in_sample_margins": None if self.in_sample_margins is None else self.in_sample_margins[i],
                    "fold": None if self.folds is None else self.folds[i],
                    "data": self.rows[i],
                }
                file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        part.replace(folder / SUSPECTS_FILE)
        shares = {"share_wrong": self.share, "share_low": self.share_low, "share_high": self.share_high}
        about = {"how": self.how, "kind": self.kind, "settings": self.settings}
        write_json(folder / SUMMARY_FILE, {"rows": len(self.rows), **shares, **about})

    @classmethod
    def load(cls, folder: Path) -> "Suspects":
        """What [`Suspects.save`] wrote.

        Raises:
            ValueError: a file is not there, or is not what was written.
        """
        try:
            text = (folder / SUSPECTS_FILE).read_text(encoding="utf-8")
            lines = sorted(map(json.loads, text.splitlines()), key=lambda line: line["row"])
            summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))

            def column(name: str) -> list:
                return [line[name] for line in lines]

            if column("row") != list(range(summary["rows"])):
                raise KeyError("row")
            return cls(
                rows=column("data"),
                probabilities=column("probability_wrong"),
                scores=column("score"),
                ranks=column("rank"),
                margins=column("margins"),
                in_sample_margins=None if None in column("in_sample_margins") else column("in_sample_margins"),
                folds=None if None in column("fold") else column("fold"),
                share=summary["share_wrong"],
                **{name: summary[name] for name in ("share_low", "share_high", "how", "kind", "settings")},
            )
        except FileNotFoundError as error:
            raise ValueError(
                f"{str(folder)!r} has no {Path(error.filename).name}: name the folder that `prm-hf suspects` wrote."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{SUSPECTS_FILE} and {SUMMARY_FILE} in {str(folder)!r} are not whole, or of different runs "
                f"({type(error).__name__}: {error}): run `prm-hf suspects` again."
            ) from error


def judge_rows(
    rows: Sequence[dict[str, Any]],
    kind: str,
    margins: np.ndarray | None,
    in_sample: np.ndarray | None,
    groups: Sequence[Any] | None = None,
    folds: np.ndarray | None = None,
    is_antisymmetric: bool = True,
    settings: dict[str, Any] | None = None,
) -> Suspects:
    """Estimates from margins which labels are wrong.

    Args:
        rows: the `n` rows as they were read.
        kind: one of `KINDS`.
        margins: of models that were not trained on the row, `(epochs, n)` float64, NaN for a row that says nothing;
            None where there are in-sample ones alone.
        in_sample: of the model that was trained on all rows, `(epochs, n)`; None where there was none. One of the two
            must be there.
        groups: one entry a row, the same for rows of a prompt. Out of fold, pairs of a prompt that have a completion
            in common are witnesses of each other's labels.
        folds: `(n,)` int, the fold that each row was held out in.
        is_antisymmetric: whether the other label has the margin of the opposite sign, as of pairs and of two classes.
        settings: what the margins were made with.

    Raises:
        ValueError: a margin is not finite, or the margins tell no row from another.
    """
    known = [values for values in (margins, in_sample) if values is not None]
    judged = ~np.isnan(known[0]).all(0)
    for values in known:
        if not np.isfinite(values[:, judged]).all():
            raise ValueError("A margin is not finite: a model has diverged. Lower the learning rate.")
    places: dict[str, int] = {}
    codes = None if groups is None else np.array([places.setdefault(str(x), len(places)) for x in groups])
    has_votes = margins is not None and kind == "preference" and codes is not None
    found = estimate_wrong_labels(
        None if margins is None else margins[:, judged],
        in_sample=None if in_sample is None else in_sample[:, judged],
        votes=_votes(rows, codes)[judged] if has_votes else None,
        groups=None if codes is None else codes[judged],
        antisymmetric=is_antisymmetric,
    )
    n, judged_rows = len(rows), np.flatnonzero(judged)
    probabilities, scores, ranks = [found.share] * n, [None] * n, [0] * n
    for i, place in enumerate(judged_rows):
        probabilities[place], scores[place] = float(found.probabilities[i]), float(found.scores[i])
        ranks[place] = int(found.ranks[i])
    for rank, place in enumerate(np.flatnonzero(~judged), start=len(judged_rows) + 1):
        ranks[place] = rank

    def by_row(values: np.ndarray) -> list[list[float]]:
        return [values[:, i].tolist() if judged[i] else [] for i in range(n)]

    return Suspects(
        rows=list(rows),
        probabilities=probabilities,
        scores=scores,
        ranks=ranks,
        margins=[[]] * n if margins is None else by_row(margins),
        in_sample_margins=None if in_sample is None else by_row(in_sample),
        folds=None if folds is None else folds.tolist(),
        share=float(found.share),
        share_low=float(found.share_low),
        share_high=float(found.share_high),
        how=IN_SAMPLE if margins is None else OUT_OF_FOLD,
        kind=kind,
        settings=settings or {},
    )


def _votes(rows: Sequence[dict[str, Any]], codes: np.ndarray) -> np.ndarray:
    """What the other pairs of its prompt say about each label, `(n,)`; a group may have several prompts."""

    def texts(side: str) -> list[str]:
        return [json.dumps([row.get("prompt"), row[side]], sort_keys=True, default=str) for row in rows]

    return votes(codes.tolist(), texts("chosen"), texts("rejected"))
