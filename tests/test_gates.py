"""Rows that must not be trained on: a test that training has seen, and medical rows that nobody looked at. Toy model."""

import json
import shutil

import pytest

from toys import FAST, ftnb, rows, toy_model

SETS = [word for pair in FAST for word in ("--set", pair)]


def table(pairs):
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in pairs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gates")
    toy_model(folder / "model")
    mine, held = rows(90)[:72], rows(90)[72:]
    (folder / "train.csv").write_text(table(mine), "utf-8")
    seen = [(text.upper() + "!", label) for text, label in mine[:5]]  # up to case and punctuation
    (folder / "test.csv").write_text(table(held + seen), "utf-8")
    (folder / "clean.csv").write_text(table(held), "utf-8")
    return folder


def call(folder, verb, *words):
    task = ["--task", "classification", "--model", folder / "model", *SETS]
    return ftnb(verb, "--data", "train.csv", *task, *words, cwd=folder)


def test_a_leaking_test_is_refused_in_one_line(folder):
    done = call(folder, "train", "--test-data", "test.csv", "--out", "refused")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "5 of 23 test rows" in line and "--allow-leakage" in line and "--drop-leaked" in line
    assert not (folder / "refused").exists()


def test_allowed_leakage_scores_with_and_without(folder):
    done = call(folder, "train", "--test-data", "test.csv", "--allow-leakage", "--out", "allowed")
    assert done.returncode == 0, done.stderr
    done = ftnb("evaluate", "allowed", "--systems", "tuned,tfidf", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "without 5 leaked rows" in done.stdout
    report = json.loads((folder / "allowed/reports/tfidf.json").read_text("utf-8"))
    assert (report["metrics"]["accuracy"]["n"], report["unseen"]["accuracy"]["n"]) == (23, 18)
    assert len(report["leaked"]) == 5
    looks = [json.loads(line) for line in (folder / "looks.jsonl").read_text("utf-8").splitlines()]
    assert [look["system"] for look in looks] == ["tuned", "tfidf"] and report["looks"] == 1
    shutil.copytree(folder / "allowed", folder / "changed")
    shutil.rmtree(folder / "changed/reports")
    done = ftnb("evaluate", "changed", "--systems", "tuned,tfidf", cwd=folder)
    assert done.returncode == 0, done.stderr  # the same answers from another folder are no further look
    assert (folder / "looks.jsonl").read_text("utf-8").count("\n") == 2


def test_leaked_rows_can_be_left_out_of_training(folder):
    done = call(folder, "audit", "--test-data", "test.csv", "--drop-leaked", "--out", "audited")
    assert done.returncode == 0, done.stderr
    assert "5 of 72 rows are like a test row" in done.stdout and "test 23" in done.stdout
    assert (folder / "audited/audit/audit.html").exists()
    clean = call(folder, "audit", "--test-data", "clean.csv")
    assert clean.returncode == 0 and "leakage" not in clean.stdout


def test_medical_rows_are_trained_on_only_once_reviewed(folder):
    from ftnb.data import load
    from ftnb.review import decide, save_edits

    medical = ["--recipe", "medical"]
    done = call(folder, "train", *medical, "--out", "unseen")
    assert done.returncode == 2 and "medical" in done.stderr and "review" in done.stderr
    records = load(folder / "train.csv", task="classification").records
    for record in records[:-1]:
        save_edits(folder / "patch.jsonl", decide(record, "keep", "dr"))
    some = call(folder, "train", *medical, "--edits", "patch.jsonl", "--out", "some", "--seed", "1")
    done = call(folder, "train", *medical, "--edits", "patch.jsonl,last.jsonl", "--out", "done")
    assert done.returncode == 2 and "last.jsonl" in done.stderr
    save_edits(folder / "last.jsonl", decide(records[-1], "reject", "dr"))
    done = call(folder, "train", *medical, "--edits", "patch.jsonl,last.jsonl", "--out", "done")
    assert done.returncode == 0, done.stderr
    assert "71 keep" in done.stdout and "1 rows dropped" in done.stdout
    assert some.returncode in (0, 2)  # the one row left may have fallen into the test


def test_a_reviewer_has_a_name_and_a_group_column_exists(folder):
    done = call(folder, "review")
    assert done.returncode == 2 and "--reviewer" in done.stderr
    done = call(folder, "audit", "--group", "customer")
    assert done.returncode == 2 and "customer" in done.stderr
    done = call(folder, "audit", "--drop-leaked")
    assert done.returncode == 2 and "--test-data" in done.stderr


def test_long_rows_are_counted_in_tokens_by_the_audit_and_refused_before_training(folder):
    pairs = rows(90)[:72]
    pairs[7] = (" ".join(f"{text}" for text, _ in pairs[20:40]), pairs[7][1])
    (folder / "long.csv").write_text(table(pairs), "utf-8")
    words = ["--task", "classification", "--model", folder / "model", *SETS, "--set", "max_length=96"]
    done = ftnb("audit", "--data", "long.csv", *words, "--out", "measured", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "1 of 72 rows have more than max_length 96 tokens" in done.stdout
    issues = [json.loads(line) for line in (folder / "measured/audit/issues.jsonl").open(encoding="utf-8")]
    (long,) = [i for i in issues if i["kind"] == "over-long"]
    assert long["ids"] == ["long.csv:9"] or long["ids"][0].endswith("9"), long["ids"]
    done = ftnb("train", "--data", "long.csv", *words, "--out", "refused", cwd=folder)
    assert done.returncode == 2 and not (folder / "refused").exists(), done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert "1 of" in line and "max_length 96" in line and long["ids"][0] in line


def test_an_audit_without_the_tokenizer_says_so(folder):
    done = ftnb("audit", "--data", "train.csv", "--model", "nobody/nothing", cwd=folder, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert "tokens       not counted: model nobody/nothing" in done.stdout
