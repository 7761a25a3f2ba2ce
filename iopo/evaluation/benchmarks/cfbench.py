"""CFBench (PKU-Baichuan-MLSystemLab): Chinese instructions with primary and secondary criteria.

Users supply the file: it has no licence. Exact fractions throughout; the published scorer rounds
each item to two decimals before averaging, and its fallback parser drops failed criteria.
"""

from fractions import Fraction
from pathlib import Path

from iopo.evaluation import items
from iopo.evaluation.items import Item, Measures, Question, Verdict, add

SOURCE = items.Source(
    benchmark="cfbench",
    file="cfbench_data.json",
    origin="https://github.com/PKU-Baichuan-MLSystemLab/CFBench (data)",
    licence="none stated; check that you may use it",
    sha256=None,
)
HEADLINE = ("CSR", "ISR", "PSR")
PRIMARY, SECONDARY = "主需", "次需"
BAR = Fraction(4, 5)


def load(path: str | Path) -> list[Item]:
    """Items; criteria keep their order and are not corrected. Raises ValueError."""
    rows = items.read_rows(path, {"prompt": str, "criteria": list, "split": str})
    return items.make_items(
        path,
        [{"idx": number, **row} for number, row in enumerate(rows)],
        lambda row: Item(str(row["idx"]), items.user_turn(row["prompt"]), row),
        _check_criteria,
    )


def _check_criteria(item: Item) -> None:
    if not item.row["criteria"]:
        raise ValueError("no criteria")
    for criterion in item.row["criteria"]:
        ok = isinstance(criterion, list) and len(criterion) >= 2
        if not ok or criterion[1] not in (PRIMARY, SECONDARY):
            raise ValueError(
                f"criterion {criterion!r}; expected [text, {PRIMARY} or {SECONDARY}, type, type]"
            )


def question(item: Item, response: str) -> Question:
    """All criteria, scored 0 or 1."""
    criteria = tuple(c[0].strip() for c in item.row["criteria"])
    reference = item.row.get("gold") or ""
    return Question(item.id, item.row["prompt"], criteria, response, 1, "lines", reference)


def priority_satisfied(scores: list[float], levels: list[str]) -> bool:
    """PSR of one item: every primary criterion holds, and enough of the secondary ones.

    All primary: enough. Mixed: 1/2 + 1/2 * mean(secondary) > 4/5. None primary: mean > 4/5.
    """
    primary = [s for s, level in zip(scores, levels, strict=True) if level == PRIMARY]
    secondary = [s for s, level in zip(scores, levels, strict=True) if level == SECONDARY]
    if not all(primary):
        return False
    if not secondary:
        return True
    mean = Fraction(int(sum(secondary)), len(secondary))
    return (Fraction(1, 2) + mean / 2 if primary else mean) > BAR


def measures(all_items: list[Item], verdicts: list[Verdict]) -> Measures:
    """CSR, ISR and PSR: all, by split, and the share of criteria met by primary type."""
    table: Measures = {}
    for item, _, scores in items.scored(all_items, verdicts):
        criteria = item.row["criteria"]
        values = {
            "CSR": sum(scores) / len(scores),
            "ISR": float(all(scores)),
            "PSR": float(priority_satisfied(scores, [c[1] for c in criteria])),
        }
        for name, value in values.items():
            add(table, name, item.id, value)
            add(table, f"{name}/{item.row['split']}", item.id, value)
        for criterion, score in zip(criteria, scores, strict=True):
            kind = (criterion[2] if len(criterion) > 2 else "") or "no type"
            add(table, f"type/{kind}", item.id, score)
    return table


BENCHMARK = items.Benchmark(SOURCE, HEADLINE, load, measures, question)
