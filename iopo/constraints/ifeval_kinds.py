"""IFEval's rules where they differ from the kinds of the other files; same interface, same names.

The definitions are those of google-research/instruction_following_eval, peculiarities included:
published scores depend on them.
"""

import random
import re
from dataclasses import dataclass
from typing import Any

from iopo.constraints.base import Constraint, wordings
from iopo.constraints.keywords import ForbidWords, IncludeWords, WordFrequency
from iopo.constraints.layout import Layout, parse_json
from iopo.constraints.lengths import Paragraphs, Sentences
from iopo.constraints.marks import CapitalWords
from iopo.constraints.text import capital_tokens, detect_language, punkt_sentences
from iopo.constraints.wording import Case, StartPhrase

_DIVIDER = re.compile(r"\s?\*\*\*\s?")
_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def _compiled(constraint: Constraint, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ValueError(
            f"constraint '{constraint.kind}': {pattern!r} is no regular expression ({error})"
        ) from error


class Official:
    """Mixed into every kind here: a rule that scores, and that construction does not ask for."""

    @classmethod
    def measure(cls, text: str) -> list[dict[str, Any]]:
        return []

    def alternatives(self, rng: random.Random) -> list[Constraint]:
        return []

    def edit(self, text: str, rng: random.Random) -> str | None:
        return None


@dataclass(frozen=True)
class EnglishCase(Official, Case):
    """Lower or upper case throughout, and English as langdetect sees it."""

    kind = "english_case"
    excludes = "capital_words case postscript language"
    styles = {style: Case.styles[style] for style in ("lower", "upper")}

    def check(self, text: str) -> bool:
        # where no language is found the official scorer counts the case alone
        return super().check(text) and detect_language(text) in ("en", None)


@dataclass(frozen=True)
class Keywords(Official, IncludeWords):
    """Every keyword is found as a regular expression, inside words too."""

    kind = "keywords"
    excludes = "include_words language"

    def __post_init__(self) -> None:
        super().__post_init__()
        for word in self.words:
            _compiled(self, word)

    def spans(self, text: str, word: str) -> list[tuple[int, int]]:
        return [match.span() for match in _compiled(self, word).finditer(text)]


@dataclass(frozen=True)
class KeywordFrequency(Official, WordFrequency):
    """How often the keyword is found as a regular expression, inside words too."""

    kind = "keyword_frequency"
    excludes = "word_frequency language"
    smallest = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _compiled(self, self.word)

    def count(self, text: str) -> int:
        return sum(1 for _ in _compiled(self, self.word).finditer(text))


@dataclass(frozen=True)
class ForbiddenWords(Official, ForbidWords):
    r"""No word of the list is found between \b marks, as a regular expression."""

    kind = "forbidden_words"
    excludes = "forbid_words"

    def __post_init__(self) -> None:
        super().__post_init__()
        for word in self.words:
            _compiled(self, word)

    def spans(self, text: str, word: str) -> list[tuple[int, int]]:
        return [match.span() for match in _compiled(self, rf"\b{word}\b").finditer(text)]


@dataclass(frozen=True)
class PunktSentences(Official, Sentences):
    """Number of sentences by the Punkt model; slower than `sentences` and English only."""

    kind = "punkt_sentences"
    excludes = "sentences bullets numbered_items layout"

    def count(self, text: str) -> int:
        return punkt_sentences(text)


@dataclass(frozen=True)
class CapitalTokens(Official, CapitalWords):
    """Number of word tokens in capitals throughout, by NLTK's tokenizer."""

    kind = "capital_tokens"
    excludes = "capital_words case language english_case"

    def count(self, text: str) -> int:
        return capital_tokens(text)


@dataclass(frozen=True)
class DividedParagraphs(Official, Paragraphs):
    """Number of paragraphs with *** between them; an empty one inside counts as no answer."""

    kind = "divided_paragraphs"
    excludes = "lines paragraphs wrapped sections layout"
    unit_en = (
        "paragraph; separate paragraphs with the markdown divider ***",
        "paragraphs separated by the markdown divider ***",
    )
    unit_zh = "个以***分隔的段落"

    def count(self, text: str) -> int:
        """The number of paragraphs, -1 where one between two dividers is empty."""
        parts = _DIVIDER.split(text)
        if any(not part.strip() for part in parts[1:-1]):
            return -1
        return sum(1 for part in parts if part.strip())

    def check(self, text: str) -> bool:
        return self.count(text) >= 0 and super().check(text)


@dataclass(frozen=True)
class NthParagraphFirstWord(Official, Constraint):
    """The text has `paragraphs` blocks split by blank lines; the nth begins with the word."""

    paragraphs: int
    nth: int
    word: str

    kind = "nth_paragraph_first_word"
    dimension = "Inclusion"
    excludes = "paragraphs divided_paragraphs"
    templates = {
        "en": (
            "There should be {paragraphs} paragraphs, separated by two line breaks. "
            "Paragraph {nth} must start with the word '{word}'.",
            "Write {paragraphs} paragraphs with a blank line between them; "
            "begin paragraph {nth} with '{word}'.",
            "Use {paragraphs} paragraphs split by blank lines, number {nth} opening with '{word}'.",
            "Your answer needs {paragraphs} paragraphs, blank lines between them, and the first "
            "word of paragraph {nth} must be '{word}'.",
        ),
        "zh": (
            "回答应有{paragraphs}个段落，以空行分隔，第{nth}段必须以“{word}”开头。",
            "请写{paragraphs}段，段间空一行，第{nth}段的第一个词是“{word}”。",
            "全文分为{paragraphs}段（空行分隔），第{nth}段由“{word}”起始。",
            "请用空行隔开{paragraphs}个段落，并让第{nth}段以“{word}”一词开始。",
        ),
    }

    def __post_init__(self) -> None:
        whole = isinstance(self.paragraphs, int) and isinstance(self.nth, int)
        self._require(whole and self.nth >= 1, "nth", "a whole number, 1 or more")
        self._require(self.paragraphs >= self.nth, "paragraphs", f"at least nth={self.nth}")
        ok = isinstance(self.word, str) and bool(self.word.strip())
        self._require(ok and self.word == self.word.lower(), "word", "a lower-case word")

    def check(self, text: str) -> bool:
        blocks = text.split("\n\n")
        filled = sum(1 for block in blocks if block.strip())
        # blocks are indexed with the empty ones among them, as in the official scorer
        if filled != self.paragraphs or not blocks[self.nth - 1].strip():
            return False
        word = blocks[self.nth - 1].split()[0].lstrip("'").lstrip('"')
        return re.split(r"[.,?!'\"]", word, maxsplit=1)[0].lower() == self.word


@dataclass(frozen=True)
class TwoResponses(Official, Constraint):
    """Two different answers with ****** between them."""

    kind = "two_responses"
    dimension = "Template"
    excludes = "lines paragraphs wrapped layout divided_paragraphs nth_paragraph_first_word"
    templates = wordings("""
        Give two different responses, separated by 6 asterisk symbols: ******.
        Write two different answers with ****** between them.
        Provide exactly two distinct responses and put ****** between them.
        Answer twice in different ways; separate the two answers by ******.
        请给出两个不同的回答，用六个星号******隔开。
        请写两个不同的答案，中间以******分隔。
        请提供两种不同的回复，之间放置******。
        请用不同方式回答两次，两个回答以******分开。
    """)

    def check(self, text: str) -> bool:
        parts = text.split("******")
        if any(not part.strip() for part in parts[1:-1]):
            return False
        answers = [part.strip() for part in parts if part.strip()]
        return len(answers) == 2 and answers[0] != answers[1]


@dataclass(frozen=True)
class RepeatPrompt(Official, StartPhrase):
    """The text begins with the request, in any case."""

    kind = "repeat_prompt"
    excludes = (
        "case first_word start_phrase wrapped first_line_title layout english_case two_responses"
    )
    templates = {
        "en": (
            "First repeat the request below word for word without change, then answer it. "
            "Say nothing before repeating it.\n\n{phrase}",
            "Begin by copying this request exactly, then give your answer:\n\n{phrase}",
            "Before answering, restate the following request without any change:\n\n{phrase}",
            "Your response must open with an exact copy of this request:\n\n{phrase}",
        ),
        "zh": (
            "请先逐字重复下面的请求，再作答，重复之前不要写任何内容。\n\n{phrase}",
            "请首先原样抄写以下请求，然后回答：\n\n{phrase}",
            "作答前请一字不改地重述下列请求：\n\n{phrase}",
            "回答必须以这段请求的原文开头：\n\n{phrase}",
        ),
    }


@dataclass(frozen=True)
class ConstrainedResponse(Official, Constraint):
    """One of IFEval's three fixed answers occurs."""

    kind = "constrained_response"
    dimension = "Inclusion"
    excludes = "case layout language english_case two_responses"
    templates = {
        "en": (
            "Answer with one of the following options: 'My answer is yes.', 'My answer is no.', "
            "'My answer is maybe.'",
            "Choose from 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'",
            "Reply with 'My answer is yes.', 'My answer is no.' or 'My answer is maybe.'",
            "Include exactly one of 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'",
        ),
        "zh": (
            "请从 'My answer is yes.'、'My answer is no.'、'My answer is maybe.' 中选一个回答。",
            "请回答 'My answer is yes.'、'My answer is no.' 或 'My answer is maybe.'",
            "答案必须是 'My answer is yes.'、'My answer is no.'、'My answer is maybe.' 之一。",
            "只能用 'My answer is yes.'、'My answer is no.' 或 'My answer is maybe.' 作答。",
        ),
    }

    def check(self, text: str) -> bool:
        return any(answer in text for answer in _ANSWERS)


@dataclass(frozen=True)
class JsonFormat(Official, Constraint):
    """The text is JSON of any type; a code fence around it is allowed."""

    kind = "json_format"
    dimension = "Output format"
    excludes = Layout.excludes + (
        " layout punkt_sentences divided_paragraphs two_responses repeat_prompt"
        " constrained_response"
    )
    templates = wordings("""
        Your entire output should be wrapped in JSON format.
        Give the whole answer as JSON; a ```json fence around it is allowed.
        Respond with valid JSON and nothing else.
        The complete response must be valid JSON.
        整个输出必须是JSON格式，可以用```json标记。
        请把全部回答写成JSON。
        只输出合法的JSON，不要写其他内容。
        完整的回复必须是合法的JSON。
    """)

    def check(self, text: str) -> bool:
        text = text.strip()
        for fence in ("```json", "```Json", "```JSON", "```"):
            text = text.removeprefix(fence)
        return parse_json(text.removesuffix("```").strip())


@dataclass(frozen=True)
class ResponseLanguage(Official, Constraint):
    """The language that langdetect gives is `code`, or it gives none."""

    code: str

    kind = "response_language"
    dimension = "Multilingual"
    excludes = (
        "words han_characters capital_words first_word last_word start_phrase end_phrase "
        "include_words word_frequency language english_case keywords keyword_frequency "
        "capital_tokens constrained_response"
    )
    templates = {
        "en": (
            "Your entire response should be in the language with the code '{code}'; "
            "no other language is allowed.",
            "Answer only in the language whose ISO code is '{code}'.",
            "Write everything in the language '{code}' (ISO code).",
            "Use the language with ISO code '{code}' throughout.",
        ),
        "zh": (
            "整个回答只能使用代码为“{code}”的语言。",
            "请全部用ISO代码“{code}”所指的语言作答。",
            "全文须使用语言“{code}”（ISO代码）。",
            "请始终使用ISO代码为“{code}”的语言。",
        ),
    }

    def __post_init__(self) -> None:
        ok = isinstance(self.code, str) and re.fullmatch(r"[a-z]{2,3}(-[a-z]{2})?", self.code)
        self._require(bool(ok), "code", "a language code of langdetect such as 'en' or 'zh-cn'")

    def check(self, text: str) -> bool:
        return detect_language(text) in (self.code, None)
