"""InFoBench (arXiv 2401.03601): instructions broken down into yes-or-no questions; DRFR.

Each question is asked on its own (the published script keeps one growing chat for an item).
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from iopo.evaluation.items import (
    Item,
    Measures,
    Source,
    require_fields,
    require_unique,
    user_turn,
)
from iopo.evaluation.judge.prompts import Question
from iopo.files import read_records

SOURCE = Source(
    benchmark="infobench",
    file="infobench.jsonl",
    origin="https://huggingface.co/datasets/kqsong/InFoBench, saved as JSON Lines",
    licence="MIT",
    sha256=None,
)
MAXIMUM = 1
HEADLINE = ("DRFR",)


def load(path: Path) -> list[Item]:
    """Items: the instruction, then its input if there is one. Raises ValueError."""
    rows = read_records(path)
    require_fields(
        path, rows, {"id": str, "instruction": str, "input": str, "decomposed_questions": list}
    )
    items = []
    for row in rows:
        if not row["decomposed_questions"]:
            raise ValueError(f"{path}: item {row['id']} has no questions")
        text = row["instruction"] + (f"\n\n{row['input']}" if row["input"].strip() else "")
        items.append(Item(row["id"], user_turn(text), row))
    return require_unique(path, items)


def questions(item: Item, response: str) -> list[Question]:
    """All questions of an item; the judge gets them one by one in the published format."""
    return [
        Question(
            id=item.id,
            task=item.messages[0]["content"],
            criteria=tuple(item.row["decomposed_questions"]),
            response=response,
            maximum=MAXIMUM,
            format="yes_no",
        )
    ]


def measures(items: list[Item], verdicts: list[dict[str, Any]]) -> Measures:
    """DRFR: the share of questions answered YES; all, and by subset."""
    table: Measures = defaultdict(dict)
    for item, verdict in zip(items, verdicts, strict=True):
        scores = verdict["scores"]
        if scores is None:
            continue
        names = ["DRFR"]
        if item.row.get("subset"):
            names.append(f"DRFR/{item.row['subset']}")
        for name in names:
            table[name][item.id] = (sum(scores), len(scores))
        table["all_met"][item.id] = (float(all(scores)), 1)
    return dict(table)
