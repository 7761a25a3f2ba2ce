"""What a round asks: prompts with constraints that code can check, and the jobs of sampling."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from iopo.constraints import Constraint, Value, from_dict, value_of
from iopo.construct.ifseeds import Seed, candidate, read_checkable
from iopo.construct.importers import read_seeds
from iopo.construct.proposals import draw, unseen
from iopo.construct.quadruples import Candidate, constraint_rows, sides
from iopo.construct.tasks import Task, instruction, read_tasks
from iopo.construct.verified import split_of
from iopo.files import given_records, read_records, write_records
from iopo.rounds.config import TASKS, Round, RoundsConfig

HELDOUT = "heldout.jsonl"  # in the run folder


@dataclass(frozen=True)
class Held:
    """What held-out quads ask for and no round trains on."""

    kinds: frozenset[str] = frozenset()
    values: frozenset[Value] = frozenset()
    tasks: frozenset[str] = frozenset()

    def refuses(self, constraint: Constraint) -> bool:
        value = value_of({"kind": constraint.kind, "params": constraint.params})
        return constraint.kind in self.kinds or value in self.values


def heldout_rows(rounds: RoundsConfig) -> list[dict[str, Any]]:
    """All quads that nothing is trained on.

    A row says what of it is not seen: unseen_kinds, unseen_params, or seen, or what it said itself
    where rounds.seen is null. Raises ValueError for rows without checkable constraints.
    """
    rows = [row for file in rounds.heldout for _, row in given_records(file)]
    for row in rows:
        if not (row.get("c1") and row.get("c2") and row.get("task")):
            raise ValueError(
                f"rounds.heldout: row {row.get('id')!r} lacks c1, c2 or task; expected quads of "
                "`python -m iopo.construct`, as in data/verified"
            )
    if rounds.seen is not None:
        values = seen_values(rounds.seen)
        kinds = {kind for kind, _ in values}
        rows = [row | {"split": unseen(row, values, kinds)} for row in rows]
    return rows


def asked(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The constraints of a quad, of both sides."""
    return [*(row.get("c1") or []), *(row.get("c2") or [])]


@cache
def seen_values(source: str) -> frozenset[Value]:
    """What the quads of a source ask for, on both sides."""
    return frozenset(value_of(c) for _, row in given_records(source) for c in asked(row))


def read_held(rounds: RoundsConfig, run: Path) -> Held:
    """Of the held-out quads in the run folder."""
    return held_of(rounds, read_records(run / HELDOUT) if rounds.heldout else [])


def held_of(rounds: RoundsConfig, rows: Sequence[Mapping[str, Any]]) -> Held:
    """Of held-out quads: their tasks and, where rounds.seen is set, what it has not."""
    tasks = frozenset(row["task"] for row in rows)
    if rounds.seen is None or not rows:
        return Held(tasks=tasks)
    seen = seen_values(rounds.seen)
    values = frozenset(value_of(c) for row in rows for c in asked(row)) - seen
    kinds = frozenset(kind for kind, _ in values) - {kind for kind, _ in seen}
    return Held(kinds, values, tasks)


def read_prompts(source: str, held: Held) -> tuple[list[Task | Seed], Counter[str]]:
    """Tasks, or prompts with their constraints, of a source; and why others are left out.

    tasks: the training part of the bank. A source whose rows hold no checkable constraints is read
    as one of simple instructions. Raises ValueError if nothing is left, and as the readers do.
    """
    found: Sequence[Task | Seed]
    dropped: Counter[str] = Counter()
    if source == TASKS:
        found = [task for task in read_tasks() if split_of(task) == "train"]
    else:
        found = []
        if not source.endswith(".txt"):
            found, dropped = read_checkable(source, None)
        if not found:
            dropped.clear()
            found = [Task(row["instruction"]) for row in read_seeds(source)]
    kept: list[Task | Seed] = []
    for one in found:
        if one.line in held.tasks:
            dropped["task of a held-out quad"] += 1
        elif isinstance(one, Seed) and any(map(held.refuses, one.constraints)):
            dropped["asks for a held-out constraint"] += 1
        else:
            kept.append(one)
    if not kept:
        raise ValueError(f"rounds.prompts={source}: no prompt is left: {dict(dropped)}")
    return kept, dropped


def prompts_of(found: Sequence[Task | Seed], held: Held, of: Round) -> list[Seed]:
    """The prompts of a round: the next ones in an order drawn by the seed, over and over.

    A task draws 1 to most_constraints constraints, other ones each time.
    """
    order = random.Random(f"{of.seed}/prompts").sample(range(len(found)), len(found))
    first = (of.number - 1) * of.rounds.prompts_per_round
    out = []
    for n in range(of.rounds.prompts_per_round):
        one, name = found[order[(first + n) % len(order)]], f"r{of.number}-{n:05d}"
        if isinstance(one, Task):
            rng = random.Random(f"{of.seed}/{name}")
            number = rng.randint(1, of.rounds.most_constraints)
            drawn = draw(number, rng, held.refuses)
            text = instruction(one, [c.render() for c in drawn])
            out.append(Seed(name, text, {c.kind: [c] for c in drawn}, one))
        else:
            out.append(replace(one, id=name))
    return out


def opposed(seed: Seed, held: Held, of: Round) -> Candidate | None:
    """Of rows that are quads: the prompt's two instructions, if there can be two."""
    if of.kind != "quad":
        return None
    return candidate(seed, random.Random(f"{of.seed}/opposed/{seed.id}"), held.refuses)


def jobs_of(seed: Seed, pair: Candidate | None, of: Round) -> dict[str, str]:
    """`samples` jobs by key ID/SIDE-NUMBER, parted evenly between two instructions."""
    texts = [seed.prompt] if pair is None else sides(pair)
    each = of.rounds.samples // len(texts)
    return {f"{seed.id}/{s}-{n}": x for s, x in enumerate(texts, 1) for n in range(each)}


def write_prompts(path: Path, seeds: Sequence[Seed]) -> None:
    """prompts.jsonl: what `read_drawn` reads, and people."""

    def row(seed: Seed) -> dict[str, Any]:
        checks = {
            name: constraint_rows((c, c.render()) for c in made)
            for name, made in seed.checks.items()
        }
        line = None if seed.task is None else seed.task.line
        return {"id": seed.id, "prompt": seed.prompt, "checks": checks, "task": line}

    write_records(path, map(row, seeds))


def read_drawn(path: Path) -> list[Seed]:
    """The prompts that were drawn for a round."""
    return [
        Seed(
            row["id"],
            row["prompt"],
            {name: [from_dict(c) for c in made] for name, made in row["checks"].items()},
            None if row["task"] is None else Task.of_line(row["task"]),
        )
        for row in read_records(path)
    ]
