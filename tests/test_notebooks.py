"""Every notebook, top to bottom, each in a fresh shell, in its own folder."""

import os
import subprocess
import sys

import pytest
from nbdev.test import test_nb as run_nb

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUN = "import sys; from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1], skip_flags=['slow', 'gpu'], cell_timeout=900)[0])"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook):
    if notebook.stem < "06b":
        worked, _ = run_nb(notebook, skip_flags=["slow", "gpu"], cell_timeout=900)
        assert worked, f"{notebook.name} failed; the cell and its traceback stand above"
        return
    # a server, its threads and their streams: in a process of its own, as they may outlive the notebook
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(notebook)], capture_output=True, text=True, env=env, timeout=1200
    )
    assert done.returncode == 0, f"{notebook.name} failed:\n{done.stdout[-4000:]}{done.stderr[-2000:]}"
