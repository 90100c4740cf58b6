"""Workshop mode: checks that never raise, copies without answers, the teacher's page, and an archive that runs."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import nbformat
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT
from ftnb.plan import InputError
from ftnb.workshop import (
    SIGNS,
    Wheel,
    build,
    check,
    code_hash,
    read_wheels,
    read_workshop,
    student,
    teacher_page,
    wheel_of,
)

TEACHER = "<!-- teacher: {} minutes -->\nAsk first.\n\n- Many count **all** rows: `len(rows)`.\n- Some <b>shout</b>."
IMPORTS = "from collections import Counter\n\nfrom ftnb.workshop import check"
ASK = """#| exercise: rarest
# Which label is rarest?
# solution: rarest, how_often
counts = Counter(labels)
rarest, how_often = min(counts.items(), key=lambda pair: pair[1])
# end of solution"""
CHECK = """#| check: rarest
check(
    "rarest",
    (rarest, how_often),
    lambda a: a == ("help", labels.count("help")) or "count the labels of all rows",
    hints=["`Counter` counts.", "`min` takes a `key`."],
)"""
WRITE = """#| exercise: recall
# Write recall: the part of the rows of `label` that were found.
def recall(label, found):
    hits = sum(f == label for f in found)
    # solution: return
    return hits / labels.count(label)
    # end of solution"""
TRY = '#| check: recall\ncheck("recall", recall, lambda f: f("help", ["help", "greet"]) == 0.5 or "two rows are help")'


def md(text):
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def code(text, *outputs):
    return {
        "cell_type": "code",
        "metadata": {},
        "execution_count": None,
        "outputs": list(outputs),
        "source": text,
    }


def shown(text):
    return {"output_type": "stream", "name": "stdout", "text": [text]}


def cells():
    return [
        md("# Workshop: counting\n\n> See what a rare class is."),
        md("## What the guide says, and what we measure\n\nLittle."),
        code(IMPORTS),
        md("## Rare classes"),
        md(TEACHER.format(50)),
        code('labels = ["greet"] * 5 + ["help"] * 2'),
        code(ASK),
        code(CHECK, shown("✓ Right · rarest, as ('help', 2)")),
        code("counted = Counter(labels)\ncounted", shown("Counter({'greet': 5, 'help': 2})")),
        md("## Recall\n\nOf one class; see [plan](plan.html#x) and [the next](11_conversation.ipynb)."),
        md(TEACHER.format(25)),
        code(WRITE),
        code(TRY),
        code("#| slow\nraise SystemError", shown("kept")),
        md("## What to take home\n\nCount."),
    ]


def written(folder, made=None, name="10_counting"):
    made = cells() if made is None else made
    for n, cell in enumerate(made):
        cell["id"] = f"cell{n}"
    path = Path(folder) / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), "utf-8")
    return path


def texts(book, kind="code"):
    return ["".join(c["source"]) for c in book["cells"] if c["cell_type"] == kind]


# --- check


def test_each_wrong_answer_earns_a_hint_and_a_right_one_begins_anew():
    def ask(answer):
        return check("hints", answer, lambda a: a == 4 or f"{a} is not 4", ["one", "two"])

    assert [len(ask(n).hints) for n in (1, 2, 3)] == [1, 2, 2]
    assert str(ask(1)).splitlines() == [
        f"{SIGNS['wrong']} · hints: 1 is not 4",
        "  Hint 1 of 2: one",
        "  Hint 2 of 2: two",
    ]
    assert ask(...).hints == () and ask(4) and not ask(4).hints
    assert ask(5).hints == ("Hint 1 of 2: one",)
    assert check("text", 1, lambda a: False, "one hint as text").hints == ("Hint 1 of 1: one hint as text",)


class Odd:
    "An object that lets nobody do anything."

    def __eq__(self, other):
        raise RuntimeError("no")

    __hash__ = __bool__ = __repr__ = __str__ = __len__ = __iter__ = __lt__ = __getitem__ = __eq__


