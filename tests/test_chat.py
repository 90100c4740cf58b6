"""The chat page in a real browser against the real server: two toy models side by side, stopped, refused, forged. And the
base that is served beside each kind of export. Toy models: random weights, every mechanism, no knowledge."""

import importlib.util
import json
import os
import re
import shutil
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from ftnb.chat import base_engine, base_file, beside, chat_for, chat_page, varied, without_adapter
from ftnb.data import Record, Splits
from ftnb.deploy import Artifact, export
from ftnb.engine import load_for_generation
from ftnb.plan import InputError, Recipe
from ftnb.server import serving
from ftnb.train import train
from toys import least_contrast, rows, toy_model

SHOTS = os.environ.get("FTNB_SHOTS")  # a folder to keep pictures in
FORGED = [
    "</script><img src=x onerror=document.title='owned'>",
    "<!--<script>document.title='owned'</script>",
    '"><svg/onload=document.title="owned">',
    "\u2028\u2029&lt;b&gt; \ud800 \x00 \u202egnp.exe",
]
SYSTEM = "Name the kind of message <b>briefly</b>."
needs_gguf = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="needs llama-cpp-python"
)


def record(i, text, completion="hours", label=None, **more):
    return Record(f"row-{i}", ({"role": "user", "content": text},), completion, label=label, **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    place = tmp_path_factory.mktemp("chat")
    made = [record(i, text, label, label) for i, (text, label) in enumerate(rows(24))]
    recipe = Recipe(
        name="toy",
        task="classification",
        model=str(toy_model(place / "model")),
        system=SYSTEM,
        epochs=2,
        batch_size=4,
        accumulation=1,
        learning_rate=3e-3,
        evals_per_epoch=1,
        max_new_tokens=4,
        max_length=256,
        shots=1,
    )
    return train(recipe, Splits(tuple(made[:12]), tuple(made[12:15]), tuple(made[15:])), place / "run")


@pytest.fixture(scope="module")
def artifacts(run):
    return {a.kind: a for a in export(run, kinds=("adapter", "merged"), dtype="float32")}


@pytest.fixture(scope="module")
def engines(artifacts):
    "Both, without what ends an answer: random weights may stop at once."
    found = beside(artifacts["adapter"])
    return {name: replace(engine, stops=frozenset()) for name, engine in found.items()}


# the base beside


def test_the_base_beside_an_adapter_is_the_adapter_switched_off_and_takes_no_memory(artifacts):
    tuned = load_for_generation(artifacts["adapter"])
    base = base_engine(artifacts["adapter"], tuned)
    ids = torch.tensor([tuned.prompt([{"role": "user", "content": "when do you open?"}])])
    with torch.inference_mode():
        with tuned.model.disable_adapter():
            off = tuned.model(input_ids=ids).logits
        got, on = base.model(input_ids=ids).logits, tuned.model(input_ids=ids).logits
    assert torch.equal(off, got) and not torch.allclose(on, got)
    held = {t.data_ptr() for t in tuned.model.parameters()}
    assert all(t.data_ptr() in held for t in base.model.parameters())
    assert (base.stops, base.system, base.context) == (tuned.stops, tuned.system, tuned.context)
    assert any("lora" in n for n, _ in tuned.model.named_parameters()), "the tuned model kept its adapter"
    assert not any("lora" in n for n, _ in without_adapter(tuned.model).named_parameters())


def answer_of(engine, text):
    engine = replace(engine, stops=frozenset())
    return engine.answer(engine.prompt([{"role": "user", "content": text}]), 8).ids


def test_each_kind_of_export_has_the_same_base(artifacts, engines):
    (name, tuned), (_, base) = engines.items()
    assert list(engines) == ["toy-adapter", "base"] and name == artifacts["adapter"].name
    other = beside(artifacts["merged"], "plain")
    for text in ("hours?", "what does a lamp cost"):
        assert answer_of(other["plain"], text) == answer_of(base, text)
        assert answer_of(other["toy-merged"], text) == answer_of(tuned, text)
    with pytest.raises(InputError, match="choose another"):
        beside(artifacts["adapter"], "toy-adapter")


@needs_gguf
def test_the_base_of_a_gguf_export_is_the_same_kind_of_file_and_made_once(
    run, engines, tmp_path, monkeypatch
):
    from ftnb.deploy import tensor_types

    monkeypatch.setenv("FTNB_CACHE", str(tmp_path / "cache"))
    for kind, main in (("gguf-f16", "F16"), ("gguf-q8_0", "Q8_0")):
        (artifact,) = export(run, kinds=(kind,))
        path = base_file(artifact)
        before = path.stat().st_mtime_ns
        assert base_file(artifact).stat().st_mtime_ns == before and path.is_relative_to(tmp_path / "cache")
        assert next(iter(tensor_types(path))) == main
        base = base_engine(artifact)
        if kind == "gguf-f16":
            assert answer_of(base, "hours?") == answer_of(engines["base"], "hours?")
        base.close()


# the page as text


class Parts(HTMLParser):
    "Counts elements, and keeps what names another place."

    def __init__(self):
        super().__init__()
        self.tags, self.links, self.handlers = Counter(), [], []

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.links += [
            v for k, v in attrs if k in ("src", "href", "action") and not v.startswith(("#", "data:,"))
        ]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


def test_the_page_is_one_text_without_a_way_out():
    prompts = [record(i, t, t) for i, t in enumerate(FORGED)]
    page = chat_page({FORGED[0]: "tuned", "base": FORGED[1]}, prompts, FORGED[2], FORGED[0])
    page.encode("utf-8")
    parts = Parts()
    parts.feed(page)
    assert (parts.tags["script"], parts.tags["style"], parts.tags["img"], parts.tags["svg"]) == (2, 1, 0, 0)
    assert not parts.links and not parts.handlers
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage|https?:", page
    )
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [p["wanted"] for p in data["prompts"]] == FORGED and data["system"] == FORGED[2]


