"""What must hold for any input, tried on inputs that nobody would think of."""

import csv
import io
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ftnb.data import (
    Record,
    dedupe,
    group_near,
    load,
    load_records,
    moved_rows,
    normalise,
    prompt_key,
    raw_bytes,
    save_records,
    split,
)
from ftnb.plan import InputError, Recipe
from toys import quick

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(str.strip)


def make(i, text, label):
    return Record(f"r{i}", ({"role": "user", "content": text},), label, label=label)


records = st.lists(st.tuples(words, st.sampled_from("abc")), min_size=1, max_size=60).map(
    lambda rows: [make(i, *row) for i, row in enumerate(rows)]
)


@quick
@given(records)
def test_dedupe_is_idempotent_and_only_leaves_out(rows):
    once = dedupe(rows)
    assert dedupe(once) == once
    ids = [r.id for r in rows]
    assert [r.id for r in once] == [i for i in ids if i in {r.id for r in once}]
    assert {(normalise(r.text), r.completion) for r in rows} == {
        (normalise(r.text), r.completion) for r in once
    }


@quick
@given(records, st.integers(0, 1000), st.sampled_from([0.1, 0.2]), st.sampled_from([0.2, 0.3]))
def test_split_is_a_partition_by_groups(rows, seed, val, test):
    grouped = group_near(dedupe(rows))
    try:
        parts = split(grouped, val, test, seed)
    except InputError:
        return  # too few rows or groups: refused in a sentence
    sides = [parts.train, parts.val, parts.test]
    ids = [r.id for side in sides for r in side]
    assert sorted(ids) == sorted(r.id for r in grouped)
    groups = [{r.group for r in side} for side in sides]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    again = split(grouped, val, test, seed)
    assert [r.id for r in again.test] == [r.id for r in parts.test]
    shuffled = split(grouped[::-1], val, test, seed)
    assert {r.id for r in shuffled.test} == {r.id for r in parts.test}, "row order decides the split"


@quick
@given(records, st.integers(0, 1000), st.integers(0, 60))
def test_a_stable_split_is_a_partition_that_new_rows_leave_alone(rows, seed, first):
    own = [replace(r, group=prompt_key(r)) for r in dedupe(rows)]  # groups of equal wordings never merge
    try:
        late = split(own, seed=seed, stable=True)
    except InputError:
        return
    assert sorted(r.id for _, side in late.items() for r in side) == sorted(r.id for r in own)
    assert all({r.label for r in side} == {r.label for r in own} for _, side in late.items())
    groups = [{r.group for r in side} for _, side in late.items()]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    try:
        early = split(own[:first], seed=seed, stable=True)
    except InputError:
        return
    assert moved_rows(early, late) == []


@quick
@given(st.lists(words, min_size=60, max_size=60), st.integers(0, 1000), st.integers(1, 20))
def test_rows_added_at_the_end_move_no_old_row(texts, seed, more):
    own = [make(i, f"{t} w{i}", "ab"[i % 2]) for i, t in enumerate(texts)]
    own = [replace(r, group=r.id) for r in own]
    wide = dict(val=0.3, test=0.3, seed=seed, stable=True)
    try:
        early, late = split(own[:-more], **wide), split(own, **wide)
    except InputError as error:
        assert "would get" in str(error)  # by chance less than half of what a side should have
        return
    assert moved_rows(early, late) == []


printed = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=20).filter(str.strip)
cells = st.lists(st.tuples(printed, st.sampled_from("abc")), min_size=1, max_size=12)
broken = st.lists(
    st.sampled_from(['{"text": "no label"}', "[1]", '{"text": ', "word", '{"text": "", "label": "a"}'])
)


