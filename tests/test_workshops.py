"""The workshops themselves: each runs, its checks say right to the solutions, and the rest needs no answer."""

import json
import os

import pytest

from conftest import ROOT, WORKSHOPS
from ftnb.workshop import MINUTES, read_workshop
from toys import Forked, toy_model

each_workshop = pytest.mark.parametrize("notebook", WORKSHOPS, ids=lambda p: p.stem)
each_model = pytest.mark.parametrize("model", ["toy", pytest.param("real", marks=pytest.mark.slow)])
ROWS = {"toy": "24", "real": "48"}  # of each training; the stored outputs come from the full size
RUN = """
import json, sys
from pathlib import Path
from execnb.shell import CaptureShell
from ftnb.workshop import SIGNS, read_workshop
from toys import stand_in

if sys.argv[2:]:
    stand_in(sys.argv[2])
workshop = read_workshop(sys.argv[1])
shell, told = CaptureShell(Path(sys.argv[1]).parent), {"right": [], "open": [], "odd": []}
ODD = ("None", "-1.5", "''", "[]", "{}", "object()", "'what?'", "(1, 2, 3)")


def run(n, source):
    out = shell.run(source, timeout=900)
    if shell.exc:
        line = f"cell {n + 1}: {type(shell.exc).__name__}: {shell.exc}"
        sys.exit(f"{line}\\n{source}\\n{out}")
    shown = [str(o.get("data", {}).get("text/plain", "")) for o in out]
    return [s for s, sign in SIGNS.items() if any(sign in text for text in shown)]


asked = {e.cell: e for e in workshop.exercises}
for n in workshop.runs:
    source = workshop.cells[n]["source"]
    said = run(n, source)
    if n - 1 not in asked:
        continue
    exercise = asked[n - 1]
    told["right"].append((exercise.name, said))
    lines = exercise.asked.splitlines()
    names = [x.split(" = ...")[0] for x in lines if x.endswith(" = ...  # your answer") and x[0] != " "]
    for odd in ODD if names else ():
        run(n, "; ".join(f"{name} = {odd}" for name in names))
        told["odd"].append((exercise.name, run(n, source)))
    run(n - 1, exercise.asked)  # from here on as it is for a learner who leaves the exercise out
    told["open"].append((exercise.name, run(n, source)))
print("\\n" + json.dumps(told))
"""


def test_there_are_workshops():
    assert [p.stem[:2] for p in WORKSHOPS] == ["10", "11", "12", "13"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@each_model
@each_workshop
def test_notebook(notebook, model, tmp_path):
    given = [toy_model(tmp_path / "model")] if model == "toy" else []
    process = Forked(notebook, *given, cwd=notebook.parent, code=RUN, FTNB_ROWS=ROWS[model], IN_TEST="1")
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, f"{notebook.name}:\n{out[-2000:]}{err[-6000:]}"
    told = json.loads(out.splitlines()[-1])
    names = [e.name for e in read_workshop(notebook).exercises]
    assert told["right"] == [[name, ["right"]] for name in names], (
        "a solution that its own check does not take"
    )
    assert told["open"] == [[name, ["open"]] for name in names], "a question without answer that is judged"
    assert {state for _, said in told["odd"] for state in said} <= {"wrong", "right", "open"}
    assert all(len(said) == 1 for _, said in told["odd"])
    taken = [name for name, said in told["odd"] if said == ["right"]]
    assert not taken, f"a check that takes any answer: {taken}"


@each_workshop
def test_a_workshop_fits_a_class_and_a_laptop(notebook):
    low, high = MINUTES
    assert low <= read_workshop(notebook).minutes <= high
    kept = ROOT / "docs/workshop.json"
    found = json.loads(kept.read_text("utf-8"))["notebooks"] if kept.exists() else {}
    if notebook.stem not in found:
        pytest.skip(f"not measured yet: run  python tools/workshop.py --measure {notebook.stem}")
    times = found[notebook.stem]
    assert times["rows"] is None, "measured at another size than a class gets"
    assert 0 < times["cpu"] < 600
    assert [s["title"] for s in times["sections"]] == [s.title for s in read_workshop(notebook).sections]


@each_workshop
def test_stored_checks_say_right(notebook):
    workshop = read_workshop(notebook)
    for exercise in workshop.exercises:
        stored = json.dumps(workshop.cells[exercise.cell + 1].get("outputs", []), ensure_ascii=False)
        assert "✓ Right" in stored, f"{exercise.name}: run the notebook at its full size and keep its outputs"