def test_what_cannot_be_shown_is_refused_by_name():
    for models in ({}, {"a": "x", "b": "y", "c": "z"}):
        with pytest.raises(InputError, match="1 or 2 models"):
            chat_page(models)
    ends = Record("odd", ({"role": "user", "content": "x"}, {"role": "tool", "content": "3"}), "y")
    with pytest.raises(InputError, match="odd.*does not end with the user"):
        chat_page({"a": "tuned"}, [ends])
    many = [record(i, f"t{i}", label=label) for i, label in enumerate("aaabbc")]
    assert [r.id for r in varied([ends, *many], 4)] == ["row-0", "row-3", "row-5", "row-1"]


def test_a_page_that_others_can_open_tells_no_row_and_no_prompt(run, artifacts, tmp_path):
    mine, open_to_all = chat_for(artifacts["adapter"]), chat_for(artifacts["adapter"], private=False)
    told = [r.id for r in varied(run.splits.test)]
    assert told and all(f'"{i}"' in mine for i in told) and "Name the kind" in mine
    assert not any(r.text in open_to_all for r in run.splits.test) and "Name the kind" not in open_to_all
    assert '["toy","tuned"]' in chat_for(run) and '"base"]' not in chat_for(run, base="")
    moved = Artifact.load(shutil.copytree(artifacts["adapter"].dir, tmp_path / "alone"))
    assert '"prompts":[]' in chat_for(moved) and "Name the kind" in chat_for(moved)


# in a browser


def opened(browser, url, **options):
    "The page in a tab that records every error and every request to another place; refusals of the server excepted."
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 800}} | options)
    page, said = context.new_page(), []
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: said.append(str(error)))
    refused = "Failed to load resource: the server responded with a status of 4"
    page.on(
        "console",
        lambda m: said.append(m.text) if m.type == "error" and not m.text.startswith(refused) else None,
    )
    page.on("request", lambda r: said.append(r.url) if not r.url.startswith((url, "data:,")) else None)
    page.goto(url + "/")
    wait(page, "document.querySelectorAll('#columns select')[0].options.length > 1")
    return page, said


