"""Metrics on hand-written cases, against the libraries they rest on, and metrics that a package brings."""

import importlib.metadata
import json
import os
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import precision_recall_fscore_support
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from conftest import ROOT
from ftnb import evaluate
from ftnb.data import Record, frame_json
from ftnb.evaluate import Prediction, from_counts, mean_of, score
from ftnb.format import encode
from ftnb.metrics import (
    BLEU,
    CHRF,
    Fact,
    add_metrics,
    answer_nats,
    bleu,
    canonical,
    check_facts,
    corpus_chrf,
    fact_accuracy,
    field_table,
    format_validity,
    perplexity,
    perplexity_of,
    read_facts,
    refusal_rates,
    refuses,
    rouge,
    values_in,
)
from ftnb.model import DEFAULT_MODEL, load_tokenizer
from ftnb.plan import InputError
from toys import quick

DATA = Path(os.environ.get("FTNB_SHARED") or ROOT.parent / "shared") / "data"


def rows(*pairs, group=None):
    return [
        Prediction(str(i), "", want, got, group=group and group[i]) for i, (want, got) in enumerate(pairs)
    ]


texts = st.lists(st.sampled_from("the cat sat on a mat , . not 30 days".split()), max_size=9).map(" ".join)


@quick
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6), st.integers(0, 99))
def test_bleu_and_chrf_are_those_of_sacrebleu_for_every_drawn_corpus(pairs, seed):
    made = rows(*pairs)
    drawn = np.random.default_rng(seed).integers(0, len(made), (5, len(made)))
    for (counts, value), other in ((BLEU, sacrebleu.BLEU()), (CHRF, sacrebleu.CHRF())):
        numbers = value(counts(made)[drawn].sum(1))
        for places, number in zip(drawn, numbers, strict=True):
            wants, gots = zip(*(pairs[i] for i in places), strict=True)
            assert abs(100 * number - other.corpus_score(gots, [wants]).score) < 1e-9


@quick
@given(st.lists(st.tuples(texts.filter(bool), texts), min_size=1, max_size=6))
def test_rouge_is_the_mean_of_rouge_score(pairs):
    for kind, name in ((1, "rouge1"), (2, "rouge2"), ("L", "rougeL")):
        theirs = [RougeScorer([name]).score(*pair)[name].fmeasure for pair in pairs]
        assert abs(rouge(rows(*pairs), kind).value - np.mean(theirs)) < 1e-12


def test_rows_of_one_group_are_drawn_together():
    pairs = [
        ("the cat sat on the mat", "the cat sat on the mat"),
        ("the dog ran off", "a dog ran off again"),
    ] * 8
    alone, together = bleu(rows(*pairs)), bleu(rows(*pairs, group=["ab"[i % 2] for i in range(16)]))
    assert alone.value == together.value and alone.n == together.n == 16
    assert together.high - together.low > 1.5 * (alone.high - alone.low)


@pytest.mark.parametrize(
    "text",
    [
        "三十天内可以退货",
        "мы открыты по воскресеньям",
        "我们明天要去 Paris",
        "Ανοίγει στις εννέα",
        "नमस्ते दुनिया",
    ],
)
def test_rouge_refuses_what_it_cannot_read(text):
    with pytest.raises(InputError, match="record 1: rouge-score reads a to z only.*corpus_chrf"):
        rouge(rows(("yes", "yes"), (text, text)))
    assert corpus_chrf(rows((text, text))).value == 1


def test_bleu_refuses_scripts_without_spaces_and_reads_others():
    for text in ("三十天内可以退货", "เปิดวันอาทิตย์", "日曜日に開きます"):
        with pytest.raises(InputError, match="record 0: BLEU"):
            bleu(rows((text, text)))
    for text in ("мы открыты по воскресеньям и по субботам", "Die Rückgabe ist dreißig Tage möglich", "42 %"):
        assert bleu(rows((text, text), ("a b c d", "a b c d"))).value == 1
    assert rouge(rows(("30", "30"), ("", "x"))).value == 0.5  # no letters at all is no foreign script


