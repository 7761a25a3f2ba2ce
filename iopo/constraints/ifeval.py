"""IFEval's rules as constraints: the kinds of its own, then its instruction ids and arguments.

The definitions are those of google-research/instruction_following_eval, peculiarities included:
published scores depend on them. Construction does not ask for these kinds (MEASURED_KINDS).

All 25 ids of the published data are here. The four other names in the official source are commented
out in its registry (key_sentences and the rephrase family) and no data uses them: they are unknown.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from iopo.constraints import lengths, marks, structure
from iopo.constraints.base import Constraint, wordings
from iopo.constraints.keywords import ForbidWords, IncludeWords, WordFrequency
from iopo.constraints.layout import Layout, parse_json
from iopo.constraints.text import capital_tokens, detect_language, punkt_sentences
from iopo.constraints.wording import Case, EndPhrase, StartPhrase

_DIVIDER = re.compile(r"\s?\*\*\*\s?")


def _matches(kind: str, pattern: str, text: str) -> list[tuple[int, int]]:
    try:
        return [match.span() for match in re.finditer(pattern, text, re.IGNORECASE)]
    except re.error as error:
        raise ValueError(
            f"constraint '{kind}': {pattern!r} is no regular expression ({error})"
        ) from error


class EnglishCase(Case):
    """Lower or upper case throughout, and English as langdetect sees it."""

    kind = "english_case"
    excludes = "capital_words case postscript"
    styles = {style: Case.styles[style] for style in ("lower", "upper")}

    def check(self, text: str) -> bool:
        # where no language is found the official scorer counts the case alone
        return super().check(text) and detect_language(text) in ("en", None)


class Keywords(IncludeWords):
    """Every keyword is found as a regular expression, inside words too."""

    kind = "keywords"
    excludes = "include_words"

    def spans(self, text: str, word: str) -> list[tuple[int, int]]:
        return _matches(self.kind, word, text)


class KeywordFrequency(WordFrequency):
    """How often the keyword is found as a regular expression, inside words too."""

    kind = "keyword_frequency"
    excludes = "word_frequency"
    smallest = 0

    def spans(self, text: str, word: str) -> list[tuple[int, int]]:
        return _matches(self.kind, word, text)


class ForbiddenWords(ForbidWords):
    r"""No word of the list is found between \b marks, as a regular expression."""

    kind = "forbidden_words"
    excludes = "forbid_words"

    def spans(self, text: str, word: str) -> list[tuple[int, int]]:
        return _matches(self.kind, rf"\b{word}\b", text)


class PunktSentences(lengths.Sentences):
    """Number of sentences by the Punkt model; slower than `sentences` and English only."""

    kind = "punkt_sentences"
    excludes = "sentences bullets numbered_items layout"

    def count(self, text: str) -> int:
        return punkt_sentences(text)


class CapitalTokens(marks.CapitalWords):
    """Number of word tokens in capitals throughout, by NLTK's tokenizer."""

    kind = "capital_tokens"
    excludes = "capital_words case english_case"

    def count(self, text: str) -> int:
        return capital_tokens(text)


class DividedParagraphs(lengths.Paragraphs):
    """Number of paragraphs with *** between them; an empty one inside counts as no answer."""

    kind = "divided_paragraphs"
    excludes = "lines paragraphs wrapped sections layout"
    unit = (
        "paragraph; separate paragraphs with the markdown divider ***",
        "paragraphs separated by the markdown divider ***",
        "个以***分隔的段落",
    )

    def count(self, text: str) -> int:
        """The number of paragraphs, -1 where one between two dividers is empty."""
        parts = _DIVIDER.split(text)
        if any(not part.strip() for part in parts[1:-1]):
            return -1
        return sum(1 for part in parts if part.strip())

    def check(self, text: str) -> bool:
        return self.count(text) >= 0 and super().check(text)


