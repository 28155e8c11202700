"""Pictures of a comparison. The only module that needs matplotlib, and it imports it when a picture is drawn.

Colours are those of Okabe and Ito and of Tol ("muted"), told apart by colour-blind readers too; each method also has
its own marker. A method has one colour in all pictures.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs.methods import find_method
from ..runs.read import Run
from ..runs.schema import KL, MEAN_Q
from .comparison import Comparison, Row, best, format_rate
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
_STYLES = {
    "adamw": ("#333333", "o"),
    "prm_per_tensor": ("#0072B2", "s"),
    "prm_per_param": ("#56B4E9", "D"),
    "prm_debiased": ("#D55E00", "^"),
    "prm_debiased_per_param": ("#CC6677", "h"),
    "prm_rows": ("#EE3377", "D"),
    "prm_rows_eps:10": ("#CC3311", "s"),
    "constant_q": ("#E69F00", "P"),
    "shuffled_q": ("#999933", "X"),
    "cdpo": ("#009E73", "v"),
    "robust": ("#CC79A7", "<"),
    "ipo": ("#882255", ">"),
    "early_stopping": ("#44AA99", "*"),
}
_MORE_COLOURS = ("#332288", "#117733", "#AA4499", "#88CCEE", "#6B5B2E", "#7F7F7F", "#DDAA33")
_MORE_MARKERS = ("p", "d", "8", "H", "o", "s")  # as many as is coprime to the colours, so that pairs differ
_RC = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": "#222222",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def method_styles(methods: list[str]) -> dict[str, tuple[str, str]]:
    """(colour, marker) of each method: fixed for the known ones, the rest in alphabetical order."""
    more = zip(itertools.cycle(_MORE_COLOURS), itertools.cycle(_MORE_MARKERS), strict=False)
    styles = {**_STYLES, **dict(zip(sorted(set(methods) - set(_STYLES)), more, strict=False))}
    return {method: styles[method] for method in methods}


def house_style() -> AbstractContextManager[None]:
    """The look that all pictures share, for the `with` in which one is drawn.

    Raises:
        ImportError: matplotlib is not installed; names the extra that brings it.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('Pictures and report.html need matplotlib: pip install "prm-hf[report]"') from error
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
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def draw(comparison: Comparison) -> dict[str, bytes]:
    """The pictures of a comparison that there is something to draw for, by the keys of `CAPTIONS`, as PNG bytes."""
    drawn = zip(CAPTIONS, (plot_frontier(comparison), plot_curves(comparison), plot_mask(comparison)), strict=True)
    return {name: to_png(figure) for name, figure in drawn if figure is not None}


def plot_frontier(comparison: Comparison) -> Figure | None:
    """Held-out accuracy against `drift/kl`: a faint point a run, a curve a method through its learning rates.

    Curves go through the means over seeds (geometric for the KL), with standard errors: over seeds, or over held-out
    examples where there is one seed. None if no run has both numbers.

    Raises:
        ImportError: matplotlib is not installed; names the extra that brings it.
    """
    points = {row: [run for run in row.runs if _has_point(run)] for row in comparison.rows}
    kls = {row: [run.metrics[KL] for run in runs] for row, runs in points.items() if runs}
    if not kls:
        return None
    drawn = {
        method: sorted((row for row in rows if row in kls), key=lambda row: _geometric_mean(kls[row]))
        for method, rows in comparison.methods().items()
    }
    styles = method_styles(list(drawn))
    with house_style():
        figure, [[axes]] = new_figure(9.2, 5.6)
        axes.set_xscale("log")
        labels = []
        for method, rows in drawn.items():
            if rows:
                labels += _draw_curve(axes, rows, kls, *styles[method])
            for row in rows:
                if len(row.runs) > 1:
                    accuracies = [run.metrics[run.measures.accuracy] for run in points[row]]
                    look = {"color": styles[method][0], "alpha": 0.35, "linewidths": 0}
                    axes.scatter(kls[row], accuracies, s=14, zorder=2, **look)
        low, high = min(map(min, kls.values())), max(map(max, kls.values()))
        margin = max(1.35, 2 / np.sqrt(high / low))  # at least a factor of 4 in all
        axes.set_xlim(low / margin, high * margin)
        axes.margins(y=0.1)
        _plain_log_ticks(axes, "x")
        axes.set_xlabel("drift/kl: KL(π‖π_ref), nats a token, log scale")
        axes.set_ylabel(f"held-out accuracy ({comparison.measures.accuracy})")
        axes.set_title("Held-out accuracy against drift")
        over = sorted({row.accuracy_error()[1] for row in kls} - {""})
        words = {"seeds": "over seeds", "examples": f"over {comparison.measures.examples} (one seed)"}
        bars = f"Bars: ± one standard error {' or '.join(words[kind] for kind in over)}. " if over else ""
        note = f"{bars}Labels: learning rate. Upper left is better: more accurate, closer to the reference."
        figure.supxlabel(note, fontsize=8.5, color="#666666")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), handlelength=1.8, labelspacing=0.7)
        figure.draw_without_rendering()  # the layout is final from here on, so that labels can be placed in pixels
        _place_labels(axes, labels)
    return figure


