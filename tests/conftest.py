"""Shared by all tests: no network, no display, and a table of notebook seconds before pytest's closing line."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(Path(__file__).parent))
SECONDS = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[SECONDS] = {}


@pytest.fixture
def seconds(request) -> dict:
    "Notebook name -> seconds it took."
    return request.config.stash[SECONDS]


def pytest_terminal_summary(terminalreporter, config):
    for name, took in config.stash[SECONDS].items():
        terminalreporter.write_line(f"{name:<16} {took:6.1f} s")
