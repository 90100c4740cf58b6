"""Grounding on hand-written cases: what is flagged, what sureness is worth, and who uses a context."""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from conftest import ROOT
from ftnb.data import Record
from ftnb.evaluate import Prediction
from ftnb.forgetting import choice_likelihoods, likelihoods, read_questions
from ftnb.format import encode_answer, prompt_for
from ftnb.grounding import (
    CELLS,
    PAIRS,
    comparisons,
    context_use,
    coverage_curve,
    grounded,
    label_sums,
    likeliest,
    plot_coverage,
    plot_grounding,
    read_grounding,
    sureness,
    swapped,
    unsupported,
    whole_sentences,
    with_context,
)
from ftnb.model import DEFAULT_MODEL, load_tokenizer
from ftnb.plan import InputError
from toys import quick

CONTEXT = (
    "Of 120 patients at Mercy Hospital, 30 took Lorvane (20 mg) for 2 weeks. HbA1c fell by 1.5%. "
    'They spoke of "mild nausea". Treatment ended on 3 May 2024.'
)


def said(output, question="Did it help?"):
    return [(u.kind, u.text) for u in unsupported(Prediction("1", question, "", output), CONTEXT)]


@pytest.mark.parametrize(
    "output, found",
    [
        ("30 of 120 patients took Lorvane.", []),
        ("It was 0.02 g for fourteen days.", []),
        ("Treatment ended on May 3rd, 2024.", []),
        ("It ended in 2024.", []),
        ('They told of "mild nausea".', []),
        ("Did it help? Yes.", []),
        ("", []),
        ("…!", []),
        ("31 of 120 patients.", [("number", "31")]),
        ("Patients took 20 g.", [("number", "20 g")]),
        ("It ended on 4 May 2024.", [("date", "4 May 2024")]),
        ('They spoke of "severe nausea".', [("quote", "severe nausea")]),
        ("They spoke of “mild mild nausea”.", [("quote", "mild mild nausea")]),
        ("Patients at Grace Hospital.", [("name", "Grace")]),
        ("HbA2c fell.", [("name", "HbA2c")]),
        ("The NIH paid.", [("name", "NIH")]),
        ("Patients walked longer distances outdoors.", [("phrase", "walked longer distances outdoors")]),
        ("Patients walked. Longer distances.", []),  # a run does not cross the end of a sentence
    ],
)
def test_what_is_flagged(output, found):
    assert said(output) == found


def test_phrases_are_as_long_as_one_likes():
    p = Prediction("1", "", "", "Patients walked longer distances outdoors.")
    assert [len(unsupported(p, CONTEXT, words)) for words in (0, 2, 4, 5)] == [0, 1, 1, 0]


def test_the_question_supports_an_answer():
    assert said("Zolvane helped.", "Did Zolvane help?") == []
    assert said("They took Zolvane.", "Did it help?") == [("name", "Zolvane")]


def test_a_denial_is_not_seen():
    assert said("30 of 120 patients did not take Lorvane.") == []


@quick
@given(st.lists(st.sampled_from(CONTEXT.replace(".", " .").split()), max_size=12).map(" ".join))
def test_words_of_the_context_are_never_phrases(text):
    assert not [
        u for u in unsupported(Prediction("1", "", "", text), CONTEXT) if u.kind in ("phrase", "name")
    ]


@quick
@given(st.text(max_size=60), st.text(max_size=60))
def test_any_text_can_be_checked(answer, context):
    found = unsupported(Prediction("1", "", "", answer), context)
    assert all(answer[u.start :].startswith(u.text) or u.kind == "quote" for u in found)
    assert unsupported(Prediction("1", "", "", answer), answer) == []


def test_grounded_wants_a_context_for_every_answer():
    rows = [Prediction(i, "", "", text) for i, text in (("a", "30 patients"), ("b", "31 patients"))]
    found = grounded(rows, {"a": CONTEXT, "b": CONTEXT})
    assert (found.rate.value, found.rate.n) == (0.5, 2) and "| number | 1 | 31" in found._repr_markdown_()
    with pytest.raises(InputError, match=r"1 of 2 answers have no context: \['b'\]"):
        grounded(rows, {"a": CONTEXT})
    with pytest.raises(InputError, match="0 of 0"):
        grounded([], {})


def naive_aurc(right, sure, trials=3000):
    "Mean over random orders of equal rows."
    rng, total = random.Random(0), 0.0
    for _ in range(trials):
        order = sorted(range(len(right)), key=lambda i: (-sure[i], rng.random()))
        wrong = np.cumsum([1 - right[i] for i in order])
        total += (wrong / np.arange(1, len(right) + 1)).mean()
    return total / trials


