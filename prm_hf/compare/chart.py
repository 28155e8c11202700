"""The frontier as an interactive chart: a Vega-Lite specification and the scripts that draw it, without a network."""

from __future__ import annotations

import functools
import json
from typing import Any

from .._extras import require
from ..runs.methods import find_method
from ..runs.run import Run
from ..runs.schema import CLEAN_FIT, KL
from ..runs.text import printable
from . import plots
from .comparison import Comparison
from .rows import Row, format_rate
from .statistics import finite


_SHAPES = dict(zip("osD^hdpPXv<>*", ("circle", "square", "diamond", "triangle-up") * 4, strict=False))
# Draws each chart for the width and the colours of the screen, again when these change, and copies commands.
_SCRIPT = """
const narrow = matchMedia("(max-width: 760px)"), dark = matchMedia("(prefers-color-scheme: dark)");
const pen = document.createElement("canvas").getContext("2d");
const charts = [...document.querySelectorAll("[data-chart]")];
function draw() {
  const ink = dark.matches ? "#e6e8eb" : "#1c1e21", line = dark.matches ? "#33383f" : "#dfe2e6";
  for (const place of charts) {
    const spec = JSON.parse(document.getElementById(place.dataset.chart).textContent);
    const colours = dark.matches ? spec.usermeta.dark : spec.usermeta.light;
    if (narrow.matches) spec.title = {text: spec.title, fontSize: 12};
    // As many names of methods a row as are seen whole, and the chart is higher where they take many rows.
    pen.font = "12px system-ui, sans-serif";
    const names = spec.usermeta.names, width = place.clientWidth;
    const longest = 40 + Math.max(...names.map((name) => pen.measureText(name).width));
    const columns = Math.max(1, Math.min(narrow.matches ? 2 : 4, Math.floor(width / longest)));
    spec.height = (narrow.matches ? 250 : 380) + 18 * Math.max(0, Math.ceil(names.length / columns) - 3);
    spec.config = {
      background: "transparent", font: "system-ui, sans-serif", view: {stroke: null},
      range: {category: colours, symbol: spec.usermeta.shapes},
      title: {color: ink, fontSize: 14, anchor: "start"},
      axis: {labelColor: ink, titleColor: ink, gridColor: line, domainColor: line, tickColor: line, labelFontSize: 12,
        titleFontSize: 12, titleFontWeight: "normal"},
      legend: {labelColor: ink, labelFontSize: 12, orient: "bottom", columns, labelLimit: width - 40,
        symbolOpacity: 1},
    };
    const tooltip = {theme: dark.matches ? "dark" : "light"};
    vegaEmbed(place, spec, {mode: "vega-lite", actions: false, renderer: "svg", tooltip});
  }
}
draw();
narrow.addEventListener("change", draw);
dark.addEventListener("change", draw);
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const text = button.dataset.copy, said = button.textContent;
  try { await navigator.clipboard.writeText(text); }
  catch {  // a page from a file may not be allowed to
    const area = Object.assign(document.createElement("textarea"), {value: text});
    document.body.append(area); area.select(); document.execCommand("copy"); area.remove(); button.focus();
  }
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = said; }, 1500);
});
"""


@functools.cache
def scripts() -> str:
    """Vega, Vega-Lite and Vega-Embed, and what draws the charts of a page, as HTML."""
    require("prm_hf.compare.chart", "vl_convert", "altair", extra="report")
    import vl_convert

    bundle = vl_convert.javascript_bundle().replace("</script", "<\\/script")
    return f"<script>{bundle}</script>\n<script>{_SCRIPT}</script>"


def frontier(comparison: Comparison, name: str, fallback: str) -> str:
    """The place of a chart and its specification, as HTML; empty if no run has accuracy and KL.

    Args:
        name: tells the charts of a page apart.
        fallback: a picture as HTML, for readers without scripts.
    """
    spec = frontier_spec(comparison)
    if spec is None:
        return ""
    text = json.dumps(spec, allow_nan=False).replace("<", "\\u003c")
    return (
        f'<div class="chart" data-chart="{name}"></div>\n'
        f'<script type="application/json" id="{name}">{text}</script>\n<noscript>{fallback}</noscript>'
    )