@quick
@given(cells, broken, st.sampled_from(["\n", "\r\n"]), st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
def test_json_lines_lose_nothing(tmp_path_factory, rows, bad, end, encoding):
    bad = bad[
        : len(rows) - 1
    ]  # where most lines are no rows, the file is taken for another format, or refused
    good = [json.dumps({"text": t, "label": k}, ensure_ascii=False) for t, k in rows]
    path = tmp_path_factory.mktemp("load") / "rows.jsonl"
    path.write_bytes(end.join([*good, *bad]).encode(encoding))
    found = load(path, task="generation")
    assert found.read == found.kept + len(found.rejected) == len(rows) + len(bad)
    assert [(r.text, r.completion) for r in found.records] == rows
    raw = "utf-16-le" if encoding == "utf-16" else "utf-8"
    assert [raw_bytes(r).decode(raw) for r in found.rejected] == bad


@quick
@given(cells, st.sampled_from(",;|\t"), st.sampled_from(["\n", "\r\n"]), st.sampled_from(["utf-8", "utf-16"]))
def test_tables_lose_nothing(tmp_path_factory, rows, mark, end, encoding):
    said = [(f"{text}{end}{mark} {text}", label) for text, label in rows]  # every cell over two lines
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=mark, lineterminator=end)
    writer.writerows([("text", "label"), *said, ("one cell",)])
    path = tmp_path_factory.mktemp("load") / "rows.csv"
    path.write_bytes(text.getvalue().encode(encoding))
    found = load(path, task="generation")
    assert found.read == found.kept + len(found.rejected) == len(rows) + 1
    assert [(r.text.replace("\r\n", "\n"), r.completion) for r in found.records] == [
        (t.replace("\r\n", "\n"), k) for t, k in said
    ]
    assert [raw_bytes(r) for r in found.rejected] == [
        "one cell".encode("utf-16-le" if encoding == "utf-16" else encoding)
    ]


@quick
@given(records)
def test_records_survive_the_disk(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("records") / "rows.jsonl"
    save_records(path, rows)
    assert list(load_records(path)) == rows


numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers()


@quick
@given(st.sampled_from(["learning_rate", "r", "epochs", "batch_size", "val", "seed"]), numbers)
def test_a_recipe_is_valid_or_refused_in_one_line(field, value):
    try:
        recipe = Recipe(**{field: value})
    except InputError as error:
        assert len(str(error).splitlines()) == 1 and field in str(error)
        return
    assert recipe.warmup(500) <= max(1, recipe.total_steps(500)) or recipe.total_steps(500) == 0


@pytest.fixture(scope="module")
def tokenizer():
    from ftnb.model import DEFAULT_MODEL, load_tokenizer

    return load_tokenizer(DEFAULT_MODEL)


written = st.text(
    st.characters(exclude_categories=["Cs", "Cn", "Cc"], include_characters="\n\t"), min_size=1, max_size=40
).filter(str.strip)


@quick
@given(written, written, written | st.just(""))
def test_the_mask_covers_exactly_the_completion_and_its_end(tokenizer, text, answer, system):
    from ftnb.format import encode, encode_prompt, messages_for, stop_ids

    record = Record("r0", ({"role": "user", "content": text},), answer)
    try:
        row = encode(tokenizer, record, system=system)
    except InputError as error:
        assert len(str(error).splitlines()) == 1
        return
    ids, labels = list(row.input_ids), list(row.labels)
    prompt = encode_prompt(tokenizer, messages_for(record, system))
    assert ids[: len(prompt)] == list(prompt)
    assert labels[: len(prompt)] == [-100] * len(prompt)
    assert labels[len(prompt) :] == ids[len(prompt) :]
    assert ids[-1] in stop_ids(tokenizer)
    said = tokenizer.decode(
        ids[len(prompt) : -1], skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    assert said == answer


def test_an_answer_that_the_tokenizer_cannot_write_is_refused(tokenizer):
    from ftnb.format import encode

    row = Record(
        "r0", ({"role": "user", "content": "hello"},), "code \x04 ends"
    )  # SmolLM2 has no token for byte 4
    with pytest.raises(InputError, match="r0"):
        encode(tokenizer, row)
