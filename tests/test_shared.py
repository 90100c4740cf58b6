"""The defects that others counted in real data sets, found again. Skipped, visibly, where the data is not there:
put it beside the repository in shared/data, or name its folder in FTNB_SHARED."""

import json
import os
import time
from pathlib import Path

import pytest

from conftest import ROOT
from ftnb.audit import audit
from ftnb.data import Splits, dedupe, leakage, leaked_rows, load, prompt_text, refuse_leakage
from ftnb.plan import InputError

DATA = Path(os.environ.get("FTNB_SHARED") or ROOT.parent / "shared") / "data"
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA.parent.name}/data")


def counts(issues):
    found = {}
    for issue in issues:
        found[issue.kind] = found.get(issue.kind, 0) + len(issue.ids)
    return found


@pytest.fixture(scope="module")
def banking():
    return {side: load(DATA / f"banking77/{side}.jsonl") for side in ("train", "test")}


def test_banking77_is_read_whole(banking):
    assert [len(b.records) for b in banking.values()] == [10_003, 3_080]
    assert not any(b.rejected for b in banking.values())
    assert {b.task for b in banking.values()} == {"classification"}
    assert len({r.label for r in banking["train"].records}) == 77


def test_banking77_defects_are_those_of_its_readme(banking):
    found = counts(audit(list(banking["train"].records), "classification"))
    # 31 rows repeat another up to case and punctuation; one of them with another label
    assert found["normalised-duplicate"] == 30 and found["contradiction"] == 2
    assert "exact-duplicate" not in found
    assert found["outer-whitespace"] == 9


def test_banking77_test_rows_that_stand_in_train(banking):
    train, test = (banking[side].records for side in ("train", "test"))
    found = leakage(Splits(train=train, val=(), test=test))
    exact = {i.kind for i in found if "word for word" in i.text}
    assert not exact
    leaks = [i for i in found if i.severity == "error"]
    assert [(i.kind, len(i.ids), i.sides) for i in leaks] == [("leak-normalised", 25, ("test", "train"))]
    assert leaks[0].text.startswith("25 of 3080 test rows ")
    assert set(leaked_rows(leaks).values()) == {"leak-normalised"}
    again = leakage(Splits(train=train[::-1], val=(), test=test[::-1]))
    assert [(i.kind, set(i.ids)) for i in again] == [(i.kind, set(i.ids)) for i in found]


def test_banking77_goes_through_the_gate_within_a_minute(banking):
    start = time.perf_counter()
    leakage(Splits(train=banking["train"].records, val=(), test=banking["test"].records))
    assert time.perf_counter() - start < 60


@pytest.fixture(scope="module")
def snips():
    return {side: load(DATA / f"snips/{side}.jsonl") for side in ("train", "test")}


def test_snips_keeps_a_slot_that_is_named_twice(snips):
    found = snips["train"]
    assert (found.task, len(found.records), len(found.rejected)) == ("extraction", 7_000, 0)
    names = [[slot["name"] for slot in json.loads(r.completion)["slots"]] for r in found.records]
    assert sum(len(n) != len(set(n)) for n in names) == 27


def test_snips_repeats_are_those_of_its_readme(snips):
    rows = snips["train"].records
    assert len(rows) - len({prompt_text(r) for r in rows}) == 59
    assert [len(s.records) - len(dedupe(s.records)) for s in snips.values()] == [79, 5]


def test_snips_test_rows_that_stand_in_train(snips):
    train, test = (snips[side].records for side in ("train", "test"))
    found = leakage(Splits(train=train, val=(), test=test))
    known = {i.kind: len(i.ids) for i in found}
    # 6 up to case and punctuation, among them one word for word and one with another answer
    kinds = ("leak-exact", "leak-normalised", "leak-contradiction")
    assert [known[kind] for kind in kinds] == [1, 4, 1]
    with pytest.raises(InputError, match="--drop-leaked.*--allow-leakage") as error:
        refuse_leakage(found)
    assert len(str(error.value).splitlines()) == 1 and found[0].text in str(error.value)


@pytest.mark.parametrize(
    "side, talks, said, calls, customers", [("train", 726, 4_434, 1_841, 67), ("test", 258, 1_469, 621, 17)]
)
def test_star_answers_and_tool_calls_are_all_there(side, talks, said, calls, customers):
    found = load(DATA / f"star/{side}.jsonl", group="user_worker")
    assert (found.task, found.read, found.kept, len(found.rejected)) == ("conversation", talks, talks, 0)
    assert len(found.records) == said + calls
    assert sum(r.completion.startswith("<tool_call>") for r in found.records) == calls
    assert len({r.group for r in found.records}) == customers
    last = load(DATA / f"star/{side}.jsonl", turns="last").records
    assert len(last) == talks and not any("<tool_call>" in r.completion for r in last)


def test_a_line_separator_inside_a_text_does_not_split_it():
    assert len(load(DATA / "pubmedqa/train.jsonl", text="question", label="final_decision").records) == 500
