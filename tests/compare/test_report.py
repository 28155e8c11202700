"""The table, markdown, JSON and the page, and the pictures in it."""

import json
import re
import sys

import pytest

from prm_hf.compare import chart, compare_runs, format_comparison, plots, write_report

from .compared_runs import ACCURACY, KL, write_grid, write_run


def test_table_is_aligned_and_narrow(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), constant=0.74)
    write_run(tmp_path, "a_method_with_a_name_that_is_much_too_long_for_any_table", 1e-3, 0, 0.7, 0.4, drop=(KL,))
    text = format_comparison(compare_runs(tmp_path), "table")
    verdict, command, *others = text.split("\n\n")
    assert verdict.endswith("\nNext, more seeds; add to the same command:") and command == "--seeds 0 1 2 3 4"
    assert max(map(len, verdict.splitlines())) <= 120 and max(map(len, "\n".join(others).splitlines())) <= 120
    header, rule, *rows = others[0].splitlines()
    assert header.split()[:3] == ["method", "lr", "seeds"] and set(rule) == {"-"} and len(rows) == 8
    assert len({len(row) for row in rows}) == 1 and "…" in text
    (long,) = [row for row in rows if "…" in row]
    assert long.split()[-4] == "-"  # the KL that was not measured


def test_markdown_has_whole_rows(tmp_path):
    write_grid(tmp_path)
    text = format_comparison(compare_runs(tmp_path), "markdown")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {11, 6}
    assert "\n\n    --seeds 0 1 2 3 4\n" in text  # a block of code, to be copied
    assert text.startswith("**No sign of it: PRM per_tensor") and "\\|reward\\|" in text


def test_json_is_strict_and_complete(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), constant=0.74)
    name = write_run(tmp_path, "cdpo", 1e-3, 0, 0.7, 0.4)
    metrics = json.loads((tmp_path / name / "metrics.json").read_text()) | {KL: float("nan")}
    (tmp_path / name / "metrics.json").write_text(json.dumps(metrics))
    comparison = compare_runs(tmp_path)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    data = json.loads(format_comparison(comparison, "json"), parse_constant=refuse)
    assert data["schema"] == 1 and len(data["rows"]) == 8 and len(data["runs"]) == 15
    assert data["statements"] == comparison.statements and len(data["contrasts"]) == len(comparison.contrasts)
    row = data["rows"][0]
    assert row["metrics"][ACCURACY] == {"mean": pytest.approx(0.7), "standard_error": 0.0, "n": 2}
    assert row["seeds"] == [0, 1] and row["learning_rate"] == 1e-4
    assert next(run for run in data["runs"] if run["method"] == "cdpo")["metrics"][KL] == "nan"


def test_unknown_format(tmp_path):
    write_grid(tmp_path)
    with pytest.raises(ValueError, match="`format` must be one of table, json, markdown, html, got 'pdf'"):
        format_comparison(compare_runs(tmp_path), "pdf")


def test_report_is_self_contained(tmp_path):
    write_grid(tmp_path / "runs", seeds=(0, 1), constant=0.74)
    write_run(tmp_path / "runs", "<script>", 1e-3, 0, 0.7, 0.4, name="odd")
    comparison = compare_runs(tmp_path / "runs")
    write_report(comparison, tmp_path / "out")
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["statements"] == comparison.statements
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    body = page.split("<script>")[0]  # without Vega's own scripts
    assert "http" not in body and body.count("<script") == 1 and "&lt;script&gt;" in body
    assert set(re.findall(r'(?:src|href)="([^",]*)', body)) == {"data:", "data:image/png;base64"}
    assert "prefers-color-scheme: dark" in page
    assert body.count("<svg") == sum(1 for c in comparison.contrasts if c.interval)


