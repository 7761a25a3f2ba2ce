"""The demo set: training and held-out quads from cached responses, the same for the same seed."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from iopo.constraints import Constraint
from iopo.constraints import text as cut
from iopo.construct.proposals import SEEN_KINDS, UNSEEN_KINDS, held_out, kinds_with_reserved
from iopo.construct.prose import balanced, whole_sentences
from iopo.construct.quadruples import (
    Candidate,
    Choice,
    Rejection,
    edit,
    follow,
    kinds_of,
    relabel,
    to_row,
    wordings,
)
from iopo.construct.responses import Job, Response
from iopo.construct.tasks import Task, instruction

LEAST_WORDS, MOST_WORDS = 6, 60  # of a response; before edits at most MOST_WORDS - 10
ATTEMPTS = 100  # draws for one task in one round before the next task has its turn
Bases = Mapping[str, Sequence[tuple[str, ...]]]  # task line -> responses as whole sentences


@dataclass(frozen=True, slots=True)
class Part:
    """What one split is made of."""

    split: str
    quads: int
    relabel_share: float  # of the quads tried; the others are edits
    kinds: tuple[str, ...]
    reserved: bool | None  # only reserved parameters, only unreserved ones, or None: any

    def allowed(self, constraint: Constraint) -> bool:
        return self.reserved is None or held_out(constraint) == self.reserved


TRAIN = Part("train", 800, 0.5, SEEN_KINDS, reserved=False)
HELDOUT = (
    Part("seen", 90, 0.4, SEEN_KINDS, reserved=False),
    Part("unseen_params", 60, 0.4, kinds_with_reserved(SEEN_KINDS), reserved=True),
    Part("unseen_kinds", 80, 0.0, UNSEEN_KINDS, reserved=None),
)


@dataclass
class Tally:
    """Attempts and acceptances, by source and outcome and by source and kind."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    tried: Counter[tuple[str, str]] = field(default_factory=Counter)
    accepted: Counter[tuple[str, str]] = field(default_factory=Counter)

    def count(self, source: str, result: Candidate | Rejection, refusal: str | None = None) -> None:
        kinds = set(result.kinds if isinstance(result, Rejection) else kinds_of(result))
        self.tried.update((source, kind) for kind in kinds)
        if isinstance(result, Rejection):
            refusal = result.reason
        if refusal is None:
            self.accepted.update((source, kind) for kind in kinds)
        self.outcomes[source, refusal or "accepted"] += 1


class Collection:
    """The quads of one file so far, and whether another one may join them."""

    def __init__(self) -> None:
        self.drafts: list[tuple[Candidate, str]] = []  # with the split's name
        self.kinds: Counter[str] = Counter()
        self._texts: set[str] = set()
        self._longer_together = 0

    def weight(self, kind: str) -> float:
        """Rare kinds are preferred, so that none outgrows the others."""
        return (4 + self.kinds[kind]) ** -2.5

    def refusal(self, draft: Candidate) -> str | None:
        """Why the quad may not join; None if it may."""
        if len({draft.y1, draft.y2} | self._texts) < len(self._texts) + 2:
            return "repeated response"
        lengths = [len(cut.words(y)) for y in (draft.y1, draft.y2)]
        if min(lengths) < LEAST_WORDS or max(lengths) > MOST_WORDS:
            return "too short or too long"
        if abs(self._longer_together + _longer_together(draft)) > 3:
            return "length would tell"
        return None

    def add(self, draft: Candidate, split: str) -> None:
        self.drafts.append((draft, split))
        self.kinds += kinds_of(draft)
        self._texts |= {draft.y1, draft.y2}
        self._longer_together += _longer_together(draft)

    def rows(self) -> list[dict]:
        return [to_row(draft, split) for draft, split in self.drafts]


def bases_of(
    tasks: Sequence[Task], responses: Iterable[Response], tally: Counter[str]
) -> dict[str, list[tuple[str, ...]]]:
    """Usable responses by task line, and in `tally` how many were usable or why not."""
    lines = {task.digest: task.line for task in tasks}
    found: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for response in responses:
        sentences = whole_sentences(response.text, MOST_WORDS - 10)
        tally[sentences if isinstance(sentences, str) else "usable"] += 1
        if not isinstance(sentences, str):
            found[lines[response.key.partition("-")[0]]].append(sentences)
    return dict(found)


def is_heldout(task: Task) -> bool:
    """A quarter of the tasks, by hash: the split does not move when tasks are added."""
    return int(task.key, 16) % 4 == 0


