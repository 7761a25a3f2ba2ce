"""What a constraint is: one object that writes, checks and measures one rule about a text.

A kind is a frozen dataclass whose fields are its parameters, so constraints compare, hash and
travel as JSON; a class that adds no field needs no decorator of its own. Checks are pure functions
of the text. To add a kind, write the class and name its module in the package's `__init__.py`.
"""

import random
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, ClassVar

from iopo.constraints.text import han_characters

LANGUAGES = ("en", "zh")
RELATIONS = ("exactly", "at least", "at most")
RELATIONS_ZH = {"exactly": "恰好", "at least": "至少", "at most": "至多"}


def wordings(block: str) -> dict[str, tuple[str, ...]]:
    """language -> paraphrases, from a block of text: one a line, in English and in Chinese."""
    found: dict[str, tuple[str, ...]] = {"en": (), "zh": ()}
    for line in block.strip().splitlines():
        language = "zh" if han_characters(line) else "en"
        found[language] += (" ".join(line.split()),)  # the blanks of a continued line are one
    return found


KINDS: dict[str, type["Constraint"]] = {}  # every kind by name; a class with a `kind` joins it


@dataclass(frozen=True)
class Constraint:
    """One rule about a text. Subclasses set `kind` and `templates` and write `check`."""

    kind: ClassVar[str]
    dimension: ClassVar[str]  # of TRACE's taxonomy: our reading, none is published
    # Names of kinds that must not stand in one instruction with it, because few or no texts satisfy
    # both. One of two kinds says it. Several of one kind only if it is repeatable: mention this
    # word and that one. Both hold for the class itself, not for its subclasses.
    excludes: ClassVar[str] = ""
    repeatable: ClassVar[bool] = False
    # language -> at least four paraphrases, as str.format templates over `blanks(language)`
    templates: ClassVar[dict[str, tuple[str, ...]]]

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            KINDS[cls.kind] = cls

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as JSON values."""
        return {n: list(v) if isinstance(v, tuple) else v for n, v in vars(self).items()}

    @property
    def conflicts(self) -> frozenset[str]:
        """Kinds that must not stand beside this one in the same instruction."""
        return conflicts_of(self.kind)

    def paraphrases(self, language: str) -> tuple[str, ...]:
        """The templates `render` chooses from, for these parameters."""
        return self.templates[language]

    def blanks(self, language: str) -> dict[str, Any]:
        """The values that fill a template's blanks."""
        return self.params

    def render(self, language: str = "en", rng: random.Random | None = None) -> str:
        """The constraint as a sentence of an instruction; the first paraphrase without an `rng`."""
        choices = self.paraphrases(language)
        template = choices[0] if rng is None else rng.choice(choices)
        return template.format(**self.blanks(language))

    def check(self, text: str) -> bool:
        """Whether the text satisfies the constraint. An empty text is the caller's matter."""
        raise NotImplementedError

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        """Parameters for which `check(text)` is true and which are worth asking for, maybe none."""
        return []

    def alternatives(self, rng: random.Random) -> list["Constraint"]:
        """Constraints that no text satisfies together with this one, maybe none."""
        return []

    def edit(self, text: str, rng: random.Random) -> str | None:
        """The text changed by rule so that it satisfies the constraint; None where no rule does."""
        edited = self._edit(text, rng) if text.strip() else None
        return edited if edited and edited.strip() and self.check(edited) else None

    def _edit(self, text: str, rng: random.Random) -> str | None:
        """What the kind's rule makes of a text that is not blank. `edit` checks the result."""
        return None

    def _require(self, ok: bool, field: str, expected: str) -> None:
        if not ok:
            raise ValueError(
                f"constraint '{self.kind}': {field}={getattr(self, field)!r}; expected {expected}"
            )

    def _require_text(self, field: str, expected: str) -> None:
        value = getattr(self, field)
        self._require(isinstance(value, str) and bool(value.strip()), field, expected)


@cache
def conflicts_of(kind: str) -> frozenset[str]:
    """The kinds that must not stand beside this one, itself among them unless it is repeatable."""
    own = vars(KINDS[kind])
    found = set(own.get("excludes", "").split())
    found |= {name for name, cls in KINDS.items() if kind in vars(cls).get("excludes", "").split()}
    return frozenset(found if own.get("repeatable") else found | {kind})


@cache
def _made(kind: str, *values: Any) -> Any:
    """The constraint of a kind with these parameters, made once: to measure with."""
    return KINDS[kind](*values)