@dataclass(frozen=True)
class NthParagraphFirstWord(Constraint):
    """The text has `paragraphs` blocks split by blank lines; the nth begins with the word."""

    paragraphs: int
    nth: int
    word: str

    kind = "nth_paragraph_first_word"
    dimension = "Inclusion"
    excludes = "paragraphs divided_paragraphs"
    templates = wordings("""
        There should be {paragraphs} paragraphs, separated by two line breaks. \
            Paragraph {nth} must start with the word '{word}'.
        Write {paragraphs} paragraphs with a blank line between them; begin paragraph {nth} \
            with '{word}'.
        Use {paragraphs} paragraphs split by blank lines, number {nth} opening with '{word}'.
        Your answer needs {paragraphs} paragraphs, blank lines between them, and the first \
            word of paragraph {nth} must be '{word}'.
        回答应有{paragraphs}个段落，以空行分隔，第{nth}段必须以“{word}”开头。
        请写{paragraphs}段，段间空一行，第{nth}段的第一个词是“{word}”。
        全文分为{paragraphs}段（空行分隔），第{nth}段由“{word}”起始。
        请用空行隔开{paragraphs}个段落，并让第{nth}段以“{word}”一词开始。
    """)

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


class TwoResponses(Constraint):
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


class RepeatPrompt(StartPhrase):
    """The text begins with the request, in any case."""

    kind = "repeat_prompt"
    excludes = (
        "case first_word start_phrase wrapped first_line_title layout english_case two_responses"
    )
    templates = wordings("""
        First repeat the request below word for word without change, then answer it. \
            Say nothing before repeating it.
        Begin by copying this request exactly, then give your answer:
        Before answering, restate the following request without any change:
        Your response must open with an exact copy of this request:
        请先逐字重复下面的请求，再作答，重复之前不要写任何内容。
        请首先原样抄写以下请求，然后回答：
        作答前请一字不改地重述下列请求：
        回答必须以这段请求的原文开头：
    """)

    def paraphrases(self, language: str) -> tuple[str, ...]:
        return tuple(f"{opening}\n\n{{phrase}}" for opening in self.templates[language])


class ConstrainedResponse(Constraint):
    """One of IFEval's three fixed answers occurs."""

    kind = "constrained_response"
    dimension = "Inclusion"
    excludes = "case layout english_case two_responses"
    templates = wordings("""
        Answer with one of the following options: 'My answer is yes.', 'My answer is no.', \
            'My answer is maybe.'
        Choose from 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'
        Reply with 'My answer is yes.', 'My answer is no.' or 'My answer is maybe.'
        Include exactly one of 'My answer is yes.', 'My answer is no.', 'My answer is maybe.'
        请从 'My answer is yes.'、'My answer is no.'、'My answer is maybe.' 中选一个回答。
        请回答 'My answer is yes.'、'My answer is no.' 或 'My answer is maybe.'
        答案必须是 'My answer is yes.'、'My answer is no.'、'My answer is maybe.' 之一。
        只能用 'My answer is yes.'、'My answer is no.' 或 'My answer is maybe.' 作答。
    """)

    def check(self, text: str) -> bool:
        return any(f"My answer is {choice}." in text for choice in ("yes", "no", "maybe"))


class JsonFormat(Constraint):
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
class ResponseLanguage(Constraint):
    """The language that langdetect gives is `code`, or it gives none."""

    code: str

    kind = "response_language"
    dimension = "Multilingual"
    excludes = (
        "words han_characters capital_words first_word last_word start_phrase end_phrase "
        "include_words word_frequency english_case keywords keyword_frequency "
        "capital_tokens constrained_response"
    )
    templates = wordings("""
        Your entire response should be in the language with the code '{code}'; \
            no other language is allowed.
        Answer only in the language whose ISO code is '{code}'.
        Write everything in the language '{code}' (ISO code).
        Use the language with ISO code '{code}' throughout.
        整个回答只能使用代码为“{code}”的语言。
        请全部用ISO代码“{code}”所指的语言作答。
        全文须使用语言“{code}”（ISO代码）。
        请始终使用ISO代码为“{code}”的语言。
    """)

    def __post_init__(self) -> None:
        ok = isinstance(self.code, str) and re.fullmatch(r"[a-z]{2,3}(-[a-z]{2})?", self.code)
        self._require(bool(ok), "code", "a language code of langdetect such as 'en' or 'zh-cn'")

    def check(self, text: str) -> bool:
        return detect_language(text) in (self.code, None)


