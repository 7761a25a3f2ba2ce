"""Every kind of constraint: checks by hand, and the properties that data construction stands on."""

import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iopo.constraints import (
    KINDS,
    MEASURED_KINDS,
    compatible,
    follows,
    follows_loosely,
    from_dict,
    iftrain,
    make,
)
from iopo.constraints.base import conflicts_of
from iopo.constraints.text import detect_language

PLAIN = (
    "Drinking water helps people focus, and water keeps you well. Dr. Lee agrees! "
    "Why wait? Start today with one glass of water."
)
CHINESE = "多喝水对身体有好处，也能让人专注。现在就开始吧！每天喝八杯水。"

# kind, params, a text that satisfies it, a text that does not
EXAMPLES = [
    ("words", {"relation": "at most", "number": 12}, "One two, three.", PLAIN),
    ("han_characters", {"relation": "at least", "number": 20}, CHINESE, "多喝水。"),
    ("sentences", {"relation": "exactly", "number": 4}, PLAIN, "One. Two."),
    ("sentences", {"relation": "exactly", "number": 3}, CHINESE, "一。二。"),
    ("lines", {"relation": "exactly", "number": 2}, "a\n\nb", "a b"),
    ("paragraphs", {"relation": "exactly", "number": 2}, "a\nb\n \nc", "a\nb"),
    ("bullets", {"relation": "exactly", "number": 2}, "Tips:\n- a\n* b", "- a\n** b"),
    ("bullets", {"relation": "exactly", "number": 0}, "a - b", "- a"),
    ("numbered_items", {"relation": "at least", "number": 2}, "1. a\n2) b", "1. a 2. b"),
    ("placeholders", {"relation": "at least", "number": 1}, "Dear [name]", "Dear name]"),
    ("highlights", {"relation": "exactly", "number": 1}, "so *good* it", "so good"),
    ("commas", {"relation": "exactly", "number": 0}, "a b", "a，b"),
    ("commas", {"relation": "at least", "number": 2}, "a, b, c", "a, b"),
    ("questions", {"relation": "exactly", "number": 1}, "Why?", "Why."),
    ("exclamations", {"relation": "at least", "number": 2}, "Oh! Ah!", "Oh!"),
    ("capital_words", {"relation": "exactly", "number": 1}, "I said NO", "I said no"),
    ("letter_frequency", {"relation": "at most", "number": 1, "letter": "z"}, "Zoo", "Zz"),
    ("case", {"style": "lower"}, "all small. 3", "Not small"),
    ("case", {"style": "upper"}, "ALL BIG", "ALL BiG"),
    ("case", {"style": "title"}, "A Fine Day's Work", "A fine Day"),
    ("first_word", {"word": "sure"}, '"Sure, why not', "Not sure"),
    ("last_word", {"word": "end"}, "This is the END.", "The end is near"),
    ("start_phrase", {"phrase": "In short,"}, " in short, yes", "Yes, in short,"),
    ("end_phrase", {"phrase": "The end."}, '"Yes. the END."', "The end. Yes."),
    ("include_words", {"words": ["water", "Lee"]}, PLAIN, "watery Lee"),
    ("include_words", {"words": ["专注"]}, CHINESE, PLAIN),
    ("forbid_words", {"words": ["glass"]}, "sunglasses", PLAIN),
    ("word_frequency", {"relation": "exactly", "number": 3, "word": "water"}, PLAIN, "water"),
    ("wrapped", {"style": "double quotes"}, '"yes"', '"yes'),
    ("wrapped", {"style": "curly braces"}, "{yes}", "[yes]"),
    ("first_line_title", {"style": "angle brackets"}, "<<Water>>\n\nDrink.", "**Water**\nDrink."),
    ("first_line_title", {"style": "heading"}, "# Water\nDrink.", "#Water\nDrink."),
    ("closing_note", {"marker": "P.S."}, "Yes.\n\np.s. No.", "P.S. Yes."),
    ("title", {"relation": "at least", "number": 1}, "<<Water>>", "<< >>"),
    ("postscript", {"marker": "P.S."}, "Yes.\nP. S. no", "Yes. PS no"),
    (
        "sections",
        {"relation": "exactly", "number": 2, "splitter": "Day"},
        "Day 1\na\nDay 2\nb",
        "Day 1\na",
    ),
    ("layout", {"style": "json"}, '{"a": [1]}', '"a"'),
    ("layout", {"style": "bullet list"}, "- a\n- b", "List:\n- a"),
    ("layout", {"style": "table"}, "| a |\n|---|\n| b |", "| a"),
    ("layout", {"style": "plain prose"}, PLAIN, "# Water\n" + PLAIN),
    ("english_case", {"style": "lower"}, PLAIN.lower(), PLAIN),
    ("keywords", {"words": ["wat.r"]}, PLAIN, "wine"),
    ("keyword_frequency", {"relation": "at least", "number": 2, "word": "a"}, "banana", "bat"),
    ("forbidden_words", {"words": ["glass"]}, "glasses", PLAIN),
    ("punkt_sentences", {"relation": "exactly", "number": 2}, "Dr. Lee came. He left.", "Hm."),
    ("capital_tokens", {"relation": "exactly", "number": 1}, "I see", "I SEE"),
    ("divided_paragraphs", {"relation": "exactly", "number": 2}, "a\n***\nb", "a\n\nb"),
    (
        "nth_paragraph_first_word",
        {"paragraphs": 2, "nth": 2, "word": "then"},
        "First.\n\nThen, second.",
        "Then.\n\nFirst.",
    ),
    ("two_responses", {}, "yes\n******\nno", "yes\n******\nyes"),
    ("repeat_prompt", {"phrase": "Say hi."}, "Say hi. Hi.", "Hi."),
    ("constrained_response", {}, "My answer is yes.", "Yes."),
    ("json_format", {}, "```json\n[1]\n```", "[1"),
    ("letters", {"relation": "at most", "number": 3}, "a b 1, c", PLAIN),
    ("lowercase_words", {"relation": "exactly", "number": 1}, "One two Three", "one two"),
    ("answer_first_word", {"word": "don't"}, "Don't ask.", "Do not ask."),
    ("answer_last_word", {"word": "don't"}, "Please, don't.", "Please, do not."),
    ("sentence_first_word", {"word": "Water"}, "Water helps. Water, too!", "Water. Wine."),
    ("sentence_last_word", {"word": "water"}, "Drink water. More water!", "Water helps. Water."),
    ("copies", {"text": "Say hi."}, " say HI. ", "Say hi. Hi."),
    ("copies", {"text": "Say hi.", "number": 2}, "Say hi.\n******\nSay hi.", "Say hi."),
    (
        "repeated_phrase",
        {"phrase": "to be or not", "number": 2},
        "to see or not, to be and not",
        "to be or not, to be and not",
    ),
    (
        "composition",
        {"sentences": 1, "words": 2},
        "A cat.\n* * *\nA dog.\n***\nA cow.",
        "A cat.\n* * *\nA dog.",
    ),
    ("unique_words", {}, "One, two, three.", "One, one."),
    ("palindrome", {}, "On this Level we stop.", "I see a cat."),
    ("word_position", {"word": "well", "sentence": 1, "position": 10}, PLAIN, "well"),
    ("same_ends", {}, "Water is all you need, water", "Water is water."),
    ("hyphenated_sentences", {}, "It works.-It does!-Why not?", "It works. It does."),
    ("no_consecutive_initials", {}, "a cat eats", "a bat"),
    ("bracketed_words", {}, "[all] [of] [it.]", "[all of it]"),
    ("wrapped_bigrams", {}, "<<I am>> <<at home>> now", "<<I am at>> home"),
    ("response_language", {"code": "en"}, PLAIN, CHINESE),
]
CONSTRAINTS = [make(kind, **params) for kind, params, _, _ in EXAMPLES]
MEASURED = [constraint for constraint in CONSTRAINTS if constraint.kind in MEASURED_KINDS]

