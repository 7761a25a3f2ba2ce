"""Cousins of a prompt: other prompts for the same intent, made by code, to measure reliability.

Four changes. reworded: other words for the same constraints. reordered: the constraints in another
order. distractor: one more constraint, compatible with the others, which is not scored, as in
IFEval++ (arXiv 2512.14754). parameter: another number, word or style in one constraint. Only the
last changes what is checked.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from iopo.constraints import Constraint, from_name, make
from iopo.constraints import text as cut
from iopo.constraints.base import Counted
from iopo.constraints.keywords import ForbidWords
from iopo.constraints.wording import COMMON_WORDS

# Words that fit in a text about anything.
NEUTRAL_WORDS = (
    "garden window river music winter bridge market mirror silver travel morning holiday kitchen "
    "summer paper island journey village season shadow"
).split()


@dataclass(frozen=True)
class Asked:
    """A prompt and what is checked of its answers, in IFEval's schema.

    An id without a colon is a kind of iopo.constraints, its kwargs the kind's parameters.
    """

    prompt: str
    ids: tuple[str, ...]
    kwargs: tuple[dict[str, Any], ...]

    @property
    def constraints(self) -> list[Constraint]:
        """Raises ValueError on an unknown id or bad kwargs."""
        return [from_name(name, given) for name, given in zip(self.ids, self.kwargs, strict=True)]

    def row(self) -> dict[str, Any]:
        ids, kwargs = list(self.ids), list(self.kwargs)
        return {"prompt": self.prompt, "instruction_id_list": ids, "kwargs": kwargs}


def distractors(
    prompt: str, constraints: Sequence[Constraint], rng: random.Random
) -> Iterator[Constraint]:
    """Constraints that may be added to these, in random order; to a fixed answer only bans."""
    said = set(cut.lower_words(prompt))
    unsaid = [word for word in COMMON_WORDS if word not in said]
    found = [make("forbid_words", words=[word]) for word in rng.sample(unsaid, min(2, len(unsaid)))]
    found.append(make("exclamations", relation="exactly", number=0))
    if not any(constraint.kind == "constrained_response" for constraint in constraints):
        found += [make("include_words", words=[w]) for w in rng.sample(NEUTRAL_WORDS, 2)]
        found.append(make("highlights", relation="at least", number=rng.randint(1, 2)))
    rng.shuffle(found)
    for new in found:
        if all(fit_together(new, old) for old in constraints):
            yield new


def fit_together(first: Constraint, second: Constraint) -> bool:
    """Whether the kinds may stand in one instruction, and neither bans what the other asks for."""
    kinds = second.kind in first.conflicts or first.kind in second.conflicts
    return not kinds and not contradict(first, second)


def contradict(first: Constraint, second: Constraint) -> bool:
    """Whether what one of them asks for, word by word, is banned by the other."""
    pairs = ((first, second), (second, first))
    return any(_bans(one) and not one.check(text) for one, two in pairs if (text := _needed(two)))


def _bans(constraint: Constraint) -> bool:
    if isinstance(constraint, ForbidWords):
        return True
    marks = ("letter_frequency", "commas", "questions", "exclamations", "capital_words")
    banning = (*marks, "word_frequency", "keyword_frequency", "words")
    return (
        isinstance(constraint, Counted)
        and constraint.kind in banning
        and constraint.relation != "at least"
    )


def _needed(constraint: Constraint) -> str:
    """The text that every answer must contain, as far as the parameters spell it out."""
    params = constraint.params
    if isinstance(constraint, ForbidWords) or params.get("relation") == "at most":
        return ""
    times = params.get("number", 1)
    words = [*params.get("words", ()), *(params.get("word", ""), params.get("letter", "")) * times]
    texts = [params.get(name, "") for name in ("phrase", "marker", "splitter")]
    return " ".join(text for text in (*words, *texts) if text)
