"""Whether a text answers its prompt or is hollow: what can be read in the text itself, no model.

A text can follow every constraint and say nothing: one word, the prompt's own lines, a phrase until
the limit. The last part, whether it is about its task, needs log-probs: iopo/evaluation/on_task.py.
The thresholds were chosen on one half of 150 labelled answers and tested on the other
(docs/log/2026-11-answers.md).
"""

import re
from collections.abc import Sequence
from functools import lru_cache

from iopo.constraints import text as cut
from iopo.constraints.base import Constraint
from iopo.constraints.ifeval import (
    ConstrainedResponse,
    RepeatPrompt,
    ResponseLanguage,
    TwoResponses,
)
from iopo.constraints.lengths import HanCharacters, Words

LEAST_WORDS = 8  # the shortest sentence that says something about a task
CHARACTERS_PER_WORD = 1.5  # of Chinese and Japanese: what says as much as a word of English
GRAM = 4  # words in a row: two texts about one thing seldom share more by chance
MOST_REPEATED = 0.2  # share of the 4-grams that occurred before
ECHO_WORDS = 5  # of a line: a shorter one is a title or a name
MOST_ECHOED = 0.5  # share of the words that stand in such lines
# Words about the form of an answer; 99.9 % of the responses of data/verified have at most 8 %.
MOST_FORM_WORDS = 0.12
_FORM_WORDS = frozenset(
    word + ending
    for word in (
        "answer response reply sentence word phrase comma paragraph line bullet point letter title "
        "lowercase uppercase capital exact exactly instruction prompt constraint"
    ).split()
    for ending in ("", "s")
)
_FORM_WORD_ZH = re.compile("回答|回复|句子|段落|逗号|词语|开头|结尾|要求")
# Prose is made of function words: 30 to 50 % of English, 7 % in the barest list of data/verified.
# Lists of words, gibberish and other languages have none.
LEAST_FUNCTION_WORDS = 0.05
_FUNCTION_WORDS = tuple(
    frozenset(words)
    for words in (
        "the of and to is are for with that this it you your by from be not have can their they or "
        "in on as my we our was has will".split(),
        "的了是在和有不我你他她它这那就也都与为对会可以很一个于上下中到从用而及其之所着过得地吗呢吧",
        "のはをがにでとたすしてる",
    )
)
_HEADING = re.compile(
    r"[ \t]*(?:#{1,6}[^.!?。！？]*|\*\*[^*.!?。！？]*\*\*:?|<<.*>>|\[\[.*\]\]|==.*==|.*[:：])[ \t]*"
)
_HEADING_ENDS = ("**", ">>", "]]", "==", ":", "：")  # one of them, or # at the beginning


def hollow(
    text: str, prompt: str, rules: Sequence[Constraint] = (), *, ended: bool = True
) -> tuple[str, ...]:
    """Why the text is no answer, by name; () where nothing in it says so.

    empty       no text
    cut_off     it did not end by itself
    too_short   fewer than LEAST_WORDS words beside headings, where the constraints allow so many
    repetitive  more than MOST_REPEATED of its word 4-grams occurred before
    echo        more than MOST_ECHOED of it are lines of the prompt, where it need not be repeated
    restates    more than MOST_FORM_WORDS of it is about the form that the constraints ask for
    no_prose    next to no function words of the prompt's language: a list of words, gibberish, or
                another language where none is asked for

    prompt: the whole instruction. rules: its constraints, where known. ended: whether the writer
    stopped (finish reason "stop"); True where that is not known. Thinking is not read.
    """
    text = cut.after_thinking(text)
    if not text.strip():
        return ("empty",)
    parts = [text]
    for rule in rules:
        if isinstance(rule, RepeatPrompt):
            parts = [re.sub(re.escape(rule.phrase), "", part, flags=re.I) for part in parts]
        if isinstance(rule, TwoResponses):
            parts = [two for part in parts for two in part.split("******")]
    own = "\n".join(parts)
    found = {
        "cut_off": not ended,
        "too_short": _size_beside_headings(own) < least_words(rules),
        "repetitive": any(repeated(part) > MOST_REPEATED for part in parts),
        "echo": echoed(own, prompt) > MOST_ECHOED,
        "restates": not any(isinstance(rule, ConstrainedResponse) for rule in rules)
        and _form_words(own) > MOST_FORM_WORDS * size(own),
        "no_prose": not (_asks_for_a_language(rules) or reads_like(own, prompt)),
    }
    return tuple(name for name, is_so in found.items() if is_so)


