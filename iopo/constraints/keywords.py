"""Kinds about words that must or must not be in a text."""

import random
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from iopo.constraints import text as cut
from iopo.constraints.base import Constraint, Counted, wordings
from iopo.constraints.wording import COMMON_WORDS

_TOO_COMMON = frozenset(
    "about after again along among around because before being between could doing during every "
    "first having might other really shall should since still their there these thing things those "
    "through under until using where whether which while within without would your yours".split()
)


@dataclass(frozen=True)
class WordList(Constraint):
    """Shared by include_words and forbid_words: whole words, in any case."""

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        if isinstance(self.words, list):
            object.__setattr__(self, "words", tuple(self.words))
        ok = isinstance(self.words, tuple) and len(self.words) > 0
        ok = ok and all(isinstance(w, str) and w.strip() for w in self.words)
        self._require(ok, "words", "a list of one or more words")
        self.found("")  # a word that is no pattern where one is expected raises here

    def blanks(self, language: str) -> dict[str, Any]:
        quote, comma = ("'{}'", ", ") if language == "en" else ("“{}”", "、")
        return {"words": comma.join(quote.format(word) for word in self.words)}

    def spans(self, text: str, word: str) -> list[tuple[int, int]]:
        """Where the word occurs, and with it what counts as an occurrence."""
        return cut.word_spans(text, word)

    def found(self, text: str) -> list[bool]:
        return [bool(self.spans(text, word)) for word in self.words]


class IncludeWords(WordList):
    """Every word of the list occurs as a whole word."""

    kind = "include_words"
    dimension = "Inclusion"
    repeatable = True
    templates = wordings("""
        Include the following words in your response: {words}.
        Your answer must mention {words}.
        Make sure to use {words} in the reply.
        The response has to contain {words}.
        回答中必须包含：{words}。
        请提到{words}。
        请务必使用{words}。
        回复里要出现{words}。
    """)

    def check(self, text: str) -> bool:
        return all(self.found(text))

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [{"words": [word]} for word in _content_words(text)]

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        return [ForbidWords((word,)) for word in self.words]

    def _edit(self, text: str, rng: random.Random) -> str | None:
        missing = [word for word in self.words if not self.spans(text, word)]
        return f"{text.rstrip()} ({', '.join(missing)})" if missing else text


class ForbidWords(WordList):
    """No word of the list occurs as a whole word."""

    kind = "forbid_words"
    dimension = "Exclusion"
    repeatable = True
    templates = wordings("""
        Do not use the following words: {words}.
        Avoid {words} in your response.
        Your answer must not contain {words}.
        Leave out {words} entirely.
        不要使用以下词语：{words}。
        回答中请避免{words}。
        回复里不得包含{words}。
        请完全不提{words}。
    """)

    def check(self, text: str) -> bool:
        return not any(self.found(text))

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [{"words": [word]} for word in COMMON_WORDS if not cut.has_word(text, word)]

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        return [IncludeWords((word,)) for word in self.words]

    def _edit(self, text: str, rng: random.Random) -> str | None:
        if len(text.lower()) != len(text):  # rare letters: positions would not fit
            return None
        for word in self.words:
            for start, end in reversed(self.spans(text, word)):
                text = text[:start].rstrip(" ") + text[end:]
        return text.strip()


@dataclass(frozen=True)
class WordFrequency(Counted):
    """How often a word occurs as a whole word, in any case."""

    word: str

    kind = "word_frequency"
    repeatable = True
    smallest = 2
    unit = ("time", "times", "次")
    templates = wordings("""
        Use the word '{word}' {relation} {number} {unit}.
        The word '{word}' should appear {relation} {number} {unit}.
        In your response the word '{word}' must occur {relation} {number} {unit}.
        Make sure that '{word}' appears {relation} {number} {unit}.
        请使用“{word}”一词{relation}{number}次。
        “{word}”一词应出现{relation}{number}次。
        回答中“{word}”必须出现{relation}{number}次。
        请确保“{word}”出现{relation}{number}次。
    """)
    templates_none = ForbidWords.templates

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_text("word", "a word")
        self.spans("", self.word)  # as in WordList

    def blanks(self, language: str) -> dict[str, Any]:
        quoted = f"'{self.word}'" if language == "en" else f"“{self.word}”"
        return {**super().blanks(language), "words": quoted}

    def spans(self, text: str, word: str) -> list[tuple[int, int]]:
        return cut.word_spans(text, word)

    def count(self, text: str) -> int:
        return len(self.spans(text, self.word))

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        found = super().alternatives(rng)
        if self.relation != "at most" and self.number > 0:
            found.append(replace(self, relation="exactly", number=0))
        return found

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        uses = Counter(cut.lower_words(text))
        repeated = [word for word in _content_words(text) if uses[word] > 1]
        counts = {word: cut.uses(text, word) for word in repeated}
        return [
            {**bound, "word": word} for word, count in counts.items() for bound in cls.bounds(count)
        ]


@lru_cache(maxsize=cut.KEPT)
def _content_words(text: str) -> tuple[str, ...]:
    """Words worth asking for, each once, in order of first use."""
    whole = cut.word_set(text)
    return tuple(
        [
            word
            for word in dict.fromkeys(cut.lower_words(text))
            if 5 <= len(word) <= 14 and word.isalpha() and word not in _TOO_COMMON
            if word in whole or cut.has_word(text, word)
        ]
    )
