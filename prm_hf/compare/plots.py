"""Pictures of a comparison. The only module that needs matplotlib, and it imports it when a picture is drawn.

Colours are those of Okabe and Ito and of Tol ("muted"), told apart by colour-blind readers too. A method has the same
pair of colour and marker in all pictures.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from .._extras import require
from ..runs.methods import find_method
from ..runs.run import Run, is_number
from ..runs.schema import KL, MEAN_Q
from ..runs.text import printable
from .comparison import Comparison
from .rows import Row, best, format_rate
from .statistics import finite, noise_floor


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


CAPTIONS = {
    "frontier": "Held-out accuracy against drift from the reference policy, a curve a method through its learning "
    "rates. At one learning rate a mask below 1 always drifts less; methods differ where their curves do.",
    "curves": "Over the steps of training; lines are means over seeds, bands the range of the seeds.",
    "mask": "The mean of the mask over the steps.",
}
# These methods always have the colours and markers at their places, other methods the ones behind, which repeat.
_KNOWN = (
    *("adamw", "prm_per_tensor", "prm_per_param", "prm_debiased", "prm_debiased_per_param", "prm_rows"),
    *("prm_rows_eps:10", "constant_q", "shuffled_q", "cdpo", "robust", "ipo", "early_stopping"),
)
_COLOURS = (
    *("#333333", "#0072B2", "#56B4E9", "#D55E00", "#CC6677", "#EE3377", "#CC3311", "#E69F00", "#999933", "#009E73"),
    *("#CC79A7", "#882255", "#44AA99", "#332288", "#117733", "#AA4499", "#88CCEE", "#6B5B2E", "#7F7F7F", "#DDAA33"),
)
_MARKERS = "osD^hdpPXv<>*"  # their number is coprime to that of the colours, so that pairs differ
_RC = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.grid": True}
_RC |= {"axes.axisbelow": True, "grid.color": "#e6e6e6", "legend.frameon": False, "legend.fontsize": 9}
_RC["axes.formatter.min_exponent"] = 3  # ticks as 0.01 rather than powers of ten


def method_styles(methods: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each method: fixed for the known ones, the rest in alphabetical order."""
    names = (*_KNOWN, *sorted(set(methods) - {*_KNOWN}))
    styles = dict(zip(names, zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False), strict=False))
    return {method: styles[method] for method in methods}


def house_style() -> AbstractContextManager[None]:
    """The look of all pictures, for the `with` in which one is drawn; an ImportError names the extra it needs."""
    require("prm_hf.compare.plots", "matplotlib", extra="report")
    import matplotlib

    return matplotlib.rc_context(_RC)


