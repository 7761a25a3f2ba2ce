"""ComplexBench questions that code answers, on passages of the answer that a judge has picked out.

A rule is one line `name:argument`, such as `model_length:[300,10000]`, or two of them. The forms
are those of the published scorer; the data file was not at hand, so a rule that is not known here
is left to the judge. Where the published scorer treats rules alike in meaning differently (marks in
half and full width, quotes around a passage), one reading serves all.
"""

import ast
import json
import re
import string
from collections.abc import Callable

from iopo.evaluation.judge.prompts import PassageRule

_LINE = re.compile(r"(?:model_)?(?P<name>[A-Za-z_ ]+?)(?P<each>_each)?:(?P<argument>.*)", re.DOTALL)
_NEXT_LINE = re.compile(r"\n(?=(?:model_)?[A-Za-z_ ]+:)")
_FULL_WIDTH = str.maketrans("!#$%&()*,.:;?\\^“”", '！＃＄％＆（）＊，。：；？＼＾""')
_MARKS = {mark.translate(_FULL_WIDTH) for mark in string.punctuation}
_FORBIDDING = ("forbidden_word", "not_startswith", "not_endswith")


def parse(text: str | None) -> PassageRule | None:
    """The rule in a question's `rule`; None where there is none, or one that is not known here."""
    lines = [_LINE.fullmatch(line) for line in _NEXT_LINE.split((text or "").strip())]
    known = [line for line in lines if line is not None]
    if len(known) < len(lines):
        return None
    try:
        checks = [
            _check(line["name"].replace(" ", "_"), bool(line["each"]), line["argument"].strip())
            for line in known
        ]
    except (ValueError, TypeError, SyntaxError):
        return None
    return PassageRule(
        several=any(line["each"] for line in known),
        holds=lambda passages: all(check([p.strip() for p in passages]) for check in checks),
    )


def _check(name: str, each: bool, argument: str) -> Callable[[list[str]], bool]:
    """One line of a rule as a function of the passages; without any, only what forbids is kept.

    Raises ValueError, TypeError or SyntaxError if it is not known.
    """
    if name == "number":
        low, high = _range(argument)
        return lambda passages: any(passages) and low <= len(passages) <= high
    if name == "starts_with_list":
        starts = _words(argument)
        return lambda passages: (
            len(passages) == len(starts)
            and all(_wide(p).startswith(s) for p, s in zip(passages, starts, strict=True))
        )
    holds = _on_text(name, argument)

    def check(passages: list[str]) -> bool:
        if not each:
            passages = passages[:1]
        elif name == "endswith" and len(passages) > 1:
            passages = passages[:-1]  # what ends each stands between them: "separated by ;"
        passages = [passage for passage in passages if passage]
        if not passages:
            return name in _FORBIDDING
        return all(holds(passage) or holds(_unquoted(passage)) for passage in passages)

    return check


def _on_text(name: str, argument: str) -> Callable[[str], bool]:
    phrase, words = _wide(argument), _words(argument)
    simple: dict[str, Callable[[str], bool]] = {
        "keyword": lambda text: all(word in _wide(text) for word in words),
        "forbidden_word": lambda text: not any(word in _wide(text) for word in words),
        "startswith": lambda text: _wide(text).startswith(phrase),
        "not_startswith": lambda text: not _wide(text).startswith(phrase),
        "endswith": lambda text: _ends(text, phrase),
        "not_endswith": lambda text: not _ends(text, phrase),
        "match": lambda text: _wide(text) in (phrase, phrase + "。"),
        "constraint_punc": lambda text: not (set(_wide(text)) & _MARKS) - set(words),
    }
    if name in simple:
        return simple[name]
    if name == "keyword_num":
        few, many = (int(word) for word in words[:2])
        return lambda text: few <= sum(word in _wide(text) for word in words[2:]) <= many
    if name == "length":
        low, high = _range(argument)
        return lambda text: low <= len(text) <= high
    if name == "length_word":
        low, high = _range(argument)
        return lambda text: low <= len(text.split()) <= high
    if name == "Json":
        keys = {key for key in ast.literal_eval(argument) if key}
        return lambda text: _has_keys(text, keys)
    raise ValueError(f"no rule is called {name!r}")


def _range(argument: str) -> tuple[int, int]:
    low, high = ast.literal_eval(argument)
    if not isinstance(low, int) or not isinstance(high, int):
        raise ValueError(f"{argument!r} is not a pair of whole numbers")
    return low, high


def _words(argument: str) -> list[str]:
    return [_wide(word.strip()) for word in argument.strip("[]").split(",")]


def _wide(text: str) -> str:
    """Half-width marks as Chinese ones, one for one."""
    return text.translate(_FULL_WIDTH)


def _ends(text: str, phrase: str) -> bool:
    return _wide(text).endswith((phrase, phrase + "。", phrase + "？"))


def _unquoted(passage: str) -> str:
    quoted = len(passage) > 1 and passage[0] in '"“`' and passage[-1] in '"”`'
    return passage[1:-1] if quoted else passage


def _has_keys(text: str, keys: set[str]) -> bool:
    """Whether the first JSON object has exactly these keys; any, where none are asked for."""
    start = text.find("{")
    try:
        row, _ = json.JSONDecoder().raw_decode(text, start) if start >= 0 else (None, 0)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and (not keys or set(row) == keys)
