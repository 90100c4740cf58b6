"""Slices that are not there, forged texts on the page, labels that come back: what the notebook has no room for."""

import json
import os
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import hypergeom

from conftest import ROOT
from ftnb.data import Record, Splits, frame_json
from ftnb.evaluate import Prediction, evaluate, frame_hit, rate
from ftnb.failures import (
    ClusterList,
    Label,
    SliceList,
    failure_clusters,
    failure_steps,
    find_slices,
    labels_to_edits,
    load_labels,
    marking_words,
    page_html,
    plot_clusters,
    plot_slices,
    rescored,
    safe_json,
    same_sides,
    script_of,
    side_by_side,
    slice_p,
    slices_by,
    traits,
    words_of,
    write_page,
)
from ftnb.plan import InputError
from ftnb.review import apply_edits, load_edits, row_hash, save_edits
from toys import least_contrast, quick

SHOTS = os.environ.get("FTNB_SHOTS")  # a folder to keep pictures in
FORGED = [
    "</script><img src=x onerror=document.title='owned'>",
    "<!--<script>",
    "]]></style><svg/onload=document.title='owned'>",
    '"><script>document.title="owned"</script>',
    "\u2028\u2029&lt;b&gt; \ud800 \x00 \u202egnp.exe",
    "{title} {table} {said} \\u003c",
    "__proto__",
]


def answers(n, wrong, seed=0, group=None):
    "Messages of random words, three classes; `wrong` says of each row whether its answer is."
    draw, made = random.Random(seed), []
    for i in range(n):
        text = " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 12)))
        label = draw.choice(["pay", "refund", "hours"])
        output = "no such" if wrong(i, text, label) else label
        made.append(Prediction(f"r{i}", text, label, output, label, group=group and group(i)))
    return made


WORDS = [a + b for a in "bdfgklm" for b in ("an", "or", "it", "us", "em")]


def record(i, text="when?", completion="pay", label="pay"):
    return Record(f"r{i}", ({"role": "user", "content": text},), completion, label=label, source=f"a.csv:{i}")


# slices


def test_words_and_scripts():
    assert words_of("It's 10% OFF, नमस्ते!") == ["it", "s", "10", "off", "नमस्ते"]
    assert words_of("東京の天気") == list("東京の天気") and words_of("") == []
    assert words_of("abcไทย") == ["abc", *"ไทย"]
    assert [script_of(t) for t in ("hi", "привет", "東京", "…")] == ["Latin", "Cyrillic", "Cjk", "none"]


def test_the_chance_of_a_slice_is_the_hypergeometric_one():
    wrong, inside = np.arange(40) < 12, np.arange(40) % 3 == 0
    hits = (wrong & inside).sum()
    assert slice_p(wrong, inside) == pytest.approx(hypergeom.sf(hits - 1, 40, 12, inside.sum()))
    assert slice_p(wrong, wrong) < 1e-9 and slice_p(wrong, ~wrong) == 1
    assert slice_p(wrong, np.zeros(40, bool)) == 1


def test_groups_that_go_wrong_together_count_once():
    "Ten groups of twenty equal rows: 200 rows, but ten pieces of evidence."
    groups = [f"g{i // 20}" for i in range(200)]
    wrong, inside = np.repeat(np.arange(10) < 3, 20), np.repeat(np.arange(10) < 4, 20)
    exact = hypergeom.sf(2, 10, 3, 4)
    assert slice_p(wrong, inside) < 1e-9
    assert slice_p(wrong, inside, groups, draws=4000) == pytest.approx(exact, abs=0.02)
    mixed = groups[:180] + [f"own{i}" for i in range(20)]
    assert 0.01 < slice_p(wrong, inside, mixed) < 0.3


def strewn(trials, chance, seed=0, n=300):
    "Slices found in `trials` sets of rows whose answers go wrong by `chance(text, label)`."
    draw = random.Random(seed)
    for trial in range(trials):
        rows = answers(n, lambda _, text, label: draw.random() < chance(text, label), trial)
        yield rows, find_slices(rows, traits(rows), seed=trial)


