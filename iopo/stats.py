"""Confidence intervals and paired tests for scores. numpy only; every result says its n.

Legend: N values (items), R bootstrap resamples, C clusters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
_DRAWS_AT_ONCE = 4_000_000  # bounds the memory of a bootstrap: 32 MB of indices


class Estimate(TypedDict):
    """A value with its interval; n is the number of independent units behind it."""

    value: float
    low: float
    high: float
    n: int


class McNemar(TypedDict):
    """Discordant pairs and the two-sided exact p-value that both sides are equally likely."""

    first_only: int
    second_only: int
    p: float
    n: int


def wilson(successes: int, n: int, *, level: float = 0.95) -> Estimate:
    """A proportion with Wilson's score interval (1927), without continuity correction.

    centre = (p + z^2/2n) / (1 + z^2/n); half width = z sqrt(p(1-p)/n + z^2/4n^2) / (1 + z^2/n).
    Raises ValueError unless 0 <= successes <= n, n >= 1 and 0 < level < 1.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"wilson: {successes} successes of {n}; expected 0 <= successes <= n and n >= 1"
        )
    z = NormalDist().inv_cdf(0.5 + _checked(level) / 2)
    p = successes / n
    shrink = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    # at 0 and n the bound is 0 or 1 exactly, rounding aside
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return {"value": p, "low": low, "high": high, "n": n}


def bootstrap(
    values_N: ArrayLike, *, seed: int = 0, resamples: int = RESAMPLES, level: float = 0.95
) -> Estimate:
    """The mean of independent values with a percentile bootstrap interval.

    values_N: finite numbers [N], N >= 1. Raises ValueError on anything else.
    """
    array_N = _values("bootstrap", values_N)
    means_R = _resampled(len(array_N), seed, resamples, lambda index: array_N[index].mean(axis=1))
    return _percentiles(float(array_N.mean()), means_R, len(array_N), level)


def paired_bootstrap(
    before_N: ArrayLike,
    after_N: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """The mean of after - before on the same items, with a percentile bootstrap interval.

    Raises ValueError on unequal lengths, and as `bootstrap` does.
    """
    first_N, second_N = _pair("paired_bootstrap", before_N, after_N)
    return bootstrap(second_N - first_N, seed=seed, resamples=resamples, level=level)


def cluster_bootstrap(
    values_N: ArrayLike,
    clusters_N: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Estimate:
    """The mean over all values, with an interval from resampling whole clusters.

    For values that share an item (the instructions of a prompt, the two sides of a quad, seeds):
    they are not independent, the items are. A resample's mean is its sum over its number of values.

    values_N: finite numbers [N]. clusters_N: any labels [N] (integers or strings).
    Returns n = number of clusters. Raises ValueError on unequal lengths, and as `bootstrap` does.
    """
    array_N = _values("cluster_bootstrap", values_N)
    labels_N = np.asarray(clusters_N)
    if labels_N.shape != array_N.shape:
        raise ValueError(
            f"cluster_bootstrap: {array_N.shape} values but {labels_N.shape} cluster labels; "
            "expected one label for each value"
        )
    _, cluster_N = np.unique(labels_N, return_inverse=True)
    sums_C = np.bincount(cluster_N, weights=array_N)
    sizes_C = np.bincount(cluster_N)
    means_R = _resampled(
        len(sums_C),
        seed,
        resamples,
        lambda index: sums_C[index].sum(axis=1) / sizes_C[index].sum(axis=1),
    )
    return _percentiles(float(array_N.mean()), means_R, len(sums_C), level)


def mcnemar_exact(first_N: ArrayLike, second_N: ArrayLike) -> McNemar:
    """McNemar's exact test on two sets of right/wrong answers to the same items.

    With b pairs right only in the first and c right only in the second, b is binomial(b + c, 1/2)
    if neither is better; p is the two-sided probability, 1 where there are no such pairs.
    Raises ValueError on unequal lengths or values other than 0 and 1.
    """
    before_N, after_N = _pair("mcnemar_exact", first_N, second_N)
    if not np.isin(before_N, (0, 1)).all() or not np.isin(after_N, (0, 1)).all():
        raise ValueError("mcnemar_exact: expected values 0 and 1 (or booleans) only")
    first_only = int(((before_N == 1) & (after_N == 0)).sum())
    second_only = int(((before_N == 0) & (after_N == 1)).sum())
    return {
        "first_only": first_only,
        "second_only": second_only,
        "p": _two_sided_half(min(first_only, second_only), first_only + second_only),
        "n": len(before_N),
    }


def _two_sided_half(k: int, n: int) -> float:
    """min(1, 2 P(X <= k)) for X binomial(n, 1/2), summed from the largest term down."""
    if n == 0:
        return 1.0
    log_half = -n * math.log(2)
    term = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) + log_half
    ratios = np.arange(k, 0, -1) / (n - np.arange(k - 1, -1, -1))  # C(n, i-1) / C(n, i)
    return min(1.0, 2 * math.exp(term) * (1 + float(np.cumprod(ratios).sum())))


def _resampled(
    n: int,
    seed: int,
    resamples: int,
    statistic: Callable[[NDArray[np.int64]], NDArray[np.float64]],
) -> NDArray[np.float64]:
    """The statistic of `resamples` draws of n indices with replacement, in blocks of rows."""
    if resamples < 1:
        raise ValueError(f"bootstrap: resamples={resamples}; expected 1 or more")
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // n)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([statistic(rng.integers(0, n, size=(block, n))) for block in blocks])


def _percentiles(value: float, means_R: NDArray[np.float64], n: int, level: float) -> Estimate:
    tail = (1 - _checked(level)) / 2
    low, high = np.quantile(means_R, (tail, 1 - tail))
    return {"value": value, "low": float(low), "high": float(high), "n": n}


def _checked(level: float) -> float:
    if not 0 < level < 1:
        raise ValueError(f"level={level}; expected a level between 0 and 1, such as 0.95")
    return level


def _values(where: str, values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(
            f"{where}: expected a list of one or more finite numbers; found shape {array.shape}"
            + ("" if np.isfinite(array).all() else " with values that are not finite")
        )
    return array


def _pair(
    where: str, first: ArrayLike, second: ArrayLike
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first_N, second_N = _values(where, first), _values(where, second)
    if first_N.shape != second_N.shape:
        raise ValueError(
            f"{where}: {len(first_N)} values against {len(second_N)}; expected the same items, "
            "in the same order"
        )
    return first_N, second_N
