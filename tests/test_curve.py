"""The learning curve: parts are nested and whole, points survive a stop, and an interval widens where little is known."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import curve_fit as scipy_fit

from conftest import ROOT
from ftnb.curve import (
    FORMS,
    REACH,
    SHARES,
    Curve,
    fit_curve,
    fractions,
    learning_curve,
    outlook,
    plot_curve,
    tuned,
)
from ftnb.data import Record, group_near
from ftnb.evaluate import Prediction, baseline_tfidf
from ftnb.plan import InputError, Recipe
from toys import FAST, quick, rows, toy_model

DATA = Path(os.environ.get("FTNB_SHARED") or ROOT.parent / "shared") / "data"
SIZES = (50, 80, 120, 200, 300, 450, 700)


def record(i, label, group=None, text=None):
    return Record(f"r{i}", ({"role": "user", "content": text or f"message {i}"},), label, label, group)


def planted(law, n=400, seed=0, luck=0.15, sizes=SIZES, seeds=3):
    "A curve whose truth is known: rows have a difficulty, draws of training rows have luck."
    rng = np.random.default_rng(seed)
    hard, parts = rng.random(n), []
    for _ in range(seeds):
        errors = np.array([law(k) + luck * rng.normal() / k**0.5 for k in sizes])
        parts.append(np.clip(errors, 0, 1)[:, None] < hard + 0.05 * rng.normal(size=(len(sizes), n)))
    right = np.array(parts)
    right[:, -1] = right[0, -1]
    return Curve(np.tile(sizes, (seeds, 1)), right, tuple(map(str, range(n))))


def steep(k):
    return 2 * k**-0.5 + 0.05


def level(k):
    return 0.12 + 2 * k**-1.5


labelled = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), min_size=40, max_size=120)


@quick
@given(labelled, st.integers(0, 5))
def test_parts_are_nested_keep_groups_and_classes(pairs, seed):
    records = [record(i, label, f"{label}{group}") for i, (label, group) in enumerate(pairs)]
    parts = fractions(records, SHARES, seed)
    ids = [[r.id for r in part] for part in parts]
    assert ids[-1] == [r.id for r in records]
    for small, large in zip(ids, ids[1:]):
        assert set(small) <= set(large)
    for share, part in zip(SHARES, parts):
        left = {r.group for r in records} - {r.group for r in part}
        assert {r.id for r in records if r.group not in left} == {r.id for r in part}
        for label, n in Counter(r.label for r in records).items():
            here = sum(r.label == label for r in part)
            widest = max(Counter(r.group for r in records if r.label == label).values())
            assert 0 < here and abs(here - share * n) <= max(widest, 1)
    assert fractions(records, SHARES, seed) == parts


def test_rows_without_groups_stay_with_rows_of_the_same_prompt():
    records = [record(i, "ab"[i % 2], text=f"message {i // 4}") for i in range(80)]
    for part in fractions(records, (0.2, 0.5, 1.0)):
        kept = {r.text for r in part}
        assert {r.id for r in records if r.text in kept} == {r.id for r in part}


@pytest.mark.parametrize(
    "shares, said",
    [((), "grow"), ((0.5, 0.5), "grow"), ((1.0, 0.5), "grow"), ((0.0, 1.0), "grow"), ((0.5, 1.2), "grow")]
    + [((0.01, 1.0), "cannot hold 2 classes")],
)
def test_shares_that_cannot_be(shares, said):
    with pytest.raises(InputError, match=said):
        fractions([record(i, "ab"[i % 2]) for i in range(40)], shares)


def toy_sides():
    records = [record(i, label, text=text) for i, (text, label) in enumerate(rows(200))]
    return records[:140], records[140:]


def test_a_stopped_curve_goes_on_where_it_stopped(tmp_path):
    train, test = toy_sides()
    asked, shares = [], (0.2, 0.4, 0.7, 1.0)

    def learner(part, held):
        asked.append(len(part))
        if len(asked) == 4:
            raise KeyboardInterrupt
        return baseline_tfidf(part, held)

    with pytest.raises(KeyboardInterrupt):
        learning_curve(train, test, learner, shares, 2, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3
    curve = learning_curve(train, test, learner, shares, 2, tmp_path)
    assert len(asked) == 4 + 7 - 3  # seven trainings in all, three were there
    whole = learning_curve(train, test, baseline_tfidf, shares, 2)
    assert (curve.right == whole.right).all() and (curve.sizes == whole.sizes).all()
    assert curve.right.shape == (2, 4, 60) and (curve.right[0, -1] == curve.right[1, -1]).all()
    learning_curve(train, test, learner, shares, 3, tmp_path)
    assert len(asked) == 8 + 3  # a third draw costs its three smaller parts


@pytest.mark.parametrize("damage", ["", "{", '{"rows": 28}', '{"rows": 28, "right": "01"}', "[]", "\udcff"])
def test_a_torn_point_is_measured_again(tmp_path, damage):
    train, test = toy_sides()
    curve = learning_curve(train, test, shares=(0.2, 1.0), seeds=2, out=tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(damage.encode("utf-8", "surrogateescape"))
    again = learning_curve(train, test, shares=(0.2, 1.0), seeds=2, out=tmp_path)
    assert (again.right == curve.right).all()
    assert all("right" in json.loads(p.read_text()) for p in tmp_path.iterdir())


def test_points_of_other_rows_or_another_learner_are_not_taken(tmp_path):
    train, test = toy_sides()
    learning_curve(train, test, shares=(1.0,), seeds=2, out=tmp_path)
    learning_curve(train, test[1:], shares=(1.0,), seeds=2, out=tmp_path)
    edited = [record(0, train[0].label, text="something else"), *train[1:]]
    learning_curve(edited, test, shares=(1.0,), seeds=2, out=tmp_path)
    learning_curve(train, test, shares=(1.0,), seeds=2, out=tmp_path, name="other")
    assert len(list(tmp_path.iterdir())) == 4


def test_inputs_that_cannot_make_a_curve():
    train, test = toy_sides()
    grouped = group_near(train)
    for said, call in {
        "2 seeds or more": lambda: learning_curve(train, test, seeds=1),
        "one of frame_match": lambda: learning_curve(train, test, metric="macro_f1"),
        "rows on both sides": lambda: learning_curve(train, []),
        "learner's name": lambda: learning_curve(train, test, type("L", (), {"__call__": None})(), out="x"),
        "stands in training": lambda: learning_curve(train, train[:3]),
        "split by groups first": lambda: learning_curve(grouped[1:], [grouped[0], grouped[1]]),
        "no answer to 60 of 60": lambda: learning_curve(train, test, lambda a, b: [], name="silent"),
    }.items():
        with pytest.raises(InputError, match=said):
            call()


def test_the_fit_is_that_of_scipy():
    for seed in range(4):
        curve = planted(steep, seed=seed)
        fit = fit_curve(curve, draws=10)
        x, y = (curve.sizes / 700).ravel(), 1 - curve.right.mean(axis=2).ravel()
        p, n = np.tile(1 - curve.right.mean(axis=(0, 2)), 3), curve.right.shape[2]
        sigma = np.sqrt((p * (1 - p) + 0.25 / n) / n + fit.spread / np.tile(SIZES, 3))
        law = lambda x, a, b, c: a * x**-b + c  # noqa: E731
        ends = ([0, 0.05, 0], [1, 2, 1])
        a, b, c = scipy_fit(law, x, y, [0.1, 0.5, 0.05], sigma, bounds=ends, max_nfev=20_000)[0]
        at = np.array([0.1, 0.5, 1, 2, 4])
        ours = fit.best[0] * at ** -fit.best[1] + fit.best[2]
        assert np.abs(ours - law(at, a, b, c)).max() < 0.003


def test_a_law_without_noise_is_found():
    fit = fit_curve(planted(steep, n=40_000, luck=0.0), draws=100)
    for k in (700, 1400, 2800):
        assert abs(fit.forecast(k).value - (1 - steep(k))) < 0.004


@pytest.mark.parametrize("law, n", [(steep, 400), (steep, 60), (level, 400)], ids=["steep", "few", "flat"])
def test_intervals_hold_what_they_say(law, n):
    held = {80: 0, 95: 0}
    for seed in range(40):
        f = fit_curve(planted(law, n, seed), draws=200).forecast(2800)
        held[80] += f.low <= 1 - law(2800) <= f.high
        held[95] += f.low95 <= 1 - law(2800) <= f.high95
        assert 0 <= f.low95 <= f.low <= f.high <= f.high95 <= 1
    assert held[80] >= 27 and held[95] >= 34  # 2.5% quantile of 40 draws at 80% and 95%: 27 and 35


def test_intervals_widen_where_less_is_known():
    def width(curve, k=2800):
        f = fit_curve(curve, draws=300).forecast(k)
        return f.high - f.low

    seeds, mean = range(8), lambda f: np.mean([f(s) for s in seeds])
    usual = mean(lambda s: width(planted(steep, seed=s)))
    assert mean(lambda s: width(planted(steep, 40, seed=s))) > 1.5 * usual
    assert mean(lambda s: width(planted(steep, seed=s, sizes=SIZES[:4]))) > 1.5 * usual
    assert mean(lambda s: width(planted(steep, seed=s, luck=1.0))) > 1.2 * usual
    grouped = lambda s: Curve((c := planted(steep, seed=s)).sizes, c.right, tuple("abcdefgh" * 50))  # noqa: E731
    names = lambda c: Curve(c.sizes, np.sort(c.right, axis=2), tuple(sorted(c.groups)))  # noqa: E731
    assert mean(lambda s: width(names(grouped(s)))) > 2 * usual  # rows that are right or wrong together


def test_three_sizes_are_refused_and_so_are_unknown_forms():
    curve = planted(steep, sizes=SIZES[:3])
    with pytest.raises(InputError, match="4 sizes or more to be fitted, got 3"):
        fit_curve(curve)
    with pytest.raises(InputError, match="valid: power law"):
        fit_curve(planted(steep), form="spline")
    with pytest.raises(InputError, match="1 row or more"):
        fit_curve(planted(steep), draws=10).forecast(0)
    with pytest.raises(InputError, match="follows a power law"):
        outlook(fit_curve(planted(steep), "stays", draws=10))


def test_the_three_answers():
    rows_more = outlook(fit_curve(planted(steep), draws=300), 7)
    assert rows_more.kind == "rows" and 100 < rows_more.more < 500
    assert str(rows_more).startswith("about ") and "more rows for +1 point" in str(rows_more)
    flat = outlook(fit_curve(planted(level, 2000), draws=300), 1234)
    assert flat.kind == "flat" and "correct labels instead (the audit's label errors: 1,234)" in str(flat)
    few = [outlook(fit_curve(planted(steep, 25, s), draws=200)) for s in range(12)]
    kinds = Counter(o.kind for o in few)
    assert not kinds["flat"] and kinds["cannot tell"] >= 5
    assert "25 test rows" in str(next(o for o in few if o.kind == "cannot tell"))


def test_all_right_and_all_wrong_do_not_break_it():
    for value in (True, False):
        curve = planted(steep)
        curve = Curve(curve.sizes, np.full_like(curve.right, value), curve.groups)
        fit = fit_curve(curve, draws=50)
        assert abs(fit.forecast(1400).value - value) < 0.01
        assert outlook(fit).kind == "flat"  # 400 rows, no error left to lose or none that falls
        assert all(e.low < e.high for e in curve.scores)
        assert "accuracy" in curve._repr_markdown_() and fit._repr_markdown_()


def test_forms_shown_beside_it():
    curve = planted(steep)
    line, stays = (fit_curve(curve, form, draws=100) for form in FORMS[1:])
    assert line.forecast(2800).value > 0.95  # 0.912 is true
    assert stays.forecast(2800).value == pytest.approx(curve.right[:, -1].mean(), abs=0.003)
    assert line.forecast(2800).high <= 1


def test_the_picture_reaches_four_times_the_rows_and_marks_the_advice():
    fig = plot_curve(fit_curve(planted(steep), draws=50))
    (ax,) = fig.axes
    assert ax.get_xlim()[1] >= REACH * 700
    marks = {t.get_text() for t in ax.texts}
    assert marks == {"500", "1,000"}


@pytest.mark.slow
def test_a_curve_of_real_trainings(tmp_path):
    settings = dict(pair.split("=") for pair in FAST)
    numbers = {k: (float if k in ("epochs",) else int)(v) for k, v in settings.items()}
    model = toy_model(tmp_path / "model")
    recipe = Recipe(name="toy", task="classification", model=str(model), dtype="float32", **numbers)
    records = [record(i, label, text=text) for i, (text, label) in enumerate(rows(120))]
    learner = tuned(recipe, records[:12], tmp_path / "runs")
    sides = records[12:90], records[90:]
    curve = learning_curve(*sides, learner, (0.3, 0.6, 1.0), 2, tmp_path / "points", metric="exact_match")
    assert curve.right.shape == (2, 3, 30) and curve.learner == learner.__name__
    runs = [p for p in (tmp_path / "runs").iterdir() if (p / "run.json").exists()]
    assert len(runs) == 5 and not list((tmp_path / "runs").rglob("checkpoint-*"))
    forbidden = lambda part, held: pytest.fail("trained again")  # noqa: E731
    names = {"name": learner.__name__, "metric": "exact_match"}
    again = learning_curve(*sides, forbidden, (0.3, 0.6, 1.0), 2, tmp_path / "points", **names)
    assert (again.right == curve.right).all()


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA.parent.name}/data")
def test_the_benchmark_runs_on_a_part(tmp_path, capsys):
    import sys

    sys.path.insert(0, str(ROOT / "benchmarks"))
    import curve as benchmark

    found = benchmark.main(DATA, tmp_path / "curve.json", tmp_path / "points", n=1300, times=1)
    assert found["same answers as baseline_tfidf"] == found["test rows"] == 3080
    assert len(found["sub-samplings"]) == 16 and len(found["summary"]) == 16
    assert json.loads((tmp_path / "curve.json").read_text()) == found
    assert "| n/2 | power law | same |" in capsys.readouterr().out


def test_predictions_are_matched_by_id():
    train, test = toy_sides()
    backwards = lambda part, held: baseline_tfidf(part, held)[::-1]  # noqa: E731
    one = learning_curve(train, test, shares=(1.0,), seeds=2)
    other = learning_curve(train, test, backwards, (1.0,), 2)
    assert (one.right == other.right).all()
    wrong = lambda part, held: [Prediction(r.id, r.text, r.completion, "?") for r in held]  # noqa: E731
    assert not learning_curve(train, test, wrong, (1.0,), 2).right.any()


def test_twelve_right_of_twelve_are_not_certainty():
    curve = planted(steep, 12)
    fit = fit_curve(Curve(curve.sizes, np.ones_like(curve.right), curve.groups))
    f = fit.forecast(1400)
    assert f.low < 0.95 and f.low95 < 0.85 and f.high95 == 1.0
    assert fit.curve.scores[0].low < 0.85 and fit.curve.scores[0].value == 1.0
    assert outlook(fit).kind == "cannot tell"