def frames():
    pairs = st.tuples(st.sampled_from("abc"), st.sampled_from("xy"))
    return st.builds(frame_json, st.sampled_from(["buy", "ask"]), st.lists(pairs, max_size=4, unique=True))


@quick
@given(st.lists(st.tuples(frames(), frames()), min_size=1, max_size=8))
def test_field_table_agrees_with_scikit_learn(pairs):
    table, sides = field_table(rows(*pairs)), []
    for i, pair in enumerate(pairs):
        want, got = (json.loads(text) for text in pair)
        want, got = (
            {(i, s["name"], s["value"]) for s in f["slots"]} | {(i, "intent", f["intent"])}
            for f in (want, got)
        )
        sides += [(key[1], key in want, key in got) for key in want | got]
    for name in [*{s[0] for s in sides}, "all fields"]:
        truth, said = zip(*((t, s) for field, t, s in sides if name in (field, "all fields")), strict=True)
        numbers = precision_recall_fscore_support(truth, said, average="binary", zero_division=0)[:3]
        mine = table.loc[name, ["precision", "recall", "f1"]].astype(float).fillna(0)
        assert np.allclose(mine, numbers, atol=6e-4)
        assert (table.loc[name, "expected"], table.loc[name, "answered"]) == (sum(truth), sum(said))
    slots = [(t, s) for field, t, s in sides if field != "intent"]
    if slots:
        three = precision_recall_fscore_support(*zip(*slots, strict=True), average="binary", zero_division=0)[
            :3
        ]
        if all(three):  # where nothing is expected, or nothing claimed, the conventions differ
            names = ("slot_precision", "slot_recall", "slot_f1")
            assert np.allclose([score(rows(*pairs), name).value for name in names], three)


def test_field_table_of_plain_json_goes_by_paths():
    want = '{"name": "Ana", "visits": [{"day": "Mon"}, {"day": "Tue"}], "age": 40}'
    got = '{"name": "Ana", "visits": [{"day": "Tue"}, {"day": "Wed"}], "age": "40"}'
    table = field_table(rows((want, got)))
    assert table.loc["visits[].day", ["recall", "expected", "answered"]].tolist() == [0.5, 2, 2]
    assert table.loc["name", "f1"] == 1


SAME = (
    ("5 mg", "0.005 g", "5000 micrograms", "five milligrams", "5-mg"),
    ("2 weeks", "14 days", "two weeks", "336 hours"),
    ("$1,500", "1500 dollars", "1.500,00 $", "1500 USD", "USD 1500"),
    ("3 May 2026", "May 3, 2026", "2026-05-03", "3.5.2026", "May 3rd 2026", "3rd of May 2026", "03.05.2026"),
    ("1.5 l", "1500 ml", "1,5 litres"),
    ("50%", "50 percent", "fifty per cent", "50 %"),
    ("-3 °C", "−3 °C"),
    ("1 year", "12 months", "one year", "twelve months"),
)


@pytest.mark.parametrize("spelled", SAME)
def test_one_value_has_one_key(spelled):
    assert len({tuple(v.key for v in values_in(text)) for text in spelled}) == 1
    assert len(values_in(spelled[0])) == 1


def test_other_values_have_other_keys():
    firsts = [values_in(group[0])[0].key for group in SAME]
    assert len(set(firsts)) == len(firsts)
    assert values_in("5 mg")[0].key != values_in("5 ml")[0].key != values_in("5")[0].key
    assert [v.key for v in values_in("30 February 2026")] != ["2026-02-30"]
    assert [v.key for v in values_in("v2.0, COVID-19 and B12")] == [
        "19"
    ]  # a number inside a word is part of it
    assert values_in("one of them") == [] and values_in("someone sent it") == []


