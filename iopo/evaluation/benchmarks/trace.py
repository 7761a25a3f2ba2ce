"""TRACE (arXiv 2411.06208): 1,042 instructions with 1 to 15 constraints, scored by a judge.

An instruction is followed only if every constraint gets 10 of 10 (Eq. 3). IF-S is the share over
the instructions with one constraint, IF-M over those with more.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

from iopo.evaluation.items import Item, Measures, Source, require_fields, require_unique
from iopo.evaluation.judge.prompts import Question
from iopo.files import read_records

SOURCE = Source(
    benchmark="trace",
    file="202409_trace_evaluation.jsonl",
    origin="https://github.com/Tongyi-CCAI/Complex-IF (TRACE/TRACE)",
    licence="MIT",
    sha256="ca9e7577ee0732021db49ba7cb6ad3632eadb8398b1129fe54d104ded41b78f4",
)
MAXIMUM = 10
LOWER_BAR = 8  # "exactly 10" depends much on the judge; shown beside it
HEADLINE = ("IF-S", "IF-M", "IF", "mean_score")

# Paper, table 6. A tag that is not here is counted as "Other", never dropped.
TYPES: dict[str, tuple[str, ...]] = {
    "Content": (
        "主题约束", "排除约束", "包含约束", "价值观约束", "隐私约束", "数值约束",
    ),
    "Situation": (
        "角色扮演约束", "受众目标约束", "先验条件约束", "自然语言流程背景信息约束",
        "markdown流程背景信息约束", "表格背景信息约束", "文本背景信息约束",
    ),
    "Style": ("语气风格约束", "情感情绪约束", "语言特征约束", "多语言约束"),
    "Format": (
        "输出格式约束", "文本样式约束", "语法结构约束", "引用和参考约束", "编号和列表约束",
        "层次化结构约束", "模版约束",
    ),
    "Example": ("正例约束", "负例约束"),
}  # fmt: skip
TYPE_OF = {dimension: kind for kind, names in TYPES.items() for dimension in names}
ENGLISH = {
    "主题约束": "Theme", "排除约束": "Exclusion", "包含约束": "Inclusion", "价值观约束": "Value",
    "隐私约束": "Privacy", "数值约束": "Numerical", "角色扮演约束": "Role-playing",
    "受众目标约束": "Target audience", "先验条件约束": "Prior condition",
    "自然语言流程背景信息约束": "Prose process background",
    "markdown流程背景信息约束": "Markdown process background",
    "表格背景信息约束": "Table background", "文本背景信息约束": "Text background",
    "语气风格约束": "Tone and style", "情感情绪约束": "Emotion",
    "语言特征约束": "Linguistic characteristics", "多语言约束": "Multilingual",
    "输出格式约束": "Output format", "文本样式约束": "Text pattern",
    "语法结构约束": "Grammar structure", "引用和参考约束": "Citation",
    "编号和列表约束": "Numbering and list", "层次化结构约束": "Hierarchical structure",
    "模版约束": "Template", "正例约束": "Positive example", "负例约束": "Negative example",
}  # fmt: skip


def load(path: Path) -> list[Item]:
    """Items with the conversation as published (system and user turn). Raises ValueError."""
    rows = read_records(path)
    fields = {
        "id": str, "messages": list, "description": str, "constraints": str, "input": str,
        "constraints_splits": list, "levels2": list,
    }  # fmt: skip
    require_fields(path, rows, fields)
    for row in rows:
        if not row["constraints_splits"] or len(row["constraints_splits"]) != len(row["levels2"]):
            raise ValueError(
                f"{path}: item {row['id']}: {len(row['constraints_splits'])} constraints and "
                f"{len(row['levels2'])} tags; expected as many tags as constraints, at least one"
            )
    items = [Item(row["id"], tuple(row["messages"]), row) for row in rows]
    return require_unique(path, items)


def questions(item: Item, response: str) -> list[Question]:
    """One question with all constraints; description and input are both the task."""
    row = item.row
    given = "" if row["input"].strip() == "NULL" else f"\n{row['input']}"
    return [
        Question(
            id=item.id,
            task=row["description"] + given,
            criteria=tuple(row["constraints_splits"]),
            response=response,
            maximum=MAXIMUM,
            format="trace",
        )
    ]


def stray_tags(items: list[Item]) -> dict[str, int]:
    """Tags outside the paper's 26 dimensions, with their counts."""
    found: dict[str, int] = defaultdict(int)
    for item in items:
        for tag in item.row["levels2"]:
            if tag not in TYPE_OF:
                found[tag] += 1
    return dict(found)


def measures(items: list[Item], verdicts: list[dict[str, Any]]) -> Measures:
    """Shares of followed instructions and constraints; verdicts without scores are left out."""
    table: Measures = defaultdict(dict)
    for item, verdict in zip(items, verdicts, strict=True):
        scores = verdict["scores"]
        if scores is None:
            continue
        count = len(scores)
        followed = float(all(s == MAXIMUM for s in scores))
        mean = sum(scores) / count
        bucket = str(count) if count < 10 else "10+"
        for name in ("IF", "IF-S" if count == 1 else "IF-M", f"constraints/{bucket}"):
            table[name][item.id] = (followed, 1)
        table[f"category/{item.row.get('category', 'none')}"][item.id] = (followed, 1)
        table["language/zh" if _chinese(item) else "language/other"][item.id] = (followed, 1)
        table["mean_score"][item.id] = (mean / MAXIMUM, 1)
        table["constraints_met"][item.id] = (sum(s == MAXIMUM for s in scores), count)
        table[f"constraints_at_least_{LOWER_BAR}"][item.id] = (
            sum(s >= LOWER_BAR for s in scores),
            count,
        )
        if verdict["overall"] is not None:
            table["overall_is_10"][item.id] = (float(verdict["overall"] == MAXIMUM), 1)
            table["overall_differs"][item.id] = (float(abs(verdict["overall"] - mean) > 1), 1)
        _by_tag(table, item, scores)
    return dict(table)


def _by_tag(table: Measures, item: Item, scores: list[float]) -> None:
    for tag, score in zip(item.row["levels2"], scores, strict=True):
        kind = TYPE_OF.get(tag, "Other")
        for name in (f"type/{kind}", f"dimension/{ENGLISH.get(tag, f'Other: {tag}')}"):
            met, count = table[name].get(item.id, (0.0, 0.0))
            table[name][item.id] = (met + (score == MAXIMUM), count + 1)


def _chinese(item: Item) -> bool:
    text = item.row["description"] + item.row["constraints"]
    return any("一" <= character <= "鿿" for character in text)
