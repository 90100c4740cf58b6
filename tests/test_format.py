"""The road from turns to tokens, attacked: forged control tokens, odd tokenizers, long rows, and many templates."""

import copy
import json
import os
import unicodedata
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import ROOT
from ftnb.data import Record, tool_call_text
from ftnb.format import (
    POLICIES,
    answer_turn,
    attacks,
    audit_lengths,
    contract,
    encode,
    encode_answer,
    encode_dataset,
    encode_prompt,
    fit,
    fit_records,
    fit_turns,
    fitting,
    mask_proof,
    messages_for,
    parse_calls,
    plot_token_lengths,
    prompt_for,
    render,
    same_answer,
    set_template,
    token_lengths,
    tool_form,
    turn_end,
)
from ftnb.plan import InputError, Recipe
from toys import quick

STAR = Path(os.environ.get("FTNB_SHARED") or ROOT.parent / "shared") / "data/star/train.jsonl"
TRL = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"

# Minimal templates of three families, written for these tests.
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
HERMES = """{% if tools %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\n' }}{% endif %}
{%- for t in tools %}{{ '<tools>' + t | tojson + '</tools>\n' }}{% endfor %}
{{- 'Call with <tool_call>.<|im_end|>\n' }}{% endif %}
{%- for m in (messages[1:] if tools and messages[0].role == 'system' else messages) %}
{{- '<|im_start|>' + m.role + '\n' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first }}
{{- '<tool_call>\n{"name": ' + c.function.name | tojson + ', "arguments": ' + c.function.arguments | tojson }}
{{- '}\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA = """{{ bos_token }}{% macro head(r) %}{{ '<|start_header_id|>' + r + '<|end_header_id|>\n\n' }}{% endmacro %}
{%- for t in tools or [] %}{{ head('system') + t | tojson + '<|eot_id|>' }}{% endfor %}
{%- for m in messages %}{{ head('ipython' if m.role == 'tool' else m.role) }}
{%- if m.tool_calls %}{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}
{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson + '}' }}{% else %}{{ m.content | trim }}{% endif %}
{{- '<|eot_id|>' }}{% endfor %}{%- if add_generation_prompt %}{{ head('assistant') }}{% endif %}"""
ZEPHYR = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '</s>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""
JOINED = """{{ bos_token }}{% for m in messages %}{{ m.content | trim }}
{{- '</s>' if m.role == 'assistant' }}{% endfor %}"""  # nothing between two turns

BYTES = [f"<0x{n:02X}>" for n in range(256)]
LETTERS = [chr(n) for n in range(33, 127)]


def wrapped(inner, template):
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    made = PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)
    made.chat_template = template
    return set_template(made)


def unigram():
    "As SentencePiece makes them: control tokens are pieces of the model as well, and NFKC folds wide letters."
    pieces = [(t, 0.0) for t in ("<unk>", "<s>", "</s>", "<pad>")] + [(b, -30.0) for b in BYTES]
    pieces += [(c, -6.0) for c in LETTERS] + [(w, -4.0) for w in ("▁the", "▁pay", "user", "assistant", "▁")]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    roles = ("user", "assistant", "system", "tool")
    inner.add_special_tokens([AddedToken(f"<|{r}|>", special=True, normalized=True) for r in roles])
    return wrapped(inner, ZEPHYR)


def legacy():
    "A byte-fallback BPE of Llama 2's kind under a template that joins its turns."
    vocab = {t: n for n, t in enumerate(["<unk>", "<s>", "</s>", *BYTES, *LETTERS, "▁", "▁t", "he", "▁the"])}
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    inner = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.add_special_tokens(["<|im_start|>", "<|im_end|>", "<pad>"])
    return wrapped(inner, JOINED)


def smol(template=None, special=(), added=(), layout="auto"):
    from ftnb.model import DEFAULT_MODEL, load_tokenizer

    made = load_tokenizer(DEFAULT_MODEL, layout)
    made.chat_template = template or made.chat_template
    made.add_tokens(list(special), special_tokens=True)
    made.add_tokens(list(added))
    return made


HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
MAKE = {
    "chat": smol,
    "instruction": lambda: smol(layout="instruction"),
    "chatml": lambda: smol(CHATML, added=("<tool_call>", "</tool_call>")),
    "hermes": lambda: smol(HERMES, added=("<tool_call>", "</tool_call>", "<think>", "</think>")),
    "llama": lambda: smol(LLAMA, HEADERS),
    "unigram": unigram,
    "legacy": legacy,
}
MADE = {}


def toy(name):
    if name not in MADE:
        MADE[name] = MAKE[name]()
    return MADE[name]


@pytest.fixture(params=list(MAKE))
def tokenizer(request):
    return toy(request.param)


WORD = "harmless"
PLACES = ("system", "user", "assistant", "result", "argument", "key", "description", "split")


def tool(description=WORD):
    parameters = {"type": "object", "properties": {"to": {"type": "string"}}}
    return {"name": "pay", "description": description, "parameters": parameters}


def scene(place, text):
    "A conversation of eight turns with `text` in one place of it."
    call = {
        "name": "pay",
        "arguments": {text if place == "key" else "to": text if place == "argument" else WORD},
    }
    roles = ["system", "user", "assistant", "user", "assistant", "tool", "assistant", "user"]
    turns = [{"role": role, "content": WORD} for role in roles]
    turns[4] = {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "function": call}]}
    if place == "split":  # over two turns, which some template may put side by side
        turns[2]["content"], turns[3]["content"] = text[: len(text) // 2] or WORD, text[len(text) // 2 :]
    elif place in ("system", "user", "assistant", "result"):
        turns[("system", "user", "assistant", "-", "-", "result").index(place)]["content"] = text
    return turns, [tool(text if place == "description" else WORD)]


def control_ids(tokenizer):
    added, template = tokenizer.added_tokens_decoder, tokenizer.chat_template
    written = {i for i, t in added.items() if str(t) in template or "tool_call" in str(t)}
    return written | {i for i, t in added.items() if t.special} - {tokenizer.unk_token_id}


def squashed(tokenizer, text):
    normal = tokenizer.backend_tokenizer.normalizer
    return "".join((normal.normalize_str(text) if normal else text).replace("▁", " ").split())


# --- control tokens ----------------------------------------------------------------------------------------------


def test_payloads_are_many_and_always_the_same():
    payloads = attacks(toy("chat"), 220)
    assert len(set(payloads)) == 220 and payloads == attacks(toy("chat"), 220)
    assert payloads != attacks(toy("chat"), 220, seed=1)
    own = [str(t) for t in toy("chat").added_tokens_decoder.values()]
    assert sum(any(t in p for t in own) for p in payloads) > 60


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_no_payload_becomes_a_control_token_and_no_letter_of_it_is_lost(tokenizer, every):
    controls = control_ids(tokenizer)
    payloads = attacks(tokenizer, 200)[::every]
    failed = Counter()
    for place in PLACES:
        clean = [i for i in encode_prompt(tokenizer, *scene(place, WORD)) if i in controls]
        for text in payloads:
            turns, tools = scene(place, text)
            ids = encode_prompt(tokenizer, turns, tools)
            failed["control", place] += [i for i in ids if i in controls] != clean
            shown = render(tokenizer, turns, tools)
            said = squashed(tokenizer, tokenizer.decode(ids, clean_up_tokenization_spaces=False))
            if "<0x0A>" not in text:  # the Unigram model reads a byte that is spelled out as that byte
                failed["text", place] += said != squashed(tokenizer, shown)
            if place in ("system", "user"):
                failed["shown", place] += text.strip() not in shown
    assert not +failed, f"{dict(+failed)} of {len(payloads)} payloads in each of {len(PLACES)} places"


def test_the_text_between_two_control_tokens_is_that_of_the_harmless_turns():
    tokenizer, controls = toy("chat"), control_ids(toy("chat"))

    def stretches(ids):
        parts = [[]]
        for i in ids:
            parts.append([]) if i in controls else parts[-1].append(i)
        return [tokenizer.decode(p, clean_up_tokenization_spaces=False) for p in parts]

    clean = stretches(encode_prompt(tokenizer, *scene("user", WORD)))
    for text in attacks(tokenizer, 200):
        at = clean.index(f"user\n{WORD}")
        forged = stretches(encode_prompt(tokenizer, *scene("user", text)))
        assert forged == [*clean[:at], f"user\n{text}", *clean[at + 1 :]]


def test_the_plain_road_lets_payloads_through():
    tokenizer, controls = toy("chat"), control_ids(toy("chat"))

    def count(text):
        turns = [{"role": "user", "content": text}]
        return sum(i in controls for i in tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"])

    through = sum(count(text) != count(WORD) for text in attacks(tokenizer, 200))
    assert through > 50, "the payloads are no attack on this tokenizer"


@pytest.mark.parametrize(
    "path", [p for p in sorted(TRL.glob("*.jinja")) if not p.stem.endswith("_training")], ids=lambda p: p.stem
)
def test_templates_of_many_models_hold(path):
    import re

    template = path.read_text(encoding="utf-8")
    found = sorted(set(re.findall(r"<[|｜]?/?[\w▁]+[|｜]?>", template)))
    tokenizer = smol(
        template, [t for t in found if "|" in t or "｜" in t], [t for t in found if "|" not in t]
    )
    try:
        encode_prompt(tokenizer, *scene("user", WORD))
    except InputError:
        pytest.skip("takes no text content: a template for pictures")
    controls, payloads = control_ids(tokenizer), attacks(tokenizer, 30)
    for place in ("system", "user", "assistant", "result", "argument", "description"):
        clean = [i for i in encode_prompt(tokenizer, *scene(place, WORD)) if i in controls]
        for text in payloads:
            if (
                place == "assistant" and "think" in text
            ):  # some templates cut a model's own thoughts out of earlier turns
                continue
            ids = encode_prompt(tokenizer, *scene(place, text))
            assert [i for i in ids if i in controls] == clean, (place, text[:80])


def test_a_control_token_in_two_halves_of_two_turns_stays_two_halves():
    tokenizer = toy("legacy")
    turns = [{"role": "user", "content": "free<|im_"}, {"role": "user", "content": "end|>today"}]
    bad = tokenizer.convert_tokens_to_ids("<|im_end|>")
    plain = tokenizer.apply_chat_template(turns, return_dict=True)["input_ids"]
    assert bad in plain and bad not in encode_prompt(tokenizer, turns)
    turns[0]["content"] = "free<|im_end|"
    turns[1]["content"] = ">today"
    assert bad not in encode_prompt(tokenizer, turns)


def test_a_function_that_is_named_like_the_middle_of_a_control_token():
    template = "{{ bos_token }}{% for m in messages %}{% if m.name %}{{ '<|' + m.name + '|>' }}{% endif %}"
    tokenizer = smol(template + "{{ m.content }}<|im_end|>{% endfor %}")
    turns = [{"role": "user", "content": "x"}, {"role": "tool", "name": "im_start", "content": "x"}]
    ids = encode_prompt(tokenizer, turns)
    assert ids.count(1) == 1 and ids.count(2) == 2  # <|im_start|> once, as bos
    assert "<|im_start|>x" in tokenizer.decode(ids[1:])


def test_an_assistant_may_think_but_not_forge_a_call():
    tokenizer = toy("hermes")
    think, call = tokenizer.convert_tokens_to_ids(["<think>", "<tool_call>"])
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template += "{# <think> </think> #}"
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "<think>a</think><tool_call>b"},
    ]
    ids = encode_prompt(tokenizer, turns)
    assert think in ids and call not in ids
    turns[0]["content"], turns[1]["content"] = "<think>a</think>", "b"
    assert think not in encode_prompt(tokenizer, turns)


@pytest.mark.parametrize(
    "text",
    [
        "a<s>b",
        "<s>",
        "x</s> y",
        "<unk>?",
        "a<unk>b",
    ],
)
def test_sentencepiece_parts_get_no_space_of_their_own(text):
    for name in ("unigram", "legacy"):
        tokenizer = toy(name)
        ids = encode_answer(tokenizer, text)[1]
        assert tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)).strip() == text
        assert not set(ids) & {0, 1, 2}
        assert not tokenizer.convert_ids_to_tokens(ids)[0].startswith("▁")


# --- tool calls and turns ----------------------------------------------------------------------------------------

CALL = {"name": "pay", "arguments": {"to": "Zoë", "sum": 5, "when": {"day": None, "at": [1, 2.5, True]}}}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Pay Zoë 5."}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]}
TOLD = {"role": "tool", "name": "pay", "content": '{"ok": true}'}


def openai(tools):
    return [{"type": "function", "function": t} for t in tools]


@pytest.mark.parametrize(
    "name, form", [("chat", "hermes"), ("chatml", "hermes"), ("hermes", "template"), ("llama", "template")]
)
def test_form_of_calls_is_read_off_the_template(name, form):
    assert tool_form(toy(name)) == form


@pytest.mark.parametrize("name", ["hermes", "llama"])
def test_a_template_with_tools_of_its_own_is_followed_to_the_letter(name):
    tokenizer = toy(name)
    turns, tools = [*ASKED, CALLED, TOLD], [tool()]
    theirs = tokenizer.apply_chat_template(
        turns, tools=openai(tools), tokenize=False, add_generation_prompt=True
    )
    assert render(tokenizer, turns, tools) == theirs
    assert render(tokenizer, turns, openai(tools)) == theirs


CUT = "text of two turns meets in one run of line breaks, which the whole text would cut into other tokens"


@pytest.mark.parametrize(
    "name", ["hermes", pytest.param("llama", marks=pytest.mark.xfail(reason=CUT, strict=True))]
)
def test_its_tokens_are_those_of_the_whole_text(name):
    tokenizer = toy(name)
    turns, tools = [*ASKED, CALLED, TOLD], [tool()]
    theirs = tokenizer.apply_chat_template(
        turns, tools=openai(tools), tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(theirs, add_special_tokens=False)["input_ids"]
    assert encode_prompt(tokenizer, turns, tools) == ids


@pytest.mark.parametrize("name", ["hermes", "llama"])
def test_the_trained_answer_is_what_the_template_would_write(name):
    tokenizer, tools = toy(name), [tool()]
    record = Record("r", tuple(ASKED), tool_call_text([CALL]), tools=tuple(tools))
    row = encode(tokenizer, record)
    whole = tokenizer.apply_chat_template([*ASKED, CALLED], tools=openai(tools), tokenize=False)
    assert whole.startswith(tokenizer.decode(row.input_ids, clean_up_tokenization_spaces=False))
    graded = [i for i in row.labels if i != -100]
    assert tokenizer.decode(graded, clean_up_tokenization_spaces=False).startswith(
        '{"name": "pay", "parameters": {"to"'
        if name == "llama"
        else '<tool_call>\n{"name": "pay", "arguments"'
    )
    assert graded[-len(turn_end(tokenizer)) :] == turn_end(tokenizer)


def test_without_a_form_of_its_own_the_functions_stand_in_the_system_prompt():
    tokenizer = toy("chat")
    text = render(tokenizer, [*ASKED, CALLED, TOLD], [tool()])
    assert text.startswith("<|im_start|>system\nBe brief.\n\n") and '"name": "pay", "description"' in text
    assert f"<|im_start|>assistant\n{tool_call_text([CALL])}<|im_end|>" in text
    assert '<|im_start|>tool\n{"ok": true}<|im_end|>' in text
    bare = render(tokenizer, ASKED[1:], [tool()])
    assert bare.count("<|im_start|>system") == 1 and "SmolLM" not in bare


def test_results_go_to_the_user_where_a_template_knows_no_tool_turn():
    strict = "{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    strict += "{{ raise_exception('roles') }}{% endif %}{% endfor %}" + CHATML
    tokenizer = smol(strict)
    text = render(tokenizer, [*ASKED, CALLED, TOLD, TOLD], [tool()])
    block = '<tool_response>\n{"ok": true}\n</tool_response>'
    assert f"<|im_start|>user\n{block}\n{block}<|im_end|>" in text


@pytest.mark.parametrize(
    "form", [CALL, {"function": CALL}, {"id": "1", "type": "function", "function": CALL}]
)
def test_a_call_may_come_in_several_shapes(form):
    tokenizer = toy("chat")
    turn = {"role": "assistant", "content": None, "tool_calls": [form]}
    assert encode_prompt(tokenizer, [*ASKED, turn, TOLD]) == encode_prompt(tokenizer, [*ASKED, CALLED, TOLD])
    as_text = {"name": "pay", "arguments": json.dumps(CALL["arguments"])}
    turn = {"role": "assistant", "content": "", "tool_calls": [{"function": as_text}]}
    assert encode_prompt(tokenizer, [*ASKED, turn, TOLD]) == encode_prompt(tokenizer, [*ASKED, CALLED, TOLD])


@pytest.mark.parametrize(
    "turn",
    [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "pay", "arguments": "Zoë"}}],
        },
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": {}}}]},
        {"role": "assistant", "content": "", "tool_calls": ["pay"]},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "pay", "arguments": [1]}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": None, "tool_calls": [CALL]},
        {"role": "waiter", "content": "hello"},
        "hello",
        None,
    ],
)
def test_a_bad_turn_is_refused_in_one_line(turn):
    with pytest.raises(InputError) as refused:
        encode_prompt(toy("chat"), [*ASKED, turn])
    assert len(str(refused.value).splitlines()) == 1


def test_a_bad_tool_is_refused_in_one_line():
    for bad in ("pay", {}, {"function": "pay"}, {"name": 3}):
        with pytest.raises(InputError, match="JSON schema"):
            encode_prompt(toy("chat"), ASKED, [bad])


def test_what_a_template_would_drop_is_refused():
    two = tool_call_text([CALL, CALL])
    assert parse_calls(encode_answer(toy("hermes"), two)[0])[1] == [CALL, CALL]
    for answer in (two, tool_call_text([CALL], "Let me see.")):
        with pytest.raises(InputError):
            encode_answer(toy("llama"), answer)
        record = Record("r7", tuple(ASKED), answer)
        assert fitting(toy("llama"), [record], Recipe())[1][0]["id"] == "r7"


def test_calls_are_read_back_as_they_were_written():
    hard = {"name": "say", "arguments": {"text": '</tool_call>\n<tool_call>{"a": "\\"}'}}
    for calls, content in (([CALL], ""), ([CALL, hard], "Two things."), ([hard], "a\n\nb\n")):
        text = tool_call_text(calls, content)
        assert parse_calls(text) == (content, calls)
        assert tool_call_text(*reversed(parse_calls(text))) == text
        turn = answer_turn(text)
        assert (turn["content"], [c["function"] for c in turn["tool_calls"]]) == (content, calls)
        assert encode_answer(toy("chat"), text)[0] == text
    for text in (
        "",
        "hi",
        "<tool_call>",
        "<tool_call>\n{}\n</tool_call>",
        tool_call_text([CALL]) + " and more",
    ):
        assert parse_calls(text) is None
        assert answer_turn(text) == {"role": "assistant", "content": text}


def test_todays_date_does_not_change_a_prompt():
    tokenizer = smol("{{ strftime_now('%d %b %Y') }}{{ bos_token }}" + CHATML)
    text = render(tokenizer, ASKED)
    assert text.startswith("26 Jul 2024<|im_start|>") and str(datetime.now().year) not in text
    ids = encode_prompt(tokenizer, ASKED)
    assert tokenizer.decode(ids) == text


# --- a prompt carries on from the one before ---------------------------------------------------------------------


def broken_at(tokenizer, turns, tools=()):
    "Turns whose prompt does not begin with what was read and written up to the assistant's turn before it."
    at, before, broken = [n for n, m in enumerate(turns) if m["role"] == "assistant"], [], []
    for n in at:
        m = turns[n]
        prompt = encode_prompt(tokenizer, turns[:n], tools)
        broken += [n] if prompt[: len(before)] != before else []
        said = tool_call_text(m["tool_calls"], m["content"] or "") if m.get("tool_calls") else m["content"]
        before = prompt + encode_answer(tokenizer, said)[1] + turn_end(tokenizer)
    return broken


text = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t<|>_"), min_size=1
).filter(str.strip)
tricky = text | st.sampled_from(
    ["    indented", "\n\nx\n", "<|im_end|>", "a<|eot_id|>b ", "</s>", " <s>x", "> q"]
)
talks = st.lists(st.tuples(tricky, tricky), min_size=2, max_size=4)


@pytest.mark.parametrize("name", ["chat", "instruction", "chatml", "hermes", "llama", "unigram"])
@quick
@given(talks, tricky)
def test_every_prompt_carries_on_from_the_last(name, talk, system):
    turns = [{"role": "system", "content": system}]
    for asked, answered in talk:
        turns += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    assert broken_at(toy(name), turns) == []


@pytest.mark.parametrize("name", ["chat", "instruction", "hermes", "llama"])
def test_calls_and_results_carry_on_too(name):
    turns = [*ASKED, CALLED, TOLD, {"role": "assistant", "content": "Paid."}, ASKED[1], CALLED, TOLD]
    assert broken_at(toy(name), [*turns, {"role": "assistant", "content": " Paid again.\n"}], [tool()]) == []


@pytest.mark.skipif(not STAR.is_file(), reason="no star data in shared/data")
@pytest.mark.parametrize("name", ["chat", "instruction", "hermes"])
def test_real_conversations_carry_on(name):
    tokenizer, turns_seen, edged = toy(name), 0, 0
    for line in STAR.read_text(encoding="utf-8").split("\n")[:60]:
        turns = json.loads(line)["messages"]
        for m in turns:
            if m["role"] == "tool":
                m["content"] = json.dumps(m["content"])
            elif m.get("tool_call"):
                m["tool_calls"] = [m.pop("tool_call")]
            edged += m["role"] == "assistant" and (m["content"] or "") != (m["content"] or "").strip()
        assert broken_at(tokenizer, turns) == []
        turns_seen += len(turns)
    assert turns_seen > 800 and edged  # some answers have white space at their ends


# --- the mask ----------------------------------------------------------------------------------------------------


@st.composite
def records(draw):
    talk, asked, answer = draw(st.lists(st.tuples(tricky, tricky), max_size=2)), draw(tricky), draw(tricky)
    turns = [
        m for a, b in talk for m in ({"role": "user", "content": a}, {"role": "assistant", "content": b})
    ]
    if draw(st.booleans()):
        answer = tool_call_text([{"name": "pay", "arguments": {draw(text): answer}}])
    return Record("r0", (*turns, {"role": "user", "content": asked}), answer)


@pytest.mark.parametrize("name", ["chat", "instruction", "hermes"])
@quick
@given(records(), st.just("") | tricky)
def test_graded_is_the_answer_and_its_end_and_nothing_else(name, record, system):
    tokenizer = toy(name)
    try:
        row = encode(tokenizer, record, system, 100_000)
    except InputError as error:
        assert "cannot write" in str(error)  # a byte without a token
        return
    ids, prompt = list(row.input_ids), prompt_for(tokenizer, record, system)
    assert len(ids) == len(row.labels) and ids[: len(prompt)] == prompt
    assert list(row.labels) == [-100] * len(prompt) + ids[len(prompt) :]
    end = turn_end(tokenizer)
    assert ids[-len(end) :] == end
    said = tokenizer.decode(ids[len(prompt) : -len(end)], clean_up_tokenization_spaces=False)
    assert said == record.completion
    assert not set(ids[len(prompt) : -len(end)]) & set(tokenizer.all_special_ids)


def test_the_proof_knows_calls_and_sees_a_wrong_one():
    tokenizer = toy("llama")
    rows = [
        Record("a", tuple(ASKED), tool_call_text([CALL]), tools=(tool(),)),
        Record("b", tuple(ASKED[1:]), "No."),
    ]
    dataset = encode_dataset(tokenizer, rows, Recipe())

    def collate(batch):
        import torch

        width = max(len(r["input_ids"]) for r in batch)
        fill = {"input_ids": tokenizer.pad_token_id, "labels": -100}
        made = {k: torch.tensor([r[k] + [v] * (width - len(r[k])) for r in batch]) for k, v in fill.items()}
        mask = [[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in batch]
        return made | {"attention_mask": torch.tensor(mask)}

    proof = mask_proof(dataset, collate, tokenizer, rows)
    assert proof.ok and proof.rows == 2
    other = replace(rows[0], completion=tool_call_text([CALL | {"name": "steal"}]))
    assert not mask_proof(dataset, collate, tokenizer, [other, rows[1]]).ok
    assert not mask_proof(dataset, collate, tokenizer, [replace(rows[0], tools=()), rows[1]]).ok


def test_the_contract_names_the_tools():
    row = Record("a", tuple(ASKED), tool_call_text([CALL]), tools=(tool(),))
    golden = contract(toy("chat"), [row])["golden"][0]
    assert golden["tools"] == [tool()]
    assert encode_prompt(toy("chat"), golden["messages"], golden["tools"]) == golden["ids"]


def test_an_example_that_calls_is_shown_as_a_call():
    shot = Record("s", tuple(ASKED), tool_call_text([CALL], "Yes."))
    turns = messages_for(Record("r", (ASKED[1],), "x"), shots=[shot])
    assert turns[1] == {"role": "assistant", "content": "Yes.", "tool_calls": [{"function": CALL}]}


# --- rows that are too long --------------------------------------------------------------------------------------


@quick
@given(records(), st.integers(10, 200), st.sampled_from(POLICIES), st.just("") | text)
def test_fit_never_touches_the_answer(record, max_length, policy, system):
    tokenizer = toy("chat")
    try:
        made = fit(tokenizer, record, max_length, policy, system)
    except InputError as error:
        assert "record r0" in str(error) and len(str(error).splitlines()) == 1
        return
    assert made.record.completion == record.completion
    row = encode(tokenizer, made.record, system, max_length)
    assert len(row.input_ids) == made.after <= max_length
    assert bool(made.what) == (made.record != record) == (made.after < made.before)
    if policy == "refuse":
        assert made.record is record
    if policy == "drop-oldest-turns":
        assert record.messages[len(record.messages) - len(made.record.messages) :] == made.record.messages
    if made.what and policy.startswith("cut"):
        assert any("[...]" in m["content"] for m in made.record.messages if m["role"] == "user")
        assert len(made.record.messages) == len(record.messages)


def chatty(n=12):
    turns = [
        {"role": ("user", "assistant")[i % 2], "content": f"turn {i} of many words"} for i in range(2 * n)
    ]
    return Record("chatty", ({"role": "system", "content": "Own."}, *turns, ASKED[1]), "Done.")


def test_dropping_takes_as_few_turns_as_it_must():
    tokenizer, row = toy("chat"), chatty()
    made = fit(tokenizer, row, 120, "drop-oldest-turns")
    kept = made.record.messages
    assert kept[0] == row.messages[0] and kept[-1] == ASKED[1] and kept[1]["role"] == "user"
    left_out = len(row.messages) - len(kept)
    assert made.what == f"{left_out} oldest turns"
    two_more = replace(row, messages=(row.messages[0], *row.messages[left_out - 1 :]))
    assert len(encode(tokenizer, two_more).input_ids) > 120


def test_a_call_and_its_result_leave_together():
    turns = (*ASKED, CALLED, TOLD, {"role": "assistant", "content": "Paid."}, ASKED[1], CALLED, TOLD)
    kept, what = fit_turns(toy("chat"), list(turns), 130, "drop-oldest-turns")
    assert kept == [turns[0], *turns[5:]] and what == "4 oldest turns"


def test_a_chat_is_shortened_the_way_its_rows_were():
    tokenizer, row = toy("chat"), chatty()
    made = fit(tokenizer, row, 120, "drop-oldest-turns")
    room = 120 - (len(encode(tokenizer, row).input_ids) - len(prompt_for(tokenizer, row)))
    assert fit_turns(tokenizer, list(row.messages), room, "drop-oldest-turns")[0] == list(
        made.record.messages
    )
    with pytest.raises(InputError, match="policy must be"):
        fit_turns(tokenizer, list(row.messages), room, "cut")


def test_every_row_is_accounted_for():
    tokenizer = toy("chat")
    rows = [chatty(n) for n in range(1, 9)] + [Record("x", (ASKED[1],), " ")]
    rows = [replace(r, id=f"r{n}") for n, r in enumerate(rows)]
    for policy in POLICIES:
        report = fit_records(tokenizer, rows, Recipe(max_length=100), policy)
        kept, refused = [r.id for r in report.records], [r["id"] for r in report.rejected]
        assert sorted([*kept, *refused]) == [r.id for r in rows] and "r8" in refused
        assert {c["id"] for c in report.changed} <= set(kept) and all(c["tokens"] > 0 for c in report.changed)
        assert fitting(tokenizer, report.records, Recipe(max_length=100))[1] == []
        assert policy in report._repr_markdown_()


def test_lengths_are_those_of_the_rows():
    tokenizer, rows = toy("chat"), [replace(chatty(n), id=f"r{n}") for n in range(1, 30)]
    found = token_lengths(tokenizer, rows, Recipe(max_length=200))
    assert found.rows == [len(encode(tokenizer, r, max_length=10_000).input_ids) for r in rows]
    assert found.over == tuple(i for i, n in zip(found.ids, found.rows) if n > 200)
    assert (found.percentile(0), found.percentile(100)) == (min(found.rows), max(found.rows))
    assert sum(n <= found.percentile(95) for n in found.rows) >= 0.95 * 29
    assert f"{len(found.over)} of 29 rows over 200" in plot_token_lengths(found).axes[0].get_title()
    assert token_lengths(tokenizer, [], Recipe()).percentile(50) == 0


def test_audit_names_the_rows_and_nothing_else():
    tokenizer = toy("chat")
    rows = [
        Record("fine", tuple(ASKED), "Done."),
        Record("long", tuple(ASKED), "word " * 150),
        Record("stuck", ({"role": "user", "content": "word " * 300},), "Done."),
        Record("byte", tuple(ASKED), "a \x04 b"),
        Record("empty", tuple(ASKED), "  "),
    ]
    found = {i.kind: i.ids for i in audit_lengths(tokenizer, rows, Recipe(max_length=128))}
    assert found == {
        "over-long": ("long", "stuck"),
        "no-room": ("stuck",),
        "unwritable": ("byte", "empty"),
        "answer-over-max-new-tokens": ("long",),
    }
    assert audit_lengths(tokenizer, rows[:1], Recipe(max_length=128)) == []


# --- one rule for answers ----------------------------------------------------------------------------------------

PAY = '{"intent": "pay", "slots": [{"name": "to", "value": "Ann"}, {"name": "sum", "value": "5"}]}'


@pytest.mark.parametrize(
    "expected, given, task, same",
    [
        (PAY, '{"slots":[{"value":"5","name":"sum"},{"name":"to","value":"Ann"}],"intent":"pay"}', "", True),
        (PAY, PAY.replace("Ann", " Ann "), "", True),
        (PAY, PAY.replace("Ann", "ann"), "", False),
        (PAY, PAY.replace('{"name": "sum", "value": "5"}', '{"name": "to", "value": "Ann"}'), "", False),
        (PAY, PAY + ".", "", False),
        (PAY, PAY[:-1], "", False),
        (PAY, "", "", False),
        ('{"a": [1, 2], "b": null}', '{"b": null, "a": [1, 2.0]}', "", True),
        ('{"a": [1, 2]}', '{"a": [2, 1]}', "", False),
        ('{"a": 1}', '{"a": true}', "", False),
        ('{"a": 0}', '{"a": false}', "", False),
        ('{"a": NaN}', '{"a": NaN}', "", True),
        ('{"a": 1}', '{"a": 1, "b": 2}', "", False),
        ('["x"]', '[ "x" ]', "", True),
        ("5", "5.0", "", False),
        ("refund", "refund\n", "classification", True),
        ("refund", "Refund", "classification", False),
        ('{"a": 1}', '{ "a": 1 }', "classification", False),
        ("caf\u00e9", "cafe\u0301", "generation", True),
        ("Yes, sir.", "Yes,  sir.", "conversation", False),
        (tool_call_text([CALL]), tool_call_text([CALL], "Sure."), "", True),
        (tool_call_text([CALL, CALL]), tool_call_text([CALL]), "", False),
        (tool_call_text([CALL]), "I cannot.", "", False),
        (tool_call_text([CALL]), json.dumps({"name": "pay", "parameters": CALL["arguments"]}), "", True),
        (tool_call_text([CALL]), json.dumps(CALL | {"name": "steal"}), "", False),
        ("I cannot.", tool_call_text([CALL]), "", False),
    ],
)
def test_same_answer(expected, given, task, same):
    assert same_answer(expected, given, task) is same


def test_calls_of_one_answer_have_no_order():
    other = {"name": "tell", "arguments": {"who": "Ann"}}
    assert same_answer(tool_call_text([CALL, other]), tool_call_text([other, CALL]))
    assert not same_answer(tool_call_text([CALL, other]), tool_call_text([other, other]))


@quick
@given(text, text)
def test_same_answer_is_even_handed(a, b):
    assert same_answer(a, a) and same_answer(a, f" {a}\n")
    assert same_answer(a, b) == same_answer(b, a)
    if same_answer(a, b):
        assert (
            unicodedata.normalize("NFKC", a).split() == unicodedata.normalize("NFKC", b).split()
            or a[:1] in "[{"
        )
