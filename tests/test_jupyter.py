"""The review widget in a real JupyterLab, driven by keys in a headless Chromium; skipped, visibly, without a browser."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

from conftest import ROOT
from ftnb.review import load_edits
from toys import least_contrast

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytest.importorskip("anywidget", reason="anywidget is not installed")
pytest.importorskip("jupyterlab", reason="jupyterlab is not installed")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on PATH"),
]

SHOTS = os.environ.get("FTNB_SHOTS")  # a folder to keep pictures in
NOTEBOOK = """
from ftnb.data import Record, frame_json
from ftnb.review import Item, review_widget

said = ["is elm street open?", "bye <b>now</b>", "where is the nearest store?", "hello", "help me"]
names = ["exit", "exit", "find_nearest_store", "greet", "help"]
rows = [
    Record(f"r{i}", ({"role": "system", "content": "Store assistant."}, {"role": "user", "content": s}),
           frame_json(n), label=n)
    for i, (s, n) in enumerate(zip(said, names))
]
items = [Item(r.id, 0.9, ("label-error score 0.97", "class exit has 2 rows")) for r in rows]
review_widget(rows, items, "edits.jsonl", "ann")
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def served(tmp_path, root):
    "A JupyterLab on a folder, as a person starts it: its port and its token; ended with all its kernels."
    port, token = free_port(), secrets.token_hex(16)
    own = {f"JUPYTER_{n}_DIR": str(tmp_path / n) for n in ("CONFIG", "DATA", "RUNTIME")}
    own |= {f"JUPYTERLAB_{n}_DIR": str(tmp_path / n) for n in ("SETTINGS", "WORKSPACES")}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own |= {"IPYTHONDIR": str(tmp_path / "ipython"), "PYTHONPATH": os.pathsep.join(paths)}
    flags = f"--no-browser --allow-root --ServerApp.ip=127.0.0.1 --ServerApp.port={port} --ServerApp.port_retries=0"
    flags += f" --IdentityProvider.token={token} --LabApp.extension_manager=readonly --expose-app-in-browser"
    log = open(tmp_path / "lab.log", "w")  # noqa: SIM115
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *flags.split(), f"--ServerApp.root_dir={root}"],
        env={k: v for k, v in os.environ.items() if k not in ("IN_TEST", "CI", "MPLBACKEND")} | own,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_for(server, f"http://127.0.0.1:{port}/api/status?token={token}", tmp_path / "lab.log")
        yield port, token
    finally:
        server.send_signal(signal.SIGTERM)  # ends the kernels too
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()
        log.close()


@pytest.fixture
def lab(tmp_path):
    "Address and folder of a JupyterLab that holds one notebook."
    root = tmp_path / "root"
    root.mkdir()
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK.strip())])
    nb.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(nb, root / "review.ipynb")
    with served(tmp_path, root) as (port, token):
        yield f"http://127.0.0.1:{port}/lab/tree/review.ipynb?token={token}", root


def wait_for(server, address, log):
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            urllib.request.urlopen(address, timeout=5)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


@pytest.fixture
def page():
    with sync_api.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
        page.set_default_timeout(60_000)
        try:
            yield page
        finally:
            if SHOTS:
                page.screenshot(path=str(Path(SHOTS) / "page.png"))
            browser.close()


def shot(page, name):
    if SHOTS:
        Path(SHOTS).mkdir(parents=True, exist_ok=True)
        page.locator(".ftnb-review").screenshot(path=str(Path(SHOTS) / f"{name}.png"))


def press(page, key, then):
    "Presses a key in the widget and waits for what its status line must say."
    page.locator(".ftnb-review").press(key)
    page.locator(".ftnb-review .status", has_text=then).wait_for()


def run_notebook(page):
    "Runs the notebook's cell by JupyterLab's own command, once the status bar says that its kernel is there."
    idle = page.get_by_text("Python 3 (ipykernel) | Idle")
    idle.wait_for()
    page.wait_for_timeout(1000)  # the status bar is a little ahead of the session
    page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells'); }")  # not awaited
    page.locator(".ftnb-review").wait_for()
    page.locator(
        ".jp-InputPrompt", has_text="[1]:"
    ).wait_for()  # done; until then the notebook takes the focus
    idle.wait_for()


def dark(page, on):
    theme = "JupyterLab Dark" if on else "JupyterLab Light"
    page.evaluate("name => window.jupyterapp.commands.execute('apputils:change-theme', {theme: name})", theme)
    page.locator(f'body[data-jp-theme-name="{theme}"]').wait_for(state="attached")


