"""Published ids of checkable constraints: each makes the constraints that its instruction names."""

import json
from pathlib import Path

import pytest

from iopo.constraints import IFEVAL_IDS, IFTRAIN_IDS, from_function, from_id

SETS = Path(__file__).resolve().parents[1] / "fixtures" / "sets"
# id, arguments, a text that follows, a text that does not
IFTRAIN = [
    ("keywords:word_once", {"keyword": "sun"}, "The sun.", "Sun and sun."),
    ("keywords:word_count_different_numbers", {"keyword": "sun", "frequency": 2, "relation":
     "less than"}, "The sun.", "Sun and sun."),
    ("keywords:exclude_word_harder", {"keyword": "sun"}, "Sunny.", "The sun."),
    ("letters:letter_counting2", {"letter": "s", "let_frequency": 2, "let_relation": "at least"},
     "Suns.", "Sun."),
    ("letters:letter_counting", {"N": 4, "relation": "less than"}, "Sun.", "Suns."),
    ("paragraphs:paragraphs", None, "a\n***\nb", "a"),
    ("paragraphs:paragraphs2", None, "a\n\nb", "a\n\nb\n\nc"),
    ("first_word:first_word_sent", {"first_word": "we"}, "We ran. We won.", "We ran. They won."),
    ("first_word:first_word_answer", {"first_word": "we"}, "We ran. They won.", "They won."),
    ("last_word:last_word_sent", {"last_word": "end"}, "The end. Then the end!", "The end. No."),
    ("last_word:last_word_answer", {"last_word": "End"}, "No. The end.", "The end. No."),
    ("detectable_format:bigram_wrapping", None, "<<a b>> <<c d>>", "a b"),
    ("detectable_format:square_brackets", None, "[a] [b]", "[a] b"),
    ("detectable_format:sentence_hyphens", None, "One.-Two.", "One. Two."),
    ("copy:copy", {"prompt_to_repeat": "Do it."}, "do it.", "Done."),
    ("copy:copying_simple", {"prompt_to_repeat": "Do it."}, "Do it.", "Do it. Done."),
    ("copy:copying_multiple", {"prompt_to_repeat": "Do it.", "N": 2}, "Do it.******Do it.",
     "Do it."),
    ("new:copy_span_idx", {"prompt_to_repeat": "Do it now.", "n_start": 3, "n_end": 9}, "it now",
     "Do it"),
    ("copy:repeat_phrase", {"phrase": "a b c", "small_n": 1}, "a x c", "a b c"),
    ("punctuation:punctuation_dot", None, "No", "No."),
    ("punctuation:punctuation_exclamation", None, "No", "No!"),
    ("count:lowercase_counting", {"N": 1}, "One two", "one two"),
    ("count:counting_composition", {"n_sent": 1, "n_words": 1}, "A.\n***\nB.\n***\nC.", "A."),
    ("count:count_unique", None, "one two", "one one"),
    ("count:count_increment_word", {"keyword1": "sun", "keyword2": "sea"}, "sun sea sea",
     "sun sea"),
    ("keywords:palindrome", None, "level", "label"),
    ("keywords:keyword_specific_position", {"keyword": "sea", "n": 2, "m": 1}, "Go. sea!",
     "sea. Go!"),
    ("keywords:start_end", None, "sea and sea", "sea and sea."),
    ("keywords:no_adjacent_consecutive", None, "a c", "a b"),
]  # fmt: skip


def follows(constraints, text: str) -> bool:
    return all(constraint.check(text) for constraint in constraints)


def test_there_are_54_ids():
    assert [row[0] for row in IFTRAIN] != [] and {row[0] for row in IFTRAIN} == set(IFTRAIN_IDS)
    assert len(IFEVAL_IDS) == 25 and len(IFTRAIN_IDS) == 29
    assert not {*IFEVAL_IDS} & {*IFTRAIN_IDS}


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), IFTRAIN)
def test_iftrain(name, arguments, good, bad):
    constraints = from_id(name, {**(arguments or {}), "unused": None})
    assert follows(constraints, good) and not follows(constraints, bad)


def test_ids_of_ifeval_are_ifevals():
    (constraint,) = from_id(
        "length_constraints:number_words", {"num_words": 3, "relation": "at least"}
    )
    assert constraint.check("a b c") and not constraint.check("a b")


@pytest.mark.parametrize(
    ("name", "arguments", "good", "bad"),
    [
        ("verify_keywords", {"keyword_list": ["c++"]}, "I like C++.", "I like C."),
        ("verify_keyword_frequency", {"word": "sun", "N": 1}, "Sun, sunny.", "Sun, sun."),
        ("validate_word_constraint", {"N": 4, "quantifier": "around"}, "a b c", "a b"),
        ("validate_word_constraint", {"N": 4, "quantifier": "at most"}, "a b c d", "a b c d e"),
        ("verify_sentence_constraint", {"N": 3, "quantifier": "around"}, "Go. Come.", "Go."),
        ("validate_choice", {"options": ["yes", "no"]}, "I say no.", "I say maybe."),
        ("validate_paragraphs", {"N": 2, "i": 2, "first_word": "then"}, "a\n\nThen b", "a\n\nb"),
        ("validate_no_commas", {}, "a b", "a, b"),
    ],
)
def test_functions_of_rlvr(name, arguments, good, bad):
    constraints = from_function(name, arguments | {"other": None})
    assert follows(constraints, good) and not follows(constraints, bad)


def test_the_fixtures_of_rlvr_are_known():
    rows = [json.loads(line) for line in (SETS / "rlvr_ifeval.jsonl").open()]
    made = [json.loads(row["ground_truth"]) for row in rows]
    assert all(from_function(truth.pop("func_name"), truth) for truth in made)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: from_id("copy:other", {}), "unknown instruction id 'copy:other'; known: "),
        (lambda: from_id("copy:copy", {}), "'copy:copy': bad arguments {}: 'prompt_to_rep"),
        (lambda: from_function("validate_it", {}), "unknown function 'validate_it'"),
    ],
)  # fmt: skip
def test_what_is_not_known(call, message):
    with pytest.raises(ValueError, match=message):
        call()
