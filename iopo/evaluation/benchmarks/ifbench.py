"""IFBench (allenai, NeurIPS 2025): 300 prompts, 58 new kinds of checkable constraints.

Its verifiers live in the authors' own package, which is not on PyPI; this module loads it when it
is installed and does the strict and loose scoring itself.
"""

import importlib
from collections import defaultdict
from collections.abc import Callable, Mapping
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
from iopo.files import read_records

SOURCE = Source(
    benchmark="ifbench",
    file="IFBench_test.jsonl",
    origin="https://github.com/allenai/IFBench (data)",
    licence="ODC-BY-1.0",
    sha256="a2bf7b8e7ed11d39c65b4ec781da8b99663ed0121f97033d70fcecb61f8a9d85",
)
HEADLINE = ("prompt_loose", "prompt_strict", "instruction_loose", "instruction_strict")
INSTALL = "pip install git+https://github.com/allenai/IFBench"


def load(path: Path) -> list[Item]:
    """Items of one user turn. Raises ValueError, also without the verifiers: before any answer."""
    verifiers()
    rows = read_records(path)
    require_fields(path, rows, {"prompt": str, "instruction_id_list": list, "kwargs": list})
    items = [Item(str(row["key"]), user_turn(row["prompt"]), row) for row in rows]
    return require_unique(path, items)


def verifiers() -> dict[str, Callable[[str], Any]]:
    """The authors' classes by instruction id. Raises ValueError when they are not installed."""
    try:
        registry = importlib.import_module("ifbench.instructions_registry")
    except ImportError as error:
        raise ValueError(
            f"ifbench: its verifiers cannot be loaded ({error}); install them: {INSTALL}"
        ) from error
    return registry.INSTRUCTION_DICT


def score(items: list[Item], responses: Mapping[str, str]) -> list[dict[str, Any]]:
    """Verdicts in the items' order; an item without a response follows nothing and still counts.

    responses: text by item id. Raises ValueError when the verifiers are not installed.
    """
    classes = verifiers()
    return [verdict(item, responses.get(item.id, ""), classes) for item in items]


def verdict(item: Item, response: str, classes: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    """{"key", "strict", "loose"}: one bool for each instruction, by position."""
    row = item.row
    unknown = sorted(set(row["instruction_id_list"]) - set(classes))
    if unknown:
        raise ValueError(f"ifbench: item {item.id}: no verifier for {', '.join(unknown)}")
    strict, loose = [], []
    for name, kwargs in zip(row["instruction_id_list"], row["kwargs"], strict=True):
        check = classes[name](name)
        check.build_description(**{k: v for k, v in kwargs.items() if v is not None})
        needed = check.get_instruction_args()
        if needed and "prompt" in needed:
            check.build_description(prompt=row["prompt"])
        strict.append(_passes(check, response))
        loose.append(any(_passes(check, text) for text in variants(response)))
    return {"key": row["key"], "strict": strict, "loose": loose}


def variants(response: str) -> list[str]:
    """IFEval's eight: as it is, without first, last or both lines; each also without asterisks."""
    lines = response.split("\n")
    cut = ["\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1])]
    plain = [response, *cut]
    return plain + [text.replace("*", "") for text in plain]


def _passes(check: Any, text: str) -> bool:
    return bool(text.strip()) and bool(check.check_following(text))


def measures(items: list[Item], verdicts: list[dict[str, Any]]) -> Measures:
    """Prompt level (all instructions) and instruction level (micro), strict and loose, by kind."""
    table: Measures = defaultdict(dict)
    for item, row in zip(items, verdicts, strict=True):
        for mode in ("strict", "loose"):
            table[f"prompt_{mode}"][item.id] = (float(all(row[mode])), 1)
            table[f"instruction_{mode}"][item.id] = (sum(row[mode]), len(row[mode]))
            for name, held in zip(item.row["instruction_id_list"], row[mode], strict=True):
                kind = f"{mode}/{name}"
                met, count = table[kind].get(item.id, (0.0, 0.0))
                table[kind][item.id] = (met + held, count + 1)
    return dict(table)
