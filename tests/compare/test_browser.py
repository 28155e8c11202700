"""`report.html` in a browser: on a desk and on a phone, light and dark, offline, by keyboard and without scripts."""

import pytest

from prm_hf.compare import compare_experiments, compare_runs, write_report
from prm_hf.compare.report import as_html
from prm_hf.runs.methods import find_method

from ..browsers import CONTRAST, OVERFLOWING, SIZES, launched, skip_without_browser, visits
from .compared_runs import write_run
from .test_solved import write_problems


skip_without_browser()


TWO_STAGES = ("relabel:prm_rows_eps:10", "filter:prm_rows_eps:10", "relabel:adamw_eps:10+prm_rows_eps:10")


def write_runs(root):
    """Four methods at four rates, three seeds, names as long as they get, and a run that diverged."""
    for seed in (0, 1, 2):
        for lr, kl, accuracy in ((3e-4, 0.05, 0.66), (1e-3, 0.1, 0.70), (3e-3, 0.4, 0.75), (1e-2, 1.6, 0.65)):
            write_run(root, "adamw", lr, seed, accuracy, kl)
            write_run(root, "adamw_eps:10", lr, seed, accuracy + 0.02, kl)
            write_run(root, "adamw_clean", lr, seed, accuracy + 0.12, kl)
            name = write_run(root, "prm_debiased_per_param", 10 * lr, seed, accuracy + 0.08, 0.8 * kl, mean_q=0.1)
        write_run(root, "constant_q", 1e-3, seed, 0.7, 0.3, settings={"constant_q": {"of": name, "mean_q": 0.1}})
    for method in TWO_STAGES:
        write_run(root, method, 1e-3, 0, 0.7, 0.2)
    name = write_run(root, "a_method_of_someone_with_a_name_that_is_much_too_long", 1e-3, 0, 0.7, 0.2)
    lost = write_run(root, "adamw", 1e-1, 0, 0.0, 0.0)
    (root / lost / "metrics.json").write_text('{"diverged": true, "diverged_at_step": 12}')


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    write_runs(root / "runs")
    write_report(compare_runs(root / "runs"), root)
    return root / "report.html"


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture
def visit(browser):
    with visits(browser, ready=".chart svg.marks") as visit:
        yield visit


def bottom(page, selector):
    box = page.locator(selector).first.bounding_box()
    return box["y"] + box["height"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_first_screen_and_nothing_overflows(visit, report, size, scheme):
    page, said = visit(report, size, scheme)
    width, height = SIZES[size]
    assert bottom(page, ".verdict") < height / 2
    assert bottom(page, ".chart") < height
    assert page.locator("table.compact tbody tr").nth(1).bounding_box()["y"] < height  # the table has begun
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERFLOWING) == []
    page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate(OVERFLOWING) == []
    assert said == []


def test_the_verdict_and_what_was_lost_are_said(visit, report):
    page, _ = visit(report)
    text = page.locator(".verdict").inner_text()
    assert text.startswith("Yes.") and "gives back" in text and "Next, more seeds" in text
    assert "Diverged" in page.locator(".lost").first.inner_text()


@pytest.mark.parametrize("size", SIZES)
def test_names_in_the_legend_are_whole(visit, report, size):
    page, _ = visit(report, size)
    names = page.locator("svg.marks .role-legend-label text").all_text_contents()
    for method in TWO_STAGES:
        assert find_method(method).label in names
    assert len(set(names)) == len(names) == 9


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_both_schemes(visit, report, scheme):
    """The contrast of text on the page is at least 4.5, and that of the chart's words too."""
    page, _ = visit(report, scheme=scheme)
    contrast = page.evaluate(CONTRAST, "p, td, th, summary, svg.marks text")
    assert len(contrast) > 50 and min(contrast) >= 4.5


