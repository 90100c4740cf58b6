"""Every notebook, top to bottom, each in a process of its own, in its own folder; workshops: test_workshops.py."""

import os

import pytest
from nbdev.test import test_nb as run_nb

from conftest import ROOT, WORKSHOPS
from toys import Forked

NOTEBOOKS = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if p not in WORKSHOPS]
RUN = "import sys; from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1], skip_flags=['slow', 'gpu'], cell_timeout=900)[0])"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook):
    if not hasattr(os, "fork"):
        worked, _ = run_nb(notebook, skip_flags=["slow", "gpu"], cell_timeout=900)
        assert worked, f"{notebook.name} failed; the cell and its traceback stand above"
        return
    process = Forked(notebook, cwd=notebook.parent, code=RUN)  # what a server leaves running goes with it
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, f"{notebook.name} failed:\n{out[-4000:]}{err[-2000:]}"