# IFTrain's kinds need nothing but Python either, though construction does not ask for them
MEASURABLE = [
    c for c in KINDS.values() if c.kind in MEASURED_KINDS or c.__module__ == iftrain.__name__
]

BITS = [
    "Water ", "water", ". ", "! ", "? ", ", ", "，", "\n", "\n\n", "- ", "* ", "*", "**", "***",
    "******", '"', "(", ")", "[", "]", "{", "}", "<<", ">>", "# ", "1. ", "2) ", "| ", "Day 1",
    "P.S.", "P.P.S. ", "Note: ", "NO", "I ", "it's ", "Dr. ", "好", "苹果", "。", "ǅ", "İ", "ß",
    "É", "مرحبا", "да", "9", "_", "My answer is yes.", "In short,", "The end.", "also ", "= ",
    "== ", "```", " ", "\t", "\r\n",
]  # fmt: skip
texts = st.lists(st.sampled_from(BITS), max_size=14).map("".join) | st.text(max_size=20)


def test_every_kind_has_an_example():
    assert {kind for kind, *_ in EXAMPLES} == set(KINDS)
    assert len(KINDS) == 59 and set(MEASURED_KINDS) < set(KINDS)


@pytest.mark.parametrize("kind, params, good, bad", EXAMPLES)
def test_checks_by_hand(kind, params, good, bad):
    constraint = make(kind, **params)
    assert constraint.check(good) and not constraint.check(bad)


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.kind)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_rendering(constraint, language):
    assert constraint.render(language) == constraint.render(language)
    seen = {constraint.render(language, random.Random(seed)) for seed in range(60)}
    assert len(seen) >= 4
    for text in seen:
        assert text.strip() and "{{" not in text and "{relation" not in text
    assert constraint.render(language, random.Random(5)) == constraint.render(
        language, random.Random(5)
    )


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Is it true? No. It is not.", 3),
        ("See No. 5 there. Then go.", 2),
        ("So did I. We ate.", 2),
        ("J. R. Smith left. He was late.", 2),
        ("Choose plan B. Then go.", 1),  # the known price of initials
    ],
)
def test_sentences_know_short_words_from_abbreviations(text, count):
    assert make("sentences", relation="exactly", number=count).check(text)