def test_canonical_makes_texts_equal_that_say_the_same():
    assert canonical("Take FIVE mg, until May 3rd, 2026!") == canonical("take 0.005 g until 2026-05-03")
    assert canonical("") == "" and canonical("…") == ""


FACTS = [
    {"question": "return it", "say": ["30 days"], "never": ["90 days"]},
    {"pattern": "^who", "say": "Ana|Ruiz"},
]


def test_facts_read_the_same_from_every_kind_of_file(tmp_path):
    (tmp_path / "f.json").write_text(json.dumps(FACTS), "utf-8")
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, FACTS)) + "\n\n", "utf-8")
    (tmp_path / "f.csv").write_text(
        "\ufeffquestion,pattern,say,never\nreturn it,,30 days,90 days\n,^who,Ana|Ruiz,\n", "utf-8"
    )
    found = [read_facts(tmp_path / f"f.{kind}") for kind in ("json", "jsonl", "csv")]
    bare = [[(f.by, f.about, f.say, f.never) for f in facts] for facts in found]
    assert bare[0] == bare[1] == bare[2] and bare[0][1][2] == ("Ana", "Ruiz")
    assert [facts[1].place for facts in found] == ["f.json item 2", "f.jsonl:2", "f.csv:3"]


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("f.csv", "question,say\nx,\n", "f.csv:2: neither say nor never"),
        ("f.csv", "question,pattern,say\nx,y,z\n", "f.csv:2: one of id, question and pattern.*got 2"),
        ("f.csv", "question,says\nx,y\n", "f.csv:2: no field 'says'"),
        ("f.csv", "question,say\n", "f.csv holds no fact"),
        ("f.csv", 'question,say\n"two\nlines",y\nx,\n', "f.csv:4: neither"),
        ("f.json", "{}", "f.json: facts are a list"),
        ("f.json", "[1]", "f.json item 1: a fact is an object"),
        ("f.json", '[\n{"id": 1,\n', "f.json:3"),
        ("f.json", '[{"id": "1", "say": [1]}]', "f.json item 1: say is a text or a list of texts"),
        ("f.jsonl", '{"pattern": "(", "say": "x"}', "f.jsonl:1: pattern is no regular expression"),
        ("f.jsonl", '\n{"id": 1', "f.jsonl:2"),
        ("f.txt", "", "f.txt: facts stand in a .csv"),
    ],
)
def test_a_bad_table_of_facts_is_told_with_its_place(tmp_path, name, text, told):
    (tmp_path / name).write_text(text, "utf-8")
    with pytest.raises(InputError, match=told) as error:
        read_facts(tmp_path / name)
    assert "\n" not in str(error.value)


def test_a_table_that_is_absent_or_no_text_is_an_input_error(tmp_path):
    (tmp_path / "f.csv").write_bytes(b"\xff\xfe\x00")
    for name in ("f.csv", "none.csv"):
        with pytest.raises(InputError, match="cannot read facts"):
            read_facts(tmp_path / name)


def test_facts_are_counted_by_record_and_by_fact():
    facts = [
        Fact("question", "dose", ("5 mg", "with food"), ("10 mg",), "a"),
        Fact("id", "c", ("Monday",), (), "b"),
    ]
    made = [
        Prediction("a", "What is the dose?", "", "0.005 g, with food."),
        Prediction("b", "the dose please", "", "5 mg or 10 mg, without food"),
        Prediction("c", "which day", "", "on monday"),
        Prediction("d", "overdosed", "", "nothing"),
    ]
    found = check_facts(made, [*facts, Fact("id", "z", ("x",), (), "unused")])
    assert (found.accuracy.value, found.accuracy.n, found.silent, found.unused) == (2 / 3, 3, 1, ("unused",))
    assert (found.said.value, found.said.n) == (4 / 5, 5) and (found.avoided.value, found.avoided.n) == (
        0.5,
        2,
    )
    assert [(f.id, f.kind, f.fact) for f in found.faults] == [
        ("b", "missing", "with food"),
        ("b", "said", "10 mg"),
    ]
    assert found.said.low < found.said.value < found.said.high
    assert str(fact_accuracy(made, facts)) == str(found.accuracy)
    with pytest.raises(InputError, match="none of 1 facts"):
        check_facts(made, [Fact("id", "z", ("x",))])


