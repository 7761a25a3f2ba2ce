"""Kinds that count the parts of a text: words, sentences, lines, paragraphs, items."""

import random
import re
from typing import ClassVar

from iopo.constraints import text as cut
from iopo.constraints.base import Counted

_NUMBERED_ITEM = re.compile(r"^[ \t]*\d+[.)] ", re.MULTILINE)


class Words(Counted):
    r"""Number of words, runs of \w; IFEval's number_words."""

    kind = "words"
    unit = ("word", "words", "个词")
    measured_relations = ("at least", "at most")
    step = 10
    smallest = 10

    def count(self, text: str) -> int:
        return len(cut.words(text))

    def _edit(self, text: str, rng: random.Random) -> str | None:
        sentences = cut.sentences(text)
        shorter = (" ".join(sentences[:kept]) for kept in range(len(sentences), 0, -1))
        return next(filter(self.check, shorter), None)


class HanCharacters(Counted):
    """Number of Chinese characters, punctuation not counted: the length of a Chinese text."""

    kind = "han_characters"
    excludes = "words"
    unit = ("Chinese character", "Chinese characters", "个汉字")
    measured_relations = ("at least", "at most")
    step = 10
    smallest = 10

    def count(self, text: str) -> int:
        return cut.han_characters(text)


class Sentences(Counted):
    """Number of sentences by rule (see text.sentences), English and Chinese."""

    kind = "sentences"
    unit = ("sentence", "sentences", "个句子")

    def count(self, text: str) -> int:
        return len(cut.sentences(text))

    def _edit(self, text: str, rng: random.Random) -> str | None:
        if self.relation == "at least":
            return text
        return " ".join(cut.sentences(text)[: self.number])


class _Blocks(Counted):
    """Shared by lines and paragraphs: an edit deals the sentences to so many blocks."""

    separator: ClassVar[str]

    def _edit(self, text: str, rng: random.Random) -> str | None:
        groups = cut.dealt_sentences(text, self.number)
        return self.separator.join(groups) if groups else None


class Lines(_Blocks):
    """Number of lines that are not blank."""

    kind = "lines"
    unit = ("line", "lines", "行")
    separator = "\n"

    def count(self, text: str) -> int:
        return len(cut.lines(text))


class Paragraphs(_Blocks):
    """Number of paragraphs, with blank lines between them."""

    kind = "paragraphs"
    excludes = "lines"
    unit = (
        "paragraph separated by blank lines",
        "paragraphs separated by blank lines",
        "个以空行分隔的段落",
    )
    separator = "\n\n"

    def count(self, text: str) -> int:
        return len(cut.paragraphs(text))


class _Items(Counted):
    """Shared by bullets and numbered items: an edit makes an item of each sentence."""

    dimension = "Numbering and list"
    smallest = 0
    mark: ClassVar[str]  # of item {n}

    def without(self, text: str) -> str:
        """The text with the marks of its items removed."""
        raise NotImplementedError

    def _edit(self, text: str, rng: random.Random) -> str | None:
        if self.forbids_all():
            return self.without(text)
        items = [sentence.lstrip("-* ") for sentence in cut.sentences(text)[: self.number]]
        if len(items) < self.number:
            return None
        return "\n".join(self.mark.format(n=n) + item for n, item in enumerate(items, 1))


class Bullets(_Items):
    """Number of lines that begin with '-' or a single '*'; IFEval's number_bullet_lists."""

    kind = "bullets"
    excludes = "sentences lines"
    unit = (
        "bullet point that starts with '- '",
        "bullet points that start with '- '",
        "个以“- ”开头的要点",
    )
    mark = "- "

    def count(self, text: str) -> int:
        return cut.bullets(text)

    def without(self, text: str) -> str:
        return "\n".join(line.lstrip("-* ") for line in cut.lines(text))


class NumberedItems(_Items):
    """Number of lines that begin with a number and '.' or ')'."""

    kind = "numbered_items"
    excludes = "sentences lines bullets"
    unit = (
        "numbered item such as '1. '",
        "numbered items such as '1. ' and '2. '",
        "个以“1. ”这样的编号开头的条目",
    )
    mark = "{n}. "

    def count(self, text: str) -> int:
        return sum(map(bool, map(_NUMBERED_ITEM.match, text.split("\n"))))

    def without(self, text: str) -> str:
        return _NUMBERED_ITEM.sub("", text)