Label = tuple[float, float, float, str, str]  # x, y, its error, text and colour


def _draw_curve(axes: Axes, rows: list[Row], kls: dict[Row, list[float]], colour: str, marker: str) -> list[Label]:
    """Draws one method and returns the labels of its points."""
    x, y = [_geometric_mean(kls[row]) for row in rows], [row.accuracy for row in rows]
    errors = np.nan_to_num([row.accuracy_error()[0] for row in rows])
    axes.errorbar(
        x,
        y,
        yerr=errors,
        label=rows[0].kind.label,
        color=colour,
        marker=marker,
        markersize=7,
        markeredgecolor="white",
        markeredgewidth=0.8,
        # Controls are points of their own, each bound to another PRM run: no curve joins them.
        linestyle="none" if any(row.source for row in rows) else "-",
        linewidth=1.8,
        elinewidth=1.0,
        capsize=2.5,
        ecolor=(colour, 0.55),
        zorder=3,
    )
    places = zip(x, y, errors, rows, strict=True)
    return [
        (*place, format_rate(row.learning_rate), colour) for *place, row in places if row.learning_rate is not None
    ]


def _has_point(run: Run) -> bool:
    return finite(run.metrics.get(KL)) and run.metrics[KL] > 0 and finite(run.metrics.get(run.measures.accuracy))


