"""What a comparison shows and what it does not, in words, from its numbers alone.

No method is called better where the 95 % interval of the difference holds 0, or where there is no interval.
"""

from __future__ import annotations

from collections import defaultdict

from .comparison import (
    BASELINE,
    BEST_LR,
    CONTROLLED,
    EQUAL_KL,
    EQUAL_KL_MEAN,
    FRONTIER,
    PRM,
    SAME_LR,
    Comparison,
    Contrast,
    Row,
    baseline_of,
    best,
    display_name,
    format_rate,
)
from .runs import KL, finite


_VERDICTS = {
    "higher": "more accurate",
    "lower": "less accurate",
    "within noise": "within noise",
    "no interval": "no interval",
}


def format_interval(contrast: Contrast) -> str:
    """`+0.010 [-0.008, +0.028]`, or the difference alone, or `unknown`."""
    interval = contrast.interval
    if interval is None:
        return "unknown"
    if not interval.known:
        return f"{interval.mean:+.3f}"
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def verdict(contrast: Contrast) -> str:
    """`more accurate`, `less accurate`, `within noise`, `no interval`, of the left side; or why it is unknown."""
    return _VERDICTS[contrast.interval.verdict] if contrast.interval else contrast.missing


def write_statements(comparison: Comparison) -> list[str]:
    """The sentence that sums up, then one statement for each thing that a reader must know, in this order: the
    contrasts, what limits them, what is missing."""
    if best(comparison.rows) is None:
        return [f"No run has {comparison.measures.accuracy}: there is nothing to compare.", *_missing(comparison)]
    return [_headline(comparison), *_contrast_words(comparison), *_limits(comparison), *_missing(comparison)]


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _find(comparison: Comparison, kind: str, left: Row) -> Contrast | None:
    """The contrast of `left` of that kind: with AdamW's rows where both AdamW and others qualify."""
    found = [c for c in comparison.contrasts if c.kind == kind and c.left is left]
    return next((c for c in found if c.right is None or c.right.group == BASELINE), found[0] if found else None)


def _headline(comparison: Comparison) -> str:
    prm = [row for rows in comparison.methods(PRM).values() for row in rows]
    lead, baseline = best(prm), comparison.baseline
    if lead is None or best(baseline) is None:
        return _headline_without(comparison, "PRM" if lead is None else "AdamW")
    name = display_name(baseline[0].method)
    against_best, at_kl = _find(comparison, BEST_LR, lead), _find(comparison, EQUAL_KL, lead)
    constant = [c for c in comparison.contrasts if c.left is lead and c.right and c.right.method == "constant_q"]
    same_step = constant[0] if constant else None
    tries = _count(len(baseline), "learning rate")
    parts = [f"{format_interval(against_best)} against {name} at the best of its {tries} ({verdict(against_best)})"]
    if at_kl.interval is not None:
        parts.append(f"{format_interval(at_kl)} against {name} at the same KL ({verdict(at_kl)})")
    else:
        parts.append(f"unknown against {name} at the same KL ({at_kl.missing})")
    if same_step is not None:
        its = display_name(baseline_of(lead.method))
        parts.append(f"{format_interval(same_step)} against {its} with PRM's mean step ({verdict(same_step)})")
    picked = f", the best of {len(prm)} PRM settings," if len(prm) > 1 else ""
    return (
        f"{lead.label}{picked} has {lead.accuracy:.3f} held-out accuracy: {', '.join(parts[:-1])} and {parts[-1]}; "
        f"{_conclusion(comparison, lead, against_best, at_kl, same_step)}."
    )


def _headline_without(comparison: Comparison, absent: str) -> str:
    top = best(comparison.rows)
    words = f"{top.label} has {top.accuracy:.3f} held-out accuracy"
    if len(comparison.rows) > 1:
        words += f", the highest of {len(comparison.rows)} settings"
    paired = [c for c in comparison.contrasts if c.kind == BEST_LR and top in (c.left, c.right)]
    words += "".join(f"; {c.left.label} against {c.against}: {format_interval(c)} ({verdict(c)})" for c in paired[:1])
    return f"{words}; without a run of {absent} among them, this table cannot say what PRM's mask does."


