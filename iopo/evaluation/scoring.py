"""From measures to scores: a value and a 95% interval for each, alone or as a paired difference.

Letters: U units (items, or groups of items), C clusters of units, which are drawn whole (a
benchmark's `cluster`), R bootstrap resamples.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iopo import stats
from iopo.evaluation.items import Measures
from iopo.stats import Units

Cluster = Callable[[str], str]  # unit -> its cluster


def summarise(
    table: Measures, *, resamples: int, seed: int, cluster: Cluster = str
) -> dict[str, dict[str, Any]]:
    """{metric: {"value", "low", "high", "n", "method"}}, n the number of clusters with a weight.

    Shares of equally weighed clusters get Wilson's interval, and so does any share of exactly 0 or
    1; everything else a bootstrap over clusters, so that what depends on each other stays together.
    """
    return {
        metric: _estimate(_sums(_columns(units), units, cluster), resamples=resamples, seed=seed)
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


def outputs(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The output folder itself, or those in it, each with its scores.json, by benchmark.

    Raises ValueError without any, or with two of one benchmark.
    """
    files = [folder / "scores.json"] if (folder / "scores.json").is_file() else []
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    for file in files or sorted(folder.glob("**/scores.json")):
        if not (file.parent / "measures.jsonl").is_file():  # of quads or judge_check
            continue
        scores = json.loads(file.read_text(encoding="utf-8"))
        name = scores["benchmark"]
        if name in found:
            raise ValueError(
                f"{folder}: both {found[name][0]} and {file.parent} hold {name}; name one"
            )
        found[name] = (file.parent, scores)
    if not found:
        raise ValueError(
            f"{folder}: no scores.json with a measures.jsonl beside it; expected an output folder "
            "of evaluate.py (quads have theirs, and are compared by the comparison's table)"
        )
    return found


@dataclass(frozen=True, slots=True)
class Difference:
    """B minus A on the units that both have. McNemar's test only for yes-or-no units."""

    metric: str
    a: float
    b: float
    difference: float
    low: float
    high: float
    units: int  # independent ones
    differing: int  # of which A and B are not alike
    only_a: int | None  # units right in A only
    only_b: int | None
    p: float | None

    def estimate(self) -> stats.Estimate:
        """The difference, for `stats.word` and `stats.shown`."""
        return {
            "value": self.difference, "low": self.low, "high": self.high,
            "n": self.units, "differing": self.differing,
        }  # fmt: skip


def compare(
    metric: str, a: Measures, b: Measures, *, resamples: int, seed: int, cluster: Cluster = str
) -> Difference:
    """The paired difference of a metric. Raises ValueError if A and B share no unit."""
    shared = [unit for unit in a[metric] if unit in b[metric]]
    if not shared:
        raise ValueError(f"{metric}: A and B have no item in common")
    a_U2, b_U2 = (_columns({unit: of[metric][unit] for unit in shared}) for of in (a, b))
    # A unit weighs alike in both, or what one of them lacks elsewhere would be a difference. The
    # larger weight is that of the smaller set, so that of the shared units if one holds the other.
    both_U = (a_U2[:, 1] > 0) & (b_U2[:, 1] > 0)
    weight_U = np.maximum(a_U2[:, 1], b_U2[:, 1])
    for of_U2 in (a_U2, b_U2):
        of_U2[both_U] *= (weight_U[both_U] / of_U2[both_U, 1])[:, None]
    a_C2, b_C2 = (_sums(of_U2, shared, cluster) for of_U2 in (a_U2, b_U2))
    values_R = stats.resample(
        len(a_C2),
        lambda index: _ratios(b_C2, index) - _ratios(a_C2, index),
        seed=seed,
        resamples=resamples,
    )
    value_a, value_b = _ratio(a_C2), _ratio(b_C2)
    found = stats.interval(value_b - value_a, values_R, len(a_C2))
    only_a = only_b = p = None
    if _is_share(a_C2) and _is_share(b_C2):
        rights = (of_C2[:, 0] / of_C2[:, 1] for of_C2 in (a_C2, b_C2))
        only_a, only_b, p = stats.mcnemar_exact(*rights)
    differing = int((~np.isclose(a_C2, b_C2)).any(1).sum())
    return Difference(
        metric, value_a, value_b, found["value"], found["low"], found["high"], len(a_C2),
        differing, only_a, only_b, p,
    )  # fmt: skip


def _columns(units: Units) -> stats.Array:
    """Numerators and denominators, float64 [U, 2]."""
    return np.array(list(units.values()), dtype=np.float64)


def _sums(of_U2: stats.Array, units: Iterable[str], cluster: Cluster) -> stats.Array:
    """Sums over the units of each cluster, [C, 2], in the order in which clusters appear."""
    places: dict[str, int] = {}
    place_U = [places.setdefault(cluster(unit), len(places)) for unit in units]
    sums_C2 = np.zeros((len(places), 2))
    np.add.at(sums_C2, place_U, of_U2)
    return sums_C2


def _is_share(units_U2: stats.Array) -> bool:
    """Whether all units weigh the same and each is right or wrong."""
    weight_U = units_U2[:, 1]
    same = np.allclose(weight_U, weight_U[0])
    return bool(same and np.isin(units_U2[:, 0] / weight_U, (0.0, 1.0)).all())


def _ratio(units_U2: stats.Array) -> float:
    sums_2 = units_U2.sum(0)
    return float(sums_2[0] / sums_2[1])


def _ratios(units_U2: stats.Array, index_RU: NDArray[np.int64]) -> stats.Array:
    return stats.ratios(units_U2[:, 0], units_U2[:, 1], index_RU)


def _estimate(units_U2: stats.Array, *, resamples: int, seed: int) -> dict[str, Any]:
    units_U2 = units_U2[units_U2[:, 1] > 0]  # a unit without weight says nothing about the ratio
    count = len(units_U2)
    if _is_share(units_U2):
        right = int(round(float((units_U2[:, 0] / units_U2[:, 1]).sum())))
        return {**stats.wilson(right, count), "method": "wilson"}
    value = _ratio(units_U2)
    if value in (0.0, 1.0) and (units_U2[:, 0] <= units_U2[:, 1]).all():
        # Every resample is the same: a bootstrap would claim certainty.
        return {**stats.wilson(round(value) * count, count), "method": "wilson"}
    values_R = stats.resample(
        count, lambda index: _ratios(units_U2, index), seed=seed, resamples=resamples
    )
    return {**stats.interval(value, values_R, count), "method": "bootstrap"}
