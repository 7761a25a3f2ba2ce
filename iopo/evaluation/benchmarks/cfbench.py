"""CFBench (PKU-Baichuan-MLSystemLab): Chinese instructions with primary and secondary criteria.

Users supply the file: it has no licence. Exact fractions throughout; the published scorer rounds
each item to two decimals before averaging, and its fallback parser drops failed criteria.
"""

from fractions import Fraction
from pathlib import Path

from iopo.evaluation.items import (
    Benchmark,
    Item,
    Measures,
    Question,
    Source,
    Verdict,
    add,
    read_rows,
    require_unique,
    user_turn,
)

SOURCE = Source(
    benchmark="cfbench",
    file="cfbench_data.json",
    origin="https://github.com/PKU-Baichuan-MLSystemLab/CFBench (data)",
    licence="none stated; check that you may use it",
    sha256=None,
)
HEADLINE = ("CSR", "ISR", "PSR")
PRIMARY, SECONDARY = "主需", "次需"
BAR = Fraction(4, 5)


def load(path: Path) -> list[Item]:
    """Items; criteria keep their order and are not corrected. Raises ValueError."""
    rows = read_rows(path, {"prompt": str, "criteria": list, "split": str})
    items = []
    for number, row in enumerate(rows):
        for criterion in row["criteria"]:
            ok = isinstance(criterion, list) and len(criterion) >= 2
            if not ok or criterion[1] not in (PRIMARY, SECONDARY):
                raise ValueError(
                    f"{path}: row {number + 1}: criterion {criterion!r}; expected "
                    f"[text, {PRIMARY} or {SECONDARY}, type, type]"
                )
        if not row["criteria"]:
            raise ValueError(f"{path}: row {number + 1}: no criteria")
        items.append(Item(str(row.get("idx", number)), user_turn(row["prompt"]), row))
    return require_unique(path, items)


def questions(item: Item, response: str) -> list[Question]:
    """One question with all criteria, scored 0 or 1."""
    return [
        Question(
            id=item.id,
            task=item.row["prompt"],
            criteria=tuple(c[0].strip() for c in item.row["criteria"]),
            response=response,
            maximum=1,
            format="lines",
            reference=item.row.get("gold") or "",
        )
    ]


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


def measures(items: list[Item], verdicts: list[Verdict]) -> Measures:
    """CSR, ISR and PSR: all, by split, and the share of criteria met by primary type."""
    table: Measures = {}
    for item, verdict in zip(items, verdicts, strict=True):
        scores = verdict["scores"]
        if scores is None:
            continue
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


BENCHMARK = Benchmark(SOURCE, HEADLINE, load, measures, questions)
