"""Shared by all tests: no network, no display, workers side by side, and a table of notebook seconds at the end."""

import gc
import os
import shutil
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background job: children inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
if WORKERS > 1:  # each worker, and what it starts, has its share of the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # who takes more does not spin

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))
WORKSHOPS = sorted((ROOT / "nbs").glob("1[0-9]_*.ipynb"))
DEALT = ("test_notebooks.py", "test_workshops.py")  # files whose tests share nothing and take long
ALONE = {"01d_scale"}  # notebooks that assert how seconds grow


def pytest_collection_modifyitems(items):
    for item in items:
        if "notebook" in getattr(item, "fixturenames", ()) and item.callspec.params["notebook"].stem in ALONE:
            item.add_marker("alone")


def pytest_collection_finish():
    gc.freeze()  # the libraries loaded by now stay: statsmodels collects at each call, a second with all of them


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file stays on one worker, as its fixtures are dear (and the site is one folder); notebooks are dealt out one by one."
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(DEALT) else file

    # not xdist's own groups: its 3.8 loses them, silently, with pytest 9.2 (pytest-xdist issue 1386)
    return ByFile(config, log) if config.getvalue("dist") == "loadscope" else None


PLACES = {}  # file: the workers that ran a test of it


def pytest_runtest_logreport(report):
    file = report.nodeid.partition("::")[0]
    if hasattr(report, "node") and not file.endswith(DEALT):
        PLACES.setdefault(file, set()).add(report.node.gateway.id)


def scattered():
    return {file: sorted(workers) for file, workers in PLACES.items() if len(workers) > 1}


def pytest_sessionfinish(session):
    if scattered():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@contextmanager
def held(name, exclusive):
    "A lock that all workers share."
    import fcntl

    with open(Path(tempfile.gettempdir()) / f"ftnb-tests-{os.getuid()}-{name}", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    "A test marked alone runs while no other does: it waits at the door, and nobody passes it there."
    if WORKERS == 1 or os.name == "nt":
        return (yield)
    alone = item.get_closest_marker("alone") is not None
    with held("door", True):
        room = held("room", alone)
        room.__enter__()
    try:
        return (yield)
    finally:
        room.__exit__(None, None, None)


def pytest_terminal_summary(terminalreporter):
    for file, workers in scattered().items():
        terminalreporter.write_line(f"{file} was not kept on one worker: {workers}", red=True)
    took = {
        r.nodeid: r.duration
        for r in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    }
    for name, seconds in took.items():
        if "test_notebook[" in name:
            terminalreporter.write_line(f"{name.split('[')[1].rstrip(']'):<16} {seconds:6.1f} s")


@pytest.fixture
def one_thread():
    "Two threads on matrices this small wait for each other."
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def browser():
    "Chromium without a window; tests that ask for it skip, visibly, where there is none."
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no chromium or google-chrome on PATH")
    with sync_api.sync_playwright() as p:
        started = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield started
        finally:
            started.close()
