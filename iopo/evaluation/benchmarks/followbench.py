"""FollowBench (arXiv 2310.20410): instructions that grow by one constraint a level, 1 to 5.

HSR: share of answers that meet all constraints. SSR: share of constraints met. CSL: how many levels
in a row, from the first, an instruction's answers meet in full. Level 0 is context, not scored.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from iopo.evaluation.benchmarks import followbench_rules
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
    benchmark="followbench",
    file="followbench.jsonl",
    origin=(
        "https://github.com/YJiangcm/FollowBench: its 12 JSON files joined into JSON Lines, with "
        "the fields language (en, zh) and constraint_type added"
    ),
    licence="Apache-2.0",
    sha256="dd6ae8f8ebb615193162d32e881f5f5ad10fa4e9e14254beae2a716b10faf5b6",
)
MAXIMUM = 1
HEADLINE = ("HSR/en", "SSR/en", "CSL/en", "HSR/zh", "SSR/zh", "CSL/zh")
LEVELS = 5


def load(path: Path) -> list[Item]:
    """The scored items, levels 1 to 5; `row["steps"]` holds the instruction at levels 0 .. level.

    Raises ValueError if a level is missing.
    """
    rows = read_records(path)
    fields = {
        "language": str, "constraint_type": str, "example_id": int, "source": str,
        "level": int, "instruction": str, "target": str,
    }  # fmt: skip
    require_fields(path, rows, fields)
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        groups[group_id(row)][row["level"]] = row
    items = []
    for name, levels in groups.items():
        first = 1 if name.split("/")[1] == "example" else 0
        if sorted(levels) != list(range(first, LEVELS + 1)):
            raise ValueError(f"{path}: {name} has the levels {sorted(levels)}; expected all to 5")
        for level in range(1, LEVELS + 1):
            steps = [levels[k]["instruction"] for k in range(first, level + 1)]
            row = {**levels[level], "steps": steps}
            items.append(Item(f"{name}/{level}", user_turn(row["instruction"]), row))
    return require_unique(path, items)


def group_id(row: dict[str, Any]) -> str:
    return f"{row['language']}/{row['constraint_type']}/{row['example_id']}"


def questions(item: Item, response: str) -> list[Question]:
    """One question on all added constraints; none where code can check the answer."""
    row = item.row
    if followbench_rules.has_rule(
        row["language"], row["constraint_type"], row["source"], row["example_id"]
    ):
        return []
    task = "\n\n".join(f"Instruction {k}:\n{text}" for k, text in enumerate(row["steps"]))
    return [
        Question(
            id=item.id,
            task=task,
            criteria=tuple(
                f"The constraint that instruction {k} adds to instruction {k - 1}"
                for k in range(1, row["level"] + 1)
            ),
            response=response,
            maximum=MAXIMUM,
            format="list",
            steps=tuple(row["steps"]),
        )
    ]


def by_code(item: Item, response: str) -> list[float]:
    """Scores of an item without a question: all or nothing, as published (so SSR equals HSR)."""
    held = bool(response.strip()) and followbench_rules.follows(item.row, response)
    return [float(held)] * item.row["level"]


def measures(items: list[Item], verdicts: list[dict[str, Any]]) -> Measures:
    """HSR and SSR by language, level and type, and CSL by language and type.

    The value of a language (and of a level in it) is the mean over the constraint types, as in the
    paper: an item weighs 1 over the number of items of its language, type and level.
    """
    table: Measures = defaultdict(dict)
    scored = [(i, v) for i, v in zip(items, verdicts, strict=True) if v["scores"] is not None]
    sizes: dict[tuple, int] = defaultdict(int)
    for item, _ in scored:
        sizes[_cell(item)] += 1
    met: dict[str, dict[int, bool]] = defaultdict(dict)
    for item, verdict in scored:
        row, scores = item.row, verdict["scores"]
        language, kind, level = _cell(item)
        hard, soft = float(all(scores)), sum(scores) / len(scores)
        met[group_id(row)][level] = bool(hard)
        weight = 1 / sizes[_cell(item)]
        for name, value in (("HSR", hard), ("SSR", soft)):
            table[f"{name}/{language}"][item.id] = (value * weight, weight)
            table[f"{name}/{language}/level {level}"][item.id] = (value * weight, weight)
            table[f"{name}/{language}/{kind}"][item.id] = (value, 1)
    _consistency(table, met)
    return dict(table)


def _cell(item: Item) -> tuple[str, str, int]:
    return item.row["language"], item.row["constraint_type"], item.row["level"]


def _consistency(table: Measures, met: dict[str, dict[int, bool]]) -> None:
    """CSL over groups whose five answers are all scored."""
    whole = {name: levels for name, levels in met.items() if len(levels) == LEVELS}
    sizes: dict[tuple[str, str], int] = defaultdict(int)
    for name in whole:
        language, kind, _ = name.split("/")
        sizes[language, kind] += 1
    for name, levels in whole.items():
        language, kind, _ = name.split("/")
        row = 0
        while row < LEVELS and levels[row + 1]:
            row += 1
        weight = 1 / sizes[language, kind]
        table[f"CSL/{language}"][name] = (row * weight, weight)
        table[f"CSL/{language}/{kind}"][name] = (row, 1)
