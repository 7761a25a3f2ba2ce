"""Constraints to ask for: which kinds, and which parameters."""

import random
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

from iopo.constraints import (
    KINDS,
    MEASURED_KINDS,
    Constraint,
    Value,
    compatible,
    make,
    value_of,
    wording,
)
from iopo.constraints.base import Styled
from iopo.constraints.structure import ClosingNote
from iopo.construct import contrast

# Kinds of the training split. All but four can be written into a text by rule.
SEEN_KINDS = (
    "case", "sentences", "words", "paragraphs", "bullets", "commas", "exclamations", "wrapped",
    "start_phrase", "end_phrase", "first_line_title",
    "first_word", "last_word", "include_words", "forbid_words",
)  # fmt: skip
# Those of them that `propose` knows.
PROPOSED_KINDS = SEEN_KINDS[:11]
# Kinds that only the held-out split has.
UNSEEN_KINDS = ("numbered_items", "closing_note", "highlights", "sections")

MOST_DRAWN = 5  # constraints of one prompt
_TRIES = 1000  # of a draw; nine in ten end at the first

_MEASURED = (
    "sentences", "words", "paragraphs", "bullets", "commas",
    "start_phrase", "first_word", "last_word", "include_words",
)  # fmt: skip
_EXACT_COUNTS = {
    "sentences": (1, 2, 3, 4, 5),
    "paragraphs": (2, 3, 4),
    "bullets": (2, 2, 3, 3, 4, 5),
    "exclamations": (0, 1, 2, 3, 4),
    "numbered_items": (2, 3, 4),
    "highlights": (1, 2, 3),
    "sections": (2, 3, 4),
}
# Satisfiable together, but odd: a title line or a heading would count as a paragraph or sentence.
_ODD_TOGETHER = tuple(
    frozenset((counted, added))
    for counted in ("sentences", "paragraphs", "words")
    for added in ("first_line_title", "sections", "closing_note")
)

OPENINGS = (
    *wording.OPENINGS,
    "Here is what I know:", "First of all,", "Sure, here it is:", "Let me explain:", "Hello there!",
    "In my opinion,", "Of course!", "Good question!", "Simply put,", "Believe it or not,",
    "As you may know,", "Listen carefully:", "Here we go:", "My friend,", "To be honest,",
    "In a nutshell,", "You asked, so here it is:", "Allow me to answer:", "Welcome!", "Take note:",
    "It is well known that", "Once upon a time,", "Here are my thoughts:", "A quick reply:",
)  # fmt: skip
CLOSINGS = (
    "That is all.", "I hope this helps.", "Have a wonderful day!", "The end.",
    "Thank you for reading.", "Is there anything else?", "Let me know what you think.",
    "Best of luck!", "Over and out.", "Hope you enjoyed it.", "Feel free to ask more.",
    "See you soon!", "Take care!", "Stay curious.", "And that is the whole story.",
    "Now you know.", "What do you think?", "Enjoy!", "Keep smiling.", "With kind regards.",
    "Ask me anything else.", "This is the final word.", "Until next time!", "Good luck with it.",
    "Have fun!", "Nothing more to add.", "I rest my case.", "Cheers!", "Any other questions?",
    "Thanks for your time.", "Be well.", "Case closed.",
)  # fmt: skip


def sensible(constraints: Sequence[Constraint]) -> bool:
    """Whether a person might ask for all of them at once."""
    kinds = {constraint.kind for constraint in constraints}
    return compatible(constraints) and not any(pair <= kinds for pair in _ODD_TOGETHER)


def propose(kind: str, rng: random.Random, sentences: int) -> Constraint:
    """A constraint of this kind that `Constraint.edit` can write into most texts.

    sentences: of the text, since no rule makes four bullets out of three sentences.
    """
    if kind in _EXACT_COUNTS:
        numbers = _EXACT_COUNTS[kind]
        if kind not in ("highlights", "exclamations"):
            numbers = tuple(n for n in numbers if n <= sentences) or numbers[:1]
        number = rng.choice(numbers)
        extra = {"splitter": rng.choice(("Section", "Part"))} if kind == "sections" else {}
        return make(kind, relation="exactly", number=number, **extra)
    if kind == "words":
        return make(kind, relation="at most", number=rng.choice((10, 20, 30, 40)))
    if kind == "commas":
        return make(kind, relation="exactly", number=0)
    if kind == "start_phrase":
        return make(kind, phrase=rng.choice(OPENINGS))
    if kind == "end_phrase":
        return make(kind, phrase=rng.choice(CLOSINGS))
    if kind == "closing_note":
        return make(kind, marker=rng.choice(ClosingNote.MARKERS))
    cls = KINDS[kind]
    assert issubclass(cls, Styled), f"no rule writes {kind!r}"
    return cls(rng.choice(tuple(cls.styles)))


def draw(
    number: int, rng: random.Random, refused: Callable[[Constraint], bool] = lambda c: False
) -> list[Constraint]:
    """So many constraints of different kinds, 1 to MOST_DRAWN, none of which is refused.

    All of them fit texts of 2 to 5 sentences, the same number for all. Raises ValueError if too
    much is refused.
    """
    for _ in range(_TRIES):
        sentences = rng.randint(2, 5)
        chosen: list[Constraint] = []
        for kind in rng.sample(PROPOSED_KINDS, len(PROPOSED_KINDS)):
            new = propose(kind, rng, sentences)
            fits = _fits(kind, new.params.get("number"), sentences) and not refused(new)
            if fits and sensible([*chosen, new]):
                chosen.append(new)
            if len(chosen) == number:
                return chosen
    raise ValueError(f"too few constraints may be asked for to draw {number} of them")


def _fits(kind: str, number: int | None, sentences: int) -> bool:
    if number is None or kind == "commas":
        return True
    if kind == "words":
        return number >= 8 * sentences
    return number == sentences if kind == "sentences" else number <= sentences


def unseen(row: Mapping[str, Any], seen: Container[Value], seen_kinds: Container[str]) -> str:
    """What training, which had these values and kinds, never saw of a row with c1 and c2."""
    asked = [*row["c1"], *row["c2"]]
    if any(c["kind"] not in seen_kinds for c in asked):
        return "unseen_kinds"
    return "seen" if all(value_of(c) in seen for c in asked) else "unseen_params"


def measured(text: str, other: str, kinds: Sequence[str]) -> list[Constraint]:
    """Constraints true of `text` that are worth asking for, in a fixed order.

    Left out are those that hold for nearly every text (no bullets, at most 90 words for a text
    of 20). Words that only `other` has may be forbidden.
    """
    found = [
        make(kind, **params)
        for kind in _MEASURED
        if kind in kinds
        for params in MEASURED_KINDS[kind].measure(text)
        if _worth_asking(kind, params)
    ]
    if "forbid_words" in kinds:
        unused = contrast.measured("forbid_words", text, other)
        found += [make("forbid_words", **params) for params in unused]
    return found


def _worth_asking(kind: str, params: dict) -> bool:
    number, relation = params.get("number", 0), params.get("relation")
    if kind == "commas":
        return number == 0 or (relation == "at least" and number <= 3)
    if kind in ("bullets", "paragraphs"):
        return relation == "exactly" and 2 <= number <= 5
    if kind == "sentences":
        return number <= 5 and (relation, number) != ("at least", 1)
    if kind == "words":
        return (relation, number) != ("at least", 10)
    if kind in ("first_word", "last_word"):
        return len(params["word"]) > 1
    return True