def found_it(rows, found, planted):
    real = {p.id for p in rows if planted(p)}
    return any(len(real & set(s.ids)) > 0.5 * len(real | set(s.ids)) for s in found.confirmed)


def test_random_failures_have_no_slice_and_a_planted_one_is_found():
    false = rate([bool(found.confirmed) for _, found in strewn(60, lambda *_: 0.2)], "tests")
    assert false.value <= 0.08, false
    hurt = strewn(20, lambda text, label: 0.6 if label == "refund" else 0.1)
    power = rate([found_it(rows, found, lambda p: p.label == "refund") for rows, found in hurt], "tests")
    assert power.value >= 0.9, power


@pytest.mark.slow
def test_false_slices_stay_below_the_level_in_many_trials():
    told = {}
    for name, chance in (("5%", 0.05), ("20%", 0.2), ("50%", 0.5)):
        told[name] = rate([bool(f.confirmed) for _, f in strewn(500, lambda *_, c=chance: c)], "tests")
    assert all(t.value <= 0.05 + 0.02 and t.low <= 0.05 for t in told.values()), told
    word = WORDS[0]
    power = rate(
        [
            found_it(rows, found, lambda p: word in words_of(p.text))
            for rows, found in strewn(100, lambda text, _: 0.6 if word in words_of(text) else 0.1)
        ],
        "tests",
    )
    assert power.value >= 0.8, power


@pytest.mark.slow
def test_groups_that_fail_whole_make_no_false_slice():
    draw, hits = random.Random(0), []
    for trial in range(200):
        bad = [draw.random() < 0.25 for _ in range(60)]
        rows = answers(300, lambda i, *_: bad[i % 60], trial, group=lambda i: f"g{i % 60}")  # noqa: B023
        texts = {i: rows[i].text for i in range(60)}  # rows of a group have one wording
        rows = [replace(p, text=texts[i % 60], label=rows[i % 60].label) for i, p in enumerate(rows)]
        hits.append(bool(find_slices(rows, traits(rows), seed=trial).confirmed))
    told = rate(hits, "tests")
    assert told.value <= 0.08 and told.low <= 0.05, told


def test_the_half_that_is_searched_is_not_the_half_that_is_tested():
    rows = answers(200, lambda i, text, label: label == "pay" and i % 2)
    found = find_slices(rows, traits(rows))
    assert found and found.confirmed[0].rule.startswith("class is pay")
    best = found.confirmed[0]
    assert best.n < len(best.ids) and best.wrong <= best.n
    assert {i for i in best.ids} <= {p.id for p in rows if p.label == "pay"}
    assert [s.p for s in found] == sorted(s.p for s in found)


def test_rows_without_failures_or_without_anything_else_have_no_slices():
    for wrong in (lambda *_: False, lambda *_: True):
        rows = answers(60, wrong)
        found = find_slices(rows, traits(rows))
        assert list(found) == [] and not found.confirmed and found.n == 60
        assert plot_slices(found) and found._repr_markdown_()
    few = answers(3, lambda i, *_: i == 0)
    assert list(find_slices(few, traits(few))) == []


def test_traits_need_the_records_they_are_asked_of():
    rows = answers(30, lambda *_: False)
    records = [record(i, p.text, label=p.label) for i, p in enumerate(rows)]
    table = traits(rows, records, records[:5])
    assert {"words", "class", "overlap"} <= set(table) and (table["overlap"][:5] == 1).all()
    with pytest.raises(InputError, match="belongs to none of the 29 records"):
        traits(rows, records[1:])
    with pytest.raises(InputError, match="no trait 'colour'; valid: words"):
        slices_by(rows, table, "colour")
    assert slices_by(rows, table, "class", k=9)["n"].sum() == 30
    assert slices_by(rows, table, "words", k=9)["n"].sum() == 30


# clusters


