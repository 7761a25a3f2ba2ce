"""IFEval's instruction ids and arguments as constraints.

All 25 ids of the published data are here. The four other names in the official source are commented
out in its registry (key_sentences and the rephrase family) and no data uses them: they are unknown.
"""

from collections.abc import Callable, Mapping
from typing import Any

from iopo.constraints.base import Constraint
from iopo.constraints.ifeval_kinds import (
    CapitalTokens,
    ConstrainedResponse,
    DividedParagraphs,
    EnglishCase,
    ForbiddenWords,
    JsonFormat,
    KeywordFrequency,
    Keywords,
    NthParagraphFirstWord,
    PunktSentences,
    RepeatPrompt,
    ResponseLanguage,
    TwoResponses,
)
from iopo.constraints.lengths import Bullets, Words
from iopo.constraints.marks import Highlights, LetterFrequency, Placeholders
from iopo.constraints.structure import Postscript, Sections, Titles, Wrapped
from iopo.constraints.wording import EndPhrase


def _bound(relation: str, number: int) -> tuple[str, int]:
    """IFEval's 'less than' n as at most n - 1."""
    if relation not in ("at least", "less than"):
        raise ValueError(f"relation {relation!r}; expected 'at least' or 'less than'")
    return ("at least", number) if relation == "at least" else ("at most", number - 1)


_Arguments = Mapping[str, Any]
_MAKERS: dict[str, Callable[[_Arguments], Constraint]] = {
    "keywords:existence": lambda a: Keywords(tuple(a["keywords"])),
    "keywords:frequency": lambda a: KeywordFrequency(
        *_bound(a["relation"], a["frequency"]), a["keyword"].strip()
    ),
    "keywords:forbidden_words": lambda a: ForbiddenWords(tuple(a["forbidden_words"])),
    # The official scorer replaces a symbol by a random letter (keys 1122 '#', 1129 '!'); the
    # prompts mean the symbol, so the symbol is counted.
    "keywords:letter_frequency": lambda a: LetterFrequency(
        *_bound(a["let_relation"], a["let_frequency"]), a["letter"].strip().lower()
    ),
    "language:response_language": lambda a: ResponseLanguage(a["language"]),
    "length_constraints:number_sentences": lambda a: PunktSentences(
        *_bound(a["relation"], a["num_sentences"])
    ),
    "length_constraints:number_paragraphs": lambda a: DividedParagraphs(
        "exactly", a["num_paragraphs"]
    ),
    "length_constraints:number_words": lambda a: Words(*_bound(a["relation"], a["num_words"])),
    "length_constraints:nth_paragraph_first_word": lambda a: NthParagraphFirstWord(
        a["num_paragraphs"], a["nth_paragraph"], a["first_word"].lower()
    ),
    "detectable_content:number_placeholders": lambda a: Placeholders(
        "at least", a["num_placeholders"]
    ),
    "detectable_content:postscript": lambda a: Postscript(a["postscript_marker"].strip()),
    "detectable_format:number_bullet_lists": lambda a: Bullets("exactly", a["num_bullets"]),
    "detectable_format:constrained_response": lambda a: ConstrainedResponse(),
    "detectable_format:number_highlighted_sections": lambda a: Highlights(
        "at least", a["num_highlights"]
    ),
    "detectable_format:multiple_sections": lambda a: Sections(
        "at least", a["num_sections"], a["section_spliter"].strip()
    ),
    "detectable_format:json_format": lambda a: JsonFormat(),
    "detectable_format:title": lambda a: Titles("at least", 1),
    "combination:two_responses": lambda a: TwoResponses(),
    "combination:repeat_prompt": lambda a: RepeatPrompt(a["prompt_to_repeat"]),
    "startend:end_checker": lambda a: EndPhrase(a["end_phrase"]),
    "startend:quotation": lambda a: Wrapped("double quotes"),
    "change_case:english_capital": lambda a: EnglishCase("upper"),
    "change_case:english_lowercase": lambda a: EnglishCase("lower"),
    "change_case:capital_word_frequency": lambda a: CapitalTokens(
        *_bound(a["capital_relation"], a["capital_frequency"])
    ),
    "punctuation:no_comma": lambda a: LetterFrequency("exactly", 0, ","),
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
    except KeyError as error:
        raise ValueError(
            f"IFEval instruction '{instruction_id}': argument {error} is missing in {arguments}"
        ) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"IFEval instruction '{instruction_id}': bad arguments {arguments}: {error}"
        ) from error
