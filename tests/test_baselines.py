"""Baselines: examples never give the answer away, prompts are never cut, and what was answered is not asked again."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ROOT
from ftnb.baselines import (
    SYSTEMS,
    Baselines,
    Index,
    Tokens,
    baselines,
    find,
    fingerprint,
    fit_examples,
    load_baselines,
    save_baselines,
    terms,
    tokens,
)
from ftnb.data import Record, Splits
from ftnb.evaluate import few_shots
from ftnb.format import prompt_for
from ftnb.plan import InputError, Recipe
from toys import quick, rows, toy_model

SHORT = Recipe(task="classification", max_new_tokens=3, shots=2, system="Name the kind.")


def record(i, text, label="a", **more):
    return Record(i, ({"role": "user", "content": text},), label, label, **more)


def toy_splits(n=60):
    made = [record(f"r{k}", text, kind) for k, (text, kind) in enumerate(rows(n))]
    return Splits(made[: n - 24], made[n - 24 : n - 18], made[n - 18 :])


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    import torch
    from transformers import AutoModelForCausalLM

    from ftnb.model import load_tokenizer

    folder = toy_model(tmp_path_factory.mktemp("toy"))
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), load_tokenizer(folder)


@pytest.mark.parametrize(
    "text, found",
    [
        ("Où est le CAFÉ ?", ["ou", "est", "le", "cafe"]),
        ("Ärger, ÄRGER", ["arger", "arger"]),
        ("北京", ["北", "京", "北京"]),
        ("去", ["去"]),
        ("สวัสดี", None),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("ไป 3 ครั้ง", None),
        ("ﬁnd Ｘ", ["find", "x"]),
        ("?!", []),
        ("", []),
    ],
)
def test_terms(text, found):
    assert terms(text) == found if found is not None else len(terms(text)) > 2


@quick
@given(st.text(max_size=40))
def test_terms_take_any_text_and_fold_case(text):
    assert all(t and not t.isspace() for t in terms(text))
    assert terms(text) == terms(" " + text + " ")


def test_equal_words_meet_across_accents_and_scripts():
    train = [
        record("a", "réserver une table à Orléans"),
        record("b", "我想订一张去北京的火车票"),
        record("c", "hello"),
    ]
    index = Index(train)
    for text, want in (("RESERVER TABLE ORLEANS demain", "a"), ("北京的天气怎么样", "b"), ("hello you", "c")):
        assert find(index, record("q", text), 1).shots[0].id == want


def test_scores_are_bm25s():
    "Against the formula of Lucene's BM25, k1 1.5 and b 0.75, by hand."
    import math

    said = ["red red apple", "green apple", "blue sky today"]
    index = Index([record(str(i), t) for i, t in enumerate(said)])
    mean = sum(len(t.split()) for t in said) / 3

    def score(term, text):
        tf, n = text.split().count(term), sum(term in t.split() for t in said)
        idf = math.log(1 + (3 - n + 0.5) / (n + 0.5))
        return idf * tf / (tf + 1.5 * (0.25 + 0.75 * len(text.split()) / mean)) if tf else 0.0

    want = [score("red", t) + score("apple", t) for t in said]
    assert index.scores(record("q", "red apple")) == pytest.approx(want, abs=1e-5)


def test_no_twin_is_ever_shown():
    train = [record(f"t{k}", text) for k, (text, _) in enumerate(rows(40))]
    message = record("q", "Where is my order number 4711 please")
    twins = [
        replace(message, id="same words"),
        record("case", "WHERE is my order, number 4711 - please?!"),
        record("value", "Where is my order number 99 please"),
        record("near", "Where is my order number 4711 pleas"),
        record("group", "order order order", group="g"),
        record("q", "order number please, another text with the same id"),
    ]
    asked = replace(message, group="g")
    index = Index([*train, *twins])
    found = find(index, asked, 40, fixed=[*twins, *train])
    assert {s.id for s in found.shots} <= {t.id for t in train}
    assert found.twins == len(twins)
    held = Index([*train, *twins], held=[asked])
    assert held.left_out == 3  # same id, same words, same words in other case
    assert not {"q", "same words", "case"} & {r.id for r in held.records}


def test_nothing_in_common_falls_back_and_is_counted():
    train = [record(f"t{k}", text, kind) for k, (text, kind) in enumerate(rows(30))]
    index, fixed = Index(train), few_shots(train, 3)
    for text in ("", "???", "zzzz qqqq", "去"):
        found = find(index, record("q", text), 3, fixed)
        assert (found.matched, len(found.shots)) == (0, 3)
        assert {s.id for s in found.shots} == {f.id for f in fixed}
    assert find(index, train[0], 0).shots == ()
    with pytest.raises(InputError, match="k >= 0"):
        find(index, train[0], -1)


def test_an_index_without_words_works():
    index = Index([record("a", "?!"), record("b", "...")])
    assert find(index, record("q", "hello"), 2, index.records).matched == 0


def test_similar_ones_stand_last():
    index = Index([record("far", "apple and pear juice"), record("near", "green apple cake")])
    assert [s.id for s in find(index, record("q", "green apple pie with cream"), 2).shots] == ["far", "near"]


def test_whole_examples_are_dropped(toy):
    _, tokenizer = toy
    shots = [record(f"s{k}", f"message number {k} " * 5) for k in range(6)]
    message = record("q", "the question")
    full = len(prompt_for(tokenizer, message, "", shots))
    for room in range(40, full + 20, 15):
        size, kept = fit_examples(tokenizer, message, shots, "", room)
        assert size == len(prompt_for(tokenizer, message, "", kept)) <= room
        assert kept == tuple(shots[len(shots) - len(kept) :])
    bare = len(prompt_for(tokenizer, message))
    assert fit_examples(tokenizer, message, shots, "", bare) == (bare, ())
    with pytest.raises(InputError, match="record q: its prompt has"):
        fit_examples(tokenizer, message, shots, "", bare - 1)


def test_dropped_examples_are_told(toy):
    model, tokenizer = toy
    model.config.max_position_embeddings, kept = 130, model.config.max_position_embeddings
    try:
        found = baselines(SHORT.replace(shots=8), toy_splits(), (model, tokenizer), systems=["few-shot"])
    finally:
        model.config.max_position_embeddings = kept
    assert any("examples were dropped whole from 18 of 18 prompts" in note for note in found[0].notes)
    assert max(found[0].prompts) <= 127


def test_all_systems_on_the_same_rows(toy, tmp_path):
    splits = toy_splits()
    found = baselines(SHORT, splits, toy, lambda: toy, out=tmp_path, n=9)
    assert [s.name for s in found] == list(SYSTEMS)
    ids = [p.id for p in found[0].report.predictions]
    assert len(ids) == 9 and all([p.id for p in s.report.predictions] == ids for s in found)
    _, tokenizer = toy
    tuned = next(s for s in found if s.name == "tuned")
    asked = [r for r in splits.test if r.id in ids]
    assert tuned.prompts == tuple(len(prompt_for(tokenizer, r, SHORT.system)) for r in asked)
    assert any("not trained with examples" in n for n in found[-1].notes)
    lines = found.compare("tuned")
    assert {c.b for c in lines} == set(SYSTEMS) - {"tuned"}
    assert "| tuned |" in found._repr_markdown_()
    with pytest.raises(InputError, match="no system 'best'"):
        found.compare("best")
    path = save_baselines(found, tmp_path / "all.json")
    assert [(s.name, s.report, s.prompts) for s in load_baselines(path)] == [
        (s.name, s.report, s.prompts) for s in found
    ]
    bare = load_baselines(save_baselines(found, tmp_path / "bare.json", text=False))
    assert bare[0].report.metrics == found[0].report.metrics and bare[0].report.predictions[0].text == ""


def test_an_interrupted_call_goes_on(toy, tmp_path, monkeypatch):
    import ftnb.baselines as module

    splits, calls, real = toy_splits(), [], module.predict

    def dies(model, tokenizer, records, *more):
        calls.append([r.id for r in records])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, tokenizer, records, *more)

    whole = baselines(SHORT, splits, toy, systems=["base"], batch_size=1)
    monkeypatch.setattr(module, "predict", dies)
    with pytest.raises(KeyboardInterrupt):
        baselines(SHORT, splits, toy, out=tmp_path, systems=["base"], batch_size=1)
    done = set(json.loads((tmp_path / "base.json").read_text("utf-8"))["rows"])
    assert done == {i for part in calls[:2] for i in part}
    again = baselines(SHORT, splits, toy, out=tmp_path, systems=["base"], batch_size=1)
    assert not done & {i for part in calls[3:] for i in part}
    assert [p.output for p in again[0].report.predictions] == [p.output for p in whole[0].report.predictions]


def test_other_inputs_are_asked_anew(toy, tmp_path):
    splits = toy_splits()

    def asked(recipe=SHORT, splits=splits, base=toy, key=""):
        loaded = []

        def load():
            loaded.append(1)
            return base

        baselines(recipe, splits, load, out=tmp_path, systems=["few-shot"], key=key, n=3)
        return bool(loaded)

    assert asked() and not asked()
    assert asked(SHORT.replace(shots=1)) and asked(SHORT.replace(max_new_tokens=2))
    assert asked(key="another model") and not asked(key="another model")
    fewer = Splits(splits.train[:20], splits.val, splits.test)
    assert asked(splits=fewer)
    (tmp_path / "few-shot.json").write_text("[1, 2", "utf-8")
    assert asked() and not asked()


def test_fingerprint_tells_models_apart(toy):
    import torch

    model, _ = toy
    first = fingerprint(model)
    assert fingerprint(model) == first
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
        assert fingerprint(model) != first
        model.lm_head.weight[0, 0] -= 1


def test_bad_input(toy, tmp_path):
    splits = toy_splits()
    with pytest.raises(InputError, match="no test rows"):
        baselines(SHORT, Splits(splits.train, (), ()), toy)
    with pytest.raises(InputError, match="base is \\(model, tokenizer\\)"):
        baselines(SHORT, splits, "smollm2")
    with pytest.raises(InputError, match="no system 'nope'"):
        baselines(SHORT, splits, toy, systems=["nope"])
    with pytest.raises(InputError, match="no system to ask"):
        baselines(SHORT, splits, toy, systems=["tuned"])
    with pytest.raises(InputError, match="holds no measured systems"):
        load_baselines(tmp_path / "absent.json")


def test_leaked_examples_never_reach_a_prompt(toy):
    "A split that leaks everything: each test row stands in training as well."
    splits = toy_splits()
    leaky = Splits([*splits.train, *(replace(r, id=f"copy{r.id}") for r in splits.test)], (), splits.test)
    found = baselines(SHORT, leaky, toy, systems=["few-shot", "retrieved"])
    for system in found:
        assert any("18 training records equal a test row" in note for note in system.notes)


def test_rows_without_classes_have_no_classifier(toy):
    splits = toy_splits()
    bare = Splits(*([replace(r, label=None) for r in part] for _, part in splits.items()))
    found = baselines(SHORT.replace(task="generation"), bare, toy, systems=["tfidf", "base"], n=3)
    assert [s.name for s in found] == ["base"]


def test_tokens():
    assert tokens([]) == Tokens(0, 0.0, 0.0)
    assert tokens(range(1, 101)) == Tokens(100, 50.5, 96.0)
    assert Baselines().reports == []


def test_measured_file_holds_six_systems():
    found = load_baselines(ROOT / "docs/decide.json")
    assert [s.name for s in found] == list(SYSTEMS)
    assert len({s.report.n for s in found}) == 1


def test_predict_takes_examples_of_each_record(toy):
    from ftnb.evaluate import predict

    model, tokenizer = toy
    splits = toy_splits()
    own = {r.id: (splits.train[k], splits.train[k + 1]) for k, r in enumerate(splits.test[:4])}
    together = predict(model, tokenizer, splits.test[:4], SHORT, lambda r: own[r.id])
    alone = [predict(model, tokenizer, [r], SHORT, own[r.id])[0] for r in splits.test[:4]]
    assert together == alone
    with pytest.raises(InputError, match="is one of the test records"):
        predict(model, tokenizer, splits.test[:4], SHORT, lambda r: [splits.test[0]])
