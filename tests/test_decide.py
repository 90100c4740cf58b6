"""Decide: consistency is 1 for a constant and 1/k for a hash; costs cross where they should; no answer is out of reach."""

import hashlib
import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ROOT
from ftnb.baselines import System, load_baselines
from ftnb.data import Record
from ftnb.decide import (
    DO_NOT,
    HOURS,
    OPEN,
    REPHRASINGS,
    TUNE,
    Cost,
    Prices,
    _Judge,
    _settle,
    consistency,
    cost,
    crossing,
    decide,
    frontier,
    plot_decision,
    rephrase,
)
from ftnb.evaluate import Prediction, evaluate
from ftnb.plan import InputError, break_even
from toys import quick

BASE = Prices(volume=5_000, price_in=0.5, price_out=1.5, hosting=0.4)
ORDER = [DO_NOT, OPEN, TUNE]


def record(i, text, answer="yes", **more):
    return Record(f"r{i}", ({"role": "user", "content": text},), answer, **more)


RECORDS = [record(i, f'It\'s message {i}: Do you like "this" one?') for i in range(120)]


def made(name, right, n=200, prompt=0, answer=0, lucky=0):
    hits = [i < right or i >= n - lucky for i in range(n)]
    rows = [
        Prediction(f"r{i}", "", f"class {i % 5}", f"class {i % 5 if hit else 9}")
        for i, hit in enumerate(hits)
    ]
    counts = ((prompt,) * n, (answer,) * n) if prompt else ((), ())
    return System(name, evaluate(rows, "classification", name), *counts)


def hashed(k):
    def answer(records, system, shots):
        said = [f"{system}|{[s.id for s in shots]}|{r.messages}" for r in records]
        return [str(int(hashlib.sha256(s.encode()).hexdigest(), 16) % k) for s in said]

    return answer


# consistency


def test_a_constant_is_consistent():
    found = consistency(lambda records, system, shots: ["x"] * len(records), RECORDS, "s", RECORDS[:2])
    assert (found.all_same.value, found.pairwise.value, found.spread.value) == (1, 1, 0)
    assert found.all_same.low < 1 and found.pairwise.low < 1  # 120 records prove nothing for certain
    assert set(found.same) == {c.name for c in REPHRASINGS} and found.p == 1


@pytest.mark.parametrize("k", [2, 4, 10])
def test_a_hash_agrees_by_chance(k):
    found = consistency(hashed(k), RECORDS, "s", RECORDS[:2])
    assert found.pairwise.value == pytest.approx(1 / k, abs=0.04)
    assert abs(found.pairwise.value - 1 / k) < found.pairwise.high - found.pairwise.low
    assert found.all_same.value < 0.05


def test_one_bad_change_shows_as_spread():
    def shy(records, system, shots):
        return ["no" if r.text.isupper() else "yes" for r in records]

    found = consistency(shy, RECORDS, "s")
    assert found.spread.value == 1 and found.p < 0.01 and found.chance < 0.3
    assert found.same["capitals"].value == 0 and found.same["polite"].value == 1
    assert found.all_same.value == 0


def test_noise_alone_is_not_called_a_spread():
    "Answers that are right at random, whatever the change: small p at most as often as it should."
    small = 0
    for seed in range(20):

        def noisy(records, system, shots, seed=seed):
            said = [f"{seed}{system}{[s.id for s in shots]}{r.messages}" for r in records]
            return ["yes" if hashlib.sha256(s.encode()).digest()[0] < 180 else "no" for s in said]

        small += consistency(noisy, RECORDS[:40], "s", RECORDS[:2]).p < 0.05
    assert small <= 4  # 5% of 20, and room for chance


def test_copied_values_are_compared_without_case():
    def copies(records, system, shots):
        return [
            f'{{"intent": "find", "slots": [{{"name": "what", "value": "{r.text.split()[-1]}"}}]}}'
            for r in records
        ]

    records = [
        record(i, f"find me Anna{i}", copies([record(i, f"find me Anna{i}")], "", ())[0]) for i in range(30)
    ]
    kept = [c for c in REPHRASINGS if c.name in ("lower case", "capitals")]
    found = consistency(copies, records, changes=kept)
    assert found.all_same.value == 1 and {e.value for e in found.scores.values()} == {1.0}


