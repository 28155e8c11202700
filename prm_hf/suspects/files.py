"""The rows of a dataset, each with the probability that its label is wrong, and the two files that hold them."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import logit
from scipy.stats import rankdata

from .._files import write_whole
from ..noise.columns import LABELS
from ..noise.wrong_labels import estimate_wrong_labels, votes
from ..runs.write import write_json
from .decisions import DECISIONS, FLIP, KEEP, check_decisions


SUSPECTS_FILE, SUMMARY_FILE = "suspects.jsonl", "suspects_summary.json"
OUT_OF_FOLD, IN_SAMPLE = "out of fold", "in sample"
KINDS = ("preference", "completion", "label")
CERTAIN = 1e-12  # the probability that is the score of a label that a person has called right


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
        in_sample_margins: the same of models that were trained on the row; None where there were none.
        folds: the fold that a row was held out in; None where no row was held out.
        share: estimated share of wrong labels.
        share_low: lower end of its 95 % interval.
        share_high: upper end of it.
        how: `"out of fold"` or `"in sample"`, what the probabilities come from.
        kind: one of `KINDS`.
        settings: what the margins were made with.
        groups: a number for each row, the same for rows of one prompt; None where each row is by itself.
        decisions: what was decided by hand, `keep`, `flip` or `drop` by the number of the row.
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
    groups: list[int] | None = None
    decisions: dict[int, str] = field(default_factory=dict)

    def decided(self, decisions: Mapping[int, str]) -> "Suspects":
        """The same rows, judged by their margins and by what was decided by hand, as `judge_rows` does.

        Args:
            decisions: by the number of the row, all that there are: they take the place of earlier ones.
        """
        found = [
            None if not any(margins) else _table(margins) for margins in (self.margins, self.in_sample_margins or [])
        ]
        folds = None if self.folds is None else np.array(self.folds)
        return judge_rows(self.rows, self.kind, *found, self.groups, folds, self.settings, decisions)

    def save(self, folder: Path) -> None:
        """Writes `suspects.jsonl`, the most suspect row first, and `suspects_summary.json`, each whole."""
        folder.mkdir(parents=True, exist_ok=True)
        order = sorted(range(len(self.rows)), key=self.ranks.__getitem__)
        write_whole(folder / SUSPECTS_FILE, (as_line(self._entry(i), default=str) for i in order))
        shares = {"share_wrong": self.share, "share_low": self.share_low, "share_high": self.share_high}
        counts = Counter(self.decisions.values())
        decided = {"decided": {word: counts[word] for word in DECISIONS}} if self.decisions else {}
        about = {"how": self.how, "kind": self.kind, **decided, "settings": self.settings}
        write_json(folder / SUMMARY_FILE, {"rows": len(self.rows), **shares, **about})

    def _entry(self, i: int) -> dict[str, Any]:
        return {
            "row": i,
            "rank": self.ranks[i],
            "probability_wrong": self.probabilities[i],
            "score": self.scores[i],
            **({"decided": self.decisions[i]} if i in self.decisions else {}),
            "margins": self.margins[i],
            "in_sample_margins": None if self.in_sample_margins is None else self.in_sample_margins[i],
            "fold": None if self.folds is None else self.folds[i],
            "group": None if self.groups is None else self.groups[i],
            "data": self.rows[i],
        }

    @classmethod
    def load(cls, folder: Path) -> "Suspects":
        """What [`Suspects.save`] wrote.

        Raises:
            ValueError: a file is not there, or is not what was written.
        """
        try:
            # Not by `splitlines`, for which U+2028 in a text ends a line too
            texts = (folder / SUSPECTS_FILE).read_bytes().split(b"\n")
            lines = sorted((json.loads(text) for text in texts if text), key=lambda line: line["row"])
            summary = json.loads((folder / SUMMARY_FILE).read_text(encoding="utf-8"))

            def column(name: str) -> list:
                return [line[name] for line in lines]

            if column("row") != list(range(summary["rows"])):
                raise KeyError("row")
            groups = [line.get("group") for line in lines]
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
                groups=None if None in groups else groups,
                decisions={line["row"]: line["decided"] for line in lines if "decided" in line},
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


def as_line(value: Any, **how: Any) -> str:
    """A value as a line of a JSON-lines file in UTF-8; `how` are arguments of `json.dumps`."""
    text = json.dumps(value, ensure_ascii=False, **how)
    # Half of a surrogate pair has no bytes in UTF-8
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def judge_rows(
    rows: Sequence[dict[str, Any]],
    kind: str,
    margins: np.ndarray | None,
    in_sample: np.ndarray | None,
    groups: Sequence[Any] | None = None,
    folds: np.ndarray | None = None,
    settings: dict[str, Any] | None = None,
    decisions: Mapping[int, str] | None = None,
) -> Suspects:
    """Estimates from margins which labels are wrong.

    Args:
        rows: the `n` rows as they were read.
        kind: one of `KINDS`.
        margins: of models that were not trained on the row, `(epochs, n)` float64, NaN for a row that says nothing;
            None where there are in-sample ones alone.
        in_sample: of models that were trained on the row, `(epochs, n)`; None where there were none. One of the two
            must be there.
        groups: one entry a row, the same for rows of a prompt. Out of fold, pairs of a prompt that have a completion
            in common are witnesses of each other's labels.
        folds: `(n,)` int, the fold that each row was held out in.
        settings: what the margins were made with.
        decisions: by the number of the row. `keep` says that the label is right, `flip` that it is wrong, and `drop`
            nothing of the label. Of pairs and of two classes, out of fold, the share of wrong labels and the
            probabilities of the other rows follow them.

    Raises:
        ValueError: a margin is not finite, or the margins tell no row from another.
    """
    available = [values for values in (margins, in_sample) if values is not None]
    judged = ~np.isnan(available[0]).all(0)
    for values in available:
        if not np.isfinite(values[:, judged]).all():
            raise ValueError("A margin is not finite: a model has diverged. Lower the learning rate.")
    n, decided, is_antisymmetric = len(rows), check_decisions(decisions, len(rows)), has_two_labels(rows, kind)
    places: dict[str, int] = {}
    codes = None if groups is None else np.array([places.setdefault(str(x), len(places)) for x in groups])
    known = np.array([{KEEP: 0.0, FLIP: 1.0}.get(decided.get(i), np.nan) for i in range(n)])
    can_learn = margins is not None and is_antisymmetric
    has_votes = margins is not None and kind == "preference" and codes is not None
    found = estimate_wrong_labels(
        None if margins is None else margins[:, judged],
        in_sample=None if in_sample is None else in_sample[:, judged],
        votes=_votes(rows, codes)[judged] if has_votes else None,
        groups=None if codes is None else codes[judged],
        checked=known[judged] if can_learn and decided else None,
        antisymmetric=is_antisymmetric,
    )
    probabilities, scores = np.full(n, found.share), np.full(n, -np.inf)
    probabilities[judged], scores[judged] = found.probabilities, found.scores
    is_known = ~np.isnan(known)
    probabilities[is_known] = known[is_known]
    scores[is_known & judged] = logit(np.clip(known, CERTAIN, 1 - CERTAIN))[is_known & judged]

    def by_row(values: np.ndarray) -> list[list[float]]:
        return [values[:, i].tolist() if judged[i] else [] for i in range(n)]

    return Suspects(
        rows=list(rows),
        probabilities=probabilities.tolist(),
        scores=[float(score) if is_judged else None for score, is_judged in zip(scores, judged, strict=True)],
        ranks=rankdata(-scores, method="ordinal").tolist(),
        margins=[[]] * n if margins is None else by_row(margins),
        in_sample_margins=None if in_sample is None else by_row(in_sample),
        folds=None if folds is None else folds.tolist(),
        share=float(found.share),
        share_low=float(found.share_low),
        share_high=float(found.share_high),
        how=IN_SAMPLE if margins is None else OUT_OF_FOLD,
        kind=kind,
        settings=settings or {},
        groups=None if codes is None else codes.tolist(),
        decisions=decided,
    )


def has_two_labels(rows: Sequence[Mapping[str, Any]], kind: str) -> bool:
    """Whether a row's label is one of two, so that the other one has the margin of the opposite sign."""
    column = next((name for name in LABELS if rows and name in rows[0]), None)
    return kind == "preference" or (kind == "label" and column is not None and len({row[column] for row in rows}) == 2)


def _table(margins: Sequence[Sequence[float]]) -> np.ndarray | None:
    """Margins of each row as `(epochs, n)` float64, NaN of a row that says nothing; None without margins."""
    epochs = max(map(len, margins), default=0)
    if not epochs:
        return None
    return np.array([values or [np.nan] * epochs for values in margins]).T


def _votes(rows: Sequence[dict[str, Any]], codes: np.ndarray) -> np.ndarray:
    """What the other pairs of its prompt say about each label, `(n,)`; a group may have several prompts."""

    def texts(side: str) -> list[str]:
        return [json.dumps([row.get("prompt"), row[side]], sort_keys=True, default=str) for row in rows]

    return votes(codes.tolist(), texts("chosen"), texts("rejected"))