class Speechless(Exception):
    def __str__(self):
        raise RuntimeError("no")


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just(...)
    | st.builds(Odd)
    | st.just(np.arange(3))
    | st.just(int)
    | st.just(len),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=5,
)
errors = st.sampled_from(
    [KeyError("k"), ValueError(), Speechless(), SystemExit(3), AssertionError("said"), RecursionError()]
)


@settings(max_examples=150, deadline=None)
@given(values, values | errors, st.lists(st.text(), max_size=3))
def test_a_check_never_raises_and_is_in_one_of_three_states(answer, verdict, hints):
    def right(_):
        if isinstance(verdict, BaseException):
            raise verdict
        return verdict

    found = check("any", answer, right, hints)
    assert found.state in SIGNS and bool(found) is (found.state == "right")
    assert str(found).startswith(SIGNS[found.state]) and SIGNS[found.state] in found._repr_html_()
    assert found.why or found
    if answer is ...:
        assert found.state == "open"
    if isinstance(verdict, str | BaseException):
        assert not found, "a text is what is wrong, also an empty one"


@pytest.mark.parametrize("answer", ["3", None, [1], {"a": 1}, np.arange(3), Odd(), lambda: 3, int])
def test_a_strange_type_is_named(answer):
    found = check("number", answer, lambda a: 2 < a < 4)
    assert found.state == "wrong" and "another kind or form is expected" in found.why
    assert ("None" if answer is None else type(answer).__name__) in found.why


def test_a_function_of_the_learner_is_told_from_the_check():
    def leaves(row):
        raise SystemExit(1)

    def half(row):
        return (row, ...)

    def argues(row):
        assert row == 1, "not a row"

    right = lambda f: f(2) == 4 or "f(2) is 4"  # noqa: E731
    assert check("f", lambda x: 2 * x, right).state == "right"
    assert check("f", lambda x: x, right).why == "f(2) is 4"
    assert check("f", lambda x: ..., right).state == check("f", half, right).state == "open"
    assert "your function raised `SystemExit: 1`" in check("f", leaves, right).why
    assert "your function raised `AssertionError: not a row" in check("f", argues, right).why
    assert "your function raised `TypeError" in check("f", lambda: 1, right).why
    assert check("f", len, right).state == "wrong"


def test_a_check_that_expects_an_error_may():
    def right(f):
        try:
            f(-1)
        except ValueError:
            return True
        return "a negative number must be refused"

    def refuses(n):
        raise ValueError(n)

    assert check("e", refuses, right) and not check("e", abs, right)


def test_markup_of_answers_and_hints_stays_text():
    found = check("<i>x</i>", 1, lambda a: "use `a<b` & not <script>", ["<img src=x>"])
    page = found._repr_html_()
    assert (
        "<script" not in page and "<img" not in page and "<i>" not in page and "<code>a&lt;b</code>" in page
    )
    assert page.count("<div") == page.count("</div") == 1


# --- reading


def change(n, text):
    def changed():
        made = cells()
        made[n] = made[n] | {"source": text}
        return made

    return changed


def without(n):
    return lambda: cells()[:n] + cells()[n + 1 :]


def with_cell(n, cell):
    return lambda: cells()[:n] + [cell] + cells()[n:]


