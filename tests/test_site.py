"""The site, built once and opened in a headless Chromium: phone and desk width, keyboard, search, axe. Skips say why."""

import functools
import http.server
import os
import re
import subprocess
import sys
import threading

import pytest

from conftest import ROOT

SITE = ROOT / "_docs"
SHOTS = os.environ.get("FTNB_SHOTS")  # a folder to keep pictures in
FEW = ("index", "data", "decide", "endpoint", "contributing")
PHONE, DESK = {"width": 360, "height": 740}, {"width": 1280, "height": 800}
widths = pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])


@pytest.fixture(scope="module")
def site():
    "The pages, built as `make docs` builds them."
    done = subprocess.run(
        [sys.executable, ROOT / "tools/site.py"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SITE


@pytest.fixture(scope="module")
def address(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def opened(browser, address, name, size):
    "A page in a tab, and what it said: errors, and requests that leave the site."
    page, said = browser.new_context(viewport=size).new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda m: said.append(m.text) if m.type == "error" else None)
    page.on(
        "request", lambda r: said.append(r.url) if not r.url.startswith((address, "data:", "blob:")) else None
    )
    page.goto(f"{address}{name}.html")
    page.wait_for_load_state("load")
    return page, said


def violations(page):
    "Rules of axe that the page breaks, with the first place of each."
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    found = axe.Axe().run(page).response["violations"]
    return {v["id"]: (len(v["nodes"]), v["nodes"][0]["html"][:200]) for v in found}


def test_every_notebook_has_its_page_and_every_link_leads_somewhere(site):
    pages = {p.stem for p in site.glob("*.html")}
    notebooks = {re.sub(r"^\d+[a-z]?_", "", p.stem) for p in (ROOT / "nbs").glob("*.ipynb")}
    assert notebooks | {"contributing"} <= pages


def test_the_site_needs_no_other_server(site):
    for path in (*site.rglob("*.html"), *site.rglob("*.css")):
        text = path.read_text("utf-8")
        assert not re.search(r"(src=|@import\s+url\(|<link[^>]+stylesheet[^>]+href=)[\"']?https?:", text), (
            path.name
        )
        assert "https://ftnb.github.io/ftnb/data.html" not in text.partition("<body")[2], path.name


def test_functions_are_documented_with_their_parameters(site):
    text = re.sub(r"<[^>]+>", "", (site / "data.html").read_text("utf-8"))
    assert "characters at most" in text and "A text cut to a readable line" in text
    text = re.sub(r"<[^>]+>", "", (site / "bench.html").read_text("utf-8"))
    assert "# when its first text came; None: none came" in text, "fields of a data class"
    assert (site / "search.json").stat().st_size > 100_000


def test_every_figure_has_a_text(site):
    for path in site.glob("*.html"):
        for picture in re.findall(r"<img\b[^>]*>", path.read_text("utf-8")):
            assert re.search(r'alt="[^"]{8,}"', picture), f"{path.name}: {picture[:60]}"


@widths
@pytest.mark.parametrize("name", FEW)
def test_page_fits_and_is_quiet(browser, address, name, size):
    page, said = opened(browser, address, name, size)
    if SHOTS:
        page.screenshot(path=f"{SHOTS}/{name}_{size['width']}.png")
    assert said == []
    assert page.evaluate("document.documentElement.scrollWidth") <= size["width"]
    page.context.close()


def test_a_name_links_to_what_the_page_means_by_it(site):
    def linked(name):
        found = re.findall(
            r'href="([^"]+)"[^>]*><code>([\w.]+)</code>', (site / f"{name}.html").read_text("utf-8")
        )
        return {(word, place) for place, word in found}

    workshop = linked("iterate")
    assert {("train", "train.html#train"), ("look", "ledger.html#look")} <= workshop
    assert not {"first", "fit"} & {word for word, _ in workshop}, (
        "runs and functions of the workshop itself, not those of ftnb"
    )
    assert ("train", "train.html#train") in linked("diagnose"), "and not the command of that name"


@widths
@pytest.mark.parametrize("name", FEW)
def test_axe_finds_nothing(browser, address, name, size):
    page, _ = opened(browser, address, name, size)
    assert violations(page) == {}
    page.context.close()


@pytest.mark.slow
@widths
def test_axe_finds_nothing_on_any_page(browser, address, size):
    broken = {}
    for path in sorted(SITE.glob("*.html")):
        page, said = opened(browser, address, path.stem, size)
        found = violations(page)
        fits = page.evaluate("document.documentElement.scrollWidth") <= size["width"]
        if found or said or not fits:
            broken[path.stem] = found, said, fits
        page.context.close()
    assert broken == {}


def test_keyboard_reaches_the_text_the_notebooks_and_the_search(browser, address):
    page, _ = opened(browser, address, "data", DESK)
    page.keyboard.press("Tab")
    focus = page.locator(":focus")
    assert focus.inner_text() == "Skip to the text" and focus.bounding_box()["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "quarto-document-content"
    page.goto(f"{address}data.html")
    seen = []
    for _ in range(30):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.innerText.trim() || document.activeElement.type"))
        shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert shown == "solid" or seen[-1] == "search", f"nothing shows that {seen[-1]!r} has the focus"
        if seen[-1] == "Train":
            break
    assert {"search", "01 data", "Train"} <= set(seen), seen
    before = page.locator("a:visible", has_text="04 train").count()
    page.keyboard.press("Enter")
    page.locator("a", has_text="04 train").first.wait_for(state="visible")
    assert before == 0
    page.context.close()


def test_search_leads_to_a_function(browser, address):
    page, said = opened(browser, address, "index", DESK)
    page.locator("#quarto-search input").fill("near_pairs")
    page.locator(".smalldocs-search-results a").first.wait_for()
    assert any("data.html" in (a.get_attribute("href") or "") for a in page.locator(".search-result").all())
    assert said == []
    page.context.close()


def test_phone_opens_the_notebooks_by_a_button(browser, address):
    page, _ = opened(browser, address, "data", PHONE)
    page.locator(".quarto-btn-toggle").focus()
    page.keyboard.press("Enter")
    link = page.locator("#quarto-sidebar a", has_text="01b audit")
    page.wait_for_function(
        "() => document.querySelector('#quarto-sidebar').getBoundingClientRect().left >= 0"
    )
    link.click()
    page.wait_for_url("**/audit.html")
    page.context.close()
