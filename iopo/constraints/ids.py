"""Published ids and functions of checkable constraints: IFEval's 25, IFTrain's 29, RLVR-IFeval's.

IFTrain's public verifiers (allenai/open-instruct, IFEvalG) check something else than their
instruction in places; here the instruction is checked. docs/log/2026-11-constraint-kinds.md has
each difference, and how often it shows.
RLVR-IFeval's functions (if_functions.py) differ from IFEval's; ours are IFEval's, with its "around"
N as N - N/10 to N + N/10 words, and as N - 1 to N + 1 sentences.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from iopo.constraints import copies, iftrain, lengths, marks
from iopo.constraints.base import Constraint
from iopo.constraints.ifeval import (
    IFEVAL_IDS,
    DividedParagraphs,
    KeywordFrequency,
    Keywords,
    bound,
    from_ifeval,
)
from iopo.constraints.keywords import ForbidWords

Arguments = Mapping[str, Any]


def _word(value: Any) -> str:
    """A word; some rows hold it in a list."""
    return str(value if isinstance(value, str) else value[0]).strip()


def _exactly(number: int, keyword: str) -> Constraint:
    return KeywordFrequency("exactly", number, keyword.strip())


_IFTRAIN: dict[str, Callable[[Arguments], list[Constraint]]] = {
    "keywords:word_once": lambda a: [_exactly(1, a["keyword"])],
    "keywords:word_count_different_numbers": lambda a: [
        KeywordFrequency(*bound(a["relation"], a["frequency"]), a["keyword"].strip())
    ],
    "keywords:exclude_word_harder": lambda a: [ForbidWords((a["keyword"].strip(),))],
    "letters:letter_counting2": lambda a: [
        marks.LetterFrequency(*bound(a["let_relation"], a["let_frequency"]), a["letter"].lower())
    ],
    "letters:letter_counting": lambda a: [iftrain.Letters(*bound(a["relation"], a["N"]))],
    "paragraphs:paragraphs": lambda a: [DividedParagraphs("exactly", 2)],
    "paragraphs:paragraphs2": lambda a: [lengths.Paragraphs("exactly", 2)],
    "first_word:first_word_sent": lambda a: [iftrain.SentenceFirstWord(_word(a["first_word"]))],
    "first_word:first_word_answer": lambda a: [
        iftrain.AnswerFirstWord(_word(a["first_word"]).lower())
    ],
    "last_word:last_word_sent": lambda a: [iftrain.SentenceLastWord(_word(a["last_word"]))],
    "last_word:last_word_answer": lambda a: [
        iftrain.AnswerLastWord(_word(a["last_word"]).lower())
    ],
    "detectable_format:bigram_wrapping": lambda a: [iftrain.WrappedBigrams()],
    "detectable_format:square_brackets": lambda a: [iftrain.BracketedWords()],
    "detectable_format:sentence_hyphens": lambda a: [iftrain.HyphenatedSentences()],
    "copy:copy": lambda a: [copies.Copies(a["prompt_to_repeat"])],
    "copy:copying_simple": lambda a: [copies.Copies(a["prompt_to_repeat"])],
    "copy:copying_multiple": lambda a: [copies.Copies(a["prompt_to_repeat"], a["N"])],
    "new:copy_span_idx": lambda a: [
        copies.Copies(a["prompt_to_repeat"][a["n_start"] : a["n_end"]])
    ],
    "copy:repeat_phrase": lambda a: [copies.RepeatedPhrase(a["phrase"].strip(), a["small_n"])],
    "punctuation:punctuation_dot": lambda a: [marks.LetterFrequency("exactly", 0, ".")],
    "punctuation:punctuation_exclamation": lambda a: [marks.LetterFrequency("exactly", 0, "!")],
    "count:lowercase_counting": lambda a: [iftrain.LowercaseWords("at most", a["N"])],
    "count:counting_composition": lambda a: [copies.Composition(a["n_sent"], a["n_words"])],
    "count:count_unique": lambda a: [iftrain.UniqueWords()],
    "count:count_increment_word": lambda a: [
        _exactly(1, a["keyword1"]), _exactly(2, a["keyword2"]),
    ],
    "keywords:palindrome": lambda a: [iftrain.Palindrome()],
    "keywords:keyword_specific_position": lambda a: [
        iftrain.WordPosition(_word(a["keyword"]), a["n"], a["m"])
    ],
    "keywords:start_end": lambda a: [iftrain.SameEnds()],
    "keywords:no_adjacent_consecutive": lambda a: [iftrain.NoConsecutiveInitials()],
}  # fmt: skip
IFTRAIN_IDS = tuple(_IFTRAIN)


def from_id(instruction_id: str, arguments: Arguments | None) -> list[Constraint]:
    """The constraints of an id of IFEval or IFTrain with its arguments; all of them must hold.

    Arguments that are None are ignored. Raises ValueError as `from_ifeval` does.
    """
    given = {name: value for name, value in (arguments or {}).items() if value is not None}
    if instruction_id in IFEVAL_IDS:
        return [from_ifeval(instruction_id, given)]
    return _made(_IFTRAIN, "instruction id", instruction_id, given)


def _quantified(
    cls: type[lengths.Counted], quantifier: str, number: int, slack: int
) -> list[Constraint]:
    if quantifier == "around":
        return [cls("at least", max(0, number - slack)), cls("at most", number + slack)]
    return [cls(quantifier, number)]


_SAME = {  # functions that are an id of IFEval: function -> id, our argument -> theirs
    "validate_forbidden_words": (
        "keywords:forbidden_words", {"forbidden_words": "forbidden_words"},
    ),
    "validate_response_language": ("language:response_language", {"language": "language"}),
    "verify_postscript": (
        "detectable_content:postscript", {"postscript_marker": "postscript_marker"},
    ),
    "validate_placeholders": ("detectable_content:number_placeholders", {"num_placeholders": "N"}),
    "verify_bullet_points": ("detectable_format:number_bullet_lists", {"num_bullets": "N"}),
    "validate_title": ("detectable_format:title", {}),
    "validate_highlighted_sections": (
        "detectable_format:number_highlighted_sections", {"num_highlights": "N"},
    ),
    "validate_sections": (
        "detectable_format:multiple_sections",
        {"num_sections": "N", "section_spliter": "section_splitter"},
    ),
    "validate_json_format": ("detectable_format:json_format", {}),
    "validate_repeat_prompt": (
        "combination:repeat_prompt", {"prompt_to_repeat": "original_prompt"},
    ),
    "validate_two_responses": ("combination:two_responses", {}),
    "validate_uppercase": ("change_case:english_capital", {}),
    "validate_lowercase": ("change_case:english_lowercase", {}),
    "validate_end": ("startend:end_checker", {"end_phrase": "end_phrase"}),
    "validate_quotation": ("startend:quotation", {}),
    "validate_no_commas": ("punctuation:no_comma", {}),
    "verify_paragraph_count": ("length_constraints:number_paragraphs", {"num_paragraphs": "N"}),
    "validate_paragraphs": (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": "N", "nth_paragraph": "i", "first_word": "first_word"},
    ),
}  # fmt: skip
_RLVR: dict[str, Callable[[Arguments], list[Constraint]]] = {
    name: lambda a, of=of: [from_ifeval(of[0], {ours: a[theirs] for ours, theirs in of[1].items()})]
    for name, of in _SAME.items()
} | {
    "verify_keywords": lambda a: [Keywords(tuple(map(re.escape, a["keyword_list"])))],
    "verify_keyword_frequency": lambda a: [_exactly(a["N"], rf"\b{re.escape(a['word'])}\b")],
    "verify_letter_frequency": lambda a: [
        marks.LetterFrequency("exactly", a["N"], a["letter"].lower())
    ],
    "validate_word_constraint": lambda a: _quantified(
        lengths.Words, a["quantifier"], a["N"], max(round(a["N"] * 0.1), 1)
    ),
    "verify_sentence_constraint": lambda a: _quantified(
        lengths.Sentences, a["quantifier"], a["N"], 1
    ),
    "validate_frequency_capital_words": lambda a: _quantified(
        marks.CapitalWords, a["quantifier"], a["N"], max(round(a["N"] * 0.1), 1)
    ),
    "validate_choice": lambda a: [Keywords(("|".join(map(re.escape, a["options"])),))],
}


def from_function(name: str, arguments: Arguments) -> list[Constraint]:
    """The constraints of a `func_name` of RLVR-IFeval with its arguments; all of them must hold.

    Raises ValueError as `from_id` does.
    """
    given = {key: value for key, value in arguments.items() if value is not None}
    return _made(_RLVR, "function", name, given)


def _made(
    makers: Mapping[str, Callable[[Arguments], list[Constraint]]],
    what: str,
    name: str,
    arguments: Arguments,
) -> list[Constraint]:
    if name not in makers:
        raise ValueError(f"unknown {what} {name!r}; known: {sorted(makers)}")
    try:
        return makers[name](arguments)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        fault = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{what} {name!r}: bad arguments {arguments}: {fault}") from error
