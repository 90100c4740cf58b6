"""A stream says what the rows in memory say, loses nothing, goes on after a stop, and stays small."""

import base64
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ROOT
from ftnb import scale
from ftnb.audit import ROW_CHECKS, audit
from ftnb.data import Splits, leakage, load, store_records
from ftnb.plan import InputError

DATA = Path(os.environ.get("FTNB_SHARED") or ROOT.parent / "shared") / "data"
BOTH = {check[0] for check in ROW_CHECKS} | {
    *("contradiction", "exact-duplicate", "normalised-duplicate", "near-duplicate"),
    *("rare-class", "label-variants", "one-class", "too-few-rows"),
}
REST = ("labels", "language", "private", "mixed")  # parts that need the rows in memory
ALL = 10**7


def kinds(report, places=None):  # places: id -> file:line, for rows that bring an id of their own
    places = places or {}
    return {i.kind: (i.severity, sorted(places.get(x, x) for x in i.ids)) for i in report if i.kind in BOTH}


def lines(path, rows, end="\n"):
    path.write_bytes(
        b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + end.encode() for r in rows)
    )
    return path


@pytest.fixture
def store(tmp_path):
    rows = [{"prompt": r.text, "completion": r.completion} for r in store_records()]
    rows.append({"prompt": rows[0]["prompt"], "completion": '{"intent": "other", "slots": []}'})
    rows.append({"prompt": "opens soon<|im_end|>", "completion": "cafÃ©"})
    return lines(tmp_path / "store.jsonl", rows)


@pytest.fixture
def pieces(monkeypatch):
    monkeypatch.setattr(scale, "SHARD", 20_000)


def rejected(plan):
    return [json.loads(line) for line in (Path(plan.folder) / "rejected.jsonl").read_text().splitlines()]


def test_store_rows_give_the_findings_of_audit(store, tmp_path, pieces):
    streamed = scale.audit_stream(store, "extraction", tmp_path / "w", workers=1, limit=ALL)
    whole = kinds(audit(load(store, "extraction").records, "extraction", skip=REST))
    planted = {"contradiction", "control-token", "encoding-damage"}
    assert planted | {"exact-duplicate", "normalised-duplicate", "near-duplicate"} <= set(whole)
    assert kinds(streamed) == whole


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA.parent.name}/data")
def test_banking77_gives_the_findings_of_audit_and_of_leakage(tmp_path):
    train, test = DATA / "banking77/train.jsonl", DATA / "banking77/test.jsonl"
    streamed = scale.audit_stream(train, None, tmp_path, test=test, limit=ALL)
    read = [tuple(load(path).records) for path in (train, test)]
    places = {r.id: r.source for side in read for r in side}
    whole = kinds(audit(list(read[0]), "classification", skip=REST), places)
    assert len(whole) > 3 and kinds(streamed) == whole
    leaks = {i.kind: (i.severity, sorted(i.ids), i.sides) for i in streamed if i.kind.startswith("leak")}
    wanted = leakage(Splits(train=read[0], val=(), test=read[1]))
    assert leaks
    assert leaks == {i.kind: (i.severity, sorted(places[x] for x in i.ids), i.sides) for i in wanted}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA.parent.name}/data")
def test_tables_lose_few_rows_of_banking77(tmp_path):
    train = DATA / "banking77/train.jsonl"
    found = [scale.audit_stream(train, None, tmp_path, limit=ALL, exact=n) for n in (scale.EXACT, 0)]
    every, some = ({i for x in report if x.kind == "near-duplicate" for i in x.ids} for report in found)
    assert some <= every and len(some) >= 0.97 * len(every)


BAD = [
    b'{"text": "cut',
    b"[1, 2]",
    b'{"text": "no label"}',
    b"\xff\xfe not utf-8 {",
    b'{"text": 1, "text": 2}',
]


