"""The audit finds what was planted, leaves sound rows alone, repeats the counts of others, and its edits change nothing else."""

import importlib.util
import json
import os
import random
import string
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from ftnb.audit import (
    CONTROL,
    audit,
    audit_html,
    cases,
    diversity,
    held_out_probabilities,
    label_errors,
    languages,
    learning_curve,
    pii,
    plot_diversity,
    plot_findings,
    plot_label_errors,
    plot_learning_curve,
    redact,
    repair,
    unlike,
    write_audit,
)
from ftnb.data import Issue, Record, dedupe, load, store_records
from ftnb.plan import InputError

DATA = Path(os.environ.get("FTNB_SHARED") or ROOT.parent / "shared") / "data"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA.parent.name}/data")
LIGHT = ["labels", "private", "language", "mixed"]


def row(id, text, answer, **more):
    return Record(id, ({"role": "user", "content": text},), answer, **({"label": answer} | more))


def kinds(report):
    return {i.kind: set(i.ids) for i in report}


@pytest.fixture(scope="module")
def store():
    return store_records()


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("data_audit", ROOT / "benchmarks/data_audit.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Planted defects


@pytest.fixture(scope="module")
def planted(bench, store):
    new, ids, touched = bench.plant(store, bench.EVERY | bench.FRAMES, seed=5)
    return kinds(audit(new, "extraction", skip=["labels", "mixed"])), ids, {r.id for r in store} - touched


@pytest.mark.parametrize(
    "kind",
    "control-token encoding-damage empty-prompt empty-completion pii secret outer-whitespace key-order key-case"
    " json-spacing answer-wrapping value-type answer-shape ungrounded-slot contradiction exact-duplicate".split(),
)
def test_every_planted_defect_of_the_store_is_found_and_no_sound_row_is_named(planted, kind, store):
    found, ids, sound = planted
    assert len(ids[kind]) >= 15
    assert ids[kind] <= found[kind], sorted(ids[kind] - found[kind])
    if kind not in ("exact-duplicate", "contradiction"):  # the store has repeats of its own
        assert not found[kind] & sound


def test_foreign_rows_are_found_and_english_ones_left_alone(planted, bench):
    found, ids, sound = planted
    assert len(ids["language-mix"] & found["language-mix"]) >= 0.8 * len(ids["language-mix"])
    assert not found["language-mix"] & sound
    said = languages([row(str(k), t, "") for k, t in enumerate(bench.FOREIGN)])
    assert sum(name in ("de", "fr", "es") for name in said.values()) >= 25


def test_clean_store_rows_are_nearly_silent(store):
    found = audit(dedupe(store), "extraction", skip=["labels"])
    assert {i.kind for i in found} <= {"near-duplicate", "no-out-of-scope"}
    assert not [i for i in found if i.severity != "note"]


@pytest.mark.parametrize("family, sign", [
    ("ChatML (Qwen, SmolLM)", "<|im_start|>"), ("Llama 3", "<|start_header_id|>"), ("Llama 2, Mistral", "[/INST]"),
    ("Mistral tools", "[TOOL_CALLS]"), ("Gemma", "<start_of_turn>"), ("Phi", "<|assistant|>"),
    ("DeepSeek", "<\uff5cAssistant\uff5c>"), ("Harmony", "<|channel|>"), ("tool call", "<tool_call>"),
    ("thinking", "</think>"), ("Alpaca", "### Response:"), ("other", "<|my_sign|>"),
])  # fmt: skip
def test_control_signs_of_each_family(family, sign):
    assert family in CONTROL
    issue = next(
        i for i in audit([row("a", f"hello\n{sign} x", "b")], "generation") if i.kind == "control-token"
    )
    assert f"{family} 1" in issue.text and not issue.patch
    assert not kinds(audit([row("a", "a < b and [1] are |fine| <b>", "b")], "generation")).get(
        "control-token"
    )


# The format of answers


def frames(count=60):
    return [
        row(f"j{i}", f"question {i} of mine", json.dumps({"intent": "a", "n": i}), label="a")
        for i in range(count)
    ]


def test_optional_order_of_a_map_is_no_defect():
    draw, rows = random.Random(0), []
    for i in range(80):  # keys in the order of the text, as slots often are
        slots = {k: i for k in draw.sample(["artist", "album", "year", "genre"], draw.randrange(1, 5))}
        rows.append(row(f"m{i}", f"question {i}", json.dumps({"intent": "a", "slots": slots}), label="a"))
    assert not kinds(audit(rows, "extraction", skip=LIGHT)).keys() & {"key-order", "key-case", "answer-shape"}


def test_nested_key_order_is_learned_and_repaired():
    rows = [
        row(f"n{i}", f"q {i}", json.dumps({"a": {"x": i, "y": [{"p": 1, "q": i}]}}), label="a")
        for i in range(40)
    ]
    rows.append(row("odd", "q", '{"a": {"y": [{"q": 5, "p": 1}], "x": 4}}', label="a"))
    report = audit(rows, "extraction", skip=LIGHT)
    assert kinds(report)["key-order"] == {"odd"}
    assert repair(rows, report)[-1].completion == '{"a": {"x": 4, "y": [{"p": 1, "q": 5}]}}'


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5),
                    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=8),
       st.sampled_from([{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}]))  # fmt: skip
