"""ComplexBench (arXiv 2407.03978): constraints in composition; DRFR with dependencies.

A question counts as failed if one it depends on fails. The published code looks one step back, on
the raw answers: that is DRFR here; DRFR_transitive follows the chain to its end.

Questions with a `rule` are scored by code (complexbench_rules) on passages that the judge picks
out; their share is shown apart, as rule_questions. A rule that is not known is left to the judge.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from iopo.evaluation.benchmarks import complexbench_rules
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
    benchmark="complexbench",
    file="data_final.json",
    origin="https://github.com/thu-coai/ComplexBench (data)",
    licence="MIT",
    sha256=None,
)
MAXIMUM = 1
HEADLINE = ("DRFR", "DRFR_transitive", "DRFR_independent")


def load(path: Path) -> list[Item]:
    """Items in Chinese, as the paper reports them. Raises ValueError."""
    rows = read_records(path)
    require_fields(path, rows, {"main_id": int, "instruction": str, "scoring_questions": list})
    items = []
    for row in rows:
        where = f"{path}: item {row['main_id']}"
        found = [q.get("point_id") for q in row["scoring_questions"]]
        if not found or found != list(range(len(found))):
            raise ValueError(f"{where}: point_id {found}; expected 0, 1, 2, ... in order")
        for question in row["scoring_questions"]:
            bad = [d for d in question["dep"] if d not in found or d == question["point_id"]]
            if bad:
                raise ValueError(f"{where}: question {question['point_id']} depends on {bad}")
        items.append(Item(str(row["main_id"]), user_turn(row["instruction"]), row))
    return require_unique(path, items)


def questions(item: Item, response: str) -> list[Question]:
    """All scoring questions of an item."""
    asked = item.row["scoring_questions"]
    return [
        Question(
            id=item.id,
            task=item.row["instruction"],
            criteria=tuple(q["question"] for q in asked),
            response=response,
            maximum=MAXIMUM,
            format="yes_no",
            rules=tuple(
                complexbench_rules.parse(q.get("rule")) for q in item.row["scoring_questions"]
            ),
        )
    ]


def after_dependencies(scores: list[float], deps: list[list[int]], *, deep: bool) -> list[bool]:
    """Which questions hold when those they depend on must hold too.

    deep False: look at the raw answers one step back, as published. deep True: follow the chain; a
    cycle holds if all its members do.
    """
    raw = [bool(score) for score in scores]
    held = [ok and all(raw[d] for d in dep) for ok, dep in zip(raw, deps, strict=True)]
    while deep:
        further = [ok and all(held[d] for d in dep) for ok, dep in zip(held, deps, strict=True)]
        if further == held:
            break
        held = further
    return held


def measures(items: list[Item], verdicts: list[dict[str, Any]]) -> Measures:
    """DRFR in three readings, and by category, task type, constraint and composition."""
    table: Measures = defaultdict(dict)

    def add(name: str, item: Item, held: bool) -> None:
        met, count = table[name].get(item.id, (0.0, 0.0))
        table[name][item.id] = (met + held, count + 1)

    for item, verdict in zip(items, verdicts, strict=True):
        scores = verdict["scores"]
        if scores is None:
            continue
        asked = item.row["scoring_questions"]
        deps = [q["dep"] for q in asked]
        deep = after_dependencies(scores, deps, deep=True)
        table["DRFR_transitive"][item.id] = (sum(deep), len(deep))
        table["DRFR_independent"][item.id] = (sum(scores), len(scores))
        held = after_dependencies(scores, deps, deep=False)
        for question, ok in zip(asked, held, strict=True):
            kind = "rule_questions" if question.get("rule") else "judge_questions"
            names = ["DRFR", kind]
            names += [f"category/{item.row.get('category', 'none')}"]
            names += [f"task/{item.row.get('task_types', 'none')}"]
            names += [f"constraint/{c}" for c in question.get("constraint_dimensions", [])]
            names += [f"composition/{c}" for c in question.get("composition_types", [])]
            for name in names:
                add(name, item, ok)
    return dict(table)