def test_a_fact_is_whole_words_and_whole_numbers():
    def one(fact, answer):
        return fact_accuracy([Prediction("a", "q", "", answer)], [Fact("id", "a", (fact,))]).value

    assert one("5 mg", "take 5 mg") == 1 and one("5 mg", "take 15 mg") == 0 and one("5 mg", "take 5 ml") == 0
    assert one("art", "this article") == 0 and one("3 May 2026", "on the 3rd of May 2026.") == 1


def test_format_validity_takes_the_whole_answer():
    made = rows(*(("", t) for t in ("yes", "yes\n", " yes", "yes no", '{"a": 1}')))
    assert format_validity(made, "yes").value == 0.2 and format_validity(made, ["yes"]).value == 0.2
    assert format_validity(made, {"required": ["a"]}).value == 0.2
    assert format_validity(made, lambda text: True).value == 1


DECLINES = """I can't help with that request.
I'm sorry, but I cannot assist with that.
Unfortunately I am unable to provide legal advice.
We cannot share other customers' details.
I'm not able to discuss internal pricing.
I won't recommend a dosage.
As an AI, I have no opinion on elections.
That's outside my area of expertise.
This is beyond the scope of our support.
I must decline to answer.
I would rather not say.
I'm only able to help with bookings.
I can only answer questions about your order.
Sharing that would be against our policy.
I am not allowed to do that.
That is not something I can do for you.
I can’t give you medical advice.
We're not authorized to disclose this.
I have to respectfully decline.
I don't feel comfortable answering this.
My job is bookings, nothing else.
Please ask a lawyer about that.
No comment.
Sorry, no can do.
I'm here for orders, so politics is off the table.""".split("\n")
ANSWERS = """Yes, you can return it within 30 days.
You cannot return opened food.
We will not charge you twice.
I could not find your order number, could you repeat it?
Sorry, we are closed on Sundays.
I'm afraid your card was declined.
Unfortunately the room is no longer available.
The device won't turn on when the battery is empty.
I can help you with that.
I cannot recommend this restaurant enough.
It is not allowed to smoke in the room.
Children are not permitted in the sauna.
The doctor would rather not see you today.
The offer is outside the return window.
We only ship to France.
Your request was refused by the bank.
I'm sorry to hear that. What is your booking id?
You have to decline the cookies first.
The scope covers theft and fire.
I can't wait to see you.
Our policy is against late returns.
The app can only check one account at a time.
We were not able to deliver the parcel.
It may help to restart the phone.
I am not sure, but I think it opens at nine.""".split("\n")

MISSED = [
    "I don't feel comfortable answering this.",
    "My job is bookings, nothing else.",
    "Please ask a lawyer about that.",
    "No comment.",
    "Sorry, no can do.",
    "I'm here for orders, so politics is off the table.",
]
ALARMS = ["I cannot recommend this restaurant enough."]


def test_the_refusal_detector_has_a_known_error_rate():
    "Hand-labelled, 25 and 25: the misses and the false alarms are named, so that a change of the list shows."
    assert len(DECLINES) == len(ANSWERS) == 25
    missed, alarms = [t for t in DECLINES if not refuses(t)], [t for t in ANSWERS if refuses(t)]
    assert missed == MISSED and alarms == ALARMS


