"""The layout of the whole text: JSON, a list, a table or prose."""

import json
import random
import re
from functools import lru_cache

from iopo.constraints import text as cut
from iopo.constraints.base import Styled, wordings

_LINE_STYLES = {
    "bullet list": re.compile(r"[-*•] +\S.*"),
    "numbered list": re.compile(r"\d+[.)] +\S.*"),
    "table": re.compile(r"\|.*\|"),
}
_MARKED_LINE = re.compile(r"[-*•] |\d+[.)] |\||#+ |```|[{\[>]")


class Layout(Styled):
    """Every line of the text has one layout: JSON, bullets, numbers, a table, or plain prose."""

    kind = "layout"
    dimension = "Output format"
    excludes = (
        "sentences lines paragraphs bullets numbered_items placeholders highlights commas "
        "first_word last_word start_phrase end_phrase wrapped first_line_title closing_note "
        "title postscript sections"
    )
    styles = {
        "json": ("a JSON object or array, with nothing around it", "一个JSON对象或数组"),
        "bullet list": ("a bullet list, every line starting with '- '", "每行以“- ”开头的列表"),
        "numbered list": ("a numbered list, every line numbered", "每行带编号的列表"),
        "table": ("a markdown table", "一个markdown表格"),
        "plain prose": (
            "plain prose without lists, headings or tables",
            "不含列表、标题和表格的普通文字",
        ),
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

    def _edit(self, text: str, rng: random.Random) -> str | None:
        items = [sentence.strip("-*• |#") for sentence in cut.sentences(text)]
        items = [item for item in items if item]
        if self.style == "json":
            return json.dumps({"answer": items}, ensure_ascii=False, indent=2) if items else None
        if self.style == "plain prose":
            return " ".join(items)
        if self.style == "table":
            return "\n".join(["| Point |", "| --- |", *(f"| {item} |" for item in items)])
        bullet = self.style == "bullet list"
        return "\n".join(f"- {s}" if bullet else f"{i}. {s}" for i, s in enumerate(items, 1))


@lru_cache(maxsize=cut.KEPT)
def parse_json(text: str) -> bool:
    """Whether the text is JSON; numbers too long and nesting too deep are refused, not raised."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