def test_rendered_words():
    one = make("sentences", relation="exactly", number=1)
    assert one.render() == "Your answer must contain exactly 1 sentence."
    assert make("commas", relation="exactly", number=0).render() == "Do not use any commas."
    assert make("commas", relation="at most", number=0).render("zh") == "不要使用任何逗号。"
    assert make("forbid_words", words=["a", "b"]).render().endswith("words: 'a', 'b'.")


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: c.kind)
def test_dicts_round_trip(constraint):
    again = from_dict(
        json.loads(json.dumps({"kind": constraint.kind, "params": constraint.params}))
    )
    assert again == constraint and hash(again) == hash(constraint)
    assert type(again) is type(constraint)


@settings(max_examples=250, deadline=None)
@given(texts)
def test_what_is_measured_is_true(text):
    for cls in MEASURABLE:
        for params in cls.measure(text):
            assert cls(**params).check(text), (cls, params)


def check_exclusive(constraint, alternative, text):
    assert not (constraint.check(text) and alternative.check(text)), (constraint, alternative)


@settings(max_examples=150, deadline=None)
@given(texts, st.integers(0, 3))
def test_alternatives_of_what_is_measured_are_false(text, seed):
    rng = random.Random(seed)
    for cls in MEASURABLE:
        for params in cls.measure(text):
            for alternative in cls(**params).alternatives(rng):
                assert not alternative.check(text), (cls, params, alternative)


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(0, 3))
def test_alternatives_exclude_on_texts_made_for_either(text, seed):
    rng = random.Random(seed)
    for constraint in MEASURED:
        for alternative in constraint.alternatives(rng):
            for made in (text, PLAIN, constraint.edit(PLAIN, rng), alternative.edit(PLAIN, rng)):
                if made is not None:
                    check_exclusive(constraint, alternative, made)
            both = constraint.edit(alternative.edit(PLAIN, rng) or PLAIN, rng)
            if both is not None:
                check_exclusive(constraint, alternative, both)


