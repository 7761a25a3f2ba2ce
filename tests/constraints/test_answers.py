"""What gives a hollow answer away in its text: by part, by language, and on planted ones."""

from collections import Counter
from pathlib import Path

import pytest

from iopo.constraints import from_dict, make
from iopo.constraints.answers import hollow, least_words, repeated
from iopo.files import read_records

PLANTED = Path(__file__).resolve().parents[1] / "fixtures" / "hollow_answers.jsonl"
TASK = "Explain why birds migrate.\n1. Your answer must contain exactly 2 commas."
GOOD = (
    "Birds migrate because food becomes scarce in winter. They fly to warm places, raise their "
    "young there, and return in spring."
)
TASK_ZH = "请说明鸟类为什么迁徙。\n1. 全文中不能出现任何感叹号。"
GOOD_ZH = "鸟类迁徙是因为冬天的食物变少。它们飞到温暖的地方，等到春天再回来。"


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        (GOOD, ()),
        (f"Sure! {GOOD}\n\n1. Your answer must contain exactly 2 commas.", ()),  # most is an answer
        ("", ("empty",)),
        ("They fly to find food.", ("too_short",)),
        ("# Birds\n\n**Why birds migrate**\n\nThe reasons why they do it:", ("too_short",)),
        (GOOD + " They fly to warm places, raise their young there" * 4, ("repetitive",)),
        (TASK, ("echo", "restates")),
        (f"Birds. {TASK}", ("echo", "restates")),
        ("My response has exactly two commas, and this sentence ends.", ("restates",)),
        ("food, warmth, nests, insects, daylight, wind, breeding, habit", ("no_prose",)),
        ("Les oiseaux migrent parce que la nourriture manque en hiver.", ("no_prose",)),
    ],
)
def test_a_text_that_does_not_answer_says_why(text, reasons):
    assert hollow(text, TASK) == reasons


@pytest.mark.parametrize(
    ("text", "prompt", "reasons"),
    [
        (GOOD_ZH, TASK_ZH, ()),
        ("为了食物。", TASK_ZH, ("too_short",)),
        (TASK_ZH, TASK_ZH, ("echo",)),
        ("食物、温暖、巢穴、昆虫、阳光、风向、繁殖、习惯、本能、季节", TASK_ZH, ("no_prose",)),
        (GOOD, TASK_ZH, ("no_prose",)),  # another language than the prompt's
        (
            "鳥は冬に食べ物が少なくなるので暖かい所へ飛びます。",
            "鳥が渡る理由を説明してください。",
            (),
        ),
    ],
)
def test_languages_without_blanks(text, prompt, reasons):
    assert hollow(text, prompt) == reasons


def test_repetition_without_blanks_is_counted_in_characters():
    assert repeated(GOOD_ZH) == 0 and repeated(GOOD_ZH * 2) > 0.4


def test_an_answer_that_was_cut_off_is_hollow():
    assert hollow(GOOD, TASK, ended=False) == ("cut_off",)


def test_constraints_allow_what_they_ask_for():
    few = make("words", relation="at most", number=3)
    assert (
        hollow("They need food.", TASK) == ("too_short",) != hollow("They need food.", TASK, [few])
    )
    assert least_words([make("han_characters", relation="exactly", number=6)]) == 4
    assert hollow("My answer is yes.", TASK, [make("constrained_response")]) == ()
    again = make("repeat_prompt", phrase="Explain why birds migrate.")
    assert hollow(f"Explain why birds migrate.\n{GOOD}", TASK, [again]) == ()
    assert hollow("Explain why birds migrate.", TASK, [again]) == ("too_short", "no_prose")
    french = make("response_language", code="fr")
    text = "Les oiseaux migrent parce que la nourriture manque en hiver."
    assert hollow(text, TASK, [french]) == ()
    two = make("two_responses")
    assert hollow(f"{GOOD}\n******\nIn short: {GOOD}", TASK, [two]) == ()


def test_planted_hollow_answers_are_caught_by_their_text_but_for_those_that_need_a_model():
    rows = read_records(PLANTED)
    assert len(rows) >= 40 and len({row["kind"] for row in rows}) >= 10
    missed = [
        row["kind"]
        for row in rows
        if not hollow(
            row["text"],
            row["prompt"],
            [from_dict(constraint) for constraint in row["constraints"]],
            ended=row["ended"],
        )
    ]
    # the gibberish has the function words of a phrase that is asked for
    assert Counter(missed) == {"another task's answer": 5, "gibberish with the right marks": 2}