def test_aurc_by_hand():
    assert coverage_curve([1, 0], [2, 1]).aurc.value == 0.25
    assert coverage_curve([0, 1], [2, 1]).aurc.value == 0.75
    assert coverage_curve([1, 1], [2, 1]).aurc.value == 0 and coverage_curve([0, 0], [2, 1]).aurc.value == 1
    for right, sure in (
        ([1, 0, 1, 0, 0], [3, 3, 2, 2, 1]),
        ([1, 0, 0], [1, 1, 1]),
        ([0, 1, 1, 1], [5, 5, 5, 1]),
    ):
        assert abs(coverage_curve(right, sure).aurc.value - naive_aurc(right, sure)) < 0.02


@quick
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 4)), min_size=2, max_size=30))
def test_aurc_lies_between_best_and_worst(rows):
    right, sure = zip(*rows, strict=True)
    curve = coverage_curve(right, sure, draws=25)
    assert curve.best - 1e-9 <= curve.aurc.value <= 1 and abs(curve.random - (1 - np.mean(right))) < 1e-9
    assert curve.kept[-1].n == len(rows) and abs(curve.kept[-1].value - np.mean(right)) < 1e-9
    shift = coverage_curve(right, [s / 10 - 3 for s in sure], draws=25)
    assert abs(shift.aurc.value - curve.aurc.value) < 1e-9  # only the order counts


def test_sureness_that_says_nothing_is_said_to_help_in_a_twentieth_of_trials():
    draw = np.random.default_rng(1)
    alarms = [coverage_curve(draw.random(60) < 0.6, draw.random(60), draws=200).helps for _ in range(600)]
    assert 0.03 < np.mean(alarms) < 0.075
    tied = [
        coverage_curve(draw.random(60) < 0.6, draw.integers(0, 3, 60), draws=200).helps for _ in range(300)
    ]
    assert np.mean(tied) < 0.085
    sure = [draw.random(60) for _ in range(60)]
    assert np.mean([coverage_curve(draw.random(60) < s, s, draws=200).helps for s in sure]) > 0.9


def test_coverage_refuses_what_it_cannot_rank():
    for right, sure in (([], []), ([1], [1, 2]), ([1, 0], [1.0, float("nan")])):
        with pytest.raises(InputError, match="coverage takes a number for each answer"):
            coverage_curve(right, sure)
    with pytest.raises(InputError, match=r"share in \(0, 1\], got 1.5"):
        coverage_curve([1, 0], [1, 2]).at(1.5)


def test_sureness_is_the_share_of_the_likeliest():
    assert np.allclose(sureness([[0.0, 0.0], [-1000.0, -1001.0]]), [0.5, 1 / (1 + np.exp(-1))])
    assert likeliest([[-2.0, -1.0], [-1.0, -1.0]], ("a", "b")) == ["b", "a"]


@quick
@given(st.integers(2, 30), st.integers(0, 5))
def test_swapped_contexts_are_all_another_one(n, seed):
    dealt = swapped([str(i) for i in range(n)], seed)
    assert sorted(map(int, dealt)) == list(range(n)) and all(int(d) != i for i, d in enumerate(dealt))


def test_context_use_tells_readers_from_others():
    expected = ["yes", "no"] * 40
    wrong = ["no", "yes"] * 30 + expected[60:]
    reader, stubborn = context_use(expected, expected, {"swapped": wrong, "none": expected})
    assert reader.shown and not stubborn.shown and reader.change.drop == 0.75 and reader.differ.value == 0.75
    assert "accuracy falls, -75.0 points" in str(reader) and "not shown to fall" in str(stubborn)
    assert reader.p > 0 and stubborn.p == 1.0
    gain = context_use(expected, wrong, {"swapped": expected})[0]
    assert not gain.shown  # a change for the better is no sign of reading
    with pytest.raises(InputError, match=r"same records, got \[79, 80\]"):
        context_use(expected, expected, {"x": expected[:-1]})


def test_holm_counts_all_that_were_tried():
    expected = ["yes"] * 40
    other = ["no"] * 6 + ["yes"] * 34
    one = context_use(expected, expected, {"a": other})[0]
    many = context_use(expected, expected, {name: other for name in "abc"})
    assert one.p == pytest.approx(2 / 2**6) and many[0].p == pytest.approx(3 * one.p) and not many[0].shown


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEFAULT_MODEL)


@pytest.fixture(scope="module")
def toy(tokenizer):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).to(torch.float32).eval()