@settings(max_examples=60, deadline=None)
@given(texts, st.integers(0, 3))
def test_an_edit_satisfies_the_constraint(text, seed):
    rng = random.Random(seed)
    for constraint in MEASURED:
        for source in (text, PLAIN):
            edited = constraint.edit(source, rng)
            assert edited is None or (edited.strip() and constraint.check(edited)), constraint


def test_most_kinds_can_edit_an_ordinary_text():
    rng = random.Random(0)
    longer = PLAIN + "\n\n" + "It is cheap. It is easy. Nobody minds it; try it."
    assert {c.kind for c in MEASURED if c.edit(longer, rng) is None} == {
        "han_characters", "word_frequency", "letter_frequency", "commas",
    }  # fmt: skip


def test_most_measured_kinds_have_alternatives():
    rng = random.Random(0)
    assert {c.kind for c in MEASURED if not c.alternatives(rng)} == {"postscript"}


def test_alternatives_and_edits_are_seeded():
    for constraint in MEASURED:
        first, second = (constraint.alternatives(random.Random(3)) for _ in range(2))
        assert first == second


def test_conflicts_are_symmetric_and_name_kinds():
    for kind, cls in KINDS.items():
        others = conflicts_of(kind)
        assert others <= set(KINDS)
        assert all(kind in conflicts_of(other) for other in others)
        assert (kind in others) == (not vars(cls).get("repeatable", False))
    assert "first_word" in conflicts_of("repeat_prompt") and "keywords" in conflicts_of("keywords")


def test_compatible():
    lower, upper = make("case", style="lower"), make("case", style="upper")
    commas = make("commas", relation="exactly", number=0)
    words = [make("include_words", words=[word]) for word in ("sun", "moon")]
    assert compatible([lower, commas, *words])
    assert not compatible([lower, commas, upper])
    assert not compatible([make("wrapped", style="double quotes"), make("layout", style="json")])


def test_follows_strict_and_loose():
    rules = [make("bullets", relation="exactly", number=1), make("case", style="lower")]
    assert follows(rules, "Sure:\n- a") == [True, False]
    assert follows_loosely(rules, "Sure:\n- a") == [True, True]
    empty = [make("forbid_words", words=["a"])]
    assert follows(empty, " \n") == [False] and follows_loosely(empty, " \n") == [False]


@pytest.mark.parametrize(
    "kind, params, message",
    [
        ("nonsense", {}, "unknown constraint kind 'nonsense'"),
        ("words", {"relation": "exactly"}, "expected .*relation.*number"),
        ("words", {"relation": "exactly", "number": 3, "unit": 1}, "expected .*number"),
        ("words", {"relation": "about", "number": 3}, "relation='about'"),
        ("words", {"relation": "exactly", "number": -1}, "0 or more"),
        ("words", {"relation": "exactly", "number": True}, "whole number"),
        ("words", {"relation": "exactly", "number": "3"}, "whole number"),
        ("case", {"style": "small"}, "style='small'"),
        ("first_word", {"word": "two words"}, "one lower-case word"),
        ("first_word", {"word": "Big"}, "one lower-case word"),
        ("include_words", {"words": []}, "one or more words"),
        ("include_words", {"words": "word"}, "one or more words"),
        ("letter_frequency", {"relation": "exactly", "number": 1, "letter": "ab"}, "one lower"),
        ("keywords", {"words": ["("]}, "no regular expression"),
        ("closing_note", {"marker": "PS"}, "marker='PS'"),
        ("nth_paragraph_first_word", {"paragraphs": 1, "nth": 2, "word": "a"}, "at least nth=2"),
        ("response_language", {"code": "English"}, "language code"),
    ],
)
def test_bad_parameters_say_what_is_expected(kind, params, message):
    with pytest.raises(ValueError, match=message):
        make(kind, **params)


@pytest.mark.parametrize("row", [{}, {"kind": "words"}, {"kind": 3, "params": {}}])
def test_bad_rows(row):
    with pytest.raises(ValueError, match="'kind' and an object 'params'"):
        from_dict(row)


def test_language_detection_is_seeded():
    assert detect_language(PLAIN) == "en" and detect_language("123") is None
    import langdetect

    assert langdetect.DetectorFactory.seed == 0
