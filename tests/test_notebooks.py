"""Every notebook, top to bottom, each in a fresh shell, in its own folder."""

import pytest
from nbdev.test import test_nb as run_nb

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook(notebook):
    worked, _ = run_nb(notebook, skip_flags=["slow", "gpu"], cell_timeout=900)
    assert worked, f"{notebook.name} failed; the cell and its traceback stand above"
