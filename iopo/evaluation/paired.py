"""Differences between methods that were run with several seeds and scored on the same units.

Letters: S seeds, U units (prompts, quads, blocks of text), R bootstrap resamples.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from iopo.evaluation.items import Measures
from iopo.stats import Estimate

LEVEL = 0.95
RESAMPLES = 10_000


@dataclass(frozen=True)
class Scores:
    """One metric of one method: numerators and denominators, float64 [S, U].

    seeds: of the rows; a model without seeds (base, SFT) has one row and seeds ().
    """

    seeds: tuple[int, ...]
    units: tuple[str, ...]
    numerator_SU: NDArray[np.float64]
    denominator_SU: NDArray[np.float64]

    @property
    def value(self) -> float:
        return float(self.numerator_SU.sum() / self.denominator_SU.sum())


def scores(metric: str, runs: dict[int | None, Measures]) -> Scores | None:
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
    columns_SU2 = np.array([[run[unit] for unit in units] for run in found], dtype=np.float64)
    seeds = tuple(seed for seed in having if seed is not None)
    return Scores(seeds, units, columns_SU2[..., 0], columns_SU2[..., 1])


def estimate(a: Scores, *, resamples: int = RESAMPLES) -> Estimate:
    """The value with a 95% interval from resampling units and, where there are several, seeds."""
    seeds_RS, units_RU = _draws(len(a.numerator_SU), len(a.units), resamples)
    return _interval(a.value, _ratios(a, seeds_RS, units_RU), len(a.units))


def difference(a: Scores, b: Scores, *, resamples: int = RESAMPLES) -> Estimate:
    """b - a, paired by unit and by seed, with a 95% interval from resampling both.

    A resample draws units with replacement and, independently, seeds; a model without seeds is the
    same in every draw. With few seeds their part of the spread is underestimated, by one in S of
    its variance. Raises ValueError if the units differ, or if the methods share no seed.
    """
    if a.units != b.units:
        raise ValueError("the two methods were scored on different items")
    shared = sorted(set(a.seeds) & set(b.seeds))
    if a.seeds and b.seeds:
        if not shared:
            raise ValueError(f"no seed in common: {a.seeds} and {b.seeds}")
        a, b = _of_seeds(a, shared), _of_seeds(b, shared)
    count = max(len(a.numerator_SU), len(b.numerator_SU))
    seeds_RS, units_RU = _draws(count, len(a.units), resamples)
    differences_R = _ratios(b, seeds_RS, units_RU) - _ratios(a, seeds_RS, units_RU)
    return _interval(b.value - a.value, differences_R, len(a.units))


def word(found: Estimate, better: int) -> str:
    """What the interval allows one to say. better: 1 where more is better, -1 worse, 0 neither.

    >>> word({"value": 0.1, "low": 0.01, "high": 0.2, "n": 9}, 1)
    'gain'
    >>> word({"value": 0.1, "low": -0.01, "high": 0.2, "n": 9}, 1)
    'not shown'
    """
    if found["low"] <= 0 <= found["high"]:
        return "not shown"
    more = found["low"] > 0
    if better == 0:
        return "higher" if more else "lower"
    return "gain" if more == (better > 0) else "loss"


def _of_seeds(a: Scores, seeds: list[int]) -> Scores:
    rows = [a.seeds.index(seed) for seed in seeds]
    return Scores(tuple(seeds), a.units, a.numerator_SU[rows], a.denominator_SU[rows])


@lru_cache(maxsize=8)  # drawing takes longer than what is done with the draws
def _draws(
    seeds: int, units: int, resamples: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often each seed [R, S] and each unit [R, U] is drawn."""
    rng = np.random.default_rng(0)
    seeds_RS = rng.multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    units_RU = rng.multinomial(units, np.full(units, 1 / units), resamples)
    return seeds_RS.astype(float), units_RU.astype(float)


def _ratios(
    a: Scores, seeds_RS: NDArray[np.float64], units_RU: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The value in every resample [R]. A single row stands for all seeds."""
    if len(a.numerator_SU) == 1:
        seeds_RS = np.ones((len(seeds_RS), 1))
    top_R = (units_RU @ a.numerator_SU.T * seeds_RS).sum(1)
    return top_R / (units_RU @ a.denominator_SU.T * seeds_RS).sum(1)


def _interval(value: float, values_R: NDArray[np.float64], units: int) -> Estimate:
    low, high = np.quantile(values_R, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return {"value": value, "low": float(low), "high": float(high), "n": units}
