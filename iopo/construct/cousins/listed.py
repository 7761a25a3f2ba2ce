"""Changes to a side of a quad: a task with a numbered list of constraints in our own wordings.

The side's response follows the constraints, so it, or what a constraint's rule makes of it, shows
that a cousin with another constraint can be followed.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from iopo.constraints import MEASURED_KINDS, Constraint, follows, from_dict, make
from iopo.constraints.text import han_characters
from iopo.construct.contrast import measured
from iopo.construct.cousins import Asked, distractors

_ALWAYS = ("at least", 1)


class Listed:
    """x1 or x2 of a quad. Raises ValueError where code cannot read it."""

    def __init__(self, row: Mapping[str, Any], side: int):
        self.prompt, rows = row[f"x{side}"], row[f"c{side}"]
        if not isinstance(self.prompt, str) or row.get("system"):
            raise ValueError("a prompt of several turns or with a system prompt")
        self.response, self.other = row[f"y{side}"], row[f"y{3 - side}"]
        self.texts = [str(constraint.get("text")) for constraint in rows]
        if not rows or self.prompt.count(_listed(self.texts)) != 1:
            raise ValueError("its constraints do not stand as a numbered list")
        self.constraints = [from_dict(constraint) for constraint in rows]
        self.language = "zh" if any(map(han_characters, self.texts)) else "en"
        self.asked = self._asked(self.texts, self.constraints)

    def _asked(self, texts: Sequence[str], constraints: Sequence[Constraint]) -> Asked:
        """The prompt with this list; these constraints are checked."""
        prompt = self.prompt.replace(_listed(self.texts), _listed(texts))
        pairs = [(constraint.kind, constraint.params) for constraint in constraints]
        return Asked(prompt, *zip(*pairs, strict=True))

    def reworded(self, rng: random.Random) -> Asked | str:
        """Every constraint in another of its kind's wordings."""
        texts = []
        for constraint, text in zip(self.constraints, self.texts, strict=True):
            blanks = constraint.blanks(self.language)
            others = [t.format(**blanks) for t in constraint.paraphrases(self.language)]
            texts.append(rng.choice([other for other in others if other != text]))
        return self._asked(texts, self.constraints)

    def reordered(self, rng: random.Random) -> Asked | str:
        """The list in another order."""
        if len(self.texts) < 2:
            return "only one constraint"
        texts = rng.sample(self.texts, len(self.texts))
        if texts == self.texts:
            texts = texts[1:] + texts[:1]
        return self._asked(texts, self.constraints)

    def distractor(self, rng: random.Random) -> Asked | str:
        """One more constraint in the list, which is not checked."""
        for new in distractors(self.prompt, self.constraints, rng):
            if self._can_be_followed([*self.constraints, new], new, rng):
                at = rng.randint(0, len(self.texts))
                texts = [*self.texts[:at], new.render(self.language, rng), *self.texts[at:]]
                return self._asked(texts, self.constraints)
        return "no constraint that a text follows together with its own"

    def parameter(self, rng: random.Random) -> Asked | str:
        """One constraint with other parameters, in the same wording."""
        for i in rng.sample(range(len(self.constraints)), len(self.constraints)):
            old = self.constraints[i]
            found = [*old.alternatives(rng), *self._measured(old.kind)]
            rng.shuffle(found)
            for new in found:
                if new.kind != old.kind or new in self.constraints:
                    continue
                constraints = [*self.constraints[:i], new, *self.constraints[i + 1 :]]
                if self._can_be_followed(constraints, new, rng):
                    texts = [*self.texts[:i], self._in_wording(i, new, rng), *self.texts[i + 1 :]]
                    return self._asked(texts, constraints)
        return "no other parameters that a text follows together with its own"

    def _measured(self, kind: str) -> list[Constraint]:
        """Constraints of the kind that the response follows, save those that all texts do."""
        found = measured(kind, self.response, self.other) if kind in MEASURED_KINDS else []
        made = [make(kind, **params) for params in found]
        return [c for c in made if (c.params.get("relation"), c.params.get("number")) != _ALWAYS]

    def _can_be_followed(
        self, constraints: Sequence[Constraint], new: Constraint, rng: random.Random
    ) -> bool:
        texts = self.response, new.edit(self.response, rng)
        return any(text is not None and all(follows(constraints, text)) for text in texts)

    def _in_wording(self, i: int, new: Constraint, rng: random.Random) -> str:
        """The new constraint in the wording of the i-th one, if it has that one too."""
        old, language = self.constraints[i], self.language
        blanks = old.blanks(language)
        for wording in old.paraphrases(language):
            if wording.format(**blanks) == self.texts[i] and wording in new.paraphrases(language):
                return wording.format(**new.blanks(language))
        return new.render(language, rng)


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"{n}. {text}" for n, text in enumerate(texts, 1))