def collect(
    parts: Sequence[Part],
    tasks: Sequence[Task],
    bases: Bases,
    rng: random.Random,
    tally: Tally,
    followed: Sequence[Candidate] = (),
) -> Collection:
    """Draw quads for every part, one task after the other; `followed` ones join the first part.

    Raises ValueError if the responses are used up before a part is full.
    """
    collection = Collection()
    for draft in followed:
        if collection.refusal(draft) is None:
            collection.add(draft, parts[0].split)
    usable = [task for task in tasks if task.line in bases]
    full = 0
    for part in parts:
        full += part.quads
        choice = Choice(part.kinds, part.allowed, collection.weight)
        for _ in range(12):  # rounds; a round gives each task at most one quad
            for task in rng.sample(usable, len(usable)):
                if len(collection.drafts) == full:
                    break
                drawn = _draw(task, bases[task.line], part, choice, collection, rng, tally)
                if drawn is not None:
                    collection.add(drawn, part.split)
        if len(collection.drafts) < full:
            raise ValueError(
                f"split '{part.split}': {len(collection.drafts) - full + part.quads} quads from "
                f"{len(usable)} tasks, expected {part.quads}; sample more responses or "
                "ask for fewer quads"
            )
    return collection


def _draw(
    task: Task,
    bases: Sequence[tuple[str, ...]],
    part: Part,
    choice: Choice,
    collection: Collection,
    rng: random.Random,
    tally: Tally,
) -> Candidate | None:
    """One quad for the task, or None if no draw gives one."""
    source = relabel if len(bases) > 1 and rng.random() < part.relabel_share else edit
    for _ in range(ATTEMPTS):
        two = len(bases) > 1 and (source is relabel or rng.random() < 0.5)
        first, second = rng.sample(bases, 2) if two else (rng.choice(bases),) * 2
        result = source(task, _some(first, rng), _some(second, rng), choice, rng)
        refusal = None if isinstance(result, Rejection) else collection.refusal(result)
        tally.count(source.__name__, result, refusal)
        if isinstance(result, Candidate) and refusal is None:
            return result
    return None


def follow_candidates(
    quads: int, tasks: Sequence[Task], bases: Bases, seed: int
) -> list[Candidate]:
    """Instruction pairs to sample responses for; the responses they carry are not used.

    Few constraints each: a small model seldom follows many.
    """
    part = Part("train", 4 * quads, 0.5, SEEN_KINDS, reserved=False)
    drafts = [
        draft for draft, _ in collect([part], tasks, bases, random.Random(seed), Tally()).drafts
    ]
    return [draft for draft in drafts if len(draft.c1) + len(draft.c2) <= 3][:quads]


def follow_jobs(candidates: Sequence[Candidate], samples: int) -> list[Job]:
    """Both instructions of every candidate, `samples` times each, named by their text."""
    return [
        Job(_follow_key(prompt, n), prompt)
        for n in range(samples)
        for draft in candidates
        for prompt in _plain_instructions(draft)
    ]


def followed(
    candidates: Sequence[Candidate], responses: Mapping[str, Response], samples: int
) -> list[Candidate | Rejection]:
    """Each candidate with the first pair of sampled responses that passes all four cells."""
    found = []
    for draft in candidates:
        side1, side2 = (
            [responses[_follow_key(prompt, n)].text.strip() for n in range(samples)]
            for prompt in _plain_instructions(draft)
        )
        results = [follow(draft, first, second) for first, second in product(side1, side2)]
        found.append(next((r for r in results if isinstance(r, Candidate)), results[0]))
    return found


def _plain_instructions(draft: Candidate) -> list[str]:
    return [instruction(draft.task, [c.render() for c in side]) for side in (draft.c1, draft.c2)]


def _follow_key(prompt: str, sample: int) -> str:
    return f"follow-{hashlib.sha256(prompt.encode()).hexdigest()[:12]}-{sample}"


def write_rows(path: Path, rows: Iterable[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _some(sentences: Sequence[str], rng: random.Random) -> str:
    """All sentences or, half of the time, the first ones: so lengths vary."""
    kept = len(sentences) if rng.random() < 0.5 else rng.randint(1, len(sentences))
    text = " ".join(sentences[:kept])
    return text if balanced(text) else " ".join(sentences)


def _longer_together(draft: Candidate) -> int:
    """+1 if the longer instruction has the longer response, -1 if the shorter one, else 0."""
    _, x1, x2 = wordings(draft)
    sign_x = (len(x1) > len(x2)) - (len(x1) < len(x2))
    sign_y = (len(draft.y1) > len(draft.y2)) - (len(draft.y1) < len(draft.y2))
    return sign_x * sign_y