CONTRAST = least_contrast(".ftnb-review :is(strong, span, li, dt, dd, label, textarea, input, button, p)")


def test_keys_decide_rows_and_the_file_holds_them(lab, page):
    address, root = lab
    said = []
    page.on("pageerror", lambda error: said.append(f"{error}\n{error.stack}"))
    page.goto(address)
    run_notebook(page)
    widget = page.locator(".ftnb-review")
    widget.wait_for()
    cells = page.locator(".jp-Notebook .jp-Cell").count()
    assert widget.locator("strong").inner_text() == "Row 1 of 5"
    assert widget.locator(".why li").all_inner_texts() == ["label-error score 0.97", "class exit has 2 rows"]
    edits, path = (
        root / "edits.jsonl",
        lambda: [(e.id, e.action, e.field) for e in load_edits(root / "edits.jsonl")],
    )

    widget.locator("strong").click()  # the notebook gives the focus away
    widget.focus()
    sync_api.expect(widget).to_have_css("outline-style", "solid")  # focus can be seen
    shot(page, "light")
    assert page.evaluate(CONTRAST) >= 4.5
    dark(page, True)
    shot(page, "dark")
    assert page.evaluate(CONTRAST) >= 4.5
    dark(page, False)

    # an answer that lost its JSON is refused, what was typed stays; the second try is saved, with the label
    press_e = widget.locator("textarea").nth(1)
    widget.press("e")
    sync_api.expect(press_e).to_be_focused()
    press_e.fill('{"intent": "get')
    press_e.press("Control+Enter")
    page.locator(".ftnb-review .status.error", has_text="Not saved").wait_for()
    assert press_e.input_value() == '{"intent": "get' and not edits.exists()
    shot(page, "refused")
    press_e.fill('{"intent": "help", "slots": []}')
    widget.locator("input").fill("asks for help")
    press_e.press("Control+Enter")
    page.locator(".ftnb-review .status", has_text="Saved: edit").wait_for()
    assert path() == [("r0", "edit", "completion"), ("r0", "edit", "label")]
    assert {e.reason for e in load_edits(edits)} == {"asks for help"}
    sync_api.expect(widget).to_be_focused()

    assert widget.locator("textarea").first.input_value() == "bye <b>now</b>"
    press(page, "k", "Saved: keep")
    press(page, "s", "Skipped")
    press(page, "r", "Saved: reject")
    press(page, "u", "Undone: r3")
    press(page, "r", "Saved: reject")
    assert path()[2:] == [("r1", "keep", ""), ("r3", "reject", ""), ("r3", "undo", ""), ("r3", "reject", "")]

    # Jupyter's own keys did not fire: k and r would move or change cells
    assert page.locator(".jp-Notebook .jp-Cell").count() == cells
    assert page.locator(".jp-Notebook .jp-RawCell").count() == 0

    press(page, "k", "Saved: keep")
    sync_api.expect(widget.locator("strong")).to_have_text("Row 5 of 5")
    press(page, "k", "Saved: keep")
    sync_api.expect(widget.locator("strong")).to_have_text("All 5 rows decided")
    assert path()[-2:] == [("r4", "keep", ""), ("r2", "keep", "")]
    shot(page, "done")
    assert not [e for e in said if "/static/lab/" not in e], said  # JupyterLab's own are not ours
    for line in edits.read_text("utf-8").splitlines():
        assert json.loads(line)["reviewer"] == "ann"


def test_reader_of_the_page_is_told_what_each_part_is(lab, page):
    address, _ = lab
    page.goto(address)
    run_notebook(page)
    widget = page.locator(".ftnb-review")
    widget.wait_for()
    assert page.get_by_role("region", name="Review of rows").count() == 1
    for name in ("Text", "Answer", "Reason (optional)"):
        assert widget.get_by_label(name, exact=True).count() == 1, name
    for name in ("k Keep", "e Edit", "r Reject", "u Undo", "s Skip"):
        button = widget.get_by_role("button", name=name, exact=True)
        assert button.get_attribute("aria-keyshortcuts") == name[0]
    assert widget.get_by_role("status").count() == 1
    assert widget.get_by_role("progressbar", name="rows decided").count() == 1
    widget.focus()
    order = []
    for _ in range(8):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.dataset.action || document.activeElement.tagName"))
    assert order == ["TEXTAREA", "TEXTAREA", "INPUT", "keep", "edit", "reject", "undo", "skip"]