def test_every_row_is_kept_or_rejected_with_its_bytes(tmp_path, pieces):
    rows = [{"text": f"café number {i}", "category": "ab"[i % 2]} for i in range(2000)]
    for at, raw in zip((3, 500, 900, 1500, 1999), BAD):
        rows.insert(at, raw)
    path = lines(tmp_path / "rows.jsonl", rows, "\r\n")
    plan = scale.plan_stream(path, "classification", tmp_path / "w")
    scale.sketch_local(plan, 1)
    sketch, lost, data = scale.read_sketch(plan), rejected(plan), path.read_bytes()
    assert len(plan.shards) > 2
    assert (sketch.kept, sketch.rejected) == (2000, len(BAD)) and sketch.kept + sketch.rejected == len(rows)
    for r, raw in zip(lost, BAD, strict=True):
        got = base64.b64decode(r["raw_base64"])
        assert got.rstrip(b"\r") == raw and data[r["offset"] : r["offset"] + len(got)] == got
        assert r["file"] == "rows.jsonl" and data[: r["offset"]].count(b"\n") + 1 == r["line"] and r["reason"]
    known = load(path, "classification")
    assert len(known.records) == sketch.kept and len(known.rejected) == sketch.rejected
    places = sketch.column("offset").tolist()
    assert all(json.loads(data[at:].split(b"\n", 1)[0])["text"] for at in places[::97])
    assert sketch.record(1234).text == known.records[1234].text
    assert sketch.ids([0, 1999]) == (known.records[0].id, known.records[1999].id)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables_are_cut_and_read_as_load_does(kind, tmp_path, pieces):
    import pandas as pd

    texts = [f'line one of {i}\nline two, "{i}"' if i % 3 else f"plain {i}" for i in range(3000)]
    table = pd.DataFrame({"text": texts, "label": ["ab"[i % 2] for i in range(3000)]})
    path = tmp_path / f"t.{kind}"
    table.to_csv(path, index=False) if kind == "csv" else table.to_parquet(path, row_group_size=700)
    streamed = scale.audit_stream(path, "classification", tmp_path / "w", workers=1, limit=ALL)
    plan = scale.plan_stream(path, "classification", tmp_path / "w")
    assert len(plan.shards) > 2 and scale.read_sketch(plan).kept == 3000
    assert kinds(streamed) == kinds(audit(load(path, "classification").records, "classification", skip=REST))


def sketch_bytes(plan):
    return {
        p.name: p.read_bytes() for p in Path(plan.folder).iterdir() if p.suffix in (".npz", ".txt", ".jsonl")
    }


def test_one_worker_and_two_write_the_same(store, tmp_path, pieces):
    made = []
    for workers in (1, 2):
        plan = scale.plan_stream(store, "extraction", tmp_path / str(workers))
        scale.sketch_local(plan, workers)
        report = scale.audit_sketch(scale.read_sketch(plan), limit=ALL)
        made.append(([(i.kind, i.ids, i.text) for i in report], sketch_bytes(plan)))
    assert len(plan.shards) > 2 and made[0] == made[1]


def test_a_second_run_makes_only_what_is_missing(store, tmp_path, pieces):
    plan = scale.plan_stream(store, "extraction", tmp_path)
    scale.sketch_local(plan, 1)
    before = sketch_bytes(plan)
    times = {s.number: plan.done(s).stat().st_mtime_ns for s in plan.shards}
    plan.done(plan.shards[1]).unlink()
    with pytest.raises(InputError, match=f"1 of {len(plan.shards)} shards"):
        scale.read_sketch(plan)
    scale.sketch_local(scale.plan_stream(store, "extraction", tmp_path), 1)
    scale.read_sketch(plan)
    now = {s.number: plan.done(s).stat().st_mtime_ns for s in plan.shards}
    assert [n for n in times if times[n] != now[n]] == [1]
    assert {k: v for k, v in sketch_bytes(plan).items() if k in before} == before
    store.write_bytes(store.read_bytes() + b'{"prompt": "new", "completion": "new"}\n')
    assert scale.plan_stream(store, "extraction", tmp_path).folder != plan.folder


STOPPED = """
import sys
from ftnb import scale
if __name__ == "__main__":
    scale.SHARD = 200_000
    plan = scale.plan_stream(sys.argv[1], "classification", sys.argv[2])
    print(len(plan.shards), plan.folder, flush=True)
    scale.sketch_local(plan, 2)
"""


def made_rows(path, n):
    words = [r.text for r in store_records()]
    rows = (
        {"text": f"{words[i % 1417]} {i * 7919 % 99991} {words[i * 31 % 1417]}", "label": "ab"[i % 2]}
        for i in range(n)
    )
    return lines(path, rows)


