"""Decisions about rows: nothing is lost, nothing is applied twice, and every row that waits for somebody is named."""

import io
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from ftnb.data import Issue, Record
from ftnb.plan import InputError
from ftnb.review import (
    Edit,
    Item,
    agreement,
    apply_edits,
    decide,
    defect_rate,
    edits_from,
    load_edits,
    queue,
    require_review,
    review,
    row_hash,
    save_edits,
    undo,
)


def row(number, text=None, answer="hours"):
    return Record(f"r{number}", ({"role": "user", "content": text or f"row {number}"},), answer, label=answer)


ROWS = [row(n, answer=("hours", "price")[n % 2]) for n in range(8)]
WHEN = "2026-01-31T09:{:02d}:00Z"
decisions = st.lists(
    st.tuples(
        st.integers(0, len(ROWS) - 1),
        st.sampled_from(["keep", "edit", "reject"]),
        st.sampled_from(["ann", "bob", "adjudicator"]),
        st.sampled_from(["hours", "price", "exit"]),
    ),
    max_size=25,
)


def made(drawn):
    edits = []
    for minute, (n, action, who, answer) in enumerate(drawn):
        to = answer if action == "edit" else None
        edits += decide(ROWS[n], action, who, completion=to, time=WHEN.format(minute))
    return edits


@settings(max_examples=150, deadline=None)
@given(decisions)
def test_nothing_is_lost_and_twice_is_as_once(drawn):
    edits = made(drawn)
    done = apply_edits(ROWS, edits)
    assert {r.id for r in done.records} | {r.id for r in done.dropped} == {r.id for r in ROWS}
    assert len(done.records) + len(done.dropped) == len(ROWS)
    assert [r.id for r in done.records] == [r.id for r in ROWS if r.id in {k.id for k in done.records}]
    again = apply_edits(done.records, edits)
    assert again.records == done.records and not again.dropped
    untouched = {r.id for r in ROWS} - {e.id for e in edits}
    assert all(r in done.records for r in ROWS if r.id in untouched)


@settings(max_examples=100, deadline=None)
@given(decisions)
def test_undo_takes_everything_back(drawn):
    edits = made(drawn)
    back = [undo(e, time="2026-02-01T00:00:00Z") for e in edits]
    assert apply_edits(ROWS, [*edits, *back]).records == tuple(ROWS)


@settings(max_examples=50, deadline=None)
@given(decisions, st.randoms(use_true_random=False))
def test_the_order_of_the_lines_does_not_matter(drawn, random):
    edits = made(drawn)
    mixed = random.sample(edits, len(edits))
    assert apply_edits(ROWS, mixed).records == apply_edits(ROWS, edits).records


def test_two_reviewers_who_differ_are_named_and_a_third_settles():
    ann = decide(ROWS[0], "edit", "ann", completion="price", time=WHEN.format(1))
    bob = decide(ROWS[0], "reject", "bob", time=WHEN.format(2))
    done = apply_edits(ROWS, [*ann, *bob])
    assert done.records == tuple(ROWS) and len(done.conflicts) == 1
    assert "ann" in done.report[0].text and "bob" in done.report[0].text and done.report[0].ids == ("r0",)
    third = decide(ROWS[0], "keep", "adjudicator", time=WHEN.format(3))
    settled = apply_edits(ROWS, [*ann, *bob, *third])
    assert not settled.conflicts and settled.records[0].completion == "hours"


def test_an_edit_of_a_row_that_changed_is_refused_by_name():
    edits = decide(ROWS[1], "edit", "ann", completion="exit")
    moved = [replace(r, completion="return") if r.id == "r1" else r for r in ROWS]
    done = apply_edits(moved, edits)
    assert done.records == tuple(moved) and done.refused and done.report[0].ids == ("r1",)
    assert "r1" in done.report[0].text


def test_an_edited_answer_keeps_what_the_old_one_had():
    frame = row(0, answer='{"intent": "exit", "slots": []}')
    for bad, why in (("", "empty"), ("{", "not"), ('{"intent": "exit"}', "slots")):
        with pytest.raises(InputError, match=why):
            decide(frame, "edit", "ann", completion=bad)


