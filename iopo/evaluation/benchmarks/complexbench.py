"""ComplexBench (arXiv 2407.03978): constraints in composition; DRFR with dependencies.

A question counts as failed if one it depends on fails. The published code looks one step back, on
the raw answers: that is DRFR here; DRFR_transitive follows the chain to its end.

The judge scores all questions, also those with a `rule`, which the published code checks on a
passage of the answer that a model picks out.
"""

from pathlib import Path

from iopo.evaluation import items
from iopo.evaluation.items import Item, Measures, Question, Verdict, add

SOURCE = items.Source(
    benchmark="complexbench",
    file="data_final.json",
    origin="https://github.com/thu-coai/ComplexBench (data)",
    licence="MIT",
    sha256=None,
)
HEADLINE = ("DRFR", "DRFR_transitive", "DRFR_independent")


def load(path: str | Path) -> list[Item]:
    """Items in Chinese, as the paper reports them. Raises ValueError."""
    fields = {"main_id": int, "instruction": str, "scoring_questions": list}
    return items.make_items(
        path,
        items.read_rows(path, fields),
        lambda row: Item(str(row["main_id"]), items.user_turn(row["instruction"]), row),
        _check_dependencies,
    )


def _check_dependencies(item: Item) -> None:
    found = [q.get("point_id") for q in item.row["scoring_questions"]]
    if not found or found != list(range(len(found))):
        raise ValueError(f"point_id {found}; expected 0, 1, 2, ... in order")
    for asked in item.row["scoring_questions"]:
        bad = [d for d in asked["dep"] if d not in found or d == asked["point_id"]]
        if bad:
            raise ValueError(f"question {asked['point_id']} depends on {bad}")


def question(item: Item, response: str) -> Question:
    """All scoring questions of an item."""
    criteria = tuple(q["question"] for q in item.row["scoring_questions"])
    return Question(item.id, item.row["instruction"], criteria, response, 1, "yes_no")


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


def measures(all_items: list[Item], verdicts: list[Verdict]) -> Measures:
    """DRFR in three readings, and by category, task type, constraint and composition."""
    table: Measures = {}
    for item, _, scores in items.scored(all_items, verdicts):
        asked = item.row["scoring_questions"]
        deps = [q["dep"] for q in asked]
        deep = after_dependencies(scores, deps, deep=True)
        add(table, "DRFR_transitive", item.id, sum(deep), len(deep))
        add(table, "DRFR_independent", item.id, sum(scores), len(scores))
        held = after_dependencies(scores, deps, deep=False)
        for part, ok in zip(asked, held, strict=True):
            names = ["DRFR", f"category/{item.row.get('category', 'none')}"]
            names += [f"task/{item.row.get('task_types', 'none')}"]
            names += [f"constraint/{c}" for c in part.get("constraint_dimensions", [])]
            names += [f"composition/{c}" for c in part.get("composition_types", [])]
            for name in names:
                add(table, name, item.id, ok)
    return table


BENCHMARK = items.Benchmark(SOURCE, HEADLINE, load, measures, question)
