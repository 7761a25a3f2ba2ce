"""Kinds about how a text begins and ends, and about the case of its letters."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from iopo.constraints import text as cut
from iopo.constraints.base import Constraint, Styled, wordings

_SMALL_WORD = re.compile(r"(?:^|\s)[a-z]")
# Words that a writer could be asked to leave out or to begin or end with.
COMMON_WORDS = (
    "also because being people really simply which would their there think through however "
    "important always every great other should something together very well many more best "
    "good make help time different often begin today finally first imagine"
).split()
OPENINGS = (
    "Here is my answer:", "To begin with,", "In short,", "Thank you for asking.", "Let us see:",
    "Dear reader,", "Without further ado,", "The truth is that", "Good news:", "As requested,",
)  # fmt: skip
CLOSINGS = (
    "That is all.", "I hope this helps.", "Have a wonderful day!", "The end.", "Best of luck!",
    "Thank you for reading.", "Is there anything else?", "Let me know what you think.",
    "Over and out.",
)  # fmt: skip


class Case(Styled):
    """All letters lower case, all upper case, or each word capitalised (title case)."""

    kind = "case"
    dimension = "Text pattern"
    excludes = "capital_words"
    styles = {
        "lower": ("lowercase letters (no capital letters)", "使用小写字母"),
        "upper": ("capital letters (no lowercase letters)", "使用大写字母"),
        "title": (
            "title case (the first letter of every word a capital, the others lowercase)",
            "每个单词首字母大写、其余小写",
        ),
    }
    templates = wordings("""
        Write your entire response in {name}.
        Your whole answer must be in {name}.
        Use only {name} throughout.
        The complete reply should be in {name}.
        Respond in {name}, with no exception.
        整个回答中的英文必须{name}。
        请让所有英文{name}。
        全文英文应当{name}。
        回复里的英文一律{name}。
    """)

    def check(self, text: str) -> bool:
        if self.style == "lower":
            return text.islower()
        if self.style == "upper":
            return text.isupper()
        if _SMALL_WORD.search(text):  # nearly every other text is refused here, without cutting it
            return False
        words = cut.letter_words(text)
        # one word with a capital and small letters keeps "A B C" from being upper and title at once
        mixed = any(w[0].isupper() and w[1:].islower() for w in words)
        return mixed and all(w == w.capitalize() for w in words)

    def _edit(self, text: str, rng: random.Random) -> str | None:
        if self.style == "title":
            return re.sub(r"[^\W\d_]+(?:['’][^\W\d_]+)*", lambda m: m.group().capitalize(), text)
        return text.lower() if self.style == "lower" else text.upper()


@dataclass(frozen=True)
class _EdgeWord(Constraint):
    """Shared by kinds about the word at one end, in any case."""

    word: str

    dimension = "Inclusion"
    index: ClassVar[int]

    def __post_init__(self) -> None:
        ok = isinstance(self.word, str) and self._is_word(self.word)
        self._require(ok and self.word == self.word.lower(), "word", "one lower-case word")

    @staticmethod
    def words(text: str) -> Sequence[str]:
        """The words of the text: runs of letters and digits."""
        return cut.words(text)

    @classmethod
    def _is_word(cls, word: str) -> bool:
        return list(cls.words(word)) == [word]

    def check(self, text: str) -> bool:
        words = self.words(text)
        return bool(words) and words[self.index].lower() == self.word

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        words = cls.words(text)
        if not words or not words[cls.index].isalpha():
            return []
        word = words[cls.index].lower()
        return [{"word": word}] if cls._is_word(word) else []

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        others = [word for word in COMMON_WORDS if word != self.word]
        return [type(self)(word) for word in rng.sample(others, 3)]


class FirstWord(_EdgeWord):
    """The first word, in any case; quotes or marks before it do not count."""

    kind = "first_word"
    index = 0
    templates = wordings("""
        The first word of your response must be '{word}'.
        Begin your answer with the word '{word}'.
        Start the reply with the word '{word}'.
        '{word}' has to be the very first word of the response.
        回答的第一个词必须是“{word}”。
        请以“{word}”一词开头。
        回复要用“{word}”这个词开始。
        第一个词应为“{word}”。
    """)

    def _edit(self, text: str, rng: random.Random) -> str | None:
        return f"{self.word.capitalize()}, {text.lstrip()}"


class LastWord(_EdgeWord):
    """The last word, in any case; marks after it do not count."""

    kind = "last_word"
    index = -1
    templates = wordings("""
        The last word of your response must be '{word}'.
        End your answer with the word '{word}'.
        Finish the reply with the word '{word}'.
        '{word}' has to be the very last word of the response.
        回答的最后一个词必须是“{word}”。
        请以“{word}”一词结尾。
        回复要用“{word}”这个词结束。
        最后一个词应为“{word}”。
    """)

    def _edit(self, text: str, rng: random.Random) -> str | None:
        return f"{text.rstrip()} {self.word.capitalize()}."


@dataclass(frozen=True)
class _EdgePhrase(Constraint):
    """Shared by start_phrase and end_phrase: how the text begins or ends, in any case."""

    phrase: str

    dimension = "Inclusion"
    others: ClassVar[tuple[str, ...]]  # phrases to ask for instead

    def __post_init__(self) -> None:
        self._require_text("phrase", "text that is not blank")

    @staticmethod
    def stands_in(phrase: str, text: str) -> bool:
        """Whether the text has the phrase at its end of the two, both in lower case."""
        raise NotImplementedError

    def check(self, text: str) -> bool:
        return self.stands_in(self.phrase.strip().lower(), text.strip().lower())

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        own = self.phrase.strip().lower()
        apart = [
            other
            for other in self.others
            if not (self.stands_in(own, other.lower()) or self.stands_in(other.lower(), own))
        ]
        return [type(self)(phrase) for phrase in rng.sample(apart, 3)]


class StartPhrase(_EdgePhrase):
    """The text begins with the phrase, in any case."""

    kind = "start_phrase"
    excludes = "first_word"
    templates = wordings("""
        Start your response with the exact phrase "{phrase}"
        Begin your answer with the words "{phrase}"
        The reply must open with "{phrase}"
        Your first words should be: "{phrase}"
        请以“{phrase}”开头。
        回答必须以“{phrase}”开始。
        回复的开头应是“{phrase}”。
        开头请写：“{phrase}”
    """)
    others = OPENINGS

    @staticmethod
    def stands_in(phrase: str, text: str) -> bool:
        return text.startswith(phrase)

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        opening = " ".join(text.strip().split("\n", 1)[0].split(" ")[:3])
        return [{"phrase": opening}] if opening.count(" ") == 2 and _plain(opening) else []

    def _edit(self, text: str, rng: random.Random) -> str | None:
        return f"{self.phrase.strip()} {text.lstrip()}"


class EndPhrase(_EdgePhrase):
    """The text, less quotes around it, ends with the phrase in any case; IFEval's end_checker."""

    kind = "end_phrase"
    excludes = "last_word"
    templates = wordings("""
        Finish your response with the exact phrase "{phrase}" No words should follow it.
        End your answer with "{phrase}" and nothing after it.
        The very last words of the reply must be: "{phrase}"
        Close the response with the sentence "{phrase}"
        请以“{phrase}”结尾，之后不要再写任何内容。
        回答必须以“{phrase}”结束。
        回复的最后一句应是“{phrase}”
        结尾请写：“{phrase}”
    """)
    others = CLOSINGS

    @staticmethod
    def stands_in(phrase: str, text: str) -> bool:
        return text.strip('"').endswith(phrase)

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        closing = " ".join(text.strip().strip('"').rsplit("\n", 1)[-1].split(" ")[-4:])
        return [{"phrase": closing}] if closing.count(" ") == 3 and _plain(closing) else []

    def _edit(self, text: str, rng: random.Random) -> str | None:
        return f"{text.rstrip()} {self.phrase.strip()}"


def _plain(phrase: str) -> bool:
    """Words of a phrase that can be quoted in an instruction without confusion."""
    return phrase == phrase.strip() and re.fullmatch(r"[\w ,.!?'’]+", phrase) is not None