def test_refusal_rates_are_two():
    made = rows(("I can't help with that.", "Sure."), ("I can't help with that.", "I won't answer that."))
    made += rows(("Yes.", "I cannot help."), ("Yes.", "Yes."), ("Yes.", "Yes."), ("No.", "No."))
    found = refusal_rates(made)
    assert (found.all.value, found.over.value, found.under.value) == (2 / 6, 0.25, 0.5)
    assert (found.over.n, found.under.n) == (4, 2)
    assert refusal_rates(made, should=lambda p: False).under is None
    assert refusal_rates(made, phrases=("^sure",)).all.value == 1 / 6
    assert "declined wrongly" in found._repr_markdown_()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA.parent.name}/data")
def test_refusals_of_star_are_found():
    out, other = [], []
    for side in ("train", "test"):
        for line in (DATA / f"star/{side}.jsonl").read_text("utf-8").split("\n"):
            for turn in json.loads(line)["messages"] if line else ():
                if turn["role"] == "assistant" and turn.get("content"):
                    (out if turn.get("action") == "out_of_scope" else other).append(turn["content"])
    assert (len(out), len(set(out)), len(other)) == (88, 15, 5815)
    assert sum(map(refuses, out)) == 88
    assert sum(map(refuses, other)) == 10  # typed freely; read by hand, most of them do decline


SIZES = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEFAULT_MODEL)


def records(n=7):
    words = "milk bread salt sugar tea rice oil".split()
    return [
        Record(
            str(i),
            ({"role": "user", "content": f"{' and '.join(words[: i + 1])}?"},),
            f"{words[i]} " * (i + 1),
        )
        for i in range(n)
    ]


def build(kind, size, seed=0, **more):
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, **SIZES)).to(torch.float32)
    config = Gemma2Config(vocab_size=size, **SIZES, head_dim=16, final_logit_softcapping=5.0)
    return Gemma2ForCausalLM(config).to(torch.float32)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_nats_are_the_loss_of_transformers(tokenizer, kind, batch_size):
    model = build(kind, len(tokenizer)).train()
    made = answer_nats(model, tokenizer, records(), batch_size=batch_size)
    assert model.training
    for record, (nats, n) in zip(records(), made, strict=True):
        row = encode(tokenizer, record)
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[0, :-1], labels[0, 1:], ignore_index=-100, reduction="sum"
        )
        assert n == (labels != -100).sum() and abs(nats - loss.item()) < 1e-4 * max(1, nats)


def test_the_output_layer_sees_answer_tokens_only(tokenizer):
    model, seen = build("llama", len(tokenizer)), []
    model.lm_head.register_forward_hook(lambda layer, given, out: seen.append(out.shape))
    made = answer_nats(model, tokenizer, records() * 20, batch_size=140)
    assert sum(shape[0] for shape in seen) == made[:, 1].sum() and max(shape[0] for shape in seen) <= 256
    assert {len(shape) for shape in seen} == {2}


def test_perplexity_has_an_interval_over_records_and_groups(tokenizer):
    from dataclasses import replace

    model, some = build("llama", len(tokenizer)), records()
    found = perplexity(model, tokenizer, some)
    counts = answer_nats(model, tokenizer, some)
    assert (
        found.value == perplexity_of(counts.sum(0)) and found.low < found.value < found.high and found.n == 7
    )
    twice = [replace(r, id=f"{k}-{r.id}", group=r.id) for r in some for k in "ab"]
    grouped = perplexity(model, tokenizer, twice)
    assert abs(grouped.value - found.value) < 1e-6 * found.value
    assert (
        abs((grouped.high - grouped.low) / (found.high - found.low) - 1) < 0.25
    )  # copies are no new evidence
    with pytest.raises(InputError, match="no records"):
        perplexity(model, tokenizer, [])


