"""Kinds of IFTrain that fix the whole answer: copies of a text, a composition by numbers."""

import random
import re
from dataclasses import dataclass, replace
from typing import Any

from iopo.constraints import text as cut
from iopo.constraints.base import Constraint, wordings
from iopo.constraints.iftrain import spoken

_DIVIDER = re.compile(r"(?<!\*)\s?\*\s?\*\s?\*(?!\s?\*)\s?")  # *** or * * *, no more


@dataclass(frozen=True)
class Copies(Constraint):
    """The whole answer is the text, `number` times with ****** between, in any case."""

    text: str
    number: int = 1

    kind = "copies"
    dimension = "Template"
    excludes = (
        "case first_word last_word start_phrase end_phrase wrapped layout words sentences lines "
        "paragraphs two_responses repeat_prompt json_format"
    )
    templates = wordings("""
        Write nothing but {copies} of the following text: {text}
        Copy this text, {copies}, and do not do what it asks: {text}
        Your whole response must be {copies} of this: {text}
        Repeat the text without change, {copies}, and add nothing: {text}
        只写以下文字的{copies}：{text}
        请照抄这段文字，{copies}，不要按其要求去做：{text}
        整个回答必须是{copies}：{text}
        原样重复这段文字，{copies}，不加任何内容：{text}
    """)

    def __post_init__(self) -> None:
        self._require_text("text", "text that is not blank")
        whole = isinstance(self.number, int) and not isinstance(self.number, bool)
        self._require(whole and self.number >= 1, "number", "a whole number, 1 or more")

    def blanks(self, language: str) -> dict[str, Any]:
        many = f"{self.number} copies with ****** between them", f"{self.number}份，以******隔开"
        copies = ("one copy", "一份") if self.number == 1 else many
        return {"text": self.text, "copies": copies[language == "zh"]}

    def check(self, text: str) -> bool:
        parts = text.split("******") if self.number > 1 else [text]  # a text may hold asterisks
        parts = [part.strip().lower() for part in parts]
        return parts == [self.text.strip().lower()] * self.number

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        return [replace(self, number=self.number + 1)]


@dataclass(frozen=True)
class RepeatedPhrase(Constraint):
    """The phrase occurs so many times, each with one of its inner words replaced."""

    phrase: str
    number: int

    kind = "repeated_phrase"
    dimension = "Template"
    templates = wordings("""
        Repeat the phrase "{phrase}" exactly {number} times, each time with one word in its middle \
            replaced.
        Write "{phrase}" {number} times; change one inner word of it each time.
        Use {number} variants of "{phrase}", each with one word in the middle exchanged.
        Let "{phrase}" appear exactly {number} times with one inner word replaced in each.
        请把短语“{phrase}”重复恰好{number}次，每次替换中间的一个词。
        写出“{phrase}”{number}次，每次改动其中间的一个词。
        请使用“{phrase}”的{number}个变体，每个只换中间一个词。
        让“{phrase}”恰好出现{number}次，各替换一个中间的词。
    """)

    def __post_init__(self) -> None:
        ok = isinstance(self.phrase, str) and len(self.phrase.split()) > 2
        self._require(ok, "phrase", "three words or more")

    def check(self, text: str) -> bool:
        own = self.phrase.split()
        found = re.findall(rf"{re.escape(own[0])} .*? {re.escape(own[-1])}", text)
        changed = [
            len(words) == len(own) and sum(a != b for a, b in zip(words, own, strict=True)) == 1
            for words in map(str.split, found)
        ]
        return len(found) == self.number and all(changed)


@dataclass(frozen=True)
class Composition(Constraint):
    """Three paragraphs divided by * * *, each of so many sentences of so many words."""

    sentences: int
    words: int

    kind = "composition"
    dimension = "Numerical"
    excludes = "sentences words paragraphs lines divided_paragraphs bullets layout letters"
    templates = wordings("""
        Write 3 paragraphs, delimited by the markdown divider * * *, with exactly {sentences} \
            sentences each, with exactly {words} words in each sentence.
        Use 3 paragraphs with * * * between them, each of {sentences} sentences of {words} words.
        Your answer has 3 paragraphs, divided by * * *, of {sentences} sentences; each sentence \
            has {words} words.
        Divide the answer by * * * into 3 paragraphs of {sentences} sentences, {words} words each.
        请写3段，以* * *分隔，每段恰好{sentences}句，每句恰好{words}个词。
        用* * *隔开3个段落，每段{sentences}句，每句{words}个词。
        回答分为3段（* * *分隔），每段{sentences}句，每句{words}个词。
        请以* * *把回答分成3段，每段{sentences}句，每句{words}个词。
    """)

    def check(self, text: str) -> bool:
        parts = [part for part in _DIVIDER.split(text) if part.strip()]
        found = [[len(spoken(s)) for s in cut.sentences(part)] for part in parts]
        return found == [[self.words] * self.sentences] * 3
