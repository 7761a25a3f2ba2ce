"""FollowBench items that code can check, by data source and level; all constraints must hold.

The checks follow the published scorer, sentence splitting included, also where it is stricter or
laxer than the instruction's words (a list is in docs/evaluation.md). One difference: blanks around
an answer are ignored.
"""

import ast
import re
import string
from collections.abc import Callable

Check = Callable[[str], bool]

# Sources with one check a level; the level-k answer must pass the first k.
GRADED = ("cnn_dailymail", "xsum", "samsum", "gigaword", "arxiv")
# Sources whose answer is compared with `target`, at every level alike.
TARGETED = (
    "E2E", "WIKIEVENTS", "CONLL2003", "text_editing", "BBH_logical", "BBH_time",
    "self_made_space", "gsm_8k",
)  # fmt: skip
# Groups of the type "format" that code can check.
FORMAT_GROUPS = {"en": (22, 30), "zh": (22,)}

_PUNCTUATION_ZH = string.punctuation + "，。：’“”"


def has_rule(language: str, constraint_type: str, source: str, example_id: int) -> bool:
    """Whether code scores this group; the judge scores the others."""
    if constraint_type == "example":
        return True
    if constraint_type == "format" and example_id in FORMAT_GROUPS[language]:
        return True
    return source in GRADED + TARGETED


def follows(row: dict, response: str) -> bool:
    """Whether the answer meets every constraint of the item."""
    text = response.strip()
    language, level = row["language"], row["level"]
    if row["constraint_type"] == "example":
        return matches_template(row["target"], text)
    if row["constraint_type"] == "format" and row["example_id"] in FORMAT_GROUPS[language]:
        if row["example_id"] == 30:
            return all(check(text) for check in _FORMAT_30[:level])
        return _format_22(text, level, language)
    if row["source"] in GRADED:
        table = _GRADED_EN if language == "en" else _GRADED_ZH
        return all(check(text) for check in table[row["source"]][:level])
    return _targeted(row["source"], row["target"], text, language)


def matches_template(template: str, text: str) -> bool:
    """The answer has the form of the examples: the template with anything in place of {answer}."""
    shape = template.replace("{instruction}\n", "").replace("{{", "{").replace("}}", "}")
    # The published check lets the dot stop at line ends, so an answer is one line.
    pattern = ".*".join(re.escape(part) for part in shape.split("{answer}"))
    return re.fullmatch(pattern, text) is not None


def _targeted(source: str, target: str, text: str, language: str) -> bool:
    if source in ("E2E", "text_editing"):
        return text == target.strip()
    if source == "WIKIEVENTS":
        return set(text.split("\n")) <= set(target.split("\n"))
    if source == "CONLL2003":
        return text in ast.literal_eval(target)
    if source == "self_made_space":
        return target in text
    money = r"\$\d+" if language == "en" else r"\d+美元"
    patterns = {"BBH_logical": r"\([A-Z]\)", "BBH_time": r"\d{2}/\d{2}/\d{4}", "gsm_8k": money}
    found = re.findall(patterns[source], text)
    return bool(found) and found[-1] == target


def _sentences(text: str, ends: str) -> list[str]:
    return [s for s in re.split(f"[{ends}]", text) if s]


def _en(text: str) -> list[str]:
    return _sentences(text, ".!?")


def _zh(text: str) -> list[str]:
    return _sentences(text, "。！？")


def _word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _nth(sentences: list[str], number: int) -> str:
    return sentences[number - 1] if number <= len(sentences) else ""


def _words(text: str) -> int:
    return len(text.split(" "))  # the published count: runs of blanks count as empty words