def test_changes_touch_the_message_only():
    for change in REPHRASINGS:
        changed = rephrase(RECORDS[0], change)
        assert changed.completion == RECORDS[0].completion and changed.id == RECORDS[0].id
        assert change.keeps and change.breaks
    own = Record("s", ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}), "yes")
    bare = rephrase(own, next(c for c in REPHRASINGS if not c.system))
    assert [m["role"] for m in bare.messages] == ["user"]


def test_only_the_last_user_turn_changes():
    turns = (
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": "Two"},
        {"role": "user", "content": "Three"},
    )
    capitals = next(c for c in REPHRASINGS if c.name == "capitals")
    assert [m["content"] for m in rephrase(Record("c", turns, "yes"), capitals).messages] == [
        "One",
        "Two",
        "THREE",
    ]


def test_consistency_refuses():
    with pytest.raises(InputError, match="0 records|got 0"):
        consistency(hashed(2), [])
    with pytest.raises(InputError, match="metric of"):
        consistency(hashed(2), RECORDS, metric="rouge_l")
    with pytest.raises(InputError, match="no change applies"):
        consistency(hashed(2), RECORDS, changes=[c for c in REPHRASINGS if c.turned])
    with pytest.raises(InputError, match="polite: 120 records were asked, 1 answers came"):
        consistency(lambda r, s, k: ["a"] * (1 if "Hello" in r[0].text else len(r)), RECORDS)


# costs


def test_cost_is_break_even():
    system, want = made("few-shot", 100, prompt=1000, answer=50), break_even(5_000, 1000, 0.5, 0, 50, 1.5)
    assert cost(system, BASE).month == pytest.approx(want.prompted)
    assert cost(made("tuned", 100, prompt=10, answer=5), BASE).month == pytest.approx(HOURS * 0.4)
    full = replace(BASE, rows=600, row_price=0.5, training_hours=2, training_price=3, trainings=4)
    tuned = cost(made("tuned", 100, prompt=10, answer=5), full)
    assert tuned.month == pytest.approx(HOURS * 0.4 + 600 * 0.5 / 12 + 4 * 2 * 3 / 12)
    assert cost(made("tfidf", 100), full).month == pytest.approx(600 * 0.5 / 12)
    assert cost(made("base", 100, prompt=10), full).once == 0


def test_several_machines():
    busy = replace(BASE, volume=864_000, per_second=2.0)
    tuned = cost(made("tuned", 100, prompt=10), busy)
    assert tuned.machines == pytest.approx(5) and tuned.month == pytest.approx(5 * HOURS * 0.4)
    slow = replace(busy, per_second={"tuned-retrieved": 1.0})
    assert cost(made("tuned", 100, prompt=10), slow).machines == 1
    assert cost(made("tuned-retrieved", 100, prompt=10), slow).machines == pytest.approx(10)


amount = st.floats(1e-3, 1e3)


@quick
@given(amount, amount, amount, amount, st.floats(1, 1e6))
def test_bills_meet_at_the_crossing(per_request, own, machine, once, capacity):
    a = Cost("a", 1.0, per_request / 100, 0.0, 0.0)
    b = Cost("b", 1.0, own / 1000, machine, once, capacity)
    at = crossing(a, b)
    if at == math.inf:
        assert all(
            replace(b, volume=v).month >= replace(a, volume=v).month * (1 - 1e-9) for v in (1, 1e3, 1e6, 1e9)
        )
    else:
        assert replace(b, volume=at).month == pytest.approx(replace(a, volume=at).month, rel=1e-6)
        assert replace(b, volume=2 * at).month < replace(a, volume=2 * at).month