def _conclusion(
    comparison: Comparison, lead: Row, against_best: Contrast, at_kl: Contrast, same_step: Contrast | None
) -> str:
    name = display_name(comparison.baseline[0].method)
    verdicts = {verdict(contrast) for contrast in (against_best, at_kl)}
    seeds = against_best.interval.seeds if against_best.interval else 0
    only = " for this one seed; the spread over seeds is not measured" if seeds == 1 else ""
    if verdicts == {"more accurate"}:
        settings = sum(len(rows) for rows in comparison.methods(PRM).values())
        if settings > len(comparison.baseline):
            return (
                f"so PRM is ahead here, but it had {settings} tries and {name} {len(comparison.baseline)}, so the "
                f"table does not show that it is ahead of an equally tuned {name}{only}"
            )
        if same_step is None or verdict(same_step) != "more accurate":
            why = {None: "constant q was not run for it", "within noise": "constant q does as well within noise"}.get(
                same_step and verdict(same_step), "constant q is not known to do worse"
            )
            return (
                f"so PRM is ahead of {name} here, but {why}, so the table does not show that the mask, rather than "
                f"its mean step size, does it{only}"
            )
        rival = next(
            (c for c in comparison.contrasts if c.kind == FRONTIER and c.right and c.left.method == lead.method), None
        )
        if rival is not None and verdict(rival) != "more accurate":
            return (
                f"so PRM is ahead of {name} here by more than a smaller step explains, but "
                f"{display_name(rival.right.method)} is not known to do worse at equal KL{only}"
            )
        return (
            f"so PRM is ahead here by more than a smaller step explains, on {comparison.measures.examples} that also "
            f"chose its learning rate, and on one task: the table does not show that it holds elsewhere{only}"
        )
    if "less accurate" in verdicts and "more accurate" not in verdicts:
        return f"so PRM loses to {name} here{only}"
    if {"less accurate", "more accurate"} <= verdicts:
        return f"so the two comparisons disagree, and the table does not show that PRM is better than {name}{only}"
    if "more accurate" in verdicts:
        return f"so the table does not show that PRM is more accurate than a well-tuned {name}{only}"
    if "within noise" in verdicts:
        tail = " (one seed; the spread over seeds is not measured)" if seeds == 1 else ""
        return f"so the table shows neither that PRM is more accurate than {name} nor that the two are equal{tail}"
    return "so the table shows no difference: without several seeds or margins.json there is no interval"


def _contrast_words(comparison: Comparison) -> list[str]:
    """A statement for each method that is judged against AdamW, one for the same learning rate, one for the others."""
    words, same_rate = [], []
    by_method: dict[str, list[Contrast]] = defaultdict(list)
    for contrast in comparison.contrasts:
        by_method[contrast.left.method].append(contrast)
    for method, contrasts in by_method.items():
        lead = best(comparison.methods()[method])
        contrasts = [c for c in contrasts if c.kind != FRONTIER]
        parts = []
        for contrast in contrasts:
            numbers = f"{format_interval(contrast)} ({verdict(contrast)}) against {contrast.against}"
            if contrast.kind == SAME_LR:
                same_rate.append(
                    f"{contrast.left.label} {format_interval(contrast)} ({verdict(contrast)}{_drift_ratio(contrast)})"
                )
            elif contrast.kind == BEST_LR and contrast.right.method not in comparison.rivals:
                parts.append(numbers + _grid_words(comparison, contrast))
            elif contrast.kind == EQUAL_KL and contrast.left is lead:
                parts.append(numbers + (f", for {contrast.note}" if contrast.missing else ""))
            elif contrast.kind == EQUAL_KL_MEAN:
                parts.append(f"{numbers}, with no rate picked")
            elif contrast.kind == CONTROLLED:
                where = "" if contrast.left is lead else f"at {format_rate(contrast.left.learning_rate)} "
                parts.append(where + numbers)
        if parts:
            words.append(f"{lead.label}: {'; '.join(parts)}.")
    if same_rate:
        name = display_name(comparison.baseline[0].method)
        words.insert(
            0,
            f"Against {name} at the same learning rate: {'; '.join(same_rate)}. "
            "This proves nothing about the mask: q < 1 shrinks the step, and so would a smaller learning rate.",
        )
    words += _frontier_words(comparison)
    names = comparison.rivals
    others = [c for c in comparison.contrasts if c.kind == BEST_LR and c.right.method in names]
    if others:
        rivals = [f"{c.right.label} {format_interval(c)} ({verdict(c)}){_grid_words(comparison, c)}" for c in others]
        words.append(f"{others[0].left.label} against the best of other methods: {'; '.join(rivals)}.")
    return words


def _frontier_words(comparison: Comparison) -> list[str]:
    areas = [c for c in comparison.contrasts if c.kind == FRONTIER]
    if not areas:
        return []
    parts = []
    for c in areas:
        p = f", Holm's p {c.p_holm:.2g}" if finite(c.p_holm) else ""
        parts.append(f"{c.left.name} minus {c.against}: {format_interval(c)} ({verdict(c)}{p})")
    what = "The frontier's area, the accuracy averaged over log KL where both curves run"
    return [f"{what}, so that neither a learning rate nor a drift is picked: {'; '.join(parts)}."]


def _drift_ratio(contrast: Contrast) -> str:
    left, right = contrast.left.mean(KL)[0], contrast.right.mean(KL)[0]
    if not (finite(left) and finite(right) and left > 0 and right > 0):
        return ""
    ratio = right / left
    return f", KL {ratio:.1f} times smaller" if ratio >= 1 else f", KL {1 / ratio:.1f} times larger"


def _grid_words(comparison: Comparison, contrast: Contrast) -> str:
    left, right = (len(comparison.methods()[row.method]) for row in (contrast.left, contrast.right))
    if left == right:
        return f", each the best of {left}" if left > 1 else ""
    smaller = contrast.right if right < left else contrast.left
    return f", the best of {left} against the best of {right}, which puts {smaller.name} at a disadvantage"


