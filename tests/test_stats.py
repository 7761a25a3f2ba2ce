"""Intervals and tests against scipy, against values worked out by hand, and as properties."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iopo.stats import bootstrap, cluster_bootstrap, mcnemar_exact, paired_bootstrap, wilson

scipy_stats = pytest.importorskip("scipy.stats")


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
def test_wilson_equals_scipy(n, data):
    k = data.draw(st.integers(0, n))
    expected = scipy_stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    result = wilson(k, n)
    assert result["low"] == pytest.approx(expected.low, abs=1e-9)
    assert result["high"] == pytest.approx(expected.high, abs=1e-9)
    assert 0 <= result["low"] <= result["value"] <= result["high"] <= 1


@pytest.mark.parametrize("k, n", [(1, 0), (-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(k, n):
    with pytest.raises(ValueError, match="successes"):
        wilson(k, n)


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
    result = bootstrap([0, 0, 3], level=0.5, resamples=20_000)
    assert (result["low"], result["high"]) == (0.0, 2.0)


def test_paired_bootstrap_keeps_the_pairs():
    before = np.arange(100.0)
    result = paired_bootstrap(before, before + 1)
    assert result == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 100}
    with pytest.raises(ValueError, match="same items"):
        paired_bootstrap([1, 2], [1])


def test_cluster_bootstrap_of_singletons_is_the_plain_one():
    values = np.random.default_rng(1).random(60)
    assert cluster_bootstrap(values, np.arange(60)) == bootstrap(values)


def test_copies_in_a_cluster_do_not_narrow_the_interval():
    values = np.random.default_rng(1).random(60)
    once = bootstrap(values)
    tenfold = cluster_bootstrap(np.repeat(values, 10), np.repeat(np.arange(60), 10))
    assert tenfold["n"] == 60
    assert tenfold["low"] == pytest.approx(once["low"])
    assert tenfold["high"] == pytest.approx(once["high"])


def test_cluster_bootstrap_weighs_values_not_clusters():
    result = cluster_bootstrap([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert result["value"] == 0.75 and (result["low"], result["high"]) == (0.0, 1.0)
    with pytest.raises(ValueError, match="one label"):
        cluster_bootstrap([1, 2], ["a"])


def test_mcnemar_by_hand():
    # 1 against 5 discordant pairs: p = 2 (C(6,0) + C(6,1)) / 64 = 14/64
    first = [1] + [0] * 5 + [1, 0]
    second = [0] + [1] * 5 + [1, 0]
    result = mcnemar_exact(first, second)
    assert result["p"] == pytest.approx(14 / 64)
    assert (result["first_only"], result["second_only"], result["n"]) == (1, 5, 8)
    assert mcnemar_exact([1, 0], [1, 0])["p"] == 1.0


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_equals_the_binomial_test(b, c):
    first = [True] * b + [False] * c
    second = [False] * b + [True] * c
    if b + c == 0:
        return
    expected = scipy_stats.binomtest(b, b + c, 0.5).pvalue
    assert mcnemar_exact(first, second)["p"] == pytest.approx(expected, rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("bad", [[], [[1.0]], [float("nan")]])
def test_bad_values_are_refused(bad):
    with pytest.raises(ValueError, match="finite numbers"):
        bootstrap(bad)


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="level"):
        bootstrap([1.0], level=95)
    with pytest.raises(ValueError, match="resamples"):
        bootstrap([1.0], resamples=0)
    with pytest.raises(ValueError, match="0 and 1"):
        mcnemar_exact([2], [1])