BROKEN = {
    "no end": (change(6, ASK.replace("\n# end of solution", "")), 7, "without # end of solution"),
    "no begin": (change(6, ASK.replace("# solution: rarest, how_often\n", "")), 7, "without # solution"),
    "two begins": (change(6, ASK.replace("counts =", "# solution: x\ncounts =")), 7, "inside another"),
    "no solution": (change(6, "#| exercise: rarest\nrarest = 1"), 7, "an exercise without"),
    "no names": (change(6, ASK.replace(": rarest, how_often", ":")), 7, "names nothing"),
    "not assigned": (
        change(6, ASK.replace("how_often\ncounts", "least\ncounts")),
        7,
        "does not assign least",
    ),
    "no return": (change(11, WRITE.replace("return hits", "x = hits")), 12, "does not assign return"),
    "half a statement": (change(6, ASK.replace("key=lambda pair: pair[1])\n", "\n")), 7, "no Python"),
    "rest is no python": (change(11, WRITE.replace("    # sol", "    if hits:\n    # sol")), 12, "Python"),
    "no check": (without(7), 8, "no #| check: rarest right after it"),
    "check of another": (change(7, CHECK.replace("check: rarest", "check: other")), 8, "no #| check: rarest"),
    "check alone": (without(6), 7, "check rarest without its exercise"),
    "text between": (with_cell(7, md("Think.")), 8, "no #| check: rarest"),
    "exercise at the end": (lambda: cells()[:7], 7, "no #| check: rarest"),
    "twice": (lambda: cells()[:9] + cells()[6:], 10, "a second exercise named rarest"),
    "solution elsewhere": (change(8, "# solution: x\nx = 1\n# end of solution"), 9, "outside an exercise"),
    "borrowed": (change(8, "print(rarest)"), 9, "uses rarest, which only exercise rarest assigns"),
    "borrowed in text": (change(8, "f'{how_often:.2f}'"), 9, "uses how_often"),
    "borrowed in a function": (change(8, "def f():\n    return [rarest for _ in labels]"), 9, "uses rarest"),
    "borrowed by another exercise": (
        change(11, WRITE.replace("hits =", "rarest; hits =")),
        12,
        "uses rarest",
    ),
    "borrowed helper": (change(8, "counts.most_common()"), 9, "uses counts"),
    "added to": (change(8, "how_often += 1"), 9, "uses how_often"),
    "no minutes": (change(4, "<!-- teacher: soon -->\nHello."), 5, "a teacher cell without minutes"),
    "no time": (change(4, "<!-- teacher: 0 minutes -->\nHello."), 5, "a teacher cell without minutes"),
    "nothing said": (change(4, "<!-- teacher: 9 minutes -->"), 5, "a teacher cell without minutes"),
    "teacher late in its cell": (
        change(4, "Hello.\n" + TEACHER.format(3)),
        5,
        "a teacher cell without minutes",
    ),
    "no teacher": (without(4), 4, "section 'Rare classes' has no cell for the teacher"),
    "two teachers": (with_cell(5, md(TEACHER.format(3))), 4, "two teacher cells in section 'Rare classes'"),
    "no python": (change(8, "counted ="), 9, "no Python"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_notebook_is_refused_where_it_is(name, tmp_path):
    made, cell, told = BROKEN[name]
    path = written(tmp_path, made())
    for use in (read_workshop, student, lambda p: teacher_page([p])):
        with pytest.raises(InputError) as error:
            use(path)
        line = str(error.value)
        assert f"10_counting.ipynb, cell {cell}" in line and told in line and "\n" not in line, line


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"cells": 3}', '{"cells": [{}]}', '{"cells": []}', None])
def test_a_file_that_is_no_notebook_is_refused(text, tmp_path):
    path = tmp_path / "10_torn.ipynb"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match="10_torn"):
        read_workshop(path)


def test_a_notebook_needs_a_title_and_a_section(tmp_path):
    with pytest.raises(InputError, match="# Title and > promise"):
        read_workshop(written(tmp_path, cells()[1:]))
    with pytest.raises(InputError, match="no section"):
        read_workshop(written(tmp_path, cells()[:1]))


@pytest.mark.parametrize(
    "later",
    ["rarest = 'help'\nrarest", "rarest, how_often = 1, 2\nprint(rarest)", "[rarest for rarest in labels]",
     "def f(rarest):\n    return rarest", "def f():\n    counts = 0\n    counts += 1", "%timeit labels\nlabels"],
)  # fmt: skip
def test_a_name_bound_anew_is_not_borrowed(later, tmp_path):
    made = cells()
    made[8] = code(later)
    assert read_workshop(written(tmp_path, made)).minutes == 75


# --- the student's copy