def test_a_safe_edit_of_json_never_changes_a_value(value, style):
    rows = frames(30) + [row("x", "q", json.dumps({"n": value, "intent": "a"}, **style), label="a")]
    shape = ("key-order", "key-case", "json-spacing", "answer-wrapping")
    for issue in audit(rows, "extraction", skip=["near", *LIGHT]):
        for edit in issue.patch if issue.kind in shape else ():
            assert json.loads(edit["after"]) == json.loads(edit["before"])


def test_key_case_is_not_merged_where_both_keys_stand():
    rows = frames() + [row("x", "q", '{"intent": "a", "Intent": "b", "n": 1}', label="a")]
    fixed = repair(rows, audit(rows, "extraction", skip=LIGHT))[-1]
    assert set(json.loads(fixed.completion).values()) >= {"a", "b"}


def test_style_is_free_where_answers_do_not_agree():
    ends = [".", "!", "?", ""]
    rows = [
        row(f"s{i}", f"q{i}", f"{'Yes' if i % 3 else 'yes'} number {i}{ends[i % 4]}", label=None)
        for i in range(80)
    ]
    assert not kinds(audit(rows, "generation", skip=LIGHT)).keys() & {
        "answer-case",
        "end-punctuation",
        "quoting",
    }


def test_full_stop_of_an_abbreviation_stays():
    rows = [row(f"s{i}", f"q{i}", f"Town {i}", label=None) for i in range(60)] + [
        row("u", "q", "The U.S.", label=None),
        row("t", "r", "London.", label=None),
    ]
    report = audit(rows, "generation", skip=LIGHT)
    assert kinds(report)["end-punctuation"] == {"u", "t"}
    assert [e["after"] for i in report if i.kind == "end-punctuation" for e in i.patch] == ["London"]


def test_class_spellings_are_repaired_in_answer_and_label():
    rows = [row(f"c{i}", f"q {i}", "card_lost" if i % 2 else "card_found") for i in range(40)] + [
        row("v", "q", "Card Lost ")
    ]
    fixed = repair(rows, audit(rows, "classification", skip=LIGHT))[-1]
    assert (fixed.completion, fixed.label) == ("card_lost", "card_lost")


def test_names_that_begin_small_are_no_style_and_content_is_no_preamble():
    rows = [row(f"s{i}", f"q{i}", f"The gene number {i} is active.", label=None) for i in range(60)]
    rows += [
        row(f"n{i}", f"p{i}", t, label=None)
        for i, t in enumerate(["p53 is active.", "iPhone sales rose.", "a-tDCS helps."])
    ]
    rows += [
        row("low", "x", "the gene is active.", label=None),
        row("tips", "y", "Here are some tips:\nRest.", label=None),
    ]
    report = audit(rows, "generation", skip=LIGHT)
    assert kinds(report)["answer-case"] == {"low"}
    assert not [i for i in report if i.kind == "preamble" and i.patch]


# Whole sets


def test_mixed_tasks_need_a_mark_in_the_prompt(store):
    half = [replace(r, completion=r.label) if k % 2 else r for k, r in enumerate(store)]
    said = [
        replace(r, messages=({"role": "system", "content": f"task {k % 2}"}, *r.messages))
        for k, r in enumerate(half)
    ]
    assert "mixed-tasks" in kinds(audit(half, "extraction", skip=["labels", "private", "language"]))
    for sound in (said, store):
        assert "mixed-tasks" not in kinds(audit(sound, "extraction", skip=["labels", "private", "language"]))