def size(text: str) -> float:
    """Length in words; of Chinese and Japanese, CHARACTERS_PER_WORD count as one."""
    characters = cut.unspaced_characters(text)
    return len(cut.tokens(text)) - characters + characters / CHARACTERS_PER_WORD


@lru_cache(maxsize=cut.KEPT)
def _size_beside_headings(text: str) -> float:
    lines = text.split("\n")
    own = [line for line in lines if not _is_heading(line)]
    return size(text if len(own) == len(lines) else "\n".join(own))


def _is_heading(line: str) -> bool:
    may_be = "#" in line or line.rstrip(" \t").endswith(_HEADING_ENDS)
    return may_be and _HEADING.fullmatch(line) is not None


@lru_cache(maxsize=cut.KEPT)
def _form_words(text: str) -> int:
    found = _occurrences(_FORM_WORDS, text)
    return found if text.isascii() else found + len(_FORM_WORD_ZH.findall(text))


def least_words(rules: Sequence[Constraint]) -> float:
    """LEAST_WORDS, or as many as the constraints allow if that is less."""
    bounds: list[float] = [LEAST_WORDS]
    for rule in rules:
        if isinstance(rule, Words | HanCharacters) and rule.relation != "at least":
            per_word = CHARACTERS_PER_WORD if isinstance(rule, HanCharacters) else 1
            bounds.append(rule.number / per_word)
        if isinstance(rule, ConstrainedResponse):
            bounds.append(4)  # My answer is yes.
    return min(bounds)


@lru_cache(maxsize=cut.KEPT)
def repeated(text: str) -> float:
    """The share of word 4-grams (Chinese, Japanese: 6 characters) that occurred before, 0 to 1."""
    found = cut.tokens(text)
    unspaced = 2 * cut.unspaced_characters(text) > len(found)
    n = int(GRAM * CHARACTERS_PER_WORD) if unspaced else GRAM
    grams = max(0, len(found) - n + 1)
    return 1 - len(_grams(found, n)) / grams if grams else 0.0


def _grams(found: Sequence[str], n: int) -> set[tuple[str, ...]]:
    return set(zip(*(found[i:] for i in range(n)), strict=False))


def echoed(text: str, prompt: str) -> float:
    """The share of words that stand in lines or sentences which the prompt has too, 0 to 1.

    >>> echoed("Here it is:\\n- Name three kinds of fruit.", "Name three kinds of fruit. Be brief.")
    0.625
    """
    given, present = cut.tokens(prompt), cut.token_set(text)
    runs = "".join([" x"[word in present] for word in given])
    if "x" * ECHO_WORDS not in runs:
        return 0.0  # no line can be there
    if _grams(cut.tokens(text), ECHO_WORDS).isdisjoint(_grams(given, ECHO_WORDS)):
        return 0.0
    lines = {line for line in cut.sentences(text) if size(line) >= ECHO_WORDS}
    words = sum(size(line) for line in lines if _spaced(line) in _spaced(prompt))
    return words / max(1, size(text))


def _spaced(text: str) -> str:
    return f" {' '.join(cut.tokens(text))} "


def reads_like(text: str, prompt: str) -> bool:
    """Whether the text has function words of the prompt's language, if that is one we know."""
    language = _language(prompt)
    return language is None or _share(text, language) >= LEAST_FUNCTION_WORDS


@lru_cache(maxsize=8)
def _language(text: str) -> frozenset[str] | None:
    """The function words of the language that has most of them in the text."""
    found = [_occurrences(words, text) for words in _FUNCTION_WORDS]
    enough = max(found) / max(1, len(cut.tokens(text))) >= LEAST_FUNCTION_WORDS
    return _FUNCTION_WORDS[found.index(max(found))] if enough else None


@lru_cache(maxsize=cut.KEPT)
def _share(text: str, words: frozenset[str]) -> float:
    return _occurrences(words, text) / max(1, len(cut.tokens(text)))


def _occurrences(words: frozenset[str], text: str) -> int:
    """How many tokens of the text are among the words."""
    found = not words.isdisjoint(cut.token_set(text))
    return sum(map(words.__contains__, cut.tokens(text))) if found else 0


def _asks_for_a_language(rules: Sequence[Constraint]) -> bool:
    return any(isinstance(rule, ResponseLanguage) for rule in rules)
