"""The report on steps to a threshold: tables, curves of the metric, and the published numbers beside ours."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .._files import write_whole
from ..runs.methods import find_method
from . import page, plots
from .cells import p_text
from .findings import Case, say
from .report import align, wrap
from .rows import format_rate
from .survival import Median, Ratio, Row, Survival


if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTE = (
    "Median steps: Kaplan and Meier's, with the 95 % interval in brackets. A run that does not reach the threshold "
    "takes longer than it had (censored); `>` is where fewer than half reach it, `?` an end that the runs do not "
    "bound. A method's setting is the one with the fewest median steps in its grid; all grids have one size, and all "
    "settings the same seeds. Ratio: of the medians, to AdamW's at its best setting, with a bootstrap over seeds. p: "
    "log-rank test against that setting, adjusted for the number of methods (Holm); a difference is shown where it is "
    "below 0.05. Seconds are of training, without "
    "evaluations."
)

EXTREMES_NOTE = (
    "Each method at the setting, of all in its grid, whose metric is best on the way; means over seeds, at that "
    "evaluation → at the end of the run."
)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def median_text(median: Median, end: float) -> str:
    """`5,950 [5,100, 7,000]`; `>8,000` where it is longer than the runs, `end`, were."""
    if math.isinf(median.value):
        return f">{_count(end)}"
    low, high = ("?" if not math.isfinite(x) else _count(x) for x in (median.low, median.high))
    return f"{_count(median.value)} [{low}, {high}]"


def ratio_text(ratio: Ratio) -> str:
    """`0.20 [0.15, 0.31]`; `<0.20` and `>3.1` where one of the two medians is not reached, `?` where both are not.

    An end is `?` too where it is no more than 0 or infinity, which every ratio lies between.
    """
    if ratio.least == ratio.most:
        text = _factor(ratio.most)
    elif math.isinf(ratio.most):
        text = f">{_factor(ratio.least)}" if ratio.least else "?"
    else:
        text = f"<{_factor(ratio.most)}"
    if math.isnan(ratio.low):
        return text
    low = _factor(ratio.low) if ratio.low or not ratio.most else "?"
    return f"{text} [{low}, {_factor(ratio.high) if math.isfinite(ratio.high) else '?'}]"


def _factor(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def _label(row: Row) -> str:
    return find_method(row.method).label


def best_rows(survival: Survival) -> list[Row]:
    """The best setting of each method."""
    return [survival.best_of({method}) for method in survival.methods]


def best_table(survival: Survival, published: Mapping[str, float]) -> tuple[list[str], list[list[str]]]:
    """The best setting of each method, then what was published."""
    heads = ["method", "lr", "weight decay", "there", "median steps", "seconds", "steps / AdamW", "p"]
    contrasts, body = {c.row: c for c in survival.contrasts}, []
    for row in best_rows(survival):
        contrast = contrasts.get(row)
        seconds = "-" if row.seconds is None else median_text(row.seconds.median(), row.seconds.end).partition(" ")[0]
        versus = (
            [ratio_text(contrast.ratio), p_text(contrast.p_holm)]
            if contrast
            else ["1" if survival.baseline is row else "-", "-"]
        )
        body.append([_label(row), *setting_cells(row), seconds, *versus])
    for name, steps in published.items():
        ratio = f"{steps / published['AdamW']:.2f}" if "AdamW" in published and name != "AdamW" else "-"
        body.append([f"{name}, published", "", "", "", _count(steps), "", ratio, ""])
    return heads, body


def setting_cells(row: Row) -> list[str]:
    """Learning rate, weight decay, runs that reach the threshold, and their median steps."""
    reached = f"{int(row.steps.reached.sum())}/{len(row.runs)}"
    text = median_text(row.median, row.steps.end)
    return [format_rate(row.learning_rate), f"{row.weight_decay:.3g}", reached, text]


def extremes(row: Row, metric: str, larger_is_better: bool, names: Iterable[str]) -> list[float]:
    """Means over seeds: the metric at its best on the way and `names` there, then all of them at the end."""
    found = []
    for run in row.runs:
        steps, values = run.series(metric)
        best = int(np.argmax(values if larger_is_better else -values))
        others = [dict(zip(*run.series(name), strict=True)) for name in names]
        at = [[values[i], *(other.get(steps[i], math.nan) for other in others)] for i in (best, -1)]
        found.append([*at[0], *at[1]])
    return np.mean(found, axis=0).tolist()


def extremes_table(survival: Survival, curves: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """Each method at the setting with the best metric on the way, in the mean over seeds."""
    body, sign = [], -1 if survival.threshold.larger_is_better else 1
    for method in survival.methods:
        found = [(_extremes_of(survival, row, curves), row) for row in survival.rows if row.method == method]
        known = [(values, row) for values, row in found if values]
        if known:
            values, row = min(known, key=lambda pair: sign * pair[0][0])
            body.append([_label(row), *setting_cells(row)[:2], *_extremes_cells(values)])
    return ["method", "lr", "weight decay", survival.threshold.label, *curves.values()], body


def _extremes_of(survival: Survival, row: Row, curves: Mapping[str, str]) -> list[float]:
    """The [`extremes`] of a row; empty where a run has diverged."""
    if any(run in survival.diverged for run in row.runs):
        return []
    return extremes(row, survival.threshold.metric, survival.threshold.larger_is_better, curves)


def _extremes_cells(values: list[float]) -> list[str]:
    half = len(values) // 2
    return [f"{there:.3f} → {end:.3f}" for there, end in zip(values[:half], values[half:], strict=True)]


def all_table(survival: Survival, curves: Mapping[str, str]) -> tuple[list[str], list[list[str]]]:
    """All settings of all methods."""
    heads, body = ["method", "lr", "weight decay", "there", "median steps"], []
    for row in survival.rows:
        values = _extremes_of(survival, row, curves)
        cells = _extremes_cells(values) if values else ["-"] * (1 + len(curves))
        body.append([_label(row), *setting_cells(row), *cells])
    return [*heads, survival.threshold.label, *curves.values()], body


# ---- Statements ----


def _answers(survival: Survival) -> list[str]:
    """The log-rank test decides, and says who is ahead; the interval of the ratio says by how much, if it can."""
    found = []
    for contrast in survival.contrasts:
        label, ratio = _label(contrast.row), contrast.ratio
        p, ratio_words = f"p {p_text(contrast.p_holm)}", f"{ratio_text(ratio)} of AdamW's steps"
        has_one = not (ratio.high < 1 or ratio.low > 1)
        if math.isnan(contrast.p_holm):
            found.append(f"neither {label} nor AdamW has a run that reaches the threshold")
        elif contrast.p_holm >= 0.05:
            more = "" if has_one else ", whose interval is not adjusted for the number of methods"
            found.append(f"no difference between {label} and AdamW is shown ({p}; {ratio_words}{more})")
        else:
            more = "; the seeds do not bound by how much" if has_one else ""
            found.append(
                f"{label} is {'faster' if contrast.is_faster else 'slower'} than AdamW ({p}; {ratio_words}{more})"
            )
    return found


def _ends(survival: Survival) -> list[str]:
    ends = {_label(row): survival.at_end(row) for row in best_rows(survival)}
    return [f"{label} ({' and '.join(at)})" for label, at in ends.items() if at]


def _settings_differ(survival: Survival) -> str:
    sizes = {len(row.runs) for row in survival.rows}
    return f"{min(sizes)} to {max(sizes)}" if len(sizes) > 1 else ""


CASES = (
    Case("answers", _answers, "{it}."),
    Case("no_baseline", lambda s: s.baseline is None, "There is no AdamW among the methods to compare with."),
    Case(
        "at_end",
        _ends,
        "The best setting lies at an end of its grid, so that a wider grid may have a better one: {it}.",
    ),
    Case(
        "seeds",
        _settings_differ,
        "Settings have {it} seeds; one is chosen among those with the most.",
    ),
    Case(
        "few_seeds",
        lambda s: max(len(row.runs) for row in s.rows) < 5 and str(max(len(row.runs) for row in s.rows)),
        "Seeds: {it}. With fewer than five a log-rank test can hardly tell two methods apart.",
    ),
    Case(
        "diverged",
        lambda s: [run.name for run in s.diverged],
        "Diverged, which counts as not reaching the threshold: {it}.",
    ),
    Case(
        "resolution",
        lambda s: _count(s.every) if math.isfinite(s.every) else "",
        "Steps are known to within the {it} between two evaluations.",
    ),
)


def title_of(survival: Survival) -> str:
    t = survival.threshold
    return f"Steps until {t.label} is at {'least' if t.larger_is_better else 'most'} {t.value:g}"


# ---- Pictures ----


def _draw_metric(axes: Axes, row: Row, name: str, colour: str, until: float) -> Any:
    """Each seed thin, their mean thick as far as all have values."""
    series = [dict(zip(*run.series(name), strict=True)) for run in row.runs]
    for each in series:
        steps = [step for step in each if 0 < step <= until]
        axes.plot(steps, [each[step] for step in steps], color=colour, linewidth=0.7, alpha=0.35)
    shared = sorted(step for step in set.intersection(*map(set, series)) if 0 < step <= until)
    means = [np.mean([each[step] for each in series]) for step in shared]
    return axes.plot(shared, means, color=colour, linewidth=2.0)[0]


def draw(survival: Survival, curves: Mapping[str, str]) -> bytes:
    """The metric and `curves` over the steps at each method's best setting, and the share of runs on their way."""
    rows, names = best_rows(survival), {survival.threshold.metric: survival.threshold.label, **curves}
    styles, lines = plots.method_styles([row.method for row in rows]), {}
    until = max(run.series(survival.threshold.metric)[0].max(initial=1) for row in rows for run in row.runs)
    with plots.house_style():
        figure, [all_axes] = plots.new_figure(4.3 * (len(names) + 1) + 1.5, 3.9, len(names) + 1)
        for axes, (name, title) in zip(all_axes, names.items(), strict=False):
            axes.set_title(plots.as_typed(title))
            for row in rows:
                if all(run.series(name)[0].size for run in row.runs):
                    line = _draw_metric(axes, row, name, styles[row.method][0], until)
                    lines[plots.as_typed(_label(row))] = line
            if name == survival.threshold.metric:
                axes.axhline(survival.threshold.value, color="#999999", linestyle=":", linewidth=1.4, zorder=1)
        all_axes[-1].set_title("share of runs not there yet")
        for row in rows:
            times, shares = row.steps.curve()
            x, y = [0, *times, until], [1, *shares, shares[-1]]
            all_axes[-1].step(x, y, where="post", color=styles[row.method][0], linewidth=2.0)
        all_axes[-1].set_ylim(-0.03, 1.03)
        for axes in all_axes:
            axes.set_xlabel("optimizer step")
            if until / survival.every > 100:
                axes.set_xscale("log", subs=(2, 5))  # with all of 2 to 9 labels lie over each other
                axes.xaxis.set_major_formatter("{x:,.0f}")
                axes.xaxis.set_minor_formatter("{x:,.0f}")
        figure.legend(lines.values(), lines.keys(), loc="outside right center")
    return plots.to_png(figure, dpi=110)