# --- the published ids ---


def bound(relation: str, number: int) -> tuple[str, int]:
    """IFEval's 'less than' n as at most n - 1."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r}; expected 'at least' or 'less than'")
    return ("at least", number) if relation == "at least" else ("at most", number - 1)


_MAKERS: dict[str, Callable[[Mapping[str, Any]], Constraint]] = {
    "keywords:existence": lambda a: Keywords(tuple(a["keywords"])),
    "keywords:frequency": lambda a: KeywordFrequency(
        *bound(a["relation"], a["frequency"]), a["keyword"].strip()
    ),
    "keywords:forbidden_words": lambda a: ForbiddenWords(tuple(a["forbidden_words"])),
    # The official scorer replaces a symbol by a random letter (keys 1122 '#', 1129 '!'); the
    # prompts mean the symbol, so the symbol is counted.
    "keywords:letter_frequency": lambda a: marks.LetterFrequency(
        *bound(a["let_relation"], a["let_frequency"]), a["letter"].strip().lower()
    ),
    "language:response_language": lambda a: ResponseLanguage(a["language"]),
    "length_constraints:number_sentences": lambda a: PunktSentences(
        *bound(a["relation"], a["num_sentences"])
    ),
    "length_constraints:number_paragraphs": lambda a: DividedParagraphs(
        "exactly", a["num_paragraphs"]
    ),
    "length_constraints:number_words": lambda a: lengths.Words(
        *bound(a["relation"], a["num_words"])
    ),
    "length_constraints:nth_paragraph_first_word": lambda a: NthParagraphFirstWord(
        a["num_paragraphs"], a["nth_paragraph"], a["first_word"].lower()
    ),
    "detectable_content:number_placeholders": lambda a: marks.Placeholders(
        "at least", a["num_placeholders"]
    ),
    "detectable_content:postscript": lambda a: structure.Postscript(a["postscript_marker"].strip()),
    "detectable_format:number_bullet_lists": lambda a: lengths.Bullets("exactly", a["num_bullets"]),
    "detectable_format:constrained_response": lambda a: ConstrainedResponse(),
    "detectable_format:number_highlighted_sections": lambda a: marks.Highlights(
        "at least", a["num_highlights"]
    ),
    "detectable_format:multiple_sections": lambda a: structure.Sections(
        "at least", a["num_sections"], a["section_spliter"].strip()
    ),
    "detectable_format:json_format": lambda a: JsonFormat(),
    "detectable_format:title": lambda a: structure.Titles("at least", 1),
    "combination:two_responses": lambda a: TwoResponses(),
    "combination:repeat_prompt": lambda a: RepeatPrompt(a["prompt_to_repeat"]),
    "startend:end_checker": lambda a: EndPhrase(a["end_phrase"]),
    "startend:quotation": lambda a: structure.Wrapped("double quotes"),
    "change_case:english_capital": lambda a: EnglishCase("upper"),
    "change_case:english_lowercase": lambda a: EnglishCase("lower"),
    "change_case:capital_word_frequency": lambda a: CapitalTokens(
        *bound(a["capital_relation"], a["capital_frequency"])
    ),
    "punctuation:no_comma": lambda a: marks.LetterFrequency("exactly", 0, ","),
}

IFEVAL_IDS = tuple(_MAKERS)


def from_ifeval(instruction_id: str, kwargs: Mapping[str, Any]) -> Constraint:
    """The constraint of one entry of `instruction_id_list` with its entry of `kwargs`.

    Arguments that are None are ignored: some copies of the data list every argument of every kind.
    Raises ValueError on an unknown id and on a missing or bad argument.
    """
    if instruction_id not in _MAKERS:
        raise ValueError(
            f"unknown IFEval instruction id {instruction_id!r}; known ids: {sorted(_MAKERS)}"
        )
    arguments = {name: value for name, value in kwargs.items() if value is not None}
    try:
        return _MAKERS[instruction_id](arguments)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(
            f"IFEval instruction '{instruction_id}': bad arguments {arguments}: {fault}"
        ) from error
