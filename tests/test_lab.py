"""Every notebook in a real JupyterLab, in a headless Chromium, as a learner meets it; skipped, visibly, without a browser.

A learner opens a notebook and presses Run > Run All Cells. So nothing is taken out: cells with `#| slow` run too (they
are part of the lesson, only too long for the other tests), and only `#| gpu` cells stay out where there is no CUDA.
Progress bars are drawn, as nothing here says that this is a test. With FTNB_SHOTS each notebook leaves a picture, and
a line in lab.jsonl: seconds, widgets, and what went to stderr.
"""

import json
import os
import shutil
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
import test_jupyter

from conftest import ROOT

pytestmark = test_jupyter.pytestmark
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
BESIDE = ("docs", "recipes", "benchmarks", "assets.txt", "pyproject.toml")  # what a notebook reads by ../name
LIMIT = 1200  # seconds for one notebook
STATE = """() => {
  const shown = window.jupyterapp.shell.currentWidget;
  const cells = shown.content.widgets.filter((c) => c.model.type === "code" && c.model.sharedModel.getSource().trim());
  const outputs = cells.flatMap((c, i) => c.model.outputs.toJSON().map((o) => [i, o]));
  return {
    status: shown.sessionContext.session?.kernel?.status,
    all: cells.length,
    done: cells.filter((c) => c.model.executionCount !== null).length,
    waiting: cells.filter((c) => c.node.querySelector(".jp-InputArea-prompt")?.textContent.includes("*")).length,
    errors: outputs.filter(([, o]) => o.output_type === "error").map(([i, o]) => `cell ${i}: ${o.ename}: ${o.evalue}`),
    stderr: outputs.filter(([, o]) => o.name === "stderr").map(([i, o]) => `cell ${i}: ${o.text}`),
    widgets: outputs.filter(([, o]) => "application/vnd.jupyter.widget-view+json" in (o.data ?? {})).length,
    drawn: shown.node.querySelectorAll(".jp-OutputArea-output .widget-hbox, .jp-OutputArea-output .ftnb-review").length,
    bars: shown.node.querySelectorAll(".widget-hprogress").length,
    figures: shown.node.querySelectorAll(".jp-RenderedImage img").length,
    broken: [...shown.node.querySelectorAll(".jp-RenderedImage img")].filter((i) => i.complete && !i.naturalWidth).length,
    height: shown.content.node.querySelector(".jp-WindowedPanel-inner, .jp-WindowedPanel-outer").scrollHeight,
  };
}"""
FALLBACKS = (
    "Error displaying widget",
    "Error creating widget",
    "Loading widget",
    "HBox(children=",
    "VBox(children=",
)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "One JupyterLab on a copy of the notebooks: its port and its token."
    folder = tmp_path_factory.mktemp("lab")
    root = folder / "root"
    shutil.copytree(ROOT / "nbs", root / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    for name in BESIDE:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, root / name)
    with test_jupyter.served(folder, root) as (port, token):
        yield f"http://127.0.0.1:{port}", token, root


def without_gpu_cells(path):
    "In the copy, a cell for a GPU becomes text where there is none, as a learner without one would leave it out."
    import torch

    nb = nbformat.read(path, as_version=4)
    for cell in nb.cells:
        lines = [line.replace(" ", "") for line in cell.source.splitlines() if line.startswith("#|")]
        if cell.cell_type == "code" and "#|gpu" in lines and not torch.cuda.is_available():
            cell.cell_type = "raw"
            del cell["outputs"], cell["execution_count"]
    nbformat.write(nb, path)


def run_all(page):
    "Runs all cells by the menu, and waits for the last one or the first error; the state at the end."
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    began = time.monotonic()
    while page.evaluate(STATE)["status"] != "idle":
        dialog = page.locator(".jp-Dialog")
        assert not dialog.count(), f"a learner is asked first: {dialog.inner_text()}"
        assert time.monotonic() - began < 90, "no kernel"
        page.wait_for_timeout(300)
    page.wait_for_timeout(1000)  # the status is a little ahead of the session
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    state, began, still = {}, time.monotonic(), 0
    # `status` says idle between two cells, and whenever a widget is answered: the stars beside the cells do not
    while time.monotonic() - began < LIMIT and still < 2:
        page.wait_for_timeout(1000)
        state = page.evaluate(STATE)
        still = still + 1 if not state["waiting"] else 0
    page.wait_for_timeout(500)  # what is drawn last
    return page.evaluate(STATE) | {"seconds": round(time.monotonic() - began)}


def keep(page, name, state):
    "A picture of the whole notebook, as high as it is, and a line of numbers."
    folder = os.environ.get("FTNB_SHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with open(Path(folder) / "lab.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"notebook": name} | state) + "\n")
        page.set_viewport_size({"width": 1200, "height": min(16_000, state.get("height", 0) + 200)})
        page.evaluate("document.querySelector('.jp-Notebook .jp-WindowedPanel-outer').scrollTop = 0")
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(folder) / f"lab_{name}.png"))
        if state["widgets"]:
            page.set_viewport_size({"width": 1200, "height": 900})
            page.locator(".jp-OutputArea-output .jupyter-widgets").first.scroll_into_view_if_needed()
            page.screenshot(path=str(Path(folder) / f"lab_{name}_widget.png"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_runs_whole_with_its_widgets_and_without_an_error(lab, browser, notebook):
    address, token, root = lab
    without_gpu_cells(root / "nbs" / notebook.name)
    page, said = browser.new_context(viewport={"width": 1200, "height": 900}).new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: said.append(f"{error}\n{error.stack}"))
    page.on("console", lambda m: said.append(f"{m.text} {m.location}") if m.type == "error" else None)
    try:
        page.goto(f"{address}/lab/tree/nbs/{notebook.name}?reset&token={token}")
        state = run_all(page)
        text = page.locator(".jp-Notebook").inner_text()
        keep(page, notebook.stem, state | {"said": said})
    finally:
        page.context.close()
        kernels = json.load(urllib.request.urlopen(f"{address}/api/kernels?token={token}"))
        for kernel in kernels:
            end = urllib.request.Request(
                f"{address}/api/kernels/{kernel['id']}?token={token}", method="DELETE"
            )
            urllib.request.urlopen(end)
    assert state["errors"] == []
    assert state["done"] == state["all"] > 0, f"not finished in {LIMIT} s"
    assert not [f for f in FALLBACKS if f in text], "a widget is not drawn"
    assert state["drawn"] >= state["widgets"] and state["broken"] == 0
    assert said == []