@dataclass(frozen=True)
class Counted(Constraint):
    """A constraint on how often something occurs: `count(text)` against (relation, number)."""

    relation: str
    number: int

    dimension = "Numerical"
    unit: ClassVar[tuple[str, str, str]]  # singular, plural, Chinese with its measure word
    # what measure() offers; large counts (words) make no sensible exact request
    measured_relations: ClassVar[tuple[str, ...]] = RELATIONS
    step: ClassVar[int] = 1  # measured bounds are rounded outwards to multiples of this
    smallest: ClassVar[int] = 1  # no request below this number, save none at all where it is 0

    templates = wordings("""
        Your answer must contain {relation} {number} {unit}.
        Write {relation} {number} {unit}.
        Use {relation} {number} {unit} in your response.
        The response should have {relation} {number} {unit}.
        Make sure that there {be} {relation} {number} {unit} in the reply.
        回答必须包含{relation}{number}{unit}。
        请写{relation}{number}{unit}。
        回复中应有{relation}{number}{unit}。
        请确保答案里有{relation}{number}{unit}。
        全文需使用{relation}{number}{unit}。
    """)
    templates_none: ClassVar[dict[str, tuple[str, ...]]] = wordings("""
        Do not use any {unit}.
        Your answer must not contain any {unit}.
        Write the response without any {unit}.
        Avoid {unit} entirely.
        There must be no {unit} in the reply.
        不要使用任何{unit_none}。
        回答中不得出现{unit_none}。
        请完全避免{unit_none}。
        全文不能有{unit_none}。
        回复里不允许有{unit_none}。
    """)

    def __post_init__(self) -> None:
        self._require(self.relation in RELATIONS, "relation", f"one of {RELATIONS}")
        whole = isinstance(self.number, int) and not isinstance(self.number, bool)
        self._require(whole and self.number >= 0, "number", "a whole number, 0 or more")

    def count(self, text: str) -> int:
        """How often the thing occurs in the text."""
        raise NotImplementedError

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return cls.bounds(_made(cls.kind, "exactly", 0).count(text))

    def check(self, text: str) -> bool:
        count = self.count(text)
        if self.relation == "exactly":
            return count == self.number
        return count >= self.number if self.relation == "at least" else count <= self.number

    def forbids_all(self) -> bool:
        """Whether the only count allowed is 0."""
        return self.number == 0 and self.relation != "at least"

    def paraphrases(self, language: str) -> tuple[str, ...]:
        return self.templates_none[language] if self.forbids_all() else self.templates[language]

    def blanks(self, language: str) -> dict[str, Any]:
        singular, plural, chinese = self.unit
        if language == "en":
            unit, be = (singular, "is") if self.number == 1 else (plural, "are")
            return {**self.params, "unit": unit, "be": be}
        none, relation = chinese.lstrip("个条段处次"), RELATIONS_ZH[self.relation]
        return {**self.params, "unit": chinese, "unit_none": none, "relation": relation}

    @classmethod
    def bounds(cls, measured: int) -> list[dict[str, Any]]:
        """(relation, number) pairs that are true of a measured count, rounded by `step`."""
        if measured == 0:
            return [{"relation": "exactly", "number": 0}] if cls.smallest == 0 else []
        found = []
        for relation in cls.measured_relations:
            number = measured
            if relation == "at least":
                number = measured // cls.step * cls.step
            elif relation == "at most":
                number = -(-measured // cls.step) * cls.step
            if number > 0 and number >= cls.smallest:
                found.append({"relation": relation, "number": number})
        return found

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        """The same thing counted so that the allowed ranges do not meet."""
        apart: list[tuple[str, int]] = []
        if self.relation != "at least":
            apart.append(("at least", self.number + self.step * rng.randint(1, 3)))
        if self.relation != "at most" and self.number > self.smallest:
            below = self.number - self.step * rng.randint(1, 3)
            apart.append(("at most", max(self.smallest, below)))
        return [
            replace(self, relation=relation, number=number)
            for bound, number in apart
            for relation in (bound, "exactly")
            if relation in self.measured_relations
        ]


@dataclass(frozen=True)
class Styled(Constraint):
    """Shared by kinds whose styles exclude one another: a text has at most one of them."""

    style: str

    # style -> its name in a sentence, in English and in Chinese
    styles: ClassVar[dict[str, tuple[str, str]]]

    def __post_init__(self) -> None:
        self._require(self.style in self.styles, "style", f"one of {tuple(self.styles)}")

    def blanks(self, language: str) -> dict[str, Any]:
        return {"name": self.styles[self.style][LANGUAGES.index(language)]}

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [{"style": style} for style in cls.styles if _made(cls.kind, style).check(text)]

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        return [type(self)(style) for style in self.styles if style != self.style]
