"""IFEval (arXiv 2311.07911): 541 prompts, 834 instructions of 25 kinds, each checked by code.

Agrees with the official scorer bit for bit, save for its random letter in the items 1122 and 1129,
where the symbol that the prompt names is counted. Two labels are wrong upstream and scored as they
are: 337 (the prompt says 400 words, the argument 336) and 2078 (its instructions contradict).
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iopo.constraints import Constraint, follows, follows_loosely, from_ifeval
from iopo.constraints.text import missing_packages
from iopo.evaluation.items import (
    Item,
    Measures,
    Source,
    require_fields,
    require_unique,
    user_turn,
)
from iopo.files import read_records
from iopo.stats import Estimate, cluster_bootstrap, wilson

SOURCE = Source(
    benchmark="ifeval",
    file="input_data.jsonl",
    origin="https://github.com/google-research/google-research (instruction_following_eval/data)",
    licence="Apache-2.0",
    sha256="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
)
HEADLINE = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")
MODES = ("strict", "loose")


def load(path: Path) -> list[Item]:
    """Items of one user turn, in the file's order.

    Raises ValueError naming the item on an unknown instruction id, on bad arguments, on a key that
    is there twice; and, before any answer is made, if packages are missing that scoring needs.
    """
    missing = missing_packages()
    if missing:
        raise ValueError(f"ifeval needs {', '.join(missing)}; pip install 'iopo[eval]'")
    rows = read_records(path)
    fields = {"key": int, "prompt": str, "instruction_id_list": list, "kwargs": list}
    require_fields(path, rows, fields)
    items = [Item(str(row["key"]), user_turn(row["prompt"]), row) for row in rows]
    for item in items:
        try:
            constraints(item)
        except ValueError as error:
            raise ValueError(f"{path}: item {item.id}: {error}") from error
    return require_unique(path, items)


def constraints(item: Item) -> list[Constraint]:
    """The item's instructions by position (an id may be there twice). Raises ValueError."""
    ids, arguments = item.row["instruction_id_list"], item.row["kwargs"]
    if not ids or len(ids) != len(arguments):
        raise ValueError(
            f"{len(ids)} instruction ids and {len(arguments)} kwargs; expected as many kwargs as "
            "ids, at least one"
        )
    return [from_ifeval(name, kwargs) for name, kwargs in zip(ids, arguments, strict=True)]


def verdict(item: Item, response: str) -> dict[str, Any]:
    """{"key", "strict", "loose"}: one bool for each instruction, by position."""
    rules = constraints(item)
    return {
        "key": item.row["key"],
        "strict": follows(rules, response),
        "loose": follows_loosely(rules, response),
    }


def join(
    items: Sequence[Item], rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, str], list[str], list[str]]:
    """Responses by item id, the ids without one, and the ids that no item has.

    rows: {"key" or "id", "response"}, joined by key, never by prompt text: prompts were corrected.
    Raises ValueError listing rows without key or text and keys that are there twice.
    """
    known = {item.id for item in items}
    responses: dict[str, str] = {}
    errors = []
    for number, row in enumerate(rows, 1):
        key = row.get("key", row.get("id"))
        if not isinstance(key, int | str) or not isinstance(row.get("response"), str):
            errors.append(f"response row {number}: expected key (or id) and a text as response")
        elif str(key) in responses:
            errors.append(f"response row {number}: key {key} is there more than once")
        else:
            responses[str(key)] = row["response"]
    if errors:
        raise ValueError("\n".join([*errors[:10], "each item needs one response"]))
    missing = [item.id for item in items if item.id not in responses]
    unknown = [key for key in responses if key not in known]
    return {key: text for key, text in responses.items() if key in known}, missing, unknown


def score(items: Sequence[Item], responses: Mapping[str, str]) -> list[dict[str, Any]]:
    """Verdicts in the items' order; an item without a response follows nothing and still counts.

    responses: text by item id, as `join` returns them.
    """
    return [verdict(item, responses.get(item.id, "")) for item in items]


def totals(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """The four accuracies with 95% intervals, under the names of HEADLINE.

    Prompt level: every instruction of the prompt holds; Wilson's interval. Instruction level: micro
    average over all instructions; prompts are resampled whole, since their instructions hang
    together (n = prompts). Raises ValueError without verdicts.
    """
    found: dict[str, Estimate] = {}
    for mode in MODES:
        held = [row[mode] for row in verdicts]
        flat = [verdict for row in held for verdict in row]
        prompts = [i for i, row in enumerate(held) for _ in row]
        found[f"prompt_{mode}"] = wilson(sum(map(all, held)), len(held))
        found[f"instruction_{mode}"] = cluster_bootstrap(flat, prompts)
    return {name: found[name] for name in HEADLINE}


def measures(items: list[Item], verdicts: list[dict[str, Any]]) -> Measures:
    """Prompt level (all instructions) and instruction level (micro), strict and loose, by kind."""
    table: Measures = defaultdict(dict)
    for item, row in zip(items, verdicts, strict=True):
        for mode in MODES:
            table[f"prompt_{mode}"][item.id] = (float(all(row[mode])), 1)
            table[f"instruction_{mode}"][item.id] = (sum(row[mode]), len(row[mode]))
            for name, held in zip(item.row["instruction_id_list"], row[mode], strict=True):
                kind = f"{mode}/{name}"
                met, count = table[kind].get(item.id, (0.0, 0.0))
                table[kind][item.id] = (met + held, count + 1)
    return dict(table)
