"""The defects that others counted in real data sets, found again. Skipped, visibly, where the data is not there:
put it beside the repository in shared/data, or name its folder in FTNB_SHARED."""

import json
import os
from pathlib import Path

import pytest

from conftest import ROOT
from ftnb.audit import audit
from ftnb.data import Splits, leakage, load

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
    assert next(len(i.ids) for i in found if i.kind == "leak-normalised") == 25


def test_snips_keeps_a_slot_that_is_named_twice():
    found = load(DATA / "snips/train.jsonl")
    assert (found.task, len(found.records), len(found.rejected)) == ("extraction", 7_000, 0)
    names = [[slot["name"] for slot in json.loads(r.completion)["slots"]] for r in found.records]
    assert sum(len(n) != len(set(n)) for n in names) == 27


def test_star_conversations_are_read_whole():
    found = load(DATA / "star/train.jsonl")
    assert (found.task, len(found.records), len(found.rejected)) == ("conversation", 726, 0)


def test_a_line_separator_inside_a_text_does_not_split_it():
    assert len(load(DATA / "pubmedqa/train.jsonl", text="question", label="final_decision").records) == 500
