"""Quadruples <x1, y1, x2, y2> from texts: by editing them, by sampling. relabel.py measures them.

Whatever the source, a quad stands only if all four cells hold: y1 fits C1 and not C2, y2 fits C2
and not C1. Relaxing a constraint therefore never makes a quad: y1 would stay right for x2.
"""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Self

from iopo.constraints import Constraint, follows
from iopo.constraints import text as cut
from iopo.constraints.answers import hollow
from iopo.construct.proposals import measured, propose, sensible
from iopo.construct.prose import ends_a_sentence
from iopo.construct.tasks import Row, Task, digest, instruction, quad_row

CELLS = ("x1y1", "x1y2", "x2y2", "x2y1")
MATCH = (True, False, True, False)  # of the cells

# Kinds that a rule writes, in the order of their rules: what shortens first, what wraps all last.
_EDIT_ORDER = (
    "sentences", "words", "commas", "exclamations", "paragraphs", "bullets", "numbered_items",
    "sections", "highlights", "start_phrase", "end_phrase", "closing_note", "first_line_title",
    "case", "wrapped",
)  # fmt: skip
# In a title, no word at either end.
_SMALL = "a an the of for to at in on is are what how and or with by as it its about that who from"
# Begin a sentence with a small letter where a phrase before them leaves it open.
_BEGINNERS = "the a an to in this it if when as one while here there these for with by at on"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A quad before its instructions are written out."""

    task: Task
    c1: tuple[Constraint, ...]
    y1: str
    c2: tuple[Constraint, ...]
    y2: str
    source: str  # edit or follow

    def swapped(self) -> Self:
        return replace(self, c1=self.c2, y1=self.y2, c2=self.c1, y2=self.y1)


@dataclass
class Balance:
    """How often each kind stands in a file so far, and which lengths went together."""

    most_share: float
    kinds: Counter[str] = field(default_factory=Counter)
    total: int = 0
    together: int = 0  # quads whose longer instruction has the longer response, minus the others
    quads: int = 0
    steady: bool = False  # the bound on lengths does not grow: one of many parts of a file

    def order(self, kinds: Sequence[str], rng: random.Random) -> list[str]:
        """The kinds that are not full, rare ones first more often than not."""
        most = self._most()
        keyed = [(rng.random() * (4 + n), k) for k in kinds if (n := self.kinds[k]) <= most]
        return [kind for _, kind in sorted(keyed)]

    def has_room(self, kind: str) -> bool:
        """Whether both sides of a quad may have the kind without its share growing too large."""
        return self.kinds[kind] <= self._most()

    def _most(self) -> float:
        return self.most_share * max(self.total, 40) - 2

    def draw(self, kinds: Sequence[str], rng: random.Random) -> str:
        """One of the kinds; rare ones are preferred, so that none outgrows the others."""
        return rng.choices(kinds, [(4 + self.kinds[kind]) ** -2.5 for kind in kinds])[0]

    def would_tell(self, together: int) -> bool:
        """Whether one more quad of this sign lets lengths tell instructions apart."""
        return abs(self.together + together) > 3 + (0 if self.steady else 0.5 * self.quads**0.5)

    def add(self, kinds: Sequence[str], together: int) -> None:
        self.kinds.update(kinds)
        self.total += len(kinds)
        self.together += together
        self.quads += 1


def sign(number: int) -> int:
    """+1, 0 or -1."""
    return (number > 0) - (number < 0)


def four_cells(
    c1: Sequence[Constraint], y1: str, c2: Sequence[Constraint], y2: str
) -> tuple[bool, bool, bool, bool]:
    """Whether each response follows all constraints, for x1y1, x1y2, x2y2, x2y1."""
    x1y1, x1y2 = all(follows(c1, y1)), all(follows(c1, y2))
    return x1y1, x1y2, all(follows(c2, y2)), all(follows(c2, y1))


def edit(
    task: Task, first: str, second: str, kinds: Sequence[str], balance: Balance, rng: random.Random
) -> Candidate | str:
    """Change two texts (or one text twice) by rule so that each follows its own constraints.

    kinds: those that may be asked for. balance: of the file so far. A str says why it failed.
    """
    writable = [kind for kind in kinds if kind in _EDIT_ORDER]
    kind = balance.draw(writable, rng)
    other = kind if rng.random() < 0.6 else balance.draw(writable, rng)
    counts = len(cut.sentences(first)), len(cut.sentences(second))
    c1: tuple[Constraint, ...] = (propose(kind, rng, counts[0]),)
    c2: tuple[Constraint, ...] = (propose(other, rng, counts[1]),)
    if c1 == c2:
        return "the same constraint twice"
    if rng.random() < 0.3:  # a constraint in common tells that the differing one decides
        common = propose(balance.draw(writable, rng), rng, min(counts))
        c1, c2 = (*c1, common), (*c2, common)
    if not all(balance.has_room(c.kind) for c in (*c1, *c2)):
        return "kind is frequent enough"
    if not sensible(c1) or not sensible(c2):
        return "conflicting constraints"
    y1, y2 = (apply_edits(c, text, task, rng) for c, text in ((c1, first), (c2, second)))
    if y1 is None or y2 is None:
        return "no rule fits the text"
    allowed = [kind for kind in kinds if balance.has_room(kind)]
    c1 = _fill(c1, measured(y1, y2, allowed), balance, rng)
    c2 = _fill(c2, measured(y2, y1, allowed), balance, rng)
    candidate = Candidate(task, c1, y1, c2, y2, "edit")
    fault = _fault(candidate, "rule broke a constraint")
    if fault is not None:
        return fault
    c1, c2 = (tuple(rng.sample(c, len(c))) for c in (c1, c2))
    candidate = replace(candidate, c1=c1, c2=c2)
    return candidate.swapped() if rng.random() < 0.5 else candidate


def follow(candidate: Candidate, first: str, second: str) -> Candidate | str:
    """The instructions of `candidate` with responses that a model gave to them."""
    candidate = replace(candidate, y1=first, y2=second, source="follow")
    return _fault(candidate, "not followed") or candidate


def _fault(candidate: Candidate, broken: str) -> str | None:
    """Why the texts make no quad; `broken` where one does not follow its own constraints."""
    if not (ends_a_sentence(candidate.y1) and ends_a_sentence(candidate.y2)):
        return "unfinished"
    for c, y in ((candidate.c1, candidate.y1), (candidate.c2, candidate.y2)):
        x = instruction(candidate.task, [constraint.render() for constraint in c])
        if reasons := hollow(y, x, c):
            return f"no answer: {reasons[0]}"
    cells = four_cells(candidate.c1, candidate.y1, candidate.c2, candidate.y2)
    if cells == MATCH:
        return None
    return "follows both" if cells[0] and cells[2] else broken


def sides(candidate: Candidate) -> list[str]:
    """Both instructions, with the first wording of each constraint."""
    return [
        instruction(candidate.task, [constraint.render() for constraint in side])
        for side in (candidate.c1, candidate.c2)
    ]


def follow_jobs(candidate: Candidate, sample: int) -> dict[str, str]:
    """Both instructions, under keys made from them."""
    return {f"follow-{digest(prompt)}-{sample}": prompt for prompt in sides(candidate)}


def followed(candidate: Candidate, responses: Mapping[str, str], samples: int) -> Candidate | str:
    """The candidate with the first pair of sampled responses that passes all four cells.

    responses: by key of `follow_jobs`, without those that were cut off.
    """
    keys = zip(*(follow_jobs(candidate, n) for n in range(samples)), strict=True)  # by side
    said = [[responses[key] for key in side if key in responses] for side in keys]
    pairs = product(*([cut.after_thinking(text).strip() for text in side] for side in said))
    results = [follow(candidate, first, second) for first, second in pairs]
    found = next((r for r in results if isinstance(r, Candidate)), None)
    return found or (results[0] if results else "cut off")


def apply_edits(
    constraints: Sequence[Constraint], text: str, task: Task, rng: random.Random
) -> str | None:
    """The text changed by the rule of each constraint in turn; None where a rule does not apply."""
    edited: str | None = text
    for constraint in sorted(constraints, key=lambda c: _EDIT_ORDER.index(c.kind)):
        if edited is None:
            return None
        if constraint.kind == "first_line_title":
            # the rule titles a text by its first words: give it the task's instead
            title_line = constraint.edit(title_of(task), rng)
            edited = f"{title_line.splitlines()[0]}\n\n{edited}" if title_line else None
            continue
        if constraint.kind == "start_phrase":
            goes_on = not constraint.params["phrase"].endswith((".", "!", "?", ":"))
            if goes_on and edited.split(" ", 1)[0].lower() in _BEGINNERS.split():
                edited = edited[0].lower() + edited[1:]
        edited = constraint.edit(edited, rng)
    return edited


def title_of(task: Task) -> str:
    """A title from the last words of the task.

    >>> title_of(Task("Write a polite email asking a shop for a refund."))
    'Shop For A Refund'
    >>> title_of(Task("Explain what photosynthesis is.")), title_of(Task("Retell the text."))
    ('Photosynthesis', 'Retell The Text')
    """
    words = [word.strip(".,?!'\"") for word in task.description.split(". ")[0].split()][-4:]
    while len(words) > 1 and words[0].lower() in _SMALL.split():
        words = words[1:]
    while len(words) > 1 and words[-1].lower() in _SMALL.split():
        words = words[:-1]
    return " ".join(word[:1].upper() + word[1:] for word in words)


def _fill(
    chosen: tuple[Constraint, ...],
    found: Sequence[Constraint],
    balance: Balance,
    rng: random.Random,
) -> tuple[Constraint, ...]:
    """Add measured constraints until there are as many as the draw asks for, 1 to 3."""
    # phrases cut from an edited text (all capitals, bullets) make odd requests
    quoting = ("start_phrase", "end_phrase", "first_word", "last_word")
    wanted = rng.choices((1, 2, 3), (0.4, 0.4, 0.2))[0]
    while len(chosen) < wanted:
        taken = {*quoting, *(c.kind for c in chosen)}
        fitting = [c for c in found if c.kind not in taken and sensible((*chosen, c))]
        if not fitting:
            break
        # one of them: the kind by its weight, then any constraint of the kind
        kind = balance.draw(sorted({c.kind for c in fitting}), rng)
        chosen = (*chosen, rng.choice([c for c in fitting if c.kind == kind]))
    return chosen


def constraint_rows(side: Iterable[tuple[Constraint, str]]) -> list[Row]:
    """Constraints, each with its sentence in the instruction, as in c1 and c2."""
    return [{"kind": c.kind, "params": c.params, "text": text} for c, text in side]


def to_row(candidate: Candidate, split: str) -> Row:
    """The quad as a row of the data file; a pure function of the candidate.

    A constraint in common reads the same on both sides. Followed instructions stay as the model saw
    them, in the first paraphrase; others get a random one.
    """
    y1, y2 = candidate.y1, candidate.y2
    rng = None if candidate.source == "follow" else random.Random(f"{y1}\x1f{y2}")
    written = {c: c.render("en", rng) for c in dict.fromkeys((*candidate.c1, *candidate.c2))}
    c1, c2 = (
        constraint_rows((c, written[c]) for c in side) for side in (candidate.c1, candidate.c2)
    )
    end = {"source": candidate.source, "split": split, "match": [int(cell) for cell in MATCH]}
    return quad_row(candidate.task, c1, y1, c2, y2) | end