KILLED = """
import os, signal, sys
from ftnb.review import Edit, save_edits
for n in range(1000):
    save_edits(sys.argv[1], [Edit(f"r{n}", "keep", "ann", "2026-01-31T09:00:00Z", seen="x")])
    print(n, flush=True)
"""


def test_a_kill_between_two_decisions_loses_none(tmp_path):
    path = tmp_path / "edits.jsonl"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable, "-c", KILLED, str(path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env) as process:
        said = [int(process.stdout.readline()) for _ in range(40)]
        process.kill()
    kept = load_edits(path)
    assert [e.id for e in kept[: len(said)]] == [f"r{n}" for n in said]
    assert len(kept) >= len(said)


def test_two_reviewers_write_one_file_at_once(tmp_path):
    path = tmp_path / "edits.jsonl"
    code = KILLED.replace("range(1000)", "range(30)")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code.replace('"ann"', repr(who)), str(path)], env=env, stdout=-3
        )
        for who in ("ann", "bob")
    ]
    assert [p.wait() for p in both] == [0, 0]
    assert sorted((e.reviewer, e.id) for e in load_edits(path)) == sorted(
        (who, f"r{n}") for who in ("ann", "bob") for n in range(30)
    )


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"id": "r1"}', '{"id": "r1", "action": "burn", "reviewer": "a", "time": "x"}']
)
def test_a_line_that_is_no_edit_is_named(tmp_path, line):
    path = tmp_path / "edits.jsonl"
    save_edits(path, decide(ROWS[0], "keep", "ann"))
    path.write_text(path.read_text("utf-8") + line + "\n", "utf-8")
    with pytest.raises(InputError, match="edits.jsonl line 2"):
        load_edits(path)


def items():
    return [Item(r.id, 0.5, ("looked at for a test",)) for r in ROWS]


def test_keys_from_a_pipe_and_going_on_later(tmp_path):
    path, shown = tmp_path / "edits.jsonl", io.StringIO()
    first = review(
        ROWS,
        items(),
        path,
        "ann",
        stdin=io.StringIO("k\nr \nsk\ns\n\nr no request\ne better\n\nprice\nq\n"),
        stdout=shown,
    )
    assert [(e.id, e.action) for e in first][:2] == [("r0", "keep"), ("r1", "reject")]
    assert [e.reason for e in first if e.action == "reject"] == ["", "no request"]
    assert [(e.field, e.after, e.reason) for e in first if e.field == "completion"] == [
        ("completion", "price", "better")
    ]
    assert "no key 'sk', one a line" in shown.getvalue()
    assert "looked at for a test" in shown.getvalue() and "1/8" in shown.getvalue()
    shown = io.StringIO()
    review(ROWS, items(), path, "ann", stdin=io.StringIO("q"), stdout=shown)
    assert "r2" in shown.getvalue(), "the row that was skipped comes back"
    assert load_edits(path) == first


@pytest.mark.skipif(os.name == "nt", reason="a terminal of POSIX systems")
def test_single_keys_in_a_real_terminal_and_ctrl_c(tmp_path):
    import pty
    import select
    import signal
    import time

    (tmp_path / "rows.csv").write_text(
        "text,label\n" + "".join(f"where is the {w} shelf,{w}\n" * 2 for w in ("tea", "oil", "rice", "soap")),
        "utf-8",
    )
    code = "import sys; from ftnb.cli import main; sys.exit(main(sys.argv[1:]))"
    words = "review --data rows.csv --task classification --reviewer ann --out mine.jsonl".split()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.environ["PYTHONPATH"] = str(ROOT)
        os.execv(sys.executable, [sys.executable, "-c", code, *words])
    said, sent, end = "", 0, time.monotonic() + 120
    while time.monotonic() < end:
        if select.select([terminal], [], [], 0.2)[0]:
            try:
                said += os.read(terminal, 65536).decode("utf-8", "replace")
            except OSError:
                break
        if sent < 2 and said.count("[q]uit") > sent:  # one key for each row shown, no Enter
            os.write(terminal, b"k")
            sent += 1
        elif sent == 2 and said.count("[q]uit") > 2:
            os.kill(pid, signal.SIGINT)
            sent += 1
    else:
        os.kill(pid, signal.SIGKILL)  # a test that waits for ever says nothing
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) in (0, 130), said[-500:]
    assert [e.action for e in load_edits(tmp_path / "mine.jsonl")] == ["keep", "keep"], said[-500:]
    assert "Traceback" not in said


