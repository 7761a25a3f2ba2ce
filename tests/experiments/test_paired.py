"""Paired differences over items and seeds, against values worked out by hand."""

import numpy as np
import pytest

from iopo import stats


def of(rows, seeds=None):
    """Scores from values [S, U] with denominators of 1."""
    tables = {
        seed: {"m": {f"u{i}": (float(v), 1.0) for i, v in enumerate(row)}}
        for seed, row in zip(seeds or (None,), rows, strict=True)
    }
    return stats.scores("m", tables)


def test_a_ratio_weighs_items_by_their_denominators():
    table = {"m": {"a": (1.0, 4.0), "b": (2.0, 2.0)}}
    assert stats.scores("m", {None: table}).value == pytest.approx(3 / 6)


def test_a_constant_difference_has_no_interval_whatever_the_spread():
    values = np.random.default_rng(0).random((3, 50))
    found = stats.difference(of(values, (1, 2, 3)), of(values + 0.25, (1, 2, 3)))
    assert (found["low"], found["value"], found["high"]) == pytest.approx((0.25,) * 3)


def test_seeds_are_paired_by_number_and_others_left_out():
    a = of([[0, 0], [1, 1], [9, 9]], (1, 2, 3))
    b = of([[2, 2], [1, 1]], (2, 1))
    found = stats.difference(a, b)
    assert (found["low"], found["value"], found["high"]) == (1, 1, 1)
    with pytest.raises(ValueError, match="no seed in common"):
        stats.difference(of([[0, 0]], (1,)), of([[0, 0]], (2,)))


def test_a_model_without_seeds_is_the_same_in_every_draw():
    sft, method = of([[0.5, 0.5]]), of([[0, 0], [1, 1]], (1, 2))
    found = stats.difference(sft, method)
    # two seeds: both the first in a quarter of draws, both the second in another
    assert (found["low"], found["value"], found["high"]) == (-0.5, 0, 0.5)


def test_the_interval_of_items_is_that_of_their_mean():
    difference = np.random.default_rng(1).normal(0.1, 1.0, 400)
    found = stats.difference(of([np.zeros(400)]), of([difference]))
    half = 1.96 * difference.std() / 20
    assert found["value"] == pytest.approx(difference.mean())
    assert found["high"] - found["value"] == pytest.approx(half, rel=0.06)
    assert found["value"] - found["low"] == pytest.approx(half, rel=0.06)


def test_resampling_by_counts_equals_resampling_by_index():
    """The fast form (matrix products of counts) against the definition, draw by draw."""
    rng = np.random.default_rng(2)
    a = stats.Scores((1, 2), ("u", "v", "w"), rng.random((2, 3)), rng.random((2, 3)) + 1)
    seeds_RS, units_RU = stats._draws(2, 3, 20)
    fast = stats._ratios(a, seeds_RS, units_RU)
    for r in range(20):
        seeds = np.repeat([0, 1], seeds_RS[r].astype(int))
        units = np.repeat([0, 1, 2], units_RU[r].astype(int))
        cells = np.ix_(seeds, units)
        assert fast[r] == pytest.approx(a.numerator_SN[cells].sum() / a.denominator_SN[cells].sum())


def test_other_items_and_missing_metrics():
    one, other = {"m": {"a": (1.0, 1.0)}}, {"m": {"b": (1.0, 1.0)}}
    with pytest.raises(ValueError, match="different items"):
        stats.scores("m", {1: one, 2: other})
    with pytest.raises(ValueError, match="different items"):
        stats.difference(stats.scores("m", {1: one}), stats.scores("m", {1: other}))
    assert stats.scores("m", {1: {}, 2: one}).seeds == (2,)
    assert stats.scores("m", {1: {}, 2: {}}) is None
    assert stats.scores("m", {}) is None


@pytest.mark.parametrize(
    ("low", "high", "better", "expected"),
    [
        (0.01, 0.2, 1, "gain"), (0.01, 0.2, -1, "loss"), (0.01, 0.2, 0, "higher"),
        (-0.2, -0.01, 1, "loss"), (-0.2, -0.01, -1, "gain"), (-0.2, -0.01, 0, "lower"),
        (0.0, 0.2, 1, "not shown"), (-0.2, 0.0, 1, "not shown"), (-0.1, 0.1, 0, "not shown"),
    ],
)  # fmt: skip
def test_a_difference_is_a_gain_only_if_its_interval_excludes_zero(low, high, better, expected):
    assert stats.word({"value": (low + high) / 2, "low": low, "high": high, "n": 9}, better) == (
        expected
    )