def test_the_copy_has_no_answers_and_runs_with_none(tmp_path):
    path = written(tmp_path)
    before = path.read_bytes()
    book = student(path)
    assert path.read_bytes() == before
    nbformat.validate(nbformat.from_dict(book))
    ids = [c["id"] for c in book["cells"]]
    assert len(set(ids)) == len(ids) == len(cells()) - 2 + 1
    whole = json.dumps(book, ensure_ascii=False)
    for gone in (
        "solution:",
        "end of solution",
        "teacher",
        "min(counts",
        "hits / labels",
        "Counter({",
        "✓ Right",
    ):
        assert gone not in whole, gone
    assert {o["text"][0] for c in book["cells"] for o in c.get("outputs", ())} == {"kept"}, "the slow cell's"
    asked = texts(book)
    assert asked[2] == (
        "#| exercise: rarest\n# Which label is rarest?\nrarest = ...  # your answer\nhow_often = ...  # your answer"
    )
    assert asked[5].endswith("    hits = sum(f == label for f in found)\n    return ...  # your answer")
    folded = [
        c["metadata"].get("jupyter", {}).get("source_hidden")
        for c in book["cells"]
        if c["cell_type"] == "code"
    ]
    assert folded == [None, None, None, True, None, None, True, None]
    shared = {}
    for source in asked[:-1]:
        exec(source, shared)
    for name in (3, 6):
        assert eval(asked[name], shared).state == "open"
    exec("rarest, how_often = 'help', 2\ndef recall(label, found):\n    return 0.5", shared)
    assert all(eval(asked[name], shared) for name in (3, 6))


names = st.lists(st.sampled_from(["a", "b1", "c_c", "total"]), min_size=1, max_size=3, unique=True)


@settings(max_examples=60, deadline=None)
@given(names, st.integers(0, 2), st.lists(st.integers(0, 99), max_size=4), st.sampled_from([", ", " ", ","]))
def test_no_line_of_a_solution_survives(tmp_path_factory, wanted, depth, lines, joined):
    indent = "    " * depth
    opened = [f"{'    ' * d}if True:" for d in range(depth)]
    solution = [f"{indent}secret{n} = {n}" for n in lines] + [f"{indent}{n} = 'secret'" for n in wanted]
    source = ["#| exercise: x", "# Ask.", *opened, f"{indent}# solution: {joined.join(wanted)}", *solution]
    made = cells()
    made[6], made[7] = (
        code("\n".join([*source, f"{indent}# end of solution", "after = 1"])),
        code("#| check: x\n1"),
    )
    path = written(tmp_path_factory.getbasetemp() / "any", made)
    asked = texts(student(path))[2].splitlines()
    assert asked == [
        *source[: 2 + depth],
        *(f"{indent}{n} = ...  # your answer" for n in wanted),
        "after = 1",
    ]
    exercise = read_workshop(path).exercises[0]
    assert exercise.solution.splitlines() == [line[4 * depth :] for line in solution]
    assert exercise.question == "Ask."


# --- the teacher's page

TIMES = {
    "machine": "2 cores", "rows": None, "wall": 31.0, "cpu": 60.0,
    "sections": [
        {"title": "What the guide says, and what we measure", "wall": 3.0, "cpu": 3.0},
        {"title": "Rare classes", "wall": 21.4, "cpu": 42.0}, {"title": "Recall", "wall": 6.6, "cpu": 15.0},
    ],
    "cells": [{"section": "Rare classes", "first": "run = train(<recipe>)", "wall": 20.6, "cpu": 40.0}],
}  # fmt: skip


def page_of(path, **changed):
    times = TIMES | {"code": code_hash(path)} | changed
    return teacher_page([path], {"notebooks": {path.stem: times}})


