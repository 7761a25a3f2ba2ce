"""Confidence intervals and paired tests for scores; every result says its number of units.

Nothing here reads files or needs torch. Wilson's interval and McNemar's test need scipy, which is
part of the extra `eval` and is imported when one of them is first computed.

Letters: N values or units (prompts, quads, blocks of text), C clusters, S seeds, R bootstrap
resamples. All intervals are 95% intervals.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import NotRequired, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

LEVEL = 0.95
RESAMPLES = 10_000
FEWEST = 10  # units that have to differ; with fewer a bootstrap is too sure of itself
_DRAWS_AT_ONCE = 4_000_000  # bounds the memory of a bootstrap: 32 MB of indices

Array = NDArray[np.float64]
Units = dict[str, tuple[float, float]]  # unit -> (numerator, denominator) of a metric


class Estimate(TypedDict):
    """A value with its interval; n is the number of independent units behind it.

    differing: of a paired difference, the units whose values differ.
    """

    value: float
    low: float
    high: float
    n: int
    differing: NotRequired[int]


class Difference(Estimate):
    """An estimate of a difference and p, the two-sided probability of one as far from zero if
    there is none: twice the share of resamples on the other side of zero; 1 where fewer than
    FEWEST units differ."""

    p: float


def scipy_stats() -> ModuleType:
    """scipy.stats. Raises ValueError without scipy: call it before work that would be lost."""
    try:
        from scipy import stats
    except ImportError as error:
        raise ValueError(
            f"intervals of shares need scipy ({error}); install it: pip install 'iopo[eval]'"
        ) from error
    return stats


def wilson(successes: int, n: int) -> Estimate:
    """A proportion with Wilson's score interval (1927), without continuity correction.

    Raises ValueError without scipy.
    """
    assert n >= 1 and 0 <= successes <= n, f"{successes} successes of {n}"
    found = scipy_stats().binomtest(successes, n).proportion_ci(LEVEL, method="wilson")
    return {"value": successes / n, "low": float(found.low), "high": float(found.high), "n": n}


def mcnemar_exact(first_N: Array, second_N: Array) -> tuple[int, int, float]:
    """McNemar's exact test on two sets of answers (1 right, 0 wrong) to the same items.

    Returns b pairs right only in the first, c right only in the second, and p: b is
    binomial(b + c, 1/2) if neither is better; p is the two-sided probability, 1 where there are no
    such pairs. Raises ValueError without scipy.
    """
    first_only, second_only = int((first_N > second_N).sum()), int((first_N < second_N).sum())
    discordant = first_only + second_only
    p = scipy_stats().binomtest(first_only, discordant).pvalue if discordant else 1.0
    return first_only, second_only, float(p)


# --- bootstrap over units ------------------------------------------------------------------------


def bootstrap(
    values_N: ArrayLike,
    clusters_N: ArrayLike | None = None,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The mean of values with a percentile bootstrap interval.

    values_N: numbers [N], N >= 1. clusters_N: labels [N] (integers or strings) of values that share
    an item (the instructions of a prompt, the two sides of a quad); clusters are drawn whole, for
    they are independent and their values are not; n is their number. None: all values are
    independent. Raises ValueError on values that are not finite.
    """
    array_N = np.asarray(values_N, dtype=np.float64)
    if not np.isfinite(array_N).all():
        raise ValueError(f"bootstrap: expected finite numbers; found {array_N}")
    sums, sizes = array_N, np.ones_like(array_N)
    if clusters_N is not None:
        _, cluster_N = np.unique(np.asarray(clusters_N), return_inverse=True)
        sums = np.bincount(cluster_N, weights=array_N).astype(np.float64)
        sizes = np.bincount(cluster_N).astype(np.float64)
    means_R = resample(
        len(sums), lambda index: ratios(sums, sizes, index), seed=seed, resamples=resamples
    )
    return interval(float(array_N.mean()), means_R, len(sums))


def ratios(numerator_N: Array, denominator_N: Array, index_RN: NDArray[np.int64]) -> Array:
    """Sum of the numerators over sum of the denominators [R] in resamples of units."""
    with np.errstate(invalid="ignore"):  # 0 / 0, where no drawn unit counts
        return numerator_N[index_RN].sum(1) / denominator_N[index_RN].sum(1)


def resample(
    n: int, statistic: Callable[[NDArray[np.int64]], Array], *, seed: int, resamples: int
) -> Array:
    """The statistic of `resamples` draws of n indices with replacement, in blocks of rows."""
    if resamples < 1:
        raise ValueError(f"bootstrap: resamples={resamples}; expected 1 or more")
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // n)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([statistic(rng.integers(0, n, size=(block, n))) for block in blocks])