def test_effective_number_of_prompts():
    draw = random.Random(0)
    rows = [row(str(i), "".join(draw.choices(string.ascii_lowercase, k=40)), "x") for i in range(100)]
    assert diversity(rows).effective == pytest.approx(len(rows))
    assert diversity([row(str(i), f"order {i} is late", "x") for i in range(50)]).effective == pytest.approx(
        1
    )
    assert diversity([]).effective == 0
    skew = [
        row(f"{i}", t, "x") for i, t in enumerate(["where is my parcel"] * 9 + ["play some jazz tonight"])
    ]
    assert 1 < diversity(skew).effective < 2


def test_cases_are_seen_in_any_assistant_turn():
    turns = (
        {"role": "user", "content": "who wins"},
        {"role": "assistant", "content": "Sorry, I can only help with cards."},
        {"role": "user", "content": "ok"},
    )
    assert cases([Record("a", turns, "Bye.")], "conversation") == {
        "decline": ("a",),
        "out-of-scope": ("a",),
        "ambiguous": (),
    }
    assert cases([row("e", "t", '{"intent": "x", "slots": []}', label="x")], "extraction")["negative"] == (
        "e",
    )
    assert cases([row("o", "t", "out_of_scope"), row("m", "t", "maybe")], "classification") == {
        "out-of-scope": ("o",),
        "ambiguous": ("m",),
    }


def test_learning_curve_rises_and_is_nested(store):
    curve = learning_curve(dedupe(store), fractions=(0.1, 0.5, 1.0), repeats=3)
    assert curve.mean()[0] + 0.05 < curve.mean()[-1] <= 1
    assert all(low <= m <= high for m, (low, high) in zip(curve.mean(), curve.interval()))
    assert curve == learning_curve(dedupe(store), fractions=(0.1, 0.5, 1.0), repeats=3)
    for bad in (dict(repeats=1), dict(fractions=(0.5, 0.1)), dict(fractions=(0, 1))):
        with pytest.raises(InputError, match="fractions grow"):
            learning_curve(store, **bad)


def test_unlike_tells_two_sources_and_not_two_halves(store):
    rows = dedupe(store)
    halves = unlike(rows[::2], rows[1::2])
    assert halves.low <= 0.55 and halves.auc < 0.62
    polite = [
        replace(r, messages=({"role": "user", "content": f"kindly advise: {r.text}"},)) for r in rows[::2]
    ]
    apart = unlike(polite, rows[1::2])
    assert apart.low > 0.95 and "kindly" in " ".join(apart.here)
    assert "unlike-target" in kinds(audit(polite, "extraction", target=rows[1::2], skip=LIGHT))
    assert "unlike-target" not in kinds(audit(rows[::2], "extraction", target=rows[1::2], skip=LIGHT))
    with pytest.raises(InputError, match="20 rows"):
        unlike(rows[:5], rows)


# Label errors


def test_planted_label_errors_come_first(store):
    rows, draw = dedupe(store), random.Random(3)
    names = sorted({r.label for r in rows})
    wrong = set(draw.sample(range(len(rows)), 40))
    rows = [
        replace(r, label=draw.choice([n for n in names if n != r.label])) if k in wrong else r
        for k, r in enumerate(rows)
    ]
    truth = {rows[k].id for k in wrong}
    errors = label_errors(rows)
    assert len(errors) == len(rows) and errors == sorted(errors, key=lambda e: (-e.score, e.id))
    assert sum(e.id in truth for e in errors[:40]) >= 28
    flagged = {e.id for e in errors if e.flagged}
    assert len(flagged & truth) >= 0.7 * len(truth) and len(flagged & truth) >= 0.6 * len(flagged)


def test_repeats_of_a_wrong_row_do_not_vouch_for_it(store):
    wrong = [row(f"w{i}", "at what hour does the shop close today", "greet") for i in range(8)]
    rows = dedupe(store) + wrong
    names, grouped = held_out_probabilities(rows)
    loose = held_out_probabilities(rows, groups=[r.id for r in rows])[1]
    at = names.index("greet")
    assert grouped[-8:, at].max() < 0.5 < loose[-8:, at].min()


