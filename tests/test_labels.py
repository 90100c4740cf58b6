"""What is labelled on the page of answers becomes edits, and edits move no row from one side of a split to the other."""

import json
from pathlib import Path

import pytest

from toys import FAST, ftnb, rows, toy_model, write_format


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return toy_model(tmp_path_factory.mktemp("labels"))


def ids(run, side):
    return [json.loads(x) for x in (run / f"splits/{side}.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_labels_of_the_page_become_edits_that_move_no_row(model, tmp_path, monkeypatch, capsys):
    "A run, its page, a wrong reference labelled, patches, and a second run on the corrected rows."
    from ftnb.cli import main

    monkeypatch.chdir(tmp_path)
    data = write_format("csv", tmp_path)
    more = ["--data", data, "--task", "classification", "--model", model, "--dtype", "float32"]
    more += [word for pair in FAST for word in ("--set", pair)]
    assert main(["train", *more, "--out", "a"]) == 0
    assert main(["evaluate", "a", "--systems", "tuned,tfidf", "--page", "page.html"]) == 0
    assert (
        "page         page.html" in capsys.readouterr().out
        and (tmp_path / "page.html").stat().st_size > 10_000
    )

    row = ids(tmp_path / "a", "test")[0]
    other = "price" if row["label"] != "price" else "hours"
    said = {"id": row["id"], "label": "wrong", "answer": other, "reference": row["completion"]}
    said["time"] = "2026-01-31T09:30:00Z"
    (tmp_path / "labels.jsonl").write_text(json.dumps(said) + "\n", encoding="utf-8")
    for _ in range(2):  # the second time adds nothing
        assert main(["labels", "a", "--reviewer", "ann"]) == 0
        told = capsys.readouterr().out
        assert "1 references corrected" in told and "cannot be compared" in told and "tfidf: accuracy" in told
        assert len((tmp_path / "edits.jsonl").read_text("utf-8").splitlines()) == 2  # completion and label
    assert main(["train", *more, "--edits", "edits.jsonl", "--out", "b"]) == 0
    for side in ("train", "val", "test"):
        a, b = ({r["id"]: r["label"] for r in ids(tmp_path / run, side)} for run in "ab")
        assert b == a | ({row["id"]: other} if side == "test" else {}), side

    (tmp_path / "labels.jsonl").write_text(json.dumps(said | {"id": "nope"}) + "\n", encoding="utf-8")
    assert main(["labels", "a", "--reviewer", "ann"]) == 2
    assert "labels.jsonl line 1: no row 'nope'" in capsys.readouterr().err


def test_edits_correct_rows_of_a_test_file_and_move_no_drawn_row(tmp_path):
    "Rows of --test-data have ids of their own, even where those equal ids of the data."
    from ftnb.cli import Source, prepare
    from ftnb.failures import Label, labels_to_edits
    from ftnb.plan import Recipe
    from ftnb.review import save_edits

    for name, pairs in (("one", rows()[:54]), ("two", rows()[54:])):
        (tmp_path / name).mkdir()
        text = "".join(f"{t},{a}\n" for t, a in pairs)
        (tmp_path / name / "rows.csv").write_text("text,label\n" + text, encoding="utf-8")
    recipe, edits = Recipe(task="classification"), str(tmp_path / "edits.jsonl")
    data, test = str(tmp_path / "one/rows.csv"), str(tmp_path / "two/rows.csv")
    for held in ("", test):
        before = prepare(recipe, Source(data=data, test_data=held)).splits
        row = before.test[0]
        assert row.id.startswith("test:") == bool(held)
        other = "price" if row.label != "price" else "hours"
        Path(edits).unlink(missing_ok=True)
        save_edits(
            edits, labels_to_edits([Label(row.id, "wrong", row.completion, other)], before.test, "ann")
        )
        made = prepare(recipe, Source(data=data, test_data=held, edits=edits))
        for (side_name, a), (_, b) in zip(before.items(), made.splits.items()):
            was, now = ({r.id: r.label for r in side} for side in (a, b))
            assert now == was | ({row.id: other} if side_name == "test" else {}), side_name
        assert not [i for i in made.leaks if i.severity == "error"]


def test_labels_need_a_run(tmp_path):
    done = ftnb("labels", "nowhere", cwd=tmp_path)
    assert done.returncode == 2 and "nowhere" in done.stderr
