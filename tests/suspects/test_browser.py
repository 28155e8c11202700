"""`suspects.html` in a browser: on a desk and on a phone, light and dark, offline, by keyboard and without scripts."""

import itertools
import json

import pytest

from prm_hf.suspects.decisions import read_decisions
from prm_hf.suspects.page import page_html, write_page
from prm_hf.suspects.repair import repair

from ..browsers import CONTRAST, OVERFLOWING, SIZES, launched, skip_without_browser, visits
from .suspect_lines import line, pairs, ranked, summary, write_lines


skip_without_browser()


@pytest.fixture(scope="module")
def browser():
    with launched() as found:
        yield found


@pytest.fixture
def visit(browser):
    with visits(browser, ready="html.scripted") as visit:
        yield visit


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suspects")
    write_lines(folder, pairs(120), summary())
    return write_page(folder)


def kept(page):
    """What is decided, by row."""
    return page.eval_on_selector_all(
        "button[data-decision][aria-pressed=true]",
        "(all) => Object.fromEntries(all.map((e) => [e.closest('.card').dataset.row, e.dataset.decision]))",
    )


def focused(page):
    return page.evaluate("document.activeElement.dataset.row")


def press(page, keys):
    for key in keys.split():
        page.keyboard.press(key)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_nothing_overflows_and_nothing_is_asked_for(visit, file, size, scheme):
    page, said = visit(file, size, scheme)
    width, height = SIZES[size]
    assert page.locator(".verdict").bounding_box()["y"] < height / 4
    assert page.locator("article.card").count() == 100
    for state in (
        "",
        "for (const e of document.querySelectorAll('details')) e.open = true",
        "for (const e of more) e.click()",
    ):
        page.evaluate(f"{{ const more = document.querySelectorAll('.more'); {state} }}")
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.evaluate(OVERFLOWING) == []
    press(page, "j 1 2 3")
    assert (
        min(
            page.evaluate(
                CONTRAST, "p, h1, h2, h3, dt, dd, kbd, summary, figcaption span, .text, mark, .code, svg text"
            )
        )
        >= 4.5
    )
    assert min(page.evaluate(CONTRAST, "button:enabled")) >= 4.5
    assert said == []


@pytest.mark.parametrize("size, columns", [("desk", 2), ("phone", 1)])
def test_sides_stand_side_by_side_where_there_is_room(visit, file, size, columns):
    page, _ = visit(file, size)
    boxes = [page.locator(f"#row-0 .{side}").bounding_box() for side in ("chosen", "rejected")]
    assert len({box["x"] for box in boxes}) == columns and len({box["y"] for box in boxes}) == 3 - columns


