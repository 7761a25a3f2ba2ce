"""Kinds about the shape of a text: its frame, title, closing note, postscript, sections."""

import random
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from iopo.constraints import text as cut
from iopo.constraints.base import Constraint, Counted, Styled, wordings


class Wrapped(Styled):
    """The whole text stands between a pair of marks; IFEval's quotation is the first style."""

    kind = "wrapped"
    dimension = "Text pattern"
    excludes = "first_word last_word start_phrase end_phrase"
    styles = {
        "double quotes": ("double quotation marks", "英文双引号"),
        "parentheses": ("parentheses, ( and )", "圆括号()"),
        "square brackets": ("square brackets, [ and ]", "方括号[]"),
        "curly braces": ("curly braces, { and }", "花括号{}"),
        "asterisks": ("three asterisks on each side, ***", "两侧各三个星号***"),
    }
    _MARKS: ClassVar[dict[str, tuple[str, str]]] = {
        "double quotes": ('"', '"'),
        "parentheses": ("(", ")"),
        "square brackets": ("[", "]"),
        "curly braces": ("{", "}"),
        "asterisks": ("***", "***"),
    }
    templates = wordings("""
        Wrap your entire response in {name}.
        Put the whole answer between {name}.
        Your complete reply must be enclosed in {name}.
        Begin and end the response with {name} around it.
        请把整个回答放在{name}中。
        全部回复必须用{name}括起来。
        整个答案应以{name}包住。
        回答首尾须用{name}包围。
    """)

    def check(self, text: str) -> bool:
        opening, closing = self._MARKS[self.style]
        text = text.strip()
        whole = len(text) >= len(opening) + len(closing)
        return whole and text.startswith(opening) and text.endswith(closing)

    def _edit(self, text: str, rng: random.Random) -> str | None:
        opening, closing = self._MARKS[self.style]
        inner = text.strip().strip('"()[]{}*').strip()
        return f"{opening}{inner}{closing}" if inner else None


class FirstLineTitle(Styled):
    """The first line is a title in the given marks; something follows it."""

    kind = "first_line_title"
    dimension = "Hierarchical structure"
    excludes = "first_word start_phrase wrapped"
    styles = {
        "angle brackets": ("in double angular brackets: <<title>>", "<<标题>>"),
        "bold": ("in bold markdown: **title**", "**标题**"),
        "heading": ("as a markdown heading: # title", "# 标题"),
        "square brackets": ("in double square brackets: [[title]]", "[[标题]]"),
        "equals signs": ("between equals signs: == title ==", "== 标题 =="),
    }
    _PATTERNS: ClassVar[dict[str, re.Pattern[str]]] = {
        "angle brackets": re.compile(r"<<([^<>]*)>>"),
        "bold": re.compile(r"\*\*([^*]*)\*\*"),
        "heading": re.compile(r"#{1,6} (.*)"),
        "square brackets": re.compile(r"\[\[([^\[\]]*)\]\]"),
        "equals signs": re.compile(r"==([^=]*)=="),
    }
    templates = wordings("""
        Your answer must begin with a title on a line of its own {name}.
        Put a title on the first line {name}.
        The first line of the response should be a title {name}.
        Start with a title line, written {name}.
        第一行必须是标题，格式为 {name}。
        请在首行写标题，格式：{name}。
        回答应以单独一行的标题开始，写成 {name}。
        请先写一行标题，形式为 {name}。
    """)

    def check(self, text: str) -> bool:
        lines = cut.lines(text)
        title = self._PATTERNS[self.style].fullmatch(lines[0]) if len(lines) > 1 else None
        return title is not None and any(map(str.isalnum, title[1]))

    def _edit(self, text: str, rng: random.Random) -> str | None:
        title = " ".join(word.capitalize() for word in cut.letter_words(text)[:4])
        written = self.styles[self.style][1].replace("标题", title)
        return f"{written}\n\n{text.strip()}" if title else None


@dataclass(frozen=True)
class ClosingNote(Constraint):
    """The last line begins with the marker, in any case."""

    marker: str

    kind = "closing_note"
    dimension = "Template"
    excludes = "last_word end_phrase wrapped"
    MARKERS: ClassVar[tuple[str, ...]] = ("P.S.", "P.P.S.", "Note:", "TL;DR:", "Summary:", "Tip:")
    templates = wordings("""
        End with a last line that starts with {marker}
        The last line of your response must be a note that begins with {marker}
        Add one closing line at the very end, starting with {marker}
        Finish with a line which opens with {marker}
        最后一行必须以 {marker} 开头。
        请在末尾加一行，以 {marker} 开始。
        回答的末行应是以 {marker} 起头的附注。
        请用以 {marker} 开头的一行收尾。
    """)

    def __post_init__(self) -> None:
        self._require(self.marker in self.MARKERS, "marker", f"one of {self.MARKERS}")

    def check(self, text: str) -> bool:
        lines = cut.lines(text)
        return len(lines) > 1 and lines[-1].lower().startswith(self.marker.lower())

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [{"marker": marker} for marker in cls.MARKERS if cls(marker).check(text)]

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        return [ClosingNote(marker) for marker in self.MARKERS if marker != self.marker]

    def _edit(self, text: str, rng: random.Random) -> str | None:
        sentences = cut.sentences(text)
        if len(sentences) < 2:
            return None
        head = text[: text.rindex(sentences[-1])].rstrip(" \t\n-*")
        return f"{head}\n\n{self.marker} {sentences[-1]}"