def test_given_probabilities_are_used_and_checked():
    rows = [row(f"r{i}", f"t {i}", "ab"[i % 2]) for i in range(20)]
    sure = np.array([[0.9, 0.1] if i % 2 == 0 else [0.1, 0.9] for i in range(20)])
    sure[3] = [0.97, 0.03]
    first = label_errors(rows, sure, ["a", "b"])[0]
    assert (first.id, first.given, first.suggested) == ("r3", "b", "a")
    for bad, names in ((sure[:5], ["a", "b"]), (sure, None), (sure, ["a", "x"]), (sure * 2, ["a", "b"])):
        with pytest.raises(InputError, match="probabilities must"):
            label_errors(rows, bad, names)


def test_a_task_the_proxy_cannot_learn_gives_no_label_errors():
    draw = random.Random(0)
    rows = [row(f"r{i}", "".join(draw.choices("abcdefg hijk", k=30)), draw.choice("ab")) for i in range(200)]
    assert len({r.label for r in rows}) == 2 and len({r.text for r in rows}) == 200
    same = [
        row(f"n{i}", f"{i} {i}", draw.choice("ab")) for i in range(200)
    ]  # one cluster, which no fold can cut
    assert "label-error" not in kinds(audit(same, "classification", skip=["private", "language"]))
    assert "label-error" not in kinds(audit(rows, "classification", skip=["private", "language"]))


# Private data


@pytest.mark.parametrize("text, kind", [
    ("write to jo.day+x@mail.example.co.uk now", "EMAIL"), ("my card 5555 5555 5555 4444", "CARD_NUMBER"),
    ("4111-1111-1111-1111 please", "CARD_NUMBER"), ("GB82 WEST 1234 5698 7654 32", "IBAN"), ("it is 536-90-4399", "US_SOCIAL_SECURITY_NUMBER"),
    ("call +49 30 901820", "PHONE_NUMBER"), ("call 020 7946 0958", "PHONE_NUMBER"), ("my mobile is 4155552671", "PHONE_NUMBER"), ("from 203.0.113.77", "IP_ADDRESS"),
    ("mi dni 12345678Z", "SPANISH_IDENTITY_NUMBER"), ("cpf 529.982.247-25", "BRAZILIAN_TAX_NUMBER"), ("RSSMRA85T10A562S", "ITALIAN_TAX_CODE"),
    ("password: hunter2xyz", "SECRET"), ("xoxb-123456789012-abcdefghij", "SECRET"), ("hf_" + "aB3x" * 9, "SECRET"),
    ("-----BEGIN RSA PRIVATE KEY-----", "SECRET"), ("https://bob:s3cr3tpw@host.com/x", "SECRET"),
])  # fmt: skip
def test_private_data_is_masked(text, kind):
    assert f"[{kind}]" in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("text", [
    "order 4111 1111 1111 1112", "version 10.2.3.4", "at 10:30 on 2024-05-06", "row 12345678", "save 20-30 %",
    "pay 1,000,000.00", "my pin is blocked since 2 days", "the token is invalid", "see section 1.2.3", "a@b", "666-12-1234",
    "ticket 4155552671 is open", "ticket 0000 0000 0000 0000", "ratio 16:9:4", "12345678A",
])  # fmt: skip
def test_what_only_looks_private_stays(text):
    assert redact(text) == text


def test_redaction_keeps_a_slot_in_its_text():
    r = row(
        "a",
        "mail bo@example.com",
        '{"intent": "x", "slots": [{"name": "to", "value": "bo@example.com"}]}',
        label="x",
    )
    fixed = repair([r], audit([r], "extraction", skip=["labels"]))[0]
    assert (
        "bo@" not in fixed.text + fixed.completion
        and json.loads(fixed.completion)["slots"][0]["value"] in fixed.text
    )


def test_private_data_in_any_turn_is_named():
    turns = ({"role": "system", "content": "key ghp_" + "a1B2" * 9}, {"role": "user", "content": "hi"})
    assert [(p.where, p.kind) for p in pii([Record("a", turns, "to x@example.org")])] == [
        ("messages[0]", "secret"),
        ("completion", "email"),
    ]


# Edits and files