def _geometric_mean(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def _plain_log_ticks(axes: Axes, which: str) -> None:
    """Ticks as 0.01, 0.02, 0.05 rather than powers of ten, where the range is short enough to show them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis, limits = (axes.xaxis, axes.get_xlim()) if which == "x" else (axes.yaxis, axes.get_ylim())
    decades = np.log10(limits[1] / limits[0])
    subs = range(1, 10) if decades < 0.8 else (1, 2, 5) if decades < 2.2 else (1,)
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _place_labels(axes: Axes, labels: list[Label]) -> None:
    """Writes each label beside its point, in the place around it that covers the least."""
    from matplotlib.patheffects import withStroke

    scale, frame = axes.figure.dpi / 72, axes.get_window_extent()
    taken = []  # boxes (left, bottom, right, top) in pixels: the points, their error bars, and pieces of the curves
    for x, y, error, *_ in labels:
        (left, bottom), (right, top) = axes.transData.transform([(x, y - error), (x, y + error)])
        taken += [_box(*axes.transData.transform((x, y)), 5 * scale, 5 * scale), (left - scale, bottom, right, top)]
    for line in axes.get_lines():
        if line.get_linestyle() == "-":
            for start, end in itertools.pairwise(axes.transData.transform(line.get_xydata())):
                pieces = np.linspace(start, end, 2 + int(np.hypot(*(end - start)) / (4 * scale)))
                taken += [_box(*piece, 1.5 * scale, 1.5 * scale) for piece in pieces]
    sides = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
    for x, y, _, text, colour in labels:
        width, height = 2.6 * scale * len(text), 4.5 * scale  # half of each
        offsets = [
            (dx * (step + width), dy * ((0 if dx else step) + height))
            for step in (6 * scale, 12 * scale)
            for dx, dy in sides
        ]
        boxes = np.array([_box(*offset, width, height) for offset in offsets])
        boxes += np.tile(axes.transData.transform((x, y)), 2)
        outside = (boxes[:, :2] < frame.min).any(axis=1) | (boxes[:, 2:] > frame.max).any(axis=1)
        chosen = int(np.argmin(_overlaps(boxes, np.array(taken)) + 1e6 * outside))
        taken.append(tuple(boxes[chosen]))
        axes.annotate(
            text,
            (x, y),
            xytext=np.divide(offsets[chosen], scale),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=8.5,
            color=colour,
            path_effects=[withStroke(linewidth=2.2, foreground="white")],
            zorder=4,
        )


def _box(x: float, y: float, half_width: float, half_height: float) -> tuple[float, float, float, float]:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """`[boxes]`: the area that each of `[boxes, 4]` shares with all of `[others, 4]`."""
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    return (high - low).clip(min=0).prod(axis=2).sum(axis=1)


def plot_curves(comparison: Comparison) -> Figure | None:
    """Held-out accuracy, fit of the noise and `drift/kl` over the steps; each method's best learning rate stands out.

    Lines are means over seeds with the range of the seeds as a band. None if nothing of this was logged.
    """
    names = comparison.measures
    panels = {
        names.accuracy: f"Held-out accuracy ({names.accuracy})",
        names.noise_fit: f"{names.noise_label.capitalize()} ({names.noise_fit})",
        KL: f"KL to the reference ({KL}), log scale",
    }
    return _plot_over_steps(comparison, panels)


def plot_mask(comparison: Comparison) -> Figure | None:
    """`mask/mean_q` over the steps, with the level at which pure noise holds the `"ema"` `snr` mask. None if no run
    logged a mask."""
    return _plot_over_steps(
        comparison, {MEAN_Q: f"Mean of the mask ({MEAN_Q}), log scale"}, floors=_noise_floors(comparison)
    )


def _plot_over_steps(comparison: Comparison, panels: dict[str, str], floors: Iterable[float] = ()) -> Figure | None:
    """A panel for each metric that was logged, by its title; None if none was."""
    panels = {name: title for name, title in panels.items() if any(_mean_series(r, name) for r in comparison.rows)}
    if not panels:
        return None
    styles, handles = method_styles(list(comparison.methods())), {}
    with house_style():
        figure, [all_axes] = new_figure(4.4 * len(panels) + 2.0 if len(panels) > 1 else 8.2, 4.0, len(panels))
        for axes, (name, title) in zip(all_axes, panels.items(), strict=True):
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("optimizer step")
            if title.endswith("log scale"):
                axes.set_yscale("log", nonpositive="mask")  # the KL is 0 before the first step
            for method, rows in comparison.methods().items():
                top = best(rows) or rows[0]
                for row in sorted(rows, key=lambda row, top=top: row is top):
                    line = _draw_series(axes, row, name, styles[method], thick=row is top)
                    if line is not None and (row is top or method not in handles):
                        handles[method] = line
            if title.endswith("log scale"):
                _plain_log_ticks(axes, "y")
        lines, labels = list(handles.values()), [find_method(method).label for method in handles]
        for level in floors:
            lines.append(all_axes[0].axhline(level, color="#666666", linestyle="--", linewidth=1.2, zorder=1))
            labels.append(f"pure noise, ema snr\nper_tensor: q = {level:.3f}")
        figure.legend(lines, labels, loc="outside right center", handlelength=1.6, labelspacing=0.7)
        note = "Thick: each method's most accurate learning rate. Thin: others."
        figure.supxlabel(note, fontsize=8.5, color="#666666")
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
            used = {"adam_beta1": "beta1", "softness": "softness", "alpha": "alpha"}
            floors.add(noise_floor(**{used[key]: value for key, value in settings.items() if key in used}))
    return floors