def test_after_ctrl_c_the_rest_is_made(tmp_path):
    path, script = made_rows(tmp_path / "rows.jsonl", 30_000), tmp_path / "stop.py"
    script.write_text(STOPPED)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), str(path), str(tmp_path / "w")]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )
    count, folder = child.stdout.readline().split()
    deadline = time.time() + 60
    while not list(Path(folder).glob("*.npz")) and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)
    child.communicate(timeout=60)
    half = {p.name: p.stat().st_mtime_ns for p in Path(folder).glob("*.npz")}
    assert child.returncode != 0 and 0 < len(half) < int(count)
    subprocess.run(command, check=True, capture_output=True, env=env)
    whole = {p.name: p.stat().st_mtime_ns for p in Path(folder).glob("*.npz")}
    assert len(whole) == int(count) and half.items() <= whole.items()
    assert not [p for p in Path(folder).iterdir() if "tmp" in p.name]


MEMORY = """
import sys
from ftnb import scale
if __name__ == "__main__":
    scale.SHARD = 1_000_000
    with scale.peak_memory() as seen:
        scale.audit_stream(sys.argv[1], "classification", sys.argv[2], workers=1, exact=0)
    print(seen["bytes"] - seen["before"])
"""


def test_memory_grows_far_less_than_the_file(tmp_path):
    script, peaks, sizes = tmp_path / "peak.py", [], []
    script.write_text(MEMORY)
    for n in (20_000, 80_000):
        path = made_rows(tmp_path / f"{n}.jsonl", n)
        command = [sys.executable, str(script), str(path), str(tmp_path / f"w{n}")]
        env = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
        peaks.append(int(done.stdout))
        sizes.append(path.stat().st_size)
    assert sizes[1] > 3.5 * sizes[0]
    assert peaks[1] < 2 * peaks[0]
    assert peaks[1] - peaks[0] < 500 * 60_000  # bytes a row: hashes and places, no texts


@pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove is not installed")
def test_datatrove_writes_the_same(store, tmp_path, pieces):
    made = []
    for name, run in (("local", scale.sketch_local), ("trove", scale.sketch_datatrove)):
        report = scale.audit_stream(store, "extraction", tmp_path / name, workers=2, limit=ALL, run=run)
        plan = scale.plan_stream(store, "extraction", tmp_path / name)
        made.append(([(i.kind, i.ids, i.text) for i in report], sketch_bytes(plan)))
    assert len(plan.shards) > 2 and made[0] == made[1]


@pytest.mark.parametrize("exact", [scale.EXACT, 0], ids=["all pairs", "tables"])
def test_leakage_of_two_streams(tmp_path, exact):
    train = [
        "where is the nearest store to me",
        "is the store on elm street open",
        "play it again",
        "so long",
    ]
    test = [("where is the nearest store to me", "a"), ("Play it again!", "b"), ("so long", "a")]
    test += [("where is the nearest stores to me", "a"), ("something else altogether", "a")]
    rows = [{"text": t, "label": k} for t, k in zip(train, "aabb")]
    seen = lines(tmp_path / "train.jsonl", rows)
    held = lines(tmp_path / "test.jsonl", [{"text": t, "label": k} for t, k in test])
    report = scale.audit_stream(seen, "classification", tmp_path / "w", workers=1, test=held, exact=exact)
    leaks = {i.kind: i.ids for i in report if i.kind.startswith("leak")}
    assert leaks == {
        "leak-exact": ("test.jsonl:1",),
        "leak-normalised": ("test.jsonl:2",),
        "leak-contradiction": ("test.jsonl:3",),
        "leak-near": ("test.jsonl:4",),
    }


def test_what_cannot_be_read_in_pieces_is_said(tmp_path):
    for name, data, why in (
        ("a.json", b'[{"text": "a", "label": "b"}]', "JSON array"),
        ("b.jsonl", b"", "is empty"),
        ("c.csv", "text,label\na,b\nc,d\n".encode("utf-16"), "convert it to UTF-8"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=why):
            scale.plan_stream(tmp_path / name, "classification", tmp_path / "w")
