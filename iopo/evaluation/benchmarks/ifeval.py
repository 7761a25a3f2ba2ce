"""IFEval (arXiv 2311.07911): 541 prompts, 834 instructions of 25 kinds, each checked by code.

Agrees with the official scorer bit for bit, save for its random letter in the items 1122 and 1129,
where the symbol that the prompt names is counted. Two labels are wrong upstream and scored as they
are: 337 (the prompt says 400 words, the argument 336) and 2078 (its instructions contradict).

A file of iopo.construct.cousins holds prompts and cousins of them (columns cousin_of and change).
Its scores are of the prompts alone; reliable@k says how many are still right with all cousins.
"""

from pathlib import Path

from iopo.constraints import Constraint, follows, follows_loosely, from_name
from iopo.constraints.answers import hollow
from iopo.constraints.text import missing_packages
from iopo.evaluation import items
from iopo.evaluation.items import Item, Measures, Verdict, add

SOURCE = items.Source(
    benchmark="ifeval",
    file="input_data.jsonl",
    origin="https://github.com/google-research/google-research (instruction_following_eval/data)",
    licence="Apache-2.0",
    sha256="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
)
CHANGES = ("reworded", "reordered", "distractor", "parameter")  # of a cousin; its prompt has "none"
HEADLINE = (
    "follows_and_answers", "reliable", "drop", *(f"drop/{change}" for change in CHANGES),
    "prompt_strict", "reliable_strict", "drop_strict",
    "instruction_strict", "prompt_loose", "instruction_loose", "answers",
)  # fmt: skip


def load(path: str | Path) -> list[Item]:
    """Items of one user turn, in the file's order.

    Raises ValueError naming the item on an unknown instruction id, on bad arguments, on a key that
    is there twice, on a cousin without its prompt; and, before any answer is made, if packages are
    missing that scoring needs.
    """
    missing = missing_packages()
    if missing:
        raise ValueError(f"ifeval needs {', '.join(missing)}; pip install 'iopo[eval]'")
    fields = {"key": int | str, "prompt": str, "instruction_id_list": list, "kwargs": list}
    rows = items.read_rows(path, fields)
    prompts = {row["key"] for row in rows if row.get("change") == "none"}

    def check(item: Item) -> None:
        constraints(item)
        of, change = item.row.get("cousin_of"), item.row.get("change")
        if (of, change) != (None, None) and (of not in prompts or change not in ("none", *CHANGES)):
            raise ValueError(
                f"cousin_of is {of!r} and change {change!r}; expected the key of a row with change "
                f"'none', and 'none' or one of {', '.join(CHANGES)}"
            )

    return items.make_items(
        path, rows, lambda row: Item(str(row["key"]), items.user_turn(row["prompt"]), row), check
    )


def constraints(item: Item) -> list[Constraint]:
    """The item's instructions by position (an id may be there twice). Raises ValueError.

    An id that is a kind of iopo.constraints has the kind's parameters as its kwargs.
    """
    ids, arguments = item.row["instruction_id_list"], item.row["kwargs"]
    if not ids or len(ids) != len(arguments):
        raise ValueError(
            f"{len(ids)} instruction ids and {len(arguments)} kwargs; expected as many kwargs as "
            "ids, at least one"
        )
    return [from_name(name, kwargs) for name, kwargs in zip(ids, arguments, strict=True)]


def by_code(item: Item, response: str) -> Verdict:
    """{"key", "strict", "loose": one bool for each instruction, by position; "hollow": reasons}."""
    rules = constraints(item)
    return {
        "key": item.row["key"],
        "strict": follows(rules, response),
        "loose": follows_loosely(rules, response),
        "hollow": list(hollow(response, item.row["prompt"], rules)),
    }


def measures(all_items: list[Item], verdicts: list[Verdict]) -> Measures:
    """IFEval's measures of the prompts; with cousins, how reliable the answers to them are.

    reliable: the share of prompts for which the answers to it and to all its cousins follow all and
    answer. drop: the share of the prompts that are right by themselves which is lost so, 1 -
    reliable / follows_and_answers; drop/CHANGE: by the cousins of one change alone, of the prompts
    that have one. share/CHANGE: of the cousins themselves. *_strict: following alone.
    """
    pairs = list(zip(all_items, verdicts, strict=True))
    prompts = [pair for pair in pairs if pair[0].row.get("change") in (None, "none")]
    table = items.strict_and_loose(*map(list, zip(*prompts, strict=True)))
    if len(prompts) == len(pairs):
        return table
    groups: dict[str, list[tuple[str, Verdict]]] = {}
    for item, verdict in pairs:
        groups.setdefault(item.group, []).append((item.row["change"], verdict))
    for suffix in ("", "_strict"):
        for unit, group in groups.items():
            held = [(change, _is_right(verdict, suffix)) for change, verdict in group]
            plain = all(right for change, right in held if change == "none")
            reliable = all(right for _, right in held)
            add(table, f"reliable{suffix}", unit, float(reliable))
            add(table, f"drop{suffix}", unit, float(plain and not reliable), float(plain))
            for change in () if suffix else CHANGES:
                own = [right for of, right in held if of == change]
                if own:
                    add(table, f"share/{change}", unit, sum(own), len(own))
                    add(table, f"drop/{change}", unit, float(plain and not all(own)), float(plain))
    # a drop from nothing is none
    return {name: units for name, units in table.items() if any(of for _, of in units.values())}


def _is_right(verdict: Verdict, suffix: str) -> bool:
    """Whether the answer follows all; without a suffix, whether it answers too."""
    return all(verdict["strict"]) and (bool(suffix) or not verdict["hollow"])


BENCHMARK = items.Benchmark(SOURCE, HEADLINE, load, measures, by_code=by_code)