def test_a_point_says_its_numbers(visit, report):
    page, _ = visit(report)
    points = page.locator("svg.marks .mark-symbol.role-mark path")
    points.last.hover(force=True)
    page.wait_for_selector("#vg-tooltip-element.visible")
    text = page.locator("#vg-tooltip-element").inner_text()
    for name in (
        "method",
        "learning rate",
        "held-out accuracy",
        "KL, nats a token",
        "flipped fit",
        "mean of the mask",
    ):
        assert name in text
    assert page.locator("svg.marks").count() == 1
    assert "Accuracy against drift" in page.locator("svg.marks").text_content()
    assert "nats a token" in page.locator("svg.marks").text_content()


def test_keyboard_copies_a_command(visit, report):
    page, _ = visit(report, permissions=["clipboard-read", "clipboard-write"])
    for _ in range(5):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.matches('[data-copy]')"):
            break
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.textContent === 'Copied'")
    command = page.locator(".verdict code").inner_text()
    assert page.evaluate("navigator.clipboard.readText()") == command and command.startswith("--seeds ")
    # Each fold opens with a key.
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None


def test_a_run_has_the_command_that_repeats_it(visit, report):
    page, _ = visit(report)
    commands = page.eval_on_selector_all("details [data-copy]", "(all) => all.map((e) => e.dataset.copy)")
    assert any(
        "--methods adamw_eps:10 --learning_rates 3e-3 --prm_learning_rates 3e-3 --seeds 2" in c for c in commands
    )


@pytest.mark.parametrize("size", SIZES)
def test_tables_are_tables_to_a_screen_reader(visit, report, size):
    page, _ = visit(report, size)
    page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert page.get_by_role("table").count() == 5
    assert page.get_by_role("table", name="Paired differences in held-out accuracy").get_by_role("row").count() > 5
    assert page.evaluate("[...document.images].every((e) => e.alt)")
    assert page.locator("h1").count() == 1 and page.locator("html").get_attribute("lang") == "en"
    assert page.locator(".chart").get_attribute("aria-label").startswith("Held-out accuracy against drift")


def test_without_scripts_there_is_a_picture(visit, report):
    page, _ = visit(report, java_script_enabled=False)
    assert page.locator("noscript img, .screen img").first.bounding_box()["width"] > 300
    assert page.locator(".verdict").inner_text().startswith("Yes.")


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_problems_solved_fit_on_the_screen(visit, tmp_path, size):
    write_problems(tmp_path / "runs")
    write_report(compare_runs(tmp_path / "runs"), tmp_path)
    page, said = visit(tmp_path / "report.html", size)
    assert bottom(page, ".verdict") < SIZES[size][1] / 2
    assert "solved" in page.locator("table.compact th").all_inner_texts()
    page.evaluate("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    assert page.get_by_role("table", name="Problems solved").get_by_role("row").count() == 9
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    assert page.evaluate(OVERFLOWING) == [] and said == []


def test_the_chart_follows_the_screen(visit, report):
    page, said = visit(report)
    before = page.locator("svg.marks").bounding_box()["width"]
    page.set_viewport_size({"width": 390, "height": 800})
    page.emulate_media(color_scheme="dark")
    # The chart is made anew, so that for a moment there may be none
    page.wait_for_function("document.querySelector('svg.marks')?.getBoundingClientRect().width < 380")
    assert before > 380 and page.evaluate(OVERFLOWING) == [] and said == []


def test_several_experiments_have_a_chart_each(visit, tmp_path):
    for epochs in (1, 2):
        for method in ("adamw", "prm_per_tensor"):
            for lr in (1e-3, 1e-2):
                settings = {"num_train_epochs": epochs}
                write_run(tmp_path / f"e{epochs}", method, lr, 0, 0.7, 100 * lr, settings=settings)
    file = tmp_path / "both.html"
    file.write_text(as_html(compare_experiments(tmp_path)), encoding="utf-8")
    page, said = visit(file, "phone")
    page.wait_for_function("document.querySelectorAll('svg.marks').length === 2")
    assert page.locator(".verdict").count() == 2 and page.evaluate(OVERFLOWING) == [] and said == []
