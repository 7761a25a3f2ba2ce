"""What tells two texts apart, kind by kind: what one of them follows and the other does not."""

import random
import re
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from heapq import nlargest
from operator import itemgetter
from typing import Any

from iopo.constraints import MEASURED_KINDS, Constraint
from iopo.constraints import text as cut
from iopo.constraints.base import RELATIONS, conflicts_of

KINDS = {
    "en": (
        "words", "sentences", "lines", "paragraphs", "bullets", "numbered_items", "highlights",
        "commas", "questions", "exclamations", "capital_words", "placeholders", "first_word",
        "last_word", "start_phrase", "end_phrase", "include_words", "forbid_words",
        "word_frequency", "layout", "wrapped", "case",
    ),
    "zh": (
        "han_characters", "sentences", "lines", "paragraphs", "bullets", "numbered_items",
        "highlights", "commas", "questions", "exclamations", "placeholders", "layout", "wrapped",
    ),
}  # fmt: skip
# A prompt that speaks of it may ask for it already, and then for something else than we would.
_MENTIONED = {
    "words": r"words?\b", "sentences": r"sentences?\b", "paragraphs": r"paragraphs?\b",
    "lines": r"lines?\b", "bullets": r"bullet|list", "numbered_items": r"list|number|step",
    "layout": r"list|table|json|bullet|format|markdown", "case": r"case\b|capital",
    "questions": r"questions?\b", "highlights": r"highlight|bold|markdown",
    "placeholders": r"placeholder|template", "han_characters": "字", "include_words": r"words?\b",
}  # fmt: skip
_MOST_EXACT = 12  # nobody counts more exactly
_FREQUENT = 3  # words whose number of uses may be asked for


def measured(kind: str, text: str, other: str) -> list[dict[str, Any]]:
    """Parameters of a kind that hold for `text` and are worth asking for, in a fixed order."""
    if kind == "forbid_words":  # to avoid a word is a request only if someone would use it
        own = set(cut.lower_words(text))
        words = MEASURED_KINDS["include_words"].measure(other)
        return [params for params in words if params["words"][0] not in own]
    if kind == "word_frequency":  # of the words used most; to count all of them takes long
        uses = Counter(cut.lower_words(text)).items()
        long = [(word, n) for word, n in uses if len(word) > 4]
        return [
            {"relation": r, "number": n, "word": word}
            for word, n in nlargest(_FREQUENT, long, key=itemgetter(1))
            if 1 < n <= _MOST_EXACT
            if n == cut.uses(text, word)  # not beside an apostrophe or a digit
            for r in RELATIONS
        ]
    found = MEASURED_KINDS[kind].measure(text)
    if kind == "include_words":
        return found
    return [
        params
        for params in found
        if params.get("relation") != "exactly" or params["number"] <= _MOST_EXACT
        if len(params.get("word", "long")) > 1
    ]


def unmentioned(kinds: Iterable[str], prompt: str) -> list[str]:
    """The kinds that the prompt does not speak of."""
    mentioned = _mentioned(prompt)
    return [kind for kind in kinds if kind not in mentioned]


@lru_cache(maxsize=8)
def _mentioned(prompt: str) -> frozenset[str]:
    prompt = prompt.lower()
    return frozenset(kind for kind, pattern in _MENTIONED.items() if re.search(pattern, prompt))


def tell_apart(
    first: str, second: str, kinds: Iterable[str], rng: random.Random
) -> tuple[Constraint, Constraint] | None:
    """A constraint that only `first` follows and one that only `second` follows; None: none.

    Kinds are measured one at a time, until both sides have one: most rows need few.
    """
    only: list[Constraint | None] = [None, None]
    for kind in kinds:
        for side, (text, other) in enumerate(((first, second), (second, first))):
            only[side] = only[side] or _only(kind, text, other, rng)
        if only[0] and only[1]:
            return only[0], only[1]
    return None


def _only(kind: str, text: str, other: str, rng: random.Random) -> Constraint | None:
    """Some constraint of the kind that `text` follows and `other` does not, if there is one."""
    found = measured(kind, text, other)
    start = int(rng.random() * len(found))  # cheaper than a shuffle, and as good here
    for params in (*found[start:], *found[:start]):
        constraint = MEASURED_KINDS[kind](**params)
        if not constraint.check(other):
            return constraint
    return None


def fill(
    first: Constraint, text: str, kinds: Iterable[str], number: int, rng: random.Random
) -> list[Constraint]:
    """`first` and further constraints of other kinds that hold for the text, up to `number`.

    That something does not occur at all (no bullets) holds for most texts and is no filler.
    """
    chosen = [first]
    taken = {first.kind}
    for kind in kinds:
        if len(chosen) == number:
            break
        if kind in taken or kind == "forbid_words" or conflicts_of(kind) & taken:
            continue
        found = [params for params in measured(kind, text, text) if params.get("number") != 0]
        if found:
            chosen.append(MEASURED_KINDS[kind](**rng.choice(found)))
            taken.add(kind)
    return chosen