def frontier_spec(comparison: Comparison) -> dict[str, Any] | None:
    """Held-out accuracy against KL: a faint point a run, and a curve a method through its learning rates."""
    require("prm_hf.compare.chart", "altair", extra="report")
    import altair as alt

    runs = [_run_values(row, run) for row in comparison.rows for run in row.runs if plots.has_point(run)]
    rows = [values for row in comparison.rows if (values := _row_values(row))]
    if not runs:
        return None
    methods = [method for method in comparison.methods() if find_method(method)]
    styles = plots.method_styles(methods)
    names = [_label(method) for method in methods]
    x = (
        alt.X("kl:Q")
        .scale(type="log", nice=False, padding=12)
        .title("drift: KL to the reference, nats a token, log scale")
    )
    x = x.axis(tickCount=5, format="~g", grid=False)
    y = alt.Y("accuracy:Q").scale(zero=False, nice=True).title("held-out accuracy").axis(tickCount=6)
    colour = alt.Color("method:N").scale(domain=names).legend(title=None)
    shape = alt.Shape("method:N").scale(domain=names).legend(title=None)
    numbers = [alt.Tooltip(f"{key}:{kind}", title=title) for key, kind, title in _columns(comparison)]
    of_rows, of_runs = (alt.Chart(alt.InlineData(values=values)) for values in (rows, runs))
    of_row = [entry for entry in numbers if entry.shorthand != "seed:N"]
    chart = alt.layer(
        of_runs.mark_point(filled=True, size=30, opacity=0.35).encode(x, y, colour, shape, tooltip=numbers),
        of_rows.transform_filter("datum.joined").mark_line(strokeWidth=2).encode(x, y, colour, order="kl:Q"),
        of_rows.mark_rule(opacity=0.6).encode(x, alt.Y("low:Q"), alt.Y2("high:Q"), colour),
        of_rows.mark_point(filled=True, size=90, opacity=1).encode(x, y, colour, shape, tooltip=of_row),
    ).properties(title="Accuracy against drift: upper left is better", width="container")
    spec = chart.to_dict()
    del spec["config"], spec["$schema"]  # the page has its own settings, and names no other
    spec["description"] = f"{plots.CAPTIONS['frontier']} The tables have its numbers."  # for screen readers
    spec["autosize"] = {"type": "fit", "contains": "padding"}
    spec["usermeta"] = {
        "light": [styles[method][0] for method in methods],
        "dark": [on_dark(styles[method][0]) for method in methods],
        "names": names,
        "shapes": [_SHAPES[styles[method][1]] for method in methods],
    }
    return spec


def on_dark(colour: str) -> str:
    """A colour that is seen on a dark page: one that is too dark is mixed with white."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    light = (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255
    share = max(0.0, (0.5 - light) / (1 - light))
    return "#" + "".join(f"{round(x + share * (255 - x)):02x}" for x in (red, green, blue))


def _columns(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The numbers of a point: their names in the data, their kinds and their titles."""
    names = comparison.measures
    return [
        ("method", "N", "method"),
        ("rate", "N", "learning rate"),
        ("seed", "N", "seed"),
        ("accuracyText", "N", "held-out accuracy"),
        ("klText", "N", "KL, nats a token"),
        ("noise", "N", names.noise_label),
        ("clean", "N", "clean fit"),
        ("extra", "N", names.extra_label),
        ("q", "N", "mean of the mask"),
        ("seconds", "N", "wall time, s"),
    ]


def _label(method: str) -> str:
    return printable(find_method(method).label)


def _run_values(row: Row, run: Run) -> dict[str, Any]:
    names = row.measures
    values = {name: run.metrics.get(name) for name in (names.noise_fit, CLEAN_FIT, names.extra, "wall_seconds")}
    return {
        **_values(row, run.metrics[names.accuracy], run.metrics[KL], run.mean_q, values),
        "seed": str(run.seed),
        "rate": format_rate(run.learning_rate),
    }


def _row_values(row: Row) -> dict[str, Any] | None:
    """The means over seeds, of the KL the geometric one, and the ends of the error bar."""
    runs = [run for run in row.runs if plots.has_point(run)]
    if not runs:
        return None
    names = row.measures
    error, over = row.accuracy_error()
    values = {name: row.mean(name)[0] for name in (names.noise_fit, CLEAN_FIT, names.extra, "wall_seconds")}
    kl = plots.geometric_mean([run.metrics[KL] for run in runs])
    low, high = (
        min(1.0, max(0.0, row.accuracy + sign * error)) if finite(error) else row.accuracy for sign in (-1, 1)
    )
    found = _values(row, row.accuracy, kl, row.mean("mean_q")[0], values)
    found["accuracyText"] += f" ± {error:.3f} over {over}" if over and finite(error) else ""
    return {**found, "rate": format_rate(row.learning_rate), "low": low, "high": high, "joined": row.source is None}


def _values(
    row: Row, accuracy: float, kl: float, mean_q: float | None, others: dict[str, float | None]
) -> dict[str, Any]:
    noise, clean, extra, seconds = (f"{value:.3g}" if finite(value) else "-" for value in others.values())
    return {
        "method": _label(row.method),
        "accuracy": accuracy,
        "kl": kl,
        "accuracyText": f"{accuracy:.3f}",
        "klText": f"{kl:.3g}",
        "noise": noise,
        "clean": clean,
        "extra": extra,
        "q": f"{mean_q:.3g}" if finite(mean_q) else "-",
        "seconds": seconds,
    }