def test_clusters_hold_each_wrong_row_once_and_name_their_words():
    made = answers(400, lambda *_: False)
    late = [Prediction(f"l{i}", f"parcel late {w}", "hours", "pay", "hours") for i, w in enumerate(WORDS)]
    card = [Prediction(f"c{i}", f"card blocked {w}", "pay", "refund", "pay") for i, w in enumerate(WORDS)]
    found = failure_clusters([*made, *late, *card])
    assert sorted(i for c in found for i in c.ids) == sorted(p.id for p in [*late, *card])
    big = sorted(found, key=lambda c: -c.n)[:2]
    assert {frozenset(c.words[:2]) for c in big} == {
        frozenset(("parcel", "late")),
        frozenset(("card", "blocked")),
    }
    assert all(c.said == c.said_wrong for c in big)
    assert not any(c.small for c in big) and plot_clusters(found)
    again = failure_clusters([*made, *late, *card])
    assert list(found) == list(again)


@pytest.mark.parametrize(
    "texts", [[""], ["same"] * 7, ["", "?", "!!"], ["a b", "c d"], ["x"] * 40 + ["y"] * 40]
)
def test_clusters_of_hardly_any_words(texts):
    rows = [Prediction(str(i), t, "yes", "no", "yes") for i, t in enumerate(texts)]
    found = failure_clusters(rows)
    assert sum(c.n for c in found) == len(rows) and found._repr_markdown_() and plot_clusters(found)
    assert failure_clusters([replace(p, output="yes") for p in rows]) == []
    assert all(c.small for c in found) == (len(rows) < 5)


def test_marking_words_do_not_mark_what_is_everywhere():
    inside, outside = ["the red door"] * 10, ["the blue door"] * 10
    assert marking_words(inside, outside)[0][0] == "red" and len(marking_words(inside, outside)) == 1
    assert marking_words(inside, inside) == [] == marking_words(["red"], ["blue"] * 100)
    assert [w for w, _ in marking_words(["it's"] * 30, ["no"] * 30)] == ["it"]


def test_steps_say_where_and_about_what():
    rows = answers(300, lambda i, text, label: label == "pay" and i % 3)
    steps = failure_steps(find_slices(rows, traits(rows)), failure_clusters(rows))
    assert steps[0].startswith("class is pay: ") and "on rows not searched" in steps[0]
    random_rows = answers(300, lambda i, *_: i % 7 == 0)
    found = find_slices(random_rows, traits(random_rows))
    assert "no slice is shown to be worse" in failure_steps(found)[0]
    assert failure_steps(SliceList(), ClusterList()) == []


# the page


class Seen(HTMLParser):
    "Elements of a page, as an HTML parser sees them."

    def __init__(self, text):
        super().__init__(convert_charrefs=False)
        self.tags, self.scripts, self.attrs, self.inside = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.inside = tag == "script"
        self.attrs += attrs

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)


def forged_page():
    rows = [Prediction(f"{i}{t}", t, t, "x" + t, label=t) for i, t in enumerate(FORGED)]
    records = [
        Record(
            p.id,
            ({"role": "system", "content": p.text}, {"role": "user", "content": p.text}),
            p.expected,
            label=p.label,
        )
        for p in rows
    ]
    return rows, page_html({FORGED[0]: rows, FORGED[3]: rows}, records, title=FORGED[0])


def test_forged_texts_add_no_element_and_end_no_script():
    rows, text = forged_page()
    text.encode("utf-8")
    plain = page_html(
        {"a": [Prediction("1", "t", "e", "o", label="l")], "b": [Prediction("1", "t", "e", "o", label="l")]}
    )
    seen = Seen(text)
    assert seen.tags == Seen(plain).tags
    assert len(seen.scripts) == 2
    data = json.loads(seen.scripts[0])
    assert [r[1] for r in data["rows"]] == FORGED and data["rows"][0][7][0][0] == "x" + FORGED[0]
    assert not set("<>&\u2028\u2029") & set(seen.scripts[0])
    assert not [a for a in seen.attrs if a[0].startswith("on") or a[0] in ("src", "style")]


