"""Kinds whose styles exclude one another over the whole text: its layout and its language."""

import json
import random
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from iopo.constraints import text as cut
from iopo.constraints.base import Styled, wordings

_LINE_STYLES = {
    "bullet list": re.compile(r"[-*•] +\S.*"),
    "numbered list": re.compile(r"\d+[.)] +\S.*"),
    "table": re.compile(r"\|.*\|"),
}
_MARKED_LINE = re.compile(r"[-*•] |\d+[.)] |\||#+ |```|[{\[>]")


@dataclass(frozen=True)
class Layout(Styled):
    """Every line of the text has one layout: JSON, bullets, numbers, a table, or plain prose."""

    style: str

    kind = "layout"
    dimension = "Output format"
    excludes = (
        "sentences lines paragraphs bullets numbered_items placeholders highlights commas "
        "first_word last_word start_phrase end_phrase wrapped first_line_title closing_note "
        "title postscript sections"
    )
    styles = {
        "json": {
            "en": "a JSON object or array, with nothing around it",
            "zh": "一个JSON对象或数组",
        },
        "bullet list": {
            "en": "a bullet list, every line starting with '- '",
            "zh": "每行以“- ”开头的列表",
        },
        "numbered list": {"en": "a numbered list, every line numbered", "zh": "每行带编号的列表"},
        "table": {"en": "a markdown table", "zh": "一个markdown表格"},
        "plain prose": {
            "en": "plain prose without lists, headings or tables",
            "zh": "不含列表、标题和表格的普通文字",
        },
    }
    templates = wordings("""
        Format your entire response as {name}.
        The whole answer must be {name}.
        Present the reply as {name} only.
        Write the response entirely as {name}.
        整个回答必须是{name}。
        请把全部回复写成{name}。
        答案只能采用{name}的形式。
        请完全以{name}的形式作答。
    """)

    def check(self, text: str) -> bool:
        if self.style == "json":
            return text.strip()[:1] in "{[" and parse_json(text.strip())
        lines = cut.lines(text)
        if self.style == "plain prose":
            return bool(lines) and not any(map(_MARKED_LINE.match, lines))
        return len(lines) > 1 and all(map(_LINE_STYLES[self.style].fullmatch, lines))

    def edit(self, text: str, rng: random.Random) -> str | None:
        items = [sentence.strip("-*• |#") for sentence in cut.sentences(text)]
        items = [item for item in items if item]
        if self.style == "json":
            return json.dumps({"answer": items}, ensure_ascii=False, indent=2) if items else None
        if self.style == "plain prose":
            edited = " ".join(items)
        elif self.style == "table":
            edited = "\n".join(["| Point |", "| --- |", *(f"| {item} |" for item in items)])
        else:
            bullet = self.style == "bullet list"
            edited = "\n".join(f"- {s}" if bullet else f"{i}. {s}" for i, s in enumerate(items, 1))
        return edited if edited and self.check(edited) else None


@lru_cache(maxsize=8)
def parse_json(text: str) -> bool:
    """Whether the text is JSON; numbers too long and nesting too deep are refused, not raised."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


@dataclass(frozen=True)
class Language(Styled):
    """The script of at least 90% of the letters: Latin, Chinese, Cyrillic or Arabic."""

    style: str

    kind = "language"
    dimension = "Multilingual"
    excludes = (
        "words han_characters capital_words case first_word last_word start_phrase end_phrase "
        "include_words word_frequency"
    )
    styles = {
        "latin": {"en": "English", "zh": "英文"},
        "chinese": {"en": "Chinese", "zh": "中文"},
        "cyrillic": {"en": "Russian", "zh": "俄文"},
        "arabic": {"en": "Arabic", "zh": "阿拉伯文"},
    }
    _SCRIPTS: ClassVar[dict[str, re.Pattern[str]]] = {
        "latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
        "chinese": re.compile(f"[{cut.CJK}]"),
        "cyrillic": re.compile(r"[\u0400-\u04ff]"),
        "arabic": re.compile(r"[\u0600-\u06ff]"),
    }
    templates = wordings("""
        Your entire response must be in {name}.
        Answer in {name} only.
        Write the whole reply in {name}; no other language is allowed.
        Respond exclusively in {name}.
        请只用{name}回答。
        整个回答必须使用{name}。
        全文应为{name}，不得使用其他语言。
        回复只能用{name}书写。
    """)

    def check(self, text: str) -> bool:
        if text.isascii():
            return self.style == "latin" and any(map(str.isalpha, text))
        letters = _letters(text)
        own = len(self._SCRIPTS[self.style].findall(text))
        return letters > 0 and own * 10 >= letters * 9


@lru_cache(maxsize=8)
def _letters(text: str) -> int:
    return sum(map(str.isalpha, text))