def test_prices_refuse():
    for bad in (
        {"volume": 0},
        {"price_in": -1},
        {"hosting": math.nan},
        {"months": 0},
        {"per_second": {"tuned": -1}},
    ):
        with pytest.raises(InputError, match=f"prices: {next(iter(bad))} must be a number"):
            replace(BASE, **bad)


# the answer


def test_every_answer_is_reached():
    few, tuned = made("few-shot", 150, prompt=1500, answer=20), made("tuned", 152, prompt=100, answer=20)
    poor, better = made("base", 10, prompt=200, answer=20), made("tuned", 185, prompt=100, answer=20)
    assert decide([few, tuned], replace(BASE, volume=100)).answer == DO_NOT
    assert decide([few, tuned], replace(BASE, volume=1e6)).answer == TUNE
    assert decide([few, better], replace(BASE, volume=100)).answer == TUNE
    assert decide([poor, better], replace(BASE, volume=100)).answer == TUNE
    small = decide([made("few-shot", 30, 40, 1500), made("tuned", 32, 40, 100)], replace(BASE, volume=100))
    assert small.answer == OPEN and small.more_rows > 40
    assert "more test rows" in str(small)
    worse = decide(
        [made("few-shot", 190, prompt=1500), made("tuned", 150, prompt=100)], replace(BASE, volume=1e6)
    )
    assert (worse.answer, worse.take) == (DO_NOT, "few-shot") and "only cheaper" in str(worse)


def test_a_cheap_classifier_that_is_not_beaten_is_taken():
    few, tuned, cheap = made("few-shot", 120, prompt=1500), made("tuned", 182, prompt=100), made("tfidf", 180)
    found = decide([few, tuned, cheap], replace(BASE, volume=1e6))
    assert (found.answer, found.take, found.rival) == (DO_NOT, "tfidf", "tfidf")
    assert not [f for f in found.flips if f.name != "hosting"]
    assert decide([few, tuned, made("tfidf", 140)], replace(BASE, volume=1e6)).answer == TUNE


def test_more_rows_would_decide():
    "With the rows that were said to be missing, and the same share of rows apart, the answer is no longer open."
    small = decide([made("few-shot", 30, 40, 1500), made("tuned", 32, 40, 100)], replace(BASE, volume=100))
    n = 40 + small.more_rows
    scaled = [made("few-shot", round(n * 0.75), n, 1500), made("tuned", round(n * 0.8), n, 100)]
    assert decide(scaled, replace(BASE, volume=100)).answer != OPEN


def test_flips_are_the_crossings():
    few, tuned = made("few-shot", 150, prompt=1500, answer=20), made("tuned", 152, prompt=100, answer=20)
    found = decide([few, tuned], BASE)
    a, b = cost(few, BASE), cost(tuned, BASE)
    by = {f.name: f for f in found.flips}
    assert by["volume"].at == pytest.approx(crossing(a, b), rel=1e-6) and by["volume"].up
    assert by["hosting"].at == pytest.approx(a.month / HOURS, rel=1e-6) and not by["hosting"].up
    assert by["price"].at == pytest.approx(BASE.price_in * b.month / a.month, rel=1e-6)
    assert [f.factor for f in found.flips] == sorted(f.factor for f in found.flips)
    put = {"volume": "volume", "hosting": "hosting"}
    for name, field in put.items():  # just before and just after
        for factor, answer in ((0.999, DO_NOT), (1.001, TUNE)):
            factor = factor if by[name].up else 1 / factor
            assert decide([few, tuned], replace(BASE, **{field: by[name].at * factor})).answer == answer


def test_what_a_wrong_answer_costs():
    few, tuned = made("few-shot", 150, prompt=1500, answer=20), made("tuned", 184, prompt=100, answer=20)
    extra = (cost(tuned, BASE).per_thousand - cost(few, BASE).per_thousand) / 1000
    worth = {f.name: f for f in decide([few, tuned], BASE).flips}["wrong"]
    assert (
        worth.at == pytest.approx(extra / 0.17, rel=1e-6) and worth.now is None and worth.factor == math.inf
    )
    assert decide([few, tuned], replace(BASE, wrong=1.01 * worth.at)).answer == TUNE
    assert decide([few, tuned], replace(BASE, wrong=0.99 * worth.at)).answer == DO_NOT