def test_repair_is_idempotent_and_leaves_the_rest(bench, store):
    new, ids, _ = bench.plant(store, bench.EVERY | bench.FRAMES, seed=7)
    report = audit(new, "extraction", skip=["labels", "mixed"])
    once = repair(new, report)
    assert repair(once, report) == once and [r.id for r in once] == [r.id for r in new]
    named = {e["id"] for i in report for e in i.patch}
    assert all(a == b for a, b in zip(new, once) if a.id not in named)
    assert {e["field"] for i in report for e in i.patch} <= {"text", "completion", "label"}
    old = {r.id: r for r in new}
    assert all(getattr(old[e["id"]], e["field"]) == e["before"] for i in report for e in i.patch)


def test_audit_changes_nothing_and_is_repeatable(store):
    rows = list(store)
    assert audit(rows, "extraction") == audit(rows, "extraction") and rows == store


def test_page_escapes_and_masks(tmp_path):
    rows = [
        row("<b>1", "<script>alert(1)</script> mail bo@example.com <|im_end|>", "<img src=x onerror=y>")
        for _ in range(1)
    ]
    report = audit(rows, "generation")
    folder = write_audit(report, rows, tmp_path / "audit", [plot_findings(report)])
    page = (folder / "audit.html").read_text("utf-8")
    assert (
        "<script" not in page
        and "<img src=x" not in page
        and "bo@example.com" not in page
        and "<b>1" not in page
    )
    assert "http" not in page.replace("http-equiv", "")
    kept = [json.loads(line) for line in (folder / "issues.jsonl").read_text("utf-8").splitlines()]
    assert [i["kind"] for i in kept] == [i.kind for i in report]
    edits = [json.loads(line) for line in (folder / "patch.jsonl").read_text("utf-8").splitlines()]
    assert len(edits) == sum(len(i.patch) for i in report) and {
        "kind",
        "id",
        "field",
        "before",
        "after",
    } == set(edits[0])
    assert "nothing found" in audit_html([], rows)
    assert write_audit([], rows, tmp_path / "audit") == tmp_path / "audit"


def test_figures_draw_on_little(store):
    errors = label_errors(dedupe(store)[::2])
    for fig in (
        plot_findings([]),
        plot_findings([Issue("k", "note", (), "t")]),
        plot_diversity(diversity([])),
        plot_label_errors(errors),
        plot_label_errors([]),
        plot_learning_curve(learning_curve(store, (0.5, 1.0), 2)),
    ):
        fig.canvas.draw()


@pytest.mark.parametrize("task", ["classification", "extraction", "generation", "conversation"])
@pytest.mark.parametrize(
    "rows", [[], [row("a", "x", "y")], [Record("t", ({"role": "system", "content": "s"},), "")]]
)
def test_audit_of_next_to_nothing(task, rows):
    assert any(i.kind == "too-few-rows" for i in audit(rows, task))


# Real data


@needs_data
def test_counts_of_the_readmes_are_repeated(bench, capsys):
    rows = bench.real(DATA)["rows"]
    assert len(rows) >= 35
    assert not [r for r in rows if not r["agree"]]


@needs_data
def test_bank_rows_hold_nothing_private_and_one_language():
    rows = list(load(DATA / "banking77/train.jsonl").records)
    assert not pii(rows)
    assert set(languages(rows).values()) == {"en"}


@needs_data
@pytest.mark.slow
def test_benchmark_runs_on_a_small_slice(bench, tmp_path, capsys):
    out = tmp_path / "numbers.json"
    bench.main(DATA, out, ["planted"], limit=400)
    numbers = json.loads(out.read_text("utf-8"))["planted"]
    assert not [w for w in numbers["whole"] if not w["found"] or w["false_alarm"]]
    assert sum(r["restored"] for r in numbers["repairs"]) >= 0.99 * sum(
        r["planted"] for r in numbers["repairs"]
    )
    kinds_of = numbers["kinds"]
    missed = Counter({k: c["planted"] - c["found"] for k, c in kinds_of.items()})
    assert missed.total() <= 0.04 * sum(c["planted"] for c in kinds_of.values()), missed.most_common(4)
    assert not sum(c["false"] for k, c in kinds_of.items() if not k.endswith("duplicate"))
    assert "| control-token |" in capsys.readouterr().out


@needs_data
def test_label_errors_beat_plain_cleanlab(bench, capsys):
    found = bench.labels(DATA, limit=2500, seeds=(0,))
    ap = next(r for r in found["summary"] if r["measure"] == "average precision")
    assert ap["ours"] > ap["plain cleanlab"] and ap["ours"] > 0.6