def test_the_teachers_page_says_when_what_and_how_long(tmp_path):
    page = page_of(written(tmp_path))
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert ["Rare classes", "0:00", "50", "21 s", "42 s", "1"] in rows
    assert ["Recall", "0:50", "25", "7 s", "15 s", "1"] in rows
    assert ["End", "1:15", "75", "31 s", "60 s", "2"] in rows
    assert "Begins at 0:50, 25 minutes planned." in page
    assert "21 s: <code>run = train(&lt;recipe&gt;)</code>" in page
    assert "<li>Many count <strong>all</strong> rows: <code>len(rows)</code>.</li>" in page
    assert "<b>" not in page and "Some &lt;b&gt;shout&lt;/b&gt;" in page
    for exercise in ("min(counts.items()", "return hits / labels.count(label)"):
        assert re.search(r"<details><summary>[^\0]*?" + re.escape(exercise) + r"[^\0]*?</details>", page)
    assert not re.search(r"(src|href)=[\"'](?!#)", page), "it needs no other file"
    assert "has changed since" not in page


def test_the_page_says_what_was_not_measured_or_is_old(tmp_path):
    path = written(tmp_path)
    assert "Not measured yet" in teacher_page([path]) and "Not measured yet" not in page_of(path)
    made = cells()
    made[5]["source"] += "  # more"
    changed = written(tmp_path / "new", made)
    assert "The code has changed since" in page_of(changed, code=code_hash(path))
    assert "with FTNB_ROWS=48" in page_of(path, rows=48)


@pytest.mark.parametrize("width", [360, 1280])
def test_axe_finds_nothing_on_the_teachers_page(width, browser, tmp_path):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    )
    file = tmp_path / "teacher.html"
    shops = sorted((ROOT / "nbs").glob("1[0-9]_*.ipynb"))
    made = page_of(written(tmp_path)) if not shops else teacher_page(shops, kept_times())
    file.write_text(made, encoding="utf-8")
    page, said = browser.new_context(viewport={"width": width, "height": 800}).new_page(), []
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(file.as_uri())
    if width < 1000:
        page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = true))")
    found = axe.Axe().run(page).response["violations"]
    assert not {v["id"]: v["nodes"][0]["html"][:200] for v in found}
    assert page.evaluate("document.documentElement.scrollWidth") <= width and not said
    page.evaluate("document.querySelectorAll('details').forEach((d) => (d.open = false))")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every((d) => d.open)"), "open on paper"
    if folder := os.environ.get("FTNB_SHOTS"):
        page.screenshot(path=f"{folder}/teacher_{width}.png", full_page=True)
        page.pdf(path=f"{folder}/teacher_{width}.pdf") if width > 1000 else None


# --- the archive


@pytest.fixture
def repository(tmp_path):
    "A repository of one workshop, with a wheel that is none."
    root = tmp_path / "repository"
    written(root / "nbs")
    written(root / "nbs", [*cells(), code('open("../docs/told.json")')], "11_conversation")
    written(root / "nbs", name="00_plan")
    (root / "docs").mkdir()
    (root / "docs" / "told.json").write_text('{"a": 1}')
    (root / "docs" / "other.json").write_text("{}")
    (root / "constraints.txt").write_text("torch==2.13.0\n")
    other = root / "dist" / "some_thing-1.0+cpu-py3-none-any.whl"
    other.parent.mkdir()
    other.write_bytes(b"some thing" * 1000)
    (root / "docs" / "wheels.txt").write_text(f"# python: 3.12\n# platform: Minix\n{wheel_of(other)}\n")
    own = root / "dist" / "ftnb-0.1.0-py3-none-any.whl"
    own.write_bytes(b"ftnb")
    return root, own, other


