"""IFBench (allenai, NeurIPS 2025): 300 prompts, 58 new kinds of checkable constraints.

Its verifiers live in the authors' own package, which is not on PyPI; this module loads it when it
is installed and does the strict and loose scoring itself.
"""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iopo.constraints import loose_variants
from iopo.constraints.answers import hollow
from iopo.evaluation import items
from iopo.evaluation.items import Item, Verdict

SOURCE = items.Source(
    benchmark="ifbench",
    file="IFBench_test.jsonl",
    origin="https://github.com/allenai/IFBench (data)",
    licence="ODC-BY-1.0",
    sha256="a2bf7b8e7ed11d39c65b4ec781da8b99663ed0121f97033d70fcecb61f8a9d85",
)
HEADLINE = ("prompt_loose", "prompt_strict", "instruction_loose", "instruction_strict", "answers")
INSTALL = "pip install git+https://github.com/allenai/IFBench"


def load(path: str | Path) -> list[Item]:
    """Items of one user turn. Raises ValueError, also without the verifiers: before any answer."""
    verifiers()
    fields = {"key": str, "prompt": str, "instruction_id_list": list, "kwargs": list}
    return items.make_items(
        path,
        items.read_rows(path, fields),
        lambda row: Item(row["key"], items.user_turn(row["prompt"]), row),
    )


def verifiers() -> dict[str, Callable[[str], Any]]:
    """The authors' classes by instruction id. Raises ValueError when they are not installed."""
    try:
        registry = importlib.import_module("ifbench.instructions_registry")
    except ImportError as error:
        raise ValueError(
            f"ifbench: its verifiers cannot be loaded ({error}); install them: {INSTALL}"
        ) from error
    return registry.INSTRUCTION_DICT


def by_code(item: Item, response: str) -> Verdict:
    """{"key", "strict", "loose": one bool for each instruction, by position; "hollow": reasons}.

    Raises ValueError when the verifiers are not installed, or lack one of the item's kinds.
    """
    classes = verifiers()
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
        loose.append(any(_passes(check, text) for text in loose_variants(response)))
    reasons = list(hollow(response, row["prompt"]))
    return {"key": row["key"], "strict": strict, "loose": loose, "hollow": reasons}


def _passes(check: Any, text: str) -> bool:
    return bool(text.strip()) and bool(check.check_following(text))


BENCHMARK = items.Benchmark(SOURCE, HEADLINE, load, items.strict_and_loose, by_code=by_code)