def interval(value: float, values_R: Array, n: int) -> Estimate:
    """The value with the percentiles of its resamples, undefined ones (nan) left out."""
    low, high = np.nanquantile(values_R, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return {"value": value, "low": float(low), "high": float(high), "n": n}


# --- methods run with several seeds and scored on the same units ---------------------------------


@dataclass(frozen=True)
class Scores:
    """One metric of one method: numerators and denominators, float64 [S, N].

    seeds: of the rows; a model without seeds (base, SFT) has one row and seeds ().
    """

    seeds: tuple[int, ...]
    units: tuple[str, ...]
    numerator_SN: Array
    denominator_SN: Array

    @property
    def value(self) -> float:
        return float(self.numerator_SN.sum() / self.denominator_SN.sum())

    def of_seeds(self, seeds: list[int]) -> "Scores":
        rows = [self.seeds.index(seed) for seed in seeds]
        return Scores(tuple(seeds), self.units, self.numerator_SN[rows], self.denominator_SN[rows])


def scores(metric: str, runs: dict[int | None, dict[str, Units]]) -> Scores | None:
    """The metric of a method's runs (by seed, None for no seed) that have it, None if none has.

    Raises ValueError if the runs were not scored on the same units.
    """
    having = {seed: run[metric] for seed, run in runs.items() if metric in run}
    if not having:
        return None
    found = list(having.values())
    units = tuple(sorted(found[0]))
    if any(tuple(sorted(run)) != units for run in found):
        raise ValueError(f"{metric}: the seeds of a method were scored on different items")
    columns_SN2 = np.array([[run[unit] for unit in units] for run in found], dtype=np.float64)
    seeds = tuple(seed for seed in having if seed is not None)
    return Scores(seeds, units, columns_SN2[..., 0], columns_SN2[..., 1])


def estimate(a: Scores, *, share: bool = False, resamples: int = RESAMPLES) -> Estimate:
    """The value with an interval from resampling units and, where there are several, seeds.

    n counts the units that have a weight. A share of exactly 0 or 1 has Wilson's interval, for its
    resamples are all alike.
    """
    n = int((a.denominator_SN.sum(0) > 0).sum())
    if share and a.value in (0, 1):
        return wilson(round(a.value * n), n)
    seeds_RS, units_RN = _draws(len(a.numerator_SN), len(a.units), resamples)
    return interval(a.value, _ratios(a, seeds_RS, units_RN), n)


def difference(a: Scores, b: Scores, *, resamples: int = RESAMPLES) -> Difference:
    """b - a, paired by unit and by seed, with an interval from resampling both.

    A resample draws units with replacement and, independently, seeds; a model without seeds is the
    same in every draw. With few seeds their part of the spread is underestimated, by one in S of
    its variance. n counts the units that have a weight in either. Raises ValueError if the units
    differ, or if the methods share no seed.
    """
    if a.units != b.units:
        raise ValueError("the two methods were scored on different items")
    if a.seeds and b.seeds:
        shared = sorted(set(a.seeds) & set(b.seeds))
        if not shared:
            raise ValueError(f"no seed in common: {a.seeds} and {b.seeds}")
        a, b = a.of_seeds(shared), b.of_seeds(shared)
    count = max(len(a.numerator_SN), len(b.numerator_SN))
    seeds_RS, units_RN = _draws(count, len(a.units), resamples)
    differences_R = _ratios(b, seeds_RS, units_RN) - _ratios(a, seeds_RS, units_RN)
    # an undefined resample counts on both sides
    below, above = (~(differences_R > 0)).sum(), (~(differences_R < 0)).sum()
    p = min(1.0, 2 * float(min(below, above) + 1) / (resamples + 1))
    values_N, others_N = (_by_unit(of) for of in (a, b))
    differing = int((~np.isclose(values_N, others_N, rtol=0, equal_nan=True)).sum())
    n = int((~np.isnan(values_N) | ~np.isnan(others_N)).sum())
    found = interval(b.value - a.value, differences_R, n)
    return {**found, "p": p if differing >= FEWEST else 1.0, "differing": differing}


def _by_unit(a: Scores) -> Array:
    """The value of each unit over all seeds [N], nan for one without a weight."""
    with np.errstate(invalid="ignore"):
        return a.numerator_SN.sum(0) / a.denominator_SN.sum(0)


def holm(p_N: Sequence[float]) -> list[float]:
    """Each p corrected for all N comparisons (Holm, 1979): below 0.05 for one where nothing differs
    in at most 5 % of all such tables."""
    corrected, least = dict[int, float](), 0.0
    for place, n in enumerate(sorted(range(len(p_N)), key=lambda n: p_N[n])):
        least = max(least, min(1.0, (len(p_N) - place) * p_N[n]))
        corrected[n] = least
    return [corrected[n] for n in range(len(p_N))]


@lru_cache(maxsize=8)  # drawing takes longer than what is done with the draws
def _draws(seeds: int, units: int, resamples: int) -> tuple[Array, Array]:
    """How often each seed [R, S] and each unit [R, N] is drawn."""
    rng = np.random.default_rng(0)
    seeds_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    units_RN = rng.multinomial(units, np.full(units, 1 / units), resamples)
    return seeds_RS.astype(float), units_RN.astype(float)


def _ratios(a: Scores, seeds_RS: Array, units_RN: Array) -> Array:
    """The value in every resample [R], nan for 0 / 0. A single row stands for all seeds."""
    if len(a.numerator_SN) == 1:
        seeds_RS = np.ones((len(seeds_RS), 1))
    top_R = (units_RN @ a.numerator_SN.T * seeds_RS).sum(1)
    with np.errstate(invalid="ignore"):
        return top_R / (units_RN @ a.denominator_SN.T * seeds_RS).sum(1)


def shown(found: Estimate, factor: float = 100, digits: int = 1, sign: str = "") -> str:
    """`81.3 [76.0, 85.6]`: the value and its interval, times factor. sign: "+" shows it."""
    numbers = (factor * number for number in (found["value"], found["low"], found["high"]))
    value, low, high = (f"{number:{sign}.{digits}f}" for number in numbers)
    return f"{value} [{low}, {high}]"


def word(found: Estimate, better: int) -> str:
    """gain, loss, higher, lower, not shown or too few differ: what may be said.

    better: 1 where more is better, -1 where less is, 0 neither.
    """
    if found["low"] <= 0 <= found["high"]:
        return "not shown"
    if found.get("differing", FEWEST) < FEWEST:
        return "too few differ"
    more = found["low"] > 0
    if better == 0:
        return "higher" if more else "lower"
    return "gain" if more == (better > 0) else "loss"
