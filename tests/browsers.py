"""Pages in a browser, offline, on a desk and on a phone; for the tests of each page that the package writes."""

import contextlib
import os
import shutil

import pytest


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"desk": (1400, 900), "phone": (390, 800)}

# Elements that reach out of the page, or whose content reaches out of them.
OVERFLOWING = """() => [...document.querySelectorAll("main, main *")].filter((e) => {
  const box = e.getBoundingClientRect();
  if (!box.width || getComputedStyle(e).clipPath !== "none" || e.closest("code, svg, thead")) return false;
  const cut = e.matches("td, p, li, pre") && e.scrollWidth > e.clientWidth + 1;
  return cut || box.right > innerWidth + 1 || box.left < -1;
}).map((e) => `${e.tagName} ${e.className} ${e.textContent.slice(0, 60)}`)"""

# The contrast of the text of elements with the colour that is behind them.
CONTRAST = """(selector) => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => { const [r, g, b] = rgb.map((x) => x / 255)
    .map((x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4); return 0.2126*r + 0.7152*g + 0.0722*b; };
  const behind = (e) => { for (; e; e = e.parentElement) {
    const colour = numbers(getComputedStyle(e).backgroundColor); if (colour[3] !== 0) return colour; } };
  return [...document.querySelectorAll(selector)].map((e) => {
    const style = getComputedStyle(e), over = behind(e.closest("svg")?.parentElement ?? e);
    let alpha = 1; for (let x = e; x; x = x.parentElement) alpha *= Number(getComputedStyle(x).opacity);
    const own = numbers(e.matches("text") ? style.fill : style.color);
    const text = light(own.slice(0, 3).map((x, i) => alpha * x + (1 - alpha) * over[i]));
    const page = light(over.slice(0, 3));
    return (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05); }); }"""


def skip_without_browser() -> None:
    """Skips a module of tests where there is no browser; where all tests must run they fail."""
    if BROWSER is None and not os.environ.get("CI"):
        pytest.skip("no chromium and no google-chrome here", allow_module_level=True)


@contextlib.contextmanager
def launched():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield found
        found.close()


@contextlib.contextmanager
def visits(browser, ready=None):
    """A function that opens a page, offline; it gives the page and what it printed and asked the network for.

    `ready` is a selector of what scripts make.
    """
    contexts = []

    def visit(file, size="desk", scheme="light", script="", **settings):
        width, height = SIZES[size]
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, offline=True, **settings
        )
        contexts.append(context)
        page, said = context.new_page(), []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("dialog", lambda dialog: (said.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: request.url.startswith("http") and said.append(request.url))
        if script:
            page.add_init_script(script)
        page.goto(file.as_uri())
        if ready and settings.get("java_script_enabled", True):
            page.wait_for_selector(ready)
        return page, said

    yield visit
    for context in contexts:
        context.close()