_GRADED_EN: dict[str, tuple[Check, ...]] = {
    "cnn_dailymail": (
        lambda t: len(_en(t)) == 3,
        lambda t: all(len(s.split()) < 15 for s in _en(t)),
        lambda t: all(
            _word(_nth(_en(t), n), w) for n, w in ((1, "Potter"), (2, "actor"), (3, "films"))
        ),
        lambda t: not _word(_nth(_en(t), 2), "lavish"),
        lambda t: re.search(r"\b(has|have)\s+\w+", _nth(_en(t), 3)) is not None,
    ),
    "xsum": (
        lambda t: len(_en(t)) == 1,
        lambda t: _words(t) < 20,
        lambda t: not _word(t, "Newton Stewart"),
        lambda t: re.search(r"\b(am|is|are)\s+\w+ing\b", t) is not None,
        lambda t: _word(t, "operation"),
    ),
    "samsum": (
        lambda t: len(_en(t)) == 1,
        lambda t: _words(t) < 15,
        lambda t: _word(t, "stuff"),
        lambda t: "procrast" not in t.lower(),
        lambda t: sum(c in string.punctuation for c in t) == 1,
    ),
    "gigaword": (
        lambda t: _words(t) == 8,
        lambda t: not any(c in string.punctuation for c in t),
        lambda t: t.islower(),
        lambda t: not _word(t, "bus"),
        lambda t: _word(t, "in"),
    ),
    "arxiv": (
        lambda t: len(_en(t)) == 1,
        lambda t: _words(t) <= 20,
        lambda t: t.startswith("We"),
        lambda t: _word(t, "activations"),
        lambda t: not _word(t, "transformer"),
    ),
}

_GRADED_ZH: dict[str, tuple[Check, ...]] = {
    "cnn_dailymail": (
        lambda t: len(_zh(t)) == 3,
        lambda t: all(len(s) < 15 for s in _zh(t)),
        lambda t: all(w in _nth(_zh(t), n) for n, w in ((1, "波特"), (2, "演员"), (3, "电影"))),
        lambda t: "奢侈" not in _nth(_zh(t), 2),
        lambda t: "了" in _nth(_zh(t), 3),
    ),
    "xsum": (
        lambda t: len(_zh(t)) == 1,
        lambda t: len(t) < 20,
        lambda t: "牛顿斯图尔特" not in t,
        lambda t: "在" in t,
        lambda t: "操作" in t,
    ),
    "samsum": (
        lambda t: len(_zh(t)) == 1,
        lambda t: len(t) < 15,
        lambda t: "琐碎的" in t,
        lambda t: "拖沓的" not in t,
        lambda t: sum(c in _PUNCTUATION_ZH for c in t) == 1,
    ),
    "gigaword": (
        lambda t: len(t) == 8,
        lambda t: not any(c in _PUNCTUATION_ZH for c in t),
        lambda t: not any(c.isnumeric() for c in t),
        lambda t: "公交车" not in t,
        lambda t: "在" in t,
    ),
    "arxiv": (
        lambda t: len(_zh(t)) == 1,
        lambda t: len(t) <= 20,
        lambda t: t.startswith("我们"),
        lambda t: "激活" in t,
        lambda t: "transformer" not in t,
    ),
}


def _format_22(text: str, level: int, language: str) -> bool:
    """Numbered paragraphs of short number and long sentences; a fourth one ends level 5."""
    split = _en if language == "en" else _zh
    size = (lambda s: len(s.split())) if language == "en" else len
    ending = "Those are suggestions" if language == "en" else "这些是建议"
    paragraphs = text.split("\n\n")
    numbered = all(re.match(r"\d+\.", p.lstrip()) for p in paragraphs if p.strip())
    checks = (
        len(paragraphs) == (4 if level == 5 else 3),
        all(len(split(p)) < 3 for p in paragraphs[:3]),
        all(size(s) > 20 for s in split(text)),
        numbered,
        text.endswith(ending),
    )
    return all(checks[:level])


def _speech_sentences(text: str) -> list[str]:
    # A blank after "." or "?", but not after "e.g." or "Mr."
    return re.split(r"(?<!\w\.\w.)(?<![A-Z][a-z]\.)(?<=\.|\?)\s", text)


_FORMAT_30: tuple[Check, ...] = (
    lambda t: "**" in t,
    lambda t: len(re.findall(r"\*\*\d.+?:", t)) == 5,
    lambda t: all(
        len(s.split(".")) < 3
        for s in _speech_sentences(t)
        if any(f"{number}." in s for number in range(1, 6))
    ),
    lambda t: all(10 <= len(s.split()) <= 15 for s in _speech_sentences(t)),
    lambda t: not any(w.endswith("-ly") for w in t.split()),
)