class Titles(Counted):
    """Number of lines with a <<title>> that is not empty; IFEval's title is one at least."""

    kind = "title"
    dimension = "Hierarchical structure"
    excludes = "first_line_title"
    unit = (
        "title wrapped in double angular brackets, such as <<poem of joy>>",
        "titles wrapped in double angular brackets, such as <<poem of joy>>",
        "个用双尖括号括起的标题，例如<<欢乐颂>>",
    )
    smallest = 0

    def count(self, text: str) -> int:
        # the insides of the matches of <<[^\n]+>>, in linear time: at most one a line
        titles = (s.partition("<<")[2].rpartition(">>")[0] for s in text.split("\n"))
        return sum(1 for title in titles if title.lstrip("<").rstrip(">").strip())

    def _edit(self, text: str, rng: random.Random) -> str | None:
        title = " ".join(cut.letter_words(text)[:4])
        edited = text.replace("<<", "").replace(">>", "").strip()
        if self.number and title and edited:
            edited = "\n".join([f"<<{title}>>"] * self.number) + "\n\n" + edited
        return edited


@dataclass(frozen=True)
class Postscript(Constraint):
    """A postscript that begins with the marker, spaces allowed inside it; IFEval's rule.

    For an exclusive choice of markers use closing_note.
    """

    marker: str

    kind = "postscript"
    dimension = "Template"
    excludes = "case last_word end_phrase wrapped closing_note"
    templates = wordings("""
        At the end of your response, add a postscript starting with {marker}
        Add a postscript that begins with {marker}
        Your answer must close with a postscript marked {marker}
        Finish with a postscript, starting with {marker}
        请在结尾加上以 {marker} 开头的附言。
        回答末尾必须有以 {marker} 起始的附言。
        请附上一段 {marker} 开头的后记。
        最后请写一条以 {marker} 标出的附言。
    """)

    def __post_init__(self) -> None:
        self._require_text("marker", "a marker such as 'P.S.'")

    def check(self, text: str) -> bool:
        spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
        pattern = spaced.get(self.marker) or re.escape(self.marker.lower())
        return re.search(pattern, text.lower()) is not None

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [{"marker": marker} for marker in ("P.S.", "P.P.S") if cls(marker).check(text)]

    def _edit(self, text: str, rng: random.Random) -> str | None:
        sentences = cut.sentences(text)
        return f"{text.rstrip()}\n\n{self.marker} {sentences[-1]}" if sentences else None


@dataclass(frozen=True)
class Sections(Counted):
    """Number of sections that begin with `splitter` and a number; IFEval's multiple_sections."""

    splitter: str

    kind = "sections"
    dimension = "Hierarchical structure"
    excludes = "lines"
    smallest = 0
    unit = ("section", "sections", "个部分")
    templates = wordings("""
        Your response must have {relation} {number} {unit}. Mark the beginning of each with \
            {splitter} X, such as {splitter} 1.
        Divide the answer into {relation} {number} {unit}, each opened by {splitter} X.
        Write {relation} {number} {unit} headed {splitter} 1, {splitter} 2 and so on.
        Use {relation} {number} {unit}; start each of them with {splitter} and a number.
        回答必须有{relation}{number}个部分，各以 {splitter} 加数字开头，如 {splitter} 1。
        请把答案分为{relation}{number}个部分，各以 {splitter} 和编号起始。
        请写{relation}{number}个部分，标题依次为 {splitter} 1、{splitter} 2 等。
        回复应含{relation}{number}个部分，每个以 {splitter} 及其编号开头。
    """)
    templates_none = wordings("""
        Do not mark any part of the answer with {splitter} and a number.
        Your response must not contain headings such as {splitter} 1.
        Avoid numbered headings like {splitter} 1.
        Write without any {splitter} headings.
        不要用 {splitter} 加数字来标记任何部分。
        回答中不得出现 {splitter} 1 这样的标题。
        请避免使用 {splitter} 1 之类的标题。
        请不要写 {splitter} 加编号的标题。
    """)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_text("splitter", "a heading word such as 'Section'")

    def count(self, text: str) -> int:
        return len(re.findall(r"\s?" + re.escape(self.splitter) + r"\s?\d+\s?", text))

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return [
            {**bound, "splitter": splitter}
            for splitter in ("Section", "SECTION", "Day", "Part")
            if splitter in text
            for bound in cls.bounds(cls("exactly", 0, splitter).count(text))
        ]

    def _edit(self, text: str, rng: random.Random) -> str | None:
        if not self.number or self.count(text):
            return text
        parts = cut.dealt_sentences(text, self.number) or ()
        return "\n\n".join(f"{self.splitter} {i}\n{part}" for i, part in enumerate(parts, 1))
