"""TRACE (arXiv 2411.06208): 1,042 instructions with 1 to 15 constraints, scored by a judge.

An instruction is followed only if every constraint gets 10 of 10 (Eq. 3). IF-S is the share over
the instructions with one constraint, IF-M over those with more.
"""

from pathlib import Path

from iopo.evaluation import items
from iopo.evaluation.items import Item, Measures, Question, Verdict, add
from iopo.files import given_records

SOURCE = items.Source(
    benchmark="trace",
    file="202409_trace_evaluation.jsonl",
    origin="https://github.com/Tongyi-CCAI/Complex-IF (TRACE/TRACE)",
    licence="MIT",
    sha256="ca9e7577ee0732021db49ba7cb6ad3632eadb8398b1129fe54d104ded41b78f4",
)
MAXIMUM = 10
LOWER_BAR = 8  # "exactly 10" depends much on the judge; shown beside it
HEADLINE = ("IF-S", "IF-M", "IF", "mean_score")

# Paper, table 6, a row a dimension. A tag that is not here is counted as "Other", never dropped.
TAXONOMY = Path(__file__).with_name("trace_taxonomy.json")
_DIMENSIONS = given_records(TAXONOMY)
TYPE_OF = {row["tag"]: row["type"] for _, row in _DIMENSIONS}
ENGLISH = {row["tag"]: row["dimension"] for _, row in _DIMENSIONS}


def load(path: str | Path) -> list[Item]:
    """Items with the conversation as published (system and user turn). Raises ValueError."""
    fields = {
        "id": str, "messages": list, "description": str, "constraints": str, "input": str,
        "constraints_splits": list, "levels2": list,
    }  # fmt: skip
    return items.make_items(
        path,
        items.read_rows(path, fields),
        lambda row: Item(row["id"], tuple(row["messages"]), row),
        _require_tags,
    )


def _require_tags(item: Item) -> None:
    constraints, tags = len(item.row["constraints_splits"]), len(item.row["levels2"])
    if not constraints or constraints != tags:
        raise ValueError(
            f"{constraints} constraints and {tags} tags; expected as many tags as constraints, at "
            "least one"
        )


def question(item: Item, response: str) -> Question:
    """All constraints; description and input are both the task."""
    row = item.row
    given = "" if row["input"].strip() == "NULL" else f"\n{row['input']}"
    criteria = tuple(row["constraints_splits"])
    return Question(item.id, row["description"] + given, criteria, response, MAXIMUM, "trace")


def measures(all_items: list[Item], verdicts: list[Verdict]) -> Measures:
    """Shares of followed instructions and constraints; verdicts without scores are left out."""
    table: Measures = {}
    for item, verdict, scores in items.scored(all_items, verdicts):
        count = len(scores)
        met = [score == MAXIMUM for score in scores]
        mean = sum(scores) / count
        text = item.row["description"] + item.row["constraints"]
        language = "zh" if any("一" <= character <= "鿿" for character in text) else "other"
        for name in (
            "IF",
            "IF-S" if count == 1 else "IF-M",
            f"constraints/{count if count < 10 else '10+'}",
            f"category/{item.row.get('category', 'none')}",
            f"language/{language}",
        ):
            add(table, name, item.id, float(all(met)))
        add(table, "mean_score", item.id, mean / MAXIMUM)
        add(table, "constraints_met", item.id, sum(met), count)
        high = sum(score >= LOWER_BAR for score in scores)
        add(table, f"constraints_at_least_{LOWER_BAR}", item.id, high, count)
        if verdict["overall"] is not None:
            add(table, "overall_is_10", item.id, float(verdict["overall"] == MAXIMUM))
            add(table, "overall_differs", item.id, float(abs(verdict["overall"] - mean) > 1))
        for tag, held in zip(item.row["levels2"], met, strict=True):
            add(table, f"type/{TYPE_OF.get(tag, 'Other')}", item.id, held)
            add(table, f"dimension/{ENGLISH.get(tag, f'Other: {tag}')}", item.id, held)
    return table


BENCHMARK = items.Benchmark(SOURCE, HEADLINE, load, measures, question, maximum=MAXIMUM)