def test_an_archive_holds_all_and_the_same_input_gives_the_same_bytes(repository, tmp_path):
    root, own, other = repository
    small = build(root, tmp_path / "a" / "w.zip", [own])
    os.utime(own, (0, 0))
    os.utime(root / "constraints.txt", (0, 0))
    assert build(root, tmp_path / "b" / "w.zip", [str(own)]).sha256 == small.sha256
    full = build(root, tmp_path / "c" / "w.zip", [other, own])
    with zipfile.ZipFile(small.path) as archive:
        assert archive.testzip() is None
        names = {i.filename for i in archive.infolist()}
        held = {n.removeprefix("w/"): archive.read(n) for n in names}
        assert {i.date_time[0] for i in archive.infolist()} == {1980}
    assert set(held) == {
        "INSTALL.md", "constraints.txt", "wheels.txt", "teacher.html", "docs/told.json", f"wheels/{own.name}",
        *(f"{f}/{n}.ipynb" for f in ("student", "solutions") for n in ("10_counting", "11_conversation")),
        "notebooks/00_plan.ipynb",
    }  # fmt: skip
    assert {n: len(d) for n, d in held.items()} == small.sizes
    student_text, solved = (
        held["student/10_counting.ipynb"].decode(),
        held["solutions/10_counting.ipynb"].decode(),
    )
    assert "min(counts" not in student_text and "min(counts" in solved and "✓ Right" in solved
    assert "teacher" not in student_text + solved
    assert "](../notebooks/00_plan.ipynb) and [the next](../student/11_conversation.ipynb)" in student_text
    lines = held["wheels.txt"].decode().splitlines()
    assert lines[2:] == [str(wheel_of(own)), str(wheel_of(other))] and wheel_of(other).name == "some-thing"
    told = held["INSTALL.md"].decode()
    assert "Python 3.12" in told and "Minix" in told and "Fetch the other 1 once" in told and "{" not in told
    with zipfile.ZipFile(full.path) as archive:
        assert "All 2 wheels are in" in archive.read("w/INSTALL.md").decode()
        assert archive.read(f"w/wheels/{other.name}") == other.read_bytes()
    assert full._repr_markdown_().splitlines()[-1].startswith("| wheels | 2 | 10.0 |")


def test_a_failed_build_leaves_what_was_there(repository, tmp_path):
    root, own, other = repository
    out = tmp_path / "w.zip"
    out.write_bytes(b"before")
    (tmp_path / "ftnb-0.2.0-py3-none-any.whl").write_bytes(b"x")
    wrong = tmp_path / other.name
    wrong.write_bytes(b"another")
    for wheels, told in (
        ([], "no wheel of ftnb"),
        ([other], "no wheel of ftnb"),
        ([own, wrong], "the list has some-thing==1.0"),
        ([own, tmp_path / "gone-1-py3-none-any.whl"], "not a wheel"),
        ([own, root / "constraints.txt"], "not a wheel"),
    ):
        with pytest.raises(InputError, match=told):
            build(root, out, wheels)
    (root / "docs" / "wheels.txt").write_text(f"{wheel_of(other)}\n{Wheel('more', '1', 'a' * 64)}\n")
    with pytest.raises(InputError, match="1 wheels are missing, such as more"):
        build(root, out, [own, other])
    with pytest.raises(InputError, match="cannot write"):
        build(root, root / "constraints.txt" / "w.zip", [own])
    (root / "nbs" / "10_counting.ipynb").write_text("torn")
    with pytest.raises(InputError, match="10_counting"):
        build(root, out, [own])
    for path in (root / "nbs").glob("1*"):
        path.unlink()
    with pytest.raises(InputError, match="no workshop"):
        build(root, out, [own])
    assert out.read_bytes() == b"before"
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith(".")) == []


@pytest.mark.parametrize(
    "line", ["torch", "torch==2", "torch>=2 --hash=sha256:" + "a" * 64, "t==1 --hash=sha256:abc"]
)
def test_a_list_of_wheels_without_hash_is_refused(line):
    with pytest.raises(InputError, match=r"wheels.txt, line 2: expected NAME==VERSION"):
        read_wheels(f"# fine\n{line}\n")


# --- this repository


