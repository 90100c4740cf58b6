"""The statistics of `ftnb.evaluate` against SciPy and statsmodels, on drawn and on hand-written cases."""

import itertools

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ftnb.evaluate import (
    SUMS,
    Prediction,
    bootstrap,
    compare,
    effective_rows,
    evaluate,
    group_sums,
    holm,
    mcnemar,
    min_detectable,
    rate,
    swap_test,
    wilson,
)

MEAN = SUMS["similarity"][1]
RIGHT = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_that_of_statsmodels(case):
    from statsmodels.stats.proportion import proportion_confint

    hits, n = case
    assert np.allclose(wilson(hits, n), proportion_confint(hits, n, method="wilson"), atol=1e-9)


def test_no_rounding_leaves_a_rate_outside_of_its_interval():
    for n in range(1, 200):
        for hits in range(n + 1):
            low, high = wilson(hits, n)
            assert low <= hits / n <= high, (hits, n)


@given(RIGHT)
def test_mcnemar_is_that_of_statsmodels(rows):
    from statsmodels.stats.contingency_tables import mcnemar as theirs

    a, b = zip(*rows)
    table = [[sum(x == i and y == j for x, y in rows) for j in (True, False)] for i in (True, False)]
    assert np.isclose(mcnemar(a, b), min(1, theirs(table, exact=True).pvalue), atol=1e-12)
    assert np.isclose(mcnemar(a, b, range(len(a))), mcnemar(a, b), atol=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_that_of_statsmodels(p_values):
    from statsmodels.stats.multitest import multipletests

    assert np.allclose(holm(p_values), multipletests(p_values, method="holm")[1], atol=1e-12)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 5)), min_size=2, max_size=30))
def test_swapping_whole_groups_is_the_permutation_test_of_scipy(rows):
    a, b, groups = (np.array(column, int) for column in zip(*rows))
    gaps = group_sums(a - b, groups.tolist())
    if len(gaps) < 2:
        return
    theirs = stats.permutation_test(
        (gaps, np.zeros_like(gaps)), lambda x, y, axis: (x - y).sum(axis), permutation_type="samples"
    )
    assert np.isclose(mcnemar(a, b, groups.tolist()), min(1, theirs.pvalue), atol=1e-12)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=4, max_size=80))
def test_design_effect_is_the_cluster_robust_variance_of_statsmodels(rows):
    values, groups = (np.array(column, int) for column in zip(*rows))
    many = len(set(groups.tolist()))
    if many < 2 or many == len(values) or not values.var():
        return
    fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": groups})
    design = max(1.0, fit.cov_params().item() / (values.var() / len(values)))
    few = (stats.norm.ppf(0.975) / stats.t.ppf(0.975, many - 1)) ** 2
    assert np.isclose(effective_rows(values, groups.tolist()), max(1.0, len(values) / design * few))


def test_the_bootstrap_is_that_of_scipy():
    x = np.random.default_rng(0).beta(2, 1, size=150)
    theirs = stats.bootstrap((x,), np.mean, method="percentile", n_resamples=9999, rng=0).confidence_interval
    ours = bootstrap(np.column_stack([x, np.ones_like(x)]), MEAN, draws=9999)
    assert np.allclose(ours, (theirs.low, theirs.high), atol=0.003)


def test_the_swap_test_is_the_permutation_test_of_scipy():
    x, y = np.random.default_rng(1).beta(2, 1, size=(2, 12))
    exact = stats.permutation_test(
        (x, y), lambda x, y, axis: x.mean(axis) - y.mean(axis), permutation_type="samples"
    ).pvalue
    ours = swap_test(*(np.column_stack([z, np.ones_like(z)]) for z in (x, y)), MEAN, draws=20_000)
    assert abs(ours - exact) < 0.01


@pytest.mark.parametrize(("n", "share", "gap"), [(150, 0.1, 0.0), (400, 0.2, 0.07)])
def test_power_is_what_min_detectable_says(n, share, gap):
    gap = gap or min_detectable(n, share)
    draw = np.random.default_rng(0)
    odd = draw.binomial(n, share, size=3000)
    won = draw.binomial(odd, (1 + gap / share) / 2)
    shown = rate([stats.binomtest(int(w), int(d)).pvalue < 0.05 for w, d in zip(won, odd) if d])
    z = stats.norm.ppf(0.975)
    formula = stats.norm.cdf((gap * n**0.5 - z * share**0.5) / (share - gap**2) ** 0.5)
    assert abs(shown.value - formula) < 0.05  # the exact test is a little below the normal formula


def told(name, right, groups=None):
    rows = zip(itertools.count(), right, groups or [None] * len(right))
    rows = [Prediction(str(i), "", "yes", "yes" if hit else "no", group=group) for i, hit, group in rows]
    return evaluate(rows, "classification", name, labels=("yes", "no"))


def test_better_is_refused_below_the_gap_that_the_test_can_show():
    a, b = [1] * 12 + [0] * 2 + [1] * 286, [0] * 12 + [1] * 2 + [1] * 286
    found = compare(told("a", a), told("b", b))
    assert found.p < 0.05 and found.low > 0 and 0 < found.difference < found.detectable
    assert found.verdict == "not shown" and "better" not in str(found) and "differs" in str(found)
    a, b = [1] * 40 + [0] * 2 + [1] * 258, [0] * 40 + [1] * 2 + [1] * 258
    assert compare(told("a", a), told("b", b)).verdict == "better"


def test_conversations_make_intervals_wider_and_p_larger():
    right, groups = np.repeat([1, 0, 1, 1, 0, 1] * 5, 8), np.repeat(np.arange(30), 8).tolist()
    other = np.repeat([0, 1, 1, 0, 0, 0] * 5, 8)
    alone, grouped = (compare(told("a", right, g), told("b", other, g)) for g in (None, groups))
    assert grouped.groups == 30 and alone.groups is None and "in 30 groups" in str(grouped)
    assert grouped.p > alone.p and grouped.detectable > 2 * alone.detectable
    assert grouped.high - grouped.low > 2 * (alone.high - alone.low)
    wide, narrow = (told("a", right, g).metrics["accuracy"] for g in (groups, None))
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low) and wide.method == "wilson, grouped"
    assert told("a", right, groups).metrics["macro_f1"].method == "bootstrap, grouped"