def running(url):
    "Answers in work, as the server counts them."
    text = urllib.request.urlopen(url + "/metrics").read().decode()
    return sum(float(n) for n in re.findall(r"(?m)^\w*running\w*(?:\{.*\})? ([\d.]+)", text))


def until(met, seconds=10):
    end = time.monotonic() + seconds
    while not met() and time.monotonic() < end:
        time.sleep(0.02)
    return met()


def wait(page, met):
    "Until the page finds it so; the page's own policy forbids playwright's way of asking."
    assert until(lambda: page.evaluate(met)), met


def finished(page):
    wait(page, "!document.querySelector('#send').disabled")
    return page.locator("#columns .said").all_inner_texts()


def prompts_of(run):
    turns = ({"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"})
    talk = Record("talk", (*turns, {"role": "user", "content": "and when?"}), "hours")
    return [*varied(run.splits.test, 3), talk, record("x", FORGED[0], FORGED[1])]


def test_both_answer_at_once_and_as_the_engines_do(browser, run, engines):
    prompts = prompts_of(run)
    html = chat_page({"toy-adapter": "tuned", "base": "base"}, prompts, SYSTEM, max_tokens=12)
    with serving(engines, pages={"/": html}) as url:
        page, said = opened(browser, url)
        page.keyboard.type("when do you open?")
        page.keyboard.press("Enter")
        got = finished(page)
        ids = {n: e.prompt([{"role": "user", "content": "when do you open?"}]) for n, e in engines.items()}
        wanted = [e.answer(ids[n], 12).text for n, e in engines.items()]
        seen = page.evaluate("COLUMNS.map((c) => c.text)")
        assert [s.strip() for s in seen] == [w.strip() for w in wanted] and wanted[0] != wanted[1]
        assert len(got) == 2
        facts = page.locator(".facts").all_inner_texts()
        told = (
            r"first token \d+ ms · (.* tokens/s · )?.*tokens · (cut|ended)"  # no rate where all came at once
        )
        assert all(re.search("cut|ended", f) for f in facts) and any(re.search(told, f) for f in facts), facts
        page.uncheck("#marks")
        assert page.locator("#columns mark").count() == 0

        page.locator("#prompts button").nth(0).click()
        finished(page)
        assert page.locator("#wanted-text").inner_text() == prompts[0].completion
        assert page.locator(".verdict").all_inner_texts() == ["✗ not as wanted"] * 2
        page.locator("#prompts button").nth(3).click()
        assert "2 earlier turns" in page.locator("#along").inner_text()
        finished(page)
        talk = engines["base"].answer(engines["base"].prompt(list(prompts[3].messages)), 12).text
        assert page.evaluate("COLUMNS[1].text") == talk

        page.fill("#system", "Speak like a pirate.")
        assert "yours" in page.locator("#now").inner_text()
        page.click("#alone")
        page.fill("#message", "ahoy")
        page.click("#send")
        finished(page)
        turns = [{"role": "system", "content": "Speak like a pirate."}, {"role": "user", "content": "ahoy"}]
        assert (
            page.evaluate("COLUMNS[0].text")
            == engines["toy-adapter"].answer(engines["toy-adapter"].prompt(turns), 12).text
        )
        before = page.evaluate("COLUMNS.map((c) => c.text)")
        page.fill("#temperature", "1.5")
        page.locator("article").nth(1).get_by_text("Again").click()
        finished(page)
        after = page.evaluate("COLUMNS.map((c) => c.text)")
        assert after[0] == before[0] and after[1] != before[1], "one column alone, drawn anew"
        assert said == []


