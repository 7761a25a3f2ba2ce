"""FollowBench (arXiv 2310.20410): instructions that grow by one constraint a level, 1 to 5.

HSR: share of answers that meet all constraints. SSR: share of constraints met. CSL: how many levels
in a row, from the first, an instruction's answers meet in full. Level 0 is context, not scored.

Items that code can check (by data source and level) follow the published scorer, sentence splitting
included, also where it is stricter or laxer than the instruction's words (a list is in
docs/evaluation.md). One difference: blanks around an answer are ignored.
"""

import ast
import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iopo.evaluation import items
from iopo.evaluation.items import Item, Measures, Question, Verdict, add

SOURCE = items.Source(
    benchmark="followbench",
    file="followbench.jsonl",
    origin=(
        "https://github.com/YJiangcm/FollowBench: its 12 JSON files joined into JSON Lines, with "
        "the fields language (en, zh) and constraint_type added"
    ),
    licence="Apache-2.0",
    sha256="dd6ae8f8ebb615193162d32e881f5f5ad10fa4e9e14254beae2a716b10faf5b6",
)
HEADLINE = ("HSR/en", "SSR/en", "CSL/en", "HSR/zh", "SSR/zh", "CSL/zh")
LEVELS = 5

Check = Callable[[str], bool]

# Sources whose answer is compared with `target`, at every level alike.
TARGETED = (
    "E2E", "WIKIEVENTS", "CONLL2003", "text_editing", "BBH_logical", "BBH_time",
    "self_made_space", "gsm_8k",
)  # fmt: skip
# Groups of the type "format" that code can check.
FORMAT_GROUPS = {"en": (22, 30), "zh": (22,)}

_PUNCTUATION_ZH = string.punctuation + "，。：’“”"


def load(path: str | Path) -> list[Item]:
    """The scored items, levels 1 to 5; `row["steps"]` holds the instruction at levels 0 .. level.

    Raises ValueError if a level is missing.
    """
    fields = {
        "language": str, "constraint_type": str, "example_id": int, "source": str,
        "level": int, "instruction": str, "target": str,
    }  # fmt: skip
    groups: dict[str, dict[int, dict[str, Any]]] = defaultdict(dict)
    for row in items.read_rows(path, fields):
        groups[group_id(row)][row["level"]] = row
    rows = []
    for name, levels in groups.items():
        first = 1 if name.split("/")[1] == "example" else 0
        if sorted(levels) != list(range(first, LEVELS + 1)):
            raise ValueError(f"{path}: {name} has the levels {sorted(levels)}; expected all to 5")
        for level in range(1, LEVELS + 1):
            steps = [levels[k]["instruction"] for k in range(first, level + 1)]
            rows.append({**levels[level], "steps": steps})
    return items.make_items(
        path,
        rows,
        lambda row: Item(
            f"{group_id(row)}/{row['level']}", items.user_turn(row["instruction"]), row
        ),
    )


def group_id(row: dict[str, Any]) -> str:
    """Of the instruction that the levels share."""
    return f"{row['language']}/{row['constraint_type']}/{row['example_id']}"


def question(item: Item, response: str) -> Question | None:
    """All added constraints; None where code can check the answer.

    Asked by the `robust` prompt only: the constraints have no text of their own.
    """
    row = item.row
    if _rule(row) is not None:
        return None
    task = "\n\n".join(f"Instruction {k}:\n{text}" for k, text in enumerate(row["steps"]))
    criteria = tuple(
        f"The constraint that instruction {k} adds to instruction {k - 1}"
        for k in range(1, row["level"] + 1)
    )
    return Question(item.id, task, criteria, response, 1, "list")


def by_code(item: Item, response: str) -> Verdict:
    """Scores of an item without a question: all or nothing, as published (so SSR equals HSR)."""
    held = bool(response.strip()) and follows(item.row, response)
    scores = [float(held)] * item.row["level"]
    return {"by": "code", "id": item.id, "status": "judged", "scores": scores}


def measures(all_items: list[Item], verdicts: list[Verdict]) -> Measures:
    """HSR and SSR by language, level and type, and CSL by language and type.

    The value of a language (and of a level in it) is the mean over the constraint types, as in the
    paper: an item weighs 1 over the number of items of its language, type and level.
    """
    table: Measures = {}
    scored = list(items.scored(all_items, verdicts))
    sizes = Counter(_cell(item) for item, _, _ in scored)
    met: dict[str, dict[int, bool]] = defaultdict(dict)
    for item, _, scores in scored:
        language, kind, level = _cell(item)
        hard, soft = float(all(scores)), sum(scores) / len(scores)
        met[group_id(item.row)][level] = bool(hard)
        weight = 1 / sizes[_cell(item)]
        for name, value in (("HSR", hard), ("SSR", soft)):
            add(table, f"{name}/{language}", item.id, value * weight, weight)
            add(table, f"{name}/{language}/level {level}", item.id, value * weight, weight)
            add(table, f"{name}/{language}/{kind}", item.id, value)
    _add_consistency(table, met)
    return table


def _cell(item: Item) -> tuple[str, str, int]:
    return item.row["language"], item.row["constraint_type"], item.row["level"]


def _add_consistency(table: Measures, met: dict[str, dict[int, bool]]) -> None:
    """CSL over groups whose five answers are all scored."""
    whole = {name: levels for name, levels in met.items() if len(levels) == LEVELS}
    sizes = Counter(name.rpartition("/")[0] for name in whole)  # by language and type
    for name, levels in whole.items():
        cell = name.rpartition("/")[0]
        row = 0
        while row < LEVELS and levels[row + 1]:
            row += 1
        weight = 1 / sizes[cell]
        add(table, f"CSL/{cell.partition('/')[0]}", name, row * weight, weight)
        add(table, f"CSL/{cell}", name, row)


# --- items that code can check


def _rule(row: dict[str, Any]) -> Check | None:
    """Whether an answer meets every constraint of the item; None where only a judge can tell."""
    language, level, source = row["language"], row["level"], row["source"]
    if row["constraint_type"] == "example":
        return lambda text: matches_template(row["target"], text)
    if row["constraint_type"] == "format" and row["example_id"] in FORMAT_GROUPS[language]:
        if row["example_id"] == 30:
            return lambda text: all(check(text) for check in _FORMAT_30[:level])
        return lambda text: _format_22(text, level, language)
    if source in _GRADED_EN:
        table = _GRADED_EN if language == "en" else _GRADED_ZH
        return lambda text: all(check(text) for check in table[source][:level])
    if source in TARGETED:
        return lambda text: _targeted(source, row["target"], text, language)
    return None


def follows(row: dict[str, Any], response: str) -> bool:
    """Whether the answer meets every constraint of an item that code can check."""
    rule = _rule(row)
    assert rule is not None, row["source"]
    return rule(response.strip())


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


def _en(text: str) -> list[str]:
    """Sentences, by the published splitter."""
    return [s for s in re.split("[.!?]", text) if s]


def _zh(text: str) -> list[str]:
    return [s for s in re.split("[。！？]", text) if s]


def _word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text) is not None


def _nth(sentences: list[str], number: int) -> str:
    return sentences[number - 1] if number <= len(sentences) else ""


def _words(text: str) -> int:
    return len(text.split(" "))  # the published count: runs of blanks count as empty words


# Sources with one check a level; the level-k answer must pass the first k.
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


def cluster(unit: str) -> str:
    """The group of an item's id, or of its own: each level holds the constraints of those below."""
    return "/".join(unit.split("/")[:3])


BENCHMARK = items.Benchmark(SOURCE, HEADLINE, load, measures, question, by_code, cluster)
