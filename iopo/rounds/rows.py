"""Sampled responses become rows: labelled by code, made into what the objective trains on, counted.

Only responses that answer become quads or earn a reward: a hollow one counts as failing.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from iopo import stats
from iopo.constraints import Constraint, follows
from iopo.constraints.answers import hollow
from iopo.constraints.text import after_thinking
from iopo.construct.contrast import KINDS
from iopo.construct.ifseeds import Admission, Seed
from iopo.construct.quadruples import Candidate, follow, sides
from iopo.construct.relabel import Relabeller, RelabelRecipe
from iopo.construct.tasks import Task, digest
from iopo.data.rows import Pair
from iopo.rounds.config import Round
from iopo.rounds.prompts import Held, opposed

Row = dict[str, Any]
Said = Mapping[str, tuple[str, bool]]  # key of a job -> its response, and whether it ended


@dataclass(frozen=True)
class Labelled:
    """A response after its thinking, with the verdicts on it."""

    text: str
    follows: tuple[bool, ...]
    hollow: tuple[str, ...]

    @property
    def right(self) -> bool:
        return all(self.follows) and not self.hollow

    @property
    def share(self) -> float:
        """Of the constraints that it follows; 0 if it is hollow."""
        return 0.0 if self.hollow else sum(self.follows) / len(self.follows)

    def reward(self, kind: str) -> float:
        """all: 1 if it follows all constraints and answers, else 0. share: `share`."""
        return float(self.right) if kind == "all" else self.share


def label(said: tuple[str, bool], prompt: str, constraints: Sequence[Constraint]) -> Labelled:
    """The verdicts of code on a response."""
    text = after_thinking(said[0]).strip()
    faults = hollow(text, prompt, constraints, ended=said[1])
    return Labelled(text, tuple(follows(constraints, text)), faults)


def distinct(responses: Sequence[Labelled]) -> list[Labelled]:
    """Each text once."""
    return list({response.text: response for response in responses}.values())


# --- what one prompt gives, by the kind of row ---------------------------------------------------


def best_and_worst(seed: Seed, responses: Sequence[Labelled], reward: str) -> Row | str:
    """A pair: a response of the highest reward over the one that follows the least."""
    texts = [response for response in responses if response.text]
    rewards = [r.reward(reward) for r in texts]
    if why := alike(rewards):
        return why
    best = texts[rewards.index(max(rewards))]
    worse = [r for r, of in zip(texts, rewards, strict=True) if of < max(rewards)]
    return {
        "x": seed.prompt, "chosen": best.text, "rejected": min(worse, key=lambda r: r.share).text,
    }  # fmt: skip


def group(seed: Seed, responses: Sequence[Labelled], reward: str) -> Row | str:
    """All responses with their rewards, unless these are equal: such a group teaches nothing."""
    rewards = [r.reward(reward) for r in responses]
    return alike(rewards) or {
        "x": seed.prompt, "responses": [r.text for r in responses], "rewards": rewards,
    }  # fmt: skip


def alike(rewards: Sequence[float]) -> str | None:
    """What is said of rewards that do not differ; None if they do."""
    found = set(rewards) or {0.0}
    if len(found) > 1:
        return None
    return f"all rewards are {min(found):g}" if found <= {0, 1} else "rewards are equal"


def right_ones(seed: Seed, responses: Sequence[Labelled]) -> list[Row]:
    """Rows for SFT: each response that follows all and answers."""
    return [{"x": seed.prompt, "y": r.text} for r in distinct(responses) if r.right]


class Quads:
    """Quads of a round: first of answers that were followed, then of the others, relabelled."""

    def __init__(self, held: Held, of: Round):
        recipe = RelabelRecipe(
            seed=of.seed,
            most_constraints=of.rounds.most_constraints,
            heldout_kinds=sorted(held.kinds & {kind for kinds in KINDS.values() for kind in kinds}),
        )
        self.admission = Admission(Relabeller(recipe, steady=of.number > 1), held.values)

    def make(
        self, seed: Seed, pair: Candidate | None, responses: Sequence[Sequence[Labelled]]
    ) -> list[Row]:
        """The quads of one prompt. responses: to each of its instructions."""
        made = self.admission.rows["train"]
        before = len(made)
        if pair is not None:
            self._follow(pair, responses)
        used = {row[y] for row in made[before:] for y in ("y1", "y2")}
        task = seed.task
        # without the task alone, further constraints have to stand beside the prompt's own
        fit = [
            [r for r in side if (r.right if task is None else not r.hollow)] for side in responses
        ]
        left = [r for two in zip_longest(*fit) for r in two if r is not None and r.text not in used]
        texts = [r.text for r in distinct(left)]
        if len(texts) < 2:
            self.admission.outcomes["relabel: fewer than two answers"] += 1
        asked = seed.prompt if task is None else task.line
        for n, (first, second) in enumerate(zip(texts[::2], texts[1::2], strict=False)):
            one = Pair(f"{seed.id}-{n}", asked, first, second)
            self.admission.relabel(one, task or Task(asked), "train")
        return made[before:]

    def _follow(self, pair: Candidate, responses: Sequence[Sequence[Labelled]]) -> None:
        firsts, seconds = ([r.text for r in distinct(side) if r.right] for side in responses)
        firsts = [text for text in firsts if not all(follows(pair.c2, text))]
        seconds = [text for text in seconds if not all(follows(pair.c1, text))]
        if not (firsts and seconds):
            self.admission.follow("not followed", "train")
        for first, second in zip(firsts, seconds, strict=False):
            self.admission.follow(follow(pair, first, second), "train")


# --- a round -------------------------------------------------------------------------------------


def make_rows(
    seeds: Sequence[Seed], said: Said, held: Held, of: Round
) -> tuple[list[Row], dict[str, Any]]:
    """Label every response and make the rows of the round's kind: they, and counts of them."""
    quads, outcomes = Quads(held, of), Counter[str]()
    rows: list[Row] = []
    per_prompt: list[int] = []
    totals: Counter[str] = Counter()
    by_number: defaultdict[int, Counter[str]] = defaultdict(Counter)
    by_kind: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for seed in seeds:
        pair = opposed(seed, held, of)
        asked = [(seed.prompt, seed.constraints)]
        if pair is not None:
            asked = list(zip(sides(pair), (pair.c1, pair.c2), strict=True))
        each = of.rounds.samples // len(asked)
        responses = [
            [label(said[f"{seed.id}/{s}-{n}"], prompt, constraints) for n in range(each)]
            for s, (prompt, constraints) in enumerate(asked, 1)
        ]
        made = _of_prompt(seed, pair, responses, quads, outcomes, of)
        for n, row in enumerate(made):
            named = {"id": digest(seed.id, str(n), *map(str, row.values()))} | row
            rows.append(named | {"round": of.number, "prompt_id": seed.id})
        per_prompt.append(len(made))
        number = by_number[len(seed.constraints)]
        number.update({"prompts": 1, "with_rows": int(bool(made)), "rows": len(made)})
        for (_, constraints), side in zip(asked, responses, strict=True):
            for r in side:
                what = {"responses": 1, "follow": all(r.follows), "answer": not r.hollow}
                what["follow_and_answer"] = r.right
                totals.update(what)
                number.update(responses=1, follow_and_answer=r.right)
                for c, followed in zip(constraints, r.follows, strict=True):
                    by_kind[c.kind].update(asked=1, followed=followed)
    for row in rows:
        by_kind_of_row = Counter(c["kind"] for side in ("c1", "c2") for c in row.get(side, ()))
        for kind, n in by_kind_of_row.items():
            by_kind[kind]["in_rows"] += n
    sources = Counter(row.get("source", of.kind) for row in rows)
    carried = Counter(len(row[c]) for row in rows for c in ("c1", "c2") if c in row)
    outcomes += quads.admission.outcomes
    return (
        rows,
        {
            "kind": of.kind,
            "prompts": len(seeds),
            **{
                name: totals[name]
                for name in ("responses", "follow", "answer", "follow_and_answer")
            },
            "rows_new": len(rows),
            "acceptance": stats.bootstrap(per_prompt),
            "with_rows": stats.wilson(sum(n > 0 for n in per_prompt), len(per_prompt)),
            "by_source": dict(sorted(sources.items())),
            "by_constraints": {str(n): dict(by_number[n]) for n in sorted(by_number)},
            "by_kind": {kind: dict(by_kind[kind]) for kind in sorted(by_kind)},
            "constraints_a_side": {str(n): carried[n] for n in sorted(carried)},
            "outcomes": dict(outcomes.most_common()),
        },
    )