def test_stop_frees_the_server(browser, run, engines):
    html = chat_page({"toy-adapter": "tuned", "base": "base"}, [], SYSTEM, max_tokens=1900)
    with serving(engines, pages={"/": html}) as url:
        page, said = opened(browser, url)
        for stop in (lambda: page.keyboard.press("Escape"), lambda: page.click("#stop")):
            page.fill("#message", "tell me everything")
            page.keyboard.press("Enter")
            assert until(lambda: running(url) == 2), "both are answered at once"
            wait(page, "COLUMNS.some((c) => c.text.length > 3)")
            stop()
            assert until(lambda: running(url) == 0), "the server goes on for nobody"
            finished(page)
            assert all("stopped by you" in f for f in page.locator(".facts").all_inner_texts())
        assert said == []


def test_a_key_and_refusals_are_said_in_words(browser, engines):
    html = chat_page({"toy-adapter": "tuned", "gone": "base"}, [], SYSTEM, max_tokens=4)
    with serving(engines, api_key="sesame", pages={"/": html}) as url:
        context = browser.new_context()
        page = context.new_page()
        page.goto(url + "/")
        page.wait_for_selector("#trouble:not([hidden])")
        assert "wants an API key" in page.locator("#trouble").inner_text()
        page.evaluate("document.querySelector('#settings').open = true")
        page.fill("#key", "sesame")
        page.press("#key", "Tab")
        wait(page, "document.querySelector('#trouble').textContent.includes('no model gone')")
        assert page.evaluate("[sessionStorage.getItem('ftnb-key'), localStorage.length]") == ["sesame", 0]
        assert context.cookies() == []
        page.locator("article select").nth(1).select_option("base")
        page.fill("#message", "hi")
        page.click("#send")
        finished(page)
        assert page.locator(".problem:visible").all_inner_texts() == [page.locator("#trouble").inner_text()]
        page.fill("#message", "word " * 3000)
        page.click("#send")
        finished(page)
        told = page.locator("article .problem").all_inner_texts()
        assert all("refused" in t and "tokens" in t and "HTTP 4" in t for t in told), told
        page.fill("#temperature", "7")
        page.fill("#message", "hi")
        page.click("#send")
        assert page.evaluate("document.activeElement.id") == "temperature"
        page.fill("#temperature", "0")
    page.click("#send")
    finished(page)
    assert all("Is it still running?" in t for t in page.locator("article .problem").all_inner_texts())


def as_events(text, reason="stop", more=""):
    pieces = [
        {"choices": [{"delta": {"content": t}, "finish_reason": None}]}
        for t in re.findall(r"(?s).{1,5}", text)
    ]
    pieces += [{"choices": [{"delta": {}, "finish_reason": reason}]}] if reason else []
    return "".join(f"data: {json.dumps(p)}\r\n\r\n" for p in pieces) + (more or "data: [DONE]\n\n")