def questions(n):
    return [
        Record(str(i), ({"role": "user", "content": "Is it " + "very " * i + "good?"},), "yes")
        for i in range(n)
    ]


def test_label_sums_are_those_of_a_plain_forward_pass(toy, tokenizer):
    labels, rows = ("yes", "no", "not at all"), questions(5)
    made = label_sums(toy, tokenizer, rows, labels, system="Answer.", batch_size=2)
    for record, sums in zip(rows, made, strict=True):
        prompt = prompt_for(tokenizer, record, "Answer.")
        for label, value in zip(labels, sums, strict=True):
            choice = encode_answer(tokenizer, label)[1]
            with torch.no_grad():
                logits = toy(input_ids=torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
            plain = sum(logits[len(prompt) - 1 + k, token].item() for k, token in enumerate(choice))
            assert abs(plain - value) < 1e-3
    for wrong in (("yes",), ("yes", "")):
        with pytest.raises(InputError, match="labels: two or more"):
            label_sums(toy, tokenizer, rows, wrong)


def test_likelihoods_of_questions_are_those_of_their_ids(toy, tokenizer, tmp_path):
    row = {
        "question": "What?",
        "choices": [{"label": "A", "text": "this"}, {"label": "B", "text": "that one"}],
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(row | {"answerKey": "A"}))
    start = tokenizer("Question: What?\nAnswer:")["input_ids"]
    ids = [
        tokenizer(f"Question: What?\nAnswer: {t}")["input_ids"][len(start) :] for t in ("this", "that one")
    ]
    plain = choice_likelihoods(toy, [(start, ids)])
    assert likelihoods(toy, tokenizer, read_questions(tmp_path / "q.jsonl")) == plain


def test_a_context_stands_before_the_last_question():
    turns = (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    )
    record = Record("1", turns, "d")
    made = with_context(record, " text\n")
    assert [m["content"] for m in made.messages] == ["a", "b", "text\n\nQuestion: c"]
    assert record.messages == turns and with_context(record, " ") == record


@pytest.mark.parametrize("keep", ["end", "start"])
@pytest.mark.parametrize("budget", [1, 8, 20, 40, 400])
def test_a_cut_context_is_whole_sentences_within_its_budget(tokenizer, keep, budget):
    made = whole_sentences(tokenizer, CONTEXT, budget, keep)
    assert made.of == 4 and made.tokens == len(tokenizer(made.text)["input_ids"]) <= budget
    assert CONTEXT.endswith(made.text) if keep == "end" else CONTEXT.startswith(made.text)
    assert made.text == "" or made.text[-1] == "." and made.text[0].isupper()
    assert (made.kept == made.of) == (budget == 400)


def written(folder, **changes):
    draw = random.Random(0)
    sums = {name: [[draw.uniform(-3, 0) for _ in range(3)] for _ in range(60)] for name in CELLS}
    made = {
        "labels": ["yes", "no", "maybe"],
        "expected": "012" * 20,
        "majority": "yes",
        "before": "01" * 10,
        "after": {"with": "00" * 10},
        "facts": {"check": {"true": [1, 0, 10]}},
        "sums": sums,
    } | changes
    (folder / "grounding.json").write_text(json.dumps(made))
    return folder / "grounding.json"


def test_a_measured_file_is_read_and_compared(tmp_path):
    measured = read_grounding(written(tmp_path))
    assert measured.report("majority").metrics["accuracy"].value == pytest.approx(1 / 3)
    found = comparisons(measured)
    assert len(found) == len(PAIRS) and all(c.n == 60 and c.verdict == "not shown" for c in found)
    assert measured.known["with"].lost == 10 and measured.curve("base").aurc.n == 60
    assert plot_grounding(measured) and plot_coverage({"a": measured.curve("base")})


@pytest.mark.parametrize(
    "changes", [{"sums": {}}, {"expected": "0129"}, {"labels": ["yes"]}, {"before": "0"}, {"expected": "01"}]
)
def test_another_file_is_refused(tmp_path, changes):
    with pytest.raises(InputError, match="grounding.json holds no grounding .*benchmarks/grounding.py"):
        read_grounding(written(tmp_path, **changes))


def test_a_missing_file_says_how_it_is_made(tmp_path):
    with pytest.raises(InputError, match="none.json holds no grounding .*FileNotFoundError"):
        read_grounding(tmp_path / "none.json")


def test_the_benchmark_has_the_cells_of_the_module():
    text = (ROOT / "benchmarks/grounding.py").read_text("utf-8")
    assert all(f'"{name}": (' in text for name in CELLS)