systems = st.tuples(st.integers(100, 200), st.integers(100, 200), st.integers(100, 200), st.integers(0, 40))


@settings(quick, max_examples=12)
@given(systems, st.integers(50, 3000), amount, st.floats(0, 100), st.sampled_from([None, 1e-4, 1e-2]))
def test_the_answer_moves_one_way_with_the_volume(right, prompt, hosting, per_second, wrong):
    few, tuned, cheap, lucky = right
    some = [
        made("few-shot", few, prompt=prompt, answer=9),
        made("tuned", tuned, prompt=60, answer=9, lucky=lucky),
    ]
    some += [made("tfidf", cheap)] * (cheap % 2)
    prices = replace(BASE, hosting=hosting, per_second=per_second, wrong=wrong, small_hosting=0.01)
    judge = _Judge(some, "accuracy", 0.05)  # what `decide` asks, without looking for what turns the answer
    seen = [ORDER.index(_settle(judge, replace(prices, volume=10 ** (e / 3)))[0]) for e in range(25)]
    assert seen == sorted(seen)


def test_a_system_for_part_of_the_job_is_set_aside():
    frames = ['{"intent": "a", "slots": []}', '{"intent": "b", "slots": [{"name": "n", "value": "v"}]}']
    whole = [Prediction(f"r{i}", "", frames[i % 2], frames[i % 2] if i % 9 else "no") for i in range(60)]
    part = [Prediction(f"r{i}", "", "ab"[i % 2], "ab"[i % 2]) for i in range(60)]
    tuned = System("tuned", evaluate(whole, "extraction", "tuned"), (9,) * 60, (9,) * 60)
    base = System(
        "base", evaluate([replace(p, output="x") for p in whole], "extraction", "base"), (90,) * 60, (9,) * 60
    )
    classes = System("tfidf", evaluate(part, "extraction", "tfidf"))
    found = decide([base, classes, tuned], BASE)
    assert found.metric == "frame_match" and {p.name for p in found.points} == {"base", "tuned"}
    assert any("tfidf" in w and "part of the job" in w for w in found.why)
    on_intent = decide([base, classes, tuned], BASE, metric="intent_accuracy")
    assert (on_intent.answer, on_intent.take) == (DO_NOT, "tfidf")


def test_decide_refuses():
    few, tuned = made("few-shot", 150, prompt=1500), made("tuned", 152, prompt=100)
    for told, said in (
        (([few], BASE), "no tuned system"),
        (([tuned], BASE), "no untuned system"),
        (([few, tuned], BASE, "frame_match"), "no untuned system is measured by frame_match"),
        (([few, tuned], BASE, None, 0.0), "gap must be above 0"),
        (([made("few-shot", 3, 9, 5), tuned], BASE), "different records"),
    ):
        with pytest.raises(InputError, match=said):
            decide(*told)


def test_frontier_and_figure():
    some = [
        made("few-shot", 150, prompt=1500),
        made("tuned", 182, prompt=100),
        made("tfidf", 140),
        made("base", 100, prompt=2000),
    ]
    found = decide(some, replace(BASE, volume=100_000))
    assert [p.name for p in frontier(found.points)] == ["tfidf", "tuned"]
    figure = plot_decision(found)
    figure.canvas.draw()
    labels = [t.get_window_extent() for t in figure.axes[0].texts]
    assert len(labels) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(labels) for b in labels[i + 1 :])


def test_the_main_job():
    "What was measured for the store assistant: the tuned model is shown to be better, at any of these prices."
    found = decide(load_baselines(ROOT / "docs/decide.json"), BASE)
    assert found.answer == TUNE and found.metric == "frame_match"
    assert any("tfidf" in w for w in found.why)