def test_forged_and_broken_answers_stay_texts(browser, engines):
    "Answers that no toy model gives: written into the server's stream on the way to the page."
    html = chat_page(
        {"toy-adapter": "tuned", "base": "base"},
        [record("x", FORGED[0], '{"a": [1, 2]}')],
        FORGED[2],
        FORGED[1],
    )
    replies = {}
    with serving(engines, pages={"/": html}) as url:
        page, said = opened(browser, url)

        def reply(route):
            kind, value = replies[json.loads(route.request.post_data)["model"]]
            if kind == "text":
                return route.fulfill(status=200, content_type="text/event-stream", body=value)
            route.fulfill(status=kind, body=value, headers={"Retry-After": "3"})

        page.route("**/v1/chat/completions", reply)

        def asked(tuned, base):
            replies.update({"toy-adapter": tuned, "base": base})
            page.locator("#prompts button").nth(0).click()
            return finished(page)

        got = asked(("text", as_events(FORGED[0])), ("text", as_events(FORGED[1])))
        assert got == FORGED[:2] and page.title() == FORGED[1]
        assert page.evaluate("[...document.querySelectorAll('script, img, svg')].length") == 2
        hurt = "() => { const s = document.createElement('script'); s.textContent = 'window.hurt = 1'; document.body.append(s); return window.hurt }"
        assert page.evaluate(hurt) is None and all("Content Security Policy" in s for s in said)
        said.clear()
        got = asked(("text", as_events('{"a":[1,2]}')), ("text", as_events('{"a": [1, 2')))
        assert got[0] == '{\n  "a": [\n    1,\n    2\n  ]\n}' and got[1] == '{"a": [1, 2'
        facts = page.locator(".facts").all_inner_texts()
        assert "· valid JSON" in facts[0] and "not valid JSON:" in facts[1]
        assert page.locator(".verdict").all_inner_texts() == ["✓ as wanted", "✗ not as wanted"]
        asked(("text", as_events('{"b": 2, "a": 1}')), ("text", as_events('{"a":1,"b":2}')))
        assert "equal as JSON" in page.locator("#compare").inner_text()
        asked(("text", as_events("open the red door now")), ("text", as_events("open the blue door")))
        assert page.locator("#columns mark").all_inner_texts() == ["red", "now", "blue"]
        asked((429, '{"error": {"message": "8 wait"}}'), (500, "<html>oh"))
        told = page.locator("article .problem").all_inner_texts()
        assert "busy" in told[0] and "wait 3 s" in told[0] and "8 wait" in told[0] and "failed" in told[1]
        asked(
            ("text", as_events("half", None, " ")),
            ("text", as_events("x", None, 'data: {"error": {"message": "full"}}\n\n')),
        )
        told = page.locator("article .problem").all_inner_texts()
        assert "broke off" in told[0] and "says: full" in told[1]
        assert page.locator("#columns .said").all_inner_texts() == ["half", "x"], "what came stays"
        assert all("status of 500" in s for s in said), said


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(1280, 800), (360, 740)], ids=["wide", "phone"])
def test_it_can_be_read_and_worked_by_keys(browser, run, engines, scheme, size):
    html = chat_page({"toy-adapter": "tuned", "base": "base"}, prompts_of(run), SYSTEM, max_tokens=8)
    with serving(engines, pages={"/": html}) as url:
        page, said = opened(browser, url, color_scheme=scheme, viewport=dict(zip(("width", "height"), size)))
        page.evaluate("document.querySelectorAll('details').forEach((d) => d.open = true)")
        page.locator("#prompts button").nth(0).click()
        finished(page)
        page.evaluate(
            "() => { trouble('It is said in words.'); COLUMNS[1].problem.hidden = false; COLUMNS[1].problem.textContent = 'so'; }"
        )
        texts = "h1, h2, p, label, button, select, input, textarea, summary, .quiet, .said, .verdict, mark, .problem, kbd"
        assert page.evaluate(least_contrast(texts)) >= 4.5
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0], "the page scrolls sideways"
        unnamed = """() => [...document.querySelectorAll('button, input, select, textarea')].filter((n) => n.offsetParent
          && !n.labels?.length && !n.ariaLabel && !n.textContent.trim()).map((n) => n.outerHTML)"""
        assert page.evaluate(unnamed) == []
        assert (
            page.evaluate("[...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].length")
            >= 6
        )
        page.evaluate("document.activeElement.blur()")
        reached = set()
        for _ in range(60):
            page.keyboard.press("Tab")
            at = page.evaluate(
                "[document.activeElement.id || document.activeElement.textContent, getComputedStyle(document.activeElement).outlineStyle]"
            )
            assert at[0] == page.evaluate("document.body.textContent") or at[1] != "none", at
            reached.add(at[0])
        assert {"message", "send", "system", "temperature", "tokens", "key", "marks", "pretty"} <= reached
        small = "() => [...document.querySelectorAll('button, select')].filter((n) => n.offsetParent && n.getBoundingClientRect().height < 24).length"
        assert page.evaluate(small) == 0
        assert said == []
