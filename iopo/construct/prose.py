"""From a sampled response to a short text of whole sentences, or the reason why it is no use."""

from __future__ import annotations

import re

from iopo.constraints import text as cut

PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
REFUSAL = re.compile(
    r"\b(as an ai|i'm sorry|i am sorry|i cannot|i can't (?:help|assist)|language model"
    r"|hugging face|smollm)\b",
    re.I,
)
ABOUT_THE_HINT = re.compile(r"\b(sentences?|fifty words)\b", re.I)
_MARKUP = re.compile(r"[#*<>{}\[\]|`_]|(?:^|\s)\d\. |:$")


def whole_sentences(text: str, most_words: int) -> tuple[str, ...] | str:
    """The leading whole sentences of a response, at most `most_words` words; a str says why none.

    Left out are refusals, a model's words about itself, markup, remarks about the length that was
    asked for, text that repeats itself and text that is not ASCII once curly quotes and dashes
    are made plain.
    """
    text = text.translate(PLAIN).strip()
    if len(text) > 1 and text[0] == text[-1] == '"' and text.count('"') == 2:
        text = text[1:-1].strip()
    if not text.isascii():
        return "not ascii"
    if "\n" in text:
        return "several lines"
    if REFUSAL.search(text):
        return "refusal"
    if ABOUT_THE_HINT.search(text):
        return "about the hint"
    if _MARKUP.search(text):
        return "markup"
    kept: list[str] = []
    words = 0
    for sentence in cut.sentences(text):
        words += len(cut.words(sentence))
        if words > most_words or not ends_a_sentence(sentence):
            break
        kept.append(sentence)
    while kept and not balanced(" ".join(kept)):
        kept.pop()
    if not kept or len(cut.words(" ".join(kept))) < 8:
        return "too short"
    if repeats_itself(" ".join(kept)):
        return "repeats itself"
    return tuple(kept)


def balanced(text: str) -> bool:
    """Whether double quotes and parentheses come in pairs."""
    return text.count('"') % 2 == 0 and text.count("(") == text.count(")")


def ends_a_sentence(text: str) -> bool:
    """Whether the last word is followed by a mark that may end a text.

    >>> ends_a_sentence('He said "no."'), ends_a_sentence("And then the")
    (True, False)
    """
    end = len(text)
    while end and not (text[end - 1].isalnum() or text[end - 1] == "_"):
        end -= 1
    return any(mark in ".!?:;])}>" for mark in text[end:])


def repeats_itself(text: str) -> bool:
    """A phrase of four words occurs twice, or less than half of the words are different."""
    words = [word.lower() for word in cut.words(text)]
    phrases = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return len(set(phrases)) < len(phrases) or 2 * len(set(words)) < len(words)