def tool():
    spec = importlib.util.spec_from_file_location("ftnb_workshop_tool", ROOT / "tools/workshop.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pins(text):
    lines = (x for x in text.splitlines() if x and not x.startswith("#"))
    return {canonicalize_name(k): v for k, v in (line.split("==") for line in lines)}


def test_the_list_of_wheels_is_what_was_tested():
    listed = {w.name: w for w in read_wheels((ROOT / "docs/wheels.txt").read_text("utf-8"))}
    tested = pins((ROOT / "constraints.txt").read_text("utf-8"))
    for name, wheel in listed.items():
        assert wheel.version.split("+")[0] == tested.get(name, wheel.version.split("+")[0]), (
            f"{wheel}: constraints.txt has {tested[name]}; run  python tools/workshop.py --lock"
        )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    needed = {canonicalize_name(Requirement(r).name) for r in project["dependencies"]}
    assert needed | {"jupyterlab", "anywidget", "llguidance"} <= set(listed)
    assert {str(w) for w in tool().assets()} <= {str(w) for w in listed.values()} and "ftnb" not in listed


def test_measuring_runs_the_notebook_and_names_the_cell_that_fails(tmp_path, monkeypatch):
    module = tool()
    monkeypatch.setattr(module, "SLOW", 0.2)
    made = cells()
    made[8] = code("# wait\nimport time; time.sleep(0.3); sum(i for i in range(10**6))")
    found = module.run(written(tmp_path, made))
    assert [s["title"] for s in found["sections"]] == [
        s.title for s in read_workshop(tmp_path / "10_counting.ipynb").sections
    ]
    assert [(c["section"], c["first"]) for c in found["cells"]] == [
        ("Rare classes", made[8]["source"].splitlines()[1])
    ]
    assert 0 < found["sections"][1]["cpu"] < found["sections"][1]["wall"] <= found["wall"] + 0.1 < 30
    made[8] = code("1 / 0")
    with pytest.raises(InputError, match="10_counting.ipynb, cell 9: ZeroDivisionError"):
        module.run(written(tmp_path, made))


INSIDE = """
import sys, warnings
from execnb.shell import CaptureShell
import ftnb.workshop
assert ".whl" in ftnb.workshop.__file__, ftnb.workshop.__file__
import nbformat
shell, said = CaptureShell("."), []
for cell in nbformat.read(sys.argv[1], 4).cells:
    if cell.cell_type == "code" and "#| slow" not in cell.source:
        out = shell.run(cell.source)
        assert not shell.exc, (cell.source, shell.exc)
        said += [str(o) for o in out if "#| check" in cell.source]
print(len(said), sum("Not answered yet" in s for s in said))
"""


def zipped(folder):
    "The package as Python reads it from a wheel, without pip's time to make one."
    path = folder / "ftnb-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file in (ROOT / "ftnb").glob("*.py"):
            archive.write(file, f"ftnb/{file.name}")
    return path


@pytest.mark.parametrize("maker", [zipped, pytest.param("own_wheel", marks=pytest.mark.slow)])
def test_a_notebook_of_the_archive_runs_with_nothing_answered_and_no_network(repository, tmp_path, maker):
    root, _, _ = repository
    (tmp_path / "made").mkdir()
    own = (maker if callable(maker) else getattr(tool(), maker))(tmp_path / "made")
    archive = build(root, tmp_path / "w.zip", [own])
    with zipfile.ZipFile(archive.path) as packed:
        packed.extractall(tmp_path / "room")
    room = tmp_path / "room" / "w"
    command = [sys.executable, "-c", INSIDE, "10_counting.ipynb"]
    if (
        shutil.which("unshare")
        and subprocess.run(["unshare", "-n", "true"], capture_output=True).returncode == 0
    ):
        command = ["unshare", "-n", *command]
    env = os.environ | {"PYTHONPATH": str(room / "wheels" / own.name)}
    done = subprocess.run(command, cwd=room / "student", env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["2", "2"], done.stdout + done.stderr[-2000:]


@pytest.mark.slow
def test_the_same_source_gives_the_same_wheel(tmp_path):
    made = []
    for name in "ab":
        (tmp_path / name).mkdir()
        made.append(wheel_of(tool().own_wheel(tmp_path / name)))
    assert made[0] == made[1]


def test_the_tool_says_in_one_line_what_stands_in_the_way(capsys):
    assert tool().main(["--measure", "99_absent"]) == 2
    assert capsys.readouterr().err.startswith("workshop: no workshop '99_absent'")


def kept_times():
    path = ROOT / "docs/workshop.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else {"notebooks": {}}
