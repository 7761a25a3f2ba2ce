"""From measures to scores: a value and a 95% interval for each, alone or as a paired difference.

Letters: U units (items, or groups of items), R bootstrap resamples.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iopo import stats as statistics
from iopo.evaluation.items import Measures

LEVEL = 0.95
_DRAWS_AT_ONCE = 4_000_000  # bounds the memory of a bootstrap: 32 MB of indices


def summarise(table: Measures, *, resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """{metric: {"value", "low", "high", "n", "method"}}, n the number of units.

    Shares of equally weighed units get Wilson's interval, and so does any share of exactly 0 or 1;
    everything else a bootstrap over units, so that the constraints of one item stay together.
    """
    return {
        metric: _estimate(_columns(units), resamples=resamples, seed=seed)
        for metric, units in table.items()
    }


def with_bounds(
    scores: dict[str, dict[str, Any]], lowest: Measures, highest: Measures
) -> dict[str, dict[str, Any]]:
    """Add "bounds": the value if every unparsed verdict were the worst, and the best, possible.

    lowest, highest: the measures with those verdicts filled in. A metric with unparsed verdicts
    only gets a value of None.
    """
    out = {}
    for metric in {**lowest, **scores}:
        entry = dict(scores.get(metric, {"value": None, "low": None, "high": None, "n": 0}))
        sides = [_ratio(_columns(table[metric])) for table in (lowest, highest) if metric in table]
        if sides:
            entry["bounds"] = [min(sides), max(sides)]
        out[metric] = entry
    return out


def to_rows(table: Measures) -> list[dict[str, Any]]:
    """The measures as rows for measures.jsonl."""
    return [
        {"metric": metric, "unit": unit, "numerator": num, "denominator": den}
        for metric, units in table.items()
        for unit, (num, den) in units.items()
    ]


def from_rows(rows: list[dict[str, Any]]) -> Measures:
    """The inverse of `to_rows`."""
    table: Measures = {}
    for row in rows:
        units = table.setdefault(row["metric"], {})
        units[row["unit"]] = (row["numerator"], row["denominator"])
    return table


@dataclass(frozen=True, slots=True)
class Difference:
    """B minus A on the units that both have. McNemar's test only for yes-or-no units."""

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    units: int
    only_a: int | None  # units right in A only
    only_b: int | None
    p: float | None


def compare(metric: str, a: Measures, b: Measures, *, resamples: int, seed: int) -> Difference:
    """The paired difference of a metric. Raises ValueError if A and B share no unit."""
    shared = [unit for unit in a[metric] if unit in b[metric]]
    if not shared:
        raise ValueError(f"{metric}: A and B have no item in common")
    a_U2 = _columns({unit: a[metric][unit] for unit in shared})
    b_U2 = _columns({unit: b[metric][unit] for unit in shared})

    def difference(index: NDArray[np.int64]) -> NDArray[np.float64]:
        return _resampled_ratio(b_U2, index) - _resampled_ratio(a_U2, index)

    values_R = _resample(len(shared), difference, resamples=resamples, seed=seed)
    low, high = _interval(values_R)
    only_a = only_b = p = None
    if _is_share(a_U2) and _is_share(b_U2):
        test = statistics.mcnemar_exact(a_U2[:, 0] / a_U2[:, 1], b_U2[:, 0] / b_U2[:, 1])
        only_a, only_b, p = test["first_only"], test["second_only"], test["p"]
    value_a, value_b = _ratio(a_U2), _ratio(b_U2)
    return Difference(
        metric, value_a, value_b, value_b - value_a, low, high, len(shared), only_a, only_b, p
    )


def _columns(units: dict[str, tuple[float, float]]) -> NDArray[np.float64]:
    """Numerators and denominators, float64 [U, 2]."""
    return np.array(list(units.values()), dtype=np.float64)


def _is_share(units_U2: NDArray[np.float64]) -> bool:
    """Whether all units weigh the same and each is right or wrong."""
    weight_U = units_U2[:, 1]
    same = np.allclose(weight_U, weight_U[0])
    return bool(same and np.isin(units_U2[:, 0] / weight_U, (0.0, 1.0)).all())


def _ratio(units_U2: NDArray[np.float64]) -> float:
    sums_2 = units_U2.sum(0)
    return float(sums_2[0] / sums_2[1])


def _estimate(units_U2: NDArray[np.float64], *, resamples: int, seed: int) -> dict[str, Any]:
    count = len(units_U2)
    if _is_share(units_U2):
        right = int(round(float((units_U2[:, 0] / units_U2[:, 1]).sum())))
        return {**statistics.wilson(right, count, level=LEVEL), "method": "wilson"}
    value = _ratio(units_U2)
    if value in (0.0, 1.0) and (units_U2[:, 0] <= units_U2[:, 1]).all():
        # Every resample is the same: a bootstrap would claim certainty.
        return {**statistics.wilson(round(value) * count, count, level=LEVEL), "method": "wilson"}
    values_R = _resample(
        count, lambda index: _resampled_ratio(units_U2, index), resamples=resamples, seed=seed
    )
    low, high = _interval(values_R)
    return {"value": value, "low": low, "high": high, "n": count, "method": "bootstrap"}


def _resampled_ratio(
    units_U2: NDArray[np.float64], index_RU: NDArray[np.int64]
) -> NDArray[np.float64]:
    return units_U2[index_RU, 0].sum(1) / units_U2[index_RU, 1].sum(1)


def _resample(count: int, statistic: Any, *, resamples: int, seed: int) -> NDArray[np.float64]:
    """The statistic of `resamples` draws of units with replacement, in blocks."""
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // count)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    return np.concatenate([statistic(rng.integers(0, count, (block, count))) for block in blocks])


def _interval(values_R: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values_R, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)
