"""What makes a sampled or foreign text usable: whole sentences, no refusal, a known script."""

import re
from functools import lru_cache

from iopo.constraints import text as cut

PLAIN = str.maketrans({"’": "'", "‘": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "."})
_REFUSALS = (
    "as an ai", "i'm sorry", "i am sorry", "i cannot", "i can't help", "i can't assist",
    "language model", "hugging face", "smollm",
)  # fmt: skip
_REFUSAL = re.compile(rf"\b({'|'.join(_REFUSALS)})\b")
_SCRIPTS = {
    "chinese": re.compile(f"[{cut.CJK}]"),
    "kana": re.compile("[\u3040-\u30ff]"),
    "hangul": re.compile("[\uac00-\ud7af]"),
    "cyrillic": re.compile("[\u0400-\u04ff]"),
    "arabic": re.compile("[\u0600-\u06ff]"),
    "devanagari": re.compile("[\u0900-\u097f]"),
}
_LATIN = re.compile("[A-Za-z\u00c0-\u024f]+")


def refuses(text: str) -> bool:
    """Whether the text has words of a refusal, in any case."""
    text = text.lower()
    return any(phrase in text for phrase in _REFUSALS) and _REFUSAL.search(text) is not None


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
    return cut.repeats(" ".join(words)) or 2 * len(set(words)) < len(words)


@lru_cache(maxsize=cut.KEPT)
def script_of(text: str) -> str:
    """The script with most letters, found without a model; "none" for a text without letters.

    A Chinese character weighs as much as three Latin letters, since it says as much. Japanese is
    "kana" wherever a fifth of it is kana.

    >>> script_of("Plain words."), script_of("用 Python 写一个排序函数。"), script_of("42")
    ('latin', 'chinese', 'none')
    """
    if text.isascii():
        return "latin" if any(map(str.isalpha, text)) else "none"
    counts = {name: len(pattern.findall(text)) for name, pattern in _SCRIPTS.items()}
    if counts["kana"] * 4 >= counts["chinese"] and counts["kana"]:
        counts["kana"] += counts.pop("chinese")
    for name in ("chinese", "kana", "hangul"):
        counts[name] = 3 * counts.get(name, 0)
    counts["latin"] = sum(map(len, _LATIN.findall(text)))
    best = max(counts, key=lambda name: counts[name])
    return best if counts[best] else "none"
