"""Kinds that count marks, letters and marked spans."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from iopo.constraints.base import Counted, wordings

_HIGHLIGHT = re.compile(r"\*[^\n\*]*\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*[^\n\*]*\*\*")
_CAPITALS = re.compile(r"\b[A-Z]{2,}\b")
_TO_CAPITALS = str.maketrans({chr(code): "A" if 65 <= code <= 90 else " " for code in range(128)})


class Placeholders(Counted):
    """Number of [placeholders]; IFEval's number_placeholders."""

    kind = "placeholders"
    unit = (
        "placeholder in square brackets, such as [address]",
        "placeholders in square brackets, such as [address]",
        "个用方括号表示的占位符，例如[地址]",
    )
    smallest = 0

    def count(self, text: str) -> int:
        if "[" not in text:
            return 0
        # the matches of \[.*?\], in linear time: each ends at the next ], so one a part at most
        return sum("[" in part for line in text.split("\n") for part in line.split("]")[:-1])

    def _edit(self, text: str, rng: random.Random) -> str | None:
        plain = text.replace("[", "").replace("]", "")
        names = ["name", "date", "place", "number", "topic", "title", "email", "reason"]
        if self.forbids_all() or self.number > len(names):
            return plain
        chosen = rng.sample(names, self.number)
        return plain.rstrip() + " " + " ".join(f"[{name}]" for name in chosen)


class Highlights(Counted):
    """Number of *highlighted* spans; IFEval's number_highlighted_sections."""

    kind = "highlights"
    dimension = "Text pattern"
    unit = (
        "part highlighted with asterisks, like *this part*",
        "parts highlighted with asterisks, like *this part*",
        "处用星号标出的内容，例如*重点内容*",
    )
    smallest = 0

    def count(self, text: str) -> int:
        """Spans between single asterisks plus spans between double ones, empty ones left out."""
        if "*" not in text:
            return 0
        single = (span.strip("*") for span in _HIGHLIGHT.findall(text))
        double = (span[2:-2] for span in _DOUBLE_HIGHLIGHT.findall(text))
        return sum(1 for span in (*single, *double) if span.strip())

    def _edit(self, text: str, rng: random.Random) -> str | None:
        plain = text.replace("*", "")
        return _changed(plain, r"[^\W\d_]{4,}", self.number, rng, "*{}*".format)


def _changed(
    text: str, pattern: str, number: int, rng: random.Random, change: Callable[[str], str]
) -> str | None:
    """The text with `change` at `number` random matches of the pattern; None: too few matches."""
    spots = list(re.finditer(pattern, text))
    if len(spots) < number:
        return None
    for spot in sorted(rng.sample(spots, number), key=lambda spot: -spot.start()):
        text = text[: spot.start()] + change(spot.group()) + text[spot.end() :]
    return text


class _Marks(Counted):
    """Number of times any of `marks` occurs; shared by commas, questions, exclamations."""

    marks: ClassVar[str]
    replacement: ClassVar[str]
    smallest = 0

    def count(self, text: str) -> int:
        return sum(map(text.count, self.marks))

    def _edit(self, text: str, rng: random.Random) -> str | None:
        if self.forbids_all():
            for mark in self.marks:
                text = text.replace(mark, self.replacement)
        return text


class Commas(_Marks):
    """Number of commas, English and Chinese ones."""

    kind = "commas"
    unit = ("comma", "commas", "个逗号")
    marks = ",，"
    replacement = ""


class Questions(_Marks):
    """Number of question marks."""

    kind = "questions"
    unit = ("question mark", "question marks", "个问号")
    marks = "?？"
    replacement = "."


class Exclamations(_Marks):
    """Number of exclamation marks."""

    kind = "exclamations"
    excludes = "questions"
    unit = ("exclamation mark", "exclamation marks", "个感叹号")
    marks = "!！"
    replacement = "."

    def _edit(self, text: str, rng: random.Random) -> str | None:
        if self.forbids_all():
            return super()._edit(text, rng)
        # turn full stops into exclamation marks, the last ones first
        while not self.check(text):
            head, stop, tail = text.rpartition(".")
            if not stop or self.count(text) > self.number:
                return None
            text = f"{head}!{tail}"
        return text


class CapitalWords(Counted):
    """Number of words of two or more letters in capitals throughout."""

    kind = "capital_words"
    dimension = "Text pattern"
    unit = ("word in all capital letters", "words in all capital letters", "个全部大写的英文单词")
    smallest = 0

    def count(self, text: str) -> int:
        if text.isascii() and "AA" not in text.translate(_TO_CAPITALS):  # faster than the pattern
            return 0
        return len(_CAPITALS.findall(text))

    def _edit(self, text: str, rng: random.Random) -> str | None:
        plain = _CAPITALS.sub(lambda m: m.group().capitalize(), text)
        return _changed(plain, r"\b[A-Za-z]{4,}\b", self.number, rng, str.upper)


@dataclass(frozen=True)
class LetterFrequency(Counted):
    """How often a letter or symbol occurs, in any case; IFEval's letter_frequency, no_comma."""

    letter: str

    kind = "letter_frequency"
    repeatable = True
    smallest = 0
    measured_relations = ("at least", "at most")
    templates = wordings("""
        The character '{letter}' should appear {relation} {number} {unit}.
        Use the character '{letter}' {relation} {number} {unit}.
        In your response the character '{letter}' must occur {relation} {number} {unit}.
        Make sure that '{letter}' appears {relation} {number} {unit}.
        字符“{letter}”应出现{relation}{number}次。
        请使用字符“{letter}”{relation}{number}次。
        回答中字符“{letter}”必须出现{relation}{number}次。
        请确保“{letter}”出现{relation}{number}次。
    """)
    templates_none = wordings("""
        Do not use the character '{letter}'.
        Avoid the character '{letter}' entirely.
        Your answer must not contain the character '{letter}'.
        The character '{letter}' must not appear.
        不要使用字符“{letter}”。
        请完全避免字符“{letter}”。
        回答中不得包含字符“{letter}”。
        字符“{letter}”不能出现。
    """)
    unit = ("time", "times", "次")

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = isinstance(self.letter, str) and len(self.letter) == 1
        ok = ok and self.letter == self.letter.lower()
        self._require(ok, "letter", "one lower-case character")

    def count(self, text: str) -> int:
        return text.lower().count(self.letter)

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        lowered = text.lower()
        rare = "bfgjkpqvwxyz"  # common letters make no request that a writer could heed
        return [{**b, "letter": x} for x in rare for b in cls.bounds(lowered.count(x))]