def new_figure(
    width: float, height: float, columns: int = 1, rows: int = 1, **shared: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure, inches wide and high, and its axes, a list a row; `shared` as of `Figure.subplots`."""
    # Not through pyplot, which would keep global state and might choose an interactive backend.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **shared).tolist()


def to_png(figure: Figure, dpi: int = 150) -> bytes:
    """The figure as a PNG file's bytes."""
    buffer = io.BytesIO()
    with house_style():  # the texts of the ticks are made here
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def as_typed(text: str) -> str:
    """A text for a picture, in which a `$` is a dollar and begins no formula."""
    return printable(text).replace("$", r"\$")


def _add_note(figure: Figure, text: str) -> None:
    figure.supxlabel(text, fontsize=8.5, color="#666666")


def draw(comparison: Comparison) -> dict[str, bytes]:
    """The pictures of a comparison that there is something to draw for, by the keys of `CAPTIONS`, as PNG bytes."""
    drawn = zip(CAPTIONS, (plot_frontier(comparison), plot_curves(comparison), plot_mask(comparison)), strict=True)
    return {name: to_png(figure) for name, figure in drawn if figure is not None}


def plot_frontier(comparison: Comparison) -> Figure | None:
    """Held-out accuracy against `drift/kl`: a faint point a run, a curve a method through its learning rates.

    Curves go through the means over seeds (geometric for the KL), with standard errors: over seeds, or over held-out
    examples where there is one seed. None if no run has both numbers.
    """
    points = {row: [run for run in row.runs if has_point(run)] for row in comparison.rows}
    kls = {row: np.array([run.metrics[KL] for run in runs]) for row, runs in points.items() if runs}
    if not kls:
        return None
    styles = method_styles(list(comparison.methods()))
    with house_style():
        figure, [[axes]] = new_figure(9.2, 5.6)
        axes.set_xscale("log")
        for i, (method, rows) in enumerate(comparison.methods().items()):
            rows = sorted((row for row in rows if row in kls), key=lambda row: geometric_mean(kls[row]))
            if rows:
                _draw_curve(axes, rows, kls, *styles[method], side=i)
            for row in rows:
                if len(row.runs) > 1:
                    accuracies = [run.metrics[run.measures.accuracy] for run in points[row]]
                    axes.scatter(kls[row], accuracies, s=14, color=styles[method][0], alpha=0.35, linewidths=0)
        low, high = min(map(min, kls.values())), max(map(max, kls.values()))
        margin = max(1.35, 2 / np.sqrt(high / low))  # at least a factor of 4 in all
        axes.set_xlim(low / margin, high * margin)
        axes.margins(y=0.1)
        axes.set_xlabel("drift/kl: KL(π‖π_ref), nats a token, log scale")
        axes.set_ylabel(f"held-out accuracy ({as_typed(comparison.measures.accuracy)})")
        axes.set_title("Held-out accuracy against drift")
        over = sorted({row.accuracy_error()[1] for row in kls} - {""})
        words = {"seeds": "over seeds", "examples": f"over {comparison.measures.examples} (one seed)"}
        bars = f"Bars: ± one standard error {' or '.join(words[kind] for kind in over)}. " if over else ""
        _add_note(
            figure, f"{bars}Labels: learning rate. Upper left is better: more accurate, closer to the reference."
        )
        handles = [bars for bars in axes.containers if bars.get_label()]  # also of names that begin with _
        axes.legend(handles, [bars.get_label() for bars in handles], loc="center left", bbox_to_anchor=(1.01, 0.5))
    return figure


def _draw_curve(axes: Axes, rows: list[Row], kls: dict[Row, np.ndarray], colour: str, marker: str, side: int) -> None:
    """Draws one method, with its learning rates beside the points: on one of four sides, so that methods differ."""
    x, y = [geometric_mean(kls[row]) for row in rows], [row.accuracy for row in rows]
    # Controls are points of their own, each bound to another PRM run: no curve joins them.
    line = "none" if any(row.source for row in rows) else "-"
    look = {"color": colour, "marker": marker, "linestyle": line, "markeredgecolor": "white", "capsize": 2.5}
    errors = np.nan_to_num([row.accuracy_error()[0] for row in rows])
    errors = np.minimum([errors, errors], [y, np.subtract(1, y)])  # an accuracy is no less than 0 and no more than 1
    axes.errorbar(x, y, yerr=errors, label=as_typed(rows[0].kind.label), ecolor=(colour, 0.55), markersize=7, **look)
    dx, dy, align = ((6, 4, "left"), (-6, 4, "right"), (6, -9, "left"), (-6, -9, "right"))[side % 4]
    label = {"textcoords": "offset points", "xytext": (dx, dy), "ha": align, "fontsize": 8.5, "color": colour}
    label["bbox"] = {"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0}
    for *place, row in zip(x, y, rows, strict=True):
        if row.learning_rate is not None:
            axes.annotate(format_rate(row.learning_rate), place, **label)


def has_point(run: Run) -> bool:
    return finite(run.metrics.get(KL)) and run.metrics[KL] > 0 and finite(run.metrics.get(run.measures.accuracy))


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def plot_curves(comparison: Comparison) -> Figure | None:
    """Held-out accuracy, fit of the noise and `drift/kl` over the steps; None if nothing of this was logged."""
    names = comparison.measures
    panels = {
        names.accuracy: f"Held-out accuracy ({names.accuracy})",
        names.noise_fit: f"{names.noise_label.capitalize()} ({names.noise_fit})",
        KL: f"KL to the reference ({KL}), log scale",
    }
    return _plot_over_steps(comparison, panels)


def plot_mask(comparison: Comparison) -> Figure | None:
    """`mask/mean_q` over the steps, with the level that pure noise has; None if no run logged a mask."""
    return _plot_over_steps(
        comparison, {MEAN_Q: f"Mean of the mask ({MEAN_Q}), log scale"}, floors=_noise_floors(comparison)
    )


def _plot_over_steps(comparison: Comparison, panels: dict[str, str], floors: Iterable[float] = ()) -> Figure | None:
    """A panel for each metric that was logged, by its title; None if none was. Lines are means over seeds."""
    panels = {name: title for name, title in panels.items() if any(_mean_series(r, name) for r in comparison.rows)}
    if not panels:
        return None
    styles, lines = method_styles(list(comparison.methods())), {}
    with house_style():
        figure, [all_axes] = new_figure(4.4 * len(panels) + 2.0 if len(panels) > 1 else 8.2, 4.0, len(panels))
        for axes, (name, title) in zip(all_axes, panels.items(), strict=True):
            axes.set_title(as_typed(title))
            axes.set_xlabel("optimizer step")
            if title.endswith("log scale"):
                axes.set_yscale("log", nonpositive="mask")  # the KL is 0 before the first step
            for method, rows in comparison.methods().items():
                top = best(rows) or rows[0]
                for row in (*(row for row in rows if row is not top), top):  # the best one last, over the others
                    line = _draw_series(axes, row, name, styles[method], thick=row is top)
                    if line is not None:
                        lines[as_typed(rows[0].kind.label)] = line
        for level in floors:
            line = all_axes[0].axhline(level, color="#666666", linestyle="--", linewidth=1.2, zorder=1)
            lines[f"pure noise, ema snr\nper_tensor: q = {level:.3f}"] = line
        figure.legend(lines.values(), lines.keys(), loc="outside right center")
        _add_note(figure, "Thick: each method's most accurate learning rate. Thin: others.")
    return figure


def _draw_series(axes: Axes, row: Row, name: str, style: tuple[str, str], thick: bool) -> Line2D | None:
    """Draws the mean over seeds of a metric, and with a thick line their range; None if it was not logged."""
    series = _mean_series(row, name)
    if series is None:
        return None
    steps, mean, low, high = series
    look = {"color": style[0], "alpha": 1.0 if thick else 0.4}
    if steps.size == 1:
        return axes.plot(steps, mean, marker=style[1], linestyle="none", **look)[0]
    if len(row.runs) > 1 and thick:
        axes.fill_between(steps, low, high, color=style[0], alpha=0.15, linewidth=0)
    return axes.plot(steps, mean, linewidth=2.0 if thick else 1.0, **look)[0]


def _mean_series(row: Row, name: str) -> tuple[np.ndarray, ...] | None:
    """Steps that all seeds of a row logged, and mean, minimum and maximum over the seeds there: four `[n]` arrays."""
    series = [dict(zip(*run.series(name), strict=True)) for run in row.runs]
    series = [each for each in series if each]
    steps = sorted(set.intersection(*map(set, series))) if series else []
    if not steps:
        return None
    values = np.array([[each[step] for step in steps] for each in series])
    return np.array(steps), values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def _noise_floors(comparison: Comparison) -> set[float]:
    """Noise floor of each `"ema"` `snr` setting among the runs; those not on record have the optimizer's default."""
    floors = set()
    for run in comparison.runs:
        settings = {key.removeprefix("prm_"): value for key, value in run.settings.items() if value is not None}
        estimator = settings.get("estimator", find_method(run.method).settings.get("prm_estimator"))
        known_alpha = "alpha" in settings or settings.get("boundary", "batch") == "batch"  # b/(n-b) is not on record
        if estimator == "ema" and settings.get("mask", "snr") == "snr" and known_alpha and run.series(MEAN_Q)[0].size:
            names = {"adam_beta1": "beta1", "softness": "softness", "alpha": "alpha"}
            used = {names[key]: value for key, value in settings.items() if key in names}
            if all(is_number(x) and 0 <= x < math.inf for x in used.values()) and used.get("beta1", 0) < 1:
                floors.add(noise_floor(**used))
    return floors