@pytest.mark.parametrize("width", [320, 800, 1100])
def test_nothing_overflows_between_these_widths(visit, file, width):
    page, _ = visit(file)
    page.set_viewport_size({"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == width and page.evaluate(OVERFLOWING) == []


def test_hostile_rows_do_nothing(visit, file):
    page, said = visit(file)
    assert page.locator("main script, main img, main iframe, main textarea").count() == 0
    assert page.locator("body > script").count() == 1 and said == []
    text = page.locator("#row-3 .chosen .text").inner_text()
    assert "<script>alert(1)</script>" in text and "U+2028" in text and "U+202E" in text and "U+D800" in text


def test_a_script_that_gets_in_is_not_run(visit, file, tmp_path):
    """The policy is a second line of defence."""
    text = file.read_text(encoding="utf-8")
    broken = tmp_path / "broken.html"
    broken.write_text(text.replace("Question 0?", "<script>alert(1)</script><img src=x onerror=alert(2)>"))
    page, said = visit(broken)
    page.wait_for_timeout(100)
    assert page.locator("main script").count() == 1
    assert said and all("Content Security Policy" in line or "ERR_" in line for line in said)


def test_keys_move_decide_and_undo(visit, file):
    page, _ = visit(file)
    press(page, "j")
    assert focused(page) == "0"
    press(page, "2 1 3")  # each decision moves on
    assert focused(page) == "3" and kept(page) == {"0": "flip", "1": "keep", "2": "drop"}
    assert page.locator("#count").inner_text() == "3 of 100 decided: 1 keep, 1 flip, 1 drop"
    press(page, "k ArrowLeft ArrowRight j k")
    assert focused(page) == "2"
    press(page, "1")
    assert kept(page)["2"] == "keep"
    press(page, "u")
    assert focused(page) == "2" and kept(page)["2"] == "drop"
    press(page, "0")
    assert "2" not in kept(page) and focused(page) == "2"
    press(page, "u u u u u u u")
    assert kept(page) == {} and page.locator("#undo").is_disabled() and page.locator("#export").is_disabled()
    press(page, "2 Control+2 Alt+3")
    assert len(kept(page)) == 1
    assert "becomes rejected" in page.locator("#row-0 .chosen h3").evaluate(
        "(e) => getComputedStyle(e, '::after').content"
    )


def test_keys_can_be_turned_off(visit, file):
    page, _ = visit(file)
    page.locator("#shortcuts").uncheck()
    page.locator("#row-0").focus()
    press(page, "1 2 j")
    assert kept(page) == {} and focused(page) == "0"


def test_buttons_decide_and_a_second_click_takes_back(visit, file):
    page, _ = visit(file, "phone")
    flip = page.locator("#row-0").get_by_role("button", name="Flip")
    flip.click()
    assert flip.get_attribute("aria-pressed") == "true" and kept(page) == {"0": "flip"}
    page.locator("#row-0").get_by_role("button", name="Drop").click()
    assert kept(page) == {"0": "drop"}
    page.locator("#undo").click()
    assert kept(page) == {"0": "flip"}
    flip.click()
    assert kept(page) == {}


def exported(page, folder):
    with page.expect_download() as download:
        page.locator("#export").click()
    assert download.value.suggested_filename == "decisions.jsonl"
    download.value.save_as(folder / "decisions.jsonl")
    return folder / "decisions.jsonl"


def test_the_export_is_what_a_repair_reads(visit, file, tmp_path):
    page, said = visit(file)
    press(page, "j 2 3 j 1")
    decided = exported(page, tmp_path)
    lines = [json.loads(text) for text in decided.read_text().splitlines()]
    assert lines == [{"row": 0, "decision": "flip"}, {"row": 1, "decision": "drop"}, {"row": 3, "decision": "keep"}]
    rows = [entry["data"] for entry in sorted(pairs(120), key=lambda entry: entry["row"])]
    repaired, summary = repair(rows, [0.0] * len(rows), decisions=read_decisions(decided, len(rows)))
    assert repaired[0]["chosen"] == rows[0]["rejected"] and summary.dropped == summary.flipped == 1 and said == []


def test_decisions_outlive_the_page(visit, file):
    page, _ = visit(file)
    press(page, "j 2 3")
    page.evaluate("localStorage.setItem('prm-hf suspects of other rows', '[[5, \"drop\"]]')")
    page.reload()
    assert kept(page) == {"0": "flip", "1": "drop"} and page.locator("#storage").is_hidden()
    key = page.evaluate("`prm-hf suspects ${document.querySelector('.suspects').dataset.key}`")
    for damaged in ("{", "7", '[[0, "burn"], [1e9, "keep"], [1, "keep"]]', "[3]"):
        page.evaluate("([key, value]) => localStorage.setItem(key, value)", [key, damaged])
        page.reload()
        assert kept(page) == ({"1": "keep"} if "burn" in damaged else {})


def test_a_browser_that_keeps_nothing_says_so(visit, file, tmp_path):
    refused = (
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    page, said = visit(file, script=refused)
    assert page.locator("#storage").is_hidden()
    press(page, "j 1")
    assert page.locator("#storage").is_visible() and kept(page) == {"0": "keep"} and said == []
    exported(page, tmp_path)


def test_long_texts_are_folded(visit, file):
    page, _ = visit(file)
    texts, more = page.locator("#row-1 .chosen .texts"), page.locator("#row-1 .more")
    assert texts.bounding_box()["height"] < 300 and page.locator("#row-0 .more").count() == 0
    more.click()
    assert more.get_attribute("aria-expanded") == "true" and texts.bounding_box()["height"] > 1000
    page.locator("#row-1").focus()
    press(page, "e")
    assert more.get_attribute("aria-expanded") == "false" and texts.bounding_box()["height"] < 300
    page.emulate_media(media="print")
    assert texts.bounding_box()["height"] > 1000 and page.locator(".bar").is_hidden()


def test_roles_and_names(visit, file):
    page, _ = visit(file)
    assert page.locator("h1").count() == 1 and page.locator("html").get_attribute("lang") == "en"
    assert page.get_by_role("article", name="1 row 0").count() == 1
    assert page.get_by_role("group", name="Decision on row 0").get_by_role("button").count() == 3
    assert page.get_by_role("status").first.get_attribute("aria-live") == "polite"
    names = page.eval_on_selector_all("svg[role=img]", "(all) => all.map((e) => e.getAttribute('aria-label'))")
    assert len(names) == 101 and "Rows by the probability" in names[0] and "out of fold: −0.50, −1.00" in names[1]
    levels = page.eval_on_selector_all("h1, h2, h3", "(all) => all.map((e) => Number(e.tagName[1]))")
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    assert page.locator("#row-2 .prompt .text").nth(1).evaluate("(e) => getComputedStyle(e).direction") == "rtl"


def test_focus_is_seen(visit, file):
    page, _ = visit(file)
    for _ in range(3):
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_without_scripts_the_suspects_can_be_read(visit, file):
    page, _ = visit(file, java_script_enabled=False)
    assert page.locator("#row-1 .chosen .texts").bounding_box()["height"] > 1000
    assert page.locator("#row-0 .decide").is_hidden() and page.locator("noscript").inner_text().startswith("Without")


def test_a_completion_cannot_be_flipped_by_key(visit, tmp_path):
    file = tmp_path / "page.html"
    lines = ranked([line(i, 0.9 - i / 10, {"prompt": "p", "completion": str(i)}) for i in range(3)])
    file.write_text(page_html(lines, summary("completion")), encoding="utf-8")
    page, said = visit(file)
    press(page, "j 2 3")
    assert kept(page) == {"0": "drop"} and said == []


def test_what_was_applied_is_decided_and_can_be_taken_back(visit, tmp_path):
    """The page that is written after `--decisions`: also in a browser that has never seen these rows."""
    lines = pairs(20)
    lines[0]["decided"], lines[5]["decided"] = "flip", "drop"
    write_lines(tmp_path, lines, summary())
    page, _ = visit(write_page(tmp_path))
    first, other = (str(lines[place]["row"]) for place in (0, 5))
    assert kept(page) == {first: "flip", other: "drop"}
    page.locator(f"#row-{first} button[data-decision=flip]").click()
    assert kept(page) == {other: "drop"}
    page.reload()
    page.wait_for_selector("html.scripted")
    assert kept(page) == {other: "drop"}
    page.locator(f"#row-{first} button[data-decision=keep]").click()
    with page.expect_download() as download:
        page.locator("#export").click()
    assert read_decisions(download.value.path(), 20) == {int(first): "keep", int(other): "drop"}