def test_the_page_asks_for_nothing_and_its_policy_allows_only_its_script():
    import base64
    import hashlib

    _, text = forged_page()
    seen = Seen(text)
    policy = next(v for k, v in seen.attrs if k == "content" and "default-src" in v)
    digest = base64.b64encode(hashlib.sha256(seen.scripts[1].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy and "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace(FORGED[0], ""))


@quick
@given(
    st.recursive(st.text() | st.none() | st.integers(), lambda c: st.lists(c) | st.dictionaries(st.text(), c))
)
def test_safe_json_means_the_same(value):
    text = safe_json(value)
    assert json.loads(text) == value and not set("<>&\u2028\u2029") & set(text)
    text.encode("utf-8")


def test_turns_around_the_message_are_on_the_page():
    call = {"name": "lookup", "arguments": {"store": "elm"}}
    turns = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
    )
    turns += (
        {"role": "user", "content": "open now?"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": call}]},
    )
    r = Record("r0", (*turns, {"role": "tool", "content": "open"}), "It is open.")
    text = page_html({"a": [Prediction("r0", r.text, r.completion, "No.")]}, [r])
    row = json.loads(Seen(text).scripts[0])["rows"][0]
    assert [who for who, _ in row[2]] == ["system", "user", "assistant", "assistant", "tool"]
    assert "lookup" in row[2][3][1] and row[1] == "open now?" and row[5] == row_hash(r)


def test_other_rows_are_refused():
    a = answers(5, lambda *_: False)
    for systems, told in (
        ({}, "no system"),
        ({"a": []}, "a answered no row"),
        ({"a": a, "b": a[1:]}, "a and b answered different rows, first: 'r0'"),
        ({"a": a, "b": [*a[:-1], replace(a[-1], id="r9")]}, "different rows, first: 'r4'"),
        ({"a": [*a, a[0]]}, "row 'r0' twice"),
        ({"a": a, "b": [replace(p, expected="other") for p in a]}, "row 'r0' is to be"),
    ):
        with pytest.raises(InputError, match=told):
            page_html(systems)
    with pytest.raises(InputError, match="no system 'c'"):
        page_html({"a": a}, about="c")
    with pytest.raises(InputError, match="none of the 1 records"):
        page_html({"a": a}, [record(0)])
    with pytest.raises(InputError, match="no row 'zz'"):
        side_by_side({"a": a}, "zz")


def test_one_row_as_a_table_marks_the_difference():
    rows = [Prediction("1", "a | b", frame_json("go", [("day", "mon")]), frame_json("go", [("day", "tue")]))]
    text = side_by_side({"x": rows}, "1")
    assert "<del>mon</del> **tue**" in text and "a \\| b" in text and "x ✗" in text


def big_page(path, n=10_000):
    rows = answers(n, lambda i, *_: i % 10 == 3)
    other = [replace(p, output=p.expected if i % 2 else p.output) for i, p in enumerate(rows)]
    records = [record(i, p.text, p.expected, p.label) for i, p in enumerate(rows)]
    return write_page(path, {"base": rows, "tuned": other}, records), records


def opened(browser, path, **options):
    "The page in a tab that records every error and every request."
    context = browser.new_context(accept_downloads=True, **options)
    page, said = context.new_page(), []
    page.set_default_timeout(60_000)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("console", lambda message: said.append(message.text) if message.type == "error" else None)
    page.on("request", lambda r: said.append(r.url) if not r.url.startswith(("file:", "blob:")) else None)
    page.goto(path.as_uri())
    page.wait_for_selector("article, .none")
    return page, said


@pytest.mark.slow
def test_forged_texts_stay_texts_in_a_browser(browser, tmp_path):
    _, text = forged_page()
    path = tmp_path / "forged.html"
    path.write_text(text, encoding="utf-8")
    page, said = opened(browser, path)
    assert said == [] and page.title() == FORGED[0]
    assert page.locator("article").count() == len(FORGED)
    assert page.locator("article img, article svg, article script, main style").count() == 0
    shown = page.locator("article .text").all_inner_texts()
    assert shown[0] == FORGED[0] and "\\u202e" in shown[4] and "\\u0000" in shown[4]
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    hurt = page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.hurt = 1'; document.body.append(s); return window.hurt }"
    )
    assert hurt is None, "the policy lets another script run"


@pytest.mark.slow
def test_labels_by_keys_come_back_as_patches(browser, tmp_path):
    rows = [
        Prediction(f"r{i}", f"message {i}", frame_json(a), frame_json(b), a)
        for i, (a, b) in enumerate([("pay", "refund"), ("pay", "pay"), ("hours", "pay"), ("refund", "pay")])
    ]
    records = [record(int(p.id[1:]), p.text, p.expected, p.label) for p in rows]
    path = write_page(tmp_path / "page.html", {"base": rows, "tuned": rows}, records)
    page, said = opened(browser, path)
    assert page.locator("article").count() == 3, "the page opens on what is wrong"
    page.fill("#reviewer", "ann")
    page.keyboard.press("Escape")
    page.keyboard.press("2")
    field = page.locator("#answer")
    assert field.input_value() == rows[0].expected
    field.press("Control+Enter")
    assert "reference as it stands" in page.locator("#status").inner_text()
    field.fill("not json")
    field.press("Control+Enter")
    assert (
        "JSON" in page.locator("#status").inner_text() and page.locator("#count").inner_text() == "0 labelled"
    )
    field.fill(frame_json("refund"))
    field.press("Control+Enter")
    page.keyboard.press("1")
    page.keyboard.press("3")
    assert page.locator("#count").inner_text() == "3 labelled"
    page.keyboard.press("u")
    assert page.locator("#count").inner_text() == "2 labelled"
    page.keyboard.press("3")

    page.reload()  # kept
    page.wait_for_selector("article")
    assert page.locator("#count").inner_text() == "3 labelled"
    assert page.locator("article .label").first.inner_text().startswith("reference is wrong")
    with page.expect_download() as waited:
        page.click("#save")
    file = tmp_path / "labels.jsonl"
    waited.value.save_as(file)
    labels = load_labels(file)
    assert [(x.id, x.label, x.reviewer) for x in labels] == [
        ("r0", "wrong", "ann"), ("r2", "right", "ann"), ("r3", "both", "ann")
    ]  # fmt: skip
    save_edits(tmp_path / "edits.jsonl", labels_to_edits(labels, records))
    done = apply_edits(records, load_edits(tmp_path / "edits.jsonl"))
    assert [r.label for r in done.records] == ["refund", "pay", "hours", "refund"] and not done.report
    assert done.actions["edit"] == 1 and done.actions["keep"] == 2
    assert said == []


@pytest.mark.slow
def test_differences_are_marked(browser, tmp_path):
    cases = {
        ("open the red door now", "open the blue door"): [("DEL", "red"), ("INS", "blue"), ("DEL", " now")],
        ("yes", "yes"): [],
        ("the door is open", "Quite another thing, said at length"): [
            ("INS", "Quite another thing, said at length")
        ],
        ("東京の天気は晴れです", "京都の天気は晴れです"): [("DEL", "東"), ("INS", "都")],
        ('{"a": "x, y", "b": 1}', '{"a": "z. w", "b": 1}'): [("DEL", "x, y"), ("INS", "z. w")],
        ("", "something"): [("INS", "something")],
        ("word " * 3000, "word " * 2999 + "end"): [("DEL", "word "), ("INS", "end")],
    }
    rows = [Prediction(str(i), "?", a, b) for i, (a, b) in enumerate(cases)]
    page, said = opened(browser, write_page(tmp_path / "page.html", {"s": rows}))
    page.click("#clear")
    read = "node => [...node.querySelectorAll('ins, del')].map(n => [n.tagName, n.textContent])"
    for i, marks in enumerate(cases.values()):
        found = page.locator("article").nth(i).evaluate(read)
        assert sorted(map(tuple, found)) == sorted(marks), (list(cases)[i], found)
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    assert page.locator("article ins").count() == 0 and said == []


@pytest.mark.slow
def test_ten_thousand_rows_are_filtered_and_walked(browser, tmp_path):
    from playwright.sync_api import expect

    path, _ = big_page(tmp_path / "big.html")
    assert path.stat().st_size < 4_000_000
    page, said = opened(browser, path)
    assert page.locator("article").count() == 40
    took = page.evaluate(
        "() => { const t = performance.now(); document.querySelector('#clear').click(); return performance.now() - t }"
    )
    assert page.locator("#where").inner_text() == "Row 1 of 10,000"
    page.keyboard.press("/")
    page.keyboard.type("r9999")
    expect(page.locator("#where")).to_have_text("Row 1 of 1")
    page.click("#clear")
    assert page.locator("#where").inner_text() == "Row 10,000 of 10,000", "the row in view stays"
    page.locator("#back").evaluate("button => { for (let i = 0; i < 249; i++) button.click(); }")
    page.locator("article").first.click()
    for _ in range(45):
        page.keyboard.press("j")
    assert page.locator("#where").inner_text() == "Row 46 of 10,000"
    assert page.locator("#pages").inner_text() == "Page 2 of 250"
    page.select_option("#differ", "verdicts")
    assert page.locator("#where").inner_text().endswith("of 1,000")
    assert took < 5_000 and said == []


CONTRAST = least_contrast("h1, p, td, th, span, label, select, button, ins, del, .said, .who, input")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_the_page_can_be_read(browser, tmp_path, scheme, width):
    path, _ = big_page(tmp_path / "page.html", 60)
    page, _ = opened(browser, path, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert page.evaluate(CONTRAST) >= 4.5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for key in "j2":
        page.keyboard.press(key)
    bar = page.locator("#bar").bounding_box()["y"]
    box = page.locator("form.edit").bounding_box()
    assert box["y"] + box["height"] <= bar + 1, "the bar covers the form"
    assert page.locator("article.here").get_attribute("aria-current") == "true"
    unnamed = "[...document.querySelectorAll('button, select, input, textarea')].filter((n) => !n.labels?.length && !n.ariaLabel && !n.textContent.trim()).length"
    assert page.evaluate(unnamed) == 0
    if SHOTS:
        page.screenshot(path=str(Path(SHOTS) / f"failures-{scheme}-{width}.png"))


# labels


def lines(path, *rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def labelled(r, label="right", **more):
    return dict(id=r.id, label=label, reference=r.completion, text=r.text, seen=row_hash(r)) | more


def test_labels_that_do_not_fit_are_refused_with_their_line(tmp_path):
    rows = [record(i, f"message {i}") for i in range(3)]
    file = tmp_path / "labels.jsonl"
    good = labelled(rows[0])
    for bad, told in (
        ({"id": "r0"}, "line 2: not a label"),
        (good | {"label": "maybe"}, "line 2: not a label: label must be one of right, wrong, both"),
        (good | {"label": "wrong"}, "line 2: not a label: row r0: a label has an answer"),
        (good | {"answer": "x"}, "line 2: not a label: row r0: a label has an answer"),
        (good | {"colour": "red"}, "line 2: not a label"),
        (good | {"id": 7}, "line 2: not a label: a label needs the id"),
        (labelled(rows[2]), "line 2: row r2 is labelled in line 1 already"),
    ):
        lines(file, labelled(rows[2]), bad)
        with pytest.raises(InputError, match=re.escape(told)):
            load_labels(file)
    with pytest.raises(InputError, match="cannot read labels"):
        load_labels(tmp_path / "none.jsonl")
    for row, told in (
        (good | {"id": "zz"}, "line 1: no row 'zz' among the 3 records"),
        (good | {"seen": "0" * 16}, "line 1: row r0 is not what was read"),
        (
            good | {"seen": "", "reference": "other"},
            "line 1: row r0 is not what was read: 'other' then, 'pay' now",
        ),
        (good | {"seen": "", "text": "other"}, "line 1: row r0 is not what was read"),
        (good | {"label": "wrong", "answer": " "}, "line 1: row r0: the answer is empty"),
        (
            good | {"label": "wrong", "answer": "new class"},
            "line 1: row r0: no row has the class 'new class'",
        ),
        (good | {"time": "yesterday"}, "line 1: time must be ISO 8601"),
    ):
        with pytest.raises(InputError, match=re.escape(told)):
            labels_to_edits(load_labels(lines(file, row)), rows, "ann")
    with pytest.raises(InputError, match="line 1: whose label is this"):
        labels_to_edits(load_labels(lines(file, good)), rows)
    assert labels_to_edits([Label("r0", "right", "pay")], rows, "ann")[0].action == "keep"


def test_a_planted_wrong_reference_is_corrected_once_and_for_all(tmp_path):
    rows = [record(i, f"message {i}", label, label) for i, label in enumerate(["pay", "refund", "pay"])]
    file = lines(
        tmp_path / "labels.jsonl",
        labelled(rows[0], "wrong", answer="refund"),
        labelled(rows[1], "both", system="tuned"),
    )
    edits = labels_to_edits(load_labels(file), rows, "ann")
    assert [(e.id, e.action, e.field) for e in edits] == [
        ("r0", "edit", "completion"),
        ("r0", "edit", "label"),
        ("r1", "keep", ""),
    ]
    assert "tuned is fine, too" in edits[-1].reason
    save_edits(tmp_path / "edits.jsonl", edits)
    once = apply_edits(rows, load_edits(tmp_path / "edits.jsonl"))
    assert (once.records[0].completion, once.records[0].label, list(once.report)) == ("refund", "refund", [])
    save_edits(tmp_path / "edits.jsonl", edits)  # the same labels converted again
    twice = apply_edits(once.records, load_edits(tmp_path / "edits.jsonl"))
    assert twice.records == once.records and not twice.report
    with pytest.raises(InputError, match="r0 is not what was read"):
        labels_to_edits(load_labels(file), list(once.records), "ann")


def test_a_correction_moves_no_row_and_changes_the_hash():
    read = [
        record(i, f"message {i} {WORDS[i % 35]}", "pay" if i % 2 else "refund", "pay" if i % 2 else "refund")
        for i in range(40)
    ]
    before = Splits(read[:20], read[20:30], read[30:])
    copy = replace(read[35], id="copy")  # a repeat that was left out before the split
    read.append(copy)
    after = [replace(r, completion="pay", label="pay") for r in read if r.id != "r35"]
    made = same_sides(before, read, after)
    assert {r.id for r in made.test} == {f"r{i}" for i in range(30, 40) if i != 35} | {"copy"}
    assert [r.id for r in made.train] == [r.id for r in before.train] and made.hash != before.hash
    reworded = [
        replace(r, messages=({"role": "user", "content": "new words"},)) if r.id == "r31" else r for r in read
    ]
    assert "r31" in {r.id for r in same_sides(before, read, reworded).test}
    with pytest.raises(InputError, match="row 'zz' is not among"):
        same_sides(before, read, [replace(read[0], id="zz")])


def test_scores_are_made_anew_from_the_answers_that_were_kept():
    rows = [Prediction(f"r{i}", f"message {i}", "pay", "pay" if i else "refund", "pay") for i in range(10)]
    report = evaluate(rows, "classification", "tuned", ("pay", "refund"), leaked=["r1"])
    records = [record(i, f"message {i}") for i in range(10)]
    assert rescored(report, records) == report
    records[0] = replace(records[0], completion="refund", label="refund")
    again = rescored(report, records)
    assert (report.metrics["accuracy"].value, again.metrics["accuracy"].value) == (0.9, 1.0)
    assert again.leaked == ("r1",) and again.notes[-1].startswith("1 of 10 references corrected")
    with pytest.raises(InputError, match="belongs to none of the 9 records"):
        rescored(report, records[1:])
    frames = [replace(p, expected="pay") for p in rows]  # a classifier of intents, on records that are frames
    intents = evaluate(frames, "intent", "tfidf", ("pay", "refund"))
    framed = [
        record(i, f"message {i}", frame_json("refund" if i == 0 else "pay"), "refund" if i == 0 else "pay")
        for i in range(10)
    ]
    assert rescored(intents, framed).metrics["intent_accuracy"].value == 1.0


def test_nothing_of_the_page_is_written_where_it_cannot_be(tmp_path):
    a = answers(3, lambda *_: False)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_page(tmp_path / "file" / "page.html", {"a": a})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]
    assert frame_hit(a[0]) and ROOT.is_dir()
