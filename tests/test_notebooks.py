"""Every notebook, top to bottom, each in a process of its own, in its own folder; workshops: test_workshops.py."""

import os
from tempfile import TemporaryDirectory

import pytest
from nbdev.test import test_nb as run_nb

from conftest import ROOT, WORKSHOPS
from toys import Forked, toy_model

# notebooks that only need some model: a toy with weights of this spread, and with `slow` the real one
TOYS = {"06b_engine": 0.02, "06d_server": 0.02, "06f_chat": 0.3, "06h_report": 0.02}
NOTEBOOKS = [p for p in sorted((ROOT / "nbs").glob("*.ipynb")) if p not in WORKSHOPS]
RUN = "import sys; from toys import stand_in; sys.argv[2:] and stand_in(sys.argv[2])\n"
RUN += "from nbdev.test import test_nb; sys.exit(not test_nb(sys.argv[1], skip_flags=['slow', 'gpu'], cell_timeout=900)[0])"


def each_model():
    for path in NOTEBOOKS:
        name, real = path.stem, pytest.mark.slow if path.stem in TOYS else ()
        yield pytest.param(path, None, id=name, marks=real)
        if name in TOYS:
            yield pytest.param(path, TOYS[name], id=f"{name}-toy")


@pytest.mark.parametrize("notebook, spread", each_model())
def test_notebook(notebook, spread, tmp_path):
    if not hasattr(os, "fork"):
        worked, _ = run_nb(notebook, skip_flags=["slow", "gpu"], cell_timeout=900)
        assert worked, f"{notebook.name} failed; the cell and its traceback stand above"
        return
    given = [toy_model(tmp_path / "model", spread)] if spread else []
    with TemporaryDirectory(ignore_cleanup_errors=True) as room:  # whatever the notebook leaves there goes
        process = Forked(notebook, *given, cwd=notebook.parent, code=RUN, TMPDIR=room)  # so does its server
        out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, f"{notebook.name} failed:\n{out[-4000:]}{err[-2000:]}"
