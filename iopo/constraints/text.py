"""Ways to cut a text: words, sentences, lines, paragraphs. Pure, for English and Chinese.

Results for the last texts are kept, because a dozen kinds measure the same text one after another.
"""

from __future__ import annotations

import re
from functools import lru_cache

CJK = "\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(r"\w+")
_HAN = re.compile(f"[{CJK}]")
_LETTERS = re.compile(rf"[^\W\d_{CJK}]+(?:['’][^\W\d_{CJK}]+)*")
_LIST_MARKER = re.compile(r"^\s*(?:[-*•+]|\d+[.)、]|#+)\s+", re.MULTILINE)
# A sentence ends at its marks with closing quotes, before a space or the end; Chinese marks need
# no space.
_SENTENCE_END = re.compile(r"(?:[.!?…]+[\"'”’)\]*]*(?=\s|$)|[。！？]+[”’」』）]*)")
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|No|e\.g|i\.e|a\.m|p\.m|U\.S|[A-Z]))\.$"
)
# two patterns, counted apart as IFEval does: a match of either may run over a line break
_STAR_BULLET = re.compile(r"^\s*\*[^\*].*$", re.MULTILINE)
_DASH_BULLET = re.compile(r"^\s*-.*$", re.MULTILINE)


@lru_cache(maxsize=8)
def words(text: str) -> tuple[str, ...]:
    r"""Runs of \w, as IFEval counts words."""
    return tuple(_WORD.findall(text))


@lru_cache(maxsize=8)
def lower_words(text: str) -> tuple[str, ...]:
    """Words of letters, lower-cased, an apostrophe inside allowed; no digits, no Chinese."""
    return tuple(_LETTERS.findall(text.lower()))


def letter_words(text: str) -> list[str]:
    """Words of letters as they stand."""
    return _LETTERS.findall(text)


def han_characters(text: str) -> int:
    """Number of Chinese characters, punctuation not counted."""
    return len(_HAN.findall(text))


@lru_cache(maxsize=8)
def sentences(text: str) -> tuple[str, ...]:
    """Sentences by rule: marks end one, so does a line break; list markers are no part of one.

    >>> sentences("Dr. Who left. Why?\\n- He was late")
    ('Dr. Who left.', 'Why?', 'He was late')
    """
    found = []
    for line in _LIST_MARKER.sub("", text).split("\n"):
        start = 0
        for end in _SENTENCE_END.finditer(line):
            if _ABBREVIATION.search(line, start, end.end()) and end.end() < len(line.rstrip()):
                continue
            found.append(line[start : end.end()].strip())
            start = end.end()
        found.append(line[start:].strip())
    return tuple(s for s in found if _WORD.search(s))


def paragraphs(text: str) -> list[str]:
    """Blocks of text with blank lines between them."""
    return [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]


@lru_cache(maxsize=8)
def lines(text: str) -> tuple[str, ...]:
    """Lines that are not blank, stripped."""
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def bullets(text: str) -> int:
    """Number of lines that begin with '-' or with a single '*', as IFEval counts bullet points."""
    return len(_STAR_BULLET.findall(text)) + len(_DASH_BULLET.findall(text))


def whole_word(word: str) -> re.Pattern[str]:
    """A pattern for the word as a whole, in any case; beside Chinese characters no space is needed.

    >>> bool(whole_word("cat").search("concatenate")), bool(whole_word("苹果").search("吃苹果吧"))
    (False, True)
    """
    before = "" if _HAN.match(word) else rf"(?<![^\W{CJK}])"
    after = "" if _HAN.match(word[-1:]) else rf"(?![^\W{CJK}])"
    return _whole_word(before + re.escape(word) + after)


@lru_cache(maxsize=4096)
def _whole_word(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)
