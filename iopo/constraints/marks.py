"""Kinds that count marks, letters and marked spans."""

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from iopo.constraints import text as cut
from iopo.constraints.base import Counted, wordings

_HIGHLIGHT = re.compile(r"\*[^\n\*]*\*")
_DOUBLE_HIGHLIGHT = re.compile(r"\*\*[^\n\*]*\*\*")
_CAPITALS = re.compile(r"\b[A-Z]{2,}\b")


@dataclass(frozen=True)
class Placeholders(Counted):
    """Number of [placeholders]; IFEval's number_placeholders."""

    kind = "placeholders"
    unit_en = (
        "placeholder in square brackets, such as [address]",
        "placeholders in square brackets, such as [address]",
    )
    unit_zh = "个用方括号表示的占位符，例如[地址]"
    smallest = 0

    def count(self, text: str) -> int:
        return len(cut.spans_in_lines(text, "[", "]", greedy=False)) if "[" in text else 0

    def edit(self, text: str, rng: random.Random) -> str | None:
        if self.forbids_all():
            plain = text.replace("[", "").replace("]", "")
            return plain if plain.strip() else None
        edited = text.replace("[", "").replace("]", "")
        names = ["name", "date", "place", "number", "topic", "title", "email", "reason"]
        if self.number > len(names):
            return None
        chosen = rng.sample(names, self.number)
        return edited.rstrip() + " " + " ".join(f"[{name}]" for name in chosen)


@dataclass(frozen=True)
class Highlights(Counted):
    """Number of *highlighted* spans; IFEval's number_highlighted_sections."""

    kind = "highlights"
    dimension = "Text pattern"
    unit_en = (
        "part highlighted with asterisks, like *this part*",
        "parts highlighted with asterisks, like *this part*",
    )
    unit_zh = "处用星号标出的内容，例如*重点内容*"
    smallest = 0

    def count(self, text: str) -> int:
        return highlights(text)

    def edit(self, text: str, rng: random.Random) -> str | None:
        edited = text.replace("*", "")
        if self.number:
            spots = list(re.finditer(r"[^\W\d_]{4,}", edited))
            if len(spots) < self.number:
                return None
            for spot in sorted(rng.sample(spots, self.number), key=lambda s: -s.start()):
                a, b = spot.span()
                edited = f"{edited[:a]}*{edited[a:b]}*{edited[b:]}"
        return edited if edited.strip() and self.check(edited) else None


def highlights(text: str) -> int:
    """Spans between single asterisks plus spans between double ones, empty spans not counted."""
    if "*" not in text:
        return 0
    single = sum(1 for span in _HIGHLIGHT.findall(text) if span.strip("*").strip())
    double = sum(
        1
        for span in _DOUBLE_HIGHLIGHT.findall(text)
        if span.removeprefix("**").removesuffix("**").strip()
    )
    return single + double


class _Marks(Counted):
    """Number of times any of `marks` occurs; shared by commas, questions, exclamations."""

    marks: ClassVar[str]
    replacement: ClassVar[str]
    smallest = 0

    def count(self, text: str) -> int:
        return sum(map(text.count, self.marks))

    def edit(self, text: str, rng: random.Random) -> str | None:
        if not self.forbids_all():
            return text if self.check(text) else None
        for mark in self.marks:
            text = text.replace(mark, self.replacement)
        return text if text.strip() else None


@dataclass(frozen=True)
class Commas(_Marks):
    """Number of commas, English and Chinese ones."""

    kind = "commas"
    unit_en = ("comma", "commas")
    unit_zh = "个逗号"
    marks = ",，"
    replacement = ""


@dataclass(frozen=True)
class Questions(_Marks):
    """Number of question marks."""

    kind = "questions"
    unit_en = ("question mark", "question marks")
    unit_zh = "个问号"
    marks = "?？"
    replacement = "."


@dataclass(frozen=True)
class Exclamations(_Marks):
    """Number of exclamation marks."""

    kind = "exclamations"
    excludes = "questions"
    unit_en = ("exclamation mark", "exclamation marks")
    unit_zh = "个感叹号"
    marks = "!！"
    replacement = "."

    def edit(self, text: str, rng: random.Random) -> str | None:
        if self.forbids_all():
            return super().edit(text, rng)
        # turn full stops into exclamation marks, the last ones first
        edited = text
        while not self.check(edited):
            head, stop, tail = edited.rpartition(".")
            if not stop or self.count(edited) > self.number:
                return None
            edited = f"{head}!{tail}"
        return edited


@dataclass(frozen=True)
class CapitalWords(Counted):
    """Number of words of two or more letters in capitals throughout."""

    kind = "capital_words"
    dimension = "Text pattern"
    unit_en = ("word in all capital letters", "words in all capital letters")
    unit_zh = "个全部大写的英文单词"
    smallest = 0

    def count(self, text: str) -> int:
        return len(_CAPITALS.findall(text))

    def edit(self, text: str, rng: random.Random) -> str | None:
        edited = _CAPITALS.sub(lambda m: m.group().capitalize(), text)
        if self.number:
            spots = list(re.finditer(r"\b[A-Za-z]{4,}\b", edited))
            if len(spots) < self.number:
                return None
            for spot in rng.sample(spots, self.number):
                a, b = spot.span()
                edited = edited[:a] + edited[a:b].upper() + edited[b:]
        return edited if edited.strip() and self.check(edited) else None


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
    unit_en = ("time", "times")
    unit_zh = "次"

    def __post_init__(self) -> None:
        super().__post_init__()
        single = isinstance(self.letter, str) and len(self.letter) == 1
        self._require(
            single and self.letter == self.letter.lower(), "letter", "one lower-case character"
        )

    def count(self, text: str) -> int:
        return text.lower().count(self.letter)

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        lowered = text.lower()
        found = []
        for letter in "bfgjkpqvwxyz":  # common letters make no request that a writer could heed
            for bound in cls.bounds(lowered.count(letter)):
                found.append({**bound, "letter": letter})
        return found