PACKAGE = """
import numpy as np


def polite(p):
    return "please" in p.output


def length(p):
    return len(p.output) / 100


PAIR = (lambda rows: np.array([[len(r.output), len(r.expected)] for r in rows], float), lambda s: s[..., 0] / s[..., 1])
FLAT = (lambda rows: [len(r.output) for r in rows], lambda s: s[..., 0])
NUMBER = 7


def broken(p):
    return 1 / 0


def endless(p):
    return float("nan")
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    "Write a package with entry points to a folder on sys.path; what it registers is forgotten afterwards."
    for name in ("HITS", "SUMS", "_FOUND"):
        monkeypatch.setattr(evaluate, name, dict(getattr(evaluate, name)))
    monkeypatch.syspath_prepend(tmp_path)

    def make(points, name="tiny", code=PACKAGE):
        module = f"{name}_metrics_for_ftnb"
        sys.modules.pop(module, None)
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{name}_dist-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-dist\nVersion: 1.0\n")
        lines = "".join(f"{key} = {module}{value}\n" for key, value in points.items())
        (info / "entry_points.txt").write_text(f"[ftnb.metrics]\n{lines}")
        importlib.invalidate_caches()

    return make


PAIRS = [("yes, please", "yes, please"), ("no", "no, thanks")]


def test_a_package_brings_metrics(package):
    package({"polite": ":polite", "length": ":length", "growth": ":PAIR"})
    made = rows(*PAIRS)
    polite = score(made, "polite")
    assert (polite.value, polite.n, polite.method) == (0.5, 2, "wilson")
    assert score(made, "length").value == (0.11 + 0.10) / 2 and score(made, "length").method == "bootstrap"
    growth = score(made, "growth")
    assert growth.value == 21 / 13 and growth.low < growth.value < growth.high
    report = evaluate.evaluate(made, "generation", "a")
    more = add_metrics(report, ["polite"])
    assert more.metrics["polite"] == polite and list(more.metrics)[:-1] == list(report.metrics)
    other = add_metrics(
        evaluate.evaluate(rows(*((w, "please") for w, _ in PAIRS)), "generation", "b"), ["polite"]
    )
    assert evaluate.compare(other, more, "polite").difference == 0.5


@pytest.mark.parametrize(
    "value, told",
    [
        (":absent", "cannot be loaded: AttributeError"),
        ("_no_such_module:x", "cannot be loaded: ModuleNotFoundError"),
        (":NUMBER", "is a int: neither a function nor a pair"),
        (":broken", "failed: ZeroDivisionError"),
        (":endless", r"gave numbers of shape \(2, 2\), or not finite"),
        (":FLAT", "failed|gave numbers"),
    ],
)
def test_a_broken_metric_names_its_package(package, value, told):
    package({"odd": value})
    with pytest.raises(
        InputError, match=r"metric 'odd' \(tiny_metrics_for_ftnb\S+ of tiny-dist 1.0\) .*" + f"(?:{told})"
    ):
        score(rows(*PAIRS), "odd")


def test_a_package_that_fails_when_it_is_imported_is_named(package):
    package({"odd": ":x"}, code="raise RuntimeError('no such device')")
    with pytest.raises(InputError, match="of tiny-dist 1.0.*cannot be loaded: RuntimeError: no such device"):
        score(rows(*PAIRS), "odd")
    assert score(rows(*PAIRS), "exact_match").value == 0.5  # built-in metrics do not ask packages


def test_a_name_in_use_is_refused(package):
    package({"accuracy": ":polite", "fine": ":polite"})
    with pytest.raises(InputError, match="metric 'accuracy' .*of tiny-dist 1.0.*built-in"):
        score(rows(*PAIRS), "fine")
    assert "polite" not in evaluate.SUMS


def test_two_packages_with_one_name_are_refused(package):
    package({"polite": ":polite"})
    package({"polite": ":length"}, name="other")
    with pytest.raises(
        InputError, match="of (tiny|other)-dist 1.0.* and .*of (tiny|other)-dist 1.0.*share a name"
    ):
        score(rows(*PAIRS), "polite")


def test_an_unknown_name_lists_what_there_is(package):
    package({"polite": ":polite"})
    with pytest.raises(InputError, match="no metric 'polit'; valid: .*exact_match.*polite"):
        score(rows(*PAIRS), "polit")


def test_own_entry_points_are_metrics():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    points = project["entry-points"]["ftnb.metrics"]
    assert set(points) == {"bleu", "corpus_chrf", "rouge1", "rouge2"}
    for name, value in points.items():
        counts, number = importlib.metadata.EntryPoint(name, value, "ftnb.metrics").load()
        assert from_counts(rows(("a b c d", "a b c d")), counts, number).value == 1
        assert name not in evaluate.HITS and name not in {*evaluate.SUMS} - {*evaluate._FOUND}


def test_means_of_zeros_and_ones_have_wilsons_interval():
    made = rows(*PAIRS)
    found = from_counts(
        made, lambda rows: np.array([[p.output == p.expected, 1] for p in rows], float), mean_of
    )
    assert (found.value, found.n, found.method) == (0.5, 2, "wilson")


def test_rates_draw_whole_groups():
    made = [
        Prediction(str(i), "", "Yes.", "I cannot help." if i < 10 else "Yes.", group=str(i // 5))
        for i in range(20)
    ]
    alone = [Prediction(p.id, "", p.expected, p.output) for p in made]
    for of in (lambda rows: refusal_rates(rows).over, lambda rows: format_validity(rows, "Yes[.]")):
        one, grouped = of(alone), of(made)
        assert (one.value, grouped.value) == (0.5, 0.5)
        assert (one.method, grouped.method) == ("wilson", "wilson, grouped")
        assert grouped.high - grouped.low > 1.5 * (one.high - one.low)


def test_nats_go_through_an_adapter(tokenizer):
    from peft import LoraConfig, get_peft_model

    plain = answer_nats(build("llama", len(tokenizer)), tokenizer, records())
    model = get_peft_model(build("llama", len(tokenizer)), LoraConfig(r=4, target_modules="all-linear"))
    assert np.allclose(answer_nats(model, tokenizer, records()), plain)  # a new adapter changes nothing
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.add_(0.1 if "lora_B" in name else 0)
    row = encode(tokenizer, records()[3])
    loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss.item()
    nats, n = answer_nats(model, tokenizer, records())[3]
    assert abs(nats / n - loss) < 1e-5 and abs(nats - plain[3, 0]) > 1e-3


def test_extra_metrics_are_checked_before_a_model_is_loaded(tmp_path):
    from ftnb.cli import extra_metrics
    from ftnb.plan import InputError

    assert extra_metrics("bleu, exact_match", "") == (["bleu", "exact_match"], [])
    with pytest.raises(InputError, match="no metric 'blue'; valid: .*exact_match"):
        extra_metrics("blue", "")
    (tmp_path / "facts.csv").write_text("question,say\nopen,9\n")
    assert extra_metrics("", str(tmp_path / "facts.csv"))[1][0].place == "facts.csv:2"
    (tmp_path / "facts.csv").write_text("question,says\nopen,9\n")
    with pytest.raises(InputError, match="facts.csv:2: no field 'says'"):
        extra_metrics("", str(tmp_path / "facts.csv"))


def test_extras_stand_in_the_saved_report(tmp_path, capsys):
    from ftnb.cli import with_extras
    from ftnb.evaluate import Prediction, Report
    from ftnb.evaluate import evaluate as judge
    from ftnb.metrics import Fact

    (tmp_path / "reports").mkdir()
    rows = [Prediction(str(i), "when open", "at nine", ("at nine", "at ten")[i % 2]) for i in range(4)]
    report = judge(rows, "generation", "tuned")
    made = with_extras(report, ["frame_match"], [Fact("question", "open", ("9",), (), "f.csv:2")], tmp_path)
    assert Report.load(tmp_path / "reports" / "tuned.json").metrics["frame_match"].value == 0.5
    assert list(made.metrics) == [*report.metrics, "frame_match"]
    assert "facts right in 0.500 (n = 4 records" in capsys.readouterr().out