def _of_prompt(
    seed: Seed,
    pair: Candidate | None,
    responses: Sequence[Sequence[Labelled]],
    quads: Quads,
    outcomes: Counter[str],
    of: Round,
) -> list[Row]:
    if of.kind == "quad":
        return quads.make(seed, pair, responses)
    makers: dict[str, Callable[[], Row | str | list[Row]]] = {
        "pair": lambda: best_and_worst(seed, responses[0], of.rounds.reward),
        "group": lambda: group(seed, responses[0], of.rounds.reward),
        "sft": lambda: right_ones(seed, responses[0]) or "none follows all and answers",
    }
    found = makers[of.kind]()
    if isinstance(found, str):
        outcomes[f"{of.kind}: {found}"] += 1
        return []
    rows = found if isinstance(found, list) else [found]
    outcomes[f"{of.kind}: accepted"] += len(rows)
    return rows


def replayed(rows: Sequence[Row], earlier: Sequence[Row], of: Round) -> list[Row]:
    """Rows of earlier rounds: `replay` of all, as far as there are so many."""
    share = of.rounds.replay
    own = {row["id"] for row in rows}
    pool = [row for row in earlier if row["id"] not in own]
    wanted = min(len(pool), round(len(rows) * share / (1 - share)))
    return random.Random(f"{of.seed}/replay/{of.number}").sample(pool, wanted)


def read_said(rows: Iterator[Row] | Sequence[Row]) -> Said:
    """The rows of responses.jsonl by key."""
    return {row["key"]: (row["text"], row["finish_reason"] == "stop") for row in rows}