def _limits(comparison: Comparison) -> list[str]:
    words = []
    prm, baseline = comparison.methods(PRM), comparison.baseline
    settings = sum(map(len, prm.values()))
    if prm and baseline and settings > len(baseline):
        words.append(
            f"The baseline had the smaller grid: {settings} PRM settings ({_count(len(prm), 'method')}) against "
            f"{_count(len(baseline), 'learning rate')} of {display_name(baseline[0].method)}. The best of more tries "
            "looks better by chance."
        )
    edges = [edge for rows in (baseline, *prm.values()) if (edge := _edge(rows))]
    if edges:
        words.append(f"At the edge of its grid, so that its true best may lie outside: {'; '.join(edges)}.")
    if any(len(rows) > 1 for rows in comparison.methods().values()):
        words.append(
            f"Each method's best learning rate was picked on the same {comparison.measures.examples} that its "
            "accuracy is given on, so every best is optimistic, and the intervals do not count the picking."
        )
    if any(c.kind in (EQUAL_KL, EQUAL_KL_MEAN) and c.interval for c in comparison.contrasts):
        words.append(
            f"The same KL: {display_name(baseline[0].method)}'s accuracy on the straight line in log KL between its "
            "two neighbouring runs of the same seed (constant q, AdamW at a small rate, counts among them). Where its "
            "curve bulges up, that line lies too low and flatters the other method; rates in between would tell."
        )
    words.append(_seed_words(comparison))
    known = [c for c in comparison.contrasts if c.interval and c.interval.known]
    if len(known) > 1:
        clear = [c for c in known if c.interval.verdict != "within noise"]
        kept = [c for c in clear if c.p_holm < 0.05]
        words.append(
            f"There are {len(known)} intervals of 95 %, none corrected for their number: if nothing differed, about "
            f"{0.05 * len(known):.1f} of them would miss 0 by chance. {len(clear)} do, and {len(kept)} still after "
            "Holm's correction for all of them."
        )
    return words


def _edge(rows: list[Row]) -> str:
    """Says that the best row of a method has the smallest or largest learning rate tried; else empty."""
    rates = [row.learning_rate for row in rows if row.learning_rate is not None and finite(row.accuracy)]
    top = best(rows)
    if top is None or len(rates) < 2 or min(rates) < (top.learning_rate or 0) < max(rates):
        return ""
    side = "smallest" if top.learning_rate == min(rates) else "largest"
    return f"{top.name} ({side}, {format_rate(top.learning_rate)})"


def _seed_words(comparison: Comparison) -> str:
    counts = sorted({len(row.runs) for row in comparison.rows})
    known, examples = any(run.heldout is not None for run in comparison.runs), comparison.measures.examples
    if counts == [1]:
        return "One seed: the spread over seeds is not measured" + (
            f". The intervals count the {examples} alone and hold for this seed; another may well lie outside them."
            if known
            else f", and without margins.json neither is that over {examples}: there are no intervals."
        )
    words = f"{counts[0]} seeds" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} seeds"
    words += " a row; the intervals resample " + (f"seeds and {examples}." if known else "seeds alone.")
    if counts[0] == 1:
        words += " A difference over one shared seed holds for that seed alone."
    if counts[-1] <= 3:
        words += (
            " With two or three seeds an interval covers less than it says (about 80 and 90 % instead of 95 %) where "
            "the seed matters most."
        )
    return words


def _missing(comparison: Comparison) -> list[str]:
    words = []
    by_note = defaultdict(list)
    for run in comparison.runs:
        for note in run.notes:
            by_note[note].append(run.name)
    words += [f"{', '.join(names)}: {note}." for note, names in by_note.items()]
    wide = [c for c in comparison.contrasts if c.note and c.interval]
    words += [f"{c.left.label} against {c.against}: {c.note}." for c in wide]
    if any(run.source == "trainer" for run in comparison.runs):
        words.append(
            "For runs read from trainer_state.json it is not known whether the labels of the evaluation split are "
            "clean, nor whether data and model are the same."
        )
    for method, names in _unequal_settings(comparison).items():
        words.append(
            f"The runs of {display_name(method)} differ not only in learning rate and seed, but also in "
            f"{', '.join(names)}: its rows are not one experiment."
        )
    without = [row.label for row in comparison.rows if not finite(row.mean(KL)[0])]
    if without and len(without) < len(comparison.rows):
        words.append(f"Not on the frontier, for lack of {KL}: {', '.join(without)}.")
    if comparison.unfinished:
        names = ", ".join(run.name for run in comparison.unfinished)
        words.append(f"Left out, for they are unfinished (no metrics.json): {names}.")
    return words


def _unequal_settings(comparison: Comparison) -> dict[str, list[str]]:
    """Settings that vary within a method and should not: leftovers of an earlier experiment in the same folder."""
    expected = ("seed", "learning_rate", "constant_q", "adamw_matched", "shuffled_q", "fixed_q", "name", "dir")
    found = {}
    for method, rows in comparison.methods().items():
        settings = [run.settings for row in rows for run in row.runs if run.settings]
        keys = sorted({key for each in settings for key in each if not any(word in key for word in expected)})
        varying = [key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)]
        if varying:
            found[method] = varying
    return found
