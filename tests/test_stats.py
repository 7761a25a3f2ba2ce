"""Intervals and tests against scipy, against values worked out by hand, and as properties."""

import math
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iopo import stats
from iopo.stats import bootstrap, mcnemar_exact, resample, wilson

pytest.importorskip("scipy.stats")


def test_wilson_by_hand():
    # p = 1/2, n = 4, z^2 = 3.841459: centre 1/2; half = z sqrt(1/16 + z^2/64) / (1 + z^2/4)
    z2 = 3.8414588206941285
    half = math.sqrt(z2) * math.sqrt(1 / 16 + z2 / 64) / (1 + z2 / 4)
    result = wilson(2, 4)
    assert result["value"] == 0.5 and result["n"] == 4
    assert result["low"] == pytest.approx(0.5 - half, abs=1e-12)
    assert result["high"] == pytest.approx(0.5 + half, abs=1e-12)


@settings(deadline=None)
@given(st.integers(1, 2000), st.data())
def test_wilson_solves_its_equation(n, data):
    """The bounds are the p with |k/n - p| = z sqrt(p (1 - p) / n)."""
    k = data.draw(st.integers(0, n))
    result = wilson(k, n)
    for bound in (result["low"], result["high"]):
        if 0 < bound < 1:
            width = 1.959963984540054 * math.sqrt(bound * (1 - bound) / n)
            assert abs(k / n - bound) == pytest.approx(width, abs=1e-9)
    assert 0 <= result["low"] <= result["value"] <= result["high"] <= 1


def test_bootstrap_of_a_constant_has_no_width():
    result = bootstrap([0.3] * 7)
    assert [result["value"], result["low"], result["high"]] == pytest.approx([0.3] * 3)
    assert result["n"] == 7


def test_bootstrap_near_the_normal_interval():
    values = np.random.default_rng(3).normal(2.0, 1.0, size=400)
    result = bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(400)
    assert result["value"] == pytest.approx(values.mean())
    assert result["low"] == pytest.approx(values.mean() - half, abs=0.02)
    assert result["high"] == pytest.approx(values.mean() + half, abs=0.02)
    assert result == bootstrap(values) and result != bootstrap(values, seed=1)


def test_bootstrap_in_blocks_equals_one_block(monkeypatch):
    values = np.random.default_rng(0).random(50)
    whole = bootstrap(values, resamples=999)
    monkeypatch.setattr("iopo.stats._DRAWS_AT_ONCE", 700)
    assert bootstrap(values, resamples=999) == whole


def test_bootstrap_equals_every_resample_of_three():
    # 0, 0, 3: the 27 resamples have mean 0 (8/27), 1 (12/27), 2 (6/27), 3 (1/27), so the quartiles
    # of the mean are 0 (8/27 > 1/4) and 2 (20/27 < 3/4)
    values_3 = np.array([0, 0, 3])
    means_R = resample(3, lambda i: values_3[i].mean(1), seed=0, resamples=20_000)
    assert list(np.quantile(means_R, (0.25, 0.75))) == [0.0, 2.0]


def test_cluster_bootstrap_of_singletons_is_the_plain_one():
    values = np.random.default_rng(1).random(60)
    assert bootstrap(values, np.arange(60)) == bootstrap(values)


def test_copies_in_a_cluster_do_not_narrow_the_interval():
    values = np.random.default_rng(1).random(60)
    once = bootstrap(values)
    tenfold = bootstrap(np.repeat(values, 10), np.repeat(np.arange(60), 10))
    assert tenfold["n"] == 60
    assert tenfold["low"] == pytest.approx(once["low"])
    assert tenfold["high"] == pytest.approx(once["high"])


def test_cluster_bootstrap_weighs_values_not_clusters():
    result = bootstrap([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert result["value"] == 0.75 and (result["low"], result["high"]) == (0.0, 1.0)


def test_mcnemar_by_hand():
    # 1 against 5 discordant pairs: p = 2 (C(6,0) + C(6,1)) / 64 = 14/64
    first, second = np.array([1] + [0] * 5 + [1, 0]), np.array([0] + [1] * 5 + [1, 0])
    assert mcnemar_exact(first, second) == (1, 5, pytest.approx(14 / 64))
    assert mcnemar_exact(first, first) == (0, 0, 1.0)


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_sums_the_binomial_tail(b, c):
    first, second = [True] * b + [False] * c + [True], [False] * b + [True] * c + [True]
    _, _, p = mcnemar_exact(np.array(first), np.array(second))
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert p == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


def test_bad_values_and_options_are_refused():
    with pytest.raises(ValueError, match="finite numbers"):
        bootstrap([1.0, float("nan")])
    with pytest.raises(ValueError, match="resamples"):
        bootstrap([1.0], resamples=0)


def test_without_scipy_the_message_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ValueError, match=r"iopo\[eval\]"):
        wilson(1, 2)
    assert bootstrap([1.0, 2.0])["n"] == 2


def test_holm_corrects_for_the_number_of_comparisons():
    """By hand: 0.01 x 4, 0.02 x 3, then never below the one before."""
    assert stats.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert stats.holm([0.6, 0.9]) == [1.0, 1.0]


def test_the_p_of_a_difference_agrees_with_its_interval():
    rng = np.random.default_rng(0)
    for shift in (0.0, 0.05, 0.1, 0.15, 0.3):
        a, b = (
            stats.Scores((), tuple(map(str, range(100))), x[None], np.ones((1, 100)))
            for x in (rng.normal(0, 1, 100), rng.normal(shift * 3, 1, 100))
        )
        found = stats.difference(a, b)
        outside = not found["low"] <= 0 <= found["high"]
        assert outside == (found["p"] < 0.05), found


def of(numerators, denominators=None) -> stats.Scores:
    """One run's scores by unit."""
    numerator_1N = np.array([numerators], dtype=float)
    denominator_1N = np.ones_like(numerator_1N)
    if denominators is not None:
        denominator_1N[:] = denominators
    return stats.Scores((), tuple(map(str, range(len(numerators)))), numerator_1N, denominator_1N)


@pytest.mark.parametrize("differing", [4, 10])
def test_a_difference_of_few_units_is_not_called_a_gain(differing):
    """4 of 150: the bootstrap excludes zero, McNemar's p is 0.125."""
    none, some = of([0] * 150), of([1] * differing + [0] * (150 - differing))
    found = stats.difference(none, some)
    assert found["low"] > 0 and found["differing"] == differing
    few = differing < stats.FEWEST
    assert stats.word(found, 1) == ("too few differ" if few else "gain")
    assert (found["p"] == 1) == few


def test_a_share_of_nothing_is_not_certain():
    found = stats.estimate(of([0] * 9, [1] * 5 + [0] * 4), share=True)
    assert found == wilson(0, 5)
    assert stats.estimate(of([0] * 9))["high"] == 0  # nats, say


def test_an_undefined_resample_is_no_evidence():
    """Of 12 units one alone has a weight in a: in a third of the resamples a is 0 / 0."""
    a, b = of([0] * 12, [1] + [0] * 11), of([1] * 12)
    found = stats.difference(a, b)
    assert found["p"] == pytest.approx(2 * (11 / 12) ** 12, abs=0.03)
    assert (found["n"], found["differing"]) == (12, 12)
