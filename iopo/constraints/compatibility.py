"""Which kinds must not stand in one instruction, because few or no texts satisfy both.

A kind conflicts with itself unless it is repeatable; everything else is said in cliques, so the
relation is symmetric by construction.
"""

from itertools import combinations

# several of one kind make sense together: mention this word and that one
REPEATABLE = frozenset({"include_words", "forbid_words", "word_frequency", "letter_frequency"})

_CASE = ("case", "english_case")
_LAYOUT = ("layout", "json_format", "bullets", "numbered_items")
_PROSE = ("sentences", "punkt_sentences", "lines", "paragraphs", "divided_paragraphs")
_FRAME = ("wrapped", "first_line_title", "closing_note", "postscript", "title")
_BEGIN = ("start_phrase", "repeat_prompt", "first_word", "wrapped", "first_line_title")
_END = ("end_phrase", "last_word", "wrapped", "closing_note", "postscript")
_CAPITAL = ("capital_words", "capital_tokens")
_LANGUAGE = ("language", "response_language", "english_case", "words", "case", "han_characters")

# kinds of which at most one fits in an instruction
_CLIQUES: tuple[tuple[str, ...], ...] = (
    _CASE,
    _LAYOUT,
    _BEGIN,
    _END,
    _CAPITAL,
    _LANGUAGE[:2],
    ("paragraphs", "divided_paragraphs", "nth_paragraph_first_word", "two_responses"),
    ("sentences", "punkt_sentences"),
    ("words", "han_characters"),
    ("wrapped", "json_format", "layout"),
    ("title", "first_line_title", "json_format"),
    ("include_words", "keywords"),
    ("word_frequency", "keyword_frequency"),
    ("forbid_words", "forbidden_words"),
)

# every kind on the left conflicts with every kind on the right
_PAIRS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (_CASE, (*_CAPITAL, "postscript", "constrained_response", "repeat_prompt", "language")),
    (("english_case",), ("response_language",)),
    (("json_format", "layout"), (*_PROSE, *_FRAME, *_BEGIN, *_END, "two_responses", "sections")),
    (("json_format", "layout"), ("constrained_response", "highlights", "placeholders", "commas")),
    (("language", "response_language"), ("start_phrase", "end_phrase", "first_word", "last_word")),
    (("language", "response_language"), ("words", "han_characters", "constrained_response")),
    (("language", "response_language"), ("include_words", "keywords", "word_frequency")),
    (("language", "response_language"), ("keyword_frequency", "capital_words", "capital_tokens")),
    (("bullets", "numbered_items"), ("sentences", "punkt_sentences", "lines")),
    (("lines",), ("paragraphs", "divided_paragraphs", "two_responses", "sections")),
    (("two_responses",), ("wrapped", "repeat_prompt", "constrained_response")),
    (("divided_paragraphs",), ("wrapped", "sections")),
    (("exclamations", "questions"), ("exclamations", "questions")),
)

KIND_NAMES = (
    frozenset(
        name for group in (*_CLIQUES, *(side for pair in _PAIRS for side in pair)) for name in group
    )
    | REPEATABLE
)


def _table() -> dict[str, frozenset[str]]:
    table: dict[str, set[str]] = {name: set() for name in KIND_NAMES}
    for name in KIND_NAMES - REPEATABLE:
        table[name].add(name)
    pairs = [pair for clique in _CLIQUES for pair in combinations(clique, 2)]
    pairs += [(a, b) for left, right in _PAIRS for a in left for b in right if a != b]
    for a, b in pairs:
        table[a].add(b)
        table[b].add(a)
    return {name: frozenset(others) for name, others in table.items()}


CONFLICTS = _table()