def test_the_chart_has_the_numbers(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), constant=0.74)
    write_run(tmp_path, "</script><b>", 1e-3, 0, 0.7, 0.4, name="odd")
    comparison = compare_runs(tmp_path)
    text = re.search(
        r'<script type="application/json" id="frontier0">(.*?)</script>', format_comparison(comparison, "html")
    )
    spec = json.loads(text[1])
    points = max(spec["datasets"].values(), key=len) if "datasets" in spec else spec["layer"][0]["data"]["values"]
    assert len(points) == len(comparison.runs)
    (one,) = [x for x in points if (x["method"], x["rate"], x["seed"]) == ("PRM per_tensor", "1e-2", "1")]
    assert (one["accuracy"], one["kl"], one["noise"], one["q"]) == (0.75, 0.4, "0.4", "0.05")
    tooltips = [entry["title"] for entry in spec["layer"][0]["encoding"]["tooltip"]]
    assert tooltips[:5] == ["method", "learning rate", "seed", "held-out accuracy", "KL, nats a token"]
    assert len(spec["usermeta"]["light"]) == len(spec["usermeta"]["dark"]) == len(comparison.methods())


def luminance(colour):
    """Of `#rrggbb`, as the guidelines for web content define it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_are_seen_on_a_dark_page():
    for colour in plots._COLOURS:
        assert (luminance(chart.on_dark(colour)) + 0.05) / (luminance("#15171a") + 0.05) >= 3


def test_pictures_of_one_run_and_of_missing_numbers(tmp_path):
    write_run(tmp_path / "one", "prm_per_tensor", 1e-3, 0, 0.7, 0.4, mean_q=0.05)
    one = compare_runs(tmp_path / "one")
    (axes,) = plots.plot_frontier(one).axes
    low, high = axes.get_xlim()
    assert low < 0.4 < high and high / low == pytest.approx(4)
    write_run(tmp_path / "some", "adamw", 1e-3, 0, 0.7, 0.4, drop=(KL,))
    write_run(tmp_path / "some", "prm_per_tensor", 1e-3, 0, 0.7, 0.4, drop=("memorization/flipped_fit",))
    some = compare_runs(tmp_path / "some")
    assert len(plots.plot_frontier(some).axes[0].get_legend().get_texts()) == 1
    assert plots.plot_mask(some) is None
    assert "AdamW at 1e-3" in some.findings["not_on_frontier"]


def test_frontier_shows_the_numbers(tmp_path):
    write_grid(tmp_path, seeds=(0, 1), constant=0.74)
    (axes,) = plots.plot_frontier(compare_runs(tmp_path)).axes
    assert axes.get_xscale() == "log"
    curves = {tuple(line.get_xdata()): line.get_ydata() for line in axes.get_lines() if len(line.get_xdata()) == 3}
    adamw = next(values for kl, values in curves.items() if kl == pytest.approx((0.1, 0.4, 1.6)))
    assert list(adamw) == pytest.approx([0.70, 0.75, 0.65])
    assert {text.get_text() for text in axes.texts} == {"1e-4", "1e-3", "1e-2", "1e-1", "5.05e-4"}


def test_mask_picture_has_the_noise_floor_of_the_ema_estimator_only(tmp_path):
    settings = {"prm_estimator": "debiased", "prm_mask": "snr"}
    write_run(tmp_path, "prm_debiased", 1e-3, 0, 0.7, 0.4, mean_q=0.3, settings=settings)
    (legend,) = plots.plot_mask(compare_runs(tmp_path)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["PRM debiased"]
    settings = {"prm_estimator": "ema", "prm_mask": "snr", "prm_softness": 1.0, "prm_boundary": "batch"}
    write_run(tmp_path, "prm_per_tensor", 1e-3, 0, 0.7, 0.4, mean_q=0.05, settings=settings)
    figure = plots.plot_mask(compare_runs(tmp_path))
    assert "q = 0.048" in figure.legends[0].get_texts()[-1].get_text()
    assert any(line.get_ydata()[0] == pytest.approx(1 / 21) for line in figure.axes[0].get_lines())


def test_methods_keep_their_colours():
    styles = plots.method_styles(["prm_per_tensor", "zeta", "alpha", "adamw"])
    assert styles["adamw"] == plots.method_styles(["adamw"])["adamw"]
    many = plots.method_styles([*plots._KNOWN, *(f"method{i}" for i in range(40))])
    assert len(set(many.values())) == len(many)
    assert styles["alpha"] != styles["zeta"]


def test_missing_matplotlib_is_said(tmp_path, monkeypatch):
    write_grid(tmp_path / "runs")
    comparison = compare_runs(tmp_path / "runs")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('pip install "prm-hf[report]"')):
        write_report(comparison, tmp_path / "out")
    assert (tmp_path / "out" / "comparison.json").is_file()
    assert format_comparison(comparison).startswith("No sign of it")
