"""The ledger: every folder has a line, every difference a name, every p its correction; nothing raises for a torn file."""

import json
import os
import random
import shutil
from dataclasses import replace

import pytest

from ftnb.data import Record, Splits
from ftnb.evaluate import Prediction, evaluate, holm
from ftnb.ledger import (
    Ledger,
    adjusted,
    changes,
    compare_runs,
    differences,
    fooled,
    lessons,
    parent,
    plot_ledger,
    read_entry,
    read_ledger,
    test_key,
    what_next,
)
from ftnb.plan import InputError, Recipe
from ftnb.train import train
from toys import FAST, rows, toy_model

test_key.__test__ = False  # not a test of pytest's
RECORDS = [
    Record(f"r{i}", ({"role": "user", "content": text},), label, label)
    for i, (text, label) in enumerate(rows(260))
]
SPLITS = Splits(RECORDS[:80], RECORDS[80:100], RECORDS[100:])
AROUND = {"torch": "2.9", "python": "3.12", "threads": "2", "machine": "x86_64", "device": "cpu"}


def answers(share, seed=0, test=SPLITS.test):
    draw = random.Random(seed)
    return [
        Prediction(r.id, r.text, r.completion, r.completion if draw.random() < share else "wrong")
        for r in test
    ]


def write_run(folder, when, share=0.5, draw=0, splits=SPLITS, around=AROUND, code="abc", **settings):
    "What a training and an evaluation leave behind, by the same readers and writers."
    recipe = Recipe(name=folder.name, task="classification", **settings)
    folder.mkdir(parents=True)
    recipe.save(folder / "recipe.json")
    splits.save(folder / "splits")
    metrics = {"eval_match": 0.5, "eval_n": 20, "n_train": len(splits.train), "dtype": "float32"}
    done = {"best_step": 3, "metrics": metrics, "versions": {"torch": "2.9"}, "code": code, "ended": when}
    (folder / "run.json").write_text(json.dumps(done))
    (folder / "history.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 3, "loss": 1.0}\n')
    (folder / "surroundings.json").write_text(json.dumps({"now": around, "changed": []}))
    if share is not None:
        report = evaluate(answers(share, draw, splits.test), recipe.task, "tuned")
        report.save(folder / "reports" / "tuned.json")
    return read_entry(folder)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    write_run(folder / "b_first", 100.0, 0.4)
    write_run(folder / "a_better", 200.0, 0.8, draw=1, learning_rate=1e-3)
    write_run(folder / "c_same", 300.0, 0.8, draw=2, learning_rate=1e-3, r=32)
    write_run(folder / "d_two", 400.0, 0.5, draw=3, learning_rate=1e-3, r=8, alpha=8)
    return folder


@pytest.fixture
def runs(four, tmp_path):
    return shutil.copytree(four, tmp_path / "runs")


def test_runs_are_in_order_of_time_and_the_kept_one_is_shown_to_be_better(runs):
    ledger = read_ledger(runs)
    assert [e.name for e in ledger.runs] == ["b_first", "a_better", "c_same", "d_two"]
    assert ledger.kept.name == "a_better"
    assert [(c.before, c.verdict) for c in ledger.changes] == [
        ("b_first", "better"),
        ("a_better", "not shown"),
        ("c_same", "worse"),
    ]
    alone = [changes(*(read_entry(runs / n) for n in (c.before, c.after))).effect.p for c in ledger.changes]
    assert [c.effect.p for c in ledger.changes] == holm([*alone, 1.0])[:3]  # four sets of answers


FILES = ("run.json", "recipe.json", "history.jsonl", "surroundings.json", "splits/splits.json")
FILES += ("splits/train.jsonl", "reports/tuned.json")
DAMAGES = {
    "gone": lambda data: None,
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "list": lambda data: b"[]",
    "binary": lambda data: b"\xff\xfe\x00" + data,
}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_a_named_line(runs, name, how):
    path = runs / "c_same" / name
    data = DAMAGES[how](path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    ledger = read_ledger(runs)
    entry = next(e for e in ledger.entries if e.name == "c_same")
    assert len(ledger.entries) == 4
    assert what_next(ledger) and ledger._repr_markdown_()
    if (name, how) != ("reports/tuned.json", "gone"):  # never evaluated looks the same
        assert entry.state != "finished" or entry.faults, f"{name} {how}: nothing is said"
        assert f"- {entry}" in ledger._repr_markdown_()
    if name == "run.json":
        assert entry.state == ("unfinished" if how == "gone" else "broken")
    assert len(str(entry).splitlines()) == 1 and str(runs) not in str(entry)


def test_folders_that_are_no_run_are_named(runs):
    (runs / "notes").mkdir()
    (runs / "rate-sweep").mkdir()
    (runs / "rate-sweep" / "sweep.json").write_text("{}")
    (runs / ".hidden").mkdir()
    (runs / "looks.jsonl").write_text("")
    write_run(runs / "methods" / "lora", 500.0)
    (runs / "methods" / "half").mkdir()
    Recipe(name="half").save(runs / "methods" / "half" / "recipe.json")
    states = {e.name: e.state for e in read_ledger(runs).entries if e.name[1] != "_"}
    assert states == {
        "methods/lora": "finished",
        "methods/half": "unfinished",
        "notes": "other",
        "rate-sweep": "other",
    }
    (alone,) = read_ledger(runs / "a_better").entries
    assert (alone.name, alone.state) == ("a_better", "finished")
    with pytest.raises(InputError, match="no such folder"):
        read_ledger(runs / "absent")


def edited(splits, side, **changed):
    first, *rest = getattr(splits, side)
    return replace(splits, **{side: (replace(first, **changed), *rest)})


OTHER = replace(RECORDS[0], id="new", messages=({"role": "user", "content": "quite another"},))
MUTATIONS = {
    "learning_rate 0.0002 → 0.001": dict(learning_rate=1e-3),
    "seed 0 → 1": dict(seed=1),
    "training rows 80 → 80 (edited 1)": dict(splits=edited(SPLITS, "train", completion="price")),
    "training rows 80 → 81 (+1)": dict(splits=replace(SPLITS, train=(*SPLITS.train, OTHER))),
    "training rows 80 → 79 (-1)": dict(splits=replace(SPLITS, train=SPLITS.train[1:])),
    "training rows 80 → 80 (another order)": dict(splits=replace(SPLITS, train=SPLITS.train[::-1])),
    "validation rows 20 → 20 (edited 1)": dict(splits=edited(SPLITS, "val", meta={"a": 1})),
    "test rows 160 → 159 (-1)": dict(splits=replace(SPLITS, test=SPLITS.test[1:])),
    "torch 2.9 → 2.10": dict(around=AROUND | {"torch": "2.10"}),
    "threads 2 → 1": dict(around=AROUND | {"threads": "1"}),
    "code abc → xyz": dict(code="xyz"),
}


@pytest.mark.parametrize("told", MUTATIONS)
def test_what_changed_is_named_and_nothing_else(tmp_path, told):
    before, after = write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 2.0, **MUTATIONS[told])
    assert [str(d) for d in differences(before, after)] == [told]
    assert len(differences(before, after, rows=False)) == 1
    change = changes(before, after)
    if told.startswith("test rows"):
        assert change.effect is None and not change.causes
        assert "test rows differ: 160 and 159, 159 the same" in change.refused
    else:
        assert change.effect is not None and len(change.causes) == 1


def test_names_and_trackers_change_nothing(tmp_path):
    a = write_run(tmp_path / "a", 1.0)
    assert differences(a, write_run(tmp_path / "b", 2.0, tracker="tensorboard")) == ()


def test_several_changes_at_once_have_no_name(runs):
    two, one = (read_entry(runs / n) for n in ("d_two", "a_better"))
    change = changes(one, two)
    assert [d.what for d in change.causes] == ["r", "alpha"]
    assert "2 things at once: no cause can be named" in str(change)
    assert "no cause can be named" in change._repr_markdown_()
    assert any("repeat them one at a time" in s for s in what_next(read_ledger(runs)))


def test_all_pairs_are_adjusted_together_and_other_test_rows_are_refused(runs, tmp_path):
    entries = read_ledger(runs).runs
    found = compare_runs(entries)
    assert len(found) == 6
    alone = [changes(a, b).effect.p for i, a in enumerate(entries) for b in entries[i + 1 :]]
    assert [c.effect.p for c in found] == holm(alone)
    (pair,) = compare_runs(entries[:2])
    assert pair.effect.p == alone[0]
    other = write_run(tmp_path / "other", 9.0, splits=replace(SPLITS, test=SPLITS.test[:100]))
    with pytest.raises(InputError, match="a_better and other: test rows differ: 160 and 100, 100 the same"):
        compare_runs([entries[1], other])
    with pytest.raises(InputError, match="2 runs or more"):
        compare_runs(entries[:1])
    silent = write_run(tmp_path / "silent", 9.0, share=None)
    with pytest.raises(InputError, match="silent has no report of tuned: run ftnb evaluate"):
        compare_runs([entries[0], silent])
    with pytest.raises(InputError, match="only finished runs"):
        compare_runs([entries[0], read_entry(tmp_path)])


def test_equal_test_rows_with_other_texts_are_other_rows(tmp_path):
    changed = replace(SPLITS, test=(replace(SPLITS.test[0], messages=OTHER.messages), *SPLITS.test[1:]))
    a, b = write_run(tmp_path / "a", 1.0), write_run(tmp_path / "b", 2.0, splits=changed)
    assert test_key(a.reports["tuned"]) != test_key(b.reports["tuned"])
    assert "159 the same" in changes(a, b).refused


def test_looks_that_led_to_no_comparison_count(runs):
    change = changes(*read_ledger(runs).runs[:2])
    (fixed,) = adjusted([change], looks=10)
    assert fixed.effect.p == min(1.0, 10 * change.effect.p)
    assert adjusted([change], looks=1) == adjusted([change]) == [change]
    ledger = read_ledger(runs)
    (key,) = ledger.tests
    assert ledger.looks(key) == 4
    shutil.copytree(runs / "a_better", runs / "e_copy")
    assert read_ledger(runs).looks(key) == 4  # the same answers again are no new look
    assert any("have judged 5 runs" in s for s in what_next(read_ledger(runs)))


def test_the_earlier_run_with_the_fewest_differences_is_the_parent(runs):
    *earlier, last = read_ledger(runs).runs
    assert parent(last, earlier).name == "c_same"  # as near as a_better, and later
    assert parent(earlier[0], []) is None


def test_equal_runs_that_differ_are_told(tmp_path):
    write_run(tmp_path / "a", 1.0, 0.4)
    write_run(tmp_path / "b", 2.0, 0.8, draw=1)
    steps = what_next(read_ledger(tmp_path))
    assert any("a and b share all that is on record and differ by" in s for s in steps)


def test_a_new_test_begins_a_new_line(runs):
    other = replace(SPLITS, test=SPLITS.test[:120])
    write_run(runs / "e_new", 500.0, 0.3, splits=other, learning_rate=1e-3)
    ledger = read_ledger(runs)
    assert len(ledger.tests) == 2 and ledger.kept.name == "e_new"
    assert (
        not ledger.changes[-1].effect and "hollow: other test rows" in plot_ledger(ledger).axes[0].get_title()
    )
    old, new = ledger.tests
    assert len(lessons(ledger, old)) == 4 and lessons(ledger, new) == lessons(ledger, "absent") == []


def test_a_ledger_without_reports_or_runs_says_so(tmp_path):
    write_run(tmp_path / "a", 1.0, share=None)
    ledger = read_ledger(tmp_path)
    assert "not evaluated; 50.0% of 20 validation rows" in ledger._repr_markdown_() and ledger.kept is None
    for use in (plot_ledger, what_next):
        with pytest.raises(InputError, match="run ftnb evaluate"):
            use(ledger)
    assert Ledger("empty", ()).changes == [] and Ledger("empty", ())._repr_markdown_()


def test_equal_runs_are_called_better_no_more_often_than_holm_allows():
    one, many = fooled(1, ledgers=800), fooled(12, ledgers=800)
    assert one.alone.value < 0.05 and one.alone.value == one.adjusted.value
    assert many.alone.low > 0.05 and many.adjusted.high < 0.05
    assert 0 < one.optimism < many.optimism < 0.1
    large = fooled(12, n=1500, ledgers=300)
    assert large.optimism < many.optimism / 2
    for bad in (dict(looks=0), dict(looks=1, n=0), dict(looks=1, discordant=0.4)):
        with pytest.raises(InputError, match="looks and n must be 1 or more"):
            fooled(**bad)


@pytest.mark.slow
def test_a_run_that_was_trained_tells_code_and_time(tmp_path):
    settings = dict(pair.split("=") for pair in FAST)
    numbers = {k: (float if k == "epochs" else int)(v) for k, v in settings.items()}
    model = str(toy_model(tmp_path / "model"))
    recipe = Recipe(name="toy", task="classification", model=model, dtype="float32", **numbers)
    train(recipe, replace(SPLITS, test=SPLITS.test[:20]), tmp_path / "runs" / "toy")
    entry = read_entry(tmp_path / "runs" / "toy")
    assert entry.state == "finished" and not entry.faults
    assert len(entry.around["code"]) == 16 and entry.around["ftnb"] and entry.around["threads"]
    assert abs(entry.when - os.stat(tmp_path / "runs/toy/run.json").st_mtime) < 60
    assert differences(entry, entry) == ()