# ---- The report ----


def as_json(survival: Survival, published: Mapping[str, float], statements: list[str], folder: Path) -> str:
    contrasts = {c.row: c for c in survival.contrasts}

    def entry(row: Row) -> dict[str, Any]:
        found = {
            **{key: getattr(row, key) for key in ("method", "learning_rate", "weight_decay", "seeds")},
            "steps": row.steps.values.tolist(),
            "reached": row.steps.reached.tolist(),
            "median": vars(row.median),
            "runs": [str(run.path.relative_to(folder)) for run in row.runs],
            "is_best": row in best_rows(survival),
        }
        if row.seconds is not None:
            found |= {"seconds": row.seconds.values.tolist(), "median_seconds": vars(row.seconds.median())}
        if c := contrasts.get(row):
            found |= {"ratio": vars(c.ratio), "p_value": c.p_value, "p_holm": c.p_holm}
            found |= {"ratio_of_seconds": vars(c.seconds)} if c.seconds else {}
        return found

    whole = {"schema": 1, "threshold": vars(survival.threshold), "published": dict(published)}
    whole |= {"rows": list(map(entry, survival.rows)), "statements": statements}
    return json.dumps(_finite(whole), indent=1)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become null."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return list(map(_finite, value))
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report(
    survival: Survival,
    output_dir: Path,
    published: Mapping[str, float],
    source: str = "",
    curves: Mapping[str, str] | None = None,
) -> None:
    """Prints the table and what it says, and writes `survival.json` and `report.html`.

    Args:
        published: published steps by what people call the method.
        source: where they stand.
        curves: further metrics that are drawn over the steps, with their titles.
    """
    heads, body = best_table(survival, published)
    texts = [text for _, text in say(CASES, survival)] + ([source] if published and source else [])
    print(f"\n{title_of(survival)}\n\n{align(heads, body, {0})}\n\n{wrap(NOTE)}\n")
    more = extremes_table(survival, curves) if curves else None
    if more:
        print(f"{align(*more, {0})}\n\n{wrap(EXTREMES_NOTE)}\n")
    print("\n".join(wrap(text, "- ", "  ") for text in texts))
    write_whole(output_dir / "survival.json", [as_json(survival, published, texts, output_dir)])
    try:
        picture = draw(survival, curves or {})
    except ImportError as error:
        print(f"\nNo report.html was written: {error}")
        return

    def table(heads: list[str], body: list[list[str]]) -> str:
        return page.table(heads, {0}, [("", list(map(page.escape, cells))) for cells in body])

    caption = "Each method at its best setting: thin lines are seeds, thick ones their mean, dots the threshold."
    sections = [
        page.tag("h1", title_of(survival)),
        table(heads, body),
        page.quiet(NOTE),
        page.figure(picture, caption),
    ]
    sections += [table(*more), page.quiet(EXTREMES_NOTE)] if more else []
    sections.append(page.bullets("What this shows, and what it does not", texts))
    sections.append(page.details("All settings", table(*all_table(survival, curves or {}))))
    write_whole(output_dir / "report.html", [page.document(title_of(survival), sections)])
    print(f"\nReport: {output_dir / 'report.html'}")
