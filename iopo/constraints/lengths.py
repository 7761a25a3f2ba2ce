"""Kinds that count the parts of a text: words, sentences, lines, paragraphs, items."""

import random
import re
from dataclasses import dataclass

from iopo.constraints import text as cut
from iopo.constraints.base import Counted

_NUMBERED_ITEM = re.compile(r"^[ \t]*\d+[.)] ", re.MULTILINE)


@dataclass(frozen=True)
class Words(Counted):
    r"""Number of words, runs of \w; IFEval's number_words."""

    kind = "words"
    unit_en = ("word", "words")
    unit_zh = "个词"
    measured_relations = ("at least", "at most")
    step = 10
    smallest = 10

    def count(self, text: str) -> int:
        return len(cut.words(text))

    def edit(self, text: str, rng: random.Random) -> str | None:
        sentences = cut.sentences(text)
        for kept in range(len(sentences), 0, -1):
            shorter = " ".join(sentences[:kept])
            if self.check(shorter):
                return shorter
        return None


@dataclass(frozen=True)
class HanCharacters(Counted):
    """Number of Chinese characters, punctuation not counted: the length of a Chinese text."""

    kind = "han_characters"
    excludes = "words"
    unit_en = ("Chinese character", "Chinese characters")
    unit_zh = "个汉字"
    measured_relations = ("at least", "at most")
    step = 10
    smallest = 10

    def count(self, text: str) -> int:
        return cut.han_characters(text)


@dataclass(frozen=True)
class Sentences(Counted):
    """Number of sentences by rule (see text.sentences), English and Chinese."""

    kind = "sentences"
    unit_en = ("sentence", "sentences")
    unit_zh = "个句子"

    def count(self, text: str) -> int:
        return len(cut.sentences(text))

    def edit(self, text: str, rng: random.Random) -> str | None:
        if self.relation == "at least":
            return text if self.check(text) else None
        edited = " ".join(cut.sentences(text)[: self.number])
        return edited if edited and self.check(edited) else None


@dataclass(frozen=True)
class Lines(Counted):
    """Number of lines that are not blank."""

    kind = "lines"
    unit_en = ("line", "lines")
    unit_zh = "行"

    def count(self, text: str) -> int:
        return len(cut.lines(text))

    def edit(self, text: str, rng: random.Random) -> str | None:
        groups = cut.dealt_sentences(text, self.number)
        return "\n".join(groups) if groups else None


@dataclass(frozen=True)
class Paragraphs(Counted):
    """Number of paragraphs, with blank lines between them."""

    kind = "paragraphs"
    excludes = "lines"
    unit_en = ("paragraph separated by blank lines", "paragraphs separated by blank lines")
    unit_zh = "个以空行分隔的段落"

    def count(self, text: str) -> int:
        return len(cut.paragraphs(text))

    def edit(self, text: str, rng: random.Random) -> str | None:
        groups = cut.dealt_sentences(text, self.number)
        return "\n\n".join(groups) if groups else None


@dataclass(frozen=True)
class Bullets(Counted):
    """Number of lines that begin with '-' or a single '*'; IFEval's number_bullet_lists."""

    kind = "bullets"
    dimension = "Numbering and list"
    excludes = "sentences lines"
    unit_en = ("bullet point that starts with '- '", "bullet points that start with '- '")
    unit_zh = "个以“- ”开头的要点"
    smallest = 0

    def count(self, text: str) -> int:
        return cut.bullets(text)

    def edit(self, text: str, rng: random.Random) -> str | None:
        if self.forbids_all():
            plain = "\n".join(line.lstrip("-* ") for line in cut.lines(text))
            return plain if plain and self.check(plain) else None
        items = tuple(sentence.lstrip("-* ") for sentence in cut.sentences(text))
        if len(items) < self.number:
            return None
        edited = "\n".join(f"- {item}" for item in items[: self.number])
        return edited if self.check(edited) else None


@dataclass(frozen=True)
class NumberedItems(Counted):
    """Number of lines that begin with a number and '.' or ')'."""

    kind = "numbered_items"
    dimension = "Numbering and list"
    excludes = "sentences lines bullets"
    unit_en = ("numbered item such as '1. '", "numbered items such as '1. ' and '2. '")
    unit_zh = "个以“1. ”这样的编号开头的条目"
    smallest = 0

    def count(self, text: str) -> int:
        return len(_NUMBERED_ITEM.findall(text))

    def edit(self, text: str, rng: random.Random) -> str | None:
        if self.forbids_all():
            plain = _NUMBERED_ITEM.sub("", text)
            return plain if plain.strip() and self.check(plain) else None
        items = cut.sentences(text)
        if len(items) < self.number:
            return None
        kept = [item.lstrip("-* ") for item in items[: self.number]]
        edited = "\n".join(f"{i}. {item}" for i, item in enumerate(kept, 1))
        return edited if self.check(edited) else None