def test_a_closed_stdin_is_said_in_one_line(tmp_path):
    closed = io.StringIO()
    closed.close()
    with pytest.raises(InputError, match="stdin, which is closed"):
        review(ROWS, items(), tmp_path / "edits.jsonl", "ann", stdin=closed, stdout=io.StringIO())


def test_alpha_against_a_hand_worked_example():
    def by(name, actions):
        return [Edit(f"r{k}", a, name, WHEN.format(0), seen="s") for k, a in enumerate(actions.split())]

    one, two = by("ann", "keep keep reject keep"), by("ben", "keep reject reject keep")
    # 5 keep and 3 reject in 8 decisions: expected 2 * 5 * 3 / (8 * 7), seen 1 of 4
    assert agreement(one, two).alpha == pytest.approx(1 - (1 / 4) / (2 * 5 * 3 / (8 * 7)))
    assert agreement(one, by("ben", "keep keep reject keep")).alpha == 1
    with pytest.raises(InputError, match="two reviewers"):
        agreement(one)


def test_the_queue_puts_what_looks_wrong_first_and_names_why():
    issue = Issue("contradiction", "error", ("r5",), "one prompt, several answers")
    found = queue(ROWS, [issue], {"r2": 0.99}, n=4, share=0.25, seed=1)
    assert len(found) == 4 and sum(i.drawn for i in found) == 1
    picked = [i for i in found if not i.drawn]
    assert {"r2", "r5"} <= {i.id for i in found} and picked[0].reasons
    assert found == queue(ROWS, [issue], {"r2": 0.99}, n=4, share=0.25, seed=1)


def test_the_share_of_wrong_rows_comes_from_random_rows_alone():
    drawn = [Item(r.id, 0.1, ("drawn at random",), drawn=True) for r in ROWS[:4]]
    edits = [*decide(ROWS[0], "reject", "ann"), *(e for r in ROWS[1:4] for e in decide(r, "keep", "ann"))]
    edits += [e for r in ROWS[4:] for e in decide(r, "reject", "ann")]  # picked rows do not count
    rate = defect_rate([*drawn, *items()[4:]], edits)
    assert (rate.found, rate.n) == (1, 4) and rate.low < 0.25 < rate.high


def test_medical_rows_pass_the_gate_only_when_seen_as_they_are():
    with pytest.raises(InputError, match="8 of 8"):
        require_review(ROWS, "medical")
    seen = apply_edits(ROWS, [e for r in ROWS for e in decide(r, "keep", "dr")]).records
    require_review(seen, "medical")
    require_review(ROWS, "general")
    changed = [replace(seen[0], completion="exit"), *seen[1:]]
    with pytest.raises(InputError, match="1 of 8 rows .* r0"):
        require_review(changed, "legal")


def test_a_safe_edit_of_the_audit_is_a_patch_not_a_review():
    spaced = replace(ROWS[0], completion="hours ")
    safe = {"id": "r0", "field": "completion", "before": "hours ", "after": "hours"}
    issue = Issue("outer-whitespace", "note", ("r0",), "1 row", patch=(safe,))
    done = apply_edits([spaced], edits_from(issue, "ann", [spaced]))
    assert done.records[0].completion == "hours"
    with pytest.raises(InputError):
        require_review(done.records, "medical")
    with pytest.raises(InputError, match="r0"):
        edits_from(issue, "ann", [ROWS[0]])


def test_what_a_reviewer_saw_is_hashed_and_nothing_else():
    assert row_hash(ROWS[0]) == row_hash(replace(ROWS[0], meta={"a": 1}, group="g", source="x:1"))
    assert row_hash(ROWS[0]) != row_hash(replace(ROWS[0], completion="exit"))
    assert json.loads(json.dumps(row_hash(ROWS[0]))) == row_hash(ROWS[0])
